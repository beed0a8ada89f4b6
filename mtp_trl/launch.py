"""Run recipes, so that `accelerate launch recipes/llama.yaml` trains.

A recipe is a YAML file that is also a Python program. Its first entry is
`launch: str = __import__("mtp_trl.launch", fromlist=["run"]).run(__file__)`. YAML reads it as a string. Python calls `run`,
which trains and raises SystemExit before the lines below are executed; these lines only have to compile. Options after the
path override the recipe: `accelerate launch recipes/tiny.yaml --max_steps 10`.
"""

# Import only the standard library at the top: the environment has to be set before torch is loaded.
from __future__ import annotations

import atexit
import ctypes
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedTokenizerBase
    from trl import ModelConfig

    from .recipe import Recipe

# Parameters of glibc's mallopt.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_TOP_PAD_BYTES = 1 << 28
# Exit status that shells report for a program ended by SIGTERM.
_STOPPED = 128 + signal.SIGTERM


def run(path: str) -> str:
    """Train the recipe at `path` and exit. The first line of the recipe calls this function.

    Data-loader workers started by spawn or forkserver execute the recipe again, as `__mp_main__`. In a worker this function
    defines YAML's constants in the recipe's namespace, so that the remaining lines can run, and returns `path`.
    """
    caller = sys._getframe(1).f_globals
    if caller["__name__"] == "__mp_main__":
        caller.update(true=True, false=False, null=None)
        return path
    status: list[int] = []
    atexit.register(_skip_teardown, status)  # registered first, so called last
    status.append(main(Path(path), sys.argv[1:]))
    raise SystemExit(status[0])


def _skip_teardown(status: list[int]) -> None:
    """Exit before interpreter teardown if the run has finished and is one of several processes.

    A gloo thread that releases a tensor during teardown needs the interpreter and aborts the process. `accelerate launch`
    would then report a finished run as failed (pytorch issue 190489).
    """
    if status and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status[0])


def main(path: Path, overrides: Sequence[str] = ()) -> int:
    """Train and return the exit status. If the recipe is invalid, print one line on stderr."""
    _prepare_cpu()
    from .recipe import RecipeError, read_recipe

    try:
        trainer = train(read_recipe(path, overrides))
    except RecipeError as error:
        print(f"{path}: {error}", file=sys.stderr)
        return 2
    return _STOPPED if _stopped(trainer) else 0


def train(recipe: Recipe) -> Any:
    """Load the data, the tokenizer and the model, train, save, and push if the recipe sets `push_to_hub`.

    Returns:
        The trainer. If SIGTERM ended the run, the trainer has saved a checkpoint but no model.

    Raises:
        ValueError: the data cannot be used, e.g. columns are missing or there are too few rows for one optimizer step. It is
            raised before weights are loaded.
    """
    _use_all_cores(recipe)
    from transformers import AutoTokenizer

    from .modeling.gguf import gguf_argument

    training, model = recipe.training, recipe.model
    datasets = _load_data(recipe)
    tokenizer = AutoTokenizer.from_pretrained(
        model.model_name_or_path,
        revision=model.model_revision,
        trust_remote_code=training.trust_remote_code,
        padding_side="left",
        **gguf_argument(training.gguf_file),
    )
    build = _sft_trainer if recipe.arguments.trainer == "sft" else _mtp_trainer
    trainer = build(recipe, tokenizer, *datasets)
    _show_progress(trainer)
    trainer.train(resume_from_checkpoint=_checkpoint(recipe))
    if _stopped(trainer):
        trainer.accelerator.print(f"Stopped by SIGTERM; checkpoint-{trainer.stopped_at} is in {training.output_dir}.")
        return trainer
    trainer.save_model(training.output_dir)
    trainer.accelerator.print(f"Model saved to {training.output_dir}.")
    if training.push_to_hub:
        trainer.push_to_hub()
    if hasattr(trainer, "end"):  # closes trackers and process group; transformers >= 5.18
        trainer.end()
    return trainer


def _stopped(trainer: Any) -> bool:
    return getattr(trainer, "stopped_at", None) is not None  # trl.SFTTrainer has no `stopped_at`


def _show_progress(trainer: Any) -> None:
    """In a terminal, show progress bars with the remaining time and a live table of the last log.

    The table includes acceleration and agreement by position.
    """
    from transformers import ProgressCallback
    from trl import RichProgressCallback

    if sys.stdout.isatty() and not trainer.args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(RichProgressCallback)


def _peft_config(model: ModelConfig) -> Any:
    """Return the PEFT config with target modules as names.

    TRL turns a list of one target module into a string, which PEFT would read as a pattern for full names.
    """
    from trl import get_peft_config

    config = get_peft_config(model)
    if config is not None and isinstance(config.target_modules, str) and config.target_modules != "all-linear":
        config.target_modules = {config.target_modules}
    return config


def _mtp_trainer(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, train_set: Any, eval_set: Any) -> Any:
    from trl import get_quantization_config

    from .modeling.files import public_name
    from .training.trainer import MTPDistillTrainer

    model, training = recipe.model, recipe.training
    options = {"revision": model.model_revision, "attn_implementation": model.attn_implementation, "dtype": model.dtype}
    training.model_init_kwargs = {**options, **(training.model_init_kwargs or {})}
    trainer = MTPDistillTrainer(
        model=model.model_name_or_path,
        args=training,
        train_dataset=train_set,
        eval_dataset=eval_set,
        processing_class=tokenizer,
        quantization_config=get_quantization_config(model),
        peft_config=_peft_config(model),
    )
    trainer.provenance["dataset"] = public_name(str(recipe.arguments.dataset_name))
    return trainer


def _sft_trainer(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, train_set: Any, eval_set: Any) -> Any:
    from trl import SFTTrainer

    from .training.optimizer import muon_adamw

    training = recipe.training
    model = _model_for_sft(recipe, tokenizer)
    optimizer = None
    if training.muon:
        optimizer = muon_adamw(
            model,
            lr=training.learning_rate,
            betas=(training.adam_beta1, training.adam_beta2),
            eps=training.adam_epsilon,
            weight_decay=training.weight_decay,
        )
    return SFTTrainer(
        model=model,
        args=training,
        train_dataset=train_set,
        eval_dataset=eval_set,
        processing_class=tokenizer,
        optimizers=(optimizer, None),
        peft_config=_peft_config(recipe.model),
    )


def _model_for_sft(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Any:
    """Load the named model, or create one of `model_config` with random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM, set_seed

    from .modeling.gguf import gguf_options

    model, config = recipe.model, recipe.arguments.model_config
    if not isinstance(config, dict):
        return AutoModelForCausalLM.from_pretrained(
            model.model_name_or_path,
            revision=model.model_revision,
            attn_implementation=model.attn_implementation,
            dtype=model.dtype,
            trust_remote_code=recipe.training.trust_remote_code,
            **gguf_options(recipe.training.gguf_file),
        )
    set_seed(recipe.training.seed)
    fresh = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=model.dtype)
    fresh.generation_config.eos_token_id = tokenizer.eos_token_id
    fresh.generation_config.pad_token_id = tokenizer.pad_token_id
    return fresh


def _load_data(recipe: Recipe) -> tuple[Dataset | IterableDataset, Dataset | IterableDataset | None]:
    """Load the training set and, if the recipe evaluates, the test set, with formatted columns."""
    arguments = recipe.arguments
    train_set = _load_split(recipe, arguments.dataset_train_split, arguments.dataset_size)
    if str(recipe.training.eval_strategy.value) == "no":
        return train_set, None
    return train_set, _load_split(recipe, arguments.dataset_test_split, arguments.eval_size)


def _load_split(recipe: Recipe, split: str, size: int | None) -> Any:
    from datasets import load_dataset

    from . import word_problems
    from .recipe import BUNDLED, DATA_FILES, RecipeError
    from .training.data import format_columns, rename_columns

    arguments = recipe.arguments
    name = str(arguments.dataset_name)
    if name == BUNDLED:
        if split == "train" and size is None:
            raise RecipeError(f"{BUNDLED} is an unlimited stream; set dataset_size to the number of problems to draw.")
        dataset = word_problems.load_dataset(split, size or word_problems.TEST_SIZE, arguments.dataset_seed)
    else:
        source: dict[str, Any] = {"path": name, "name": arguments.dataset_config}
        if Path(name).is_file():
            source = {"path": DATA_FILES[Path(name).suffix], "data_files": name}
        splits = load_dataset(**source, streaming=arguments.dataset_streaming)
        if split not in splits:
            raise RecipeError(f"{name} has the splits {', '.join(splits)}, not {split!r}; set dataset_*_split.")
        dataset = splits[split]
        if size is not None:
            dataset = dataset.take(size)
    column_map: Any = recipe.training.column_map  # TRL parses a string from the command line into a dict
    dataset = format_columns(
        dataset,
        column_map=column_map,
        prompt_format=arguments.prompt_format,
        completion_format=arguments.completion_format,
        as_messages=arguments.chat_template,
    )
    # MTPDistillTrainer renames the columns itself.
    return rename_columns(dataset, column_map) if arguments.trainer == "sft" else dataset


def _checkpoint(recipe: Recipe) -> str | None:
    """Return the checkpoint to resume from, or None to start from scratch.

    `resume_from_checkpoint: auto` (or true) selects the last checkpoint of output_dir, if there is one.
    """
    from transformers.trainer_utils import get_last_checkpoint

    requested = recipe.training.resume_from_checkpoint
    if requested is None or str(requested).lower() == "false":
        return None
    if str(requested).lower() not in ("auto", "true"):
        return str(requested)
    folder = recipe.training.output_dir
    return get_last_checkpoint(folder) if Path(folder).is_dir() else None


def _prepare_cpu() -> None:
    """Keep freed memory in the process: mapping it again for every tensor took a tenth of the demo's time on 2 cores.

    With CUDA the tensors are in GPU memory, and this has almost no effect.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc has it, musl does not
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)
        mallopt(_M_TOP_PAD, _TOP_PAD_BYTES)


def _use_all_cores(recipe: Recipe) -> None:
    """Set the number of threads of a single CPU process to `cpu_threads` or to the number of cores.

    `accelerate launch` sets OMP_NUM_THREADS=1 if it is unset, which would leave all other cores idle.
    """
    import torch

    if torch.cuda.is_available() or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return
    if recipe.arguments.cpu_threads is not None:
        torch.set_num_threads(recipe.arguments.cpu_threads)
    elif "ACCELERATE_MIXED_PRECISION" in os.environ and os.environ.get("OMP_NUM_THREADS") == "1":
        torch.set_num_threads(_cores())


def _cores() -> int:
    """Return the number of cores that this process may use, or all cores if the system cannot tell (macOS and Windows)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
