"""A cache in which every row has its own offset, and the attention masks that go with it."""

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
    """Where the keys and values of a step go: set once per step, read by every layer."""

    def __init__(self, *, slots: int) -> None:
        self.slots = slots
        self.first: dict[tuple[int, int, torch.device], Tensor] = {}

    def place(self, slots_AT: Tensor, *, top: int) -> None:
        """Columns of the next pass write to these slots, and attention reads the first `top` slots."""
        self.slots_AT, self.top = slots_AT, top
        self.flat: dict[tuple[int, torch.device], Tensor] = {}

    def index(self, heads: int, device: torch.device) -> Tensor:
        """Rows of a cache [A, G, C, D] seen as [A * G * C, D] that the step's [A, G, T] vectors go to."""
        if (heads, device) not in self.flat:
            first_AG = self._first_slots(len(self.slots_AT), heads, device)
            self.flat[heads, device] = (first_AG[..., None] + self.slots_AT.to(device)[:, None]).flatten()
        return self.flat[heads, device]

    def _first_slots(self, rows: int, heads: int, device: torch.device) -> Tensor:
        if (rows, heads, device) not in self.first:
            self.first[rows, heads, device] = (torch.arange(rows * heads, device=device) * self.slots).view(rows, heads)
        return self.first[rows, heads, device]


class RowOffsetLayer(StaticLayer):
    """Keys and values [A, G, C, D], allocated once. Sliding layers keep all positions: the window is in the mask."""

    keys: Tensor
    values: Tensor

    def __init__(self, placement: Placement) -> None:
        super().__init__(max_cache_len=placement.slots)
        self.placement = placement

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write [A, G, T, D] to the step's slots; returns the slots in use, [A, G, top, D]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        index, top = self.placement.index(key_states.shape[1], key_states.device), self.placement.top
        # One index names row, head and slot in the memory's flat view.
        self.keys.flatten(0, 2).index_copy_(0, index, key_states.reshape(-1, self.k_head_dim))
        self.values.flatten(0, 2).index_copy_(0, index, value_states.reshape(-1, self.v_head_dim))
        return self.keys.narrow(2, 0, top), self.values.narrow(2, 0, top)

    def replace_row(self, target: int) -> None:
        """Move the last row to `target` and drop the last."""
        if target < len(self.keys) - 1:
            self.keys[target], self.values[target] = self.keys[-1], self.values[-1]
        self.keys, self.values = self.keys[:-1], self.values[:-1]


class _RowOffsetHybridLayer(RowOffsetLayer, LinearAttentionAndStaticFullAttentionLayer):
    """Keys and values with row offsets, in a layer that has a recurrent state as well."""


def hybrid_cache_layer(layer: Any, placement: Placement) -> Any:
    """The cache of one layer of a model with recurrent ones: row offsets for keys and values, states as they are."""
    if type(layer) is LinearAttentionAndFullAttentionLayer:
        return _RowOffsetHybridLayer(placement)
    return layer if type(layer) is LinearAttentionLayer else RowOffsetLayer(placement)


class AttentionMasks:
    """Masks of a step: causal in positions, with each layer type's window, in the form that the attention backend takes."""

    def __init__(self, model: PreTrainedModel, *, slots: int, scratch: int, block: int) -> None:
        """`slots` of the text, after `scratch` slots that belong to blocks of `block` masks each."""
        config = model.config.get_text_config(decoder=True)
        if config._attn_implementation not in ("sdpa", "eager"):
            raise ValueError(
                f"attn_implementation={config._attn_implementation!r} cannot express a mask per row; call "
                "model.set_attn_implementation('sdpa') (or 'eager' for models that refuse sdpa) before generate."
            )
        # Eager attention adds its mask to the scores: a boolean one would be added as 0 and 1.
        self.dtype = model.dtype if config._attn_implementation == "eager" else None
        device = execution_device(model.get_input_embeddings())
        self.slots_C = torch.arange(slots, device=device)  # of the text; scratch slots lie before them
        slot_U = torch.arange(scratch, device=device)
        self.hidden_UU = (slot_U[:, None] // max(block, 1) != slot_U // max(block, 1)) | (slot_U > slot_U[:, None])
        self.window: Any = getattr(config, "sliding_window", None)
        self.chunk: Any = getattr(config, "attention_chunk_size", None)
        # As in transformers' create_masks_for_generate: several masks where a config names its layers, else one.
        hybrids = {"hybrid": "full_attention", "hybrid_sliding": "sliding_attention"}
        named = set(getattr(config, "layer_types", []))
        self.aliases = {name: kind for name, kind in hybrids.items() if name in named}
        names = {hybrids.get(name, name) for name in named}
        self.layer_types = sorted(names - {"linear_attention", "conv"})
        self.only_type = "sliding_attention" if self.window else "chunked_attention" if self.chunk else "full_attention"

    def __call__(
        self, positions_AT: Tensor, anchors_AT: Tensor, *, masks: int, top: int, dtype: torch.dtype | None
    ) -> Tensor | dict[str, Tensor]:
        """[A, 1, T, top], or a dict of them by layer type; boolean, or of `dtype` and to be added to the scores.

        Args:
            anchors_AT: the last position of the text that each column sees.
            masks: how many of the last columns write to scratch slots.
        """
        arguments = (positions_AT[:, None, :, None], anchors_AT[:, None, :, None], masks, top, dtype)
        if not self.layer_types:
            return self._mask(self.only_type, *arguments)
        by_type = {layer_type: self._mask(layer_type, *arguments) for layer_type in self.layer_types}
        return by_type | {name: by_type[layer_type] for name, layer_type in self.aliases.items()}

    def _mask(
        self, layer_type: str, queries: Tensor, anchors: Tensor, masks: int, top: int, dtype: torch.dtype | None
    ) -> Tensor:
        slots_C = self.slots_C[: top - len(self.hidden_UU)]
        hidden = slots_C > anchors
        if layer_type == "sliding_attention":
            hidden |= slots_C <= queries - self.window
        elif layer_type == "chunked_attention":
            hidden |= slots_C // self.chunk != queries // self.chunk
        if len(self.hidden_UU):
            hidden = torch.cat([self._hidden_scratch(layer_type, queries, masks), hidden], -1)
        return ~hidden if dtype is None else hidden.to(dtype).mul_(torch.finfo(dtype).min)

    def _hidden_scratch(self, layer_type: str, queries: Tensor, masks: int) -> Tensor:
        """A mask sees the earlier masks of its own block, as far as the window or chunk goes; a token sees none."""
        rows, _, width, _ = queries.shape
        hidden = torch.ones(rows, 1, width, len(self.hidden_UU), dtype=torch.bool, device=queries.device)
        hidden[:, :, width - masks :] = self.hidden_UU[:masks]
        positions = nn.functional.pad(queries[:, :, width - masks :, 0], (0, len(self.hidden_UU) - masks))[:, :, None]
        if layer_type == "sliding_attention":
            hidden |= positions <= queries - self.window
        elif layer_type == "chunked_attention":
            hidden |= positions // self.chunk != queries // self.chunk
        return hidden
