"""Projection onto a hyperplane inside the box [0, 1]: the inner step of FAB, without sorting.

Find the smallest perturbation d (in Linf or L2) with w.(x + d) = b and x + d in [0, 1]. It moves every coordinate in the
direction that approaches the plane, by min(t, room) (Linf) or min(t |w|, room) (L2) for one t per sample, where `room` is
the way to the box. The distance covered, sum_i |w_i| min(t .., room_i), is concave, increasing and piecewise linear in t,
so Newton's iteration from the left reaches its root exactly after finitely many steps (typically fewer than ten), each a
few passes over the pixels. The published implementation sorts all pixels instead.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MOST_STEPS = 40


def to_hyperplane(x: Tensor, w: Tensor, b: Tensor, norm: str) -> Tensor:
    """The perturbation d, (N, D), of least norm that takes x onto {z: w.z = b} within the box.

    Where the plane does not meet the box, d goes as far towards it as the box allows.

    Args:
        x: (N, D) in [0, 1]; w: (N, D); b: (N,).
    """
    gap = (w * x).sum(dim=1) - b
    towards = -gap.sign()[:, None] * w.sign()
    room = torch.where(towards > 0, 1.0 - x, x)
    weight = w.abs()
    # Written for both norms: a coordinate moves by min(t * speed, room).
    speed = torch.ones_like(weight) if norm == "Linf" else weight
    rate = weight * speed
    way = weight * room
    limit = room if norm == "Linf" else room / speed.clamp_min(1e-30)  # t at which a coordinate reaches the box
    needed = gap.abs()
    t = needed / rate.sum(dim=1).clamp_min(1e-30)
    reachable = way.sum(dim=1) > needed
    for _ in range(_MOST_STEPS):
        stopped = limit < t[:, None]
        covered = torch.where(stopped, way, 0.0).sum(dim=1)
        slope = torch.where(stopped, 0.0, rate).sum(dim=1)
        following = torch.where(reachable, (needed - covered) / slope.clamp_min(1e-30), t)
        # In exact arithmetic t only grows; once nothing grows any more the root is reached.
        grows = reachable & (following > t * (1 + 1e-6))
        if not bool(grows.any()):
            break
        t = torch.where(grows, following, t)
    move = torch.minimum(t[:, None] * speed, room)
    return towards * torch.where(reachable[:, None], move, room)
