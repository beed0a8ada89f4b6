"""Probes of a model: its execution device, whether it is causal, and whether recurrent states can be continued."""

# Shapes: B rows of the batch

from __future__ import annotations

import inspect
import sys
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, LinearAttentionLayer

# Names of the argument that takes a cache, the one of `generate` first. transformers 5.24 renamed it.
_RENAMED = "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
CACHE_NAMES = ("cache",) if _RENAMED else ("past_key_values", "cache_params")


def cache_argument(module: nn.Module) -> str | None:
    """Return the name of the argument of `forward` that takes a cache, or None if there is none."""
    arguments = inspect.signature(module.forward).parameters
    for name in CACHE_NAMES:
        if name in arguments and "dict" not in str(arguments[name].annotation):  # XLM has a `cache` that is a dictionary
            return name
    return None


def execution_device(layer: Any) -> torch.device:
    """Return the device on which a layer computes, to which accelerate moves offloaded weights."""
    offloaded = getattr(getattr(layer, "_hf_hook", None), "execution_device", None)
    return layer.weight.device if offloaded is None else torch.device(offloaded)


def cache_layers(model: PreTrainedModel) -> list[Any]:
    """Return the cache layers that transformers creates for the model, one per model layer."""
    return list(DynamicCache(config=model.config.get_text_config(decoder=True)).layers)


def windows_by_column(model: PreTrainedModel) -> bool:
    """Whether layers apply their windows to columns instead of positions (GPT-Neo), which no attention mask can change."""
    masks = (buffer for buffer in model.buffers() if buffer.ndim == 4 and buffer.dtype == torch.bool)
    return any(not bool(mask[0, 0, -1, 0]) for mask in masks if not mask.is_meta)


_left_to_right: weakref.WeakSet[PreTrainedModel] = weakref.WeakSet()


@torch.no_grad()
def check_left_to_right(model: PreTrainedModel) -> None:
    """Raise ValueError if logits depend on later tokens or padding. Then one pass cannot verify a block."""
    if model in _left_to_right:
        return
    ids = _trial_ids(model)
    text = (torch.arange(12, device=ids.device) < 8).long()[None]
    prefix, *others = (
        model(input_ids=fed, attention_mask=mask, use_cache=False).logits[0, :8].float()
        for fed, mask in ((ids[:, :8], text[:, :8]), (ids, torch.ones_like(ids)), (ids * text, text))
    )
    for other, what in zip(others, ("tokens", "padding"), strict=True):
        # Compare at the median position, since rounding may route single tokens to other experts.
        if ((prefix - other).norm(dim=-1) / prefix.norm(dim=-1)).median() > 0.05:
            raise ValueError(
                f"{type(model).__name__} is not causal: its logits depend on {what} after them. Use a causal model, or set the "
                "config field that makes this one causal."
            )
    _left_to_right.add(model)


_continuing: weakref.WeakKeyDictionary[PreTrainedModel, bool] = weakref.WeakKeyDictionary()


def continues_from_states(model: PreTrainedModel) -> bool:
    """Whether recurrent layers can read several tokens from a cached state. It is tried, since some start over (Jamba)."""
    if not hasattr(sys.modules[type(model).__module__], "create_recurrent_attention_mask"):
        return False
    if model not in _continuing:
        _continuing[model] = _states_agree(model)
    return _continuing[model]


@torch.no_grad()
def _states_agree(model: PreTrainedModel) -> bool:
    """Whether 12 tokens give the same states when they are read at once and as 8 and then 4."""
    name = str(cache_argument(model))
    ids = _trial_ids(model)
    states_by_split = []
    for parts in ([ids], ids.split(8, 1)):
        cache = Cache(layers=cache_layers(model))
        for part in parts:
            model(input_ids=part, use_cache=True, **{name: cache})
        states_by_split.append([states[i].float() for states, i in recurrent_states(cache.layers)])
    return all((one - other).norm() <= 0.1 * one.norm() for one, other in zip(*states_by_split, strict=True))


def _trial_ids(model: PreTrainedModel) -> Tensor:
    """Return twelve token ids, int64 [1, 12]."""
    device = execution_device(model.get_input_embeddings())
    ids: Tensor = torch.arange(12, device=device)[None] % model.config.get_text_config().vocab_size
    return ids


def recurrent_states(layers: Sequence[Any]) -> list[tuple[dict[int, Tensor], int]]:
    """Return (holder, key) of every recurrent state of the cache layers, so that the state [B, ...] is `holder[key]`."""
    holders = [layer for layer in layers if isinstance(layer, LinearAttentionLayer)]
    found = [(states, i) for layer in holders for states in (layer.conv_states, layer.recurrent_states) for i in states]
    return [(states, i) for states, i in found if states[i] is not None]
