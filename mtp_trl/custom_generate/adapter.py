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
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from .low_rank import AdapterModule, FusedUpdates, LowRankUpdate
from .probes import execution_device


class _MaskRow(AdapterModule):
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
        gguf_file: the GGUF file from which that model was loaded; None if it was not a GGUF file.
        lora_layers: names of the layers that must have a PEFT LoRA. An adapter of a LoRA model has no updates of its
            own, since the LoRA acts at every column: it holds only the embedding of the mask.
        source: the repository that the adapter was read from, and the version of its file.
    """

    updates: Any  # a ModuleList of LowRankUpdate, in the order of `names`

    def __init__(self, shapes: dict[str, tuple[int, int]], *, rank: int, alpha: float, hidden_size: int) -> None:
        """Create the adapter with zero weights; `shapes` maps each adapted layer's name to its (inputs, outputs)."""
        super().__init__()
        self.names = list(shapes)
        self.rank, self.alpha = rank, alpha
        scale = alpha / rank
        self.updates = nn.ModuleList(LowRankUpdate(*shape, rank=rank, scale=scale) for shape in shapes.values())
        self.mask_row = _MaskRow(hidden_size)
        self.mtp: dict[str, Any] = {}
        self.defaults: dict[str, Any] = {}
        self.base: tuple[str, str | None] = ("", None)
        self.gguf_file: str | None = None
        self.source: tuple[str, str | None] | None = None
        self.lora_layers: list[str] = []
        self._gate, self._shape, self._thread = _INACTIVE
        self._fused = FusedUpdates(list(self.updates))
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

    def hook(self, model: PreTrainedModel, hooked: bool) -> None:
        """Add or remove the hooks of an attached adapter, for passes that do not need it."""
        if hooked and not self._hooks:
            self._register_hooks(model)
        elif not hooked:
            self._remove_hooks()

    def _register_hooks(self, model: PreTrainedModel) -> None:
        for index, (name, update) in enumerate(zip(self.names, self.updates, strict=True)):
            layer, hook = _innermost(model.get_submodule(name)), functools.partial(self._adapt, index, name, update)
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
        self._fused.end_pass()
        self._gate, self._shape, _ = state
        self._thread = threading.get_ident()
        try:
            yield
        finally:
            self._gate, self._shape, self._thread = before
            self._fused.end_pass()

    @property
    def _is_inactive(self) -> bool:
        if isinstance(self._gate, int) and self._gate == 0:
            return True
        # Compiled code cannot read its thread's id. Assume that it runs in the thread that compiles it.
        return not torch.compiler.is_compiling() and self._thread != threading.get_ident()

    def _adapt(
        self, index: int, name: str, update: LowRankUpdate, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor
    ) -> Tensor:
        if self._fused.masks and self._thread == threading.get_ident() and output.shape[:-1] == self._shape:
            self._fused.add(index, output, inputs[0])
            return output
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
        # Sharded weights are whole only while their module runs, and compiled code is fused by the compiler.
        unfused = torch.is_grad_enabled() or torch.compiler.is_compiling() or dist.is_initialized()
        if isinstance(self._gate, int) and not unfused:
            self._fused.start_pass(output, masks=self._gate)
        elif self._fused.masks:
            self._fused.end_pass()
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
