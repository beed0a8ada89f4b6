"""Statistics for comparing decodings. Pure functions of numbers and token ids; no model, no I/O."""

import math
from collections.abc import Sequence

from ..publishing.report import Estimate


def mean_with_error(values: Sequence[float]) -> Estimate:
    """Return the sample mean and its standard error sqrt(s^2 / n), with the n - 1 variance. The error of one value is NaN.

    Raises:
        ValueError: there are no values.
    """
    n = len(values)
    if n == 0:
        raise ValueError("A mean needs at least one value, got none; evaluate at least one problem.")
    mean = math.fsum(values) / n
    if n == 1:
        return Estimate(mean, math.nan)
    variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
    return Estimate(mean, math.sqrt(variance / n))


def paired_difference(values: Sequence[float], reference: Sequence[float]) -> Estimate:
    """Return the mean of value - reference over the same problems, with the standard error of the paired differences.

    Two decodings of the same problems are strongly correlated, so this error is far below that of two separate samples.

    Raises:
        ValueError: the lengths differ.
    """
    return mean_with_error([value - other for value, other in zip(values, reference, strict=True)])


def share_identical(sequences: Sequence[Sequence[int]], reference: Sequence[Sequence[int]]) -> float:
    """Return the share of problems whose token ids are exactly those of the reference."""
    pairs = zip(sequences, reference, strict=True)
    return mean_with_error([float(list(ids) == list(other)) for ids, other in pairs]).value


def ratio_of_sums(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Return sum(numerators) / sum(denominators), e.g. tokens per pass or per second over problems of different lengths.

    Raises:
        ValueError: the sum of the denominators is not above 0.
    """
    total = math.fsum(denominators)
    if total <= 0:
        raise ValueError(f"The denominators must sum to more than 0, got {total}.")
    return math.fsum(numerators) / total
