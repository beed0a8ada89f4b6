"""Export a training folder to a new folder that contains exactly the files of a model repository."""

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
from .calibration_file import CALIBRATION_FILE, use_calibrated_threshold
from .card import RESULTS_FOLDER, eval_result_entries, read_evidence, read_report, write_card
from .merging import merge_folder, write_lora
from .repository import DECODER_FILE, decoder_names, is_linked_decoder, write_decoder_files

# Only these files are published: not optimizer states, training arguments (a pickle), logs or checkpoints.
WEIGHT_FILES = ("model*.safetensors", "model.safetensors.index.json")
_MODEL_FILES = ("config.json", "generation_config.json", "*.py", *WEIGHT_FILES)
# Files by the author and measurements. They are copied from the model's folder even if merged weights come from another folder.
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
    """Write the files of a model repository, and no others, into a new folder. If this fails, the folder is not created.

    Args:
        folder: output folder of a run, or one of its checkpoints. LoRA adapters are merged into their base.
        output: folder to create.
        repo_id: repository id that the examples in the card load. Defaults to the name of `output`.
        adapter_only: write only the exact-mode or LoRA adapter and the decoder, without the base's weights.
        results: `results.json` files of `mtp-trl eval` to show in the card. A `pareto.png` in the same folder is also copied.
        tags: additional tags for the card's metadata.
        merged: folder that already contains the LoRA adapters merged into their base.
        copy: function that copies a file from a source path to a target path.

    Returns:
        The path of the new folder.

    Raises:
        FileExistsError: `output` already exists.
        ValueError: the folder does not contain a model that this package trained, its weights are missing or are not
            safetensors, or `adapter_only` is set and the model has no adapter that can be published without its base.
    """
    folder, output = existing_folder(folder), Path(output)
    if output.exists():
        raise FileExistsError(f"{output} already exists; name another folder or remove it.")
    for path in results:
        read_report(path)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as temporary:
        partial = Path(temporary) / "model"
        is_lora = (folder / LORA_CONFIG).is_file()
        if is_lora and not adapter_only:
            weights = merged or merge_folder(folder, Path(temporary) / "merged")
            patterns = _repository_files(weights, adapter_only=False)
            _copy(weights, partial, [pattern for pattern in patterns if pattern not in _EVIDENCE], copy=copy)
            _copy(folder, partial, _EVIDENCE, copy=copy)
            use_calibrated_threshold(partial)
        else:
            _copy(folder, partial, _repository_files(folder, adapter_only=adapter_only), copy=copy)
        if is_linked_decoder(folder):  # bundled models import the installed package; a repository needs its own copy
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
    """Return the folder as a path; raise ValueError if it does not exist."""
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
    """Return the patterns of the files to copy from a folder; raise ValueError if one that is needed is missing."""
    for needed in (DECODER_FILE, PROVENANCE_FILE):
        if not (folder / needed).is_file():
            raise ValueError(f"{folder} has no {needed}: MTPDistillTrainer did not save it; pass the output folder of a run.")
    always = (*TOKENIZER_FILES, *decoder_names(folder), PROVENANCE_FILE, *_EVIDENCE)
    has_adapter, has_model = (folder / ADAPTER_FILE).is_file(), (folder / "config.json").is_file()
    if adapter_only and not has_adapter:
        raise ValueError(
            f"{folder} has no {ADAPTER_FILE}: adapter_only requires exact mode, or LoRA that trains no embedding rows but the "
            "mask token's and does not adapt an output embedding that was enlarged for it; leave adapter_only out."
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
        raise ValueError(f"{folder} lacks {', '.join(missing)}; all weights must be saved as safetensors.")


def matches(name: str, pattern: str) -> bool:
    """Whether a file's path in a repository matches a pattern. A pattern without a folder matches only top-level files."""
    return name.count("/") == pattern.count("/") and fnmatch(name, pattern)


def _add_results(path: Path, folder: Path) -> None:
    """Copy a results file and its plot. A `results.json`, the name that `mtp-trl eval` writes, is named after its folder."""
    folder.mkdir(exist_ok=True)
    name = path.resolve().parent.name if path.stem == "results" else path.stem
    plots = [plot for plot in (path.with_suffix(".png"), path.with_name("pareto.png")) if plot.is_file()]
    for source, target in ((path, folder / f"{name}.json"), *((plot, folder / f"{name}.png") for plot in plots[:1])):
        target.unlink(missing_ok=True)  # it may be a hard link to the file in the run's folder
        shutil.copyfile(source, target)


def _write_eval_results(folder: Path) -> None:
    for name, report in read_evidence(folder).reports.items():
        if entries := eval_result_entries(report):
            (folder / ".eval_results").mkdir(exist_ok=True)
            text = yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False)
            write_atomically(folder / ".eval_results" / f"{name}.yaml", text)
