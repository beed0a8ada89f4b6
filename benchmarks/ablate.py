"""Ablations: change one factor at a time from a fixed default, at an equal number of steps.

A cell trains the bundled base with `recipes/tiny.yaml`, overridden by `DEFAULT` and by the cell's own options, and decodes
held-out problems. Each finished cell is stored in a file, and the program runs the missing cells one after the other. It can
therefore be killed at any point and started again: only the running cell is lost.

    python benchmarks/ablate.py                                              # every cell, one seed
    python benchmarks/ablate.py --only default,objective --seeds 0,1,2       # some factors, three seeds
    python benchmarks/ablate.py --report                                     # table and plot of the finished cells
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import torch
from accelerate.utils import is_peft_model
from rich.console import Console

from mtp_trl.evaluation.loading import load_base, load_student
from mtp_trl.evaluation.sweep import decoding_settings, evaluate_decoding
from mtp_trl.evaluation.tasks import BUNDLED, load_task
from mtp_trl.launch import train
from mtp_trl.modeling.files import write_atomically
from mtp_trl.publishing.merging import save_merged
from mtp_trl.publishing.provenance import run_facts
from mtp_trl.publishing.report import Report, TableRow, from_json, threshold_text, to_json
from mtp_trl.recipe import read_recipe

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results" / "ablations"
RECIPE, BASE = ROOT / "recipes" / "tiny.yaml", ROOT / "mtp_trl" / "word_problems" / "base"
MODEL = Path("runs") / "ablate"
BATCH_SIZE, MAX_NEW_TOKENS = 50, 192
CONFADAPT, VERIFIED = 0.9, (0.5, 0.3)

# Changes to the recipe in every cell that does not override them: exact mode, 1,600 problems seen once, four per step.
DEFAULT = {
    "max_steps": "400",
    "per_device_train_batch_size": "4",
    "dataset_size": "1600",
    "lr_scheduler_kwargs": '{"num_decay_steps": 280}',
    "bf16": "true",
    "exact": "true",
    "ntp_coef": "0",
}
FULL = {"exact": "false", "ntp_coef": "1"}
LORA = {"use_peft": "true", "lora_r": "64", "lora_alpha": "128", "lora_target_modules": "all-linear"}

# Options of each level of each factor, on top of `DEFAULT`. Other settings are the recipe's: k in [2, 8], hard teacher, ground
# truth for the first 30 % of the steps, 96 slots per row, Muon at 3e-3, rank 64 on all linear layers. Levels of `full ...`
# change one setting of `adapter: full`.
FACTORS: dict[str, dict[str, dict[str, str]]] = {
    "default": {"exact": {}},
    "objective": {name: {"objective": name} for name in ("soft", "ground_truth", "reward", "reward_literal")},
    "ground_truth_warmup": {value: {"ground_truth_warmup": value} for value in ("0", "0.6")},
    "k": {"fixed at 8": {"k_min": "8"}},
    "optimizer": {
        f"AdamW {value}": {"muon": "false", "adam_beta2": "0.999", "learning_rate": value} for value in ("3e-3", "1e-3")
    },
    "adapter": {"full": FULL, "LoRA 64": FULL | LORA},
    "full ntp_coef": {value: FULL | {"ntp_coef": value} for value in ("0", "10")},
    "learning_rate": {value: {"learning_rate": value} for value in ("1e-3", "6e-3")},
    "slots_per_row": {value: {"slots_per_row": value} for value in ("32", "192")},
    "rank": {"16": {"exact_rank": "16", "exact_alpha": "32"}},
    "modules": {"attention": {"exact_target_modules": "q_proj k_proj v_proj o_proj"}},
    "k_max": {"16": {"k_max": "16"}},
}


@dataclass(frozen=True)
class Cell:
    """One level of a factor with one seed. `options` are all the options that override the recipe."""

    factor: str
    level: str
    seed: int
    options: dict[str, str]

    @property
    def name(self) -> str:
        return f"{self.factor}={self.level}, seed {self.seed}"

    @property
    def file_name(self) -> str:
        return "".join(c if c.isalnum() or c in "-." else "_" for c in f"{self.factor}-{self.level}-{self.seed}") + ".json"

    @property
    def arguments(self) -> list[str]:
        """The options as arguments of `mtp-trl train --config recipes/tiny.yaml`."""
        lists = {"exact_target_modules"}  # the command line takes the items of a list as separate words
        groups = [(f"--{name}", *(value.split() if name in lists else [value])) for name, value in self.options.items()]
        return [word for group in groups for word in group]


@dataclass(frozen=True)
class Result:
    """A finished cell: its decoding table, and the CPU time of its training in seconds, summed over all threads."""

    cell: Cell
    seconds: float
    report: Report

    def to_json(self) -> str:
        cell = {"factor": self.cell.factor, "level": self.cell.level, "seed": self.cell.seed, "options": self.cell.options}
        fields = {"cell": cell, "training_cpu_seconds": self.seconds, "report": json.loads(to_json(self.report))}
        return json.dumps(fields, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Result:
        fields = json.loads(text)
        return cls(Cell(**fields["cell"]), fields["training_cpu_seconds"], from_json(json.dumps(fields["report"])))

    def row(self, kind: str) -> TableRow:
        """Return the row of a kind of decoding; if there are several thresholds, the row with the most tokens per pass."""
        return max((row for row in self.report.rows if row.setting.kind == kind), key=lambda row: row.tokens_per_pass)


def cells(*, only: Sequence[str], seeds: Sequence[int], changes: dict[str, str]) -> list[Cell]:
    """Return the cells to run, with every seed.

    Args:
        only: factors, of which every level is run, or single levels as `factor=level`; empty for all factors.
        changes: options that override `DEFAULT`.

    Raises:
        ValueError: `only` has an unknown factor or level.
    """
    every = [(factor, level) for factor, levels in FACTORS.items() for level in levels]
    named = {name: [pair for pair in every if name in (pair[0], "=".join(pair))] for name in only}
    if unknown := [name for name, pairs in named.items() if not pairs]:
        raise ValueError(f"Unknown factor or level {', '.join(unknown)}; the factors are {', '.join(FACTORS)}.")
    selected = dict.fromkeys(pair for pairs in named.values() for pair in pairs) if only else every
    return [
        Cell(factor, level, seed, DEFAULT | changes | FACTORS[factor][level] | {"seed": str(seed)})
        for seed in seeds
        for factor, level in selected
    ]


def run_missing(selected: Iterable[Cell], folder: Path, measure: Callable[[Cell], Result]) -> None:
    """Measure the cells that have no file in `folder` yet, and write each cell's file as soon as it is finished.

    Raises:
        ValueError: a finished cell was run with other options. This is checked before anything is measured.
    """
    folder.mkdir(parents=True, exist_ok=True)
    missing = []
    for cell in selected:
        if not (folder / cell.file_name).is_file():
            missing.append(cell)
        elif (found := read(folder / cell.file_name).cell) != cell:
            raise ValueError(
                f"{folder / cell.file_name} was made with {found.options}, not {cell.options}; name another --output."
            )
    console = Console(stderr=True)
    for number, cell in enumerate(missing, start=1):
        console.rule(f"{number} of {len(missing)}: {cell.name}", align="left")
        result = measure(cell)
        write_atomically(folder / cell.file_name, result.to_json() + "\n")
        console.print(" | ".join(_line([result])), highlight=False)


def read(path: Path) -> Result:
    return Result.from_json(path.read_text(encoding="utf-8"))


def train_and_decode(cell: Cell, *, problems: int) -> Result:
    """Train the base with the cell's options, and decode the first `problems` held-out problems."""
    shutil.rmtree(MODEL, ignore_errors=True)  # files of several cells in one folder would load as a mixed model
    device = [] if torch.cuda.is_available() else ["--use_cpu", "true"]
    started = time.process_time()
    trainer = train(read_recipe(RECIPE, [*cell.arguments, *device, "--output_dir", str(MODEL)]))
    seconds = time.process_time() - started
    folder = MODEL
    if is_peft_model(trainer.model):
        folder = save_merged(trainer.model, trainer.processing_class, MODEL / "merged", trainer.provenance)
    task = load_task(BUNDLED, limit=problems)
    model, tokenizer = load_student(folder)
    sweep = evaluate_decoding(
        model,
        tokenizer,
        task.prompts,
        settings=decoding_settings(confadapt=[CONFADAPT], verified=VERIFIED),
        batch_size=BATCH_SIZE,
        max_new_tokens=MAX_NEW_TOKENS,
        scorer=task.scorer,
        base=load_base(BASE),
    )
    return Result(cell, round(seconds, 1), Report(task.title, sweep.rows, BATCH_SIZE, MAX_NEW_TOKENS, run_facts()))


# ---- table and plot ----

HEADER = (
    "factor", "level", "k=1 vs base", "same as base, %", "ConfAdapt 0.9: tokens per pass", "vs k=1",
    "verified: tokens per pass", "threshold", "training, CPU s",
)  # fmt: skip


def grouped(results: Iterable[Result]) -> list[list[Result]]:
    """Group the seeds of each level, in the order of `FACTORS`."""
    order = {(factor, level): [] for factor, levels in FACTORS.items() for level in levels}
    for result in sorted(results, key=lambda result: result.cell.seed):
        order[result.cell.factor, result.cell.level].append(result)
    return [seeds for seeds in order.values() if seeds]


def _line(seeds: Sequence[Result]) -> list[str]:
    """Return a line of the table, with the values of several seeds separated by commas."""

    def each(value: Callable[[Result], str]) -> str:
        return ", ".join(map(value, seeds))

    def points(row: TableRow, versus: str) -> str:
        estimate = getattr(row, versus)
        return f"{100 * estimate.value:+.1f}"

    return [
        seeds[0].cell.factor,
        seeds[0].cell.level,
        each(lambda result: points(result.row("plain"), "versus_base")),
        each(lambda result: f"{100 * (result.row('plain').same_as_base or 0.0):.0f}"),
        each(lambda result: f"{result.row('confadapt').tokens_per_pass:.2f}"),
        each(lambda result: points(result.row("confadapt"), "versus_plain")),
        each(lambda result: f"{result.row('verified').tokens_per_pass:.2f}"),
        each(lambda result: threshold_text(result.row("verified").setting.threshold)),
        f"{mean(result.seconds for result in seeds):.0f}",
    ]


def table(folder: Path = RESULTS) -> str:
    """Return the table of the finished cells as Markdown."""
    results = [read(path) for path in sorted(folder.glob("*.json"))]
    lines = [HEADER, ["---", "---"] + ["---:"] * (len(HEADER) - 2), *map(_line, grouped(results))]
    first = results[0].report
    dates = sorted({result.report.provenance["date"] for result in results})
    facts = first.provenance
    return (
        "\n".join("| " + " | ".join(line) + " |" for line in lines)
        + f"\n\n{first.rows[0].problems} held-out problems, greedy; commas separate the values of several seeds; k=1 and "
        "ConfAdapt: differences in accuracy, in points, paired by problem; verified: the best of the thresholds "
        f"{', '.join(map(threshold_text, VERIFIED))}. {' to '.join(dict.fromkeys((dates[0], dates[-1])))}, "
        f"{facts['hardware']}, torch {facts['versions']['torch']}; `python benchmarks/ablate.py`.\n"
    )


def plot(path: Path, folder: Path = RESULTS) -> None:
    """Plot every seed of every level as a point: tokens per pass when verified, and the accuracy of k=1 against the base."""
    from matplotlib.figure import Figure

    lines = grouped(read(path) for path in sorted(folder.glob("*.json")))
    figure = Figure(figsize=(8, 1.2 + 0.24 * len(lines)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, kind, value, label in (
        (left, "verified", lambda row: row.tokens_per_pass, "tokens per pass, verified"),
        (right, "plain", lambda row: 100 * row.versus_base.value, "accuracy of k=1 against the base, points"),
    ):
        for height, seeds in enumerate(lines):
            values = [value(result.row(kind)) for result in seeds]
            axes.plot(values, [height] * len(values), "o", color="#0072B2", markersize=5, alpha=0.8)
            if seeds[0].cell.factor == "default":
                axes.axvline(mean(values), color="#D55E00", linewidth=1, linestyle="--")
        axes.set_xlabel(label)
        axes.grid(axis="x", alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    left.set_yticks(range(len(lines)), [f"{seeds[0].cell.factor}: {seeds[0].cell.level}" for seeds in lines], fontsize=8)
    left.invert_yaxis()
    partial = path.with_name(f".{path.name}.partial")
    figure.savefig(partial, dpi=150, format="png")
    partial.replace(path)


def _integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only",
        type=lambda text: text.split(","),
        default=[],
        metavar="FACTOR[=LEVEL],...",
        help=f"factors or levels to run (default: all), out of {', '.join(FACTORS)}",
    )
    parser.add_argument("--seeds", type=_integers, default=[0], metavar="N,...", help="seeds of every level (default: 0)")
    parser.add_argument("--problems", type=int, default=100, help="held-out problems decoded in each cell (default: 100)")
    parser.add_argument(
        "--change", type=json.loads, default={}, metavar="JSON", help="options that override DEFAULT in every cell"
    )
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="FOLDER", help="results; the plot is FOLDER.png")
    parser.add_argument("--report", action="store_true", help="only print the table and draw the plot")
    options = parser.parse_args()
    if not options.report:
        selected = cells(only=options.only, seeds=options.seeds, changes=options.change)
        run_missing(selected, options.output, lambda cell: train_and_decode(cell, problems=options.problems))
    print(table(options.output))
    plot(options.output.with_suffix(".png"), options.output)


if __name__ == "__main__":
    main()
