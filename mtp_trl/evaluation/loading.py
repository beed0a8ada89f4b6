"""Load models for evaluation: in float32 on a CPU, in the saved dtype on a GPU."""

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

# A repository with a model or an adapter has at least one of these files.
_MARKER_FILES = ("config.json", LORA_CONFIG, ADAPTER_FILE)
# Weights, exact mode's adapter, configs and tokenizer files.
_MODEL_FILES = ("*.safetensors", "*.bin", "custom_generate/*.safetensors", "*config.json", *TOKENIZER_FILES)


def load_student(
    name: str | Path, *, base: str | None = None, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load an adapted model, with its multi-token `generate`, and its tokenizer.

    Args:
        name: folder or Hub id.
        base: the base model that an adapter-only repository is applied to; by default the one that the adapter names. LoRA is
            merged into it.
        trust_remote_code: run the code of a Hub repository even if it is not this package's. The code of a local folder is
            always run.

    Raises:
        ValueError: the model was never adapted, its code is not this package's, or the base of an adapter cannot be loaded or
            is not the one that the adapter was trained on.
    """
    _check_exists(name)
    if (adapter_base := _base_of_adapter(name, base)) is not None:
        tokenizer = load_tokenizer(name)
        if repository_file(name, LORA_CONFIG) is not None:
            adapted = load_lora(lambda: _load_base_of(name, *adapter_base), tokenizer, name)
            return attach_decoder(adapted.merge_and_unload()), tokenizer
        return attach_adapter(attach_decoder(_load_base_of(name, *adapter_base)), str(name)), tokenizer
    model = _load(name, trust_remote_code=True, revision=_trusted_revision(name, trust_remote_code=trust_remote_code))
    if not hasattr(model.config, "mtp"):
        raise ValueError(f"{name} has no mask token (`mtp` in config.json); pass a model that this package adapted.")
    return model, load_tokenizer(name)


def _trusted_revision(name: str | Path, *, trust_remote_code: bool) -> str | None:
    """Return the commit whose code was checked, so that no other code is run; None for a folder or if any code is trusted.

    Raises:
        ValueError: the code is not this package's, and `trust_remote_code` is False.
    """
    if trust_remote_code or Path(name).is_dir():
        return None
    check = check_decoder(name)
    if not check.is_safe:
        raise ValueError(f"{check.sentence} To run it, pass --trust-remote-code (trust_remote_code=True).")
    return check.commit


def _base_of_adapter(name: str | Path, base: str | None) -> tuple[str, str | None] | None:
    """Return the base of an adapter-only repository, by default the one it names, and its revision. None for a full model."""
    if repository_file(name, LORA_CONFIG) is not None:
        return named_base(name) if base is None else (base, None)
    if repository_file(name, "config.json") is not None or (path := repository_file(name, ADAPTER_FILE)) is None:
        return None
    return base or read_adapter_metadata(path)["base_model"], None


def _check_exists(name: str | Path, revision: str | None = None) -> None:
    """Raise ValueError with a short message if there is no model; transformers' message would be long."""
    try:
        exists = any(repository_file(name, file, revision) for file in _MARKER_FILES)
        reason = None if exists else "it has no config.json, or the Hub cannot be reached"
    except OSError as error:  # the repository does not exist, or the token has no access to it
        reason = next(iter(str(error).splitlines()), type(error).__name__)
    if reason is not None and Path(name).is_dir():
        raise ValueError(f"The folder {name} has no model (no config.json); pass one written by a run or by `mtp-trl export`.")
    if reason is not None:
        raise ValueError(f"There is no folder {str(name)!r}, and it cannot be read as a Hub id: {reason}.")


def base_name(name: str | Path) -> str | None:
    """Return the base model that the provenance of an adapted model names; None if it has no provenance."""
    made = read_provenance(name)
    return None if made is None else made.get("base_model")


def identity(name: str | Path, base: str | None) -> list[str]:
    """Return strings that differ if the weights, the tokenizer, the decoder, the device or the dtype differ.

    A folder is identified by its files and their modification times, a Hub repository by its commit. `base` is that of
    `run_eval`. If it is None and `name` is an adapter-only repository, the base that the adapter names is included.
    """
    adapter_base = _base_of_adapter(name, base) if base is None else (base, None)
    code = [decoder_digest(name), digest(decoder_files())]
    return [*_version(name), *([] if adapter_base is None else _version(*adapter_base)), *code, *map(str, _device_and_dtype())]


def _version(name: str | Path, revision: str | None = None) -> list[str]:
    if Path(name).is_dir():
        files = sorted({path for pattern in _MODEL_FILES for path in Path(name).glob(pattern)})
        return [str(name), *(f"{path.name} {path.stat().st_mtime_ns}" for path in files)]
    found = filter(None, (repository_file(name, file, revision) for file in _MARKER_FILES))
    return [str(name), *itertools.islice(found, 1)]  # the path of a cached file contains the commit


def _load_base_of(name: str | Path, base: str, revision: str | None) -> PreTrainedModel:
    try:
        return load_base(base, revision)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name} is only an adapter, and its base {base!r} cannot be loaded; pass its base with --base."
        ) from error


def load_base(name: str | Path, revision: str | None = None) -> PreTrainedModel:
    """Load a model with transformers' own `generate`, which decodes one token per pass."""
    _check_exists(name, revision)
    return _load(name, trust_remote_code=False, revision=revision)


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer. If it has no pad token, EOS is used as the pad token."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(name))
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _load(name: str | Path, *, trust_remote_code: bool, revision: str | None = None) -> PreTrainedModel:
    logging.disable_progress_bar()  # a bar per model would clutter the output between tables
    device, dtype = _device_and_dtype()
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        str(name), trust_remote_code=trust_remote_code, dtype=dtype, revision=revision
    )
    return model.to(device).eval()


def _device_and_dtype() -> tuple[str, str | torch.dtype]:
    """Return the device and the dtype to load models with: float32 on a CPU.

    A token's logits differ by rounding when other tokens follow it in the pass. Only float32 decodes identical text in spite
    of that, and bfloat16 is slow on most CPUs.
    """
    return ("cuda", "auto") if torch.cuda.is_available() else ("cpu", torch.float32)
