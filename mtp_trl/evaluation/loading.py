"""Load models for evaluation: in float32 on a CPU, in the saved dtype on a GPU."""

import itertools
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..custom_generate.adapter_file import ADAPTER_FILE, read_adapter_metadata
from ..custom_generate.generate import attach_decoder
from ..custom_generate.repository import attach_adapter
from ..modeling.files import LORA_CONFIG, TOKENIZER_FILES, read_provenance, repository_file
from ..modeling.gguf import base_label, gguf_options
from ..modeling.lora import load_lora, named_base
from ..publishing.decoder_check import check_decoder, decoder_digest, digest
from ..publishing.repository import decoder_files

# A repository with a model or an adapter has at least one of these files.
_MARKER_FILES = ("config.json", LORA_CONFIG, ADAPTER_FILE)
# Weights, exact mode's adapter, configs and tokenizer files.
_MODEL_FILES = ("*.safetensors", "*.bin", "*.gguf", "custom_generate/*.safetensors", "*config.json", *TOKENIZER_FILES)


def load_student(
    name: str | Path, *, base: str | None = None, gguf_file: str | None = None, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load an adapted model, with its multi-token `generate`, and its tokenizer.

    Args:
        name: folder or Hub id.
        base: the base model that an adapter-only repository is applied to; by default the one that the adapter names. LoRA is
            merged into it.
        gguf_file: the GGUF file from which the weights of `base` are read; None if `base` is not a GGUF file.
        trust_remote_code: run the code of a Hub repository even if it is not this package's. The code of a local folder is
            always run.

    Raises:
        ValueError: the model was never adapted, its code is not this package's, or the base of an adapter cannot be loaded or
            is not the one that the adapter was trained on.
    """
    check_exists(name)
    if (adapter_base := _base_of_adapter(name, base, gguf_file)) is not None:
        tokenizer = load_tokenizer(name)
        if repository_file(name, LORA_CONFIG) is not None:
            adapted = load_lora(lambda: _load_base_of(name, *adapter_base), tokenizer, name)
            return attach_decoder(adapted.merge_and_unload()), tokenizer
        return attach_adapter(attach_decoder(_load_base_of(name, *adapter_base)), str(name)), tokenizer
    model = _load(name, trust_remote_code=True, revision=_trusted_revision(name, trust_remote_code=trust_remote_code))
    if not hasattr(model.config, "mtp"):
        raise ValueError(f"{name} has no mask token (`mtp` in config.json); pass a model that this package adapted.")
    return model, load_tokenizer(name)


def load_causal_lm(name: str | Path, *, trust_remote_code: bool = False) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load any causal LM, adapted or not, with this package's `generate`, and its tokenizer.

    Args:
        name: folder or Hub id.
        trust_remote_code: run code in the repository that is not this package's.

    Raises:
        ValueError: there is no model, or as in `load_student` if the model was adapted.
    """
    check_exists(name)
    config = repository_file(name, "config.json")
    is_full = config is not None and _base_of_adapter(name, None) is None
    if not is_full or "mtp" in json.loads(Path(str(config)).read_text(encoding="utf-8")):
        return load_student(name, trust_remote_code=trust_remote_code)
    model = _load(name, trust_remote_code=trust_remote_code)
    return attach_decoder(model), load_tokenizer(name, trust_remote_code=trust_remote_code)


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


def _base_of_adapter(
    name: str | Path, base: str | None, gguf_file: str | None = None
) -> tuple[str, str | None, str | None] | None:
    """Return the arguments of `load_base` for the base of an adapter-only repository. None for a full model.

    The base is by default the one that the repository names.
    """
    if repository_file(name, LORA_CONFIG) is not None:
        return named_base(name) if base is None else (base, None, gguf_file)
    if repository_file(name, "config.json") is not None or (path := repository_file(name, ADAPTER_FILE)) is None:
        return None
    if base is not None:
        return base, None, gguf_file
    facts = read_adapter_metadata(path)
    return facts["base_model"], None, facts["gguf_file"]


def check_exists(name: str | Path, revision: str | None = None, gguf_file: str | None = None) -> None:
    """Raise ValueError with a short message if there is no model; transformers' message would be long."""
    needed = _MARKER_FILES if gguf_file is None else (gguf_file,)
    try:
        exists = any(repository_file(name, file, revision) for file in needed)
        reason = None if exists else f"it has no {needed[0]}, or the Hub cannot be reached"
    except OSError as error:  # the repository does not exist, or the token has no access to it
        reason = next(iter(str(error).splitlines()), type(error).__name__)
    if reason is not None and Path(name).is_dir():
        files = ", ".join(sorted(path.name for path in Path(name).glob("*.gguf")))
        hint = f" If it is the base, name its GGUF file with --gguf-file: {files}." if files else ""
        raise ValueError(
            f"The folder {name} has no model (no {needed[0]}); pass one written by a run or by `mtp-trl export`.{hint}"
        )
    if reason is not None:
        raise ValueError(f"There is no folder {str(name)!r}, and it cannot be read as a Hub id: {reason}.")


def base_name(name: str | Path) -> str | None:
    """Return the base model that the provenance of an adapted model names; None if it has no provenance."""
    made = read_provenance(name)
    return None if made is None else made.get("base_model")


def identity(name: str | Path, base: str | None, gguf_file: str | None = None) -> list[str]:
    """Return strings that differ if the weights, the tokenizer, the decoder, the device or the dtype differ.

    A folder is identified by its files and their modification times, a Hub repository by its commit. `base` and `gguf_file` are
    those of `run_eval`. If `base` is None and `name` is an adapter-only repository, the base that it names is included.
    """
    return [*weights_identity(name, base, gguf_file), decoder_digest(name), digest(decoder_files())]


def weights_identity(name: str | Path, base: str | None = None, gguf_file: str | None = None) -> list[str]:
    """Return the strings of `identity` without those of the decoder."""
    adapter_base = _base_of_adapter(name, base) if base is None else (base, None, gguf_file)
    return [*_version(name), *([] if adapter_base is None else _version(*adapter_base)), *map(str, _device_and_dtype())]


def _version(name: str | Path, revision: str | None = None, gguf_file: str | None = None) -> list[str]:
    label = base_label(str(name), gguf_file)
    if Path(name).is_dir():
        files = sorted({path for pattern in _MODEL_FILES for path in Path(name).glob(pattern)})
        return [label, *(f"{path.name} {path.stat().st_mtime_ns}" for path in files)]
    found = filter(None, (repository_file(name, file, revision) for file in (*_MARKER_FILES, *filter(None, [gguf_file]))))
    return [label, *itertools.islice(found, 1)]  # the path of a cached file contains the commit


def _load_base_of(name: str | Path, base: str, revision: str | None, gguf_file: str | None) -> PreTrainedModel:
    try:
        return load_base(base, revision, gguf_file)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name} is only an adapter, and its base {base_label(base, gguf_file)!r} cannot be loaded; pass its base with "
            "--base, and --gguf-file if it is a GGUF file."
        ) from error


def load_base(name: str | Path, revision: str | None = None, gguf_file: str | None = None) -> PreTrainedModel:
    """Load a model with transformers' own `generate`, which decodes one token per pass. GGUF weights are dequantised."""
    check_exists(name, revision, gguf_file)
    return _load(name, trust_remote_code=False, revision=revision, **gguf_options(gguf_file))


def load_tokenizer(name: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer. If it has no pad token, EOS is used as the pad token."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(name), trust_remote_code=trust_remote_code)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _load(name: str | Path, **options: Any) -> PreTrainedModel:
    logging.disable_progress_bar()  # a bar per model would clutter the output between tables
    device, dtype = _device_and_dtype()
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(str(name), dtype=dtype, **options)
    return model.to(device).eval()


def _device_and_dtype() -> tuple[str, str | torch.dtype]:
    """Return the device and the dtype to load models with: float32 on a CPU.

    A token's logits differ by rounding when other tokens follow it in the pass. Only float32 decodes identical text in spite
    of that, and bfloat16 is slow on most CPUs.
    """
    return ("cuda", "auto") if torch.cuda.is_available() else ("cpu", torch.float32)
