"""Regions: how they are drawn, and how they are appended to a clean text. Pure tensor functions; no model, no I/O.

A *region* is one block to predict: a prefix of the text, whose last token is the *anchor*, followed by `size - 1` *slots*
that hold mask tokens. Position 1 of the block is predicted at the anchor, positions 2..size at the slots.

    packed   [ clean tokens x_0 .. x_{N-1} | slots of region 1 | slots of region 2 | ... ]     one row per text
    suffix   [ x_0 .. x_anchor | slots ]                                                      one row per region

The packed layout is for attention-only models. Layers with a recurrent state cannot skip tokens and need the suffix layout.
"""

# Shapes: B rows of the batch, K positions of a block, N clean tokens of a row, R regions of a row, S mask slots of a row,
# T columns of a forward pass, X layout rows

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Regions:
    """Regions of a batch.

    Attributes:
        anchor_BR: index of the last prefix token in the clean text, int64.
        size_BR: block size k, int64; 0 for missing regions of a row that has fewer than R.
    """

    anchor_BR: Tensor
    size_BR: Tensor


@dataclass(frozen=True)
class Layout:
    """Texts and regions as rows that a causal LM can read in one pass.

    Attributes:
        ids_XT: token ids, with the mask token at every slot.
        positions_XT: position of each token in its own text.
        allowed_XTT: which keys (last axis) a query may attend to; None for ordinary causal attention over `valid_XT`.
        valid_XT: False at right padding and unused slots.
        read_BRK: flat index (row * T + column) at which the prediction of each position is read; 0 if it does not exist.
        drawn_BRK: whether a position of a region exists.
        clean_length: N. In both layouts, the first N columns of rows 0..B-1 hold the clean texts.
    """

    ids_XT: Tensor
    positions_XT: Tensor
    allowed_XTT: Tensor | None
    valid_XT: Tensor
    read_BRK: Tensor
    drawn_BRK: Tensor
    clean_length: int

    def clean_index(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Return the flat index of clean tokens, at which next-token predictions on the text are read."""
        return rows * self.ids_XT.shape[1] + columns


def row_generator(seed: int, step: int, row: int) -> np.random.Generator:
    """Return the random generator for one row of the global batch at one optimizer step.

    It does not depend on which process has the row.
    """
    return np.random.default_rng([seed, step, row])


def sample_regions(
    first_anchor_B: Sequence[int],
    last_anchor_B: Sequence[int],
    *,
    k_min: int,
    k_max: int,
    slots: int,
    generators: Sequence[np.random.Generator],
) -> Regions:
    """Draw regions until the slots of each row are full. The last region of a row is shortened to fit.

    Args:
        first_anchor_B: index of the last prompt token of each row (0-based).
        last_anchor_B: index of the token before the last completion token of each row.
        k_min, k_max: block sizes are drawn uniformly from [k_min, k_max].
        slots: number of slots per row, the sum of (size - 1) over its regions.
        generators: one random generator per row.

    Raises:
        ValueError: if the block sizes or the slots allow no region, or a row has no prompt or no completion token.
    """
    if not 2 <= k_min <= k_max:
        raise ValueError(f"Block sizes need 2 <= k_min <= k_max, got k_min={k_min} and k_max={k_max}.")
    if slots < 1:
        raise ValueError(f"slots must be >= 1 to hold a region, got {slots}; 8 * k_max = {8 * k_max} is usual.")
    rows: list[tuple[list[int], list[int]]] = []
    for first, last, rng in zip(first_anchor_B, last_anchor_B, generators, strict=True):
        if first < 0 or last < first:
            raise ValueError(f"A row needs a prompt token and a completion token, got anchors {first}..{last}.")
        sizes: list[int] = []
        left = slots
        while left:
            sizes.append(min(int(rng.integers(k_min, k_max + 1)), left + 1))
            left -= sizes[-1] - 1
        rows.append((rng.integers(first, last + 1, size=len(sizes)).tolist(), sizes))
    width = max(len(sizes) for _, sizes in rows)
    anchor_BR = torch.zeros(len(rows), width, dtype=torch.long)
    size_BR = torch.zeros(len(rows), width, dtype=torch.long)
    for row, (anchors, sizes) in enumerate(rows):
        anchor_BR[row, : len(anchors)] = torch.tensor(anchors)
        size_BR[row, : len(sizes)] = torch.tensor(sizes)
    return Regions(anchor_BR, size_BR)


def compact_left_padding(ids_BN: Tensor, mask_BN: Tensor, *, pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Move the tokens of every row to the front. Return the right-padded ids [B, N] and the lengths [B]."""
    lengths_B = mask_BN.sum(1)
    order_BN = torch.argsort(mask_BN.to(torch.int8), dim=1, descending=True, stable=True)
    ids_BN = ids_BN.gather(1, order_BN)
    column_N = torch.arange(ids_BN.shape[1], device=ids_BN.device)
    ids_BN = ids_BN.masked_fill(column_N >= lengths_B[:, None], pad_token_id)
    return ids_BN[:, : int(lengths_B.max())], lengths_B


def drawn_positions(size_BR: Tensor, k_max: int) -> Tensor:
    """Return which of the K = k_max positions each region has, bool [B, R, K]."""
    return torch.arange(k_max, device=size_BR.device) < size_BR[..., None]


def pack_regions(
    clean_BN: Tensor, lengths_B: Tensor, regions: Regions, *, k_max: int, slots: int, mask_token_id: int
) -> Layout:
    """Append the slots of all regions to the clean tokens of their row (one layout row per text).

    Clean tokens attend causally to clean tokens. A slot attends to the clean tokens up to its anchor, and to the slots of its
    own region up to itself. Position ids of slots continue from the anchor (arXiv 2602.06019, section 3).
    """
    B, N = clean_BN.shape
    device = clean_BN.device
    anchor_BR, size_BR = regions.anchor_BR.to(device), regions.size_BR.to(device)
    width_BR = (size_BR - 1).clamp(min=0)
    start_BR = width_BR.cumsum(1) - width_BR  # first slot of each region, counted from column N
    column_S = torch.arange(slots, device=device)
    # the region index of a slot is the number of regions that end at or before it
    region_BS = torch.searchsorted(start_BR + width_BR, column_S.expand(B, slots).contiguous(), right=True)
    used_BS = region_BS < anchor_BR.shape[1]
    region_BS = region_BS.clamp(max=anchor_BR.shape[1] - 1)
    anchor_BS = anchor_BR.gather(1, region_BS)
    slot_BS = column_S - start_BR.gather(1, region_BS) + 1  # slot s = 1..size-1 of its region
    slot_BS = slot_BS.where(used_BS, 0)  # unused slots get the position of an anchor, which is within the text

    text_N = torch.arange(N, device=device)
    positions_XT = torch.cat([text_N.expand(B, N), anchor_BS + slot_BS], 1)
    ids_XT = torch.cat([clean_BN, clean_BN.new_full((B, slots), mask_token_id)], 1)
    valid_XT = torch.cat([text_N < lengths_B.to(device)[:, None], used_BS], 1)

    drawn_BRK = drawn_positions(size_BR, k_max)
    slot_column_BRK = N + start_BR[..., None] + torch.arange(-1, k_max - 1, device=device)
    column_BRK = torch.cat([anchor_BR[..., None], slot_column_BRK[..., 1:]], 2)
    row_B11 = torch.arange(B, device=device)[:, None, None]
    read_BRK = (row_B11 * (N + slots) + column_BRK).masked_fill(~drawn_BRK, 0)
    allowed_XTT = _packed_attention(N, anchor_BS, region_BS)
    return Layout(ids_XT, positions_XT, allowed_XTT, valid_XT, read_BRK, drawn_BRK, N)


def _packed_attention(N: int, anchor_BS: Tensor, region_BS: Tensor) -> Tensor:
    """Return the attention mask, bool [B, T, T] with T = N + S: queries on the middle axis, keys on the last."""
    B, S = anchor_BS.shape
    device = anchor_BS.device
    causal_TT = torch.ones(N + S, N + S, dtype=torch.bool, device=device).tril()
    allowed = torch.zeros(B, N + S, N + S, dtype=torch.bool, device=device)
    allowed[:, :N, :N] = causal_TT[:N, :N]
    allowed[:, N:, :N] = torch.arange(N, device=device) <= anchor_BS[:, :, None]
    allowed[:, N:, N:] = (region_BS[:, :, None] == region_BS[:, None, :]) & causal_TT[N:, N:]
    return allowed


def suffix_regions(
    clean_BN: Tensor, lengths_B: Tensor, regions: Regions, *, k_max: int, mask_token_id: int, pad_token_id: int
) -> Layout:
    """Append one right-padded row per region to the B clean rows.

    All rows use ordinary causal attention, so recurrent layers can read them too. Rows 0..B-1 are the clean texts, at which
    position 1 of every block is read. Row B + b*R + r is region r of text b.
    """
    B, N = clean_BN.shape
    R = regions.anchor_BR.shape[1]
    device = clean_BN.device
    anchor_BR, size_BR = regions.anchor_BR.to(device), regions.size_BR.to(device)
    end_BR = anchor_BR + size_BR.clamp(min=1)  # length of a region's row; the row of a missing region holds a prefix only
    T = max(N, int(end_BR.max()))
    column_T = torch.arange(T, device=device)
    text_BT = torch.nn.functional.pad(clean_BN, (0, T - N), value=pad_token_id)
    is_slot_BRT = (column_T > anchor_BR[..., None]) & (column_T < end_BR[..., None])
    region_BRT = torch.where(is_slot_BRT, mask_token_id, text_BT[:, None])
    region_BRT = region_BRT.masked_fill(column_T >= end_BR[..., None], pad_token_id)
    ids_XT = torch.cat([text_BT, region_BRT.reshape(B * R, T)])
    used_X = torch.cat([lengths_B.to(device), end_BR.reshape(-1)])

    drawn_BRK = drawn_positions(size_BR, k_max)
    region_row_BR1 = B + torch.arange(B * R, device=device).view(B, R, 1)
    slot_BRK = region_row_BR1 * T + anchor_BR[..., None] + torch.arange(k_max, device=device)
    first_BR1 = (torch.arange(B, device=device)[:, None] * T + anchor_BR)[..., None]
    read_BRK = torch.cat([first_BR1, slot_BRK[..., 1:]], 2).masked_fill(~drawn_BRK, 0)
    positions_XT = column_T.expand(B + B * R, T)
    return Layout(ids_XT, positions_XT, None, column_T < used_X[:, None], read_BRK, drawn_BRK, N)


def student_forced_ids(layout: Layout, rollout_BRK: Tensor) -> Tensor:
    """Return the teacher's input: slot s of every region holds the student's token y'_s instead of the mask."""
    into = layout.drawn_BRK[..., 1:]
    ids = layout.ids_XT.clone()
    ids.view(-1)[layout.read_BRK[..., 1:][into]] = rollout_BRK[..., :-1][into]
    return ids
