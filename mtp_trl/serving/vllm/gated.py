"""Exact mode in vLLM: low-rank updates that act where the input is the mask token, on the base as vLLM runs it."""

# Shapes: F tokens of all requests in a step of vLLM, I columns of a weight matrix, O rows of a weight matrix, r rank

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ...custom_generate.adapter import MaskGatedAdapter
from ...custom_generate.adapter_file import read_adapter
from ...custom_generate.base import compare_fingerprints, weights_fingerprint
from ...modeling.files import repository_file
from ...modeling.lora import embedding_scale
from .settings import Served


def attach_adapter(model: Any, served: Served, *, max_tokens: int) -> None:
    """In exact mode let the adapter act in a loaded model, before it is compiled; all but masks stays as it is, bit for bit.

    Which tokens are masks is written to a buffer before every pass, outside what vLLM compiles or captures in graphs.

    Raises:
        ValueError: the adapter was trained on other weights, or updates a layer that the model does not have, or has in
            another shape.
    """
    if served.adapter is None:
        return
    adapter = read_adapter(served.adapter)
    check_weights(adapter, *served.base)
    embedding, scale = _embedding(model)
    like: dict[str, Any] = {"dtype": embedding.weight.dtype, "device": embedding.weight.device}
    gate_F1 = torch.zeros(max_tokens, 1, dtype=torch.bool, device=like["device"])
    with torch.no_grad():
        for layer, low_rI, high_Or in _fused_updates(model, adapter):
            _buffers(layer, mtp_gate=gate_F1, mtp_low=low_rI.to(**like), mtp_high=high_Or.to(**like))
            layer.register_forward_hook(_adapt)
        _buffers(embedding, mtp_gate=gate_F1, mtp_row=(adapter.mask_row.weight / scale).to(**like))
    embedding.register_forward_hook(_embed)
    _buffers(model, mtp_gate=gate_F1)
    model.mtp_mask_token_id = served.mask_token_id
    model.register_forward_pre_hook(_set_gate, with_kwargs=True)


def check_weights(adapter: MaskGatedAdapter, base: str, revision: str | None) -> None:
    """Raises ValueError where a model's files hold other weights than the adapter was trained on; warns where none can be read.

    The files are compared, since vLLM fuses and packs what it loads.
    """
    trained_on, fingerprint = adapter.base
    if fingerprint is None:  # of a copy with wider heads, or a base that was quantised
        return
    expected = f"The adapter was trained on {trained_on or 'another model'}"
    actual = weights_fingerprint(_first_and_last_rows(base, revision, adapter.names))
    compare_fingerprints(fingerprint, actual, expected=expected, remedy=f"serve it with {trained_on or 'its base'} instead.")


def _first_and_last_rows(base: str, revision: str | None, layers: list[str]) -> dict[str, Tensor | None]:
    """Of each layer's weight in the safetensors of a folder or repository; None where it is not there by that name."""
    index = repository_file(base, "model.safetensors.index.json", revision)
    shards: dict[str, str] = {}
    if index is not None:
        shards = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
    rows: dict[str, Tensor | None] = dict.fromkeys(layers)
    for layer in layers:
        name = f"{layer}.weight"
        path = repository_file(base, shards.get(name, "model.safetensors"), revision)
        if path is None:
            continue
        with safe_open(path, framework="pt") as file:
            if name in file.keys():  # noqa: SIM118 (not a dict)
                weight = file.get_slice(name)
                rows[layer] = torch.cat([weight[:1], weight[-1:]])
    return rows


def _set_gate(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    input_ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
    model.mtp_gate[: len(input_ids)] = (input_ids == model.mtp_mask_token_id)[:, None]


def _adapt(layer: Any, inputs: tuple[Tensor, ...], output: Any) -> Any:
    """Of vLLM's linear layers, which return their bias beside the output, or the output alone."""
    x_FI, (y_FO, *rest) = inputs[0], output if isinstance(output, tuple) else (output,)
    update_FO = nn.functional.linear(nn.functional.linear(x_FI, layer.mtp_low), layer.mtp_high)
    gated_FO = torch.where(layer.mtp_gate[: x_FI.shape[0]], y_FO + update_FO, y_FO)
    return (gated_FO, *rest) if isinstance(output, tuple) else gated_FO


def _embed(embedding: Any, _: tuple[Tensor, ...], output_FI: Tensor) -> Tensor:
    return torch.where(embedding.mtp_gate[: output_FI.shape[0]], embedding.mtp_row, output_FI)


def _buffers(module: nn.Module, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        module.register_buffer(name, tensor, persistent=False)


def _embedding(model: nn.Module) -> tuple[Any, float]:
    """The input embedding, and what its output is multiplied by behind it: Gemma's scale, which transformers has inside."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    for name, module in model.named_modules():
        if isinstance(module, VocabParallelEmbedding) and not isinstance(module, ParallelLMHead):
            parent: Any = model.get_submodule(name.rpartition(".")[0])
            return module, embedding_scale(parent)
    raise ValueError(f"vLLM's {type(model).__name__} has no embedding of its tokens: it is not served in exact mode.")


def _fused_updates(model: nn.Module, adapter: MaskGatedAdapter) -> Iterator[tuple[nn.Module, Tensor, Tensor]]:
    """Layers of vLLM's model with their update: of layers that vLLM fuses, one below the other, B on the diagonal."""
    updates = dict(zip(adapter.names, adapter.updates, strict=True))
    fused: dict[str, list[str]] = getattr(model, "packed_modules_mapping", {})
    for name, layer in model.named_modules():
        parent, _, last = name.rpartition(".")
        parts = [f"{parent}.{part}" for part in fused.get(last, [last])]
        if not any(part in updates for part in parts):
            continue
        sizes = list(layer.output_sizes) if len(parts) > 1 else [layer.output_size]
        lows, highs = [], []
        for part, size in zip(parts, sizes, strict=True):
            if part not in updates:
                highs.append(torch.zeros(size, 0))
                continue
            update = updates.pop(part)
            if (layer.input_size, size) != (found := (update.lora_A.shape[1], update.lora_B.shape[0])):
                raise ValueError(
                    f"The adapter's {part} maps {found[0]} to {found[1]} features, the model's {layer.input_size} to {size}: "
                    "it was trained on another base."
                )
            lows.append(update.lora_A.detach())
            highs.append(update.lora_B.detach() * update.scale)
        yield layer, torch.cat(lows), torch.block_diag(*highs)
    if updates:
        missing = ", ".join(sorted(updates)[:3])
        raise ValueError(
            f"vLLM's {type(model).__name__} has no layer for {len(updates)} of the adapter's updates ({missing}, ...): this "
            "architecture is not served in exact mode; decode it with transformers."
        )
