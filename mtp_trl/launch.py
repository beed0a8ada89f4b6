"""Runs recipes, so that `accelerate launch recipes/llama.yaml` trains.

A recipe is a YAML file that is also a Python program: its first entry is
`launch: str = __import__("mtp_trl.launch", fromlist=["run"]).run(__file__)`. YAML reads a string there; Python calls
`run`, which trains and leaves by SystemExit before the lines below, which only have to compile, execute. Options after
the path override the recipe: `accelerate launch recipes/tiny.yaml --max_steps 10`.
"""

# Only the standard library here: the environment has to be set before torch is loaded.
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
# Exit status of a program ended by SIGTERM, as shells report it.
_STOPPED = 128 + signal.SIGTERM


def run(path: str) -> str:
    """Train as the recipe at `path` says and exit; the recipe itself calls this in its first line.

    Data-loader workers started by spawn or forkserver execute the recipe once more, as `__mp_main__`: there it returns,
    and YAML's constants get a meaning so that the remaining lines can run.
    """
    caller = sys._getframe(1).f_globals
    if caller["__name__"] == "__mp_main__":
        caller.update(true=True, false=False, null=None)
        return path
    status: list[int] = []
    atexit.register(_skip_teardown, status)  # the first to be registered is the last to be called
    status.append(main(Path(path), sys.argv[1:]))
    raise SystemExit(status[0])


def _skip_teardown(status: list[int]) -> None:
    """Ends one of several processes before its interpreter is taken apart, if the run has come to its end.

    A thread of gloo that then lets go of a tensor needs the interpreter, and aborts the process: `accelerate launch` would
    report a finished run as failed (pytorch issue 190489).
    """
    if status and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status[0])


def main(path: Path, overrides: Sequence[str] = ()) -> int:
    """Train; returns the exit status. A recipe that cannot run as written is refused in one line on stderr."""
    _prepare_cpu()
    from .recipe import RecipeError, read_recipe

    try:
        trainer = train(read_recipe(path, overrides))
    except RecipeError as error:
        print(f"{path}: {error}", file=sys.stderr)
        return 2
    return _STOPPED if _stopped(trainer) else 0


def train(recipe: Recipe) -> Any:
    """Load data and tokenizer, then the model, train, save, and push if the recipe says so.

    Returns:
        The trainer. One that SIGTERM ended has saved a checkpoint and no model.

    Raises:
        ValueError: columns that are not there, too few rows for one optimizer step and the like, before weights load.
    """
    _use_all_cores(recipe)
    from transformers import AutoTokenizer

    training, model = recipe.training, recipe.model
    datasets = _load_data(recipe)
    tokenizer = AutoTokenizer.from_pretrained(
        model.model_name_or_path,
        revision=model.model_revision,
        trust_remote_code=training.trust_remote_code,
        padding_side="left",
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
    return getattr(trainer, "stopped_at", None) is not None  # trl.SFTTrainer has no such thing


def _show_progress(trainer: Any) -> None:
    """In a terminal: bars with the time left, and a live table of the last log with acceleration and agreement by place."""
    from transformers import ProgressCallback
    from trl import RichProgressCallback

    if sys.stdout.isatty() and not trainer.args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(RichProgressCallback)


def _peft_config(model: ModelConfig) -> Any:
    """TRL makes a string of a list of one target module, which PEFT takes for a pattern of whole names."""
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
    """The named model, or one of `model_config` with random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM, set_seed

    model, config = recipe.model, recipe.arguments.model_config
    if not isinstance(config, dict):
        return AutoModelForCausalLM.from_pretrained(
            model.model_name_or_path,
            revision=model.model_revision,
            attn_implementation=model.attn_implementation,
            dtype=model.dtype,
            trust_remote_code=recipe.training.trust_remote_code,
        )
    set_seed(recipe.training.seed)
    fresh = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=model.dtype)
    fresh.generation_config.eos_token_id = tokenizer.eos_token_id
    fresh.generation_config.pad_token_id = tokenizer.pad_token_id
    return fresh


def _load_data(recipe: Recipe) -> tuple[Dataset | IterableDataset, Dataset | IterableDataset | None]:
    """The training set and, if the recipe evaluates, the test set, with columns renamed and formatted."""
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
            raise RecipeError(f"{BUNDLED} is a stream without end; say how many problems to draw: dataset_size.")
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
    column_map: Any = recipe.training.column_map  # text from the command line has become a dict
    dataset = format_columns(
        dataset,
        column_map=column_map,
        prompt_format=arguments.prompt_format,
        completion_format=arguments.completion_format,
        as_messages=arguments.chat_template,
    )
    # MTPDistillTrainer renames by itself.
    return rename_columns(dataset, column_map) if arguments.trainer == "sft" else dataset


def _checkpoint(recipe: Recipe) -> str | None:
    """`resume_from_checkpoint: auto` (or true) is the last checkpoint of output_dir, or a fresh start without one."""
    from transformers.trainer_utils import get_last_checkpoint

    wanted = recipe.training.resume_from_checkpoint
    if wanted is None or str(wanted).lower() == "false":
        return None
    if str(wanted).lower() not in ("auto", "true"):
        return str(wanted)
    folder = recipe.training.output_dir
    return get_last_checkpoint(folder) if Path(folder).is_dir() else None


def _prepare_cpu() -> None:
    """Keep freed memory in the process: mapping it anew for every tensor took a tenth of the demo's time on 2 cores.

    With CUDA the tensors live elsewhere and this changes next to nothing.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc has it, musl does not
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)
        mallopt(_M_TOP_PAD, _TOP_PAD_BYTES)


def _use_all_cores(recipe: Recipe) -> None:
    """`accelerate launch` sets OMP_NUM_THREADS=1 where nothing is said; one process then leaves other cores idle."""
    import torch

    if torch.cuda.is_available() or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return
    if recipe.arguments.cpu_threads is not None:
        torch.set_num_threads(recipe.arguments.cpu_threads)
    elif "ACCELERATE_MIXED_PRECISION" in os.environ and os.environ.get("OMP_NUM_THREADS") == "1":
        torch.set_num_threads(_cores())


def _cores() -> int:
    """Those that this process may use, where the system can say so (macOS and Windows cannot)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
