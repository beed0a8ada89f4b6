"""Compute the next drafts from the logits of a step. Pure tensor functions: no vLLM, no model, no requests."""

# Shapes: B rows of the batch, F tokens of all requests in a step of vLLM,
# J tokens that the sampler of vLLM returns at most for a request, K positions of a block, P positions read, V vocabulary,
# W drafts and masks that vLLM schedules for a request

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...custom_generate.choice import accept_confident_prefix

PLACEHOLDER = -1  # vLLM's marker for "no token"
_ELEMENTS_AT_ONCE = 2**26  # logits converted to float32 at a time, so that peak memory does not grow with the batch


@dataclass(frozen=True)
class Scheduled:
    """The drafts and masks that vLLM scheduled for each request.

    Attributes:
        drafts_F: drafts, then masks, of one request after the other. Other tokens may separate the requests.
        first_draft_B: index of each request's first entry in `drafts_F`.
        first_row_B: index of each request's first row of logits.
        real_B: number of drafts of each request, without masks.
        masks_B: number of masks of each request.
    """

    drafts_F: Tensor
    first_draft_B: Tensor
    first_row_B: Tensor
    real_B: Tensor
    masks_B: Tensor

    @classmethod
    def of(
        cls, drafts_F: Tensor, first_draft_B: Tensor, ends_B: Tensor, first_row_B: Tensor, *, mask_token_id: int
    ) -> Scheduled:
        """Count the drafts and masks of each request, given where its entries begin and end and where its logits begin.

        The mask token is never a draft, so its id identifies the masks, which come last. vLLM may truncate or replace what a
        request proposed; then it has fewer masks, or none.
        """
        masks_before = nn.functional.pad((drafts_F == mask_token_id).cumsum(0), (1, 0))
        masks_B = masks_before[ends_B] - masks_before[first_draft_B]
        return cls(drafts_F, first_draft_B, first_row_B, ends_B - first_draft_B - masks_B, masks_B)

    def longest(self, width: int) -> Tensor:
        """Return the drafts and masks of each request, int64 [B, width]. Entries beyond its last mask are arbitrary."""
        positions = torch.arange(width, device=self.drafts_F.device)
        return self.drafts_F[(self.first_draft_B[:, None] + positions).clamp(max=len(self.drafts_F) - 1)].long()


@dataclass(frozen=True)
class Blocks:
    """The block predicted for each request, at its last draft (or last token) and at its masks."""

    tokens_BK: Tensor  # most probable tokens
    rows_BK: Tensor  # row of the logits that predicts each position
    normalisers_BK: Tensor  # logsumexp of that row, float32
    read_BK: Tensor  # whether the position exists: a block has one position more than the request has masks


def read_blocks(logits_PV: Tensor, scheduled: Scheduled, *, k: int) -> Blocks:
    """Read the blocks of all requests. Logits before a block, which verify the drafts, are not read."""
    position_K = torch.arange(k, device=logits_PV.device)
    read_BK = position_K <= scheduled.masks_B[:, None]
    rows_BK = scheduled.first_row_B[:, None] + scheduled.real_B[:, None] + position_K.minimum(scheduled.masks_B[:, None])
    tokens, normalisers = [], []
    for rows in rows_BK.flatten().split(max(1, _ELEMENTS_AT_ONCE // logits_PV.shape[-1])):
        part = logits_PV[rows].float()
        tokens.append(part.argmax(-1))
        normalisers.append(part.logsumexp(-1))
    return Blocks(torch.cat(tokens).view_as(rows_BK), rows_BK, torch.cat(normalisers).view_as(rows_BK), read_BK)


def accept_all(output_BJ: Tensor, scheduled: Scheduled, blocks: Blocks, unverified_B: Tensor) -> Tensor:
    """Return the sampler's output, with all drafts of unverified requests accepted and followed by the block's first token.

    A request without masks keeps the verified output, because vLLM may have truncated or replaced its drafts.
    """
    position_J = torch.arange(output_BJ.shape[1], device=output_BJ.device)
    real_B1 = scheduled.real_B[:, None]
    emitted_BJ = torch.where(position_J < real_B1, scheduled.longest(output_BJ.shape[1]), blocks.tokens_BK[:, :1])
    emitted_BJ = torch.where(position_J <= real_B1, emitted_BJ, PLACEHOLDER).to(output_BJ.dtype)
    return torch.where((unverified_B & (scheduled.masks_B > 0))[:, None], emitted_BJ, output_BJ)


def next_drafts(
    logits_PV: Tensor, output_BJ: Tensor, scheduled: Scheduled, blocks: Blocks, *, threshold: float | Tensor, vocabulary: int
) -> Tensor:
    """Return the number of next drafts of each request, followed by the drafts: int64 [B, 1 + K - 1].

    A request has no next drafts if one of its drafts was rejected, because the block was predicted after that draft.
    Otherwise the emitted token takes the first position of the block. The tokens after it become drafts, as long as every
    probability so far, including that of the emitted token, reaches the threshold.

    Args:
        threshold: a number, or float [B, K].
        vocabulary: number of token ids; larger ids in `output_BJ` are not tokens.
    """
    emitted_BJ = (output_BJ != PLACEHOLDER) & (output_BJ < vocabulary)
    confirmed_B = (emitted_BJ.sum(1) == scheduled.real_B + 1) & (scheduled.masks_B > 0)
    last_B = output_BJ.gather(1, scheduled.real_B[:, None].clamp(max=output_BJ.shape[1] - 1)).long().clamp(min=0)
    tokens_BK = torch.cat([last_B, blocks.tokens_BK[:, 1:]], 1)
    probs_BK = (logits_PV[blocks.rows_BK, tokens_BK].float() - blocks.normalisers_BK).exp()
    accepted_B = accept_confident_prefix(probs_BK.where(blocks.read_BK, -1.0) - threshold, threshold=0.0)
    return torch.cat([((accepted_B - 1) * confirmed_B)[:, None], tokens_BK[:, 1:]], 1)


def proposals(drafts: list[list[int]], *, mask_token_id: int, masks: list[int], width: int, fill: bool) -> list[list[int]]:
    """Return `[drafts | masks]` of each request, at most `width` tokens together.

    Args:
        drafts: `next_drafts` of each request.
        masks: number of masks of each request, which also limits its drafts.
        fill: pad each request that has masks with more masks, so that it has `width` tokens in every step.
    """
    rows = []
    for (count, *tokens), limit in zip(drafts, masks, strict=True):
        real = tokens[: min(count, limit, width)]
        remaining = width - len(real)
        rows.append(real + [mask_token_id] * (remaining if fill and limit else min(limit, remaining)))
    return rows


def canvases(drafts_BK: Tensor, *, masks_B: Tensor, mask_token_id: int, width: int) -> Tensor:
    """Return `proposals` with `fill`, computed on the device: int64 [B, width].

    Requests with `masks_B` 0 get only masks, since a canvas cannot be empty.
    """
    count_B1 = drafts_BK[:, :1].minimum(masks_B[:, None])
    padding = max(0, width - (drafts_BK.shape[1] - 1))
    tokens_BW = nn.functional.pad(drafts_BK[:, 1:], (0, padding), value=mask_token_id)[:, :width]
    return tokens_BW.where(torch.arange(width, device=drafts_BK.device) < count_B1, mask_token_id)
