"""`mtp_k="auto"`: choose the block size of each step for the most tokens per second."""

from __future__ import annotations

import itertools
import operator
import statistics
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel

from .forward_base import Forward
from .rows import Row
from .settings import Settings

MARGIN = 1.05  # a longer block must promise this many times the tokens per second of plain decoding
DECAY = 0.98  # weight of older drafts, per draft: about the last 50 drafts of a position count
PROBE_SHARE = 0.02  # share of the time that may be spent on probes of other block sizes


class Measurements:
    """Times of passes and counts of confirmed drafts, measured in a model's calls so far."""

    def __init__(self, k_max: int) -> None:
        # (columns fed, seconds) of passes with one column per row, and of wider passes.
        self.plain: deque[tuple[int, float]] = deque(maxlen=16)
        self.wide: deque[tuple[int, float]] = deque(maxlen=16)
        # How often draft 1, 2, ... was verified and how often it was confirmed, with older drafts weighted down.
        self.verified, self.confirmed = [0.0] * k_max, [0.0] * k_max
        self.since_probe = 0.0  # seconds
        self.longer_next = False  # whether the next probe is a block longer than the best one; else it is plain decoding

    def seconds(self) -> Callable[[float], float]:
        """Return a linear fit of a pass's seconds as a function of its columns.

        The fit ignores passes that took over three times the median, which include compilation or an interruption.
        """
        passes = [
            (columns, elapsed)
            for timed in (self.plain, self.wide)
            for columns, elapsed in timed
            if elapsed <= 3 * statistics.median(seconds for _, seconds in timed)
        ]
        mean_n, mean_t = (sum(column) / len(passes) for column in zip(*passes, strict=True))
        spread = sum((n - mean_n) ** 2 for n, _ in passes)
        slope = max(0.0, sum((n - mean_n) * (t - mean_t) for n, t in passes) / spread) if spread else 0.0
        slope = min(slope, mean_t / mean_n)  # the fit must not be negative at 0 columns
        return lambda n: mean_t + slope * (n - mean_n)

    def survival(self) -> list[float]:
        """Return the probabilities that at least 1, 2, ... drafts are confirmed.

        Each rate is smoothed towards that of the position before it, which an unmeasured position inherits.
        """
        rates, rate = [], 0.7
        for verified, confirmed in zip(self.verified, self.confirmed, strict=True):
            rate = (confirmed + 2 * rate) / (verified + 2)
            rates.append(rate)
        return list(itertools.accumulate(rates, operator.mul))


class Pace:
    """Chooses the block size of each step: the largest one, or with `mtp_k="auto"` the fastest one."""

    measured: weakref.WeakKeyDictionary[PreTrainedModel, dict[Any, Measurements]] = weakref.WeakKeyDictionary()

    def __init__(self, model: PreTrainedModel, settings: Settings, rows: list[Row], *, sampling: bool, static: bool) -> None:
        self.longest, self.auto, self.rows = settings.k, settings.auto, rows
        self.k = settings.k
        self.masks_fed: dict[int, int] = {}  # masks of a block in the row's last step, by the row's index
        self.probes: list[int] = []  # block sizes to try next, regardless of the estimates
        # With static shapes only two sizes are used, since each size is compiled.
        self.lengths = sorted({1, self.longest} if static else {1, *(k for k in (2, 4, 8) if k < self.longest), self.longest})
        if self.auto:
            # The time of a pass also depends on the number of rows and on the context length, and the fit does not extrapolate
            # well. Keep separate measurements for each power of two of both.
            sizes = len(rows).bit_length(), max(row.limit for row in rows).bit_length()
            key = (settings.thresholds, settings.k, sampling, static, *sizes)
            self.measurements = self.measured.setdefault(model, {}).setdefault(key, Measurements(settings.k))

    @contextmanager
    def step(self, alive: list[Row], forward: Forward) -> Iterator[int]:
        """Yield the block size of a step, and time the step."""
        if not self.auto:
            yield self.longest
            return
        is_prefill = not self.masks_fed
        rows = len(self.rows if forward.keeps_rows else alive)
        self.k, forward.fed = self.next(rows, forward.reread), 0
        started = time.perf_counter()
        yield self.k
        seconds = time.perf_counter() - started
        if not is_prefill:
            is_plain = forward.fed == rows  # one column per row
            (self.measurements.plain if is_plain else self.measurements.wide).append((forward.fed, seconds))
            self.measurements.since_probe += seconds

    def learn(self, row: Row, *, confirmed: int) -> None:
        """Record that `confirmed` drafts of the row's previous block were confirmed."""
        if not self.auto:
            return
        measurements = self.measurements
        if not row.done:  # the end of a finished row may have cut its block short
            for draft in range(min(self.masks_fed.get(row.index, 0), confirmed + 1)):
                measurements.verified[draft] = DECAY * measurements.verified[draft] + 1
                measurements.confirmed[draft] = DECAY * measurements.confirmed[draft] + (draft < confirmed)
        self.masks_fed[row.index] = self.k - 1

    def next(self, rows: int, reread: int) -> int:
        """Return the block size with the highest estimated tokens per second, or a probe of another size."""
        measurements = self.measurements
        if not measurements.wide:
            return self.longest
        if len(measurements.plain) < 2:
            return 1
        if self.probes:
            return self.probes.pop()
        seconds = measurements.seconds()
        best = self.best(rows, reread, seconds)
        longer = self.lengths[self.lengths.index(best) + 1 :][:1]
        # The first step without masks still feeds the pending drafts, so only the second one times a plain step.
        probe = longer if longer and (best == 1 or measurements.longer_next) else [1, 1]
        costs = sum(seconds(rows * (1 if k == 1 else 2 * k + reread)) for k in probe)
        if PROBE_SHARE * measurements.since_probe > costs:
            measurements.since_probe, measurements.longer_next, self.probes = 0.0, not measurements.longer_next, probe
            return self.probes.pop()
        return best

    def best(self, rows: int, reread: int, seconds: Callable[[float], float]) -> int:
        """Return the block size with the highest estimated tokens per second: 1 unless another one beats it by `MARGIN`."""
        survival = self.measurements.survival()

        def tokens_per_second(k: int) -> float:
            drafts = survival[: k - 1]
            pending = 1 + sum(1 - (1 - share) ** rows for share in drafts)  # expected maximum over the rows
            columns = pending + k - 1 + (reread if k > 1 else 0)
            return (1 + sum(drafts)) / seconds(rows * columns)

        best = max(self.lengths, key=tokens_per_second)
        return best if tokens_per_second(best) > MARGIN * tokens_per_second(1) else 1
