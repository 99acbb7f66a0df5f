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

_MOST_STEPS, _ASK = 40, 10


def to_hyperplane(x: Tensor, w: Tensor, b: Tensor, norm: str) -> Tensor:
    """The perturbation d, like x, of least norm that takes each x onto {z: w.z = b} within the box.

    Where the plane does not meet the box, d goes as far towards it as the box allows.

    Args:
        x: (..., N, D) in [0, 1]: any number of points for each plane; w: (N, D); b: (N,).
    """
    gap = (w * x).sum(dim=-1) - b
    weight = w.abs()
    towards = -gap.sign()[..., None] * w.sign()
    room = (towards.clamp_min(0.0) - x).abs_()  # 1 - x where a coordinate grows, x where it falls
    # Written for both norms: a coordinate moves by min(t * speed, room) and covers min(t * rate, way).
    rate = weight if norm == "Linf" else weight.square()
    way = weight * room
    needed = gap.abs()
    t = needed / rate.sum(dim=-1).clamp_min(1e-30)
    reachable = way.sum(dim=-1) > needed
    # A root once reached is not left again, so it may be asked for late: elsewhere than on the CPU an answer is waited for.
    every = 1 if x.device.type == "cpu" else _ASK
    for step in range(1, _MOST_STEPS + 1):
        covered = torch.minimum(t[..., None] * rate, way)
        missing = needed - covered.sum(dim=-1)
        # The sign is 0 for coordinates at the box and 1 for the others (comparisons and `where` are several times slower).
        slope = (way - covered).sign_().mul_(rate).sum(dim=-1)
        following = t + missing / slope.clamp_min(1e-30)
        # In exact arithmetic t only grows; once nothing grows any more the root is reached.
        grows = reachable & (slope > 0) & (following > t * (1 + 1e-6))
        if step % every == 0 and not bool(grows.any()):
            break
        t = torch.where(grows, following, t)
    move = torch.minimum(t[..., None] * (torch.ones_like(weight) if norm == "Linf" else weight), room)
    return towards * torch.where(reachable[..., None], move, room)
