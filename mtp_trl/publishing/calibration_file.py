"""Read and write `mtp_calibration.json`: the threshold that `mtp-trl calibrate` chose, and the tests that support it."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from ..modeling.files import write_atomically
from .report import Threshold, threshold_text, whole
from .repository import write_decoding_defaults

Measure = Literal["accuracy", "agreement"]

CALIBRATION_FILE = "mtp_calibration.json"


@dataclass(frozen=True)
class Counts:
    """The answers at a threshold compared with the model's single-token answers to the same problems.

    Attributes:
        problems: number of problems.
        lost: answers that are correct only in single-token decoding. Without an answer key, all answers that differ.
        gained: answers that are correct only at the threshold. Without an answer key, 0.
        tokens_per_pass: average number of tokens per forward pass at the threshold.
    """

    problems: int
    lost: int
    gained: int
    tokens_per_pass: float


@dataclass(frozen=True)
class Step:
    """One hypothesis test of a threshold.

    Attributes:
        threshold: the tested threshold.
        counts: the answers at this threshold compared with the single-token answers.
        p_value: of the null hypothesis that the threshold loses at least the bound.
        accepted: whether the null hypothesis was rejected, so that the threshold keeps the bound.
    """

    threshold: Threshold
    counts: Counts
    p_value: float
    accepted: bool


@dataclass(frozen=True)
class Calibration:
    """The result of a calibration and its evidence.

    Attributes:
        measure: what the bound limits, the loss of `accuracy` or of `agreement` with the single-token answers.
        max_drop: the bound on the loss, a share in (0, 1).
        confidence: the confidence level of the bound, in (0, 1).
        threshold: the chosen threshold. None if no threshold keeps the bound.
        steps: the tests, in the order in which they were made.
        provenance: how the calibration was made; see `run_facts`.
    """

    measure: Measure
    max_drop: float
    confidence: float
    threshold: Threshold | None
    steps: list[Step]
    provenance: dict[str, Any]

    def write(self, path: Path) -> None:
        """Write the calibration to `path` as JSON."""
        write_atomically(path, json.dumps(dataclasses.asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, path: Path) -> Calibration:
        """Read a calibration that `write` wrote.

        Raises:
            KeyError, TypeError, ValueError: the file does not contain the JSON of a calibration.
        """
        fields = json.loads(path.read_text(encoding="utf-8"))
        if fields["measure"] not in get_args(Measure):
            raise ValueError(f"{path} has measure={fields['measure']!r}, which must be one of {', '.join(get_args(Measure))}.")
        for values in (fields, *fields["steps"]):
            if isinstance(values["threshold"], list):  # JSON has no tuples
                values["threshold"] = tuple(values["threshold"])
        steps = []
        for step in fields["steps"]:
            counts = {name: whole(step["counts"][name]) for name in ("problems", "lost", "gained")}
            steps.append(Step(**step | {"counts": Counts(**step["counts"] | counts)}))
        return cls(**fields | {"steps": steps})

    @property
    def promise(self) -> str:
        """What the calibration guarantees, as text."""
        problems = self.steps[0].counts.problems
        if self.threshold is None:
            return f"No threshold keeps the loss of {self.measure} below {100 * self.max_drop:g} points on {problems} problems."
        return (
            f"With confadapt={argument(self.threshold)}, the loss of {self.measure} compared with single-token decoding is "
            f"below {100 * self.max_drop:g} points with {100 * self.confidence:g} % confidence, measured on {problems} "
            "problems. This applies only to problems like these."
        )

    def markdown(self) -> str:
        """Return the guarantee and a table of the tests as Markdown."""
        lines = [
            self.promise,
            "",
            "| threshold | lost | gained | tokens per pass | p-value | result |",
            "| ---: | ---: | ---: | ---: | ---: | --- |",
        ]
        for step in self.steps:
            counts, verdict = step.counts, "accepted" if step.accepted else "rejected"
            lines.append(
                f"| {threshold_text(step.threshold)} | {counts.lost} | {counts.gained} | {counts.tokens_per_pass:.2f} | "
                f"{step.p_value:.2g} | {verdict} |"
            )
        return "\n".join(lines)


def argument(threshold: Threshold) -> str:
    """Format a threshold as the `confadapt` argument of `generate`: 0.9, or [0, 0.9]."""
    text = threshold_text(threshold)
    return f"[{text.replace('/', ', ')}]" if isinstance(threshold, tuple) else text


def use_calibrated_threshold(folder: Path) -> None:
    """Make the threshold that was calibrated for a folder, if there is one, its decoding default."""
    path = folder / CALIBRATION_FILE
    threshold = Calibration.read(path).threshold if path.is_file() else None
    if threshold is not None:
        write_decoding_defaults(folder, confadapt=threshold, verify=False)
