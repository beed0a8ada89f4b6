"""LoRA through PEFT: train the mask token's row with the adapters, load adapters onto their base, check them for publishing."""

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
    """Return the causal LM, without its PEFT wrapper if it has one."""
    causal: PreTrainedModel = model.get_base_model() if is_peft_model(model) else model
    return causal


@contextmanager
def adapters_disabled(model: PeftModel) -> Iterator[None]:
    """Turn adapters and dropout off within the block, so that the model is the base, which is the teacher."""
    with evaluating(model), model.disable_adapter():
        yield


def adapts_head(model: PreTrainedModel) -> bool:
    """Whether PEFT has wrapped the output head. The teacher's logits then need the adapters turned off, too."""
    kinds = type(model.get_output_embeddings()).__mro__  # FSDP 2 puts a class of its own first
    return any(kind.__module__.startswith("peft.") for kind in kinds)


def with_mask_row(peft_config: PeftConfig, model: PreTrainedModel, mask_id: int) -> PeftConfig:
    """Return a PEFT configuration that also trains the mask token's embedding row.

    Adapters cannot teach a model the meaning of a new input token. A configuration that already trains token rows or whole
    modules is returned unchanged.
    """
    if getattr(peft_config, "trainable_token_indices", None) or getattr(peft_config, "modules_to_save", None):
        return peft_config
    embeddings = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embeddings)
    peft_config = copy.copy(peft_config)
    peft_config.trainable_token_indices = {name.rsplit(".", 1)[-1]: [mask_id]}
    return peft_config


def named_base(name: str | Path) -> tuple[str, str | None, str | None]:
    """Return the name, the revision and the GGUF file of the base that LoRA adapters specify. All but the name may be None."""
    adapters = json.loads(Path(str(repository_file(name, LORA_CONFIG))).read_text(encoding="utf-8"))
    return adapters["base_model_name_or_path"], adapters.get("revision"), (read_provenance(name) or {}).get("gguf_file")


def load_lora(load_base: Callable[[], PreTrainedModel], tokenizer: PreTrainedTokenizerBase, name: str | Path) -> PeftModel:
    """Load LoRA adapters onto their base, with their mask token and decoding defaults.

    Args:
        load_base: loads the base; called after the files of the adapters have been checked.
        tokenizer: extended in place by the mask token.
        name: folder of a run, or a repository.

    Raises:
        ValueError: if the adapters were not trained by this package, are stored as a pickle, or were trained on another base.
    """
    from peft import PeftModel

    if repository_file(name, LORA_FILE) is None:
        raise ValueError(f"{name} has no {LORA_FILE}; adapters are loaded only from safetensors files.")
    provenance = read_provenance(name)
    if provenance is None:
        raise ValueError(f"{name} has adapters but no {PROVENANCE_FILE}, so MTPDistillTrainer did not save them.")
    base = load_base()
    defaults = {"confadapt": 0.9, "verify": False} | provenance["settings"]
    mask_id = add_mask_token(base, tokenizer, mask_token=provenance["mask_token"], k_max=provenance["k_max"])
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
    """Return the factor by which a model multiplies its embeddings (Gemma); 1 for other models.

    Args:
        modules: modules among which one may have the factor. In transformers, this is the embedding; in vLLM, its parent.
    """
    scales = (getattr(module, name) for module in modules for name in ("embed_scale", "normalizer") if hasattr(module, name))
    return float(next(scales, 1.0))


_NEEDS_MERGING = (
    "adapter_only=True needs LoRA adapters that fit the unmodified base: without `modules_to_save`, without "
    "`trainable_token_indices` other than the mask token, without LoRA on an output embedding that was enlarged for the mask "
    "token, and no other PEFT method; change peft_config, or set adapter_only=False to publish merged weights."
)


def check_publishable_lora(config: PeftConfig) -> None:
    """Raise ValueError if the configuration already shows that its adapters cannot be published without the base's weights."""
    if not _is_lora_training_rows(config, rows=[]):
        raise ValueError(_NEEDS_MERGING)


def check_fits_base(model: PeftModel) -> None:
    """Raise ValueError if these adapters cannot be published without the base's weights."""
    if not fits_base(model):
        raise ValueError(_NEEDS_MERGING)


def fits_base(model: PeftModel) -> bool:
    """Whether the adapters, apart from the mask token's row, fit the base before the mask token was added to it."""
    base = model.get_base_model()
    mtp = base.config.mtp
    has_grown = mtp["mask_token_id"] >= mtp.get("base_vocab_size", math.inf)
    if has_grown and hasattr(base.get_output_embeddings(), "lora_A"):
        return False
    return _is_lora_training_rows(model.active_peft_config, rows=[[mtp["mask_token_id"]]])


def _is_lora_training_rows(config: PeftConfig, *, rows: list[list[int]]) -> bool:
    """Whether the configuration is LoRA, and trains exactly these embedding rows and no whole modules."""
    trained = getattr(config, "trainable_token_indices", None) or {}
    named = isinstance(trained, dict) and list(trained.values()) == rows
    return config.peft_type == "LORA" and not config.modules_to_save and named
