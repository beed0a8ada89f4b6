"""The statistics agree with NumPy and with counts by hand."""

import math

import numpy as np
import pytest

from mtp_trl.evaluation.statistics import mean_with_error, paired_difference, ratio_of_sums, share_identical
from mtp_trl.publishing.report import Estimate


def test_mean_and_error_equal_numpy():
    values = np.random.default_rng(0).random(57).tolist()
    estimate = mean_with_error(values)
    assert estimate.value == pytest.approx(np.mean(values), abs=1e-12)
    assert estimate.standard_error == pytest.approx(np.std(values, ddof=1) / math.sqrt(57), abs=1e-12)


def test_error_of_a_share_is_the_binomial_one():
    correct = [1.0] * 30 + [0.0] * 10
    assert mean_with_error(correct).standard_error == pytest.approx(math.sqrt(0.75 * 0.25 / 39))


def test_one_value_has_no_error():
    estimate = mean_with_error([0.5])
    assert estimate.value == 0.5
    assert math.isnan(estimate.standard_error)


def test_no_values_are_refused():
    with pytest.raises(ValueError, match="at least one"):
        mean_with_error([])


def test_paired_error_is_that_of_the_differences():
    """Two decodings disagree on 3 of 100 problems: 2 lost, 1 gained."""
    reference = [1.0] * 70 + [0.0] * 30
    values = reference.copy()
    values[0] = values[1] = 0.0
    values[99] = 1.0
    difference = paired_difference(values, reference)
    by_hand = [v - r for v, r in zip(values, reference, strict=True)]
    assert difference.value == pytest.approx(-0.01)
    assert difference.standard_error == pytest.approx(np.std(by_hand, ddof=1) / 10)
    # Pairing makes the error far smaller than that of two unpaired samples.
    assert difference.standard_error < 0.5 * mean_with_error(reference).standard_error


def test_identical_samples_differ_by_exactly_zero():
    assert paired_difference([1.0, 0.0, 1.0], [1.0, 0.0, 1.0]) == Estimate(0.0, 0.0)


def test_paired_samples_must_have_the_same_length():
    with pytest.raises(ValueError, match="longer"):
        paired_difference([1.0], [1.0, 0.0])


def test_share_identical_counts_whole_sequences():
    reference = [[1, 2, 3], [4, 5], [6]]
    assert share_identical([[1, 2, 3], [4], [7]], reference) == pytest.approx(1 / 3)
    assert share_identical(reference, reference) == 1.0


def test_tokens_per_pass_is_the_ratio_of_sums_not_the_mean_of_ratios():
    assert ratio_of_sums([10, 90], [10, 30]) == 2.5
    with pytest.raises(ValueError, match="more than 0"):
        ratio_of_sums([1], [0])
