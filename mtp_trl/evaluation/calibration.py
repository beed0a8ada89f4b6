"""The lowest threshold that keeps a promise: at most so much accuracy lost, with so much confidence.

On one set of problems every threshold is compared with the model's own single-token answers, problem by problem, and each
comparison is an exact test of "it loses more than the bound". The thresholds are tested in an order fixed beforehand, from
strict to loose, until one test fails: then the chance that any accepted threshold breaks the bound is at most
1 - confidence, without a further correction for having looked at many (fixed-sequence testing: Maurer, Hothorn and
Lehmacher, 1995; for calibration: Angelopoulos et al., Learn then Test, arXiv 2110.01052). It rests on one assumption: the
problems to come are drawn like those of the calibration set.

Thresholds by place are searched along a few shapes, each of which is thresholds as a function of one number, fixed
beforehand: a sequence as above for every shape, each at an equal share of 1 - confidence (Bonferroni), so that the promise
holds for whichever accepted thresholds are then taken, also for the fastest of them. To choose the shape on one half of the
problems and to test it on the other would be honest too, but costs more: with nothing lost, a bound takes log(S / a)
problems of S shapes at a = 1 - confidence, and 2 log(1 / a) of two halves.
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
_GRID_VALUES = 200  # of the nuisance parameter P(gained)

# Thresholds, strict to loose as the number falls from 1.
Shape = Callable[[float], Threshold]


def even(threshold: float) -> Threshold:
    """The same at every place."""
    return threshold


def first_looser(threshold: float) -> Threshold:
    """Ten times the doubt at the first place, whose token is the model's own and is kept anyway."""
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
    """Of each shape the loosest threshold before the first that fails, of these the fastest, and the tests made.

    None if the strictest fails in all shapes.

    Args:
        count: decodes the problems at a threshold and compares; called for one threshold after the other until one fails.
        measure: `accuracy` or `agreement` with the model's own text.
        max_drop: the bound on the loss, a share in (0, 1).
        confidence: that no accepted threshold breaks the bound, in (0, 1).
        thresholds: the order of the tests; sorted from strict to loose.
        shapes: what becomes of a threshold at every place; fixed before anything is decoded.
    """
    steps, found = [], []
    for shape in shapes:
        last = None
        for threshold in map(shape, sorted(thresholds, reverse=True)):
            counts = count(threshold)
            p_value = loss_p_value(counts, bound=max_drop, measure=measure)
            steps.append(Step(threshold, counts, p_value, accepted=p_value <= _level(confidence, len(shapes))))
            if not steps[-1].accepted:
                break
            last = steps[-1]
        found += [last] if last else []
    fastest = max(found, key=lambda step: step.counts.tokens_per_pass, default=None)
    return None if fastest is None else fastest.threshold, steps


def compare(answers: Sequence[Record], own: Sequence[Record]) -> Counts:
    """A threshold's answers beside the model's own, which are scored where there is an answer key."""
    pairs = list(zip(answers, own, strict=True))
    if own[0].correct is None:
        lost, gained = sum(answer.token_ids != mine.token_ids for answer, mine in pairs), 0
    else:
        lost = sum(bool(mine.correct and not answer.correct) for answer, mine in pairs)
        gained = sum(bool(answer.correct and not mine.correct) for answer, mine in pairs)
    tokens, passes = sum(len(answer.token_ids) for answer in answers), sum(answer.passes for answer in answers)
    return Counts(len(pairs), lost, gained, tokens / passes)


def check_size(problems: int, *, max_drop: float, confidence: float, measure: Measure, shapes: int = 1) -> None:
    """Raises ValueError for numbers out of range, and for too few problems for any threshold to pass."""
    for name, value in (("max_drop", max_drop), ("confidence", confidence)):
        if not 0 < value < 1:
            raise ValueError(f"{name} is a share in (0, 1), got {value}.")
    needed = problems_needed(max_drop=max_drop, confidence=confidence, measure=measure, shapes=shapes)
    if problems < needed:
        raise ValueError(
            f"{problems} different problems cannot show a loss under {max_drop:g} with {confidence:g} confidence, even if not "
            f"one answer is lost: at least {needed} are needed, and two to five times as many to find a low threshold."
        )


def _level(confidence: float, shapes: int) -> float:
    return (1 - confidence) / shapes + 1e-12  # 1 - 0.95 is not 0.05


def problems_needed(*, max_drop: float, confidence: float, measure: Measure, shapes: int = 1) -> int:
    """The fewest problems with which a threshold that loses nothing passes, where so many shapes are searched."""
    problems = math.ceil(math.log((1 - confidence) / shapes) / math.log1p(-max_drop))
    while loss_p_value(Counts(problems, 0, 0, 1.0), bound=max_drop, measure=measure) > _level(confidence, shapes):
        problems += 1
    return problems


def loss_p_value(counts: Counts, *, bound: float, measure: Measure) -> float:
    """The chance of so few losses, at most, if the threshold lost `bound` or more."""
    if measure == "agreement":
        from scipy.stats import binom

        return float(binom.cdf(counts.lost, counts.problems, bound))
    return net_loss_p_value(counts.lost, counts.gained, counts.problems, bound=bound)


def net_loss_p_value(lost: int, gained: int, problems: int, *, bound: float) -> float:
    """Exact unconditional test of paired answers: is P(lost) - P(gained) >= `bound`?

    Outcomes are ordered by Tango's score statistic (Statistics in Medicine 17, 1998); the p-value is the largest
    probability, over the unknown P(gained), of an outcome as extreme as the one seen (Hsueh, Liu and Chen, Biometrics 57,
    2001). The largest is searched on a grid of P(gained) and once more, finely, around the best value of the grid. That is
    an approximation from below (to about 1e-6 of it in the cases tested), not a certified supremum.
    """
    from scipy.stats import binom

    all_gained = np.arange(problems + 1)
    most_lost = _most_lost(_score(lost, gained, problems, bound), all_gained, problems, bound)

    def chance(rate: Any) -> Any:
        """Of an outcome as extreme: given how many are gained, the others are lost with (bound + rate) / (1 - rate)."""
        lost_rate = np.minimum((bound + rate) / (1 - rate), 1.0)
        return (binom.pmf(all_gained, problems, rate) * binom.cdf(most_lost, problems - all_gained, lost_rate)).sum(1)

    largest_rate = (1 - bound) / 2
    rates = np.union1d(np.linspace(0.0, largest_rate, _GRID_VALUES), np.geomspace(1e-2 / problems, largest_rate, _GRID_VALUES))
    best = int(chance(rates[:, None]).argmax())
    around_best = np.linspace(rates[max(best - 1, 0)], rates[min(best + 1, len(rates) - 1)], _GRID_VALUES)
    return float(chance(np.append(around_best, rates[best])[:, None]).max())


def _score(lost: Any, gained: Any, problems: int, bound: float) -> Any:
    """Tango's statistic: the net loss minus its bound in units of its standard error where the bound holds exactly."""
    b = -lost - gained + (2 * problems - lost + gained) * bound
    c = -gained * bound * (1 - bound)
    gained_rate = (np.sqrt(b * b - 8 * problems * c) - b) / (4 * problems)
    return (lost - gained - problems * bound) / np.sqrt(problems * (2 * gained_rate + bound * (1 - bound)))


def _most_lost(score: float, gained: Any, problems: int, bound: float) -> Any:
    """Of each number gained, the largest number lost that is as extreme as `score`; -1 where none is. By bisection."""
    low, high = np.full_like(gained, -1), problems - gained
    while (low < high).any():
        middle = (low + high + 1) // 2
        extreme = _score(middle, gained, problems, bound) <= score + 1e-9
        low, high = np.where(extreme, middle, low), np.where(extreme, high, middle - 1)
    return low
