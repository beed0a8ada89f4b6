"""Exact mode: a frozen base, and low-rank updates that act at mask slots alone (method section 4b).

The text is read once, by the base, without gradient; its keys and values serve the student's slots (adapter on) and the
teacher's slots (adapter off). Decoding's half of the adapter is `MaskGatedAdapter` in `custom_generate.generate`.
"""

# B rows, N clean tokens, S slots, X layout rows, T tokens of a layout row, H hidden size

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.modeling_layers import GradientCheckpointingLayer

from .custom_generate.generate import MaskGatedAdapter, base_fingerprint, linear_features
from .forward import attention_masks, backbone, evaluating, hidden_states
from .mask_token import gathered
from .regions import Layout


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


def _keep_differentiable(model: PreTrainedModel) -> None:
    """Bitsandbytes packs 4-bit weights for some CPUs at the first evaluation; gradients are silently wrong from then on."""
    for name, module in model.named_modules():
        if not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
            raise ValueError(f"{name} is packed for inference on this CPU and cannot be trained through; load the model anew.")
        module.support_avx512bf16_for_cpu = False


@contextmanager
def declared_adapted(model: PreTrainedModel) -> Iterator[None]:
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
    adapter: MaskGatedAdapter = model.mtp_adapter
    if not any(name.startswith("mtp_adapter.") for name in state_dict):
        return {name: parameter.detach() for name, parameter in adapter.by_file_name().items()}, state_dict
    own = {id(parameter): f"mtp_adapter.{name}" for name, parameter in adapter.named_parameters()}
    tensors = {name: state_dict[own[id(parameter)]] for name, parameter in adapter.by_file_name().items()}
    return tensors, {name: value for name, value in state_dict.items() if not name.startswith("mtp_adapter.")}


ALL_LINEAR = "all-linear"  # PEFT's word for every linear layer but the head
_OF_THE_CACHE = ".kv_b_proj"  # latent attention (DeepSeek): expands all cached latents, not the columns of a pass


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


_HIDDEN = (
    "{} does not let its layers read the text's keys and values under gradient checkpointing; set gradient_checkpointing=False."
)


class MaskGated:
    """Reads layouts in exact mode (a `self_distillation.Reader`).

    Attention-only models read the text once and the slots twice, behind the text's keys and values; others read whole
    rows, with the gate as a mask.
    """

    base_reads_text = True

    def __init__(self, model: PreTrainedModel, *, with_teacher: bool) -> None:
        self.student = self.teacher = model
        self.adapter: MaskGatedAdapter = model.mtp_adapter
        self.with_teacher = with_teacher
        for module in model.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module._can_checkpoint_with_cache = True  # the cache given to slots is only read

    def read_student(self, layout: Layout) -> Tensor:
        """Hidden states [X * T, H]: the base's at the text, the student's, with gradient, at the slots."""
        if layout.allowed_XTT is None:
            gate = torch.zeros_like(layout.valid_XT)
            gate.view(-1)[layout.read_BRK[..., 1:][layout.drawn_BRK[..., 1:]]] = True
            self.adapter.gate = gate
            return hidden_states(self.student, layout.ids_XT, layout, self._masks(layout))
        self.text_BNH, self.prefix = self._read_text(layout)
        self.adapter.gate = layout.ids_XT.shape[1] - layout.clean_length
        return self._behind_text(layout, layout.ids_XT)

    @torch.no_grad()
    def read_teacher(self, layout: Layout, ids_XT: Tensor) -> Tensor | None:
        """Hidden states [X * T, H] of the base with the student's tokens in the slots."""
        if not self.with_teacher:
            return None
        gate = self.adapter.gate
        with evaluating(self.student), self.adapter.acting_on(0):
            if layout.allowed_XTT is None:
                hidden = hidden_states(self.teacher, ids_XT, layout, self._masks(layout))
            else:
                hidden = self._behind_text(layout, ids_XT)
        self.adapter.gate = gate  # backward recomputes the student's layers
        return hidden

    @torch.no_grad()
    def _read_text(self, layout: Layout) -> tuple[Tensor, Cache]:
        text, cache = slice(layout.clean_length), DynamicCache()
        with evaluating(self.student), self.adapter.acting_on(0):
            hidden = backbone(self.student)(
                input_ids=layout.ids_XT[:, text],
                position_ids=layout.positions_XT[:, text],
                attention_mask=self._masks(layout, queries=text, keys=text),
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state
        return hidden, Cache(layers=[_ReadOnlyLayer(layer.keys, layer.values) for layer in cache.layers])

    def _behind_text(self, layout: Layout, ids_XT: Tensor) -> Tensor:
        slots = slice(layout.clean_length, None)
        try:
            hidden = backbone(self.student)(
                input_ids=ids_XT[:, slots],
                position_ids=layout.positions_XT[:, slots],
                attention_mask=self._masks(layout, queries=slots),
                past_key_values=self.prefix,
                use_cache=False,
            ).last_hidden_state
        except RuntimeError as error:
            if self._text_is_hidden() and not isinstance(error, torch.OutOfMemoryError):
                raise ValueError(_HIDDEN.format(type(self.student).__name__)) from error
            raise
        if self._text_is_hidden():
            raise ValueError(_HIDDEN.format(type(self.student).__name__))
        return torch.cat([self.text_BNH, hidden], 1).flatten(0, 1)

    def _text_is_hidden(self) -> bool:
        checkpointing = self.student.is_gradient_checkpointing and self.student.training
        return checkpointing and not self.prefix.layers[0].was_read

    def _masks(self, layout: Layout, **columns: slice) -> Tensor | dict[str, Tensor]:
        return attention_masks(self.student.config, layout, self.student.dtype, **columns)


class _ReadOnlyLayer(DynamicLayer):
    """Keys and values of a text that every pass over slots reads and none extends, also when it is recomputed."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized, self.was_read = keys, values, True, False

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The text's and the slots' own, [B, heads, N + S, D]."""
        self.was_read = True
        return torch.cat([self.keys, key_states], -2), torch.cat([self.values, value_states], -2)
