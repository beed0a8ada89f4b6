"""What makes a folder a publishable model: decoder, decoding defaults, provenance, card; and its way to the Hub."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import os
import platform
import shlex
import sys
import textwrap
from collections.abc import Mapping
from concurrent.futures import Future
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import CommitInfo, HfApi, ModelCard, ModelCardData
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .custom_generate import generate as decoder

if TYPE_CHECKING:
    from peft import PeftModel

    from .config import MTPDistillConfig

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
PROVENANCE_FILE = "mtp_provenance.json"
_PACKAGES = (
    "mtp-trl",
    "torch",
    "transformers",
    "trl",
    "accelerate",
    "datasets",
    "peft",
    "deepspeed",
    "huggingface_hub",
)
_TEMPLATE = Path(__file__).with_name("model_card_template.md")


def set_decoding_defaults(model: PreTrainedModel, *, confadapt: float, verify: bool | None) -> None:
    """Defaults for `generate` that travel in generation_config.json."""
    config = model.generation_config
    config.confadapt, config.verify = confadapt, verify
    config._from_model_config = False  # otherwise transformers drops the extras when the file is read back


def provenance(*, base_model: str, args: MTPDistillConfig, mask_token: str) -> dict[str, Any]:
    """Who made this model: base, command, settings, versions, hardware, date. No secrets."""
    defaults = {field.name: field.default for field in dataclasses.fields(args)}
    settings = {
        name: value
        for name, value in args.to_dict().items()
        if name in defaults and value != defaults[name] and "token" not in name and _is_plain(value)
    }
    return {
        "base_model": base_model,
        "mask_token": mask_token,
        "objective": args.objective,
        "k_min": args.k_min,
        "k_max": args.k_max,
        "settings": settings,
        **run_facts(),
    }


def run_facts() -> dict[str, Any]:
    """What every published number carries: the command behind it, the date, the hardware, the versions."""
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "hardware": _hardware(),
        "versions": {"python": platform.python_version(), **_versions()},
    }


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int | float | bool | list) and "/" not in str(value)  # no paths of a machine


def _versions() -> dict[str, str]:
    installed = {}
    for package in _PACKAGES:
        try:
            installed[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return installed


def _hardware() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    return f"CPU ({platform.machine()}, {os.cpu_count()} cores)"


def write_decoder(
    folder: str | Path,
    model: PreTrainedModel,
    provenance: dict[str, Any],
    *,
    adapter: dict[str, Tensor] | None = None,
) -> None:
    """Add to saved weights what `save_pretrained` leaves out: the decoder, its defaults, provenance, an exact adapter.

    `adapter` are the adapter's tensors where the model's own are sharded.
    """
    folder = Path(folder)
    (folder / "custom_generate").mkdir(parents=True, exist_ok=True)
    source = Path(str(decoder.__file__)).read_text(encoding="utf-8")
    write_atomically(folder / "custom_generate" / "generate.py", source)
    if (folder / "config.json").is_file():  # not beside an adapter alone: its base brings a generation_config
        model.generation_config.save_pretrained(folder)
    if model.config.mtp.get("exact"):
        exact: decoder.MaskGatedAdapter = model.mtp_adapter
        exact.base = (_public_name(provenance["base_model"]), exact.base[1])
        exact.defaults = {name: getattr(model.generation_config, name) for name in ("confadapt", "verify")}
        _save_adapter(folder / decoder.ADAPTER_FILE, adapter or exact.by_file_name(), exact.metadata())
    write_atomically(folder / PROVENANCE_FILE, json.dumps(provenance, indent=2) + "\n")


def _public_name(base: str) -> str:
    """A Hub id as it is; of a folder the name alone, since its path means nothing elsewhere."""
    return Path(base).name if Path(base).is_dir() else base


def _save_adapter(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """In LoRA's format, but not under LoRA's name: transformers would load an `adapter_config.json` ungated."""
    partial = path.with_name(f".{path.name}.partial")
    save_file({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}, partial, metadata=metadata)
    partial.replace(path)


def load_adapter(model: PreTrainedModel, folder: str | Path) -> None:
    """Read back what `write_decoder` wrote, into the adapter that `model` has.

    Raises:
        ValueError: the adapter was trained on another base, or has another shape.
    """
    path = Path(folder) / decoder.ADAPTER_FILE
    with safe_open(path, framework="pt") as file:
        saved = decoder.MaskGatedAdapter.from_tensors(load_file(path), file.metadata())
    saved.source = (str(folder), None)
    saved.check_base(model)
    adapter: decoder.MaskGatedAdapter = model.mtp_adapter
    if (saved.rank, saved.alpha, set(saved.names)) != (adapter.rank, adapter.alpha, set(adapter.names)):
        raise ValueError(
            f"The adapter in {folder} has rank {saved.rank}, alpha {saved.alpha} and {len(saved.names)} layers, this run "
            f"{adapter.rank}, {adapter.alpha} and {len(adapter.names)}; resume with the settings it was trained with."
        )
    with torch.no_grad():
        for name, parameter in adapter.by_file_name().items():
            parameter.copy_(saved.by_file_name()[name])


def write_atomically(path: Path, text: str) -> None:
    """Replace a file whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def write_card(
    folder: str | Path,
    *,
    model_name: str,
    provenance: dict[str, Any],
    repo_id: str | None = None,
    dataset_name: str | None = None,
    tags: list[str] | tuple[str, ...] = (),
) -> Path:
    """Render the model card into `folder`/README.md."""
    base = provenance["base_model"]
    is_repo_id = not Path(base).is_dir()
    relation = "adapter" if provenance["settings"].get("adapter_only") else "finetune"
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=base if is_repo_id else None,
        base_model_relation=relation if is_repo_id else None,
        datasets=[dataset_name] if dataset_name else None,
        tags=sorted({"mtp", "trl", "custom_generate", f"arxiv:{PAPER['id']}", *tags}),
    )
    card = ModelCard.from_template(
        data,
        template_path=str(_TEMPLATE),
        model_name=model_name,
        repo_id=repo_id or model_name,
        base=base if is_repo_id else Path(base).name,
        paper=PAPER,
        provenance=provenance,
        settings=json.dumps(provenance["settings"], indent=2),
    )
    path = Path(folder) / "README.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, str(card))
    return path


def save_merged(model: PeftModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path, provenance: dict[str, Any]) -> Path:
    """Merge the adapters into a copy of the base and save it as a model that loads by itself."""
    folder = Path(folder)
    merged = copy.deepcopy(model).merge_and_unload()
    merged.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_decoder(folder, merged, provenance)
    return folder


def upload(
    folder: str | Path,
    repo_id: str,
    *,
    commit_message: str | None = None,
    token: str | None = None,
    revision: str | None = None,
    blocking: bool = True,
) -> CommitInfo | Future[CommitInfo]:
    """One commit with everything a model repository needs and nothing of the training run."""
    send = functools.partial(
        HfApi(token=token).upload_folder,
        repo_id=repo_id,
        folder_path=folder,
        commit_message=commit_message,
        revision=revision,
        ignore_patterns=["_*", "checkpoint-*", "**/__pycache__/**", "*.partial", "optimizer.pt", "training_args.bin"],
    )
    return send() if blocking else send(run_as_future=True)
