"""Select how a model runs: with a cache, from recurrent states, or, if neither is known to work, without a cache."""

# Shapes: A rows not finished, P positions read

from __future__ import annotations

import inspect
import warnings
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.cache_utils import Cache, LinearAttentionAndFullAttentionLayer, LinearAttentionLayer

from .adapter import MaskGatedAdapter
from .cached_forward import CachedForward
from .forward_base import Forward
from .past_cache import ATTENTION_LAYERS
from .probes import CACHE_NAMES, cache_argument, cache_layers, check_left_to_right, continues_from_states, windows_by_column
from .recurrent_forward import RecurrentForward
from .rows import Row
from .settings import Settings

_RECURRENT_LAYERS = {LinearAttentionLayer, LinearAttentionAndFullAttentionLayer}


def forward_for(
    model: PreTrainedModel,
    settings: Settings,
    rows: list[Row],
    config: GenerationConfig,
    *,
    adapter: MaskGatedAdapter | None,
    synced: bool,
    past: Cache | None,
) -> Forward:
    """Return the fastest `Forward` that is correct for this model.

    Raises:
        ValueError: the model is not causal, or its layers do not support `mtp_blocks` or a cache that is passed in.
    """
    arguments = frozenset(inspect.signature(model.forward).parameters)
    kinds = {type(layer) for layer in cache_layers(model)} if model._supports_default_dynamic_cache() else {Any}
    if windows_by_column(model):
        kinds = {Any}
    if kinds <= ATTENTION_LAYERS and "position_ids" in arguments and cache_argument(model) == CACHE_NAMES[0]:
        return CachedForward(model, settings, arguments, rows, config, adapter=adapter, synced=synced, past=past)
    name = type(model).__name__
    if settings.blocks > 1 and not settings.auto:
        raise ValueError(
            f"mtp_blocks={settings.blocks} needs a model with attention layers only, and {name} has recurrent layers or an "
            "unsupported cache; leave it out."
        )
    if past is not None:
        raise ValueError(
            f"{CACHE_NAMES[0]}= needs a model with attention layers only, and {name} has recurrent layers or an unsupported "
            "cache; leave it out to read the whole conversation again."
        )
    if kinds <= ATTENTION_LAYERS | _RECURRENT_LAYERS and continues_from_states(model):
        return RecurrentForward(model, settings, arguments, rows, config, adapter=adapter, synced=synced)
    check_left_to_right(model)
    warnings.warn(
        f"{name} has an unsupported cache or takes no position_ids: it is decoded correctly but without a cache, which is "
        "slow for long texts.",
        stacklevel=2,
    )
    return UncachedForward(model, settings, arguments, adapter=adapter, synced=synced)


class UncachedForward(Forward):
    """Feeds every row completely in every step.

    Padding is on the right, where no causal layer sees it, whether the layer supports attention masks or not.
    """

    def __call__(self, alive: list[Row], k: int, blocks: int) -> tuple[Tensor, int]:
        """See `Forward`."""
        masks = k - 1
        fed = [row.tokens + row.drafts + [self.mask] * masks for row in alive]
        width = max(map(len, fed))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in fed], device=self.device)
        length_A1 = torch.tensor([len(row) for row in fed], device=self.device)[:, None]
        column = torch.arange(width, device=self.device)
        is_fed = column < length_A1
        read = max(len(row.drafts) for row in alive) + k
        # The logits of clamped columns are never used.
        columns_AP = (length_A1 - read + torch.arange(read, device=self.device)).clamp(min=0)
        logit_columns = width - int(columns_AP.min())
        logits = self.run(
            read=logit_columns,
            # Ranks that share weights must all run the adapter in the same passes.
            gate=is_fed & (column >= length_A1 - masks) if masks or (self.synced and self.longest > 1) else 0,
            input_ids=ids,
            attention_mask=is_fed.long(),
            use_cache=False,
            **({"position_ids": column.expand_as(ids)} if self.takes_positions else {}),
        )
        columns_AP = (columns_AP - (width - logit_columns)).to(logits.device)
        return logits.gather(1, columns_AP[..., None].expand(-1, -1, logits.shape[-1])), masks
