"""Low-rank updates of linear layers: one at a time with gradients, and fused for decoding."""

# Shapes: B rows of the batch, H hidden features, I columns of a weight matrix, M masks of a row, O rows of a weight matrix,
# T columns of a forward pass, r rank

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class AdapterModule(nn.Module):
    """Parent of the adapter's parts. Each part is a module, so that FSDP and DeepSpeed gather its weights when it runs.

    A state dict without adapter weights, such as the base's, loads without an error and leaves these weights unchanged.
    """

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if any(f"{prefix}{name}" in state_dict for name, _ in self.named_parameters(recurse=False)):
            super()._load_from_state_dict(state_dict, prefix, *args)


class LowRankUpdate(AdapterModule):
    """Compute output + (alpha / rank) B A x. Without gradients this is done in place."""

    def __init__(self, inputs: int, outputs: int, *, rank: int, scale: float) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(torch.zeros(rank, inputs))
        self.lora_B = nn.Parameter(torch.zeros(outputs, rank))
        self.scale = scale

    def forward(self, output: Tensor, x: Tensor) -> Tensor:
        """Return the output of a layer for input `x` with the update added."""
        if torch.is_grad_enabled():
            low = nn.functional.linear(x.to(self.lora_A.dtype), self.lora_A)
            return output + (nn.functional.linear(low, self.lora_B) * self.scale).to(output.dtype)
        low = nn.functional.linear(x, self.lora_A.to(x.dtype)).to(output.dtype)
        return output.baddbmm_(low, self.lora_B.to(output.dtype).T.expand(len(x), -1, -1), alpha=self.scale)


class FusedUpdates:
    """The same updates for passes without gradients, with fewer and faster products.

    Layers that read the same input (the query, key and value projections; the gate and up projections) share one product
    with all their matrices A. Which layers these are is observed in the first pass, and every later pass compares the inputs
    again, so a wrong group costs time but never changes a result. On a CPU the products run in float32: bfloat16 products
    this small are several times slower there.

    A pass is dominated by reading the base's weights, which evict everything else from the processor's caches. The code that
    runs once per layer is therefore kept short.
    """

    def __init__(self, updates: Sequence[LowRankUpdate]) -> None:
        self.updates = updates
        self.groups = [[index] for index in range(len(updates))]  # by layer: the layers whose A x it computes
        self.down: list[Tensor | None] = []  # by layer: the matrices A of its group, stacked
        self.up: list[Tensor | None] = []  # by layer: (alpha / rank) B, transposed
        self.versions: list[Any] = []
        self.end_pass()

    def start_pass(self, embeddings_BTH: Tensor, *, masks: int) -> None:
        """Prepare a pass whose last `masks` columns are masks. Drop the fused weights if the adapter's weights have changed."""
        self.rows, self.columns = embeddings_BTH.shape[:2]
        self.masks, self.text = masks, self.columns - masks
        self.dtype = torch.float32 if embeddings_BTH.device.type == "cpu" else embeddings_BTH.dtype
        parameters = (parameter for update in self.updates for parameter in (update.lora_A, update.lora_B))
        versions = [self.dtype, *((p.data_ptr(), 0 if p.is_inference() else p._version) for p in parameters)]
        if versions != self.versions:
            self.versions = versions
            self.down, self.up = [None] * len(self.updates), [None] * len(self.updates)

    def end_pass(self) -> None:
        """Release the last input."""
        self.masks = 0
        self.input: Tensor | None = None
        self.leader = 0
        self.low: dict[int, Tensor] = {}

    def add(self, index: int, output_BTO: Tensor, x_BTI: Tensor) -> None:
        """Add the update of a layer to its output at the masks, in place."""
        if x_BTI is not self.input:
            self.input, self.leader = x_BTI, index
            self.low = self._products(index, x_BTI)
        elif index not in self.low:  # seen with this input for the first time: the leader computes its product from now on
            self.groups[self.leader].append(index)
            self.down[self.leader] = None
            self.low |= self._products(index, x_BTI)
        up_rO = self.up[index]
        if up_rO is None:
            update = self.updates[index]
            up_rO = self.up[index] = (update.lora_B.detach().to(self.dtype) * update.scale).T.contiguous()
        low = self.low[index]
        if self.rows == 1 and output_BTO.dtype == self.dtype:
            output_BTO[0, self.text :].addmm_(low[0], up_rO)
        else:
            tail_BMO = output_BTO[:, self.text :]
            tail_BMO += (low.reshape(-1, len(up_rO)) @ up_rO).view_as(tail_BMO)

    def _products(self, index: int, x_BTI: Tensor) -> dict[int, Tensor]:
        """Return A x [B, M, r] of every layer in the group of `index`."""
        down = self.down[index]
        if down is None:
            matrices = [self.updates[member].lora_A.detach().to(self.dtype) for member in self.groups[index]]
            down = self.down[index] = torch.cat(matrices) if len(matrices) > 1 else matrices[0]
        text = self.text
        if text > self.masks:  # mostly text: select the masks first, which copies them if there are several rows
            x_BTI, text = x_BTI[:, text:], 0
        low = nn.functional.linear(x_BTI.to(self.dtype), down)
        if text:
            low = low[:, text:]
        group = self.groups[index]
        return {index: low} if len(group) == 1 else dict(zip(group, low.chunk(len(group), -1), strict=True))
