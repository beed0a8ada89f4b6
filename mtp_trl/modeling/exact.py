"""Exact mode: a frozen base, and low-rank updates that act at mask slots only (method section 4b).

The adapter itself is `custom_generate.adapter.MaskGatedAdapter`, which decoding needs as well; training reads with
`training.readers.ExactReader`.
"""

from __future__ import annotations

import inspect
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
from .parallelism import gathered

ALL_LINEAR = "all-linear"  # PEFT's word for every linear layer but the head
_OF_THE_CACHE = ".kv_b_proj"  # latent attention (DeepSeek): expands all cached latents, not the columns of a pass


def add_gated_adapter(
    model: PreTrainedModel,
    *,
    rank: int,
    alpha: float,
    target_modules: str | Sequence[str] | None = None,
    seed: int = 0,
) -> MaskGatedAdapter:
    """Freeze `model` and attach an adapter: A random, B zero, the mask's row that of the embedding; nothing changes yet.

    Args:
        model: a causal LM with a mask token (`config.mtp`), its weights quantised or sharded by ZeRO-3 or neither.
        target_modules: last parts of the names of linear layers, or one of them; by default, and as "all-linear", every
            linear layer of the attention and, in models without experts, of the MLP.

    Raises:
        ValueError: when no linear layer fits.
    """
    shapes = adapted_layers(model, target_modules)
    if not shapes:
        wanted = ", ".join(_names(target_modules) or ["attention or MLP layers"])
        raise ValueError(f"{type(model).__name__} has no linear layer among {wanted}; name some in target_modules.")
    model.requires_grad_(False)
    _keep_differentiable(model)
    embedding = model.get_input_embeddings()
    mask_token = torch.tensor([model.config.mtp["mask_token_id"]], device=embedding.weight.device)
    with gathered([embedding.weight]), torch.no_grad():
        row = embedding(mask_token)[0].float()  # as the first layer would see it: some models scale their embeddings
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
    """(inputs, outputs) of the layers that an adapter of `target_modules` acts on, by name; see `add_gated_adapter`."""
    layers = _linear_layers(model, _names(target_modules))
    return {name: features for name, layer in layers if (features := linear_features(layer))}


def _names(target_modules: str | Sequence[str] | None) -> list[str] | None:
    """None for the default layers. TRL and PEFT give one name as a string, which would be read letter by letter."""
    if target_modules is None or target_modules in (ALL_LINEAR, [ALL_LINEAR]):
        return None
    return [target_modules] if isinstance(target_modules, str) else list(target_modules)


def _linear_layers(model: PreTrainedModel, target_modules: Sequence[str] | None) -> Iterator[tuple[str, nn.Module]]:
    head = model.get_output_embeddings()
    has_experts = any("expert" in name for name, _ in model.named_modules())
    attention = tuple(f"{name}." for name, module in model.named_modules() if _is_attention(module))
    blocks = tuple(f"{name}." for name, m in model.named_modules() if isinstance(m, GradientCheckpointingLayer))
    # Where no block can be checkpointed (CTRL) the lists of blocks.
    blocks = blocks or tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, nn.ModuleList))
    for name, module in model.named_modules():
        if module is head or linear_features(module) is None or not name.startswith(blocks):
            continue
        if target_modules is not None:
            chosen = name.rsplit(".", 1)[-1] in target_modules
        else:
            chosen = (name.startswith(attention) or not has_experts) and not name.endswith(_OF_THE_CACHE)
            # Routers of experts within the attention (JetMoe), and linear layers in groups (DeepSeek V4) have other outputs.
            chosen = chosen and "expert" not in name and not hasattr(module, "n_groups")
        if chosen:
            yield name, module


def _is_attention(module: nn.Module) -> bool:
    if isinstance(module, GradientCheckpointingLayer) or not hasattr(module, "layer_idx"):
        return False
    return "past_key_values" in inspect.signature(module.forward).parameters


def _keep_differentiable(model: PreTrainedModel) -> None:
    """Bitsandbytes packs 4-bit weights for some CPUs at the first evaluation; gradients are silently wrong from then on."""
    for name, module in model.named_modules():
        if not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
            raise ValueError(f"{name} is packed for inference on this CPU and cannot be trained through; load the model anew.")
        module.support_avx512bf16_for_cpu = False


@contextmanager
def peft_flag_set(model: PreTrainedModel) -> Iterator[None]:
    """Within the block a quantised base counts as one with adapters, as it is: transformers knows PEFT's alone."""
    before = getattr(model, "_hf_peft_config_loaded", False)
    model._hf_peft_config_loaded = True
    try:
        yield
    finally:
        model._hf_peft_config_loaded = before


def split_adapter(model: PreTrainedModel, state_dict: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The adapter's tensors by their names in its file, and the rest, of the state dict that a run saves.

    ZeRO-3 gathers the adapter with everything else; elsewhere a state dict has no adapter, whose parameters are then whole.
    """
    adapter = adapter_of(model)
    assert adapter is not None
    parameters = by_file_name(adapter)
    if not any(name.startswith("mtp_adapter.") for name in state_dict):
        return {name: parameter.detach() for name, parameter in parameters.items()}, state_dict
    own = {id(parameter): f"mtp_adapter.{name}" for name, parameter in adapter.named_parameters()}
    tensors = {name: state_dict[own[id(parameter)]] for name, parameter in parameters.items()}
    return tensors, {name: value for name, value in state_dict.items() if not name.startswith("mtp_adapter.")}
