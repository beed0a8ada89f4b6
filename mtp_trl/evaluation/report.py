"""A sweep on paper: Markdown, JSON, a terminal table and the plot of accuracy against acceleration."""

import dataclasses
import hashlib
import html
import importlib.util
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..hub import write_atomically
from .metrics import Estimate
from .sweep import Record, Row, Setting, Sweep, threshold_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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
    rows: list[Row]
    batch_size: int
    max_new_tokens: int | None  # None: as the task says
    provenance: dict[str, Any]
    single: list[Row] = dataclasses.field(default_factory=list)

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


def _cells(row: Row) -> list[str]:
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
    safe = dataclasses.replace(report, title=escape_markdown(report.title))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + f"\n\n{safe.caption}\n"


def code_span(text: str) -> str:
    """Text as inline code, on one line and without the backquotes that would end it."""
    return "`" + " ".join(text.split()).replace("`", "'") + "`"


def escape_markdown(text: str) -> str:
    """Text from data, as Markdown that shows it literally, on one line: no links, images, HTML, code or table cells."""
    line = html.escape(" ".join(text.split()), quote=False)
    return re.sub(r"(?<!\w)_|_(?!\w)|[\\`*\[\]|#]", r"\\\g<0>", line)


def terminal_table(report: Report) -> Table:
    """The same table for `rich`, in 80 columns; the verified rows, whose text is the model's own, stand out."""
    table = Table(title=report.title, title_justify="left", box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    for i, name in enumerate(report.header):
        table.add_column(name.replace(" ", "\n"), justify="left" if i == 0 else "right", vertical="bottom")
    for row, cells in zip(report.rows, report.cells, strict=True):
        style = "bold" if row.setting.kind in ("verified", "tree") else ""
        table.add_row(*(Text(cell.replace(" ± ", "±"), no_wrap=True) for cell in cells), style=style)
    return table


def to_json(report: Report) -> str:
    """The report as JSON; a standard error that does not exist (one problem) is null."""
    return json.dumps(_without_nan(dataclasses.asdict(report)), indent=2) + "\n"


def from_json(text: str) -> Report:
    """The report that `to_json` wrote."""
    fields = json.loads(text)
    for name in ("rows", "single"):
        fields[name] = [_row(row) for row in fields[name]]
    return Report(**fields)


def _row(fields: dict[str, Any]) -> Row:
    estimates = {name: _estimate(fields[name]) for name in ("accuracy", "versus_base", "versus_plain")}
    setting = dict(fields["setting"])
    if isinstance(setting.get("threshold"), list):  # what JSON makes of a tuple
        setting["threshold"] = tuple(setting["threshold"])
    return Row(**fields | estimates | {"setting": Setting(**setting)})


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


def plots(*, extra: str) -> bool:
    """Whether Matplotlib is there; without it, a line says that there will be no picture, and which extra has it."""
    if importlib.util.find_spec("matplotlib") is not None:
        return True
    missing = f"There will be no pareto.png: it needs matplotlib, which is not installed; pip install 'mtp-trl[{extra}]'."
    Console(stderr=True).print(missing, highlight=False, markup=False, soft_wrap=True)
    return False


def write_report(folder: Path, report: Report, sweep: Sweep | None = None, *, plot: bool = True) -> list[Path]:
    """Write results.md, results.json, a sweep's answers.jsonl and, with accuracies, pareto.png; each whole or not at all.

    Without `plot` there is no pareto.png.
    """
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        "results.md": markdown(report),
        "results.json": to_json(report),
    }
    if sweep is not None:
        texts["answers.jsonl"] = "".join(_answer_lines(sweep.records))
    for name, text in texts.items():
        write_atomically(folder / name, text)
    written = [folder / name for name in texts]
    if plot and report.rows[0].accuracy is not None:
        written.append(folder / "pareto.png")
        plot_pareto(report, written[-1])
    return written


def _answer_lines(records: dict[Setting, list[Record]]) -> list[str]:
    return [
        json.dumps({"decoding": setting.label, "problem": i, **dataclasses.asdict(record)}, ensure_ascii=False) + "\n"
        for setting, answers in records.items()
        for i, record in enumerate(answers)
    ]


def plot_pareto(report: Report, path: Path) -> None:
    """Accuracy against tokens per pass as a PNG: the base's level, static blocks, ConfAdapt, verified decoding.

    The PNG's metadata name the report as its `Source`, by `fingerprint`.

    Raises:
        ValueError: the report has no accuracies.
    """
    if report.rows[0].accuracy is None:
        raise ValueError("There is no accuracy to plot: the sweep ran without a scorer; plot only scored sweeps.")
    # The object interface: no global state, no display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    for row in report.rows:
        if row.setting.kind == "base" and row.accuracy is not None:
            _draw_base(axes, row.accuracy)
    for kind, style in _STYLES.items():
        rows = [row for row in report.rows if row.setting.kind == kind]
        if rows:
            _draw(axes, rows, **style)
    axes.set(xlabel="tokens per forward pass", ylabel="accuracy, %", ylim=(0, None))
    axes.margins(x=0.08)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, fontsize=8.5, loc="outside lower center", ncols=3)
    partial = path.with_name(f".{path.name}.partial")
    figure.savefig(partial, dpi=200, format="png", metadata={"Source": fingerprint(report)})
    partial.replace(path)


def fingerprint(report: Report) -> str:
    """Tells reports apart: SHA-256 of the JSON."""
    return hashlib.sha256(to_json(report).encode()).hexdigest()


# Colours of Okabe and Ito: told apart with any colour vision, and in print by marker and line.
_STYLES: dict[str, dict[str, Any]] = {
    "static": {"label": "static blocks", "color": "#999999", "marker": "s", "linestyle": ":"},
    "confadapt": {"label": "ConfAdapt", "color": "#0072B2", "marker": "o", "linestyle": "-"},
    "verified": {"label": "verified", "color": "#D55E00", "marker": "D", "linestyle": "none"},
    "tree": {"label": "verified, several blocks", "color": "#CC79A7", "marker": "^", "linestyle": "none"},
    "plain": {"label": "student, k=1", "color": "#000000", "marker": "*", "linestyle": "none"},
}


def _draw_base(axes: "Axes", accuracy: Estimate) -> None:
    value, error = 100 * accuracy.value, 100 * accuracy.standard_error
    axes.axhline(value, color="#009E73", linewidth=1.2, linestyle="--", label="base, k=1 (± standard error)")
    axes.axhspan(value - error, value + error, color="#009E73", alpha=0.12, linewidth=0)


def _draw(axes: "Axes", rows: list[Row], *, label: str, color: str, marker: str, linestyle: str) -> None:
    estimates = [row.accuracy for row in rows if row.accuracy is not None]
    axes.errorbar(
        [row.tokens_per_pass for row in rows],
        [100 * estimate.value for estimate in estimates],
        yerr=[100 * estimate.standard_error for estimate in estimates],
        label=label,
        color=color,
        marker=marker,
        linestyle=linestyle,
        markersize=10 if marker == "*" else 5,
        linewidth=1.4,
        elinewidth=0.8,
        capsize=2,
    )
    fastest = max(row.tokens_per_pass for row in rows)
    level = len({estimate.value for estimate in estimates}) == 1  # side by side: names would hide each other
    for row, estimate in zip(rows, estimates, strict=True):
        if level and row.tokens_per_pass < fastest:
            continue
        setting, point = row.setting, (row.tokens_per_pass, 100 * estimate.value)
        name = "" if setting.threshold is None else threshold_text(setting.threshold)
        name = f"k={setting.k}" if setting.kind == "static" else name
        if name:
            axes.annotate(name, point, xytext=(5, 5), textcoords="offset points", fontsize=7.5, color=color)


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
