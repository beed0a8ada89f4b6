"""Checks, made before training, that a model can be trained. Each error names a remedy."""

from __future__ import annotations

import inspect
import re

import torch
from torch import nn
from transformers import PreTrainedModel

from ..custom_generate.generate import evaluating
from ..custom_generate.probes import CACHE_NAMES, cache_argument, check_left_to_right, windows_by_column
from .logits import backbone, output_logits

# layer types whose mask can be expressed for a packed row; all others need the suffix layout
_PACKABLE_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}


def can_pack(model: PreTrainedModel) -> bool:
    """Whether several regions may share one row of this model.

    Only attention may mix tokens, since recurrent and convolutional layers cannot skip tokens. The model must also accept
    `position_ids` and measure windows in positions, since otherwise it uses the column of a slot instead of its position.
    """
    config = model.config.get_text_config()
    layer_types = getattr(config, "layer_types", None) or ["full_attention"]
    arguments = inspect.signature(backbone(model).forward).parameters
    # Models that take no cache predate custom attention masks.
    takes_cache = cache_argument(backbone(model)) == CACHE_NAMES[0]
    takes_layouts = takes_cache and "position_ids" in arguments and not windows_by_column(model)
    return not model._is_stateful and takes_layouts and set(layer_types) <= _PACKABLE_LAYERS


def check_positions(model: PreTrainedModel, *, max_length: int, k_max: int) -> None:
    """Raise ValueError if the positions of slots would exceed a table of learned positions (GPT-2, OPT)."""
    needed = max_length + k_max - 2  # the last anchor is the second to last token
    for name, table in backbone(model).named_modules():
        if not isinstance(table, nn.Embedding) or not re.search(r"wpe$|position", name):
            continue
        rows = table.num_embeddings - getattr(table, "offset", 0)
        if needed > rows:
            raise ValueError(
                f"Texts of max_length={max_length} tokens and blocks of up to k_max={k_max} tokens need {needed} positions, "
                f"but {name} of {type(model).__name__} has {rows}; set max_length to {rows - k_max + 2} or less."
            )


@torch.no_grad()
def check_output_logits(model: PreTrainedModel) -> None:
    """Raise ValueError if logits are NaN on a few tokens, or `output_logits` differs from `model(...).logits`.

    For models that cannot pack, also raise if logits depend on later tokens or on padding after them.
    """
    ids = torch.arange(4, device=model.device)[None] % model.config.get_text_config().vocab_size
    with evaluating(model):
        expected = model(input_ids=ids, use_cache=False).logits[0].float()
        hidden = backbone(model)(input_ids=ids, use_cache=False).last_hidden_state[0]
        if not can_pack(model):
            check_left_to_right(model)
        fits = hidden.shape[-1] == getattr(model.get_output_embeddings(), "in_features", hidden.shape[-1])
        actual = output_logits(model, hidden).float() if fits else torch.full_like(expected, torch.inf)
        gap = (expected - actual).masked_fill(expected == actual, 0.0).abs().max().item()  # both may be -inf
    if expected.isnan().any():
        raise ValueError(
            f"{type(model).__name__} computes NaN for a text of 4 tokens, in {model.dtype} with attn_implementation="
            f"{model.config.get_text_config()._attn_implementation!r}; check its weights for NaN, or load it with "
            "attn_implementation='eager' or in float32."
        )
    if not gap <= 1e-2 * max(1.0, expected.abs().max().item()):
        raise ValueError(
            f"{type(model).__name__} post-processes its logits in a way this version does not know (largest difference "
            f"{gap:.3g}); please report the architecture, since training on other logits would be silently wrong."
        )
