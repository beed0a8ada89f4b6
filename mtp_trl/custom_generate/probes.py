"""What a model can do, found out by trying it: where it computes, whether it is causal, whether its states can be continued."""

# Shapes: B rows of the batch

from __future__ import annotations

import inspect
import sys
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, LinearAttentionLayer


def execution_device(layer: Any) -> torch.device:
    """Where a layer computes: accelerate brings offloaded weights there."""
    offloaded = getattr(getattr(layer, "_hf_hook", None), "execution_device", None)
    return layer.weight.device if offloaded is None else torch.device(offloaded)


def cache_layers(model: PreTrainedModel) -> list[Any]:
    """The cache layers that transformers would make for the model, one for each of its layers."""
    return list(DynamicCache(config=model.config.get_text_config(decoder=True)).layers)


def windows_by_column(model: PreTrainedModel) -> bool:
    """Whether layers measure their windows in columns (GPT-Neo): no mask of ours can then say where a column stands."""
    masks = (buffer for buffer in model.buffers() if buffer.ndim == 4 and buffer.dtype == torch.bool)
    return any(not bool(mask[0, 0, -1, 0]) for mask in masks if not mask.is_meta)


_left_to_right: weakref.WeakSet[PreTrainedModel] = weakref.WeakSet()


@torch.no_grad()
def check_left_to_right(model: PreTrainedModel) -> None:
    """Raises ValueError when logits depend on later tokens or padding: then a block cannot be verified in one pass."""
    if model in _left_to_right:
        return
    ids = _trial_ids(model)
    text = (torch.arange(12, device=ids.device) < 8).long()[None]
    prefix, *others = (
        model(input_ids=fed, attention_mask=mask, use_cache=False).logits[0, :8].float()
        for fed, mask in ((ids[:, :8], text[:, :8]), (ids, torch.ones_like(ids)), (ids * text, text))
    )
    for other, what in zip(others, ("tokens", "padding"), strict=True):
        # The median position: rounding may send single tokens to other experts.
        if ((prefix - other).norm(dim=-1) / prefix.norm(dim=-1)).median() > 0.05:
            raise ValueError(
                f"{type(model).__name__} does not read from left to right: its logits depend on {what} after them. Use a "
                "causal model, or set what makes this one causal in its config."
            )
    _left_to_right.add(model)


_continuing: weakref.WeakKeyDictionary[PreTrainedModel, bool] = weakref.WeakKeyDictionary()


def continues_from_states(model: PreTrainedModel) -> bool:
    """Whether its recurrent layers continue from their states by several tokens; some start over (Jamba), so it is tried."""
    if not hasattr(sys.modules[type(model).__module__], "create_recurrent_attention_mask"):
        return False
    if model not in _continuing:
        _continuing[model] = _states_agree(model)
    return _continuing[model]


@torch.no_grad()
def _states_agree(model: PreTrainedModel) -> bool:
    """Whether the states after 12 tokens are the same when these are read at once and as 8 and 4."""
    name = "past_key_values" if "past_key_values" in inspect.signature(model.forward).parameters else "cache_params"
    ids = _trial_ids(model)
    found = []
    for parts in ([ids], ids.split(8, 1)):
        cache = Cache(layers=cache_layers(model))
        for part in parts:
            model(input_ids=part, use_cache=True, **{name: cache})
        found.append([states[i].float() for states, i in recurrent_states(cache.layers)])
    return all((one - other).norm() <= 0.1 * one.norm() for one, other in zip(*found, strict=True))


def _trial_ids(model: PreTrainedModel) -> Tensor:
    """Twelve tokens, int64 [1, 12]."""
    device = execution_device(model.get_input_embeddings())
    ids: Tensor = torch.arange(12, device=device)[None] % model.config.get_text_config().vocab_size
    return ids


def recurrent_states(layers: Sequence[Any]) -> list[tuple[dict[int, Tensor], int]]:
    """Where the recurrent ones among cache layers keep their states, [B, ...] each."""
    holders = [layer for layer in layers if isinstance(layer, LinearAttentionLayer)]
    found = [(states, i) for layer in holders for states in (layer.conv_states, layer.recurrent_states) for i in states]
    return [(states, i) for states, i in found if states[i] is not None]
