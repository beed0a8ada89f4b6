"""Hidden states and logits, computed separately so that the output head runs only at the positions that are needed."""

# Shapes: H hidden features, P positions read, T columns of a forward pass, V vocabulary, X layout rows

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .parallelism import is_whole_fsdp_unit


def backbone(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model without its output head, also if `base_model` is the model itself (Llama 4)."""
    if model.base_model is not model:
        return model.base_model
    return next(child for child in model.children() if isinstance(child, PreTrainedModel))


def hidden_states(
    model: PreTrainedModel, ids_XT: Tensor, masks: Tensor | dict[str, Tensor], positions_XT: Tensor | None = None
) -> Tensor:
    """Return the backbone's last hidden states, flattened to [X * T, H]. The output head is not applied.

    Args:
        model: a causal LM.
        ids_XT: token ids.
        masks: masks from `attention_masks`, or int64 [X, T] with 1 at tokens and 0 at right padding.
        positions_XT: position of each column in its text; by default, its index.
    """
    inputs: dict[str, Any] = {"input_ids": ids_XT, "attention_mask": masks, "use_cache": False}
    if positions_XT is not None:
        inputs["position_ids"] = positions_XT
    hidden: Tensor = backbone(model)(**inputs).last_hidden_state
    return hidden.flatten(0, 1)


def output_logits(model: PreTrainedModel, hidden_PH: Tensor) -> Tensor:
    """Compute the model's logits [P, V] from hidden states: output head, multiplier, softcap.

    The names are those of transformers' configs: `logit_scale` (Cohere), `output_multiplier`, `lm_head_multiplier`
    (Falcon-H1), `logits_scaling` (Granite divides, HyperCLOVA X multiplies), and the softcaps of Gemma, RecurrentGemma, xLSTM.
    `check_output_logits` compares the result with `model(...).logits`, so that an architecture with another rule is refused
    instead of trained wrongly.
    """
    config = model.config.get_text_config()
    logits = _head(model, hidden_PH)
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            logits = logits * getattr(config, name)
    if (scaling := getattr(config, "logits_scaling", None)) is not None:
        logits = logits * scaling if config.model_type == "hyperclovax" else logits / scaling
    for name in ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"):
        if (cap := getattr(config, name, None)) is not None:
            logits = torch.tanh(logits / cap) * cap
    return logits


def _head(model: PreTrainedModel, hidden_PH: Tensor) -> Tensor:
    head: Any = model.get_output_embeddings()
    if isinstance(head, nn.Linear) and is_whole_fsdp_unit(head):
        # accelerate wraps the last norm and the head in one FSDP unit, whose hooks expect one call per pass. After the norm has
        # run, the head's weight stays gathered until its gradient is reduced, so we use it without the hooks.
        return nn.functional.linear(hidden_PH, head.weight, head.bias)
    logits: Tensor = head(hidden_PH)
    return logits
