"""Cached steps of models whose layers cache only keys and values. Every row has its own offset in the cache."""

# Shapes: A rows not finished, E blocks of masks in a row, M masks of a row, T columns of a forward pass

from __future__ import annotations

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.cache_utils import Cache

from .adapter import MaskGatedAdapter
from .cache import AttentionMasks, Placement, RowOffsetLayer
from .forward_base import Forward, StepColumns
from .past_cache import hand_back, take_over
from .probes import CACHE_NAMES, cache_layers
from .rows import Row
from .settings import Settings

SLOT_MULTIPLE = 64  # attention reads a multiple of this many slots, so that there are few shapes, all aligned
STATIC_SLOT_MULTIPLE = 256  # static shapes allocate a multiple of this many slots: calls of similar length share a graph


class CachedForward(Forward):
    """Feeds the tokens that are not cached yet, and the masks. Padding writes to a slot that no column attends to.

    With one block of masks, slot = position. Several blocks of masks share positions, so they write to scratch slots at the
    start of the cache, and for the text slot = scratch + position.

    With `cache_implementation="static"` all steps after the prefill have the same shapes. They run compiled if transformers
    would compile them.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        settings: Settings,
        arguments: frozenset[str],
        rows: list[Row],
        config: GenerationConfig,
        *,
        adapter: MaskGatedAdapter | None,
        synced: bool,
        past: Cache | None,
    ) -> None:
        super().__init__(model, settings, arguments, adapter=adapter, synced=synced)
        self.blocks = settings.blocks
        self.scratch = max((blocks * (k - 1) for k, blocks in settings.modes if blocks > 1), default=0)
        self.static = config.cache_implementation == "static"
        self.padding_slot = self.scratch + max(row.limit for row in rows)
        multiple = STATIC_SLOT_MULTIPLE if self.static else 1
        self.placement = Placement(slots=-(-(self.padding_slot + 1) // multiple) * multiple)
        self.layers = [RowOffsetLayer(self.placement) for _ in cache_layers(model)]
        self.cache = Cache(layers=self.layers)
        self.attention = AttentionMasks(model, slots=self.placement.slots - self.scratch, scratch=self.scratch)
        self.rows = rows
        self.keeps_rows = self.static or past is not None
        self.compiles = self.static and model._valid_auto_compile_criteria({CACHE_NAMES[0]: self.cache}, config)
        self.compile_config = config.compile_config
        if past is not None:
            take_over(past, self.layers, rows, scratch=self.scratch)

    def __call__(self, alive: list[Row], k: int, blocks: int) -> tuple[Tensor, int]:
        """See `Forward`."""
        same_shapes = self.static and all(row.cached for row in alive)
        if not same_shapes:
            blocks = max(len(row.rejection_points(blocks)) for row in alive)
        masks = blocks * (k - 1)
        pending = max(len(row.pending) for row in alive)
        if same_shapes:
            pending = 1 if pending == k == 1 else self.longest
        fed = self.rows if self.keeps_rows else alive
        columns = self.columns(fed, pending=pending, blocks=blocks, k=k)
        last = self.scratch + max(min(row.end + k - 1, row.limit) for row in alive)
        slots = self.placement.slots
        top = slots if same_shapes else min(-(-last // SLOT_MULTIPLE) * SLOT_MULTIPLE, slots)
        self.placement.place(columns.slots, top=top)
        if same_shapes and self.compiles:
            self.call = self.model.get_compiled_call(self.compile_config)
        pending_read = pending if same_shapes else 1 + max(len(row.drafts) for row in alive)
        logits = self.run(
            read=pending_read + masks,
            gate=masks,
            input_ids=columns.ids,
            position_ids=columns.positions,
            attention_mask=self.attention(
                columns.positions, columns.anchors, masks=masks, block=k - 1, top=top, dtype=self.mask_dtype()
            ),
            use_cache=True,
            **{CACHE_NAMES[0]: self.cache},
        )
        return (logits if fed is alive else logits[[row.index for row in alive]]), masks

    def mask_dtype(self) -> torch.dtype | None:
        """Return the dtype of the cache once it is allocated: SDPA would convert a boolean mask again in every layer."""
        first = self.layers[0]
        return first.keys.dtype if first.is_initialized else self.attention.dtype

    def columns(self, rows: list[Row], *, pending: int, blocks: int, k: int) -> StepColumns:
        """Return the columns [padding | pending tokens | masks] of every row.

        Masks beyond a row's limit are padding, and so are all columns of a finished row.
        """
        fed = [[] if row.done else row.pending for row in rows]
        ids = [[0] * (pending - len(tokens)) + tokens + [self.mask] * (blocks * (k - 1)) for tokens in fed]
        # Per row: the first position fed, the position after the last token, the limit, and the starts of the blocks.
        positions = [
            [row.end - len(tokens), row.end, row.limit, *self._block_starts(row, blocks)]
            for row, tokens in zip(rows, fed, strict=True)
        ]
        first_A1, end_A1, limit_A1, block_start_AE = torch.tensor(positions).split([1, 1, 1, blocks], 1)

        text_AT = end_A1 - pending + torch.arange(pending)
        is_text_AT = text_AT >= first_A1
        text_AT = text_AT.where(is_text_AT, 0)
        text_slots_AT = (text_AT + self.scratch).where(is_text_AT, self.padding_slot)

        mask_AM = (block_start_AE[..., None] + torch.arange(k - 1)).flatten(1)
        is_inside_AM = mask_AM < limit_A1
        anchor_AM, mask_slots_AM = mask_AM, mask_AM
        if self.scratch:  # a block attends to the text before it, and to itself in the scratch slots
            anchor_AM = (block_start_AE - 1).repeat_interleave(k - 1, 1)
            mask_slots_AM = torch.arange(blocks * (k - 1)).expand_as(mask_AM)
        mask_slots_AM = mask_slots_AM.where(is_inside_AM, self.padding_slot)
        return StepColumns.moved(
            torch.tensor(ids),
            torch.cat([text_AT, mask_AM.where(is_inside_AM, 0)], 1),
            torch.cat([text_slots_AT, mask_slots_AM], 1),
            torch.cat([text_AT, anchor_AM.where(is_inside_AM, 0)], 1),
            self.device,
        )

    def _block_starts(self, row: Row, blocks: int) -> list[int]:
        """Return the positions at which the row's blocks of masks start; blocks that it does not need start at its limit."""
        points = [] if row.done else [len(row.tokens) + point for point in row.rejection_points(blocks)]
        return points + [row.limit] * (blocks - len(points))

    def replace_row(self, index: int) -> None:
        """Move the last row to `index` in the keys and values of every layer."""
        for layer in self.layers:
            layer.replace_row(index)

    def hand_back(self, past: Cache) -> None:
        """Copy the columns that are cached in all rows to the caller's cache."""
        hand_back(past, self.layers, self.rows, self.model, scratch=self.scratch)
