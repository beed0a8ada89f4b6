"""File format of a mask-gated adapter: weights in LoRA's format and names, and metadata about its base and mask token."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .adapter import MaskGatedAdapter
from .mtp_config import BROKEN_REPOSITORY, check_mtp_config, is_whole_number, shortened

# Not LoRA's file name, under which transformers would load the adapter without its gate.
ADAPTER_FILE = "custom_generate/mtp_adapter.safetensors"
DECODING_DEFAULTS = ("confadapt", "verify")  # the only decoding settings that an adapter may set

_PREFIX, _LORA_A = "base_model.model.", ".lora_A.weight"


def read_adapter(path: str) -> MaskGatedAdapter:
    """Load an adapter from a file.

    Raises:
        ValueError: the metadata or the tensors are not those of an adapter.
    """
    with _opened(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        return adapter_from(tensors, file.metadata())


def read_adapter_metadata(path: str) -> dict[str, Any]:
    """Return the `checked_metadata` of an adapter's file without reading its weights."""
    with _opened(path) as file:
        return checked_metadata(file.metadata())


def _opened(path: str) -> Any:
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a safetensors file ({error}). If it is a Git LFS pointer, run `git lfs pull`; else "
            f"{BROKEN_REPOSITORY}"
        ) from error


def adapter_from(tensors: dict[str, Tensor], metadata: dict[str, str] | None) -> MaskGatedAdapter:
    """Build an adapter from the tensors and the metadata of a file.

    Raises:
        ValueError: the metadata or the tensors are not those of an adapter.
    """
    facts = checked_metadata(metadata)
    names = [name[len(_PREFIX) : -len(_LORA_A)] for name in tensors if name.startswith(_PREFIX) and name.endswith(_LORA_A)]
    shapes = {}
    for name in names:
        low, high = (_shape(tensors, f"{_PREFIX}{name}.lora_{side}.weight") for side in "AB")
        if len(low) != 2 or len(high) != 2 or not low[0] == high[1] == facts["r"]:
            raise ValueError(
                f"{ADAPTER_FILE} has {name} with shapes {low} and {high}, not of rank {facts['r']}; {BROKEN_REPOSITORY}"
            )
        shapes[name] = (low[1], high[0])
    if len(row := _shape(tensors, "mask_row")) != 1:
        raise ValueError(f"{ADAPTER_FILE} has mask_row with shape {row}, not one row; {BROKEN_REPOSITORY}")
    adapter = MaskGatedAdapter(shapes, rank=facts["r"], alpha=float(facts["lora_alpha"]), hidden_size=row[0])
    adapter.mtp, adapter.defaults, adapter.lora_layers = facts["mtp"], facts["defaults"], facts["lora_layers"]
    adapter.base, adapter.gguf_file = (facts["base_model"], facts["base_fingerprint"]), facts["gguf_file"]
    with torch.no_grad():
        for name, parameter in by_file_name(adapter).items():
            parameter.copy_(tensors[name])
    return adapter


def by_file_name(adapter: MaskGatedAdapter) -> dict[str, nn.Parameter]:
    """Return an adapter's weights by their names in the file: `mask_row`, and the names of a LoRA adapter."""
    named = {"mask_row": adapter.mask_row.weight}
    for name, update in zip(adapter.names, adapter.updates, strict=True):
        named[f"{_PREFIX}{name}.lora_A.weight"] = update.lora_A
        named[f"{_PREFIX}{name}.lora_B.weight"] = update.lora_B
    return named


def metadata_of(adapter: MaskGatedAdapter) -> dict[str, str]:
    """Return the metadata to save with an adapter's weights."""
    return {
        "format": "pt",
        "r": str(adapter.rank),
        "lora_alpha": str(adapter.alpha),
        "base_model_name_or_path": adapter.base[0],
        "base_fingerprint": adapter.base[1] or "",
        "base_gguf_file": adapter.gguf_file or "",
        "mtp": json.dumps(adapter.mtp),
        "defaults": json.dumps(adapter.defaults),
        "lora_layers": json.dumps(adapter.lora_layers),
    }


def checked_metadata(metadata: dict[str, str] | None) -> dict[str, Any]:
    """Parse and check the metadata that `metadata_of` wrote. It comes from a repository, so it can hold anything.

    Returns:
        `r`, `lora_alpha`, `mtp`, `defaults`, `lora_layers`, `base_model`, `base_fingerprint` (None if unknown) and `gguf_file`
        (None if the base is not a GGUF file).

    Raises:
        ValueError: a value is missing or invalid.
    """
    written = {"lora_layers": "[]", **(metadata or {})}

    def value(name: str, is_valid: Callable[[Any], bool], requirement: str) -> Any:
        try:
            parsed = json.loads(written[name])
        except (KeyError, ValueError, RecursionError):
            parsed = None
        if not is_valid(parsed):
            raise ValueError(
                f"{ADAPTER_FILE} has {name}={shortened(written.get(name))}, which must be {requirement}; {BROKEN_REPOSITORY}"
            )
        return parsed

    facts = {
        "r": value("r", lambda r: is_whole_number(r, 1, 2**31), "a whole number >= 1"),
        "lora_alpha": value("lora_alpha", lambda alpha: type(alpha) in (int, float) and abs(alpha) < 1e9, "a number"),
        "mtp": value("mtp", lambda mtp: isinstance(mtp, dict), "a dictionary like config.mtp"),
        "defaults": value("defaults", lambda defaults: isinstance(defaults, dict), "a dictionary of decoding defaults"),
        "lora_layers": value(
            "lora_layers",
            lambda layers: isinstance(layers, list) and all(isinstance(layer, str) for layer in layers),
            "a list of names",
        ),
        "base_model": written.get("base_model_name_or_path", ""),
        "base_fingerprint": written.get("base_fingerprint") or None,
        "gguf_file": written.get("base_gguf_file") or None,
    }
    check_mtp_config(facts["mtp"], where=f"`mtp` in {ADAPTER_FILE}")
    facts["defaults"] = {name: facts["defaults"][name] for name in DECODING_DEFAULTS if name in facts["defaults"]}
    return facts


def _shape(tensors: dict[str, Tensor], name: str) -> tuple[int, ...]:
    return tuple(tensors[name].shape) if name in tensors else ()
