"""`mtp-trl demo`: adapt the bundled base, decode held-out problems in every mode and print the results."""

import ast
import os
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from ..evaluation.loading import load_base, load_student
from ..evaluation.sweep import SPEEDS, Record, decoding_settings, evaluate_decoding
from ..evaluation.tables import plots, terminal_table, write_report
from ..evaluation.tasks import BUNDLED, load_task
from ..modeling.files import write_atomically
from ..publishing.provenance import run_facts
from ..publishing.report import Report, Setting
from ..training.samples import block_texts, coloured
from .show import as_html

RECIPE = Path("recipes") / "tiny_exact.yaml"
OUTPUT = Path("demo_out")
PROBLEMS = 200
SINGLE_PROBLEMS = 15  # also decoded one at a time, for the speed that a single user sees
BATCH_SIZE = 50
MAX_NEW_TOKENS = 192
ACCELERATION_PREFIX = "acceleration/confadapt_"
SHOWN = Setting("verified", threshold=0.5)
SETTINGS = decoding_settings(
    ks=[2, 4], confadapt=[0.99, 0.95, 0.9, 0.8], verified=[0.9, 0.7, 0.5, 0.3], trees=[(8, 0.3), (8, 0.0)]
)


def run_demo(*, recipe: Path = RECIPE, output: Path = OUTPUT) -> None:
    """Adapt the bundled base, evaluate it, write a report and show one answer. The adapted model is saved in `output`/model.

    Raises:
        FileNotFoundError: the recipe does not exist; recipes are part of a checkout.
        ChildProcessError: the training run failed.
    """
    if not recipe.is_file():
        raise FileNotFoundError(f"There is no {recipe}; run the demo from a checkout of the repository.")
    console = Console()
    plot = plots(extra="demo")
    base_name = yaml.safe_load(recipe.read_text(encoding="utf-8"))["model_name_or_path"]
    folder = output / "model"
    console.rule("1  adapt the base: the student predicts blocks at masks, and the base corrects them", align="left")
    _train(recipe, folder, console)

    console.rule(f"2  decode {PROBLEMS} held-out problems in {len(SETTINGS)} ways", align="left")
    task = load_task(BUNDLED, limit=PROBLEMS)
    student, tokenizer = load_student(folder)
    base = load_base(base_name)
    options: dict[str, Any] = {
        "settings": SETTINGS,
        "max_new_tokens": MAX_NEW_TOKENS,
        "scorer": task.scorer,
        "base": base,
    }
    sweep = evaluate_decoding(student, tokenizer, task.prompts, batch_size=BATCH_SIZE, **options)
    single = evaluate_decoding(student, tokenizer, task.prompts[:SINGLE_PROBLEMS], batch_size=1, **options)
    facts = run_facts() | {"base_model": base_name, "recipe": str(recipe), "speeds": SPEEDS}
    report = Report(task.title, sweep.rows, BATCH_SIZE, MAX_NEW_TOKENS, facts, single.rows)
    console.print(terminal_table(report))
    console.print(Text(report.caption), style="dim")
    base_speed, speed = (
        next(row.tokens_per_second for row in single.rows if row.setting == setting) for setting in (Setting("base"), SHOWN)
    )
    console.print(
        f"One answer at a time: {base_speed:,.0f} tokens per second with transformers' greedy decoding of the base, "
        f"{speed:,.0f} with {SHOWN.label}: {speed / base_speed:.2f} times as many.",
        highlight=False,
    )
    written = write_report(output, report, sweep, plot=plot)

    console.rule("3  one answer, a colour for each forward pass", align="left")
    index, answer = _answer_to_show(sweep.records[SHOWN])
    texts = block_texts(tokenizer, answer.token_ids, answer.blocks)
    console.print(Padding(Text(task.prompts[index]), (0, 2)))
    console.print(Padding(coloured(texts), (0, 2)))
    console.print(f"{SHOWN.label}: {len(answer.token_ids)} tokens in {answer.passes} passes", highlight=False)
    written.append(output / "answer.html")
    write_atomically(written[-1], as_html(texts) + "\n")
    _print_next(console, folder, written, base_name=base_name, prompt=task.prompts[index])


def _train(recipe: Path, folder: Path, console: Console) -> None:
    """Run `accelerate launch RECIPE` in a subprocess and show its progress bar and output as they arrive."""
    accelerate = str(Path(sysconfig.get_path("scripts")) / "accelerate")
    command = [accelerate, "launch", str(recipe), "--output_dir", str(folder)]
    console.print("$ " + shlex.join(["accelerate", *command[1:]]), style="bold", highlight=False)
    # OpenMP reads this when it loads: threads that wait for each other then sleep instead of spinning.
    environment = {"OMP_WAIT_POLICY": "passive"} | os.environ | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            _print_log(line, console)
    if process.returncode != 0:
        raise ChildProcessError(
            f"Training failed with exit status {process.returncode}; its messages are above. "
            f"Run it separately to see more: {shlex.join(command)}"
        )


def _print_log(line: str, console: Console) -> None:
    """Print a line of output. Of a trainer log, print only agreement with the teacher by position and tokens per pass."""
    try:
        log = ast.literal_eval(line)
    except (ValueError, SyntaxError):
        console.print(Text(line.rstrip()))
        return
    agreement = [f"{float(value):.2f}" for name, value in log.items() if name.startswith("agreement/place_")]
    tokens_per_pass = [
        f"{float(value):.2f} at {name.rpartition('_')[2]}"
        for name, value in log.items()
        if name.startswith(ACCELERATION_PREFIX)
    ]
    if agreement:
        clear = "\r\x1b[K" if console.is_terminal else ""  # clears the progress bar, which is redrawn below
        print(f"{clear}agreement by position {' '.join(agreement)}  tokens per pass {', '.join(tokens_per_pass)}")


def _answer_to_show(answers: list[Record]) -> tuple[int, Record]:
    """Return the first correct answer and its index, or the first answer if none is correct."""
    return next(((i, answer) for i, answer in enumerate(answers) if answer.correct), (0, answers[0]))


def _print_next(console: Console, folder: Path, written: list[Path], *, base_name: str, prompt: str) -> None:
    console.rule("files written", align="left")
    for path in written:
        console.print(f"  {path}")
    console.print(f"  {folder}  (the adapted model, with its decoder)\n")
    program = sys.argv[0]  # as the user called it, so that the commands below work in the same directory
    quoted = prompt.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    for line in (
        f"{program} show {folder} $'{quoted}' --verify",
        f"{program} eval {folder} --base {base_name} --limit 100 --thresholds 0.9,0.5 --verify",
    ):
        console.print("  $ " + line, style="bold", highlight=False, markup=False, soft_wrap=True)
