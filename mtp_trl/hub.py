"""What makes a folder a publishable model: decoder, decoding defaults, provenance."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import is_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.utils import cached_file

from .custom_generate import generate as decoder

if TYPE_CHECKING:
    from .config import MTPDistillConfig

_PACKAGE = Path(__file__).parent.resolve()
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


def set_decoding_defaults(model: PreTrainedModel, *, confadapt: float | Sequence[float], verify: bool | None) -> None:
    """Defaults for `generate` that travel in generation_config.json."""
    config = model.generation_config
    config.confadapt, config.verify = confadapt, verify
    config._from_model_config = False  # otherwise transformers drops the extras when the file is read back


def provenance(*, base_model: str, args: MTPDistillConfig, mask_token: str, dataset: str | None = None) -> dict[str, Any]:
    """Who made this model: base, command, settings, versions, hardware, date. No secrets."""
    defaults = {field.name: field.default for field in dataclasses.fields(args)}
    filled_in = AcceleratorConfig().to_dict()
    filled_in.pop("use_configured_state", None)  # transformers takes it out
    defaults["accelerator_config"] = filled_in
    changed = {name: value for name, value in args.to_dict().items() if name in defaults and value != defaults[name]}
    return {
        "base_model": public_name(base_model),
        "dataset": None if dataset is None else public_name(dataset),
        "mask_token": mask_token,
        "objective": args.objective,
        "k_min": args.k_min,
        "k_max": args.k_max,
        "settings": {name: value for name, value in _public(changed).items() if value is not None},
        **run_facts(),
    }


def adapter_facts(model: Any) -> dict[str, Any] | None:
    """Kind, rank, alpha and layers of the adapter that a run trains; None where it trains the weights themselves."""
    if is_peft_model(model):
        config = model.active_peft_config
        targets = getattr(config, "target_modules", None)
        return {
            "kind": config.peft_type.value.lower(),
            "rank": getattr(config, "r", None),
            "alpha": getattr(config, "lora_alpha", None),
            "target_modules": targets if isinstance(targets, str) else sorted(targets or ()),
        }
    gated: decoder.MaskGatedAdapter | None = getattr(model, "mtp_adapter", None)
    if gated is None:
        return None
    layers = sorted({name.rpartition(".")[2] for name in gated.names})
    return {"kind": "exact", "rank": gated.rank, "alpha": gated.alpha, "target_modules": layers}


def run_facts() -> dict[str, Any]:
    """What every published number carries: the command behind it, the date, the hardware, the versions."""
    return {
        "command": shlex.join(_publishable([Path(sys.argv[0]).name, *sys.argv[1:]])),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "hardware": _hardware(),
        "versions": {"python": platform.python_version(), **_versions()},
    }


_SECRET_OPTION = re.compile(
    r"--?(?:token|[\w-]*(?:hub|hf|api|auth|access)[_-](?:token|key)|[\w-]*(?:secret|password)[\w-]*)", re.IGNORECASE
)
_SECRET_NAME = re.compile(r"token|secret|password|credential|(?:api|auth|access|private)[_-]?key", re.IGNORECASE)
_SECRET = re.compile(r"hf_\w{3,}")


def _publishable(arguments: list[str]) -> list[str]:
    """A command line without secrets, and with the names of files instead of where they lie on one machine."""
    shown, secret = [], False
    for argument in arguments:
        option, equals, value = argument.partition("=")
        if secret and not argument.startswith("-"):
            shown.append("***")
        elif _SECRET_OPTION.fullmatch(option):
            shown.append(f"{option}=***" if equals else option)
        elif Path(value or option).is_absolute():
            shown.append(option + equals + Path(value).name if equals else Path(option).name)
        else:
            shown.append(_SECRET.sub("***", argument))
        secret = not secret and not equals and _SECRET_OPTION.fullmatch(option) is not None
    return shown


def _public(settings: Mapping[Any, Any]) -> dict[str, Any]:
    """Settings without secrets and without what is not plain; a setting within a setting is looked at by itself."""
    return {
        name: _public(value) if isinstance(value, dict) else value
        for name, value in settings.items()
        if _is_plain(name) and not _SECRET_NAME.search(str(name)) and (isinstance(value, dict) or _is_plain(value))
    }


def _is_plain(value: Any) -> bool:
    if _SECRET.search(str(value)):
        return False
    if isinstance(value, list | tuple):
        return all(_is_plain(one) for one in value)
    return value is None or (isinstance(value, str | int | float) and "/" not in str(value))  # no paths of a machine


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
        write_adapter(folder, model, model.mtp_adapter, provenance, tensors=adapter)
    write_atomically(folder / PROVENANCE_FILE, json.dumps(provenance, indent=2) + "\n")


def write_adapter(
    folder: Path,
    model: PreTrainedModel,
    adapter: decoder.MaskGatedAdapter,
    provenance: dict[str, Any],
    *,
    tensors: dict[str, Tensor] | None = None,
) -> None:
    """A mask-gated adapter of a model with what its base must know to decode with it; `tensors` where its own are sharded."""
    adapter.base = (provenance["base_model"], adapter.base[1])
    adapter.defaults = {name: getattr(model.generation_config, name) for name in ("confadapt", "verify")}
    save_adapter(folder / decoder.ADAPTER_FILE, tensors or adapter.by_file_name(), adapter.metadata())


def public_name(source: str) -> str:
    """A Hub id or a path inside this package as it is; of other files the name, since their paths mean nothing elsewhere."""
    path = Path(source)
    if path.resolve().is_relative_to(_PACKAGE) and path.exists():
        return str(Path(_PACKAGE.name) / path.resolve().relative_to(_PACKAGE))
    return path.name if path.exists() or not is_hub_id(source) else source


def repository_file(name: str | Path, file: str, revision: str | None = None) -> str | None:
    """Where a file of a folder or of a repository on the Hub lies; None where it has none."""
    path: str | None = cached_file(str(name), file, revision=revision, _raise_exceptions_for_missing_entries=False)
    return path


def is_hub_id(name: str) -> bool:
    """Whether a name can be a repository's: owner/name."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None


def save_adapter(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """A mask-gated adapter, in LoRA's format but not under LoRA's name: transformers would load it ungated."""
    partial = path.with_name(f".{path.name}.partial")
    save_file({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}, partial, metadata=metadata)
    partial.replace(path)


def write_decoding_defaults(folder: Path, *, confadapt: float | Sequence[float], verify: bool) -> None:
    """Other defaults for a saved model: in its generation_config.json and in an exact mode's adapter.

    A block of its own is none of them any more: thresholds are calibrated with the largest one.
    """
    path, adapter = folder / "generation_config.json", folder / decoder.ADAPTER_FILE
    if adapter.is_file():
        with safe_open(adapter, framework="pt") as file:
            metadata = file.metadata() | {"defaults": json.dumps({"confadapt": confadapt, "verify": verify})}
        save_adapter(adapter, load_file(adapter), metadata)
    if path.is_file():
        config = json.loads(path.read_text(encoding="utf-8")) | {"confadapt": confadapt, "verify": verify}
        config.pop("mtp_k", None)
        write_atomically(path, json.dumps(config, indent=2) + "\n")


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
