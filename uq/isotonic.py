"""Making quantiles non-decreasing along their levels: sorting, Euclidean projection, the min-max sweep.

Sorting (Chernozhukov, Fernandez-Val, Galichon, Econometrica 2010) and the projection cannot raise the pinball loss summed
over the levels, whatever y is; the sweep can, and often does (Fakoor et al., JMLR 2023, arXiv 2103.00083). All take (..., m),
keep the shape, are vectorised over the rest, and let gradients through.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def sort(q: Tensor) -> Tensor:
    """The increasing rearrangement: a permutation of the values."""
    return q.sort(dim=-1).values


def blocks(q: Tensor) -> tuple[Tensor, Tensor]:
    """Pool adjacent violators of q (N, m): the projection (N, m), and the block that each entry belongs to, int64 (N, m).

    One pass over the levels for all rows together. A row keeps a stack of blocks with their sums and sizes; while its last
    block's mean lies below the one before, the two are merged. Sorted rows come back bit for bit.
    """
    n, m = q.shape
    total, size = torch.zeros_like(q), torch.zeros_like(q)
    top = torch.full((n,), -1, dtype=torch.int64, device=q.device)  # the last block of each row
    for level in range(m):
        top += 1
        total.scatter_(1, top[:, None], q[:, level : level + 1])
        size.scatter_(1, top[:, None], 1.0)
        while True:
            at, before = top[:, None], (top - 1).clamp_min(0)[:, None]
            last, previous = total.gather(1, at) / size.gather(1, at), total.gather(1, before) / size.gather(1, before)
            rows = ((top > 0) & (previous > last)[:, 0]).nonzero()[:, 0]
            if not len(rows):
                break
            for kept in (total, size):
                kept[rows, top[rows] - 1] += kept[rows, top[rows]]
                kept[rows, top[rows]] = 0.0
            top[rows] -= 1
    ends = size.cumsum(1)  # entries past a row's last block repeat m, which no position reaches
    block = torch.searchsorted(
        ends, torch.arange(m, dtype=q.dtype, device=q.device).expand(n, m).contiguous(), right=True
    )
    return (total / size.clamp_min(1.0)).gather(1, block), block


class _Projection(torch.autograd.Function):
    """The block structure is constant almost everywhere, so the derivative of a block's mean is an average over the block."""

    @staticmethod
    def forward(ctx: Any, q: Tensor) -> Tensor:
        projected, block = blocks(q)
        ctx.save_for_backward(block)
        return projected

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (block,) = ctx.saved_tensors
        g = gradients[0]
        total = torch.zeros_like(g).scatter_add_(1, block, g)
        size = torch.zeros_like(g).scatter_add_(1, block, torch.ones_like(g))
        return (total / size.clamp_min(1.0)).gather(1, block)


def pava(q: Tensor) -> Tensor:
    """The nearest non-decreasing vector: means over blocks. The gradient is averaged over each block."""
    projected: Tensor = _Projection.apply(q.reshape(-1, q.shape[-1]))
    return projected.reshape(q.shape)


def min_max(q: Tensor, anchor: int) -> Tensor:
    """The sweep from level `anchor` (the median's index), which it leaves alone: running minima below, maxima above it."""
    below = q[..., : anchor + 1].flip(-1).cummin(dim=-1).values.flip(-1)
    above = q[..., anchor:].cummax(dim=-1).values
    return torch.cat([below, above[..., 1:]], dim=-1)


def median_index(levels: Tensor) -> int:
    """Index of the level 1/2, or of the largest below it (the smallest level where there is none)."""
    return max(0, int((levels <= 0.5 + 1e-9).sum()) - 1)


def operator(name: str, levels: Tensor) -> Callable[[Tensor], Tensor]:
    """The operator of that name, one of `OPERATORS`, for quantiles at increasing `levels` (m,)."""
    anchor = median_index(levels)
    return {"none": lambda q: q, "sort": sort, "pava": pava, "min-max": lambda q: min_max(q, anchor)}[name]


OPERATORS = ("none", "sort", "pava", "min-max")
