"""`mtp_k="auto"`: the block of each step is the one that promises most tokens per second."""

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

MARGIN = 1.05  # how many times the tokens per second of plain decoding a longer block must promise
DECAY = 0.98  # per draft: about the last 50 drafts of a position count
PROBE_SHARE = 0.02  # of the time may be spent on trying other block lengths


class Measurements:
    """What a model's calls have shown so far: passes timed, apart by one column per row or more, and drafts confirmed."""

    def __init__(self, k_max: int) -> None:
        self.plain: deque[tuple[int, float]] = deque(maxlen=16)  # columns fed, seconds
        self.wide: deque[tuple[int, float]] = deque(maxlen=16)
        # How often draft 1, 2, ... was verified, and was confirmed.
        self.verified, self.confirmed = [0.0] * k_max, [0.0] * k_max
        self.since_probe = 0.0  # seconds
        self.longer_next = False  # whether the next probe is of a longer block than the best one, or of plain decoding

    def seconds(self) -> Callable[[float], float]:
        """A pass's time by the columns it takes: the line through what was timed, without compilation and hiccups."""
        passes = [
            one
            for timed in (self.plain, self.wide)
            for one in timed
            if one[1] <= 3 * statistics.median(seconds for _, seconds in timed)
        ]
        fed, took = (sum(column) / len(passes) for column in zip(*passes, strict=True))
        spread = sum((n - fed) ** 2 for n, _ in passes)
        slope = max(0.0, sum((n - fed) * (t - took) for n, t in passes) / spread) if spread else 0.0
        slope = min(slope, took / fed)  # no pass takes less than no time
        return lambda n: took + slope * (n - fed)

    def survival(self) -> list[float]:
        """Probability that at least 1, 2, ... drafts are confirmed; a position never verified is like the one before."""
        rates, rate = [], 0.7
        for verified, confirmed in zip(self.verified, self.confirmed, strict=True):
            rate = (confirmed + 2 * rate) / (verified + 2)
            rates.append(rate)
        return list(itertools.accumulate(rates, operator.mul))


class Pace:
    """How long the block of the next step shall be."""

    measured: weakref.WeakKeyDictionary[PreTrainedModel, dict[Any, Measurements]] = weakref.WeakKeyDictionary()

    def __init__(self, model: PreTrainedModel, settings: Settings, rows: list[Row], *, sampling: bool, static: bool) -> None:
        self.longest, self.auto, self.rows = settings.k, settings.auto, rows
        self.k = settings.k
        self.masks_fed: dict[int, int] = {}  # in the row's last step, by its index
        self.probes: list[int] = []  # blocks to try next, whatever they promise
        # Static shapes know two lengths: every other would be compiled too.
        self.lengths = sorted({1, self.longest} if static else {1, *(k for k in (2, 4, 8) if k < self.longest), self.longest})
        if self.auto:
            # What a pass takes depends on the rows, of which a line says little beyond those measured, and on the context.
            sizes = len(rows).bit_length(), max(row.limit for row in rows).bit_length()
            key = (settings.thresholds, settings.k, sampling, static, *sizes)
            self.so_far = self.measured.setdefault(model, {}).setdefault(key, Measurements(settings.k))

    @contextmanager
    def step(self, alive: list[Row], forward: Forward) -> Iterator[int]:
        """The block of a step, which is timed."""
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
            (self.so_far.plain if is_plain else self.so_far.wide).append((forward.fed, seconds))
            self.so_far.since_probe += seconds

    def learn(self, row: Row, *, confirmed: int) -> None:
        """So many drafts of the row's block before this one were confirmed; older blocks count less and less."""
        if not self.auto:
            return
        so_far = self.so_far
        if not row.done:  # else the end may have cut the block short
            for draft in range(min(self.masks_fed.get(row.index, 0), confirmed + 1)):
                so_far.verified[draft] = DECAY * so_far.verified[draft] + 1
                so_far.confirmed[draft] = DECAY * so_far.confirmed[draft] + (draft < confirmed)
        self.masks_fed[row.index] = self.k - 1

    def next(self, rows: int, reread: int) -> int:
        """The block that promises most tokens per second, or one that has not been tried for long."""
        so_far = self.so_far
        if not so_far.wide:
            return self.longest
        if len(so_far.plain) < 2:
            return 1
        if self.probes:
            return self.probes.pop()
        seconds = so_far.seconds()
        best = self.best(rows, reread, seconds)
        longer = self.lengths[self.lengths.index(best) + 1 :][:1]
        # The first step of one token reads what is pending, the second shows what such a step takes.
        other = longer if longer and (best == 1 or so_far.longer_next) else [1, 1]
        costs = sum(seconds(rows * (1 if k == 1 else 2 * k + reread)) for k in other)
        if PROBE_SHARE * so_far.since_probe > costs:
            so_far.since_probe, so_far.longer_next, self.probes = 0.0, not so_far.longer_next, other
            return self.probes.pop()
        return best

    def best(self, rows: int, reread: int, seconds: Callable[[float], float]) -> int:
        """The block that promises most tokens per second; 1 unless another beats it by a margin."""
        survival = self.so_far.survival()

        def tokens_per_second(k: int) -> float:
            drafts = survival[: k - 1]
            widest = 1 + sum(1 - (1 - share) ** rows for share in drafts)  # of the rows' pending tokens
            columns = widest + k - 1 + (reread if k > 1 else 0)
            return (1 + sum(drafts)) / seconds(rows * columns)

        best = max(self.lengths, key=tokens_per_second)
        return best if tokens_per_second(best) > MARGIN * tokens_per_second(1) else 1
