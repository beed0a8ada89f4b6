"""The model's own hidden states and logits, computed apart: the output head only reads the positions that matter."""

# Shapes: H hidden features, P positions read, T columns of a forward pass, V vocabulary, X layout rows

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .parallelism import is_whole_fsdp_unit


def backbone(model: PreTrainedModel) -> PreTrainedModel:
    """The model without its output head, also where `base_model` is the model itself (Llama 4)."""
    if model.base_model is not model:
        return model.base_model
    return next(child for child in model.children() if isinstance(child, PreTrainedModel))


def hidden_states(
    model: PreTrainedModel, ids_XT: Tensor, masks: Tensor | dict[str, Tensor], positions_XT: Tensor | None = None
) -> Tensor:
    """Last hidden state [X * T, H] of the backbone, flat. The output head is not applied.

    Args:
        masks: as `attention_masks` makes them, or 1 and 0 for tokens and right padding, int64 [X, T].
        positions_XT: where each column stands in its text; by default, its index.
    """
    inputs: dict[str, Any] = {"input_ids": ids_XT, "attention_mask": masks, "use_cache": False}
    if positions_XT is not None:
        inputs["position_ids"] = positions_XT
    hidden: Tensor = backbone(model)(**inputs).last_hidden_state
    return hidden.flatten(0, 1)


def output_logits(model: PreTrainedModel, hidden_PH: Tensor) -> Tensor:
    """The model's own logits [P, V] from hidden states: output head, multiplier, softcap.

    The names are those that transformers' configs use: `logit_scale` (Cohere), `output_multiplier`, `lm_head_multiplier`
    (Falcon-H1), `logits_scaling` (Granite divides, HyperCLOVA X multiplies), and the softcaps of Gemma, RecurrentGemma, xLSTM.
    `check_output_logits` compares with `model(...).logits`, so an architecture with another rule is refused, not mistrained.
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
        # accelerate makes one FSDP unit of the last norm and the head, whose hooks expect one call in each pass. Once the norm
        # has run, the weight stays whole until its gradient is reduced.
        return nn.functional.linear(hidden_PH, head.weight, head.bias)
    logits: Tensor = head(hidden_PH)
    return logits
