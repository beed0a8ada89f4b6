"""Which way a model is run: with a cache, from recurrent states, or, where neither is known to work, without a cache."""

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
from .probes import cache_layers, check_left_to_right, continues_from_states, windows_by_column
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
    """The fastest way that is right for this model.

    Raises:
        ValueError: `mtp_blocks` or `past_key_values` where the model's layers cannot do that, or a model that is not causal.
    """
    arguments = frozenset(inspect.signature(model.forward).parameters)
    kinds = {type(layer) for layer in cache_layers(model)} if model._supports_default_dynamic_cache() else {Any}
    if windows_by_column(model):
        kinds = {Any}
    if kinds <= ATTENTION_LAYERS and {"position_ids", "past_key_values"} <= arguments:
        return CachedForward(model, settings, arguments, rows, config, adapter=adapter, synced=synced, past=past)
    name = type(model).__name__
    if settings.blocks > 1:
        raise ValueError(
            f"mtp_blocks={settings.blocks} needs layers that can look back at any block, and {name} has recurrent ones, or "
            "others whose cache is unknown; leave it out."
        )
    if past is not None:
        raise ValueError(
            f"past_key_values= needs layers that keep keys and values only, and {name} has recurrent ones, or others whose "
            "cache is unknown; leave it out: the conversation is read anew."
        )
    if kinds <= ATTENTION_LAYERS | _RECURRENT_LAYERS and continues_from_states(model):
        return RecurrentForward(model, settings, arguments, rows, config, adapter=adapter, synced=synced)
    check_left_to_right(model)
    warnings.warn(
        f"{name} has layers whose cache is unknown, or cannot be told positions: it is decoded correctly but without a cache, "
        "which is slow for long texts.",
        stacklevel=2,
    )
    return UncachedForward(model, settings, arguments, adapter=adapter, synced=synced)


class UncachedForward(Forward):
    """Feeds every row whole in every step, padded on the right: no causal layer sees that, whatever it makes of a mask."""

    def __call__(self, alive: list[Row], k: int) -> tuple[Tensor, int]:
        """See `Forward`."""
        masks = k - 1
        fed = [row.tokens + row.drafts + [self.mask] * masks for row in alive]
        width = max(map(len, fed))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in fed], device=self.device)
        length_A1 = torch.tensor([len(row) for row in fed], device=self.device)[:, None]
        column = torch.arange(width, device=self.device)
        is_fed = column < length_A1
        read = max(len(row.drafts) for row in alive) + k
        columns_AP = (length_A1 - read + torch.arange(read, device=self.device)).clamp(min=0)  # none is read before 0
        kept = width - int(columns_AP.min())
        logits = self.run(
            read=kept,
            # Ranks that share weights run the adapter in the same passes.
            gate=is_fed & (column >= length_A1 - masks) if masks or (self.synced and self.longest > 1) else 0,
            input_ids=ids,
            attention_mask=is_fed.long(),
            use_cache=False,
            **({"position_ids": column.expand_as(ids)} if self.takes_positions else {}),
        )
        columns_AP = (columns_AP - (width - kept)).to(logits.device)
        return logits.gather(1, columns_AP[..., None].expand(-1, -1, logits.shape[-1])), masks
