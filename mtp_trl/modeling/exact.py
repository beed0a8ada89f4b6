"""Exact mode: a frozen base, and low-rank updates that act at mask slots only.

The adapter is `custom_generate.adapter.MaskGatedAdapter`, which decoding uses, too. Training runs it with
`training.readers.ExactReader`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ..custom_generate.adapter import MaskGatedAdapter, adapter_of
from ..custom_generate.adapter_file import by_file_name
from ..custom_generate.base import base_fingerprint, linear_features
from ..custom_generate.probes import CACHE_NAMES, cache_argument
from .parallelism import gathered

ALL_LINEAR = "all-linear"  # PEFT's name for every linear layer except the head
# In latent attention (DeepSeek), this layer expands all cached latents instead of the columns of the current pass.
_LATENT_PROJECTION = ".kv_b_proj"


def add_gated_adapter(
    model: PreTrainedModel,
    *,
    rank: int,
    alpha: float,
    target_modules: str | Sequence[str] | None = None,
    seed: int = 0,
) -> MaskGatedAdapter:
    """Freeze `model`, and attach and return an adapter that does not change the model's output yet.

    The low-rank matrices A are random, B are zero, and the mask row is a copy of the mask token's embedding.

    Args:
        model: a causal LM with a mask token (`config.mtp`). Its weights may be quantised, or sharded by ZeRO-3.
        rank: rank of the updates.
        alpha: the updates are scaled by alpha / rank.
        target_modules: last parts of the names of the linear layers to adapt, or a single one. None and "all-linear" select
            every linear layer of the attention and, in models without experts, of the MLP.
        seed: seed of A.

    Raises:
        ValueError: if no linear layer matches, or bitsandbytes has packed the weights for inference.
    """
    shapes = adapted_layers(model, target_modules)
    if not shapes:
        requested = ", ".join(_names(target_modules) or ["attention or MLP layers"])
        raise ValueError(f"{type(model).__name__} has no linear layer among {requested}; name others in target_modules.")
    model.requires_grad_(False)
    _keep_differentiable(model)
    embedding = model.get_input_embeddings()
    mask_token = torch.tensor([model.config.mtp["mask_token_id"]], device=embedding.weight.device)
    with gathered([embedding.weight]), torch.no_grad():
        row = embedding(mask_token)[0].float()  # including the factor by which some models scale embeddings
    adapter = MaskGatedAdapter(shapes, rank=rank, alpha=alpha, hidden_size=len(row))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        adapter.mask_row.weight.copy_(row)
        for update in adapter.updates:
            bound = 1 / math.sqrt(update.lora_A.shape[1])
            update.lora_A.uniform_(-bound, bound, generator=generator)
    adapter.mtp = model.config.mtp
    adapter.base = (model.config._name_or_path, base_fingerprint(model, adapter.names, gathered=gathered))
    return adapter.attach(model)


def adapted_layers(model: PreTrainedModel, target_modules: str | Sequence[str] | None = None) -> dict[str, tuple[int, int]]:
    """Return (inputs, outputs), by name, of the layers that `add_gated_adapter` adapts for `target_modules`."""
    layers = _linear_layers(model, _names(target_modules))
    return {name: features for name, layer in layers if (features := linear_features(layer))}


def _names(target_modules: str | Sequence[str] | None) -> list[str] | None:
    """Return `target_modules` as a list, or None for the default layers. TRL and PEFT pass a single name as a string."""
    if target_modules is None or target_modules in (ALL_LINEAR, [ALL_LINEAR]):
        return None
    return [target_modules] if isinstance(target_modules, str) else list(target_modules)


def _linear_layers(model: PreTrainedModel, target_modules: Sequence[str] | None) -> Iterator[tuple[str, nn.Module]]:
    head = model.get_output_embeddings()
    has_experts = any("expert" in name for name, _ in model.named_modules())
    attention = tuple(f"{name}." for name, module in model.named_modules() if _is_attention(module))
    blocks = tuple(f"{name}." for name, m in model.named_modules() if isinstance(m, GradientCheckpointingLayer))
    # If no block supports checkpointing (CTRL), use the module lists, which contain the blocks.
    blocks = blocks or tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, nn.ModuleList))
    for name, module in model.named_modules():
        if module is head or linear_features(module) is None or not name.startswith(blocks):
            continue
        if target_modules is not None:
            chosen = name.rsplit(".", 1)[-1] in target_modules
        else:
            chosen = (name.startswith(attention) or not has_experts) and not name.endswith(_LATENT_PROJECTION)
            # Skip expert routers within the attention (JetMoe) and grouped linear layers (DeepSeek V4): their outputs are not
            # those of a plain linear layer.
            chosen = chosen and "expert" not in name and not hasattr(module, "n_groups")
        if chosen:
            yield name, module


def _is_attention(module: nn.Module) -> bool:
    if isinstance(module, GradientCheckpointingLayer) or not hasattr(module, "layer_idx"):
        return False
    # Recurrent mixers take a cache, too.
    is_recurrent = any("conv1d" in name for name, _ in module.named_children())
    return cache_argument(module) == CACHE_NAMES[0] and not is_recurrent


def _keep_differentiable(model: PreTrainedModel) -> None:
    """Keep bitsandbytes from packing 4-bit weights, as it does for some CPUs at the first evaluation.

    Gradients through packed weights are silently wrong.

    Raises:
        ValueError: if weights are packed already.
    """
    for name, module in model.named_modules():
        if not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
            raise ValueError(f"{name} is packed for inference on this CPU, which makes gradients wrong; load the model again.")
        module.support_avx512bf16_for_cpu = False


@contextmanager
def peft_flag_set(model: PreTrainedModel) -> Iterator[None]:
    """Temporarily set `_hf_peft_config_loaded`, so that Trainer accepts a quantised base with our non-PEFT adapter."""
    previous = getattr(model, "_hf_peft_config_loaded", False)
    model._hf_peft_config_loaded = True
    try:
        yield
    finally:
        model._hf_peft_config_loaded = previous


def split_adapter(model: PreTrainedModel, state_dict: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split the state dict that a run saves into the adapter's tensors, by their names in the adapter's file, and the rest.

    ZeRO-3 gathers the adapter into the state dict. If the state dict has no adapter, the adapter's own parameters are whole
    and are returned instead.
    """
    adapter = adapter_of(model)
    assert adapter is not None
    parameters = by_file_name(adapter)
    if not any(name.startswith("mtp_adapter.") for name in state_dict):
        return {name: parameter.detach() for name, parameter in parameters.items()}, state_dict
    full_names = {id(parameter): f"mtp_adapter.{name}" for name, parameter in adapter.named_parameters()}
    tensors = {name: state_dict[full_names[id(parameter)]] for name, parameter in parameters.items()}
    return tensors, {name: value for name, value in state_dict.items() if not name.startswith("mtp_adapter.")}
