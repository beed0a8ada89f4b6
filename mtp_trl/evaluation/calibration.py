"""Find the lowest threshold whose loss of accuracy stays within a bound, with a stated confidence.

Every threshold is compared with the model's own single-token answers on the same problems. Each comparison is an exact test
of the hypothesis "the threshold loses at least the bound". The thresholds are tested in an order fixed beforehand, from
strict to loose, until one test fails. The probability that any accepted threshold breaks the bound is then at most
1 - confidence, with no further correction for multiple tests (fixed-sequence testing: Maurer, Hothorn and Lehmacher, 1995;
for calibration: Angelopoulos et al., Learn then Test, arXiv 2110.01052). The guarantee rests on one assumption: future
problems come from the same distribution as the calibration set.

Thresholds by position are searched along a few shapes. A shape maps one number to the thresholds of all positions and is
fixed beforehand. Each shape gets its own sequence of tests, at an equal share of 1 - confidence (Bonferroni). The guarantee
therefore holds for any accepted thresholds, including the fastest. Choosing the shape on one half of the problems and testing
it on the other half would also be valid, but needs more problems. If nothing is lost, the number of problems needed is
proportional to log(S / a) for S shapes, where a = 1 - confidence, and to 2 log(1 / a) for two halves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..publishing.calibration_file import Counts, Measure, Step
from ..publishing.report import Threshold
from .sweep import Record

THRESHOLDS = (0.999, 0.995, 0.99, 0.98, 0.97, 0.95, 0.92, 0.9, 0.87, 0.84, 0.8, 0.7, 0.6, 0.5)
_GRID_VALUES = 200  # grid points of the nuisance parameter P(gained)

# Maps a number in [0, 1] to thresholds; a lower number gives looser thresholds.
Shape = Callable[[float], Threshold]


def even(threshold: float) -> Threshold:
    """Return the same threshold for all positions."""
    return threshold


def first_looser(threshold: float) -> Threshold:
    """Return thresholds of which the first tolerates ten times the doubt, 10 * (1 - threshold).

    The token at the first position is the model's own and is accepted at any threshold.
    """
    return (round(max(0.0, 1 - 10 * (1 - threshold)), 6), threshold)


BY_POSITION: tuple[Shape, ...] = (even, first_looser)


def calibrate(
    count: Callable[[Threshold], Counts],
    *,
    measure: Measure,
    max_drop: float,
    confidence: float,
    thresholds: Sequence[float] = THRESHOLDS,
    shapes: Sequence[Shape] = (even,),
) -> tuple[Threshold | None, list[Step]]:
    """Find the fastest threshold that satisfies the bound.

    For each shape, the thresholds are tested from strict to loose until one fails. The last threshold that passes is the
    shape's candidate. The candidate with the most tokens per pass is returned.

    Args:
        count: decodes the problems at a threshold and compares the answers; called once for each threshold tested.
        measure: `accuracy`, or `agreement` with the model's own single-token output.
        max_drop: the bound on the loss, a fraction in (0, 1).
        confidence: the probability, in (0, 1), that no accepted threshold breaks the bound.
        thresholds: numbers to test; sorted from strict to loose.
        shapes: functions from a number to thresholds by position; fixed before anything is decoded.

    Returns:
        The threshold, or None if the strictest one fails for all shapes, and all tests made.
    """
    steps, candidates = [], []
    for shape in shapes:
        last = None
        for threshold in map(shape, sorted(thresholds, reverse=True)):
            counts = count(threshold)
            p_value = loss_p_value(counts, bound=max_drop, measure=measure)
            steps.append(Step(threshold, counts, p_value, accepted=p_value <= _level(confidence, len(shapes))))
            if not steps[-1].accepted:
                break
            last = steps[-1]
        candidates += [last] if last else []
    fastest = max(candidates, key=lambda step: step.counts.tokens_per_pass, default=None)
    return None if fastest is None else fastest.threshold, steps


def compare(answers: Sequence[Record], own: Sequence[Record]) -> Counts:
    """Count the answers that a threshold loses and gains against the model's own single-token answers, `own`.

    With an answer key correctness is compared. Without one, every answer with different tokens counts as lost.
    """
    pairs = list(zip(answers, own, strict=True))
    if own[0].correct is None:
        lost, gained = sum(answer.token_ids != single.token_ids for answer, single in pairs), 0
    else:
        lost = sum(bool(single.correct and not answer.correct) for answer, single in pairs)
        gained = sum(bool(answer.correct and not single.correct) for answer, single in pairs)
    tokens, passes = sum(len(answer.token_ids) for answer in answers), sum(answer.passes for answer in answers)
    return Counts(len(pairs), lost, gained, tokens / passes)


def check_size(problems: int, *, max_drop: float, confidence: float, measure: Measure, shapes: int = 1) -> None:
    """Raise ValueError if a number is out of range, or if there are too few problems for any threshold to pass."""
    for name, value in (("max_drop", max_drop), ("confidence", confidence)):
        if not 0 < value < 1:
            raise ValueError(f"{name} must be a fraction in (0, 1), got {value}.")
    needed = problems_needed(max_drop=max_drop, confidence=confidence, measure=measure, shapes=shapes)
    if problems < needed:
        raise ValueError(
            f"{problems} different problems cannot show a loss under {max_drop:g} with {confidence:g} confidence, even if no "
            f"answer is lost: at least {needed} are needed, and two to five times as many to find a low threshold."
        )


def _level(confidence: float, shapes: int) -> float:
    return (1 - confidence) / shapes + 1e-12  # tolerance for rounding: 1 - 0.9 < 0.1


def problems_needed(*, max_drop: float, confidence: float, measure: Measure, shapes: int = 1) -> int:
    """Return the smallest number of problems with which a threshold that loses nothing passes, for a number of shapes."""
    problems = math.ceil(math.log((1 - confidence) / shapes) / math.log1p(-max_drop))
    while loss_p_value(Counts(problems, 0, 0, 1.0), bound=max_drop, measure=measure) > _level(confidence, shapes):
        problems += 1
    return problems


def loss_p_value(counts: Counts, *, bound: float, measure: Measure) -> float:
    """Return the p-value of the hypothesis that the threshold loses `bound` or more."""
    if measure == "agreement":
        from scipy.stats import binom

        return float(binom.cdf(counts.lost, counts.problems, bound))
    return net_loss_p_value(counts.lost, counts.gained, counts.problems, bound=bound)


def net_loss_p_value(lost: int, gained: int, problems: int, *, bound: float) -> float:
    """Return the p-value of the hypothesis P(lost) - P(gained) >= `bound`, by an exact unconditional test of paired answers.

    Outcomes are ordered by Tango's score statistic (Statistics in Medicine 17, 1998). The p-value is the largest
    probability, over the unknown P(gained), of an outcome at least as extreme as the observed one (Hsueh, Liu and Chen,
    Biometrics 57, 2001). The maximum is searched on a grid of P(gained), then on a finer grid around the best value. The
    result approximates the supremum from below (a relative error below 1e-5 in the cases tested) and is not certified.
    """
    from scipy.stats import binom

    all_gained = np.arange(problems + 1)
    most_lost = _most_lost(_score(lost, gained, problems, bound), all_gained, problems, bound)

    def probability(rate: Any) -> Any:
        """Return the probability of an outcome at least as extreme, if P(gained) is `rate`.

        Given the number gained, each other answer is lost with probability (bound + rate) / (1 - rate).
        """
        lost_rate = np.minimum((bound + rate) / (1 - rate), 1.0)
        return (binom.pmf(all_gained, problems, rate) * binom.cdf(most_lost, problems - all_gained, lost_rate)).sum(1)

    largest_rate = (1 - bound) / 2
    near_end = np.geomspace(1e-2 / problems, largest_rate, _GRID_VALUES)  # the maximum is often close to one of the ends
    rates = np.unique(np.concatenate([np.linspace(0.0, largest_rate, _GRID_VALUES), near_end, largest_rate - near_end]))
    best = int(probability(rates[:, None]).argmax())
    around_best = np.linspace(rates[max(best - 1, 0)], rates[min(best + 1, len(rates) - 1)], _GRID_VALUES)
    return float(probability(np.append(around_best, rates[best])[:, None]).max())


def _score(lost: Any, gained: Any, problems: int, bound: float) -> Any:
    """Return Tango's statistic: (net loss - bound) / standard error. The error assumes a net loss of exactly the bound."""
    b = -lost - gained + (2 * problems - lost + gained) * bound
    c = -gained * bound * (1 - bound)
    gained_rate = (np.sqrt(b * b - 8 * problems * c) - b) / (4 * problems)
    return (lost - gained - problems * bound) / np.sqrt(problems * (2 * gained_rate + bound * (1 - bound)))


def _most_lost(score: float, gained: Any, problems: int, bound: float) -> Any:
    """Return, for each number gained, the largest number lost whose score is at most `score`, or -1. Found by bisection."""
    low, high = np.full_like(gained, -1), problems - gained
    while (low < high).any():
        middle = (low + high + 1) // 2
        extreme = _score(middle, gained, problems, bound) <= score + 1e-9
        low, high = np.where(extreme, middle, low), np.where(extreme, high, middle - 1)
    return low
