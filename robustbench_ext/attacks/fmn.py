"""FMN: gradient steps projected onto a ball that adapts to the boundary (Pintor et al., NeurIPS 2021, arXiv 2102.12827)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robustbench_ext.attacks.base import Passes
from robustbench_ext.attacks.minimum import MinimumNorm, cosine, dual_norm, lead
from robustbench_ext.attacks.search import Search
from robustbench_ext.attacks.threat import Threat, flat_norm, per_sample
from robustbench_ext.errors import ConfigError

_LEAST_GAMMA = 1e-4  # at the last step
_LEAST_SHARE = 0.01  # of the step size, at the last step


@dataclass(frozen=True, kw_only=True)
class FMN(MinimumNorm):
    """delta <- clip(P_r(delta + a g / ||g||_2)), g the gradient of L = z_k - z_y (targeted: z_t - z_k), k the best other.

    The radius r of the ball follows the boundary L = 0, with n* the least norm found:

        reached:         r <- min(r (1 - gamma), n*)
        reached before:  r <- r (1 + gamma)
        never reached:   r <- max(||delta|| + |L| / ||g||_q, r (1 + gamma)),  the first the distance to the linearised boundary

    a and gamma fall along half a cosine; q = 2 for L2 and 1 for Linf. The paper has no second term for those never reached;
    but the box takes away some of every step, and then the ball that just touches the boundary stays short of it.

    Args:
        steps: iterations (1,000 in the paper).
        step_size: a at the beginning; by default 1 for L2 and 10 for Linf.
        gamma: the factor by which the radius changes, at the beginning.
    Cost: steps + 1 forward and `steps` backward passes, beside the clean pass that is shared.
    """

    steps: int = 100
    step_size: float | None = None
    gamma: float = 0.05

    name: ClassVar[str] = "fmn"
    reference: ClassVar[str] = "arXiv 2102.12827"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1 or not 0 < self.gamma < 1 or (self.step_size is not None and self.step_size <= 0):
            raise ConfigError(
                f"fmn: steps = {self.steps}, gamma = {self.gamma}, step_size = {self.step_size}; expected steps >= 1, "
                f"0 < gamma < 1 and step_size > 0"
            )

    def cost(self, num_classes: int) -> Passes:
        return Passes(self.looks * self.draws * (self.steps + 1), self.draws * self.steps)

    def _run(self, search: Search) -> None:
        first = self.step_size if self.step_size is not None else {"L2": 1.0, "Linf": 10.0}[self.norm]
        x = search.x
        best = torch.full((len(x),), torch.inf, device=x.device)  # n*
        radius = torch.zeros_like(best)
        for step in range(self.steps):
            logits, ahead, gradient = search.gradient(x, lead(search))
            x, ahead, gradient, best, radius = search.judge(x, logits, x, ahead, gradient, best, radius)
            if search.done:
                return
            delta = x - search.x
            length, reached = flat_norm(delta, self.norm), ahead > 0
            best = torch.where(reached, torch.minimum(best, length), best)
            gamma = cosine(step, self.steps, self.gamma, _LEAST_GAMMA)
            slope = dual_norm(gradient, self.norm)
            estimate = length + torch.where(slope > 0, ahead.abs() / slope, 0.0)
            wider = radius * (1.0 + gamma)
            outwards = torch.where(best < torch.inf, wider, torch.maximum(estimate, wider))
            radius = torch.where(reached, torch.minimum(radius * (1.0 - gamma), best), outwards)
            size = cosine(step, self.steps, first, first * _LEAST_SHARE)
            delta = delta + size * Threat("L2", torch.inf).steepest(gradient)
            x = (search.x + _into_ball(delta, radius, self.norm)).clamp(0.0, 1.0)
        search.judge(x, search.logits(x))


def _into_ball(delta: Tensor, radius: Tensor, norm: str) -> Tensor:
    """The nearest perturbation within each sample's own radius."""
    if norm == "Linf":
        bound = per_sample(radius, delta)
        return torch.minimum(torch.maximum(delta, -bound), bound)
    length = flat_norm(delta, "L2").clamp_min(1e-12)
    return delta * per_sample((radius / length).clamp_max(1.0), delta)
