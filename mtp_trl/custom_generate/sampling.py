"""Random draws that depend only on (seed, prompt, position), not on block sizes, thresholds, the batch or the device."""

# Shapes: A rows not finished, P positions read, V vocabulary

from __future__ import annotations

import torch
from torch import Tensor

from .rows import Row


def draw(scores: Tensor, rows: list[Row], positions: list[int] | list[list[int]]) -> Tensor:
    """Draw tokens for the text `positions` from softmax(scores), [A, V] or [A, P, V], by the Gumbel trick.

    Drafting and verification use the same noise at a position, so that a draft often agrees with the token that verification
    draws if the two distributions are close.
    """
    keys = torch.tensor([row.noise_key for row in rows], device=scores.device)
    where = torch.tensor(positions, device=scores.device)
    return (scores + gumbel(keys.view(-1, *[1] * (where.ndim - 1)), where, scores.shape[-1])).argmax(-1)


def gumbel(keys: Tensor, positions: Tensor, size: int) -> Tensor:
    """Return standard Gumbel noise [..., size], float32. It depends only on key and position, on any device (SplitMix64)."""
    streams = _mix(keys + _mix(positions))[..., None]
    bits = _mix(streams + _signed(0x9E3779B97F4A7C15) * torch.arange(1, size + 1, device=keys.device))
    uniform = (bits & (2**63 - 1) | 1).float() * 2.0**-63
    return -torch.log(-torch.log1p(-uniform))


def _mix(x: Tensor) -> Tensor:
    """Apply the finaliser of SplitMix64 to int64, with products that wrap around."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> shift & (1 << 64 - shift) - 1)) * _signed(factor)
    return x ^ (x >> 31 & (1 << 33) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value
