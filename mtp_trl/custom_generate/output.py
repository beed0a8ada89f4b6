"""Output of `generate`: tokens and, on request, forward passes and scores."""

# Shapes: A rows not finished, B rows of the batch, L columns of the text, P positions read, V vocabulary

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.cache_utils import Cache
from transformers.generation import GenerateDecoderOnlyOutput

from .probes import CACHE_NAMES
from .rows import Row, Text


@dataclass
class MTPGenerateOutput(GenerateDecoderOnlyOutput):
    """Output of `generate(..., return_dict_in_generate=True)`.

    Example:
        >>> output = model.generate(**inputs, confadapt=0.9, return_dict_in_generate=True)
        >>> tokenizer.batch_decode(output.sequences), output.acceleration

    Attributes:
        sequences: prompt and generated tokens, int64 [B, L], padded with pad_token_id after the end of each row.
        block_lengths: for each row, the number of tokens that each forward pass added, EOS included. A pass that only
            advances recurrent states adds 0.
        forward_passes: for each row, the number of forward passes until it finished, the prefill included, int64 [B].
        acceleration: generated tokens per forward pass: the ratio of their sums over all rows.
        scores: with `output_scores`, the scores from which each generated token was chosen: logits after all processors,
            float32 [B, V] per token, with the barred ids at -inf. After the end of a row, the pad token has 0 and all other
            tokens have -inf.
        logits: with `output_logits`, the logits before all processors, in the same format.
        past_key_values: the cache that was passed in, which now holds the columns that are cached in all rows; else None.
            Since transformers 5.24 it is called `cache`.
    """

    block_lengths: list[list[int]] | None = None
    forward_passes: Tensor | None = None
    acceleration: float | None = None


class Scores:
    """Collects the scores and logits of the generated tokens for `output_scores` and `output_logits`."""

    def __init__(self, config: GenerationConfig, rows: list[Row]) -> None:
        enabled = bool(config.return_dict_in_generate)
        self.scores: list[list[Tensor]] | None = [[] for _ in rows] if enabled and config.output_scores else None
        self.logits: list[list[Tensor]] | None = [[] for _ in rows] if enabled and config.output_logits else None

    def record(self, row: Row, logits_APV: Tensor, scores_APV: Tensor, member: int, *, first: int, count: int) -> None:
        """Record `count` new tokens of the row at index `member` of the batch, chosen at the positions from `first` on."""
        for kept, source in ((self.logits, logits_APV), (self.scores, scores_APV)):
            if kept is not None:
                kept[row.index] += source[member, first : first + count].to(torch.float32, copy=True).unbind(0)

    def by_token(self, kept: list[list[Tensor]] | None, *, pad: int) -> tuple[Tensor, ...] | None:
        """Return one [B, V] for each generated token."""
        if kept is None:
            return None
        after_end = torch.full_like(kept[0][0], -torch.inf)
        after_end[pad] = 0
        return tuple(torch.stack(column) for column in itertools.zip_longest(*kept, fillvalue=after_end))


def output_of(rows: list[Row], text: Text, scores: Scores, past: Cache | None) -> MTPGenerateOutput:
    """Build the output of a call with `return_dict_in_generate=True`."""
    passes = [len(row.block_lengths) for row in rows]
    return MTPGenerateOutput(
        sequences=text.tensor(),
        block_lengths=[row.block_lengths for row in rows],
        forward_passes=torch.tensor(passes),
        acceleration=sum(sum(row.block_lengths) for row in rows) / sum(passes),
        scores=scores.by_token(scores.scores, pad=text.pad),
        logits=scores.by_token(scores.logits, pad=text.pad),
        **{CACHE_NAMES[0]: past},
    )
