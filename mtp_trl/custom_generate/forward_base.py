"""Base class of all ways to run a step. It calls the model, activates the adapter at masks and keeps ranks in step."""

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
    """Columns of a step, int64 [A, T] each.

    Attributes:
        ids: token ids and mask ids; 0 at padding.
        positions: positions in the text of the row.
        slots: cache slots to which the keys and values are written. Padding writes to a slot that no column attends to.
        anchors: last position of the text that each column attends to.
    """

    ids: Tensor
    positions: Tensor
    slots: Tensor
    anchors: Tensor

    @classmethod
    def moved(cls, ids: Tensor, positions: Tensor, slots: Tensor, anchors: Tensor, device: torch.device) -> StepColumns:
        """Build the columns on a device, in one transfer."""
        return cls(*torch.stack([ids, positions, slots, anchors]).to(device).unbind())


class Forward:
    """Runs a step and returns logits at the positions read: the last confirmed token, the drafts and the masks.

    Attributes:
        fed: number of columns fed, padding included, since the caller last set it to 0.
        reread: approximate number of tokens per row that a step with masks feeds again.
        keeps_rows: whether finished rows stay in the batch.
        blocks: largest number of blocks of masks in a step.
    """

    fed = 0
    blocks = 1
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
        # The load-balancing loss of mixture-of-experts models fails on 4D attention masks.
        self.constants = {"output_router_logits": False} if "output_router_logits" in arguments else {}
        self.adapter = adapter
        self.synced = synced

    def __call__(self, alive: list[Row], k: int, blocks: int) -> tuple[Tensor, int]:
        """Run a step with blocks of k tokens.

        Args:
            alive: the rows.
            k: tokens of a block, its first token included.
            blocks: number of rejection points that get their own block of masks, at most `self.blocks`.

        Returns:
            Logits [A, P, V], and how many of the P positions are masks: the last ones, k - 1 for each block.
        """
        raise NotImplementedError

    def run(self, *, read: int, gate: int | Tensor, **inputs: Any) -> Tensor:
        """Call the model and return logits [A, read, V] of the last columns; `gate` marks the columns that are masks."""
        self._any_rank_decodes(True)
        if self.keeps_logits:
            inputs["logits_to_keep"] = read
        with self.adapted(gate):
            logits: Tensor = self.call(**inputs, **self.constants, return_dict=True).logits
        self.fed += inputs["input_ids"].numel()
        return logits[:, -read:]

    def adapted(self, gate: int | Tensor) -> Any:
        """Return a context in which exact mode's adapter is active at the masks."""
        return nullcontext() if self.adapter is None else self.adapter.acting_on(gate)

    def drop_finished(self, alive: list[Row]) -> list[Row]:
        """Return the rows that are not finished. For each finished row, the last row moves into the gap and no other moves."""
        if self.keeps_rows:
            return [row for row in alive if not row.done]
        for index in reversed(range(len(alive))):
            if alive[index].done:
                alive[index] = alive[-1]
                alive.pop()
                self.replace_row(index)
        return alive

    def replace_row(self, index: int) -> None:
        """Move the last row to `index` in everything that is cached between steps, and drop the last row."""

    def hook_adapter(self, hooked: bool) -> None:
        """Add or remove the adapter's hooks. Layers without hooks run faster."""
        if self.adapter is not None:
            self.adapter.hook(self.model, hooked)

    @contextmanager
    def hooks_restored(self) -> Iterator[None]:
        """Add the adapter's hooks again after the block, even on an error."""
        try:
            yield
        finally:
            self.hook_adapter(True)

    def run_until_all_ranks_finish(self) -> None:
        """If passes gather weights from all ranks, run further passes until all ranks have decoded their rows."""
        ids = torch.full((1, 1), self.mask, device=self.device)
        while self._any_rank_decodes(False):
            with self.adapted(int(self.longest > 1)):
                self.call(input_ids=ids, **self.constants)

    def _any_rank_decodes(self, decoding: bool) -> bool:
        """Return whether any rank still decodes. Every rank must call this before each of its passes."""
        if not self.synced:
            return False
        count = torch.tensor(int(decoding), device=self.device)
        dist.all_reduce(count)
        return decoding or bool(count)
