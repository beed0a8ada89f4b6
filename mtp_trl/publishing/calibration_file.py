"""`mtp_calibration.json`: the threshold that `mtp-trl calibrate` chose, and the tests behind it."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from ..modeling.files import write_atomically
from .report import Threshold, threshold_text, whole

Measure = Literal["accuracy", "agreement"]

CALIBRATION_FILE = "mtp_calibration.json"


@dataclass(frozen=True)
class Counts:
    """A threshold's answers beside the model's own on the same problems.

    With an answer key `lost` are right only in the model's own text and `gained` right only at the threshold; without one
    `lost` are all that differ, and none are gained.
    """

    problems: int
    lost: int
    gained: int
    tokens_per_pass: float


@dataclass(frozen=True)
class Step:
    """One test: the p-value of "this threshold loses more than the bound", and whether that was refuted."""

    threshold: Threshold
    counts: Counts
    p_value: float
    accepted: bool


@dataclass(frozen=True)
class Calibration:
    """A threshold, None where not even the strictest keeps the bound, and the evidence for it."""

    measure: Measure
    max_drop: float
    confidence: float
    threshold: Threshold | None
    steps: list[Step]
    provenance: dict[str, Any]

    def write(self, path: Path) -> None:
        """As JSON."""
        write_atomically(path, json.dumps(dataclasses.asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, path: Path) -> Calibration:
        """What `write` wrote.

        Raises:
            KeyError, TypeError, ValueError: another kind of JSON.
        """
        fields = json.loads(path.read_text(encoding="utf-8"))
        if fields["measure"] not in get_args(Measure):
            raise ValueError(f"{path} has measure={fields['measure']!r}, which must be one of {', '.join(get_args(Measure))}.")
        for values in (fields, *fields["steps"]):
            if isinstance(values["threshold"], list):  # what JSON makes of a tuple
                values["threshold"] = tuple(values["threshold"])
        steps = []
        for step in fields["steps"]:
            counts = {name: whole(step["counts"][name]) for name in ("problems", "lost", "gained")}
            steps.append(Step(**step | {"counts": Counts(**step["counts"] | counts)}))
        return cls(**fields | {"steps": steps})

    @property
    def promise(self) -> str:
        """What the threshold stands for, in one sentence."""
        problems = self.steps[0].counts.problems
        if self.threshold is None:
            return f"No threshold keeps the loss of {self.measure} under {100 * self.max_drop:g} points on {problems} problems."
        return (
            f"At confadapt={argument(self.threshold)} the loss of {self.measure} against the model's own single-token text "
            f"stays under {100 * self.max_drop:g} points with {100 * self.confidence:g} % confidence, "
            f"as measured on {problems} problems; it holds for problems like these."
        )

    def markdown(self) -> str:
        """The promise and the tests behind it."""
        lines = [
            self.promise,
            "",
            "| threshold | lost | gained | tokens per pass | p-value | |",
            "| ---: | ---: | ---: | ---: | ---: | --- |",
        ]
        for step in self.steps:
            counts, verdict = step.counts, "kept" if step.accepted else "stop"
            lines.append(
                f"| {threshold_text(step.threshold)} | {counts.lost} | {counts.gained} | {counts.tokens_per_pass:.2f} | "
                f"{step.p_value:.2g} | {verdict} |"
            )
        return "\n".join(lines)


def argument(threshold: Threshold) -> str:
    """As `generate` takes it: 0.9, or [0, 0.9]."""
    text = threshold_text(threshold)
    return f"[{text.replace('/', ', ')}]" if isinstance(threshold, tuple) else text
