"""Record how a model was made or a number measured: base, command, settings, versions, hardware, date. No secrets or paths."""

from __future__ import annotations

import dataclasses
import os
import platform
import re
import shlex
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from transformers.trainer_pt_utils import AcceleratorConfig

from ..custom_generate.adapter import adapter_of
from ..modeling.files import public_name

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


def provenance_of_run(*, base_model: str, args: Any, mask_token: str, dataset: str | None = None) -> dict[str, Any]:
    """Return how a model was made: base, dataset, command, settings, versions, hardware and date, without secrets.

    `settings` contains only the arguments that differ from their defaults.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(args)}
    accelerator_defaults = AcceleratorConfig().to_dict()
    accelerator_defaults.pop("use_configured_state", None)  # transformers removes it
    defaults["accelerator_config"] = accelerator_defaults
    changed = {name: value for name, value in args.to_dict().items() if name in defaults and value != defaults[name]}
    return {
        "base_model": public_name(base_model),
        "gguf_file": args.gguf_file,
        "dataset": None if dataset is None else public_name(dataset),
        "mask_token": mask_token,
        "objective": args.objective,
        "k_min": args.k_min,
        "k_max": args.k_max,
        "settings": {name: value for name, value in _publishable_settings(changed).items() if value is not None},
        **run_facts(),
    }


def adapter_facts(model: Any) -> dict[str, Any] | None:
    """Return kind, rank, alpha and layers of the adapter that a run trains; None if it trains the model's own weights."""
    if is_peft_model(model):
        config = model.active_peft_config
        targets = getattr(config, "target_modules", None)
        return {
            "kind": config.peft_type.value.lower(),
            "rank": getattr(config, "r", None),
            "alpha": getattr(config, "lora_alpha", None),
            "target_modules": targets if isinstance(targets, str) else sorted(targets or ()),
        }
    gated = adapter_of(model)
    if gated is None:
        return None
    layers = sorted({name.rpartition(".")[2] for name in gated.names})
    return {"kind": "exact", "rank": gated.rank, "alpha": gated.alpha, "target_modules": layers}


def run_facts() -> dict[str, Any]:
    """Return the facts that every published number is stored with: command, date, hardware and versions."""
    return {
        "command": shlex.join(_publishable_command([Path(sys.argv[0]).name, *sys.argv[1:]])),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "hardware": _hardware(),
        "versions": {"python": platform.python_version(), **_versions()},
    }


_SECRET_OPTION = re.compile(
    r"--?(?:token|[\w-]*(?:hub|hf|api|auth|access)[_-](?:token|key)|[\w-]*(?:secret|password)[\w-]*)", re.IGNORECASE
)
_SECRET_NAME = re.compile(r"token|secret|password|credential|(?:api|auth|access|private)[_-]?key", re.IGNORECASE)
_SECRET = re.compile(r"hf_\w{3,}")


def _publishable_command(arguments: list[str]) -> list[str]:
    """Return a command line with secrets masked and absolute paths shortened to file names."""
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


def _publishable_settings(settings: Mapping[Any, Any]) -> dict[str, Any]:
    """Drop secrets, strings that may be paths, and objects that are not scalars, lists or dicts, recursively."""
    return {
        name: _publishable_settings(value) if isinstance(value, dict) else value
        for name, value in settings.items()
        if _is_publishable(name) and not _SECRET_NAME.search(str(name)) and (isinstance(value, dict) or _is_publishable(value))
    }


def _is_publishable(value: Any) -> bool:
    if _SECRET.search(str(value)):
        return False
    if isinstance(value, list | tuple):
        return all(_is_publishable(item) for item in value)
    return value is None or (isinstance(value, str | int | float) and "/" not in str(value))  # no local paths


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
