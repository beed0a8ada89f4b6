"""Check that a model is the base of an adapter: compare layers, vocabulary, mask token and weights."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .adapter import MaskGatedAdapter
from .mtp_config import check_mtp_config


def check_base(adapter: MaskGatedAdapter, model: PreTrainedModel) -> None:
    """Raise ValueError if a model is not the base that an adapter was trained on."""
    name, fingerprint = adapter.base
    if adapter.gguf_file is not None:
        name += f" (gguf_file={adapter.gguf_file!r}, dequantised in float32)"
    repository = adapter.source[0] if adapter.source else None
    expected = f"The adapter in {repository or 'this file'} was trained on {name or 'another model'}"
    remedy = f"load {name or 'its base'} instead."
    _check_layers(adapter, model, expected=expected, remedy=remedy)
    _check_vocabulary(adapter, model, expected=expected, remedy=remedy)
    actual = base_fingerprint(model, adapter.names + adapter.lora_layers)
    compare_fingerprints(fingerprint, actual, expected=expected, remedy=remedy)


def compare_fingerprints(trained_on: str | None, actual: str | None, *, expected: str, remedy: str) -> None:
    """Raise ValueError if two known fingerprints differ; warn if only that of the model is unknown."""
    if trained_on is not None and actual is None:
        warnings.warn(
            f"{expected}; these weights cannot be compared with it (quantised, float16, offloaded or missing).",
            stacklevel=3,
        )
    elif trained_on not in (None, actual):
        raise ValueError(f"{expected}, and these weights differ from it; {remedy}")


def _check_layers(adapter: MaskGatedAdapter, model: PreTrainedModel, *, expected: str, remedy: str) -> None:
    layers = dict(model.named_modules())
    for layer, update in zip(adapter.names, adapter.updates, strict=True):
        inputs, outputs = update.lora_A.shape[1], update.lora_B.shape[0]
        if layer not in layers or linear_features(layers[layer]) != (inputs, outputs):
            found = linear_features(layers[layer]) if layer in layers else "no such layer"
            raise ValueError(f"{expected}: {layer} must map {inputs} to {outputs} features, found {found}; {remedy}")
    for layer in adapter.lora_layers:
        if not hasattr(layers.get(layer), "lora_A"):
            repository = adapter.source[0] if adapter.source else "REPOSITORY"
            raise ValueError(
                f"{repository} is a LoRA adapter, and this model has no LoRA at {layer}; load it first with "
                f"peft.PeftModel.from_pretrained(model, {repository!r})."
            )


def _check_vocabulary(adapter: MaskGatedAdapter, model: PreTrainedModel, *, expected: str, remedy: str) -> None:
    rows = model.get_input_embeddings().weight.shape[0]
    base_rows = adapter.mtp.get("base_vocab_size")
    last = max(adapter.mtp.get("barred_token_ids", ()), default=0)
    # The vocabulary of the base, or that of a base resized for the mask token, padded to a multiple of 64 or not.
    if base_rows and rows not in (base_rows, adapter.mtp["mask_token_id"] + 1, last + 1):
        raise ValueError(f"{expected}: its vocabulary has {base_rows} rows, this model's {rows}; {remedy}")
    mtp = getattr(model.config, "mtp", None)
    if mtp is not None:
        check_mtp_config(mtp)
        if adapter.mtp and mtp["mask_token_id"] != adapter.mtp["mask_token_id"]:
            mask_ids = f"its mask token is {adapter.mtp['mask_token_id']}, this model's {mtp['mask_token_id']}"
            raise ValueError(f"{expected}: {mask_ids}; {remedy}")


def base_fingerprint(
    model: PreTrainedModel, names: Sequence[str], *, gathered: Callable[[list[Any]], Any] = nullcontext
) -> str | None:
    """Return the `weights_fingerprint` of the named layers of a model.

    `gathered(weights)` is a context in which sharded weights are whole.
    """
    weights: dict[str, Any] = {name: getattr(model.get_submodule(name), "weight", None) for name in names}
    return weights_fingerprint(weights, gathered=gathered)


def weights_fingerprint(weights: Mapping[str, Any], *, gathered: Callable[[list[Any]], Any] = nullcontext) -> str | None:
    """Return a hash of the first and the last row of each weight in bfloat16.

    The hash is the same whether the weights were loaded in float32 or in bfloat16. It is None if a weight is quantised, in
    float16, offloaded or missing, so that its trained values cannot be read.

    Args:
        weights: weights by the names of their layers.
        gathered: see `base_fingerprint`.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        if weight is None or weight.is_meta or type(weight) not in (Tensor, nn.Parameter) or type(weight.data) is not Tensor:
            return None
        if weight.dtype not in (torch.float32, torch.bfloat16):
            return None
        with gathered([weight]):
            ends = weight.detach()[[0, -1]].to("cpu", torch.bfloat16)
        digest.update(name.encode() + ends.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def linear_features(layer: Any) -> tuple[int, int] | None:
    """Return (inputs, outputs) of a linear layer, quantised ones and GPT-2's Conv1D included; None for any other module."""
    if hasattr(layer, "in_features"):
        return layer.in_features, layer.out_features
    return (layer.nx, layer.nf) if hasattr(layer, "nf") else None
