"""From the logits of a step to the next drafts. Pure tensors: no vLLM, no model, no requests."""

# Shapes: B rows of the batch, F tokens of all requests in a step of vLLM,
# J tokens that the sampler of vLLM returns at most for a request, K positions of a block, P positions read, V vocabulary,
# W drafts and masks that vLLM schedules for a request

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...custom_generate.choice import accept_confident_prefix

PLACEHOLDER = -1  # vLLM's: no token
_ELEMENTS_AT_ONCE = 2**26  # of logits in float32: what is held at once does not grow with the batch


@dataclass(frozen=True)
class Scheduled:
    """What vLLM scheduled for each request: `real` drafts, then `masks` masks, and where its rows of logits begin.

    `drafts_F` may hold other tokens between the requests' drafts.
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
        """From the flat drafts, where each request's part of them begins and ends, and where its part of the rows begins.

        Masks come last and are nobody's draft, so they are told by their id. vLLM may have cut a request's drafts, or put
        others in their place; then there are fewer masks, or none.
        """
        masks_before = nn.functional.pad((drafts_F == mask_token_id).cumsum(0), (1, 0))
        masks_B = masks_before[ends_B] - masks_before[first_draft_B]
        return cls(drafts_F, first_draft_B, first_row_B, ends_B - first_draft_B - masks_B, masks_B)

    def longest(self, width: int) -> Tensor:
        """Drafts and masks of each request, int64 [B, width]; behind its own, anything."""
        positions = torch.arange(width, device=self.drafts_F.device)
        return self.drafts_F[(self.first_draft_B[:, None] + positions).clamp(max=len(self.drafts_F) - 1)].long()


@dataclass(frozen=True)
class Blocks:
    """Predictions behind each request's drafts: at the last of them and at the masks."""

    tokens_BK: Tensor  # the most probable ones
    rows_BK: Tensor  # of the logits
    normalisers_BK: Tensor  # logsumexp, float32
    read_BK: Tensor  # whether there is such a place


def read_blocks(logits_PV: Tensor, scheduled: Scheduled, *, k: int) -> Blocks:
    """The blocks of all requests, from their rows alone: what stands before a block is not looked at."""
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
    """The sampler's output, with the drafts of `unverified` requests taken as they are, and the block's first token behind.

    Only drafts with a mask behind them are surely ours and whole: others stay verified.
    """
    position_J = torch.arange(output_BJ.shape[1], device=output_BJ.device)
    real_B1 = scheduled.real_B[:, None]
    taken_BJ = torch.where(position_J < real_B1, scheduled.longest(output_BJ.shape[1]), blocks.tokens_BK[:, :1])
    taken_BJ = torch.where(position_J <= real_B1, taken_BJ, PLACEHOLDER).to(output_BJ.dtype)
    return torch.where((unverified_B & (scheduled.masks_B > 0))[:, None], taken_BJ, output_BJ)


def next_drafts(
    logits_PV: Tensor, output_BJ: Tensor, scheduled: Scheduled, blocks: Blocks, *, threshold: float | Tensor, vocabulary: int
) -> Tensor:
    """How many drafts each request has next, and the drafts: int64 [B, 1 + K - 1].

    None where a draft was rejected: the block was computed behind a text that is not. Otherwise the block goes on behind
    its first token, which has been emitted, as far as every probability, the emitted token's included, reaches `threshold`
    (a number, or float [B, K]).
    """
    emitted_BJ = (output_BJ != PLACEHOLDER) & (output_BJ < vocabulary)
    whole_B = (emitted_BJ.sum(1) == scheduled.real_B + 1) & (scheduled.masks_B > 0)
    last_B = output_BJ.gather(1, scheduled.real_B[:, None].clamp(max=output_BJ.shape[1] - 1)).long().clamp(min=0)
    tokens_BK = torch.cat([last_B, blocks.tokens_BK[:, 1:]], 1)
    probs_BK = (logits_PV[blocks.rows_BK, tokens_BK].float() - blocks.normalisers_BK).exp()
    accepted_B = accept_confident_prefix(probs_BK.where(blocks.read_BK, -1.0) - threshold, threshold=0.0)
    return torch.cat([((accepted_B - 1) * whole_B)[:, None], tokens_BK[:, 1:]], 1)


def proposals(drafts: list[list[int]], *, mask_token_id: int, masks: list[int], width: int, fill: bool) -> list[list[int]]:
    """`[drafts | masks]` of each request, at most `width` of both: rows of `next_drafts` and each request's masks.

    With `fill` a request that has masks gets as many as the width takes: the same length in every step.
    """
    rows = []
    for (count, *tokens), wanted in zip(drafts, masks, strict=True):
        real = tokens[: min(count, wanted, width)]
        room = width - len(real)
        rows.append(real + [mask_token_id] * (room if fill and wanted else min(wanted, room)))
    return rows


def canvases(drafts_BK: Tensor, *, masks_B: Tensor, mask_token_id: int, width: int) -> Tensor:
    """`proposals` with `fill`, without leaving the device: int64 [B, width], masks alone for requests that have none."""
    count_B1 = drafts_BK[:, :1].minimum(masks_B[:, None])
    room = max(0, width - (drafts_BK.shape[1] - 1))
    tokens_BW = nn.functional.pad(drafts_BK[:, 1:], (0, room), value=mask_token_id)[:, :width]
    return tokens_BW.where(torch.arange(width, device=drafts_BK.device) < count_B1, mask_token_id)
