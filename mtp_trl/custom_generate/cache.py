"""A key-value cache in which every row has its own offset, and the attention masks for it."""

# Shapes: A rows not finished, C cache slots, D features of an attention head, G key-value heads, T columns of a forward pass,
# U scratch slots

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import (
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndStaticFullAttentionLayer,
    LinearAttentionLayer,
    StaticLayer,
)

from .probes import execution_device


class Placement:
    """The cache slots to which a step writes its keys and values. They are set once per step and used by every layer."""

    def __init__(self, *, slots: int) -> None:
        self.slots = slots
        self.first: dict[tuple[int, int, torch.device], Tensor] = {}

    def place(self, slots_AT: Tensor, *, top: int) -> None:
        """Set the slots that the columns of the next pass write to. Attention reads the first `top` slots."""
        self.slots_AT, self.top = slots_AT, top
        self.flat: dict[tuple[int, torch.device], Tensor] = {}

    def index(self, heads: int, device: torch.device) -> Tensor:
        """Return where the step's vectors [A, G, T] go, as flat indices into a cache [A, G, C, D] viewed as [A * G * C, D]."""
        if (heads, device) not in self.flat:
            first_AG = self._first_slots(len(self.slots_AT), heads, device)
            self.flat[heads, device] = (first_AG[..., None] + self.slots_AT.to(device)[:, None]).flatten()
        return self.flat[heads, device]

    def _first_slots(self, rows: int, heads: int, device: torch.device) -> Tensor:
        if (rows, heads, device) not in self.first:
            self.first[rows, heads, device] = (torch.arange(rows * heads, device=device) * self.slots).view(rows, heads)
        return self.first[rows, heads, device]


class RowOffsetLayer(StaticLayer):
    """Keys and values [A, G, C, D], allocated once. Sliding layers keep all positions too; the mask applies the window."""

    keys: Tensor
    values: Tensor

    def __init__(self, placement: Placement) -> None:
        super().__init__(max_cache_len=placement.slots)
        self.placement = placement

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write [A, G, T, D] to the step's slots, and return the slots in use, [A, G, top, D]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            # Both have the dtype of the keys now. Under autocast, rotary embeddings leave the keys in float32 (Llama).
            self.values = self.values.to(value_states.dtype)
        index, top = self.placement.index(key_states.shape[1], key_states.device), self.placement.top
        # In the flat view, one index stands for row, head and slot.
        self.keys.flatten(0, 2).index_copy_(0, index, key_states.reshape(-1, self.k_head_dim))
        self.values.flatten(0, 2).index_copy_(0, index, value_states.reshape(-1, self.v_head_dim))
        return self.keys.narrow(2, 0, top), self.values.narrow(2, 0, top)

    def replace_row(self, target: int) -> None:
        """Move the last row to `target`, and shrink the batch by one row."""
        if target < len(self.keys) - 1:
            self.keys[target], self.values[target] = self.keys[-1], self.values[-1]
        self.keys, self.values = self.keys[:-1], self.values[:-1]


class _RowOffsetHybridLayer(RowOffsetLayer, LinearAttentionAndStaticFullAttentionLayer):
    """Keys and values with row offsets, for a layer that also has a recurrent state."""


def hybrid_cache_layer(layer: Any, placement: Placement) -> Any:
    """Convert a cache layer of a model with recurrent layers: keys and values get row offsets, states are unchanged."""
    if type(layer) is LinearAttentionAndFullAttentionLayer:
        return _RowOffsetHybridLayer(placement)
    return layer if type(layer) is LinearAttentionLayer else RowOffsetLayer(placement)


class AttentionMasks:
    """Attention masks of a step: causal by position, with the window of each layer type, in the attention backend's format."""

    def __init__(self, model: PreTrainedModel, *, slots: int, scratch: int) -> None:
        """The cache has `scratch` slots, for blocks of masks, and then `slots` slots for the text."""
        config = model.config.get_text_config(decoder=True)
        if config._attn_implementation not in ("sdpa", "eager"):
            raise ValueError(
                f"attn_implementation={config._attn_implementation!r} does not support a mask per row; call "
                "model.set_attn_implementation('sdpa') (or 'eager' for models that refuse sdpa) before generate."
            )
        # Eager attention adds the mask to the scores, and would add a boolean mask as 0 and 1.
        self.dtype = model.dtype if config._attn_implementation == "eager" else None
        device = execution_device(model.get_input_embeddings())
        self.slots_C = torch.arange(slots, device=device)  # of the text, after the scratch slots
        self.slot_U = torch.arange(scratch, device=device)
        self.hidden_UU: dict[int, Tensor] = {}  # which scratch slots masks do not attend to, by the masks of a block
        self.window: Any = getattr(config, "sliding_window", None)
        self.chunk: Any = getattr(config, "attention_chunk_size", None)
        # As in transformers' create_masks_for_generate: one mask per layer type if the config lists them, else a single mask.
        hybrids = {"hybrid": "full_attention", "hybrid_sliding": "sliding_attention"}
        named = set(getattr(config, "layer_types", []))
        self.aliases = {name: kind for name, kind in hybrids.items() if name in named}
        names = {hybrids.get(name, name) for name in named}
        self.layer_types = sorted(names - {"linear_attention", "conv"})
        self.only_type = "sliding_attention" if self.window else "chunked_attention" if self.chunk else "full_attention"

    def __call__(
        self, positions_AT: Tensor, anchors_AT: Tensor, *, masks: int, block: int, top: int, dtype: torch.dtype | None
    ) -> Tensor | dict[str, Tensor]:
        """Return a mask [A, 1, T, top], or a dict of masks by layer type.

        Args:
            positions_AT: the position of each column.
            anchors_AT: the last text position that each column attends to.
            masks: number of columns at the end that write to scratch slots.
            block: number of masks of a block.
            top: number of slots that attention reads.
            dtype: None for boolean masks, else the dtype of masks that are added to the scores.
        """
        arguments = (positions_AT[:, None, :, None], anchors_AT[:, None, :, None], masks, block, top, dtype)
        if not self.layer_types:
            return self._mask(self.only_type, *arguments)
        by_type = {layer_type: self._mask(layer_type, *arguments) for layer_type in self.layer_types}
        return by_type | {name: by_type[layer_type] for name, layer_type in self.aliases.items()}

    def _mask(
        self, layer_type: str, queries: Tensor, anchors: Tensor, masks: int, block: int, top: int, dtype: torch.dtype | None
    ) -> Tensor:
        slots_C = self.slots_C[: top - len(self.slot_U)]
        hidden = slots_C > anchors
        if layer_type == "sliding_attention":
            hidden |= slots_C <= queries - self.window
        elif layer_type == "chunked_attention":
            hidden |= slots_C // self.chunk != queries // self.chunk
        if len(self.slot_U):
            hidden = torch.cat([self._hidden_scratch(layer_type, queries, masks, block), hidden], -1)
        return ~hidden if dtype is None else hidden.to(dtype).mul_(torch.finfo(dtype).min)

    def _hidden_scratch(self, layer_type: str, queries: Tensor, masks: int, block: int) -> Tensor:
        """Return which scratch slots are hidden, [A, 1, T, U].

        A mask attends to the earlier masks of its own block, within its window or chunk. A token attends to no mask.
        """
        if block not in self.hidden_UU:
            block_U = self.slot_U // max(block, 1)
            self.hidden_UU[block] = (block_U[:, None] != block_U) | (self.slot_U > self.slot_U[:, None])
        rows, _, width, _ = queries.shape
        hidden = torch.ones(rows, 1, width, len(self.slot_U), dtype=torch.bool, device=queries.device)
        hidden[:, :, width - masks :] = self.hidden_UU[block][:masks]
        positions = nn.functional.pad(queries[:, :, width - masks :, 0], (0, len(self.slot_U) - masks))[:, :, None]
        if layer_type == "sliding_attention":
            hidden |= positions <= queries - self.window
        elif layer_type == "chunked_attention":
            hidden |= positions // self.chunk != queries // self.chunk
        return hidden
