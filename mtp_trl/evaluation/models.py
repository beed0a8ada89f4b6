"""Models for evaluation: loaded in float32 on a CPU, as they were saved elsewhere, with the folder's own `generate`."""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..custom_generate import generate as decoder
from ..hub import PROVENANCE_FILE, repository_file
from ..lora import LORA_CONFIG, put_on


def load_student(name: str | Path, *, base: str | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """An adapted model with the multi-token `generate` it carries, and its tokenizer.

    Args:
        base: the model below adapters without weights; by default the one that they name. LoRA is merged into it.

    Raises:
        ValueError: the model was never adapted, or the base of an adapter cannot be loaded or is another one.
    """
    _check_there(name)
    if (config := repository_file(name, LORA_CONFIG)) is not None:
        named = json.loads(Path(config).read_text(encoding="utf-8"))["base_model_name_or_path"]
        tokenizer = load_tokenizer(name)
        adapted = put_on(_load_base_of(name, base or named), tokenizer, name)
        return decoder.attach_decoder(adapted.merge_and_unload()), tokenizer
    if repository_file(name, "config.json") is None and (adapter := repository_file(name, decoder.ADAPTER_FILE)) is not None:
        return _load_base_with(name, adapter, base), load_tokenizer(name)
    model = _load(name, trust_remote_code=True)
    if not hasattr(model.config, "mtp"):
        raise ValueError(f"{name} has no mask token (`mtp` in config.json); pass a model that this package adapted.")
    return model, load_tokenizer(name)


def _check_there(name: str | Path) -> None:
    """In our words, before transformers' many."""
    wanted = ("config.json", LORA_CONFIG, decoder.ADAPTER_FILE)
    try:
        reason = None if any(repository_file(name, file) for file in wanted) else "no config.json in it, or not in reach"
    except OSError as error:  # no such repository, or none for this token
        reason = next(iter(str(error).splitlines()), type(error).__name__)
    if reason is not None and Path(name).is_dir():
        raise ValueError(f"The folder {name} holds no model (no config.json); pass what a run saved or `mtp-trl export` wrote.")
    if reason is not None:
        raise ValueError(f"There is no folder {str(name)!r} here, and as a name on the Hub it cannot be read: {reason}.")


def base_name(name: str | Path) -> str | None:
    """What an adapted model was made of, by its own provenance; None where it has none."""
    path = repository_file(name, PROVENANCE_FILE)
    return None if path is None else json.loads(Path(path).read_text(encoding="utf-8")).get("base_model")


def weights_of(name: str | Path) -> list[str]:
    """What changes when other weights stand under the same name: the files of a folder and when they were written."""
    return [f"{path.name} {path.stat().st_mtime_ns}" for path in sorted(Path(name).glob("*.safetensors"))]


def _load_base_with(name: str | Path, adapter: str, base: str | None) -> PreTrainedModel:
    if base is None:
        with safe_open(adapter, framework="pt") as file:
            base = file.metadata()["base_model_name_or_path"]
    return decoder.attach_adapter(decoder.attach_decoder(_load_base_of(name, base)), str(name))


def _load_base_of(name: str | Path, base: str) -> PreTrainedModel:
    try:
        return load_base(base)
    except (OSError, ValueError) as error:
        raise ValueError(f"{name} is an adapter alone, and its base {base!r} cannot be loaded; name it with --base.") from error


def load_base(name: str | Path) -> PreTrainedModel:
    """A model as transformers decodes it, one token per pass."""
    _check_there(name)
    return _load(name, trust_remote_code=False)


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model; its end of text pads where it has no pad token."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(name))
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _load(name: str | Path, *, trust_remote_code: bool) -> PreTrainedModel:
    logging.disable_progress_bar()  # one bar per model is noise between tables
    cuda = torch.cuda.is_available()
    # One token alone and the same token with others behind it differ by rounding: only float32 decodes identically,
    # and bfloat16 is slow on most CPUs.
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        str(name), trust_remote_code=trust_remote_code, dtype="auto" if cuda else torch.float32
    )
    return model.to("cuda" if cuda else "cpu").eval()
