"""Turn saved weights into a self-contained repository: add decoder, decoding defaults, adapter and provenance."""

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

DECODER_FILE = "custom_generate/generate.py"  # where transformers looks for a custom `generate`
_SOURCE = Path(decoder.__file__).parent
# `generate.py` of the models bundled in this checkout. It imports the installed package, so that they need no copies of the
# decoder. A symbolic link could get lost in git, in a zip archive or on Windows.
LINK = '''"""The decoder of the installed mtp-trl. `mtp-trl export` writes a folder with a decoder of its own."""

from typing import Any

from mtp_trl.custom_generate import generate as decoder


def __getattr__(name: str) -> Any:
    return getattr(decoder, name)
'''


def decoder_files() -> dict[str, str]:
    """Return the files of the decoder that is uploaded with every model: text by file name."""
    paths = sorted(path for path in _SOURCE.glob("*.py") if path.name != "__init__.py")
    return {path.name: path.read_text(encoding="utf-8") for path in paths}


def write_decoder_files(folder: Path) -> None:
    """Write this version's decoder into a model's folder; `generate.py` last, because it imports the others."""
    target = (folder / DECODER_FILE).parent
    target.mkdir(parents=True, exist_ok=True)
    for name, text in sorted(decoder_files().items(), key=lambda file: file[0] == "generate.py"):
        write_atomically(target / name, text)


def link_decoder(folder: Path) -> None:
    """Make a model's folder use the decoder of the installed package. For the models bundled in this checkout."""
    (folder / DECODER_FILE).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / DECODER_FILE, LINK)


def is_linked_decoder(folder: Path) -> bool:
    """Whether `link_decoder` wrote the decoder in the folder."""
    file = folder / DECODER_FILE
    return file.is_file() and file.read_text(encoding="utf-8") == LINK


def decoder_names(folder: Path) -> list[str]:
    """Return the paths of the decoder's files relative to the model's folder: `generate.py` and its relative imports."""
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
    """Add to saved weights what `save_pretrained` does not write: decoder, decoding defaults, provenance, exact-mode adapter.

    Args:
        folder: folder with the saved weights, or folder for an adapter without its base.
        model: the model that was saved.
        provenance: content of `mtp_provenance.json`.
        adapter: tensors of the exact-mode adapter by their names in its file, needed if the model's own are sharded.
    """
    folder = Path(folder)
    write_decoder_files(folder)
    if (folder / "config.json").is_file():  # not for an adapter without its base: the base has a generation_config
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
    """Write a mask-gated adapter, with the metadata that decoding on its base needs.

    Args:
        folder: model folder.
        model: model with the decoding defaults.
        adapter: the adapter to write.
        provenance: content of `mtp_provenance.json`.
        tensors: the adapter's tensors by their names in its file, needed if the adapter's own are sharded.
    """
    adapter.base, adapter.gguf_file = (provenance["base_model"], adapter.base[1]), provenance.get("gguf_file")
    adapter.defaults = {name: getattr(model.generation_config, name) for name in DECODING_DEFAULTS}
    save_adapter(folder / ADAPTER_FILE, tensors or by_file_name(adapter), metadata_of(adapter))


def save_adapter(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write the tensors and metadata of a mask-gated adapter to a safetensors file.

    The format is LoRA's but the file name is not, because transformers would load a LoRA file without the gate.
    """
    partial = path.with_name(f".{path.name}.partial")
    save_file({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}, partial, metadata=metadata)
    partial.replace(path)


def write_decoding_defaults(folder: Path, *, confadapt: float | Sequence[float], verify: bool) -> None:
    """Set the decoding defaults of a saved model, in its generation_config.json and in its exact-mode adapter.

    A default block size is removed, because thresholds are calibrated with the largest block.
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
    """Load the adapter that `write_decoder` saved in a folder into the adapter of `model`.

    Raises:
        ValueError: the saved adapter was trained on another base, or has another rank, alpha or other layers.
    """
    saved, adapter = read_adapter(str(Path(folder) / ADAPTER_FILE)), adapter_of(model)
    assert adapter is not None
    saved.source = (str(folder), None)
    check_base(saved, model)
    if (saved.rank, saved.alpha, set(saved.names)) != (adapter.rank, adapter.alpha, set(adapter.names)):
        raise ValueError(
            f"The adapter in {folder} has rank {saved.rank}, alpha {saved.alpha:g} and {len(saved.names)} layers, but this "
            f"run has rank {adapter.rank}, alpha {adapter.alpha:g} and {len(adapter.names)} layers; resume with the settings "
            "of the run that saved it."
        )
    tensors = by_file_name(saved)
    with torch.no_grad():
        for name, parameter in by_file_name(adapter).items():
            parameter.copy_(tensors[name])
