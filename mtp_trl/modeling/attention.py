"""Attention masks for packed rows, in the form that each layer type and attention backend expects."""

# Shapes: T columns of a forward pass, X layout rows

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from accelerate.logging import get_logger
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .checks import can_pack

logger = get_logger(__name__)
# FlexAttention skips blocks of 128 x 128 that are fully masked. Shorter rows have hardly any such block.
_FLEX_FROM_TOKENS = 512
# Largest accepted difference between two backends in half precision, relative to the largest value
_FLEX_TOLERANCE = 2e-2


def take_flex_attention(model: PreTrainedModel, row_tokens: int, device: torch.device) -> None:
    """Switch a model from SDPA to FlexAttention on CUDA, if its rows are long enough and a trial gives equal results."""
    config = model.config.get_text_config()
    supported = model._supports_flex_attn and can_pack(model) and config._attn_implementation == "sdpa"
    if device.type != "cuda" or row_tokens < _FLEX_FROM_TOKENS or not supported:
        return
    if fault := flex_attention_fault(config, model.dtype, device):
        logger.warning(f"Training with SDPA, since FlexAttention does not work here: {fault}")
    else:
        model.set_attn_implementation("flex_attention")


def check_attention_backend(model: PreTrainedModel, device: torch.device) -> None:
    """Raise ValueError for an attention backend that cannot express a packed mask, or that fails a trial on the device."""
    config = model.config.get_text_config()
    backend = config._attn_implementation
    if "flash" in str(backend):
        raise ValueError(
            f"attn_implementation={backend!r} supports only 2D masks and cannot express packed regions; "
            "load the model with attn_implementation='sdpa' (or 'eager' for models without sdpa support)."
        )
    fault = None
    if backend == "flex_attention" and device.type == "cpu":  # a trial would compile for a minute to find this out
        fault = "it has no backward on CPUs, where compiled kernels of PyTorch 2.13 also read memory after the keys."
    elif backend == "flex_attention":
        fault = flex_attention_fault(config, model.dtype, device)
    if fault is not None:
        raise ValueError(
            f"attn_implementation='flex_attention' cannot train this model on {device}; load the model with "
            f"attn_implementation='sdpa'. The cause: {fault}"
        )


def flex_attention_fault(config: PretrainedConfig, dtype: torch.dtype, device: torch.device) -> str | None:
    """Compare FlexAttention with SDPA in one attention of this model's shape, forward and backward.

    Whether it works depends on device, PyTorch, compiler, head size and precision, so it has to be tried. The model reuses the
    compiled kernel.

    Returns:
        What is wrong with FlexAttention, or None if it works.
    """
    heads = config.num_attention_heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    layer = SimpleNamespace(num_key_value_groups=heads // key_heads, training=True, is_causal=True)
    try:
        random = torch.Generator(device).manual_seed(0)
        allowed = torch.rand(1, 192, 192, generator=random, device=device).lt(0.5).tril() | torch.eye(192, device=device).bool()
        states = [
            torch.randn(1, count, 192, size, generator=random, device=device).to(dtype).requires_grad_()
            for count in (heads, key_heads, key_heads)
        ]
        results = []
        for backend in ("sdpa", "flex_attention"):
            mask = _backend_mask(config, allowed, dtype, backend)
            output, _ = ALL_ATTENTION_FUNCTIONS[backend](layer, *states, mask, scaling=size**-0.5, dropout=0.0)
            results.append([output, *torch.autograd.grad(output.float().square().sum(), states)])
    except Exception as error:  # compilers raise many types of exceptions
        first_line = str(error).strip().partition("\n")[0]
        return f"{type(error).__name__}: {first_line}"
    for name, expected, actual in zip(("output", "dq", "dk", "dv"), *results, strict=True):
        gap = ((expected - actual).abs().max() / expected.abs().max()).item()
        if not gap <= _FLEX_TOLERANCE:
            return f"its {name} is off by {gap:.1%}."
    return None


@contextmanager
def dense_masks(model: PreTrainedModel) -> Iterator[None]:
    """Replace FlexAttention by SDPA or eager attention within the block, since `generate` makes dense masks."""
    if model.config.get_text_config()._attn_implementation != "flex_attention":
        yield
        return
    model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
    try:
        yield
    finally:
        model.set_attn_implementation("flex_attention")


def attention_masks(
    config: PretrainedConfig,
    allowed_XTT: Tensor,
    positions_XT: Tensor,
    dtype: torch.dtype,
    *,
    queries: slice = slice(None),
    keys: slice = slice(None),
) -> Tensor | dict[str, Tensor]:
    """Return the mask argument that this architecture's forward expects, in the form of its attention backend.

    If the config has `layer_types`, this is a dict by layer type, otherwise a single mask. A single mask for mixed layers would
    be silently wrong. Windows and chunks are measured in positions.

    Args:
        config: the model's config.
        allowed_XTT: which keys (last axis) a query may attend to, before windows and chunks.
        positions_XT: position of each column in its text.
        dtype: dtype of the model.
        queries, keys: columns for which the mask is made.
    """
    config = config.get_text_config()
    window: Any = getattr(config, "sliding_window", None)
    chunk: Any = getattr(config, "attention_chunk_size", None)

    def mask_of(layer_type: str) -> Tensor:
        allowed = allowed_XTT
        if layer_type == "sliding_attention":
            allowed = window_by_position(allowed, positions_XT, window=window)
        elif layer_type == "chunked_attention":
            allowed = chunk_by_position(allowed, positions_XT, chunk=chunk)
        return _backend_mask(config, allowed[:, queries, keys], dtype, config._attn_implementation)

    if hasattr(config, "layer_types"):
        return {layer_type: mask_of(layer_type) for layer_type in set(config.layer_types)}
    if window is not None:
        return mask_of("sliding_attention")
    return mask_of("chunked_attention" if chunk is not None else "full_attention")


def _backend_mask(config: PretrainedConfig, allowed: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    build = ALL_MASK_ATTENTION_FUNCTIONS[backend]
    rows, query_count, key_count = allowed.shape
    mask: Tensor = build(
        batch_size=rows,
        q_length=query_count,
        kv_length=key_count,
        mask_function=lambda row, head, query, key: allowed[row, query, key],
        allow_is_causal_skip=False,
        dtype=dtype,
        device=allowed.device,
        config=config,
    )
    return mask


def window_by_position(allowed_XTT: Tensor, positions_XT: Tensor, *, window: int) -> Tensor:
    """Restrict attention to the last `window` positions. Column indices would be wrong in a packed row."""
    return allowed_XTT & (positions_XT[:, :, None] - positions_XT[:, None, :] < window)


def chunk_by_position(allowed_XTT: Tensor, positions_XT: Tensor, *, chunk: int) -> Tensor:
    """Restrict attention to keys of the query's own chunk of `chunk` positions (chunked attention)."""
    return allowed_XTT & (positions_XT[:, :, None] // chunk == positions_XT[:, None, :] // chunk)
