"""Models for evaluation: loaded in float32 on a CPU, as they were saved elsewhere, with the folder's own `generate`."""

import itertools
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..custom_generate.adapter_file import ADAPTER_FILE, read_adapter_metadata
from ..custom_generate.generate import attach_decoder
from ..custom_generate.repository import attach_adapter
from ..modeling.files import LORA_CONFIG, TOKENIZER_FILES, read_provenance, repository_file
from ..modeling.lora import load_lora, named_base
from ..publishing.decoder_check import check_decoder, decoder_digest, digest
from ..publishing.repository import decoder_files

_ANY_OF = ("config.json", LORA_CONFIG, ADAPTER_FILE)
# Weights, exact mode's adapter, configs and whatever a tokenizer consists of.
_MODEL_FILES = ("*.safetensors", "*.bin", "custom_generate/*.safetensors", "*config.json", *TOKENIZER_FILES)


def load_student(
    name: str | Path, *, base: str | None = None, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """An adapted model with the multi-token `generate` it carries, and its tokenizer.

    Args:
        name: folder or Hub id.
        base: the model below adapters without weights; by default the one that they name. LoRA is merged into it.
        trust_remote_code: run the code of a repository on the Hub although it is none of this package's. A folder's is run.

    Raises:
        ValueError: the model was never adapted, its code is not ours, or the base of an adapter cannot be loaded or is
            another one.
    """
    _check_there(name)
    if (below := _base_below(name, base)) is not None:
        tokenizer = load_tokenizer(name)
        if repository_file(name, LORA_CONFIG) is not None:
            adapted = load_lora(lambda: _load_base_of(name, *below), tokenizer, name)
            return attach_decoder(adapted.merge_and_unload()), tokenizer
        return attach_adapter(attach_decoder(_load_base_of(name, *below)), str(name)), tokenizer
    model = _load(name, trust_remote_code=True, revision=_trusted_revision(name, trust_remote_code=trust_remote_code))
    if not hasattr(model.config, "mtp"):
        raise ValueError(f"{name} has no mask token (`mtp` in config.json); pass a model that this package adapted.")
    return model, load_tokenizer(name)


def _trusted_revision(name: str | Path, *, trust_remote_code: bool) -> str | None:
    """The commit whose code was looked at, so that no other is run; None for a folder, or where any code is trusted.

    Raises:
        ValueError: code that is not ours, and no word that it may run.
    """
    if trust_remote_code or Path(name).is_dir():
        return None
    check = check_decoder(name)
    if not check.is_safe:
        raise ValueError(f"{check.sentence} To run it, pass --trust-remote-code (trust_remote_code=True).")
    return check.commit


def _base_below(name: str | Path, base: str | None) -> tuple[str, str | None] | None:
    """What an adapter without weights acts on, and its revision: by default what it names. None for whole models."""
    if repository_file(name, LORA_CONFIG) is not None:
        return named_base(name) if base is None else (base, None)
    if repository_file(name, "config.json") is not None or (path := repository_file(name, ADAPTER_FILE)) is None:
        return None
    return base or read_adapter_metadata(path)["base_model"], None


def _check_there(name: str | Path, revision: str | None = None) -> None:
    """In our words, before transformers' many."""
    try:
        there = any(repository_file(name, file, revision) for file in _ANY_OF)
        reason = None if there else "no config.json in it, or not in reach"
    except OSError as error:  # no such repository, or none for this token
        reason = next(iter(str(error).splitlines()), type(error).__name__)
    if reason is not None and Path(name).is_dir():
        raise ValueError(f"The folder {name} holds no model (no config.json); pass what a run saved or `mtp-trl export` wrote.")
    if reason is not None:
        raise ValueError(f"There is no folder {str(name)!r} here, and as a name on the Hub it cannot be read: {reason}.")


def base_name(name: str | Path) -> str | None:
    """What an adapted model was made of, by its own provenance; None where it has none."""
    made = read_provenance(name)
    return None if made is None else made.get("base_model")


def identity(name: str | Path, base: str | None) -> list[str]:
    """What changes when other weights, tokenizer or decoder stand under the same names, or are decoded elsewhere.

    Of a folder its files and when they were written, of a repository on the Hub its commit. `base` as for `run_eval`; of an
    adapter alone that which it names is meant, too.
    """
    below = _base_below(name, base) if base is None else (base, None)
    code = [decoder_digest(name), digest(decoder_files())]
    return [*_stored(name), *([] if below is None else _stored(*below)), *code, *map(str, _device_and_dtype())]


def _stored(name: str | Path, revision: str | None = None) -> list[str]:
    if Path(name).is_dir():
        files = sorted({path for pattern in _MODEL_FILES for path in Path(name).glob(pattern)})
        return [str(name), *(f"{path.name} {path.stat().st_mtime_ns}" for path in files)]
    found = filter(None, (repository_file(name, file, revision) for file in _ANY_OF))
    return [str(name), *itertools.islice(found, 1)]  # a cached file lies in the folder of its commit


def _load_base_of(name: str | Path, base: str, revision: str | None) -> PreTrainedModel:
    try:
        return load_base(base, revision)
    except (OSError, ValueError) as error:
        raise ValueError(f"{name} is an adapter alone, and its base {base!r} cannot be loaded; name it with --base.") from error


def load_base(name: str | Path, revision: str | None = None) -> PreTrainedModel:
    """A model as transformers decodes it, one token per pass."""
    _check_there(name, revision)
    return _load(name, trust_remote_code=False, revision=revision)


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model; its end of text pads where it has no pad token."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(name))
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _load(name: str | Path, *, trust_remote_code: bool, revision: str | None = None) -> PreTrainedModel:
    logging.disable_progress_bar()  # one bar per model is noise between tables
    device, dtype = _device_and_dtype()
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        str(name), trust_remote_code=trust_remote_code, dtype=dtype, revision=revision
    )
    return model.to(device).eval()


def _device_and_dtype() -> tuple[str, str | torch.dtype]:
    """Device and dtype.

    One token alone and the same token with others behind it differ by rounding: only float32 decodes identically, and
    bfloat16 is slow on most CPUs.
    """
    return ("cuda", "auto") if torch.cuda.is_available() else ("cpu", torch.float32)
