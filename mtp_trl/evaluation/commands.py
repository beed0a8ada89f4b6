"""Run `mtp-trl eval` and `mtp-trl calibrate`: load a model, decode, print and write the results."""

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
from ..modeling.gguf import base_label
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
    gguf_file: str | None = None,
    ks: Sequence[int],
    thresholds: Sequence[Threshold],
    verify: bool,
    blocks: int = 1,
    batch_size: int,
    max_new_tokens: int,
    output: Path | None,
    trust_remote_code: bool = False,
) -> None:
    """Decode a task at k=1, in static blocks and at every threshold, and print the table.

    Args:
        base: a base model that is decoded as well and compared with; None omits the comparison. An adapter-only repository
            is applied to this base, which must be the one that it was trained on.
        gguf_file: the GGUF file in `base` from which its weights are read, dequantised.
        verify: also decode every threshold with verification.
        blocks: with `verify` and if more than 1, also decode every threshold with this many blocks of masks per pass.
        output: a folder for Markdown, JSON, answers and a plot; None writes nothing. An interrupted run resumes from the
            parts in this folder.

    Raises:
        ValueError: a threshold is not a probability, a block is shorter than 2, or the model was not adapted.
    """
    _check_settings(ks, thresholds)
    plot = output is not None and task.scorer is not None and plots(extra="eval")
    student, tokenizer = load_student(model, base=base, gguf_file=gguf_file, trust_remote_code=trust_remote_code)
    settings = _settings(ks, thresholds, verify=verify, blocks=blocks, base=base)
    arguments: list[str | int] = [*task.prompts, repr(settings), batch_size, max_new_tokens]
    parts = _parts_folder(output, model, base, arguments, gguf_file=gguf_file)
    sweep = evaluate_decoding(
        student,
        tokenizer,
        task.prompts,
        settings=settings,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        scorer=task.scorer,
        base=None if base is None else load_base(base, gguf_file=gguf_file),
        parts=parts,
    )
    facts = run_facts() | {"model": model, "base_model": base and base_label(base, gguf_file), "speeds": SPEEDS}
    report = Report(task.title, sweep.rows, batch_size, max_new_tokens, facts)
    console = Console()
    console.print(terminal_table(report))
    console.print(Text(report.caption), style="dim")
    if output is not None and parts is not None:
        console.print("\n".join(map(str, write_report(output, report, sweep, plot=plot))))
        shutil.rmtree(parts, ignore_errors=True)
        with suppress(OSError):  # not empty: another evaluation has parts there
            parts.parent.rmdir()


def _settings(
    ks: Sequence[int], thresholds: Sequence[Threshold], *, verify: bool, blocks: int, base: str | None
) -> list[Setting]:
    verified = thresholds if verify else ()
    trees = [(blocks, threshold) for threshold in verified] if blocks > 1 else ()
    return decoding_settings(ks=ks, confadapt=thresholds, verified=verified, trees=trees, base=base is not None)


def _parts_folder(
    output: Path | None, model: str, base: str | None, arguments: Sequence[str | int], *, gguf_file: str | None = None
) -> Path | None:
    """Return the folder for finished parts of an evaluation. It differs for different weights or arguments."""
    if output is None:
        return None
    parts = json.dumps([identity(model, base, gguf_file), arguments])
    return output / "parts" / hashlib.sha256(parts.encode()).hexdigest()[:16]


def run_tasks(
    model: str,
    tasks: Sequence[str],
    *,
    base: str | None,
    gguf_file: str | None = None,
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
    """Evaluate tasks of lm-evaluation-harness at k=1, in static blocks and at every threshold; print a table for each task.

    The arguments that are not listed here are those of `run_eval`.

    Args:
        limit: number of problems of each task; None means all.
        chat_template: whether to apply the tokenizer's chat template to prompts. None applies it if the paper does so for the
            model's base.
        data: JSON Lines files that replace the tasks' own test sets, by task.
        tasks_folder: a folder with additional tasks.
        output: a folder that gets a subfolder for each task; an interrupted run resumes from the parts in this folder.

    Raises:
        ValueError: as in `run_eval`, or the harness does not know a task, a task does not generate text, or the tokenizer has
            no chat template to apply.
    """
    from .harness import PAPER_CHAT_TEMPLATE, HarnessModel, check_task, run_settings, table

    _check_settings(ks, thresholds)
    for task in tasks:
        check_task(task, tasks_folder)
    plot = output is not None and plots(extra="eval")
    student, tokenizer = load_student(model, base=base, gguf_file=gguf_file, trust_remote_code=trust_remote_code)
    if chat_template is None:
        chat_template = PAPER_CHAT_TEMPLATE.get(base_name(model) or base or "", False)
    if chat_template and not tokenizer.chat_template:
        raise ValueError(f"The tokenizer of {model} has no chat template; evaluate with --no-chat-template.")
    settings = _settings(ks, thresholds, verify=verify, blocks=blocks, base=base)
    base_model = None if base is None else load_base(base, gguf_file=gguf_file)
    harness = HarnessModel(student, tokenizer, base=base_model, batch_size=batch_size)
    console = Console()
    for task in tasks:
        parts = run_settings(
            harness,
            task,
            settings,
            parts=_parts_folder(output, model, base, [batch_size], gguf_file=gguf_file),
            limit=limit,
            chat_template=chat_template,
            data=(data or {}).get(task),
            tasks_folder=tasks_folder,
        )
        dataset = parts[Setting("plain")].dataset
        facts = run_facts() | {"model": model, "base_model": base and base_label(base, gguf_file)}
        facts["chat_template"] = chat_template
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
    """Find the lowest threshold that satisfies the bound, make it the folder's default and save the evidence in the folder.

    Accuracy is compared if the task has an answer key, otherwise agreement with the model's own single-token output. The
    threshold is for unverified text, so the default becomes `verify=False`. If it was `verify=True`, a message says so.

    Args:
        per_place: also search thresholds that differ by position.

    Returns:
        The calibration, as written to the folder.

    Raises:
        ValueError: `model` is not a folder, there are too few problems, or even the strictest threshold breaks the bound. The
            folder is then unchanged.
    """
    _check_settings((), thresholds)
    folder = Path(model)
    if not folder.is_dir():
        raise ValueError(
            f"{model} is not a folder, but calibrate writes the threshold into the model's folder; "
            f"run `hf download {model} --local-dir FOLDER` first."
        )
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

    plain = answers(Setting("plain"))
    chosen, steps = calibrate(
        lambda threshold: compare(answers(Setting("confadapt", threshold=threshold)), plain),
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
            f"{model} is unchanged: even threshold {threshold_text(steps[0].threshold)} was not shown to lose less than "
            f"{max_drop:g}; use more problems or a larger bound. verify=True loses nothing at any threshold."
        )
    calibration.write(folder / CALIBRATION_FILE)
    write_decoding_defaults(folder, confadapt=chosen, verify=False)
    if getattr(student.generation_config, "verify", False):
        Console().print(
            f"{model} no longer verifies by default, because the threshold is for unverified text. "
            "Pass verify=True or --verify to get exactly the model's own text.",
            highlight=False,
            markup=False,
        )
    return calibration


def _check_settings(ks: Sequence[int], thresholds: Sequence[Threshold]) -> None:
    for threshold in thresholds:
        checked_thresholds(threshold)
    for k in ks:
        if k < 2:
            raise ValueError(f"A static block must have at least 2 tokens, got {k}; k=1 is always in the table.")
