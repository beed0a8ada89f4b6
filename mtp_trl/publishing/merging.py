"""LoRA adapters on the way to a repository: merged into their base, or published alone with the mask's row."""

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
from ..modeling.lora import embedding_scale, fits_base, load_lora, named_base
from .repository import write_adapter, write_decoder

if TYPE_CHECKING:
    from peft import PeftModel

_PREFIX, _LORA_A = "base_model.model.", ".lora_A.weight"
_ROWS = ".token_adapter."  # PEFT's for `trainable_token_indices`


def save_merged(model: PeftModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path, provenance: dict[str, Any]) -> Path:
    """Merge the adapters into a copy of the base and save it as a model that loads by itself."""
    folder = Path(folder)
    merged = copy.deepcopy(model).merge_and_unload()
    merged.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_decoder(folder, merged, provenance)
    return folder


def merge_folder(folder: Path, output: Path) -> Path:
    """`save_merged` of adapters that a run or a checkpoint left in a folder; their base is loaded for it.

    Raises:
        ValueError: as `load_lora`.
        OSError: the base cannot be loaded.
    """
    name, revision = named_base(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    adapted = load_lora(lambda: AutoModelForCausalLM.from_pretrained(name, revision=revision), tokenizer, folder)
    provenance = read_provenance(folder)
    assert provenance is not None
    return save_merged(adapted, tokenizer, output, provenance)


def write_mask_row(folder: Path, model: PeftModel, provenance: dict[str, Any]) -> None:
    """Beside saved adapters what their base does not know: the mask's row, `config.mtp`, decoding defaults.

    The row is that of the adapters' file, since the model's own may be sharded. Where adapters fit no base as it is, since
    other rows or whole matrices were trained as well, nothing is written.

    Args:
        folder: where PEFT has saved the adapters.
        model: with the adapters on, and the mask token.
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
    """The adapters of a folder that has been through `write_mask_row`, as they fit the base as it is.

    Without the mask's row and the matrices that have grown by it, which PEFT saves beside them.
    """
    config = json.loads((folder / LORA_CONFIG).read_text(encoding="utf-8"))
    base = public_name(config["base_model_name_or_path"])
    config |= {"trainable_token_indices": None, "base_model_name_or_path": base}
    tensors = {name: tensor for name, tensor in load_file(folder / LORA_FILE).items() if "lora_" in name or ".bias" in name}
    save_file(tensors, output / LORA_FILE, metadata={"format": "pt"})
    write_atomically(output / LORA_CONFIG, json.dumps(config, indent=2) + "\n")
