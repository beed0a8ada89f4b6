"""From a training folder to a folder that holds a model repository and nothing else."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import eval_result_entries_to_yaml

from ..custom_generate.adapter_file import ADAPTER_FILE
from ..custom_generate.mtp_config import check_mtp_config
from ..modeling.files import LORA_CONFIG, PROVENANCE_FILE, TOKENIZER_FILES, write_atomically
from .calibration_file import CALIBRATION_FILE
from .card import RESULTS_FOLDER, eval_result_entries, read_evidence, read_report, write_card
from .merging import merge_folder, write_lora
from .repository import DECODER_FILE, decoder_names, is_linked_decoder, write_decoder_files

# What a repository holds. All else stays at home: optimizer states, training arguments (a pickle), logs, checkpoints.
WEIGHT_FILES = ("model*.safetensors", "model.safetensors.index.json")
_MODEL_FILES = ("config.json", "generation_config.json", "*.py", *WEIGHT_FILES)
# What the author wrote and what was measured; it belongs to the folder, also where merged weights come from elsewhere.
_EVIDENCE = (CALIBRATION_FILE, f"{RESULTS_FOLDER}/*", "LICENSE*", "README.md")


def export(
    folder: str | Path,
    output: str | Path,
    *,
    repo_id: str | None = None,
    adapter_only: bool = False,
    results: Sequence[Path] = (),
    tags: Sequence[str] = (),
    merged: Path | None = None,
    copy: Callable[[Path, Path], Any] = shutil.copy2,
) -> Path:
    """Write everything a model repository needs, and nothing else, into a new folder; whole or not at all.

    Args:
        folder: where a run saved its model, or one of its checkpoints. LoRA adapters are merged into their base.
        output: the folder to make.
        repo_id: what the card tells readers to load; the output's name by default.
        adapter_only: the adapter of exact mode, or the LoRA, and the decoder alone, without the base's weights.
        results: files `results.json` of `mtp-trl eval`, for the card; a `pareto.png` beside one goes along.
        tags: of the card.
        merged: a folder that holds LoRA adapters merged into their base already.
        copy: how a file gets there.

    Raises:
        FileExistsError: the output folder is there already.
        ValueError: nothing that this package trained, weights that are missing or are not safetensors, or an adapter
            asked of a model that has none.
    """
    folder, output = existing_folder(folder), Path(output)
    if output.exists():
        raise FileExistsError(f"{output} is there already; name another folder or remove it.")
    for path in results:
        read_report(path)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as temporary:
        partial = Path(temporary) / "model"
        is_lora = (folder / LORA_CONFIG).is_file()
        if is_lora and not adapter_only:
            weights = merged or merge_folder(folder, Path(temporary) / "merged")
            _copy(weights, partial, _repository_files(weights, adapter_only=False), copy=copy)
            _copy(folder, partial, _EVIDENCE, copy=copy)
        else:
            _copy(folder, partial, _repository_files(folder, adapter_only=adapter_only), copy=copy)
        if is_linked_decoder(folder):  # of this checkout's own models: a repository stands alone
            write_decoder_files(partial)
        if is_lora and adapter_only:
            write_lora(folder, partial)
        for path in results:
            _add_results(path, partial / RESULTS_FOLDER)
        _write_eval_results(partial)
        name = repo_id or output.name
        has_weights = (partial / "config.json").is_file()
        write_card(partial, model_name=name.split("/")[-1], repo_id=name, adapter_only=not has_weights, tags=tags)
        partial.rename(output)
    return output


def existing_folder(folder: str | Path) -> Path:
    """The folder as a path; raises ValueError where there is none."""
    if not Path(folder).is_dir():
        raise ValueError(f"There is no folder {str(folder)!r}; pass the output folder of a run or one of its checkpoints.")
    return Path(folder)


def _copy(source: Path, target: Path, patterns: Sequence[str], *, copy: Callable[[Path, Path], Any]) -> None:
    for path in sorted(source.rglob("*")):
        name = path.relative_to(source).as_posix()
        if path.is_file() and any(matches(name, pattern) for pattern in patterns):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            copy(path, target / name)


def _repository_files(folder: Path, *, adapter_only: bool) -> tuple[str, ...]:
    """What is copied of a folder, once it is clear that it is all there."""
    for needed in (DECODER_FILE, PROVENANCE_FILE):
        if not (folder / needed).is_file():
            raise ValueError(f"{folder} has no {needed}: it is not what MTPDistillTrainer saves; pass its output folder.")
    always = (*TOKENIZER_FILES, *decoder_names(folder), PROVENANCE_FILE, *_EVIDENCE)
    has_adapter, has_model = (folder / ADAPTER_FILE).is_file(), (folder / "config.json").is_file()
    if adapter_only and not has_adapter:
        raise ValueError(
            f"{folder} has no {ADAPTER_FILE}: only exact mode, and LoRA that trains no more rows than the mask's and is "
            "on no embedding that has grown by it, can be published as an adapter alone; leave adapter_only out."
        )
    if adapter_only or (has_adapter and not has_model):
        return (*always, ADAPTER_FILE)
    _check_weights(folder)
    return (*_MODEL_FILES, *always, *([ADAPTER_FILE] if has_adapter else []))


def _check_weights(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8")) if (folder / "config.json").is_file() else {}
    if "mtp" not in config:
        raise ValueError(f"{folder} has no mask token (`mtp` in config.json); pass a model that this package adapted.")
    check_mtp_config(config["mtp"])
    if config["mtp"].get("exact") and not (folder / ADAPTER_FILE).is_file():
        raise ValueError(f"{folder} was trained in exact mode, but its {ADAPTER_FILE} is missing.")
    index = folder / "model.safetensors.index.json"
    needed = {"model.safetensors"}
    if index.is_file():
        needed = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    if missing := sorted(name for name in needed if not (folder / name).is_file()):
        raise ValueError(f"{folder} lacks {', '.join(missing)}; weights are published as safetensors, and all of them.")


def matches(name: str, pattern: str) -> bool:
    """Whether a file's name in a repository fits a pattern; one without a folder means the top folder only."""
    return name.count("/") == pattern.count("/") and fnmatch(name, pattern)


def _add_results(path: Path, folder: Path) -> None:
    """Under the name of its folder if it is called results.json, as `mtp-trl eval` does."""
    folder.mkdir(exist_ok=True)
    name = path.resolve().parent.name if path.stem == "results" else path.stem
    plots = [plot for plot in (path.with_suffix(".png"), path.with_name("pareto.png")) if plot.is_file()]
    for source, target in ((path, folder / f"{name}.json"), *((plot, folder / f"{name}.png") for plot in plots[:1])):
        target.unlink(missing_ok=True)  # it may be a link to the run's own file
        shutil.copyfile(source, target)


def _write_eval_results(folder: Path) -> None:
    for name, report in read_evidence(folder).reports.items():
        if entries := eval_result_entries(report):
            (folder / ".eval_results").mkdir(exist_ok=True)
            text = yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False)
            write_atomically(folder / ".eval_results" / f"{name}.yaml", text)
