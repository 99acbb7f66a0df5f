"""DeepFool: step onto the nearest linearised decision boundary (Moosavi-Dezfooli et al., CVPR 2016, arXiv 1511.04599)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robustbench_ext.attacks.base import Passes
from robustbench_ext.attacks.losses import Loss, margin_targeted, rivals
from robustbench_ext.attacks.minimum import MinimumNorm, dual_norm, lead, offer
from robustbench_ext.attacks.search import Search
from robustbench_ext.attacks.threat import per_sample
from robustbench_ext.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class DeepFool(MinimumNorm):
    """With f_k = z_k - z_y and w_k its gradient at x_i, step to the nearest of the linearised boundaries f_k = 0:

        l = argmin_k |f_k| / ||w_k||_q,    x_{i+1} = clip(x_i + |f_l| / ||w_l||_q d_l)

    d = w / ||w||_2, q = 2 for L2 and d = sign(w), q = 1 for Linf. A sample is done at the first misclassified
    clip(x + (1 + overshoot)(x_i - x)). With a target there is one boundary, f = z_t - max_{k != t} z_k.

    Args:
        steps: iterations; most samples need fewer than five.
        overshoot: by how much the boundary is overstepped; the published value.
        candidates: wrong classes k, those with the highest clean logits (all K - 1 where there are no more). Their
            gradients are computed one at a time, so memory does not grow with their number.
    Cost: candidates + 1 forward and `candidates` backward passes a step, until the sample is misclassified.
    """

    steps: int = 50
    overshoot: float = 0.02
    candidates: int = 10

    name: ClassVar[str] = "deepfool"
    reference: ClassVar[str] = "arXiv 1511.04599"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1 or self.candidates < 1:
            raise ConfigError(
                f"deepfool: steps = {self.steps}, candidates = {self.candidates}; expected at least 1 of each"
            )
        if self.overshoot < 0:
            raise ConfigError(f"deepfool: overshoot = {self.overshoot}, expected a number >= 0")

    def cost(self, num_classes: int) -> Passes:
        each = min(self.candidates, num_classes - 1) if self.target == "none" else 1
        return Passes(self.draws * self.steps * (each + self.looks), self.draws * self.steps * each)

    def _run(self, search: Search) -> None:
        classes = rivals(search.clean_logits, search.labels, self.candidates)
        x = search.x
        moving = torch.ones(len(x), dtype=torch.bool, device=x.device)
        for _ in range(self.steps):
            x = x.clone()
            x[moving] = (x[moving] + self._to_nearest(search, x[moving], moving, classes)).clamp(0.0, 1.0)
            clean = search.x[moving]
            beyond = (clean + (1.0 + self.overshoot) * (x[moving] - clean)).clamp(0.0, 1.0)
            logits = search.logits(beyond, rows=moving)
            x, moving = offer(search, moving, beyond, logits, x, moving)
            moving = moving & ~search.reached[search.index]
            if not bool(moving.any()):
                return

    def _to_nearest(self, search: Search, x: Tensor, rows: Tensor, classes: Tensor) -> Tensor:
        """The step from each x onto the nearest linearised boundary; `rows` says which samples x belongs to."""
        nearest, length = torch.zeros_like(x), torch.full((len(x),), torch.inf, device=x.device)
        for rank in range(classes.shape[1] if search.target is None else 1):
            boundary = self._boundary(search, rows, classes[:, rank])
            _, gap, gradient = search.gradient(x, boundary, rows=rows)
            slope = dual_norm(gradient, self.norm)
            # A gradient of zero leads nowhere: its boundary is infinitely far.
            distance = torch.where(slope > 0, gap.abs() / slope, torch.inf)
            closer = distance < length
            step = per_sample(torch.where(closer, distance, 0.0), x) * search.threat.steepest(gradient)
            nearest = torch.where(per_sample(closer, x), step, nearest)
            length = torch.where(closer, distance, length)
        return nearest

    def _boundary(self, search: Search, rows: Tensor, classes: Tensor) -> Loss:
        """f of the chosen samples; `classes` holds one for each sample of the whole batch."""
        if search.target is not None:
            return lead(search, rows)
        wanted = classes[search.index[rows]]
        return lambda logits, labels: margin_targeted(logits, labels, wanted)
