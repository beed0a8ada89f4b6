"""Prepare LoRA adapters for publishing: merged into their base, or without the base."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.integrations import is_deepspeed_zero3_enabled

from ..custom_generate.adapter import MaskGatedAdapter
from ..custom_generate.base import base_fingerprint
from ..modeling.files import LORA_CONFIG, LORA_FILE, public_name, read_provenance, write_atomically
from ..modeling.gguf import gguf_options
from ..modeling.lora import embedding_scale, fits_base, load_lora, named_base
from .repository import write_adapter, write_decoder

if TYPE_CHECKING:
    from peft import PeftModel

_PREFIX, _LORA_A = "base_model.model.", ".lora_A.weight"
_ROWS = ".token_adapter."  # PEFT's name for `trainable_token_indices`


def save_merged(model: PeftModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path, provenance: dict[str, Any]) -> Path:
    """Merge the adapters into a copy of the base and save it, with tokenizer and decoder, as a standalone model."""
    folder = Path(folder)
    merged = copy.deepcopy(model).merge_and_unload()
    merged.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_decoder(folder, merged, provenance)
    return folder


def merge_folder(folder: Path, output: Path) -> Path:
    """Load the adapters in the folder of a run or checkpoint, with their base, and save them with `save_merged`.

    Raises:
        ValueError: under the same conditions as `load_lora`.
        OSError: the base cannot be loaded.
    """
    name, revision, gguf_file = named_base(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    options = {"revision": revision, **gguf_options(gguf_file)}
    adapted = load_lora(lambda: AutoModelForCausalLM.from_pretrained(name, **options), tokenizer, folder)
    provenance = read_provenance(folder)
    assert provenance is not None
    return save_merged(adapted, tokenizer, output, provenance)


def write_mask_row(folder: Path, model: PeftModel, provenance: dict[str, Any]) -> None:
    """Save what the base lacks next to its LoRA adapters: the mask token's row, `config.mtp` and the decoding defaults.

    The row is read from the adapters' file, because the model's own row may be sharded. Nothing is written if the adapters do
    not fit the unmodified base, because other rows or whole matrices were trained as well.

    Args:
        folder: where PEFT has saved the adapters.
        model: base with the mask token and the adapters.
        provenance: content of `mtp_provenance.json`.
    """
    if not (folder / LORA_FILE).is_file() or not fits_base(model):
        return
    (embedding,) = model.active_peft_config.trainable_token_indices
    base = model.get_base_model()
    with safe_open(folder / LORA_FILE, framework="pt") as file:
        names = list(file.keys())
        row = file.get_tensor(next(name for name in names if f"{embedding}{_ROWS}trainable_tokens_delta" in name))[0].float()
    adapter = MaskGatedAdapter({}, rank=1, alpha=1, hidden_size=len(row))
    with torch.no_grad():
        adapter.mask_row.weight.copy_(row * embedding_scale(*base.get_input_embeddings().modules()))
    adapter.mtp = base.config.mtp
    adapter.lora_layers = [name[len(_PREFIX) : -len(_LORA_A)] for name in names if name.endswith(_LORA_A)]
    fingerprint = None if is_deepspeed_zero3_enabled() else base_fingerprint(base, adapter.lora_layers)
    adapter.base = ("", fingerprint)
    write_adapter(folder, base, adapter, provenance)


def write_lora(folder: Path, output: Path) -> None:
    """Write LoRA adapters that fit the unmodified base, for a folder that `write_mask_row` has prepared.

    PEFT also saves the mask token's row and the matrices that were enlarged for it. These are left out.
    """
    config = json.loads((folder / LORA_CONFIG).read_text(encoding="utf-8"))
    base = public_name(config["base_model_name_or_path"])
    config |= {"trainable_token_indices": None, "base_model_name_or_path": base}
    tensors = {name: tensor for name, tensor in load_file(folder / LORA_FILE).items() if "lora_" in name or ".bias" in name}
    save_file(tensors, output / LORA_FILE, metadata={"format": "pt"})
    write_atomically(output / LORA_CONFIG, json.dumps(config, indent=2) + "\n")
