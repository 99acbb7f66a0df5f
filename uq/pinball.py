"""Pinball loss of quantiles, the weighted interval score, the penalty on crossing (torch, differentiable).

Koenker and Bassett, Econometrica 1978; Fakoor, Kim, Mueller, Smola, Tibshirani, JMLR 24 (2023), arXiv 2103.00083.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_BLOCK = 1 << 22  # pairs of levels that are held in memory at a time


def pinball(y: Tensor, q: Tensor, levels: Tensor, huber: float = 0.0) -> Tensor:
    """psi_tau(y - q) = max(tau (y - q), (tau - 1)(y - q)), (..., m), for y (...), q (..., m) and levels (m,) in (0, 1).

    With huber = h > 0 the kink at 0 becomes a parabola of half-width h: |u| is replaced by u^2 / 2h + h / 2 where |u| < h.
    """
    u = y[..., None] - q
    if huber <= 0:
        return torch.maximum(levels * u, (levels - 1) * u)
    size = torch.where(u.abs() < huber, u * u / (2 * huber) + huber / 2, u.abs())
    return torch.where(u >= 0, levels, 1 - levels) * size


def wis_sum(y: Tensor, q: Tensor, levels: Tensor) -> Tensor:
    """Weighted interval score on the scale of Fakoor et al., 2 sum_k psi_k, (...).

    For levels in pairs about 1/2: the sum over pairs of alpha times the interval score at alpha = 2 tau, plus |y - median|.
    The forecasting hubs' scale (2 times the mean) is this divided by m.
    """
    return 2 * pinball(y, q, levels).sum(-1)


class _Crossings(torch.autograd.Function):
    """sum over k < l of max(q_k - q_l + margin_kl, 0), in blocks of rows k, so that memory does not grow with m^2.

    The gradient in q_k is the number of violated pairs that k is the lower level of, less those that it is the upper of.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, margins: Tensor) -> Tensor:
        n, m = q.shape
        total, slope = q.new_zeros(n), torch.zeros_like(q)
        rows = max(1, _BLOCK // max(1, n * m))
        upper = torch.ones(m, m, dtype=torch.bool, device=q.device).triu(1)
        for start in range(0, m, rows):
            part = slice(start, start + rows)
            excess = (q[:, part, None] - q[:, None, :] + margins[part]).clamp_min(0) * upper[part]
            active = (excess > 0).to(q.dtype)
            total += excess.sum((1, 2))
            slope[:, part] += active.sum(2)
            slope -= active.sum(1)
        ctx.save_for_backward(slope)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (slope,) = ctx.saved_tensors
        return gradients[0][:, None] * slope, None


def crossing_penalty(q: Tensor, margins: Tensor | float = 0.0) -> Tensor:
    """rho, a scalar: the mean over samples and over all pairs k < l of max(q_k - q_l + margin_kl, 0), for q (N, m).

    Args:
        margins: one number, or (m, m) of which the part above the diagonal counts. Zero exactly where every upper quantile
            exceeds every lower one by its margin.
    """
    n, m = q.shape
    if m < 2 or n < 1:
        return q.sum() * 0.0
    wide = torch.as_tensor(margins, dtype=q.dtype, device=q.device).expand(m, m)
    total: Tensor = _Crossings.apply(q, wide)
    return total.sum() / (n * m * (m - 1) / 2)


def adaptive_margins(residuals: Tensor, levels: Tensor, scale: float) -> Tensor:
    """Margins (m, m): `scale` times the distance of the empirical quantiles of a pilot's residuals (n,) (eq. 21)."""
    at = torch.quantile(residuals, levels.to(residuals.dtype))
    return scale * F.relu(at[None, :] - at[:, None])
