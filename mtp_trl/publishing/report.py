"""A comparison of decodings as it is published: its rows, and the same as Markdown and JSON."""

from __future__ import annotations

import dataclasses
import hashlib
import html
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["base", "plain", "static", "confadapt", "verified", "tree"]
# Of all places of a block, or of place 1, 2, ..., the last of which holds for all that follow.
Threshold = float | tuple[float, ...]


@dataclass(frozen=True)
class Estimate:
    """A mean over problems and its standard error; both in the unit of the values."""

    value: float
    standard_error: float


@dataclass(frozen=True)
class Setting:
    """One way to decode. `base` is the model before adaptation, plain greedy; the others are the student's.

    `tree` is verified decoding with `k` blocks of masks per pass.
    """

    kind: Kind
    k: int | None = None
    threshold: Threshold | None = None

    @property
    def label(self) -> str:
        """What tables call it."""
        threshold = "" if self.threshold is None else threshold_text(self.threshold)
        return {
            "base": "base, k=1",
            "plain": "student, k=1",
            "static": f"static k={self.k}",
            "confadapt": f"ConfAdapt {threshold}",
            "verified": f"verified {threshold}",
            "tree": f"{self.k} blocks {threshold}",
        }[self.kind]

    def arguments(self, mtp: Mapping[str, Any]) -> dict[str, Any]:
        """The keyword arguments of `generate` that select it, each named, so that no default of the folder remains.

        The base is held to the student's vocabulary, by the tokens that the student never emits.

        Args:
            mtp: the student's `config.mtp`.
        """
        k_max = mtp["k_max"]
        if self.kind == "base":
            return {"suppress_tokens": list(mtp["barred_token_ids"])}
        if self.kind == "plain":
            return {"mtp_k": 1, "confadapt": 0.0, "verify": False, "mtp_blocks": 1}
        if self.kind == "static":
            return {"mtp_k": self.k, "confadapt": 0.0, "verify": False, "mtp_blocks": 1}
        if self.kind == "tree":
            return {"mtp_k": k_max, "confadapt": self.threshold, "verify": True, "mtp_blocks": self.k}
        return {"mtp_k": k_max, "confadapt": self.threshold, "verify": self.kind == "verified", "mtp_blocks": 1}


def threshold_text(threshold: Threshold | Sequence[float]) -> str:
    """As the command line takes it: 0.9, or 0.99/0.9/0.8 by place. Different thresholds have different texts."""
    places = [threshold] if isinstance(threshold, float | int) else threshold
    return "/".join(f"{one:g}" if float(f"{one:g}") == one else repr(one) for one in places)


@dataclass(frozen=True)
class TableRow:
    """A setting's line in the table. Accuracies are shares in [0, 1] and None without a scorer.

    `versus_base` and `versus_plain` are paired differences of accuracy; `same_as_base` and `same_as_plain` shares of
    answers that are token for token those of the base and of the student's k=1; of a harness's task, that have their text.
    """

    setting: Setting
    problems: int
    accuracy: Estimate | None
    versus_base: Estimate | None
    versus_plain: Estimate | None
    same_as_base: float | None
    same_as_plain: float
    tokens_per_pass: float
    tokens_per_second: float
    tokens_per_answer: float


COLUMNS = (
    "decoding",
    "accuracy, %",
    "vs base",
    "vs k=1",
    "same as base, %",
    "same as k=1, %",
    "tokens per pass",
)
_NO_VALUE = "-"


@dataclass(frozen=True)
class Report:
    """What is published of a sweep: its table, how fast it ran, and how it came to be.

    `single` are rows of a second sweep at batch size 1, on fewer problems, for the speed a single user sees.
    """

    title: str
    rows: list[TableRow]
    batch_size: int
    max_new_tokens: int | None  # None: as the task says
    provenance: dict[str, Any]
    single: list[TableRow] = dataclasses.field(default_factory=list)

    @property
    def header(self) -> list[str]:
        """Column titles of the table."""
        speeds = [f"tokens per s, batch {self.batch_size}"] + (["tokens per s, batch 1"] if self.single else [])
        return [*COLUMNS, *speeds]

    @property
    def cells(self) -> list[list[str]]:
        """The table, row by row; differences and errors in percentage points."""
        single = {row.setting: row.tokens_per_second for row in self.single}
        table = []
        for row in self.rows:
            speeds = [row.tokens_per_second] + ([single[row.setting]] if self.single else [])
            table.append([*_cells(row), *(f"{speed:,.0f}" for speed in speeds)])
        return table

    @property
    def caption(self) -> str:
        """One sentence to read the numbers by."""
        facts = self.provenance
        versions = facts["versions"]
        trees = "; blocks: verified, with masks behind as many places at which the drafts may end"
        blocks = trees if any(row.setting.kind == "tree" for row in self.rows) else ""
        speed = f"; tokens per s: {facts['speeds']}" if "speeds" in facts else ""
        template = "through the chat template" if facts.get("chat_template") else "without a chat template"
        harness = f"lm-evaluation-harness's prompts and stops, {template}"
        longest = f"up to {self.max_new_tokens} new tokens" if self.max_new_tokens else harness
        single = f", batch 1 on the first {self.single[0].problems}" if self.single else ""
        same = "are token for token theirs" if self.max_new_tokens else "have their very text up to the stop"
        return (
            f"{self.title}: {self.rows[0].problems} problems{single}, greedy, {longest}; "
            "± is one standard error; differences to the base and to the student's own k=1 are paired by problem; "
            f"same: share of answers that {same}{speed}{blocks}. "
            f"{facts['date']}, {facts['hardware']}, torch {versions['torch']}, "
            f"transformers {versions['transformers']}; {code_span(facts['command'])}."
        )


def _cells(row: TableRow) -> list[str]:
    is_base, is_plain = row.setting.kind == "base", row.setting.kind == "plain"
    return [
        row.setting.label,
        _points(row.accuracy),
        _NO_VALUE if is_base else _points(row.versus_base, signed=True),
        _NO_VALUE if is_base or is_plain else _points(row.versus_plain, signed=True),
        _NO_VALUE if is_base or row.same_as_base is None else f"{100 * row.same_as_base:.1f}",
        _NO_VALUE if is_base or is_plain else f"{100 * row.same_as_plain:.1f}",
        f"{row.tokens_per_pass:.2f}",
    ]


def _points(estimate: Estimate | None, *, signed: bool = False) -> str:
    if estimate is None:
        return _NO_VALUE
    value = f"{100 * estimate.value:{'+' if signed else ''}.1f}"
    return value if math.isnan(estimate.standard_error) else f"{value} ± {100 * estimate.standard_error:.1f}"


def markdown(report: Report) -> str:
    """The table and its caption as GitHub-flavoured Markdown."""
    lines = [report.header, ["---"] + ["---:"] * (len(report.header) - 1), *report.cells]
    facts = {name: value if name == "command" else _escaped(value) for name, value in report.provenance.items()}
    safe = dataclasses.replace(report, title=escape_markdown(report.title), provenance=facts)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + f"\n\n{safe.caption}\n"


def _escaped(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _escaped(item) for name, item in value.items()}
    return escape_markdown(value) if isinstance(value, str) else value


def code_span(text: str) -> str:
    """Text as inline code, on one line and without the backquotes that would end it."""
    return "`" + " ".join(text.split()).replace("`", "'") + "`"


def escape_markdown(text: str) -> str:
    """Text from data, as Markdown that shows it literally, on one line: no links, images, HTML, code or table cells."""
    line = html.escape(" ".join(text.split()), quote=False)
    return re.sub(r"(?<!\w)_|_(?!\w)|[\\`*\[\]|#]", r"\\\g<0>", line)


def to_json(report: Report) -> str:
    """The report as JSON; a standard error that does not exist (one problem) is null."""
    return json.dumps(_without_nan(dataclasses.asdict(report)), indent=2) + "\n"


def from_json(text: str) -> Report:
    """The report that `to_json` wrote.

    Raises:
        KeyError, TypeError, ValueError: another kind of JSON.
    """
    fields = json.loads(text)
    for name in ("rows", "single"):
        fields[name] = [_row(row) for row in fields[name]]
    fields["batch_size"] = whole(fields["batch_size"])
    fields["max_new_tokens"] = None if fields["max_new_tokens"] is None else whole(fields["max_new_tokens"])
    return Report(**fields)


def whole(value: Any) -> int:
    """A number from a file, which goes into a table as it is; raises TypeError for anything else."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{value!r} is not a whole number")
    return value


def _row(fields: dict[str, Any]) -> TableRow:
    estimates = {name: _estimate(fields[name]) for name in ("accuracy", "versus_base", "versus_plain")}
    setting = dict(fields["setting"])
    if isinstance(setting.get("threshold"), list):  # what JSON makes of a tuple
        setting["threshold"] = tuple(setting["threshold"])
    setting["k"] = None if setting.get("k") is None else whole(setting["k"])
    return TableRow(**fields | estimates | {"setting": Setting(**setting), "problems": whole(fields["problems"])})


def _estimate(fields: dict[str, Any] | None) -> Estimate | None:
    if fields is None:
        return None
    error = fields["standard_error"]
    return Estimate(fields["value"], math.nan if error is None else error)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def fingerprint(report: Report) -> str:
    """Tells reports apart: SHA-256 of the JSON."""
    return hashlib.sha256(to_json(report).encode()).hexdigest()


def replace_table(text: str, name: str, table: str) -> str:
    """Put a table between `<!-- table:name -->` and `<!-- /table:name -->` of a document.

    Raises:
        ValueError: the document has no such pair of markers.
    """
    opening, closing = f"<!-- table:{name} -->", f"<!-- /table:{name} -->"
    before, found, rest = text.partition(opening)
    _, closed, after = rest.partition(closing)
    if not found or not closed:
        raise ValueError(f"The document has no {opening} ... {closing}; add the pair where the table belongs.")
    return f"{before}{opening}\n{table.rstrip()}\n{closing}{after}"
