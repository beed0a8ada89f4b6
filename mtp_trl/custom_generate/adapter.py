"""Exact mode's adapter: low-rank updates and a mask embedding that act at mask positions only."""

# Shapes: B rows of the batch, T columns of a forward pass

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from .probes import execution_device


class _AdapterModule(nn.Module):
    """Parent of the adapter's parts. Each part is a module, so that FSDP and DeepSpeed gather its weights when it runs.

    A state dict without adapter weights, such as the base's, loads without an error and leaves these weights unchanged.
    """

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if any(f"{prefix}{name}" in state_dict for name, _ in self.named_parameters(recurse=False)):
            super()._load_from_state_dict(state_dict, prefix, *args)


class _LowRankUpdate(_AdapterModule):
    """Compute output + (alpha / rank) B A x. Without gradients this is done in place."""

    def __init__(self, inputs: int, outputs: int, *, rank: int, scale: float) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(torch.zeros(rank, inputs))
        self.lora_B = nn.Parameter(torch.zeros(outputs, rank))
        self.scale = scale

    def forward(self, output: Tensor, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            low = nn.functional.linear(x.to(self.lora_A.dtype), self.lora_A)
            return output + (nn.functional.linear(low, self.lora_B) * self.scale).to(output.dtype)
        low = nn.functional.linear(x, self.lora_A.to(x.dtype)).to(output.dtype)
        return output.baddbmm_(low, self.lora_B.to(output.dtype).T.expand(len(x), -1, -1), alpha=self.scale)


class _MaskRow(_AdapterModule):
    """Replace embeddings by the mask's embedding. Without gradients this is done in place."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))

    def forward(self, output: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return self.weight.to(output.dtype).expand_as(output).clone()  # some models write into their embeddings
        return output.copy_(self.weight)


# The gate (see `acting_on`), [rows, columns] of the pass, and the id of the thread that runs it.
PassState = tuple[int | Tensor, torch.Size, int]
_INACTIVE: PassState = (0, torch.Size((0, 0)), 0)


class MaskGatedAdapter(nn.Module):
    """Low-rank updates of linear layers and an input embedding of the mask, which act at mask positions only.

    At a mask y += (alpha / rank) B A x. At every other column the layer's output is unchanged, bit for bit, so the base reads
    the text regardless of the training. The adapter is active only in passes within `acting_on`, in the same thread:

        with adapter.acting_on(3):      # the last 3 columns are masks
            model(input_ids)

    Attributes:
        names: names of the adapted layers, in the order of `updates`.
        mtp: `config.mtp` of the model that was trained.
        defaults: decoding defaults, `confadapt` and `verify`, for a base whose generation_config has neither.
        base: name and `base_fingerprint` of the model that the adapter was trained on; the fingerprint may be None.
        lora_layers: names of the layers that must have a PEFT LoRA. An adapter of a LoRA model has no updates of its
            own, since the LoRA acts at every column: it holds only the embedding of the mask.
        source: the repository that the adapter was read from, and the version of its file.
    """

    updates: Any  # a ModuleList of _LowRankUpdate, in the order of `names`

    def __init__(self, shapes: dict[str, tuple[int, int]], *, rank: int, alpha: float, hidden_size: int) -> None:
        """Create the adapter with zero weights; `shapes` maps each adapted layer's name to its (inputs, outputs)."""
        super().__init__()
        self.names = list(shapes)
        self.rank, self.alpha = rank, alpha
        scale = alpha / rank
        self.updates = nn.ModuleList(_LowRankUpdate(*shape, rank=rank, scale=scale) for shape in shapes.values())
        self.mask_row = _MaskRow(hidden_size)
        self.mtp: dict[str, Any] = {}
        self.defaults: dict[str, Any] = {}
        self.base: tuple[str, str | None] = ("", None)
        self.source: tuple[str, str | None] | None = None
        self.lora_layers: list[str] = []
        self._gate, self._shape, self._thread = _INACTIVE
        self._hooks: list[RemovableHandle] = []

    # ---- attach and detach ----

    def attach(self, model: PreTrainedModel) -> MaskGatedAdapter:
        """Set `model.mtp_adapter` to this adapter, and register its hooks on the model's layers."""
        try:
            self._register_hooks(model)
        except BaseException:  # for example out of memory, or Ctrl-C
            self._remove_hooks()
            raise
        model.mtp_adapter = self
        # The adapter is saved to a file of its own: keep it out of the model's weights, which stay those of the base.
        model._keys_to_ignore_on_save = set(model._keys_to_ignore_on_save or ()) | self._keys
        return self

    def detach(self, model: PreTrainedModel) -> None:
        """Remove the adapter and its hooks from the model."""
        self._remove_hooks()
        model._keys_to_ignore_on_save = set(model._keys_to_ignore_on_save or ()) - self._keys
        del model.mtp_adapter

    def _register_hooks(self, model: PreTrainedModel) -> None:
        for name, update in zip(self.names, self.updates, strict=True):
            layer, hook = _innermost(model.get_submodule(name)), functools.partial(self._adapt, name, update)
            update.to(execution_device(layer))  # layers may be spread over devices
            self._hooks.append(layer.register_forward_hook(hook))
        self.mask_row.to(execution_device(model.get_input_embeddings()))
        self._hooks.append(_innermost(model.get_input_embeddings()).register_forward_hook(self._embed))

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    @property
    def _keys(self) -> set[str]:
        return {f"mtp_adapter.{name}" for name, _ in self.named_parameters()}

    # ---- activate at masks ----

    @contextmanager
    def acting_on(self, gate: int | Tensor) -> Iterator[None]:
        """Activate the adapter for this thread's passes within the block. After it, restore the state, even on an error.

        Args:
            gate: which columns are masks: their number at the end of every row, or bool [B, T].
        """
        with self.within((gate, torch.Size((0, 0)), threading.get_ident())):
            yield

    @property
    def state(self) -> PassState:
        """The current state. A layer that backward recomputes in `within(state)` runs as it did in the forward pass."""
        return self._gate, self._shape, self._thread

    @contextmanager
    def within(self, state: PassState) -> Iterator[None]:
        """Apply an earlier `state` to the current thread's passes within the block. Backward may run in another thread."""
        before = self.state
        self._gate, self._shape, _ = state
        self._thread = threading.get_ident()
        try:
            yield
        finally:
            self._gate, self._shape, self._thread = before

    @property
    def _is_inactive(self) -> bool:
        if isinstance(self._gate, int) and self._gate == 0:
            return True
        # Compiled code cannot read its thread's id. Assume that it runs in the thread that compiles it.
        return not torch.compiler.is_compiling() and self._thread != threading.get_ident()

    def _adapt(self, name: str, update: _LowRankUpdate, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if self._is_inactive:
            return output
        flat, x = output, inputs[0]
        if output.ndim == 2 and "expert" not in name and len(output) == math.prod(self._shape):  # OPT flattens its rows
            output, x = output.view(*self._shape, -1), x.view(*self._shape, -1)
        if output.shape[:-1] != self._shape:  # an expert's tokens, or keys of the whole cache: the masks are unknown
            raise ValueError(f"{name} returns {tuple(output.shape)}, not [rows, columns, features]; adapt other modules.")
        return self._where_gated(output, lambda part, columns: update(part, x[:, columns])).view_as(flat)

    def _embed(self, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if self._is_inactive:
            return output
        self._shape = output.shape[:2]
        return self._where_gated(output, lambda part, columns: self.mask_row(part))

    def _where_gated(self, output: Tensor, change: Callable[[Tensor, slice], Tensor]) -> Tensor:
        """Return the output with its masks changed by `change(columns, slice)`, which writes in place without gradients."""
        if isinstance(self._gate, Tensor):
            return torch.where(self._gate.to(output.device)[..., None], change(output.clone(), slice(None)), output)
        tail = change(output[:, -self._gate :], slice(-self._gate, None))
        if self._gate == output.shape[1]:
            return tail
        return torch.cat([output[:, : -self._gate], tail], 1) if torch.is_grad_enabled() else output


def _innermost(layer: Any) -> Any:
    """Return the layer inside PEFT's wrappers. An adapter hooked there survives when PEFT merges and unwraps."""
    while hasattr(layer, "base_layer"):
        layer = layer.base_layer
    return layer


def adapter_of(model: PreTrainedModel) -> MaskGatedAdapter | None:
    """Return the adapter that is attached to a model, or None."""
    attached: MaskGatedAdapter | None = getattr(model, "mtp_adapter", None)
    return attached
