"""LoRA through PEFT: the mask's row beside the adapters, the base below them, adapters of a folder put back on their base."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import is_peft_model
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..custom_generate.adapter_file import ADAPTER_FILE, read_adapter
from ..custom_generate.base import check_base
from ..custom_generate.generate import evaluating
from .files import LORA_CONFIG, LORA_FILE, PROVENANCE_FILE, read_provenance, repository_file
from .mask_token import add_mask_token, set_decoding_defaults

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel


def causal_lm(model: Any) -> PreTrainedModel:
    """The causal LM itself, with a PEFT wrapper taken off."""
    causal: PreTrainedModel = model.get_base_model() if is_peft_model(model) else model
    return causal


@contextmanager
def adapters_disabled(model: PeftModel) -> Iterator[None]:
    """The base as the teacher sees it: no adapters, no dropout."""
    with evaluating(model), model.disable_adapter():
        yield


def with_mask_row(peft_config: PeftConfig, model: PreTrainedModel, mask_id: int) -> PeftConfig:
    """Train the mask token's embedding row beside the adapters: adapters cannot teach a model what a new input means."""
    if getattr(peft_config, "trainable_token_indices", None) or getattr(peft_config, "modules_to_save", None):
        return peft_config
    embeddings = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embeddings)
    peft_config = copy.copy(peft_config)
    peft_config.trainable_token_indices = {name.rsplit(".", 1)[-1]: [mask_id]}
    return peft_config


def named_base(name: str | Path) -> tuple[str, str | None]:
    """The base that LoRA adapters name, and its revision."""
    adapters = json.loads(Path(str(repository_file(name, LORA_CONFIG))).read_text(encoding="utf-8"))
    return adapters["base_model_name_or_path"], adapters.get("revision")


def load_lora(load_base: Callable[[], PreTrainedModel], tokenizer: PreTrainedTokenizerBase, name: str | Path) -> PeftModel:
    """A base with the adapters of a run's folder or of a repository, and their mask token and decoding defaults.

    `load_base` is called once it is clear that the adapters can be put on.

    Raises:
        ValueError: the adapters were not trained by this package, are a pickle, or were trained on another base.
    """
    from peft import PeftModel

    if repository_file(name, LORA_FILE) is None:
        raise ValueError(f"{name} has no {LORA_FILE}; adapters are loaded from safetensors alone.")
    made = read_provenance(name)
    if made is None:
        raise ValueError(f"{name} has adapters without {PROVENANCE_FILE}: MTPDistillTrainer did not save them.")
    base = load_base()
    defaults = {"confadapt": 0.9, "verify": False} | made["settings"]
    mask_id = add_mask_token(base, tokenizer, mask_token=made["mask_token"], k_max=made["k_max"])
    mask_row = None
    if (path := repository_file(name, ADAPTER_FILE)) is not None:
        mask_row = read_adapter(path)
        mask_row.source = (str(name), None)
        defaults |= mask_row.defaults
        embedding = base.get_input_embeddings()
        with torch.no_grad():
            embedding.weight[mask_id] = mask_row.mask_row.weight / embedding_scale(*embedding.modules())
    set_decoding_defaults(base, confadapt=defaults["confadapt"], verify=defaults["verify"])
    try:
        adapted = PeftModel.from_pretrained(base, str(name))
    except RuntimeError as error:
        if "size mismatch" not in str(error):
            raise
        raise ValueError(
            f"The adapters in {name} were trained on another base: {str(error).splitlines()[-1].strip()}"
        ) from error
    if mask_row is not None:
        check_base(mask_row, base)
    return adapted


def embedding_scale(*modules: nn.Module) -> float:
    """What a model multiplies its embeddings by (Gemma), from whichever of its modules does it; 1 for other models.

    In transformers that is the embedding itself, in vLLM the module that owns it.
    """
    scales = (getattr(module, name) for module in modules for name in ("embed_scale", "normalizer") if hasattr(module, name))
    return float(next(scales, 1.0))


_NOT_ALONE = (
    "adapter_only=True publishes LoRA that fits its base as it is: no `modules_to_save`, no `trainable_token_indices` of its "
    "own, no LoRA on an output embedding that the mask token made grow, and no other kind of PEFT's; change peft_config, or "
    "leave adapter_only out, which publishes merged weights."
)


def check_publishable_lora(config: PeftConfig) -> None:
    """Raises ValueError for a configuration whose adapters cannot be published alone, as far as it says so."""
    if not _trains_lora_and(config, rows=[]):
        raise ValueError(_NOT_ALONE)


def check_fits_base(model: PeftModel) -> None:
    """Raises ValueError for adapters that cannot be published alone."""
    if not fits_base(model):
        raise ValueError(_NOT_ALONE)


def fits_base(model: PeftModel) -> bool:
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
