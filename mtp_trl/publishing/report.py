"""A published comparison of decoding settings, and its form as Markdown and JSON."""

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
# One threshold for all positions of a block, or one each for positions 1, 2, ... The last also applies to all later positions.
Threshold = float | tuple[float, ...]


@dataclass(frozen=True)
class Estimate:
    """A mean over problems and its standard error, both in the unit of the values."""

    value: float
    standard_error: float


@dataclass(frozen=True)
class Setting:
    """One way to decode.

    Attributes:
        kind: `base` is plain greedy decoding with the model before adaptation. The other kinds decode with the student:
            `plain` one token per pass, `static` in blocks of `k` tokens, `confadapt` unverified with a threshold, `verified`
            with verification and a threshold, and `tree` with verification, a threshold and `k` blocks of masks per pass.
        k: block size of `static`; number of blocks of `tree`; None for the other kinds.
        threshold: of `confadapt`, `verified` and `tree`; None for the other kinds.
    """

    kind: Kind
    k: int | None = None
    threshold: Threshold | None = None

    @property
    def label(self) -> str:
        """Name of the setting in tables."""
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
        """Return the keyword arguments of `generate` that select this setting.

        For the student, every decoding argument is set, so that no default of the model's folder applies. For the base, the
        tokens that the student never emits are suppressed, so that both have the same vocabulary.

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
    """Format a threshold for the command line: 0.9, or 0.99/0.9/0.8 by position. Different thresholds give different texts."""
    positions = [threshold] if isinstance(threshold, float | int) else threshold
    return "/".join(f"{value:g}" if float(f"{value:g}") == value else repr(value) for value in positions)


@dataclass(frozen=True)
class TableRow:
    """The results of one setting: a row of the table.

    Attributes:
        setting: how the answers were decoded.
        problems: number of problems.
        accuracy: a share in [0, 1]; None without a scorer.
        versus_base: accuracy minus the base's, paired by problem; None without a scorer or a base.
        versus_plain: accuracy minus that of the student's single-token decoding, paired by problem; None without a scorer.
        same_as_base: share of answers that are identical to the base's, token for token, or in their text for tasks of
            lm-evaluation-harness; None without a base.
        same_as_plain: the same share for the student's single-token decoding.
        tokens_per_pass: generated tokens per forward pass.
        tokens_per_second: generated tokens per second.
        tokens_per_answer: generated tokens per problem.
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
    """The published results of a sweep over decoding settings.

    Attributes:
        title: name of the task.
        rows: one row per setting.
        batch_size: rows decoded together.
        max_new_tokens: longest answer, in tokens; None if the task sets it.
        provenance: how the numbers were measured; see `run_facts`.
        single: rows of a second sweep with batch size 1, on fewer problems, for the speed that a single user sees.
    """

    title: str
    rows: list[TableRow]
    batch_size: int
    max_new_tokens: int | None
    provenance: dict[str, Any]
    single: list[TableRow] = dataclasses.field(default_factory=list)

    @property
    def header(self) -> list[str]:
        """Column titles of the table."""
        speeds = [f"tokens per s, batch {self.batch_size}"] + (["tokens per s, batch 1"] if self.single else [])
        return [*COLUMNS, *speeds]

    @property
    def cells(self) -> list[list[str]]:
        """Rows of the table as text. Differences and errors are in percentage points."""
        single = {row.setting: row.tokens_per_second for row in self.single}
        table = []
        for row in self.rows:
            speeds = [row.tokens_per_second] + ([single[row.setting]] if self.single else [])
            table.append([*_cells(row), *(f"{speed:,.0f}" for speed in speeds)])
        return table

    @property
    def caption(self) -> str:
        """Text below the table: what the columns mean, and how the numbers were measured."""
        facts = self.provenance
        versions = facts["versions"]
        trees = ' "N blocks" is verified decoding that prepares the next draft for up to N possible rejection points.'
        blocks = trees if any(row.setting.kind == "tree" for row in self.rows) else ""
        speed = f' "tokens per s": {facts["speeds"]}.' if "speeds" in facts else ""
        template = "through the chat template" if facts.get("chat_template") else "without a chat template"
        harness = f"with the prompts and stop strings of lm-evaluation-harness, {template}"
        longest = f"up to {self.max_new_tokens} new tokens" if self.max_new_tokens else harness
        single = f", batch 1 on the first {self.single[0].problems}" if self.single else ""
        identical = "identical token for token" if self.max_new_tokens else "identical up to the stop string"
        return (
            f"{self.title}: {self.rows[0].problems} problems{single}, greedy decoding, {longest}. ± is one standard error. "
            '"vs base" and "vs k=1" are differences in accuracy, paired by problem. '
            f'"same as base" and "same as k=1" are shares of answers that are {identical}.{speed}{blocks} '
            f"Measured on {facts['date']} on {facts['hardware']}, with torch {versions['torch']} and "
            f"transformers {versions['transformers']}: {code_span(facts['command'])}."
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
    """Return the table and its caption as GitHub-flavoured Markdown."""
    lines = [report.header, ["---"] + ["---:"] * (len(report.header) - 1), *report.cells]
    facts = {name: value if name == "command" else _escaped(value) for name, value in report.provenance.items()}
    safe = dataclasses.replace(report, title=escape_markdown(report.title), provenance=facts)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + f"\n\n{safe.caption}\n"


def _escaped(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _escaped(item) for name, item in value.items()}
    return escape_markdown(value) if isinstance(value, str) else value


def code_span(text: str) -> str:
    """Return text as inline code: on one line, with backquotes replaced because they would end it."""
    return "`" + " ".join(text.split()).replace("`", "'") + "`"


def escape_markdown(text: str) -> str:
    """Escape untrusted text so that Markdown shows it literally, on one line: no links, images, HTML, code or table cells."""
    line = html.escape(" ".join(text.split()), quote=False)
    return re.sub(r"(?<!\w)_|_(?!\w)|[\\`*\[\]|#]", r"\\\g<0>", line)


def to_json(report: Report) -> str:
    """Return the report as JSON. A standard error that is undefined, because there is only one problem, is null."""
    return json.dumps(_without_nan(dataclasses.asdict(report)), indent=2) + "\n"


def from_json(text: str) -> Report:
    """Return the report that `to_json` wrote.

    Raises:
        KeyError, TypeError, ValueError: the text is not the JSON of a report.
    """
    fields = json.loads(text)
    for name in ("rows", "single"):
        fields[name] = [_row(row) for row in fields[name]]
    fields["batch_size"] = whole(fields["batch_size"])
    fields["max_new_tokens"] = None if fields["max_new_tokens"] is None else whole(fields["max_new_tokens"])
    return Report(**fields)


def whole(value: Any) -> int:
    """Return `value` unchanged; raise TypeError if it is not an integer. Numbers from files are printed without escaping."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{value!r} is not a whole number")
    return value


def _row(fields: dict[str, Any]) -> TableRow:
    estimates = {name: _estimate(fields[name]) for name in ("accuracy", "versus_base", "versus_plain")}
    setting = dict(fields["setting"])
    if isinstance(setting.get("threshold"), list):  # JSON has no tuples
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
    """Return the SHA-256 of the report's JSON, which identifies the report that a plot shows."""
    return hashlib.sha256(to_json(report).encode()).hexdigest()


def replace_table(text: str, name: str, table: str) -> str:
    """Return a document with `table` between its markers `<!-- table:name -->` and `<!-- /table:name -->`.

    Raises:
        ValueError: the document does not have both markers.
    """
    opening, closing = f"<!-- table:{name} -->", f"<!-- /table:{name} -->"
    before, found, rest = text.partition(opening)
    _, closed, after = rest.partition(closing)
    if not found or not closed:
        raise ValueError(f"The document has no {opening} ... {closing}; add the pair where the table belongs.")
    return f"{before}{opening}\n{table.rstrip()}\n{closing}{after}"
