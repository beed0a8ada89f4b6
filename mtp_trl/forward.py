"""Run a causal LM on a region layout: the attention masks of every layer type, hidden states, the model's own logits."""

# X layout rows, T tokens of a row, H hidden size, P places, V vocabulary

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
from accelerate.logging import get_logger
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .custom_generate.generate import check_left_to_right, windows_by_column
from .regions import Layout, Regions, chunk_by_position, pack_regions, window_by_position

logger = get_logger(__name__)

# FlexAttention skips masks in blocks of 128 x 128: in shorter rows hardly a block is empty
_FLEX_FROM_TOKENS = 512
# Of the largest value, between two backends in half precision
_FLEX_TOLERANCE = 2e-2

# attention whose mask can be restated for a packed row; every other layer type takes the suffix layout
_PACKABLE_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}


def backbone(model: PreTrainedModel) -> PreTrainedModel:
    """The model without its output head, also where `base_model` is the model itself (Llama 4)."""
    if model.base_model is not model:
        return model.base_model
    return next(child for child in model.children() if isinstance(child, PreTrainedModel))


def can_pack(model: PreTrainedModel) -> bool:
    """Whether several regions may share one row of this model.

    They may where attention is all that mixes tokens. A recurrent or convolutional layer cannot skip tokens, and a model
    that takes no `position_ids`, or counts windows in columns, cannot be told where a slot stands.
    """
    config = model.config.get_text_config()
    layer_types = getattr(config, "layer_types", None) or ["full_attention"]
    arguments = inspect.signature(backbone(model).forward).parameters
    # Models without a cache are from before masks could be handed in.
    takes_layouts = {"position_ids", "past_key_values"} <= set(arguments) and not windows_by_column(model)
    return not model._is_stateful and takes_layouts and set(layer_types) <= _PACKABLE_LAYERS


def check_attention_backend(model: PreTrainedModel) -> None:
    """Raises ValueError for a backend that cannot express a packed mask."""
    backend = model.config._attn_implementation
    if "flash" in str(backend):
        raise ValueError(
            f"attn_implementation={backend!r} takes 2D masks only and cannot express packed regions; "
            "load the model with attn_implementation='sdpa' (or 'eager' for models that refuse sdpa)."
        )


def check_positions(model: PreTrainedModel, *, max_length: int, k_max: int) -> None:
    """Raises ValueError where slots would stand beyond a table of learned positions (GPT-2, OPT)."""
    needed = max_length + k_max - 2  # the last block begins behind the last token but one
    for name, table in backbone(model).named_modules():
        if not isinstance(table, nn.Embedding) or not re.search(r"wpe$|position", name):
            continue
        rows = table.num_embeddings - getattr(table, "offset", 0)
        if needed > rows:
            raise ValueError(
                f"Texts of max_length={max_length} tokens with blocks of up to k_max={k_max} behind them need {needed} "
                f"positions, and {name} of {type(model).__name__} has {rows}; set max_length to {rows - k_max + 2} or less."
            )


def take_flex_attention(model: PreTrainedModel, row_tokens: int, device: torch.device) -> None:
    """FlexAttention in place of SDPA on CUDA, for rows long enough to have empty blocks, where a trial finds both alike."""
    config = model.config.get_text_config()
    supported = model._supports_flex_attn and can_pack(model) and config._attn_implementation == "sdpa"
    if device.type != "cuda" or row_tokens < _FLEX_FROM_TOKENS or not supported:
        return
    if fault := flex_attention_fault(config, model.dtype, device):
        logger.warning(f"Training with SDPA, since FlexAttention does not do here: {fault}")
    else:
        model.set_attn_implementation("flex_attention")


def flex_attention_fault(config: PretrainedConfig, dtype: torch.dtype, device: torch.device) -> str | None:
    """What one attention of this model's shape finds wrong with FlexAttention, forward and backward; None if nothing.

    It depends on device, PyTorch, compiler, head size and precision, so it is tried. The compiled kernel is used again.
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
    except Exception as error:  # a compiler fails in ways of its own
        first_line = str(error).strip().partition("\n")[0]
        return f"{type(error).__name__}: {first_line}"
    for name, one, other in zip(("output", "dq", "dk", "dv"), *results, strict=True):
        gap = ((one - other).abs().max() / one.abs().max()).item()
        if not gap <= _FLEX_TOLERANCE:
            return f"its {name} is off by {gap:.1%}."
    return None


@contextmanager
def dense_masks(model: PreTrainedModel) -> Iterator[None]:
    """SDPA, or eager attention, in place of FlexAttention within the block: `generate` makes dense masks."""
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
    layout: Layout,
    dtype: torch.dtype,
    *,
    queries: slice = slice(None),
    keys: slice = slice(None),
) -> Tensor | dict[str, Tensor]:
    """The mask argument that this architecture's forward expects, in its attention backend's own form.

    A config with `layer_types` wants a dict by layer type, any other one mask (one tensor for mixed layers would be
    silently wrong). Windows and chunks are measured in positions. `queries` and `keys` choose columns of a packed layout.
    """
    if layout.allowed_XTT is None:
        return layout.valid_XT.long()
    config = config.get_text_config()
    window: Any = getattr(config, "sliding_window", None)
    chunk: Any = getattr(config, "attention_chunk_size", None)
    full, positions = layout.allowed_XTT, layout.positions_XT

    def mask_of(layer_type: str) -> Tensor:
        allowed = full
        if layer_type == "sliding_attention":
            allowed = window_by_position(full, positions, window=window)
        elif layer_type == "chunked_attention":
            allowed = chunk_by_position(full, positions, chunk=chunk)
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


def hidden_states(model: PreTrainedModel, ids_XT: Tensor, layout: Layout, masks: Tensor | dict[str, Tensor]) -> Tensor:
    """Last hidden state [X * T, H] of the backbone, flat, as `Layout.read_BRK` indexes it. The head is not applied."""
    inputs: dict[str, Any] = {"input_ids": ids_XT, "attention_mask": masks, "use_cache": False}
    if layout.allowed_XTT is not None:
        inputs["position_ids"] = layout.positions_XT
    hidden: Tensor = backbone(model)(**inputs).last_hidden_state
    return hidden.flatten(0, 1)


def output_logits(model: PreTrainedModel, hidden_PH: Tensor) -> Tensor:
    """The model's own logits [P, V] from hidden states: output head, multiplier, softcap.

    The names are those that transformers' configs use: `logit_scale` (Cohere), `output_multiplier`, `lm_head_multiplier`
    (Falcon-H1), `logits_scaling` (Granite divides, HyperCLOVA X multiplies), and the softcaps of Gemma, RecurrentGemma, xLSTM.
    `check_output_logits` compares with `model(...).logits`, so an architecture with another rule is refused, not mistrained.
    """
    config = model.config.get_text_config()
    logits: Tensor = model.get_output_embeddings()(hidden_PH)
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            logits = logits * getattr(config, name)
    if (scaling := getattr(config, "logits_scaling", None)) is not None:
        logits = logits * scaling if config.model_type == "hyperclovax" else logits / scaling
    for name in ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"):
        if (cap := getattr(config, name, None)) is not None:
            logits = torch.tanh(logits / cap) * cap
    return logits


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off within the block."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@torch.no_grad()
def check_output_logits(model: PreTrainedModel) -> None:
    """Raises ValueError when `output_logits` is not what `model(...).logits` returns on a few tokens.

    Or where logits depend on tokens or padding behind them.
    """
    ids = torch.arange(4, device=model.device)[None] % model.config.get_text_config().vocab_size
    with evaluating(model):
        expected = model(input_ids=ids, use_cache=False).logits[0].float()
        hidden = backbone(model)(input_ids=ids, use_cache=False).last_hidden_state[0]
        if not can_pack(model):
            check_left_to_right(model)
        fits = hidden.shape[-1] == getattr(model.get_output_embeddings(), "in_features", hidden.shape[-1])
        gap = (expected - output_logits(model, hidden).float()).abs().max().item() if fits else float("inf")
    if gap > 1e-2 * max(1.0, expected.abs().max().item()):
        raise ValueError(
            f"{type(model).__name__} post-processes its logits in a way this version does not know (largest difference "
            f"{gap:.3g}); please report the architecture, since training on other logits would go silently wrong."
        )


@torch.no_grad()
def check_layout(model: PreTrainedModel, mask_token_id: int) -> None:
    """Raises ValueError when a packed row is not read as separate passes read it: two regions behind a few tokens."""
    if not can_pack(model):
        return
    text_BN = torch.arange(8, device=model.device)[None] % model.config.get_text_config().vocab_size
    regions = Regions(torch.tensor([[2, 5]]), torch.tensor([[3, 3]]))
    lengths_B = torch.tensor([text_BN.shape[1]])
    layout = pack_regions(text_BN, lengths_B, regions, k_max=3, slots=4, mask_token_id=mask_token_id)
    gaps = []
    with evaluating(model):
        hidden = hidden_states(model, layout.ids_XT, layout, attention_masks(model.config, layout, model.dtype))
        for anchor, read_K in zip(regions.anchor_BR[0].tolist(), layout.read_BRK[0], strict=True):
            ids = torch.cat([text_BN[:, : anchor + 1], text_BN.new_full((1, 2), mask_token_id)], 1)
            alone = backbone(model)(input_ids=ids, use_cache=False).last_hidden_state[0, anchor:].float()
            gaps += ((hidden[read_K].float() - alone).norm(dim=-1) / alone.norm(dim=-1)).tolist()
    if not median(gaps) <= 0.1:  # rounding may send single tokens to other experts
        raise ValueError(
            f"{type(model).__name__} does not read several blocks in one row as it reads them in separate passes (they differ "
            f"by {median(gaps):.0%}); please report the architecture, since training would go silently wrong."
        )
