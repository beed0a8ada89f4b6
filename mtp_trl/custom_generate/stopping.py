"""Stopping criteria of a row: EOS tokens, the maximum length, stop strings and all other criteria."""

# Shapes: B rows of the batch, L columns of the text

from __future__ import annotations

from typing import Any

from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    MaxLengthCriteria,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
    StopStringCriteria,
)

from .rows import Row, Text


class Stops:
    """EOS ids and the maximum length, taken from transformers' criteria. The other criteria run after every new token."""

    def __init__(self, criteria: StoppingCriteriaList) -> None:
        eos = [criterion.eos_token_id.tolist() for criterion in criteria if type(criterion) is EosTokenCriteria]
        self.eos = frozenset(token for ids in eos for token in ids)
        self.max_length: int = min(c.max_length for c in criteria if type(c) is MaxLengthCriteria)
        known = (EosTokenCriteria, MaxLengthCriteria)
        self.others = StoppingCriteriaList(c for c in criteria if type(c) not in known)

    def __call__(self, alive: list[Row], text: Text) -> None:
        """Cut each row after the first new token at which another criterion holds.

        A criterion gets the columns that it would get at one token per pass, and runs once for each width of the text.
        """
        if not self.others:
            return
        history_BL = text.tensor()
        reached: dict[int, list[tuple[Row, int]]] = {}
        for row in alive:
            for length in range(row.emitted + 1, len(row.tokens) + 1):
                reached.setdefault(text.width(row, length), []).append((row, length))
        for width in sorted(reached):
            not_cut = [(row, length) for row, length in reached[width] if length <= len(row.tokens)]
            if not_cut:
                stops = self.others(history_BL[:, :width], None).tolist()
                for row, length in not_cut:
                    if stops[row.index]:
                        row.stop_at(length)


def with_stop_strings(
    criteria: StoppingCriteriaList | None,
    kwargs: dict[str, Any],
    generation_config: GenerationConfig | None,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
) -> StoppingCriteriaList:
    """Return the criteria with an additional one for `stop_strings`, which is removed from `kwargs`.

    transformers passes no tokenizer to a custom loop, and would raise an error for stop strings.
    """
    configs = [config for config in (generation_config, model.generation_config) if config is not None]
    candidates = [kwargs.get("stop_strings"), *(config.stop_strings for config in configs)]
    stop_strings = next((strings for strings in candidates if strings is not None), None)
    kwargs["stop_strings"] = None
    criteria = StoppingCriteriaList(criteria or [])
    if stop_strings is not None:
        if tokenizer is None:
            raise ValueError(f"stop_strings={stop_strings!r} needs the tokenizer; pass tokenizer= to generate.")
        criteria.append(StopStringCriteria(tokenizer, stop_strings))
    return criteria
