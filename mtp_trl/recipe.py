"""Read recipes: convert YAML keys to typed arguments, and report mistakes before data or weights are loaded."""

import argparse
import dataclasses
import json
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

import yaml
from trl import ModelConfig, ScriptArguments, SFTConfig, TrlParser

from .argument_types import require
from .training.config import MTPDistillConfig

BUNDLED = "word_problems"
DATA_FILES = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}
# Keys whose value may be a path, relative to the current directory or to the root of the recipe's repository.
_MODEL_OR_DATA = ("model_name_or_path", "dataset_name")
_FILES = ("deepspeed", "fsdp_config", "accelerator_config")


class RecipeError(ValueError):
    """A recipe is invalid; the message says what to change."""


@dataclass
class RecipeArguments(ScriptArguments):
    """The arguments of a recipe besides the training and model arguments. The command line overrides the recipe."""

    trainer: str = field(
        default="mtp", metadata={"help": "mtp for MTPDistillTrainer, sft for trl.SFTTrainer.", "choices": ["mtp", "sft"]}
    )
    dataset_size: int | None = field(
        default=None, metadata={"help": "Train on the first n rows; word_problems has any number of rows."}
    )
    dataset_seed: int = field(default=0, metadata={"help": "Seed of the training stream of word_problems."})
    eval_size: int | None = field(default=None, metadata={"help": "Evaluate on the first n rows of the test split."})
    prompt_format: str | None = field(default=None, metadata={"help": "Text around every prompt; {} stands for the prompt."})
    completion_format: str | None = field(
        default=None, metadata={"help": "Text around every completion; {} stands for the completion."}
    )
    chat_template: bool = field(
        default=False, metadata={"help": "Turn text prompts and completions into messages for the chat template."}
    )
    model_config: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Start from random weights of this config, with the tokenizer of model_name_or_path."}
    )
    global_batch_size: int | None = field(
        default=None, metadata={"help": "Rows of one optimizer step over all processes; sets the accumulation steps."}
    )
    cpu_threads: int | None = field(default=None, metadata={"help": "Threads of a single CPU process; all cores by default."})

    def __post_init__(self) -> None:
        if isinstance(self.model_config, str):  # from the command line
            self.model_config = json.loads(self.model_config)
        for name in ("dataset_size", "eval_size", "global_batch_size", "cpu_threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}.")


@dataclass
class SFTRecipeConfig(SFTConfig):
    """[`trl.SFTConfig`] with the fields of [`MTPDistillConfig`] that also apply to SFT."""

    column_map: dict[str, Any] | str | None = field(default=None, metadata={"help": "Renames dataset columns."})
    gguf_file: str | None = field(default=None, metadata={"help": "GGUF file in the base's folder or repository."})
    muon: bool = field(default=False, metadata={"help": "Muon on weight matrices, AdamW elsewhere."})

    _VALID_DICT_FIELDS = [*SFTConfig._VALID_DICT_FIELDS, "column_map"]


@dataclass(frozen=True)
class Recipe:
    """A recipe with its overrides applied: what to train (`arguments`, `model`) and how (`training`)."""

    arguments: RecipeArguments
    training: MTPDistillConfig | SFTRecipeConfig
    model: ModelConfig


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Parse a recipe and the options that override it, e.g. `["--max_steps", "10"]`.

    Raises:
        RecipeError: the file does not exist or is not a YAML mapping, a key or an option is unknown, a value has the wrong
            type, or a file that the recipe names does not exist.
    """
    values = _load(path)
    kind = _trainer_kind(values, overrides)
    classes = (RecipeArguments, MTPDistillConfig if kind == "mtp" else SFTRecipeConfig, ModelConfig)
    names = {item.name for cls in classes for item in dataclasses.fields(cls) if item.init}
    _check_known(values, names, where=f"{path.name} (trainer: {kind})")
    for key in (*_MODEL_OR_DATA, *_FILES):
        if isinstance(values.get(key), str):
            values[key] = locate(values[key], recipe=path)
    parser = _Parser(classes)
    parser.set_defaults_with_config(**values)
    namespace, _ = parser.parse_known_args(list(overrides))
    _check_deepspeed(namespace.deepspeed)
    _set_accumulation(parser, namespace)
    try:
        with warnings.catch_warnings():
            # TRL sets this field by default, under the name that transformers has deprecated.
            warnings.filterwarnings("ignore", "`gradient_checkpointing` is deprecated", FutureWarning)
            arguments, training, model, unknown = parser.parse_args_into_dataclasses(
                args=list(overrides), return_remaining_strings=True, look_for_args_file=False
            )
    except (ValueError, TypeError) as error:
        raise RecipeError(str(error)) from error
    options = [text[2:].split("=")[0].replace("-", "_") for text in unknown if text.startswith("--")]
    _check_known(options, names, where="the command line")
    if unknown and not options:
        raise RecipeError(f"{' '.join(unknown)!r} on the command line belongs to no option.")
    _check_sources(path, arguments, model)
    if training.gguf_file is not None:
        _check_gguf(training.gguf_file, model)
    return Recipe(arguments, training, model)


def accumulation_steps(global_batch_size: int, *, per_device: int, processes: int) -> int:
    """Return the number of micro-batches in an optimizer step.

    Raises:
        RecipeError: the global batch is not a multiple of the rows of one micro-batch on all processes.
    """
    steps, rest = divmod(global_batch_size, per_device * processes)
    if rest or not steps:
        raise RecipeError(
            f"global_batch_size={global_batch_size} is not a multiple of per_device_train_batch_size={per_device} x "
            f"{processes} processes; change one of these."
        )
    return steps


def _set_accumulation(parser: "_Parser", values: argparse.Namespace) -> None:
    """Derive gradient_accumulation_steps before the arguments are built, because DeepSpeed derives its batch sizes from it."""
    if values.global_batch_size is None:
        return
    if values.gradient_accumulation_steps != 1:
        raise RecipeError("Set global_batch_size or gradient_accumulation_steps, not both: each determines the other.")
    steps = accumulation_steps(
        values.global_batch_size,
        per_device=values.per_device_train_batch_size,
        processes=int(os.environ.get("WORLD_SIZE", "1")),
    )
    parser.set_defaults(gradient_accumulation_steps=steps)


def locate(name: str, *, recipe: Path) -> str:
    """Resolve a path against the root of the recipe's repository if it does not exist in the current directory.

    A name that exists in neither is returned unchanged: it may be a Hub id.
    """
    if Path(name).exists() or Path(name).is_absolute():
        return name
    in_repository = _repository(recipe) / name
    return str(in_repository) if in_repository.exists() else name


def _repository(recipe: Path) -> Path:
    """Return the nearest folder above the recipe with a pyproject.toml or .git, otherwise the recipe's own folder."""
    folder = recipe.resolve().parent
    for parent in (folder, *folder.parents):
        if (parent / "pyproject.toml").exists() or (parent / ".git").exists():
            return parent
    return folder


def _load(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise RecipeError(f"There is no recipe {path}.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise RecipeError(f"{path} must contain `key: value` lines, got {type(values).__name__}.")
    values.pop("launch", None)
    return values


def _trainer_kind(values: Mapping[str, Any], overrides: Sequence[str]) -> str:
    kind = str(values.get("trainer", "mtp"))
    for option, following in zip(overrides, (*overrides[1:], ""), strict=False):
        name, equals, value = option.partition("=")
        if name == "--trainer":
            kind = value if equals else following
    if kind not in ("mtp", "sft"):
        raise RecipeError(f"trainer must be mtp or sft, got {kind!r}.")
    return kind


def _check_known(keys: Iterable[str], names: set[str], *, where: str) -> None:
    problems = []
    for key in keys:
        if key not in names:
            close = get_close_matches(str(key), sorted(names), n=1)
            problems.append(f"{key!r}" + (f" (did you mean {close[0]!r}?)" if close else ""))
    if problems:
        raise RecipeError(f"Unknown in {where}: {', '.join(problems)}.")


def _check_deepspeed(config: Any) -> None:
    """Check DeepSpeed before the arguments are built: building them sets the DeepSpeed config of the whole process."""
    if isinstance(config, str) and not config.startswith("{") and not Path(config).is_file():
        raise RecipeError(f"deepspeed names {config!r}, which does not exist.")
    if config and os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true", "yes"):
        raise RecipeError(
            "ACCELERATE_USE_CPU (`accelerate launch --cpu`) silently switches DeepSpeed off; unset it and pass "
            "--use_cpu true after the recipe, or remove the line `deepspeed:`."
        )


def _check_sources(path: Path, arguments: RecipeArguments, model: ModelConfig) -> None:
    """Check that local models and data exist. Any other name may be a Hub id, which the Hub checks."""
    if not model.model_name_or_path:
        raise RecipeError("model_name_or_path is missing: a Hub id or a folder.")
    if not arguments.dataset_name:
        raise RecipeError(f"dataset_name is missing: a Hub id, a file (json, jsonl, parquet), a folder or {BUNDLED}.")
    model.model_name_or_path = locate(model.model_name_or_path, recipe=path)
    if Path(model.model_name_or_path).suffix == ".gguf":
        folder, file = os.path.split(model.model_name_or_path)
        raise RecipeError(
            f"model_name_or_path names a GGUF file; set model_name_or_path to {folder or '.'!r} and gguf_file to {file!r}."
        )
    arguments.dataset_name = locate(arguments.dataset_name, recipe=path)
    _check_present("model_name_or_path", model.model_name_or_path)
    if arguments.dataset_name != BUNDLED:
        _check_present("dataset_name", arguments.dataset_name)
    if arguments.model_config and arguments.trainer != "sft":
        raise RecipeError("model_config (random weights) needs `trainer: sft`: random weights have nothing to distil.")


def _check_gguf(gguf_file: str, model: ModelConfig) -> None:
    """Check that the GGUF file of a local model exists, that it can be read, and that no quantisation is requested as well."""
    try:
        require("gguf", "gguf_file", extra="gguf")
    except ValueError as error:
        raise RecipeError(str(error)) from error
    folder = Path(model.model_name_or_path)
    if folder.is_dir() and not (folder / gguf_file).is_file():
        raise RecipeError(f"gguf_file names {gguf_file!r}, which is not in {str(folder)!r}; name a file in this folder.")
    if model.load_in_4bit or model.load_in_8bit:
        raise RecipeError(
            "load_in_4bit and load_in_8bit cannot be combined with gguf_file, whose weights are dequantised; leave them out."
        )


def _check_present(key: str, name: str) -> None:
    looks_local = name.count("/") > 1 or name.startswith((".", "/", "~")) or Path(name).suffix in DATA_FILES
    if looks_local and not Path(name).exists():
        raise RecipeError(f"{key} names {name!r}: no such file or folder, and not a Hub id (owner/name).")


class _Parser(TrlParser):
    """A parser that reports a wrong value in one line instead of printing hundreds of options."""

    def error(self, message: str) -> NoReturn:
        raise RecipeError(message)
