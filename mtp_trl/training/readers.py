"""Forward passes of student and teacher over a layout: whole rows, or in exact mode the text once and the slots twice."""

# Shapes: B rows of the batch, D features of an attention head, H hidden features, K positions of a block,
# N clean tokens of a row, P positions read, R regions of a row, S mask slots of a row, T columns of a forward pass,
# V vocabulary, X layout rows

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from statistics import median
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.modeling_layers import GradientCheckpointingLayer

from ..custom_generate.adapter import adapter_of
from ..custom_generate.generate import evaluating
from ..custom_generate.probes import CACHE_NAMES
from ..modeling.attention import attention_masks
from ..modeling.checks import can_pack
from ..modeling.logits import backbone, hidden_states, output_logits
from .regions import Layout, Regions, pack_regions


class Reader(Protocol):
    """Interface for the forward passes of student and teacher over a layout.

    Attributes:
        student, teacher: causal LMs whose output heads turn the hidden states into logits.
        base_reads_text: whether the base predicts position 1 of a block, which is then not trained (exact mode).
    """

    student: PreTrainedModel
    teacher: PreTrainedModel
    base_reads_text: bool

    def read_student(self, layout: Layout) -> Tensor:
        """Return the student's hidden states [X * T, H], with mask tokens in the slots, with gradient."""

    def read_teacher(self, layout: Layout, ids_XT: Tensor) -> Tensor | None:
        """Return the teacher's hidden states [X * T, H] for the tokens `ids_XT`, without gradient; None if no teacher runs."""

    def teacher_logits(self, hidden_PH: Tensor) -> Tensor:
        """Return the teacher's logits [P, V] for its hidden states."""


def masks_of(model: PreTrainedModel, layout: Layout, **columns: slice) -> Tensor | dict[str, Tensor]:
    """Return the attention mask of a layout in the form that the model expects.

    Args:
        model: model that reads the layout.
        layout: packed or suffix layout.
        columns: `queries` and `keys` of `attention_masks`; only for packed layouts.
    """
    if layout.allowed_XTT is None:
        return layout.valid_XT.long()
    return attention_masks(model.config, layout.allowed_XTT, layout.positions_XT, model.dtype, **columns)


def read_rows(model: PreTrainedModel, layout: Layout, ids_XT: Tensor) -> Tensor:
    """Run a forward pass over whole layout rows and return its hidden states [X * T, H]."""
    positions_XT = None if layout.allowed_XTT is None else layout.positions_XT
    return hidden_states(model, ids_XT, masks_of(model, layout), positions_XT)


@dataclass
class WholeRowReader:
    """`Reader` that reads whole rows: for full fine-tuning, or adapters that act at every position.

    Attributes:
        student, teacher: see `Reader`.
        run_teacher: calls a function with the teacher (the frozen copy, or the student with adapters off) without
            gradient; None if the objective needs no teacher.
        teacher_state: context manager for the use of `teacher`; it turns adapters off if the teacher is the student's module.
    """

    student: PreTrainedModel
    teacher: PreTrainedModel
    run_teacher: Callable[[Callable[[PreTrainedModel], Tensor]], Tensor] | None
    teacher_state: Callable[[], AbstractContextManager[Any]] = nullcontext
    base_reads_text: bool = False

    def read_student(self, layout: Layout) -> Tensor:
        """See `Reader`."""
        return read_rows(self.student, layout, layout.ids_XT)

    def read_teacher(self, layout: Layout, ids_XT: Tensor) -> Tensor | None:
        """See `Reader`."""
        if self.run_teacher is None:
            return None
        return self.run_teacher(lambda model: read_rows(model, layout, ids_XT))

    def teacher_logits(self, hidden_PH: Tensor) -> Tensor:
        """See `Reader`."""
        with self.teacher_state():
            return output_logits(self.teacher, hidden_PH)


_CHECKPOINTING_ERROR = (
    "{} does not pass the text's keys and values to its layers under gradient checkpointing; set gradient_checkpointing=False."
)


class ExactReader:
    """`Reader` for exact mode.

    Attention-only models read the text once, and the slots twice with the text's keys and values: once as student, once as
    teacher. Other models read whole rows.
    """

    base_reads_text = True

    def __init__(self, model: PreTrainedModel, *, with_teacher: bool) -> None:
        adapter = adapter_of(model)
        assert adapter is not None
        self.student = self.teacher = model
        self.adapter, self.with_teacher = adapter, with_teacher
        for module in model.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module._can_checkpoint_with_cache = True  # passes over slots only read the cache

    def read_student(self, layout: Layout) -> Tensor:
        """Return hidden states [X * T, H]: the base's at the text, and the student's at the slots, the latter with gradient."""
        if layout.allowed_XTT is None:
            gate = torch.zeros_like(layout.valid_XT)
            gate.view(-1)[layout.read_BRK[..., 1:][layout.drawn_BRK[..., 1:]]] = True
            with self._adapter_active(gate):
                return read_rows(self.student, layout, layout.ids_XT)
        self.text_BNH, self.prefix = self._read_text(layout)
        with self._adapter_active(layout.ids_XT.shape[1] - layout.clean_length):
            return self._read_slots(layout, layout.ids_XT)

    @torch.no_grad()
    def read_teacher(self, layout: Layout, ids_XT: Tensor) -> Tensor | None:
        """Return the base's hidden states [X * T, H] with the student's tokens in the slots; None without a teacher."""
        if not self.with_teacher:
            return None
        with evaluating(self.student):
            if layout.allowed_XTT is None:
                return read_rows(self.teacher, layout, ids_XT)
            return self._read_slots(layout, ids_XT)

    def teacher_logits(self, hidden_PH: Tensor) -> Tensor:
        """See `Reader`."""
        return output_logits(self.teacher, hidden_PH)

    @contextmanager
    def _adapter_active(self, gate: int | Tensor) -> Iterator[None]:
        """Activate the adapter within the block, and again when backward recomputes a layer that ran in it."""
        # transformers' layers checkpoint themselves; the activation checkpointing of FSDP and accelerate wraps them.
        names = ("_gradient_checkpointing_func", "checkpoint_fn")
        found = [(module, name) for module in self.student.modules() for name in names if hasattr(module, name)]
        checkpoints = [getattr(module, name) for module, name in found]
        with self.adapter.acting_on(gate):
            for (module, name), checkpoint in zip(found, checkpoints, strict=True):
                setattr(module, name, functools.partial(self._checkpoint_with_adapter, checkpoint))
            try:
                yield
            finally:
                for (module, name), checkpoint in zip(found, checkpoints, strict=True):
                    setattr(module, name, checkpoint)

    def _checkpoint_with_adapter(
        self, checkpoint: Callable[..., Any], function: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        if torch.compiler.is_compiling():  # the compiler recomputes the traced operations, adapter included
            return checkpoint(function, *args, **kwargs)
        state = self.adapter.state

        def adapted(*inputs: Any, **named: Any) -> Any:
            with self.adapter.within(state):
                return function(*inputs, **named)

        return checkpoint(adapted, *args, **kwargs)

    @torch.no_grad()
    def _read_text(self, layout: Layout) -> tuple[Tensor, Cache]:
        text, cache = slice(layout.clean_length), DynamicCache()
        with evaluating(self.student):
            hidden = backbone(self.student)(
                input_ids=layout.ids_XT[:, text],
                position_ids=layout.positions_XT[:, text],
                attention_mask=masks_of(self.student, layout, queries=text, keys=text),
                use_cache=True,
                **{CACHE_NAMES[0]: cache},
            ).last_hidden_state
        return hidden, Cache(layers=[_ReadOnlyLayer(layer.keys, layer.values) for layer in cache.layers])

    def _read_slots(self, layout: Layout, ids_XT: Tensor) -> Tensor:
        """Read the slots with the text's keys and values; return the hidden states of the text and the slots, [X * T, H]."""
        slots = slice(layout.clean_length, None)
        try:
            hidden = backbone(self.student)(
                input_ids=ids_XT[:, slots],
                position_ids=layout.positions_XT[:, slots],
                attention_mask=masks_of(self.student, layout, queries=slots),
                use_cache=False,
                **{CACHE_NAMES[0]: self.prefix},
            ).last_hidden_state
        except RuntimeError as error:
            if self._cache_was_ignored() and not isinstance(error, torch.OutOfMemoryError):
                raise ValueError(_CHECKPOINTING_ERROR.format(type(self.student).__name__)) from error
            raise
        if self._cache_was_ignored():
            raise ValueError(_CHECKPOINTING_ERROR.format(type(self.student).__name__))
        return torch.cat([self.text_BNH, hidden], 1).flatten(0, 1)

    def _cache_was_ignored(self) -> bool:
        checkpointing = self.student.is_gradient_checkpointing and self.student.training
        return checkpointing and not self.prefix.layers[0].was_read


class _ReadOnlyLayer(DynamicLayer):
    """Keys and values of a text. Passes over slots read them without extending them, so that recomputation sees the same."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized, self.was_read = keys, values, True, False

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return the keys and values of the text followed by those of the slots, [B, heads, N + S, D] each."""
        self.was_read = True
        return torch.cat([self.keys, key_states], -2), torch.cat([self.values, value_states], -2)


@torch.no_grad()
def check_layout(model: PreTrainedModel, mask_token_id: int) -> None:
    """Raise ValueError if a packed row and separate passes give different hidden states, or NaN, for two regions of a text."""
    if not can_pack(model):
        return
    text_BN = torch.arange(8, device=model.device)[None] % model.config.get_text_config().vocab_size
    regions = Regions(torch.tensor([[2, 5]]), torch.tensor([[3, 3]]))
    lengths_B = torch.tensor([text_BN.shape[1]])
    layout = pack_regions(text_BN, lengths_B, regions, k_max=3, slots=4, mask_token_id=mask_token_id)
    gaps = []
    with evaluating(model):
        hidden = read_rows(model, layout, layout.ids_XT)
        for anchor, read_K in zip(regions.anchor_BR[0].tolist(), layout.read_BRK[0], strict=True):
            ids = torch.cat([text_BN[:, : anchor + 1], text_BN.new_full((1, 2), mask_token_id)], 1)
            separate = backbone(model)(input_ids=ids, use_cache=False).last_hidden_state[0, anchor:].float()
            gaps += ((hidden[read_K].float() - separate).norm(dim=-1) / separate.norm(dim=-1)).tolist()
    if any(map(math.isnan, gaps)):
        raise ValueError(
            f"{type(model).__name__} computes NaN for mask tokens, with attn_implementation="
            f"{model.config.get_text_config()._attn_implementation!r} in {model.dtype}; load it with "
            "attn_implementation='eager' or in float32."
        )
    if median(gaps) > 0.1:  # the median, because rounding may send single tokens to other experts
        raise ValueError(
            f"{type(model).__name__} computes different hidden states for blocks that share a row and for the same blocks in "
            f"separate passes (median difference {median(gaps):.0%}), so training would be silently wrong; please report the "
            "architecture."
        )
