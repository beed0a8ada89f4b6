"""Exact mode in vLLM: low-rank updates of an otherwise unchanged base, applied only where the input is the mask token."""

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
    """In exact mode, attach the adapter to a loaded model before it is compiled. Without an adapter, do nothing.

    The output at every token other than a mask stays bit-identical. A hook writes the mask positions to a buffer before
    every pass, outside what vLLM compiles or captures in CUDA graphs.

    Raises:
        ValueError: the adapter was trained on other weights, or the model lacks a layer that the adapter updates, or the
            layer has another shape.
    """
    if served.adapter is None:
        return
    adapter = read_adapter(served.adapter)
    check_weights(adapter, *served.base)
    embedding, scale = _embedding(model)
    placement: dict[str, Any] = {"dtype": embedding.weight.dtype, "device": embedding.weight.device}
    gate_F1 = torch.zeros(max_tokens, 1, dtype=torch.bool, device=placement["device"])
    with torch.no_grad():
        for layer, low_rI, high_Or in _fused_updates(model, adapter):
            _register_buffers(layer, mtp_gate=gate_F1, mtp_low=low_rI.to(**placement), mtp_high=high_Or.to(**placement))
            layer.register_forward_hook(_adapt)
        _register_buffers(embedding, mtp_gate=gate_F1, mtp_row=(adapter.mask_row.weight / scale).to(**placement))
    embedding.register_forward_hook(_embed)
    _register_buffers(model, mtp_gate=gate_F1)
    model.mtp_mask_token_id = served.mask_token_id
    model.register_forward_pre_hook(_set_gate, with_kwargs=True)


def check_weights(adapter: MaskGatedAdapter, base: str, revision: str | None) -> None:
    """Raise ValueError if the model's files hold other weights than the adapter was trained on; warn if they cannot be read.

    The files are compared rather than the loaded weights, because vLLM fuses and packs weights when it loads them.
    """
    trained_on, fingerprint = adapter.base
    if fingerprint is None:  # a copy with wider heads, or the base was quantised, float16 or offloaded in training
        return
    expected = f"The adapter was trained on {trained_on or 'another model'}"
    actual = weights_fingerprint(_first_and_last_rows(base, revision, adapter.names))
    compare_fingerprints(fingerprint, actual, expected=expected, remedy=f"serve it with {trained_on or 'its base'} instead.")


def _first_and_last_rows(base: str, revision: str | None, layers: list[str]) -> dict[str, Tensor | None]:
    """Return the first and last row of each layer's weight in the safetensors files; None if they have no such weight."""
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
    """Forward hook of vLLM's linear layers, which return either `(output, bias)` or only the output."""
    x_FI, (y_FO, *rest) = inputs[0], output if isinstance(output, tuple) else (output,)
    update_FO = nn.functional.linear(nn.functional.linear(x_FI, layer.mtp_low), layer.mtp_high)
    gated_FO = torch.where(layer.mtp_gate[: x_FI.shape[0]], y_FO + update_FO, y_FO)
    return (gated_FO, *rest) if isinstance(output, tuple) else gated_FO


def _embed(embedding: Any, _: tuple[Tensor, ...], output_FI: Tensor) -> Tensor:
    return torch.where(embedding.mtp_gate[: output_FI.shape[0]], embedding.mtp_row, output_FI)


def _register_buffers(module: nn.Module, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        module.register_buffer(name, tensor, persistent=False)


def _embedding(model: nn.Module) -> tuple[Any, float]:
    """Return the input embedding and the factor by which the model multiplies its output.

    Gemma has such a factor: vLLM applies it after the embedding, transformers inside it.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    for name, module in model.named_modules():
        if isinstance(module, VocabParallelEmbedding) and not isinstance(module, ParallelLMHead):
            parent: Any = model.get_submodule(name.rpartition(".")[0])
            return module, embedding_scale(parent)
    raise ValueError(
        f"vLLM's {type(model).__name__} has no input embedding and cannot be served in exact mode; decode it with transformers."
    )


def _fused_updates(model: nn.Module, adapter: MaskGatedAdapter) -> Iterator[tuple[nn.Module, Tensor, Tensor]]:
    """Yield the layers of vLLM's model that have an update, each with the A and B of its update.

    Where vLLM fuses several layers, A stacks the layers' A matrices and B has their B matrices on its diagonal.
    """
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
                    f"The adapter's {part} maps {found[0]} to {found[1]} features, but the model's maps {layer.input_size} to "
                    f"{size}: the adapter was trained on another base."
                )
            lows.append(update.lora_A.detach())
            highs.append(update.lora_B.detach() * update.scale)
        yield layer, torch.cat(lows), torch.block_diag(*highs)
    if updates:
        missing = ", ".join(sorted(updates)[:3])
        raise ValueError(
            f"vLLM's {type(model).__name__} has no layer for {len(updates)} of the adapter's updates ({missing}, ...): this "
            "architecture cannot be served in exact mode; decode it with transformers."
        )
