"""The model card: what was adapted from what, what it cost and gained, how to use it. Pure text of facts that lie in files."""

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
# The first line of a card's text; a card without it is its author's own and is left alone.
MARK = "<!-- mtp-trl writes this card anew with every push. Delete this line to keep your own text. -->"
_TEMPLATE = Path(__file__).with_name("model_card_template.md")


@dataclass(frozen=True)
class Evidence:
    """What is known of a model beside its weights: results by file name, plots, and the calibration of its threshold."""

    reports: dict[str, Report] = field(default_factory=dict)
    plots: tuple[str, ...] = ()
    calibration: Calibration | None = None


def read_evidence(folder: str | Path) -> Evidence:
    """The results, plots and calibration in a model's folder; empty where there are none.

    Raises:
        ValueError: a results file that is not one.
    """
    results = Path(folder) / RESULTS_FOLDER
    reports = {path.stem: read_report(path) for path in sorted(results.glob("*.json"))}
    plots = tuple(path.stem for path in sorted(results.glob("*.png")) if path.stem in reports)
    calibration = Path(folder) / CALIBRATION_FILE
    return Evidence(reports, plots, Calibration.read(calibration) if calibration.is_file() else None)


def read_report(path: Path) -> Report:
    """A results file of `mtp-trl eval`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another kind of file.
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
    """The card's Markdown; equal facts give equal text.

    Args:
        provenance: what `mtp_provenance.json` holds.
        model_name: the heading.
        repo_id: what readers load; the model's name by default.
        evidence: results; without them the card says that there are none yet.
        dataset_name: what it was trained on, unless the provenance says so.
        adapter_only: whether the repository holds no weights of the base; the provenance's setting by default.
        tags: beside the usual ones.
    """
    base, settings = provenance["base_model"], provenance["settings"]
    evidence = evidence or Evidence()
    dataset = provenance.get("dataset") or dataset_name
    calibrated = None if evidence.calibration is None else evidence.calibration.threshold
    name = repo_id or model_name
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
        repo_id_shell=_on_a_command_line(name),
        evaluate=code_span(f"mtp-trl eval {_on_a_command_line(name)} --base {_on_a_command_line(base)} --verify"),
        base_code=code_span(base),
        mask_token=code_span(provenance["mask_token"]),
        lora=_lora(provenance.get("adapter")),
        dataset=dataset and code_span(dataset),
        paper=PAPER,
        provenance=provenance,
        exact=bool(settings.get("exact")),
        adapter_only=adapter_only,
        # a calibrated threshold is for unverified text; verified text loses nothing at low thresholds
        confadapt=argument(
            settings.get("confadapt", 0.5 if settings.get("exact") else 0.9) if calibrated is None else calibrated
        ),
        by_place=isinstance(calibrated, tuple),
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


def _on_a_command_line(name: str) -> str:
    return shlex.quote(" ".join(name.split()))


def _fenced(text: str, language: str) -> str:
    """A block of code whose fence is longer than any within it."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def _lora(adapter: dict[str, Any] | None) -> str | None:
    """The LoRA that was trained, in a few words; None for exact mode's adapter, full fine-tuning and unknown adapters."""
    if adapter is None or adapter["kind"] != "lora":
        return None
    targets = adapter["target_modules"]
    layers = targets if isinstance(targets, str) else ", ".join(targets)
    return f"LoRA of rank {int(adapter['rank'])} (alpha {float(adapter['alpha']):g}) on {code_span(layers)}"


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
    """Write `folder`/README.md from what lies in the folder, unless its author has made the card their own.

    Raises:
        FileNotFoundError: no provenance given, and none in the folder.
        ValueError: a results file that is not one.
    """
    folder = Path(folder)
    path = folder / CARD
    if path.is_file() and MARK not in path.read_text(encoding="utf-8"):
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
    """What the Hub shows beside a benchmark: one entry per decoding, for results on a dataset of the Hub.

    Other results have no place there and give none.
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
