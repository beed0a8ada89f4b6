"""LoRA adapters of a run: merged into their base, put back on it, or published alone."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import is_deepspeed_zero3_enabled

from .custom_generate import generate as decoder
from .hub import (
    PROVENANCE_FILE,
    public_name,
    repository_file,
    set_decoding_defaults,
    write_adapter,
    write_atomically,
    write_decoder,
)
from .mask_token import add_mask_token

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

LORA_CONFIG, LORA_FILE = "adapter_config.json", "adapter_model.safetensors"
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
        ValueError: as `put_on`.
        OSError: the base cannot be loaded.
    """
    name, revision = named_base(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    adapted = put_on(lambda: AutoModelForCausalLM.from_pretrained(name, revision=revision), tokenizer, folder)
    return save_merged(adapted, tokenizer, output, _provenance(folder))


def named_base(name: str | Path) -> tuple[str, str | None]:
    """The base that LoRA adapters name, and its revision."""
    adapters = json.loads(Path(str(repository_file(name, LORA_CONFIG))).read_text(encoding="utf-8"))
    return adapters["base_model_name_or_path"], adapters.get("revision")


def put_on(load_base: Callable[[], PreTrainedModel], tokenizer: PreTrainedTokenizerBase, name: str | Path) -> PeftModel:
    """A base with the adapters of a run's folder or of a repository, and their mask token and decoding defaults.

    `load_base` is called once it is clear that the adapters can be put on.

    Raises:
        ValueError: the adapters were not trained by this package, are a pickle, or were trained on another base.
    """
    from peft import PeftModel

    if repository_file(name, LORA_FILE) is None:
        raise ValueError(f"{name} has no {LORA_FILE}; adapters are loaded from safetensors alone.")
    made = _provenance(name)
    base = load_base()
    defaults = {"confadapt": 0.9, "verify": False} | made["settings"]
    mask_id = add_mask_token(base, tokenizer, mask_token=made["mask_token"], k_max=made["k_max"])
    beside = None
    if (path := repository_file(name, decoder.ADAPTER_FILE)) is not None:
        with safe_open(path, framework="pt") as file, torch.no_grad():
            beside = decoder.MaskGatedAdapter.from_tensors(load_file(path), file.metadata())
            beside.source = (str(name), None)
            defaults |= beside.defaults
            base.get_input_embeddings().weight[mask_id] = beside.mask_row.weight / _embedding_scale(base)
    set_decoding_defaults(base, confadapt=defaults["confadapt"], verify=defaults["verify"])
    try:
        adapted = PeftModel.from_pretrained(base, str(name))
    except RuntimeError as error:
        if "size mismatch" not in str(error):
            raise
        raise ValueError(
            f"The adapters in {name} were trained on another base: {str(error).splitlines()[-1].strip()}"
        ) from error
    if beside is not None:
        beside.check_base(base)
    return adapted


def _provenance(name: str | Path) -> dict[str, Any]:
    if (path := repository_file(name, PROVENANCE_FILE)) is None:
        raise ValueError(f"{name} has adapters without {PROVENANCE_FILE}: MTPDistillTrainer did not save them.")
    made: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
    return made


def _embedding_scale(model: PreTrainedModel) -> float:
    """What some models multiply their embeddings by."""
    return next((float(m.embed_scale) for m in model.get_input_embeddings().modules() if hasattr(m, "embed_scale")), 1.0)


# ---- published alone ----


_NOT_ALONE = (
    "adapter_only=True publishes LoRA that fits its base as it is: no `modules_to_save`, no `trainable_token_indices` of its "
    "own, no LoRA on an output embedding that the mask token made grow, and no other kind of PEFT's; change peft_config, or "
    "leave adapter_only out, which publishes merged weights."
)


def check_alone(config: PeftConfig) -> None:
    """Raises ValueError for a configuration whose adapters cannot be published alone, as far as it says so."""
    if not _trains_lora_and(config, rows=[]):
        raise ValueError(_NOT_ALONE)


def check_fits_base(model: PeftModel) -> None:
    """Raises ValueError for adapters that cannot be published alone."""
    if not _fits_base(model):
        raise ValueError(_NOT_ALONE)


def _fits_base(model: PeftModel) -> bool:
    """Whether the adapters, without the mask's row, fit their base as it was before the mask token."""
    base = model.get_base_model()
    mtp = base.config.mtp
    has_grown = mtp["mask_token_id"] >= mtp.get("base_vocab_size", math.inf)
    if has_grown and hasattr(base.get_output_embeddings(), "lora_A"):
        return False
    return _trains_lora_and(model.active_peft_config, rows=[[mtp["mask_token_id"]]])


def _trains_lora_and(config: PeftConfig, *, rows: list[list[int]]) -> bool:
    """Whether it is LoRA, and of embeddings trains these rows alone."""
    trained = getattr(config, "trainable_token_indices", None) or {}
    named = isinstance(trained, dict) and list(trained.values()) == rows
    return config.peft_type == "LORA" and not config.modules_to_save and named


def write_mask_row(folder: Path, model: PeftModel, provenance: dict[str, Any]) -> None:
    """Beside saved adapters what their base does not know: the mask's row, `config.mtp`, decoding defaults.

    The row is that of the adapters' file, since the model's own may be sharded. Where adapters fit no base as it is, since
    other rows or whole matrices were trained as well, nothing is written.

    Args:
        folder: where PEFT has saved the adapters.
        model: with the adapters on, and the mask token.
    """
    if not (folder / LORA_FILE).is_file() or not _fits_base(model):
        return
    (embedding,) = model.active_peft_config.trainable_token_indices
    base = model.get_base_model()
    with safe_open(folder / LORA_FILE, framework="pt") as file:
        names = list(file.keys())
        row = file.get_tensor(next(name for name in names if f"{embedding}{_ROWS}trainable_tokens_delta" in name))[0].float()
    adapter = decoder.MaskGatedAdapter({}, rank=1, alpha=1, hidden_size=len(row))
    with torch.no_grad():
        adapter.mask_row.weight.copy_(row * _embedding_scale(base))
    adapter.mtp = base.config.mtp
    adapter.lora_layers = [name[len(_PREFIX) : -len(_LORA_A)] for name in names if name.endswith(_LORA_A)]
    fingerprint = None if is_deepspeed_zero3_enabled() else decoder.base_fingerprint(base, adapter.lora_layers)
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
