"""Metrics of multi-token decoding for the `evaluate` library."""

from __future__ import annotations

from typing import Any

import evaluate
from datasets import Features, Sequence, Value

from .statistics import mean_with_error, ratio_of_sums
from .tasks import result

_CITATION = "Kirchenbauer et al., Multi-Token Prediction via Self-Distillation, arXiv 2602.06019, 2026."


class _Metric(evaluate.Metric):
    """A metric whose docstring is its description and whose `_FEATURES` are its inputs."""

    _FEATURES: dict[str, Any]

    def _info(self) -> evaluate.MetricInfo:
        description = (self.__doc__ or "").strip()
        return evaluate.MetricInfo(
            description=description, citation=_CITATION, inputs_description=description, features=Features(self._FEATURES)
        )


class Acceleration(_Metric):
    """Tokens per forward pass, as a ratio of sums. Predictions are the `block_lengths` of `MTPGenerateOutput`."""

    _FEATURES = {"predictions": Sequence(Value("int64"))}

    def _compute(self, predictions: list[list[int]]) -> dict[str, float]:
        return {"acceleration": ratio_of_sums([sum(row) for row in predictions], [len(row) for row in predictions])}


class BlockAgreement(_Metric):
    """Share of tokens before the first difference, and share of answers without any difference.

    Predictions are the token ids of a block or an answer, references those of the model's own single-token decoding.
    """

    _FEATURES = {"predictions": Sequence(Value("int64")), "references": Sequence(Value("int64"))}

    def _compute(self, predictions: list[list[int]], references: list[list[int]]) -> dict[str, float]:
        agreed, lengths, same = [], [], []
        for ids, reference in zip(predictions, references, strict=True):
            differing = (i for i, pair in enumerate(zip(ids, reference, strict=False)) if pair[0] != pair[1])
            agreed.append(next(differing, min(len(ids), len(reference))))
            lengths.append(max(len(ids), len(reference)))
            same.append(float(list(ids) == list(reference)))
        return {"block_agreement": ratio_of_sums(agreed, lengths), "identical": mean_with_error(same).value}


class FinalAnswer(_Metric):
    """Share of texts whose first `#### number` equals that of the reference, as in GSM8K, with its standard error."""

    _FEATURES = {"predictions": Value("string"), "references": Value("string")}

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        scores = []
        for text, reference in zip(predictions, references, strict=True):
            expected = result(reference) or reference.strip().replace(",", "")
            scores.append(float(result(text) == expected))
        estimate = mean_with_error(scores)
        return {"final_answer": estimate.value, "standard_error": estimate.standard_error}
