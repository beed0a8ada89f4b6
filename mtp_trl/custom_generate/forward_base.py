"""What all ways to run a step share: one call of the model, the adapter at its masks, ranks that wait for each other."""

# Shapes: A rows not finished, P positions read, T columns of a forward pass, V vocabulary

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from .adapter import MaskGatedAdapter
from .probes import execution_device
from .rows import Row
from .settings import Settings


class StepColumns(NamedTuple):
    """The columns of a step, int64 [A, T] each.

    Attributes:
        ids: tokens and masks; 0 at padding.
        positions: in each row's own text.
        slots: of the cache, where their keys and values go; padding goes to one that nobody reads.
        anchors: the last position of the text that a column sees.
    """

    ids: Tensor
    positions: Tensor
    slots: Tensor
    anchors: Tensor

    @classmethod
    def moved(cls, ids: Tensor, positions: Tensor, slots: Tensor, anchors: Tensor, device: torch.device) -> StepColumns:
        """On the device, in one transfer."""
        return cls(*torch.stack([ids, positions, slots, anchors]).to(device).unbind())


class Forward:
    """Logits of a step at the positions that are read: after every pending token that matters, and at the masks.

    Attributes:
        fed: how many columns, padding included, were fed since it was last set to 0.
        reread: about how many tokens of a row a step with masks feeds although they were fed before.
        keeps_rows: whether rows that ended stay in the batch.
    """

    fed = 0
    reread = 0
    keeps_rows = False

    def __init__(
        self,
        model: PreTrainedModel,
        settings: Settings,
        arguments: frozenset[str],
        *,
        adapter: MaskGatedAdapter | None,
        synced: bool,
    ) -> None:
        self.model = model
        self.device = execution_device(model.get_input_embeddings())
        self.call: Callable[..., Any] = model
        self.mask = settings.mask_token_id
        self.longest = settings.k
        self.takes_positions = "position_ids" in arguments
        self.keeps_logits = "logits_to_keep" in arguments
        # The load-balancing loss of a mixture of experts fails on ready-made masks.
        self.constants = {"output_router_logits": False} if "output_router_logits" in arguments else {}
        self.adapter = adapter
        self.synced = synced

    def __call__(self, alive: list[Row], k: int) -> tuple[Tensor, int]:
        """Logits [A, P, V] of a step with blocks of k, and how many of the P positions are masks: k - 1 of each block."""
        raise NotImplementedError

    def run(self, *, read: int, gate: int | Tensor, **inputs: Any) -> Tensor:
        """Logits [A, read, V] of the last columns; `gate` says which columns are masks."""
        self._any_rank_decodes(True)
        if self.keeps_logits:
            inputs["logits_to_keep"] = read
        with self.adapted(gate):
            logits: Tensor = self.call(**inputs, **self.constants, return_dict=True).logits
        self.fed += inputs["input_ids"].numel()
        return logits[:, -read:]

    def adapted(self, gate: int | Tensor) -> Any:
        """A context in which exact mode's adapter acts at the masks."""
        return nullcontext() if self.adapter is None else self.adapter.acting_on(gate)

    def drop_finished(self, alive: list[Row]) -> list[Row]:
        """The rows that go on. The last row moves to where one has ended: nothing else moves, and the batch shrinks."""
        if self.keeps_rows:
            return [row for row in alive if not row.done]
        for index in reversed(range(len(alive))):
            if alive[index].done:
                alive[index] = alive[-1]
                alive.pop()
                self.replace_row(index)
        return alive

    def replace_row(self, index: int) -> None:
        """In what is kept of the rows between steps, move the last one to `index`."""

    @contextmanager
    def without_adapter(self) -> Iterator[None]:
        """Plain decoding within the block: layers without hooks are called faster."""
        adapter, self.adapter = self.adapter, None
        if adapter is not None:
            adapter.detach(self.model)
        try:
            yield
        finally:
            if adapter is not None:
                self.adapter = adapter.attach(self.model)

    def run_until_all_ranks_finish(self) -> None:
        """Where weights are gathered from all ranks: pass after pass, until every rank has decoded its rows."""
        ids = torch.full((1, 1), self.mask, device=self.device)
        while self._any_rank_decodes(False):
            with self.adapted(int(self.longest > 1)):
                self.call(input_ids=ids, **self.constants)

    def _any_rank_decodes(self, decoding: bool) -> bool:
        """Asked by every rank before each of its passes."""
        if not self.synced:
            return False
        count = torch.tensor(int(decoding), device=self.device)
        dist.all_reduce(count)
        return decoding or bool(count)
