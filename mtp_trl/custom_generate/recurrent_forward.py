"""Steps of models with recurrent layers. Their states cannot be rolled back, so they advance over confirmed tokens only."""

# Shapes: A rows not finished, P positions read, T columns of a forward pass, V vocabulary

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.cache_utils import Cache

from .adapter import MaskGatedAdapter
from .cache import AttentionMasks, Placement, RowOffsetLayer, hybrid_cache_layer
from .cached_forward import SLOT_MULTIPLE
from .forward_base import Forward, StepColumns
from .probes import cache_argument, cache_layers, recurrent_states
from .rows import Row
from .settings import Settings

STATE_TOKENS = 16  # a state advances when it is this many confirmed tokens behind; until then each step feeds them again


class RecurrentForward(Forward):
    """Feeds [confirmed tokens after the state | drafts | masks | padding] in each step, and restores the states after it.

    When a row's state is `STATE_TOKENS` confirmed tokens behind, an extra pass without masks advances it. That pass advances
    all rows by the same number of tokens, since padding would change a state, and restores the states of the other rows.
    Attention layers use the same cache as in `CachedForward`.
    """

    reread = STATE_TOKENS

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
    ) -> None:
        super().__init__(model, settings, arguments, adapter=adapter, synced=synced)
        if config.cache_implementation == "static":
            raise ValueError(
                f"{type(model).__name__} has recurrent layers, whose steps have many shapes; leave "
                "cache_implementation='static' out."
            )
        self.padding_slot = max(row.limit for row in rows)
        self.placement = Placement(slots=self.padding_slot + 1)
        self.layers = [hybrid_cache_layer(layer, self.placement) for layer in cache_layers(model)]
        attends = any(isinstance(layer, RowOffsetLayer) for layer in self.layers)
        self.attention = AttentionMasks(model, slots=self.placement.slots, scratch=0) if attends else None
        self.cache_name = str(cache_argument(model))
        self.cache = Cache(layers=self.layers)
        self.read: dict[int, int] = {}  # number of tokens that a row's state has read, by the row's index

    def __call__(self, alive: list[Row], k: int, blocks: int) -> tuple[Tensor, int]:
        """See `Forward`."""
        masks = k - 1
        if not self.read:
            # The prefill pads before the text, where padding leaves the initial state at 0.
            prompts = [row.tokens if masks == 0 else row.tokens[:-1] for row in alive]
            self.read = dict.fromkeys((row.index for row in alive), 0)
            logits = self.feed(alive, prompts, pad_first=True, read=1)
            self.read = {row.index: len(prompt) for row, prompt in zip(alive, prompts, strict=True)}
            if masks == 0:
                return logits, 0
            self.count_pass(alive)
        self.advance(alive, at_least=STATE_TOKENS if masks else 1)

        fed = [row.tokens[self.read[row.index] :] + row.drafts for row in alive]
        if masks == 0 and all(len(tokens) == 1 for tokens in fed):
            logits = self.feed(alive, fed)
            self.read = {row.index: len(row.tokens) for row in alive}
            return logits, 0
        with self.restored(range(len(alive))):
            logits = self.feed(alive, fed, masks=masks)
        pending_read = 1 + max(len(row.drafts) for row in alive)
        first = torch.tensor([len(tokens) - pending_read for tokens in fed], device=logits.device)
        # The logits of clamped columns are never used.
        columns_AP = (first[:, None] + torch.arange(pending_read + masks, device=logits.device)).clamp(min=0)
        return logits.gather(1, columns_AP[..., None].expand(-1, -1, logits.shape[-1])), masks

    def advance(self, alive: list[Row], *, at_least: int) -> None:
        """Advance the states that lag by `at_least` confirmed tokens.

        The last confirmed token does not count. The step itself feeds it, since it needs its logits.
        """
        while True:
            lags = [len(row.tokens) - 1 - self.read[row.index] for row in alive]
            advances = [lag >= at_least for lag in lags]
            if not any(advances):
                return
            step = min(lag for lag in lags if lag >= at_least)
            starts = [self.read[row.index] for row in alive]
            fed = [row.tokens[s : s + step] if moves else [] for row, s, moves in zip(alive, starts, advances, strict=True)]
            with self.restored([member for member, moves in enumerate(advances) if not moves]):
                self.feed(alive, fed, read=1)
            for row, tokens in zip(alive, fed, strict=True):
                self.read[row.index] += len(tokens)
            self.count_pass(alive)

    def count_pass(self, alive: list[Row]) -> None:
        """Record a pass that generated no tokens."""
        for row in alive:
            row.block_lengths.append(0)

    def feed(
        self, alive: list[Row], fed: list[list[int]], *, masks: int = 0, pad_first: bool = False, read: int | None = None
    ) -> Tensor:
        """Feed each row the tokens after its state and `masks` masks, and return logits [A, T, V].

        Padding comes last, or first with `pad_first`. `read` returns the logits of the last `read` columns only.
        """
        # With `pad_first`, feed at least two columns. A prompt of one token leaves only padding to feed, and transformers
        # ignores the attention mask of a single column.
        width = max(2 if pad_first else 1, max(map(len, fed))) + masks
        counts = [len(tokens) + masks for tokens in fed]
        ids = [tokens + [self.mask] * masks for tokens in fed]
        ids = [[0] * (width - len(row)) + row if pad_first else row + [0] * (width - len(row)) for row in ids]
        count_A1 = torch.tensor(counts)[:, None]
        start_A1 = torch.tensor([self.read[row.index] for row in alive])[:, None]
        limit_A1 = torch.tensor([row.limit for row in alive])[:, None]
        index_AT = torch.arange(width) - (width - count_A1 if pad_first else 0)  # index among the tokens and masks of the row
        is_fed_AT = (index_AT >= 0) & (index_AT < count_A1)
        is_mask_AT = (is_fed_AT & (index_AT >= count_A1 - masks)).to(self.device)
        positions_AT = (start_A1 + index_AT).where(is_fed_AT, 0)
        slots_AT = positions_AT.where(is_fed_AT & (positions_AT < limit_A1), self.padding_slot)
        columns = StepColumns.moved(torch.tensor(ids), positions_AT, slots_AT, positions_AT, self.device)

        ends = zip(alive, counts, strict=True)
        last = max(min(self.read[row.index] + count, row.limit) for row, count in ends)
        top = min(-(-max(last, 1) // SLOT_MULTIPLE) * SLOT_MULTIPLE, self.placement.slots)
        self.placement.place(columns.slots, top=top)
        states: Any = is_fed_AT.long().to(self.device) if pad_first else None
        mask: Any = states
        if self.attention is not None:
            mask = self.attention(columns.positions, columns.anchors, masks=0, block=0, top=top, dtype=self.attention.dtype)
            mask = {**mask, "linear_attention": states, "conv": states}
        return self.run(
            read=width if read is None else read,
            # Ranks that share weights must all run the adapter in the same passes.
            gate=is_mask_AT if masks or (self.synced and self.longest > 1) else 0,
            input_ids=columns.ids,
            attention_mask=mask,
            use_cache=True,
            **{self.cache_name: self.cache},
            **({"position_ids": columns.positions} if self.takes_positions else {}),
        )

    @contextmanager
    def restored(self, members: Sequence[int]) -> Iterator[None]:
        """Restore the states of these rows after the block."""
        rows = torch.tensor(list(members), device=self.device)
        states = recurrent_states(self.layers) if members else []
        saved = [holder[i].index_select(0, rows.to(holder[i].device)) for holder, i in states]
        yield
        states = recurrent_states(self.layers) if members else []
        for (holder, i), state in zip(states, saved, strict=True):
            holder[i].index_copy_(0, rows.to(holder[i].device), state)

    def replace_row(self, index: int) -> None:
        """Move the last row to `index` in the state, keys and values of every layer."""
        for states, i in recurrent_states(self.layers):
            states[i][index] = states[i][-1].clone()
            states[i] = states[i][:-1]
        for layer in self.layers:
            if isinstance(layer, RowOffsetLayer):
                layer.replace_row(index)
