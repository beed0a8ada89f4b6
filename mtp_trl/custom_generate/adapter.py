"""Exact mode's adapter: low-rank updates and a mask row that act at masks only (method section 4b)."""

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


class _Part(nn.Module):
    """A module, so that frameworks that shard weights gather them when it runs.

    A state dict of the base, which has no adapter, loads all the same.
    """

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if any(f"{prefix}{name}" in state_dict for name, _ in self.named_parameters(recurse=False)):
            super()._load_from_state_dict(state_dict, prefix, *args)


class _LowRankUpdate(_Part):
    """output + (alpha / rank) B A x; in place where no gradient is computed."""

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


class _MaskRow(_Part):
    """The mask's input embedding; written in place where no gradient is computed."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))

    def forward(self, output: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return self.weight.to(output.dtype).expand_as(output).clone()  # some models write into their embeddings
        return output.copy_(self.weight)


# Where the adapter acts, rows and columns of the pass, and the thread that runs it.
PassState = tuple[int | Tensor, torch.Size, int]
_RESTING: PassState = (0, torch.Size((0, 0)), 0)


class MaskGatedAdapter(nn.Module):
    """Low-rank updates of linear layers, and an input row, that act at mask slots only.

    At a mask y += (alpha / rank) B A x; at every other column the layer's output is left as it is, bit for bit, so the text
    is read by the base whatever the training did. It rests unless a pass runs within `acting_on`, in the same thread:

        with adapter.acting_on(3):      # the last 3 columns are masks
            model(input_ids)

    Attributes:
        names: the adapted layers, in the order of `updates`.
        mtp: `config.mtp` of the model it was trained in.
        defaults: of decoding, `confadapt` and `verify`, for a base whose generation_config knows neither.
        base: name and `base_fingerprint` of the model it was trained on; the fingerprint may be None.
        lora_layers: where the model must have LoRA layers of PEFT's, by name: beside a LoRA, which acts at every column, this
            adapter has no updates of its own and brings only the mask's row.
        source: the repository and which version of its file it was read from.
    """

    updates: Any  # a ModuleList of _LowRankUpdate, in the order of `names`

    def __init__(self, shapes: dict[str, tuple[int, int]], *, rank: int, alpha: float, hidden_size: int) -> None:
        """`shapes`: (inputs, outputs) of each adapted layer, by its name in the model."""
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
        self._gate, self._shape, self._thread = _RESTING
        self._hooks: list[RemovableHandle] = []

    # ---- on and off a model ----

    def attach(self, model: PreTrainedModel) -> MaskGatedAdapter:
        """Become the model's submodule `mtp_adapter`, called by its layers from now on."""
        for name, update in zip(self.names, self.updates, strict=True):
            layer, hook = _innermost(model.get_submodule(name)), functools.partial(self._adapt, name, update)
            update.to(execution_device(layer))  # layers may be spread over devices
            self._hooks.append(layer.register_forward_hook(hook))
        self.mask_row.to(execution_device(model.get_input_embeddings()))
        self._hooks.append(_innermost(model.get_input_embeddings()).register_forward_hook(self._embed))
        model.mtp_adapter = self
        # The adapter has a file of its own; the model's own file stays the base's.
        model._keys_to_ignore_on_save = set(model._keys_to_ignore_on_save or ()) | self._keys
        return self

    def detach(self, model: PreTrainedModel) -> None:
        """Leave the model as it was."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        model._keys_to_ignore_on_save = set(model._keys_to_ignore_on_save or ()) - self._keys
        del model.mtp_adapter

    @property
    def _keys(self) -> set[str]:
        return {f"mtp_adapter.{name}" for name, _ in self.named_parameters()}

    # ---- where it acts ----

    @contextmanager
    def acting_on(self, gate: int | Tensor) -> Iterator[None]:
        """Passes of this thread within the block are adapted; after it, whatever happened, as before it.

        Args:
            gate: the number of columns at the end of every row that are masks, or bool [B, T].
        """
        with self.within((gate, torch.Size((0, 0)), threading.get_ident())):
            yield

    @property
    def state(self) -> PassState:
        """What a pass of now is adapted by: for layers that run once more in backward, see `within`."""
        return self._gate, self._shape, self._thread

    @contextmanager
    def within(self, state: PassState) -> Iterator[None]:
        """Passes within the block are adapted as they were when `state` was read, in whichever thread they run."""
        before = self.state
        self._gate, self._shape, _ = state
        self._thread = threading.get_ident()
        try:
            yield
        finally:
            self._gate, self._shape, self._thread = before

    @property
    def _rests(self) -> bool:
        if isinstance(self._gate, int) and self._gate == 0:
            return True
        # A compiled pass is that of the thread which compiled it, and cannot ask.
        return not torch.compiler.is_compiling() and self._thread != threading.get_ident()

    def _adapt(self, name: str, update: _LowRankUpdate, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if self._rests:
            return output
        flat, x = output, inputs[0]
        if output.ndim == 2 and "expert" not in name and len(output) == math.prod(self._shape):  # OPT flattens rows
            output, x = output.view(*self._shape, -1), x.view(*self._shape, -1)
        if output.shape[:-1] != self._shape:  # experts' tokens, or keys of the whole cache: which are masks is unknown
            raise ValueError(f"{name} gives {tuple(output.shape)}, not [rows, columns, features]: adapt other modules.")
        return self._where_gated(output, lambda part, columns: update(part, x[:, columns])).view_as(flat)

    def _embed(self, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if self._rests:
            return output
        self._shape = output.shape[:2]
        return self._where_gated(output, lambda part, columns: self.mask_row(part))

    def _where_gated(self, output: Tensor, changed: Callable[[Tensor, slice], Tensor]) -> Tensor:
        """The output with some columns changed: `changed` takes them and their slice, and may write into them."""
        if isinstance(self._gate, Tensor):
            return torch.where(self._gate.to(output.device)[..., None], changed(output.clone(), slice(None)), output)
        tail = changed(output[:, -self._gate :], slice(-self._gate, None))
        if self._gate == output.shape[1]:
            return tail
        return torch.cat([output[:, : -self._gate], tail], 1) if torch.is_grad_enabled() else output


def _innermost(layer: Any) -> Any:
    """The layer itself where PEFT has wrapped it: there the adapter stays when PEFT merges and unwraps."""
    while hasattr(layer, "base_layer"):
        layer = layer.base_layer
    return layer


def adapter_of(model: PreTrainedModel) -> MaskGatedAdapter | None:
    """The adapter that is attached to a model; None without one."""
    attached: MaskGatedAdapter | None = getattr(model, "mtp_adapter", None)
    return attached
