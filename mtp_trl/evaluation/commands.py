"""What `mtp-trl eval`, `calibrate` and `show` do: load a model, decode, print and write."""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown
from rich.text import Text

from ..custom_generate.mtp_config import checked_thresholds
from ..modeling.files import is_hub_id
from ..publishing.calibration_file import CALIBRATION_FILE, Calibration, Measure
from ..publishing.provenance import run_facts
from ..publishing.report import Report, Setting, Threshold, threshold_text
from ..publishing.repository import write_decoding_defaults
from .calibration import BY_POSITION, THRESHOLDS, calibrate, check_size, compare
from .loading import base_name, identity, load_base, load_student
from .sweep import SPEEDS, Record, decode, decoding_settings, evaluate_decoding
from .tables import plots, terminal_table, write_report
from .tasks import Task


def run_eval(
    model: str,
    task: Task,
    *,
    base: str | None,
    ks: Sequence[int],
    thresholds: Sequence[Threshold],
    verify: bool,
    blocks: int = 1,
    batch_size: int,
    max_new_tokens: int,
    output: Path | None,
    trust_remote_code: bool = False,
) -> None:
    """Decode a task at k=1, in static blocks and at every threshold, also verified with `verify`; print the table.

    Args:
        blocks: with `verify` and more than 1, the thresholds also with so many blocks of masks in each pass.
        base: a model whose plain decoding the others are compared with; none by default. An adapter alone acts on it, too,
            and refuses one that it was not trained on.
        output: a folder for Markdown, JSON, answers and plot; nothing is written without one. A run that was interrupted
            goes on there.

    Raises:
        ValueError: a threshold that is no probability, a block below 2, a model that was not adapted.
    """
    _check(ks, thresholds)
    plot = output is not None and task.scorer is not None and plots(extra="eval")
    student, tokenizer = load_student(model, base=base, trust_remote_code=trust_remote_code)
    settings = _settings(ks, thresholds, verify=verify, blocks=blocks, base=base)
    parts = _parts(output, model, base, [*task.prompts, repr(settings), batch_size, max_new_tokens])
    sweep = evaluate_decoding(
        student,
        tokenizer,
        task.prompts,
        settings=settings,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        scorer=task.scorer,
        base=None if base is None else load_base(base),
        parts=parts,
    )
    facts = run_facts() | {"model": model, "base_model": base, "speeds": SPEEDS}
    report = Report(task.title, sweep.rows, batch_size, max_new_tokens, facts)
    console = Console()
    console.print(terminal_table(report))
    console.print(Text(report.caption), style="dim")
    if output is not None and parts is not None:
        console.print("\n".join(map(str, write_report(output, report, sweep, plot=plot))))
        shutil.rmtree(parts, ignore_errors=True)
        with suppress(OSError):  # others are there
            parts.parent.rmdir()


def _settings(
    ks: Sequence[int], thresholds: Sequence[Threshold], *, verify: bool, blocks: int, base: str | None
) -> list[Setting]:
    verified = thresholds if verify else ()
    trees = [(blocks, threshold) for threshold in verified] if blocks > 1 else ()
    return decoding_settings(ks=ks, confadapt=thresholds, verified=verified, trees=trees, base=base is not None)


def _parts(output: Path | None, model: str, base: str | None, asked: Sequence[str | int]) -> Path | None:
    """Where an evaluation keeps what it has finished: another place for other weights, or for anything else asked of them."""
    if output is None:
        return None
    return output / "parts" / hashlib.sha256(json.dumps([identity(model, base), asked]).encode()).hexdigest()[:16]


def run_tasks(
    model: str,
    tasks: Sequence[str],
    *,
    base: str | None,
    ks: Sequence[int],
    thresholds: Sequence[Threshold],
    verify: bool,
    blocks: int = 1,
    batch_size: int,
    limit: int | None = None,
    chat_template: bool | None = None,
    data: Mapping[str, Path] | None = None,
    tasks_folder: Path | None = None,
    output: Path | None,
    trust_remote_code: bool = False,
) -> None:
    """Tasks of lm-evaluation-harness at k=1, in static blocks and at every threshold; a table for each task.

    Args:
        blocks: as in `run_eval`.
        chat_template: whether prompts go through the tokenizer's chat template; None: as the paper did with the model's base.
        data: JSON Lines files in place of tasks' own test sets, by task.
        output: a folder, with one more for each task; a run that was interrupted goes on from what is there.

    Raises:
        ValueError: as `run_eval`; tasks that the harness does not know or that do not generate text.
    """
    from .harness import PAPER_CHAT_TEMPLATE, HarnessModel, check_task, run_settings, table

    _check(ks, thresholds)
    for task in tasks:
        check_task(task, tasks_folder)
    plot = output is not None and plots(extra="eval")
    student, tokenizer = load_student(model, base=base, trust_remote_code=trust_remote_code)
    if chat_template is None:
        chat_template = PAPER_CHAT_TEMPLATE.get(base_name(model) or base or "", False)
    if chat_template and not tokenizer.chat_template:
        raise ValueError(f"The tokenizer of {model} has no chat template; evaluate with --no-chat-template.")
    settings = _settings(ks, thresholds, verify=verify, blocks=blocks, base=base)
    harness = HarnessModel(student, tokenizer, base=None if base is None else load_base(base), batch_size=batch_size)
    console = Console()
    for task in tasks:
        parts = run_settings(
            harness,
            task,
            settings,
            parts=_parts(output, model, base, [batch_size]),
            limit=limit,
            chat_template=chat_template,
            data=(data or {}).get(task),
            tasks_folder=tasks_folder,
        )
        dataset = parts[Setting("plain")].dataset
        facts = run_facts() | {"model": model, "base_model": base, "chat_template": chat_template}
        if dataset is not None and is_hub_id(dataset):
            facts["dataset"] = {"id": dataset, "task_id": task}
        report = Report(task, table(parts), batch_size, None, facts)
        console.print(terminal_table(report))
        console.print(Text(report.caption), style="dim")
        if output is not None:
            console.print("\n".join(map(str, write_report(output / task, report, plot=plot))))


def run_calibrate(
    model: str,
    task: Task,
    *,
    max_drop: float,
    confidence: float,
    thresholds: Sequence[float] = THRESHOLDS,
    per_place: bool = False,
    batch_size: int,
    max_new_tokens: int,
) -> Calibration:
    """Find the lowest threshold that keeps the bound and make it the folder's default; the evidence goes beside it.

    Accuracy is compared where the task has an answer key, otherwise agreement with the model's own text. The threshold is for
    unverified text: a folder whose default was `verify=True` has `verify=False` then, and that is said.

    Args:
        per_place: also look for thresholds that differ by place.

    Raises:
        ValueError: not a folder, too few problems, or not even the strictest threshold keeps the bound; then nothing is
            changed.
    """
    _check((), thresholds)
    folder = Path(model)
    if not folder.is_dir():
        raise ValueError(f"{model} is no folder, and the threshold is written there; `hf download {model} --local-dir FOLDER`.")
    task = task.without_repetitions()
    measure: Measure = "agreement" if task.scorer is None else "accuracy"
    shapes = BY_POSITION if per_place else BY_POSITION[:1]
    check_size(len(task.prompts), max_drop=max_drop, confidence=confidence, measure=measure, shapes=len(shapes))
    student, tokenizer = load_student(model)

    def answers(setting: Setting) -> list[Record]:
        return decode(
            student,
            tokenizer,
            task.prompts,
            setting=setting,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            scorer=task.scorer,
        )

    own = answers(Setting("plain"))
    chosen, steps = calibrate(
        lambda threshold: compare(answers(Setting("confadapt", threshold=threshold)), own),
        max_drop=max_drop,
        confidence=confidence,
        measure=measure,
        thresholds=thresholds,
        shapes=shapes,
    )
    facts = run_facts() | {"data": task.title, "max_new_tokens": max_new_tokens}
    calibration = Calibration(measure, max_drop, confidence, chosen, steps, facts)
    Console().print(Markdown(calibration.markdown()))
    if chosen is None:
        raise ValueError(
            f"{model} is left as it was: even {threshold_text(steps[0].threshold)} loses too much to show less than "
            f"{max_drop:g}; take more problems or a larger bound. verify=True loses nothing at any threshold."
        )
    calibration.write(folder / CALIBRATION_FILE)
    write_decoding_defaults(folder, confadapt=chosen, verify=False)
    if getattr(student.generation_config, "verify", False):
        Console().print(
            f"{model} verified its text by default and does so no more: the threshold is for unverified text. "
            "verify=True in a call, or --verify, still gives exactly the model's own.",
            highlight=False,
            markup=False,
        )
    return calibration


def _check(ks: Sequence[int], thresholds: Sequence[Threshold]) -> None:
    for threshold in thresholds:
        checked_thresholds(threshold)
    for k in ks:
        if k < 2:
            raise ValueError(f"A static block has at least 2 tokens, got {k}; k=1 is always in the table.")
