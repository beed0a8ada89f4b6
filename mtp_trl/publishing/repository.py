"""What makes saved weights a repository that loads by itself: decoder, decoding defaults, adapter, provenance."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import get_relative_import_files

from .. import custom_generate as decoder
from ..custom_generate.adapter import MaskGatedAdapter, adapter_of
from ..custom_generate.adapter_file import ADAPTER_FILE, DECODING_DEFAULTS, by_file_name, metadata_of, read_adapter
from ..custom_generate.base import check_base
from ..modeling.files import PROVENANCE_FILE, write_atomically

DECODER_FILE = "custom_generate/generate.py"  # where transformers looks for a model's own `generate`
_SOURCE = Path(decoder.__file__).parent
# In place of the decoder in this checkout's own models, which so need no copies of it. It takes no link that git, a zip
# archive or Windows could lose, but the installed package.
LINK = '''"""The decoder of the installed mtp-trl. `mtp-trl export` writes a folder with a decoder of its own."""

from typing import Any

from mtp_trl.custom_generate import generate as decoder


def __getattr__(name: str) -> Any:
    return getattr(decoder, name)
'''


def decoder_files() -> dict[str, str]:
    """The decoder that travels with models: text by the name of the file."""
    paths = sorted(path for path in _SOURCE.glob("*.py") if path.name != "__init__.py")
    return {path.name: path.read_text(encoding="utf-8") for path in paths}


def write_decoder_files(folder: Path) -> None:
    """This version's decoder into a model's folder; `generate.py` last, since it needs the others."""
    place = (folder / DECODER_FILE).parent
    place.mkdir(parents=True, exist_ok=True)
    for name, text in sorted(decoder_files().items(), key=lambda file: file[0] == "generate.py"):
        write_atomically(place / name, text)


def link_decoder(folder: Path) -> None:
    """Let a model's folder use the installed package's decoder: for models that live in this checkout."""
    (folder / DECODER_FILE).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / DECODER_FILE, LINK)


def is_linked_decoder(folder: Path) -> bool:
    """Whether `link_decoder` wrote the folder's decoder."""
    file = folder / DECODER_FILE
    return file.is_file() and file.read_text(encoding="utf-8") == LINK


def decoder_names(folder: Path) -> list[str]:
    """The decoder's files in a model's folder: `generate.py` and what it imports, by their names in a repository."""
    file = folder / DECODER_FILE
    paths = {file, *map(Path, get_relative_import_files(file))}
    return sorted(path.relative_to(folder).as_posix() for path in paths)


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
    write_decoder_files(folder)
    if (folder / "config.json").is_file():  # not beside an adapter alone: its base brings a generation_config
        model.generation_config.save_pretrained(folder)
    if model.config.mtp.get("exact"):
        write_adapter(folder, model, model.mtp_adapter, provenance, tensors=adapter)
    write_atomically(folder / PROVENANCE_FILE, json.dumps(provenance, indent=2) + "\n")


def write_adapter(
    folder: Path,
    model: PreTrainedModel,
    adapter: MaskGatedAdapter,
    provenance: dict[str, Any],
    *,
    tensors: dict[str, Tensor] | None = None,
) -> None:
    """A mask-gated adapter of a model with what its base must know to decode with it; `tensors` where its own are sharded."""
    adapter.base = (provenance["base_model"], adapter.base[1])
    adapter.defaults = {name: getattr(model.generation_config, name) for name in DECODING_DEFAULTS}
    save_adapter(folder / ADAPTER_FILE, tensors or by_file_name(adapter), metadata_of(adapter))


def save_adapter(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """A mask-gated adapter, in LoRA's format but not under LoRA's name: transformers would load it without its gate."""
    partial = path.with_name(f".{path.name}.partial")
    save_file({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}, partial, metadata=metadata)
    partial.replace(path)


def write_decoding_defaults(folder: Path, *, confadapt: float | Sequence[float], verify: bool) -> None:
    """Change a saved model's defaults: in its generation_config.json and in an exact mode's adapter.

    A default block size is removed: thresholds are calibrated with the largest block.
    """
    path, adapter = folder / "generation_config.json", folder / ADAPTER_FILE
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
    saved, adapter = read_adapter(str(Path(folder) / ADAPTER_FILE)), adapter_of(model)
    assert adapter is not None
    saved.source = (str(folder), None)
    check_base(saved, model)
    if (saved.rank, saved.alpha, set(saved.names)) != (adapter.rank, adapter.alpha, set(adapter.names)):
        raise ValueError(
            f"The adapter in {folder} has rank {saved.rank}, alpha {saved.alpha} and {len(saved.names)} layers, this run "
            f"{adapter.rank}, {adapter.alpha} and {len(adapter.names)}; resume with the settings it was trained with."
        )
    tensors = by_file_name(saved)
    with torch.no_grad():
        for name, parameter in by_file_name(adapter).items():
            parameter.copy_(tensors[name])
