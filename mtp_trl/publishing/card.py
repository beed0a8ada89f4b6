"""Render the model card from a model's provenance, results and calibration. The same facts always give the same text."""

from __future__ import annotations

import json
import re
import shlex
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResultEntry, ModelCard, ModelCardData

from ..modeling.files import PROVENANCE_FILE, is_hub_id, write_atomically
from ..modeling.gguf import base_label
from .calibration_file import CALIBRATION_FILE, Calibration, argument
from .report import Report, code_span, escape_markdown, from_json, markdown

PAPER = {
    "title": "Multi-Token Prediction via Self-Distillation",
    "id": "2602.06019",
    "citation": textwrap.dedent("""\
        @article{kirchenbauer2026multitoken,
            title  = {{Multi-Token Prediction via Self-Distillation}},
            author = {Kirchenbauer, John and others},
            year   = 2026,
            eprint = {arXiv:2602.06019},
        }"""),
}
TAGS = ("custom_generate", "mtp", "trl")
CARD = "README.md"
RESULTS_FOLDER = "mtp_results"
# The first line after a card's metadata. A card without this line was written by its author and is never overwritten.
_MARK_END = "Delete this line to keep your own text. -->"  # earlier versions start the mark with other words
MARK = f"<!-- mtp-trl overwrites this card on every push. {_MARK_END}"
_TEMPLATE = Path(__file__).with_name("model_card_template.md")


@dataclass(frozen=True)
class Evidence:
    """Measurements of a model that its card shows.

    Attributes:
        reports: results by file name, without the extension.
        plots: names of the results that have a plot.
        calibration: calibration of the model's threshold, or None.
    """

    reports: dict[str, Report] = field(default_factory=dict)
    plots: tuple[str, ...] = ()
    calibration: Calibration | None = None


def read_evidence(folder: str | Path) -> Evidence:
    """Read the results, plots and calibration in a model's folder, if there are any.

    Raises:
        ValueError: a file in the results folder is not a results file.
    """
    results = Path(folder) / RESULTS_FOLDER
    reports = {path.stem: read_report(path) for path in sorted(results.glob("*.json"))}
    plots = tuple(path.stem for path in sorted(results.glob("*.png")) if path.stem in reports)
    calibration = Path(folder) / CALIBRATION_FILE
    return Evidence(reports, plots, Calibration.read(calibration) if calibration.is_file() else None)


def read_report(path: Path) -> Report:
    """Read a results file of `mtp-trl eval`.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not a results file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {str(path)!r}; pass the results.json of `mtp-trl eval --output`.")
    try:
        return from_json(path.read_text(encoding="utf-8"))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is not a results.json of `mtp-trl eval` ({type(error).__name__}: {error}).") from error


def render_card(
    provenance: dict[str, Any],
    *,
    model_name: str,
    repo_id: str | None = None,
    evidence: Evidence | None = None,
    dataset_name: str | None = None,
    adapter_only: bool | None = None,
    tags: Sequence[str] = (),
) -> str:
    """Return the model card as Markdown.

    Args:
        provenance: content of `mtp_provenance.json`.
        model_name: title of the card.
        repo_id: repository id that the examples in the card load. Defaults to `model_name`.
        evidence: results to show. Without results, the card says that nothing has been measured yet.
        dataset_name: training dataset, used if the provenance names none.
        adapter_only: whether the repository contains only an adapter, without the base's weights. Defaults to the setting in
            the provenance.
        tags: additional tags for the card's metadata.
    """
    base, gguf_file, settings = provenance["base_model"], provenance.get("gguf_file"), provenance["settings"]
    evidence = evidence or Evidence()
    dataset = provenance.get("dataset") or dataset_name
    calibrated = None if evidence.calibration is None else evidence.calibration.threshold
    name = repo_id or model_name
    option = f" --gguf-file {_shell_quoted(gguf_file)}" if gguf_file else ""
    if adapter_only is None:
        adapter_only = bool(settings.get("adapter_only"))
    data = ModelCardData(
        library_name="peft" if adapter_only and not settings.get("exact") else "transformers",
        pipeline_tag="text-generation",
        license=provenance.get("license"),
        base_model=base if is_hub_id(base) else None,
        base_model_relation=("adapter" if adapter_only else "finetune") if is_hub_id(base) else None,
        datasets=[dataset] if dataset and is_hub_id(dataset) else None,
        tags=sorted({f"arxiv:{PAPER['id']}", *TAGS, *tags}),
    )
    card = ModelCard.from_template(
        data,
        template_path=str(_TEMPLATE),
        mark=MARK,
        model_name=escape_markdown(model_name),
        repo_id=json.dumps(name),
        base=json.dumps(base),
        gguf_file=gguf_file and json.dumps(gguf_file),
        repo_id_shell=_shell_quoted(name),
        evaluate=code_span(f"mtp-trl eval {_shell_quoted(name)} --base {_shell_quoted(base)}{option} --verify"),
        base_code=code_span(base_label(base, gguf_file)),
        mask_token=code_span(provenance["mask_token"]),
        lora=_lora_description(provenance.get("adapter")),
        dataset=dataset and code_span(dataset),
        paper=PAPER,
        provenance=provenance,
        exact=bool(settings.get("exact")),
        adapter_only=adapter_only,
        # A calibrated threshold is for unverified decoding; verified decoding loses no accuracy at low thresholds.
        confadapt=argument(
            settings.get("confadapt", 0.5 if settings.get("exact") else 0.9) if calibrated is None else calibrated
        ),
        by_position=isinstance(calibrated, tuple),
        verify=bool(settings.get("verify")) and calibrated is None,
        command=code_span(provenance["command"]),
        objective=code_span(provenance["objective"]),
        hardware=escape_markdown(provenance["hardware"] or ""),
        date=escape_markdown(str(provenance["date"] or "")),
        versions=[escape_markdown(f"{name} {version}") for name, version in (provenance["versions"] or {}).items()],
        sizes=(int(provenance["k_min"]), int(provenance["k_max"])),
        settings=_fenced(json.dumps(settings, indent=2), "json"),
        results=[(name, markdown(report).rstrip()) for name, report in evidence.reports.items()],
        plots=evidence.plots,
        results_folder=RESULTS_FOLDER,
        calibration=None if evidence.calibration is None else evidence.calibration.markdown(),
    )
    return str(card).rstrip() + "\n"


def _shell_quoted(name: str) -> str:
    return shlex.quote(" ".join(name.split()))


def _fenced(text: str, language: str) -> str:
    """Return text as a code block whose fence is longer than any run of backquotes in the text, which cannot end it."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def _lora_description(adapter: dict[str, Any] | None) -> str | None:
    """Describe the trained LoRA adapters; None for exact mode's adapter, full fine-tuning and unknown adapters."""
    if adapter is None or adapter["kind"] != "lora":
        return None
    targets = adapter["target_modules"]
    layers = targets if isinstance(targets, str) else ", ".join(targets)
    return f"LoRA of rank {int(adapter['rank'])} (alpha {float(adapter['alpha']):g}) on {code_span(layers)}"


def is_rendered(card: Path) -> bool:
    """Whether a card exists and was written by this package, so that it may be overwritten."""
    return card.is_file() and _MARK_END in card.read_text(encoding="utf-8")


def write_card(
    folder: str | Path,
    *,
    model_name: str,
    provenance: dict[str, Any] | None = None,
    repo_id: str | None = None,
    dataset_name: str | None = None,
    adapter_only: bool | None = None,
    tags: Sequence[str] = (),
) -> Path:
    """Write `folder`/README.md from the provenance, results and calibration in the folder.

    A card that its author has written, without the line that marks a generated card, is left unchanged.

    Args:
        folder: model folder, created if it does not exist.
        model_name: as in `render_card`, which also describes `repo_id`, `dataset_name`, `adapter_only` and `tags`.
        provenance: content of `mtp_provenance.json`. Read from the folder by default.

    Returns:
        The path of the card.

    Raises:
        FileNotFoundError: `provenance` is None and the folder has no `mtp_provenance.json`.
        ValueError: a file in the results folder is not a results file.
    """
    folder = Path(folder)
    path = folder / CARD
    if path.is_file() and not is_rendered(path):
        return path
    if provenance is None:
        provenance = json.loads((folder / PROVENANCE_FILE).read_text(encoding="utf-8"))
    folder.mkdir(parents=True, exist_ok=True)
    text = render_card(
        provenance,
        model_name=model_name,
        repo_id=repo_id,
        evidence=read_evidence(folder),
        dataset_name=dataset_name,
        adapter_only=adapter_only,
        tags=tags,
    )
    write_atomically(path, text)
    return path


def eval_result_entries(report: Report) -> list[EvalResultEntry]:
    """Return entries for the Hub's leaderboards: one per decoding setting of the adapted model.

    The list is empty if the results are not on a dataset of the Hub.
    """
    dataset = report.provenance.get("dataset")
    if dataset is None:
        return []
    facts = report.provenance
    return [
        EvalResultEntry(
            dataset_id=dataset["id"],
            task_id=dataset["task_id"],
            value=round(row.accuracy.value, 4),
            date=facts["date"],
            notes=f"{row.setting.label}, {row.tokens_per_pass:.2f} tokens per forward pass, n={row.problems}",
        )
        for row in report.rows
        if row.accuracy is not None and row.setting.kind != "base"
    ]
