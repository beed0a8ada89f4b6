"""`mtp_k="auto"`: choose the block size and the number of blocks of each step for the most tokens per second."""

from __future__ import annotations

import bisect
import itertools
import math
import operator
import statistics
import time
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel

from .forward_base import Forward
from .rows import Row
from .settings import Settings

Mode = tuple[int, int]  # block size and number of blocks of a step
PLAIN: Mode = (1, 1)
MARGIN = 1.05  # blocks must promise this many times the tokens per second of plain decoding
DECAY = 0.98  # weight of older drafts, per draft: about the last 50 drafts of a position count
PROBE_SHARE = 0.01  # share of the time that may be spent on probes of other modes
WIDTHS_PER_OCTAVE = 4  # passes whose widths differ by less than this share one median


class Measurements:
    """Times of passes and outcomes of drafts, measured in a model's calls so far."""

    def __init__(self, k_max: int) -> None:
        # (columns fed, seconds) of the last passes, by their widths on a logarithmic scale, and (mean, median) of each width.
        self.passes: dict[int, deque[tuple[int, float]]] = {}
        self.typical: dict[int, tuple[float, float]] = {}
        self.points: list[tuple[float, float]] = []  # the same, by columns
        self.plain_passes = 0
        # How often draft 1, 2, ... of a block was reached, confirmed and rejected, with older drafts weighted down. A draft is
        # reached if all drafts before it were confirmed. It is neither confirmed nor rejected if the threshold left it out.
        self.reached, self.confirmed, self.rejected = [0.0] * k_max, [0.0] * k_max, [0.0] * k_max
        self.survival, self.rejection = self._outcomes()
        self.since_probe = 0.0  # seconds
        self.second_next = False  # whether the next probe is the second best mode

    def record_pass(self, columns: int, seconds: float) -> None:
        """Record the time of a pass over this many columns of all rows."""
        width = round(WIDTHS_PER_OCTAVE * math.log2(columns))
        passes = self.passes.setdefault(width, deque(maxlen=5))
        passes.append((columns, seconds))
        self.typical[width] = sum(n for n, _ in passes) / len(passes), statistics.median(t for _, t in passes)
        self.points = sorted(self.typical.values())

    def record_block(self, *, drafts: int, masks: int, confirmed: int) -> None:
        """Record the outcome of a block of `masks` masks, from which `drafts` were accepted and `confirmed` confirmed."""
        for draft in range(min(masks, confirmed + 1)):
            for counts, happened in (
                (self.reached, True),
                (self.confirmed, draft < confirmed),
                (self.rejected, draft == confirmed < drafts),
            ):
                counts[draft] = DECAY * counts[draft] + happened
        self.survival, self.rejection = self._outcomes()

    def seconds(self, columns: float) -> float:
        """Return the estimated time of a pass: interpolated between the medians of the nearest widths that were measured."""
        points = self.points
        above = bisect.bisect(points, (columns, math.inf))
        if not 0 < above < len(points):
            return points[min(above, len(points) - 1)][1]  # as fast as the widest pass: trying it will tell
        (n0, t0), (n1, t1) = points[above - 1 : above + 1]
        return t0 + (t1 - t0) * (columns - n0) / (n1 - n0)

    def _outcomes(self) -> tuple[list[float], list[float]]:
        """Return the probabilities that at least 1, 2, ... drafts are confirmed, and that draft 1, 2, ... is rejected.

        Each rate is smoothed towards that of the position before it, which an unmeasured position inherits.
        """
        confirmed, rejected = [], []
        right, wrong = 0.7, 0.1
        for reached, was_confirmed, was_rejected in zip(self.reached, self.confirmed, self.rejected, strict=True):
            right = (was_confirmed + 2 * right) / (reached + 2)
            wrong = (was_rejected + 2 * wrong) / (reached + 2)
            confirmed.append(right)
            rejected.append(wrong)
        survival = list(itertools.accumulate(confirmed, operator.mul))
        return survival, [reach * wrong for reach, wrong in zip([1.0, *survival], rejected, strict=False)]


class Pace:
    """Chooses the mode of each step: the largest one, or with `mtp_k="auto"` the fastest one."""

    measured: weakref.WeakKeyDictionary[PreTrainedModel, dict[Any, Measurements]] = weakref.WeakKeyDictionary()

    def __init__(
        self, model: PreTrainedModel, settings: Settings, rows: list[Row], forward: Forward, *, sampling: bool, static: bool
    ) -> None:
        self.auto, self.rows, self.forward = settings.auto, rows, forward
        self.longest: Mode = (settings.k, 1 if self.auto else settings.blocks)
        self.mode = self.longest
        self.blocks_fed: dict[int, int] = {}  # masks of the block that the row's drafts came from, by the row's index
        self.drafts: dict[int, int] = {}  # drafts that the step verifies, by the row's index
        self.probes: list[Mode] = []  # modes to try next, regardless of the estimates
        # With static shapes only two sizes are used, since each size is compiled.
        self.modes = [PLAIN, self.longest] if static else [mode for mode in settings.modes if mode[1] <= forward.blocks]
        if self.auto:
            # The time of a pass also depends on the number of rows and on the context length. Keep separate measurements for
            # each power of two of both.
            sizes = len(rows).bit_length(), max(row.limit for row in rows).bit_length()
            key = (settings.thresholds, settings.k, sampling, static, *sizes)
            self.measurements = self.measured.setdefault(model, {}).setdefault(key, Measurements(settings.k))

    @contextmanager
    def step(self, alive: list[Row]) -> Iterator[Mode]:
        """Yield the mode of a step, and time the step."""
        if not self.auto:
            yield self.longest
            return
        is_prefill = not self.drafts
        self.drafts = {row.index: len(row.drafts) for row in alive}
        was_plain = self.mode == PLAIN
        self.mode = self.next(len(self.rows if self.forward.keeps_rows else alive))
        if was_plain or self.mode != PLAIN:  # the first plain step still verifies drafts
            self.forward.hook_adapter(self.mode != PLAIN)
        self.forward.fed = 0
        started = time.perf_counter()
        yield self.mode
        seconds = time.perf_counter() - started
        if not is_prefill:
            self.measurements.record_pass(self.forward.fed, seconds)
            self.measurements.plain_passes += self.forward.fed == len(self.rows if self.forward.keeps_rows else alive)
            self.measurements.since_probe += seconds

    def learn(self, row: Row, *, confirmed: int) -> None:
        """Record that the step confirmed this many drafts of a row."""
        if not self.auto:
            return
        drafts, masks = self.drafts[row.index], self.blocks_fed.get(row.index, 0)
        if masks and not row.done:  # the end of a finished row may have cut its block short
            self.measurements.record_block(drafts=drafts, masks=masks, confirmed=confirmed)
        k, blocks = self.mode
        has_block = confirmed > drafts - blocks  # the rejection point has a block of masks
        self.blocks_fed[row.index] = k - 1 if has_block else 0

    def next(self, rows: int) -> Mode:
        """Return the mode with the highest estimated tokens per second, or a probe of another mode."""
        measurements = self.measurements
        if len(self.modes) == 1 or not measurements.passes:
            return self.longest
        if measurements.plain_passes < 2:
            return PLAIN  # the first step without masks still feeds the pending drafts, so only the second one is plain
        if self.probes:
            return self.probes.pop()
        ranking = sorted(self.modes, key=lambda mode: self.tokens_per_second(mode, rows), reverse=True)
        best = ranking[0]
        if self.tokens_per_second(best, rows) <= MARGIN * self.tokens_per_second(PLAIN, rows):
            best = PLAIN
        probe = [self.longest] * 2 if best == PLAIN else [PLAIN] * 2
        if measurements.second_next:
            probe = [next((mode for mode in ranking if mode not in (PLAIN, best)), self.longest)] * 2
        costs = sum(measurements.seconds(self.columns(mode, rows)) for mode in probe)
        if PROBE_SHARE * measurements.since_probe > costs:
            measurements.since_probe, measurements.second_next, self.probes = 0.0, not measurements.second_next, probe
            return self.probes.pop()
        return best

    def columns(self, mode: Mode, rows: int) -> float:
        """Return the expected number of columns that a step of this mode feeds."""
        k, blocks = mode
        if mode == PLAIN:
            return rows
        survival, rejected = self.measurements.survival, self.measurements.rejection
        # Drafts up to the first one that the threshold leaves out; the row with the most of them sets the width.
        kept = [confirmed + wrong for confirmed, wrong in zip(survival[: k - 1], rejected, strict=False)]
        drafts = sum(1 - (1 - share) ** rows for share in kept)
        return rows * (1 + drafts + min(blocks, 1 + drafts) * (k - 1) + self.forward.reread)

    def tokens_per_second(self, mode: Mode, rows: int) -> float:
        """Return the estimated tokens per second and row.

        With one block of masks, a step that rejects a draft has no next drafts, and the step after it confirms one token.
        """
        k, blocks = mode
        survival, rejected = self.measurements.survival, self.measurements.rejection
        tokens, lost = 1 + sum(survival[: k - 1]), 0.0 if blocks > 1 else sum(rejected[: k - 1])
        return (tokens + lost) / (1 + lost) / self.measurements.seconds(self.columns(mode, rows))
