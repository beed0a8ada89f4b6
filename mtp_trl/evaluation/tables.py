"""Show and save the results of a sweep: a terminal table, files, and a plot of accuracy against acceleration."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..modeling.files import write_atomically
from ..publishing.report import Estimate, Report, Setting, TableRow, fingerprint, markdown, threshold_text, to_json
from .sweep import Record, Sweep

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def terminal_table(report: Report) -> Table:
    """Return the report's table for `rich`, 80 columns wide. Verified rows, whose text is the model's own, are bold."""
    table = Table(title=report.title, title_justify="left", box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    for i, name in enumerate(report.header):
        table.add_column(name.replace(" ", "\n"), justify="left" if i == 0 else "right", vertical="bottom")
    for row, cells in zip(report.rows, report.cells, strict=True):
        style = "bold" if row.setting.kind in ("verified", "tree") else ""
        table.add_row(*(Text(cell.replace(" ± ", "±"), no_wrap=True) for cell in cells), style=style)
    return table


def plots(*, extra: str) -> bool:
    """Whether Matplotlib is installed. If not, print that no plot will be written and which extra installs it."""
    if importlib.util.find_spec("matplotlib") is not None:
        return True
    missing = f"There will be no pareto.png: it needs matplotlib, which is not installed; pip install 'mtp-trl[{extra}]'."
    Console(stderr=True).print(missing, highlight=False, markup=False, soft_wrap=True)
    return False


def write_report(folder: Path, report: Report, sweep: Sweep | None = None, *, plot: bool = True) -> list[Path]:
    """Write results.md, results.json, answers.jsonl if there is a sweep, and pareto.png if there are accuracies.

    Each file is written atomically. `plot=False` omits pareto.png.

    Returns:
        The paths of the files written.
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
    """Plot accuracy against tokens per pass as a PNG: the base's accuracy, static blocks, ConfAdapt and verified decoding.

    `Source` in the PNG's metadata is the report's `fingerprint`.

    Raises:
        ValueError: the report has no accuracies.
    """
    if report.rows[0].accuracy is None:
        raise ValueError("There is no accuracy to plot: the sweep ran without a scorer; plot only scored sweeps.")
    # The object-oriented interface needs no global state and no display.
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


# The colours of Okabe and Ito are distinct for any colour vision; markers and lines are distinct in print.
_STYLES: dict[str, dict[str, Any]] = {
    "static": {"label": "static blocks", "color": "#999999", "marker": "s", "linestyle": ":"},
    "confadapt": {"label": "ConfAdapt", "color": "#0072B2", "marker": "o", "linestyle": "-"},
    "verified": {"label": "verified", "color": "#D55E00", "marker": "D", "linestyle": "none"},
    "tree": {"label": "verified, several blocks", "color": "#CC79A7", "marker": "^", "linestyle": "none"},
    "plain": {"label": "student, k=1", "color": "#000000", "marker": "*", "linestyle": "none"},
}


def _draw_base(axes: Axes, accuracy: Estimate) -> None:
    value, error = 100 * accuracy.value, 100 * accuracy.standard_error
    axes.axhline(value, color="#009E73", linewidth=1.2, linestyle="--", label="base, k=1 (± standard error)")
    axes.axhspan(value - error, value + error, color="#009E73", alpha=0.12, linewidth=0)


def _draw(axes: Axes, rows: list[TableRow], *, label: str, color: str, marker: str, linestyle: str) -> None:
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
    level = len({estimate.value for estimate in estimates}) == 1  # labels at one height would overlap: label only the fastest
    for row, estimate in zip(rows, estimates, strict=True):
        if level and row.tokens_per_pass < fastest:
            continue
        setting, point = row.setting, (row.tokens_per_pass, 100 * estimate.value)
        name = "" if setting.threshold is None else threshold_text(setting.threshold)
        name = f"k={setting.k}" if setting.kind == "static" else name
        if name:
            axes.annotate(name, point, xytext=(5, 5), textcoords="offset points", fontsize=7.5, color=color)
