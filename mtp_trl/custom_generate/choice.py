"""From logits to tokens: apply logits processors, choose a token at every position, and accept a prefix of each block."""

# Shapes: A rows not finished, B rows of the batch, E blocks of masks in a row, K positions of a block, L columns of the text,
# P positions read, V vocabulary

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from .mtp_config import thresholds_by_position
from .rows import Row, Text
from .sampling import draw
from .settings import Settings

# Processors that read only the scores of one position, so that one call can process all positions of all rows.
POINTWISE = (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    MinPLogitsWarper,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)


def accept_confident_prefix(probs_BK: Tensor, *, threshold: float | Tensor) -> Tensor:
    """Return how many tokens of each block to accept, int64 [B]: the longest prefix that reaches the threshold, at least 1.

    Args:
        probs_BK: probability of each token of the blocks.
        threshold: one threshold, or float [K] with one for each position of a block.
    """
    return (probs_BK >= threshold).long().cumprod(-1).sum(-1).clamp(min=1)


class ConfAdaptLogitsProcessor(LogitsProcessor):
    """Bar the ids that are never emitted, and record the scores that give each token's confidence for acceptance.

    It runs before all other processors, on every position of a block. Scores are [B, V] (one position) or [B, P, V].

    Attributes:
        scores: scores of the last call, float32, with the barred ids at -inf, before temperature and all other processors.
    """

    scores: Tensor

    def __init__(self, barred_token_ids: Sequence[int]) -> None:
        self.barred = torch.tensor(list(barred_token_ids), dtype=torch.long)

    def __call__(self, input_ids: Tensor | None, scores: Tensor) -> Tensor:
        """Return the scores in float32 with the barred ids at -inf."""
        self.barred = self.barred.to(scores.device)
        self.scores = scores.float().index_fill(-1, self.barred, -torch.inf)
        return self.scores.clone()  # later processors may write in place

    def confidence(self, tokens: Tensor, where: Any = ...) -> Tensor:
        """Return the probability of the given tokens; `where` indexes the leading dimensions of the recorded scores."""
        return self.scores[where].softmax(-1).gather(-1, tokens[..., None])[..., 0]


class Chosen(NamedTuple):
    """Tokens that a step chose for one row.

    Attributes:
        next_tokens: `next_tokens[i]` is the token chosen after the first i drafts, predicted at a pending token.
        blocks: `blocks[i]` holds the accepted tokens after `next_tokens[i]`, predicted at masks.
    """

    next_tokens: list[int]
    blocks: dict[int, list[int]]


class Choice:
    """Chooses a token at every position read, and accepts a prefix of each block.

    Attributes:
        settings: the call's settings, with a single block of masks if a logits processor reads the text.
        scores_APV: logits of the last call after all processors.
    """

    scores_APV: Tensor

    def __init__(self, settings: Settings, processors: LogitsProcessorList, text: Text, *, sampling: bool) -> None:
        thresholds = thresholds_by_position(settings.thresholds, settings.k)
        self.thresholds_K = torch.tensor(thresholds, dtype=torch.float32, device=text.input_ids.device)
        self.reads_confidence = any(settings.thresholds)
        # When sampling, verified decoding draws every token. Unverified decoding draws only in blocks of one token, and takes
        # the argmax in longer blocks.
        self.draw_all = sampling and settings.verify
        self.draw_single = sampling and not settings.verify
        self.confadapt = ConfAdaptLogitsProcessor(settings.barred_token_ids)
        self.processors = list(processors)
        self.at_once = all(type(processor) in POINTWISE for processor in self.processors)
        self.settings = settings if self.at_once else replace(settings, blocks=1)  # several blocks follow different texts
        self.text = text

    def __call__(self, logits_APV: Tensor, alive: list[Row], k: int, blocks: int, *, masks: int) -> Iterator[Chosen]:
        """Yield the choice of each row. The last `masks` positions are masks, the others are pending tokens.

        `k` and `blocks` are those of the step (see `Forward`).
        """
        A, P, _ = logits_APV.shape
        pending, E = P - masks, masks // (k - 1) if masks else 1
        points = [row.rejection_points(blocks) for row in alive]
        choose = self._all_positions if self.at_once else self._left_to_right
        chosen_AP, probs_AP, self.scores_APV = choose(logits_APV, alive, pending, points, k)
        columns = [chosen_AP]
        if probs_AP is not None:
            probs_AEK = self._probabilities_by_block(probs_AP, alive, points, pending=pending, E=E, k=k)
            accepted_AE = accept_confident_prefix(probs_AEK.flatten(0, 1), threshold=self.thresholds_K[:k]).view(A, E)
            columns.append(accepted_AE)
        if self.draw_single:
            columns.append(draw(self.scores_APV[:, pending - 1], alive, [row.end for row in alive])[:, None])
        # The step's only device synchronisation.
        host = torch.cat(columns, 1).tolist() if len(columns) > 1 else chosen_AP.tolist()
        for row, row_points, values in zip(alive, points, host, strict=True):
            lengths = [k] * E if probs_AP is None else values[P : P + E]
            yield self._chosen(row, row_points, values, lengths, pending=pending, k=k)

    def _chosen(self, row: Row, points: range, values: list[int], lengths: list[int], *, pending: int, k: int) -> Chosen:
        chosen = values[pending - 1 - len(row.drafts) : pending]
        remaining = row.limit - len(row.tokens)
        blocks = {}
        for block, point in enumerate(points):
            start = pending + block * (k - 1)
            blocks[point] = values[start : start + min(lengths[block], remaining) - 1]
        if self.draw_single and not blocks[0]:
            chosen[0] = values[-1]
        return Chosen(chosen, blocks)

    def _probabilities_by_block(
        self, probs_AP: Tensor, alive: list[Row], points: list[range], *, pending: int, E: int, k: int
    ) -> Tensor:
        """Return probabilities [A, E, K] of the tokens of each block. Its first token is predicted at a pending token."""
        if E == 1:
            return probs_AP[:, None, -k:]
        first = [
            [pending - 1 - len(r.drafts) + point for point in _padded_points(p, E)] for r, p in zip(alive, points, strict=True)
        ]
        first_AE = probs_AP.gather(1, torch.tensor(first, device=probs_AP.device))
        return torch.cat([first_AE[..., None], probs_AP[:, pending:].view(len(alive), E, k - 1)], -1)

    def _all_positions(
        self, logits_APV: Tensor, alive: list[Row], pending: int, points: list[range], k: int
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Process all positions at once. Return tokens, their probabilities (None if unused) and scores."""
        scores_APV = self.confadapt(None, logits_APV)
        for processor in self.processors:
            scores_APV = processor(None, scores_APV.flatten(0, 1)).view_as(scores_APV)
        E = (scores_APV.shape[1] - pending) // max(k - 1, 1)
        if self.draw_all:
            positions = [
                [row.end - pending + 1 + i for i in range(pending)]
                + [len(row.tokens) + point + i for point in _padded_points(row_points, E) for i in range(1, k)]
                for row, row_points in zip(alive, points, strict=True)
            ]
            chosen_AP = draw(scores_APV, alive, positions)
        else:
            chosen_AP = scores_APV.argmax(-1)
        probs_AP = None
        if self.reads_confidence and k > 1:
            read = (slice(None), slice(0 if E > 1 else pending - 1, None))  # a single block starts at the last pending token
            probs_AP = self.confadapt.confidence(chosen_AP[read], read)
        return chosen_AP, probs_AP, scores_APV

    def _left_to_right(
        self, logits_APV: Tensor, alive: list[Row], pending: int, points: list[range], k: int
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Do the same position by position, for processors that read `input_ids`: each one gets the tokens before it."""
        chosen_AP = logits_APV.new_zeros(logits_APV.shape[:2], dtype=torch.long)
        probs_AP = torch.zeros_like(chosen_AP, dtype=torch.float32)
        scores_APV = torch.zeros_like(logits_APV, dtype=torch.float32)
        history_BL = self.text.tensor(extra_columns=k)
        for index in range(logits_APV.shape[1]):
            offset = index - pending + 1  # 0 is the first token of the block; negative offsets follow earlier drafts
            for length, members in self.text.by_length(alive, offset).items():
                rows = [alive[member] for member in members]
                indices = [row.index for row in rows]
                member_scores = self._processed(history_BL[:, :length], logits_APV[:, index], alive)[indices]
                positions = [row.end + offset for row in rows]
                picked = draw(member_scores, rows, positions) if self.draw_all else member_scores.argmax(-1)
                chosen_AP[members, index] = picked
                probs_AP[members, index] = self.confadapt.confidence(picked, indices)
                scores_APV[members, index] = member_scores
                if offset >= 0:
                    history_BL[indices, length] = picked
        return chosen_AP, probs_AP, scores_APV

    def _processed(self, history_BL: Tensor, logits_AV: Tensor, alive: list[Row]) -> Tensor:
        """Return scores [B, V] of the whole batch, since processors may index its rows. Finished rows start from zeros."""
        scores_BV = logits_AV.new_zeros((len(history_BL), logits_AV.shape[1]))
        scores_BV[[row.index for row in alive]] = logits_AV
        for processor in (self.confadapt, *self.processors):
            scores_BV = processor(history_BL, scores_BV)
        return scores_BV


def _padded_points(points: range, count: int) -> list[int]:
    """Return a row's rejection points, with the last one repeated for blocks that the row does not need."""
    return [*points, *[points[-1]] * (count - len(points))]
