"""What `generate` returns: tokens, and on request the passes they took and the scores they were chosen from."""

# Shapes: A rows not finished, B rows of the batch, L columns of the text, P positions read, V vocabulary

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput

from .rows import Row, Text


@dataclass
class MTPGenerateOutput(ModelOutput):
    """What `generate(..., return_dict_in_generate=True)` returns.

    Example:
        >>> output = model.generate(**inputs, confadapt=0.9, return_dict_in_generate=True)
        >>> tokenizer.batch_decode(output.sequences), output.acceleration

    Attributes:
        sequences: prompt and generated tokens, filled up with pad_token_id after each row's end, int64 [B, L].
        block_lengths: of each row, the tokens that each forward pass gave: together its generated tokens, EOS counted; 0 for
            a pass that only advanced recurrent states.
        forward_passes: of each row, the passes while it was alive, the prefill counted, int64 [B].
        acceleration: generated tokens per forward pass, the ratio of the sums over rows.
        scores: with `output_scores`, of each generated token what it was chosen from: logits after the processors, float32
            [B, V] each, the barred ids at -inf. After a row's end the pad token has 0 and all others -inf.
        logits: with `output_logits`, the same before any processor.
        past_key_values: the cache handed in, which now holds the columns that are cached in all rows; None without one.
    """

    sequences: Tensor | None = None
    block_lengths: list[list[int]] | None = None
    forward_passes: Tensor | None = None
    acceleration: float | None = None
    scores: tuple[Tensor, ...] | None = None
    logits: tuple[Tensor, ...] | None = None
    past_key_values: Cache | None = None


class Scores:
    """What every generated token was chosen from, for `output_scores` and `output_logits`."""

    def __init__(self, config: GenerationConfig, rows: list[Row]) -> None:
        asked = bool(config.return_dict_in_generate)
        self.scores: list[list[Tensor]] | None = [[] for _ in rows] if asked and config.output_scores else None
        self.logits: list[list[Tensor]] | None = [[] for _ in rows] if asked and config.output_logits else None

    def record(self, row: Row, logits_APV: Tensor, scores_APV: Tensor, member: int, *, first: int, count: int) -> None:
        """`count` new tokens of a row, which were chosen at the positions from `first` on."""
        for kept, source in ((self.logits, logits_APV), (self.scores, scores_APV)):
            if kept is not None:
                kept[row.index] += source[member, first : first + count].to(torch.float32, copy=True).unbind(0)

    def by_token(self, kept: list[list[Tensor]] | None, *, pad: int) -> tuple[Tensor, ...] | None:
        """[B, V] of each generated token."""
        if kept is None:
            return None
        ended = torch.full_like(kept[0][0], -torch.inf)
        ended[pad] = 0
        return tuple(torch.stack(column) for column in itertools.zip_longest(*kept, fillvalue=ended))


def output_of(rows: list[Row], text: Text, scores: Scores, past: Cache | None) -> MTPGenerateOutput:
    """Everything that a call can return."""
    passes = [len(row.block_lengths) for row in rows]
    return MTPGenerateOutput(
        sequences=text.tensor(),
        block_lengths=[row.block_lengths for row in rows],
        forward_passes=torch.tensor(passes),
        acceleration=sum(sum(row.block_lengths) for row in rows) / sum(passes),
        scores=scores.by_token(scores.scores, pad=text.pad),
        logits=scores.by_token(scores.logits, pad=text.pad),
        past_key_values=past,
    )
