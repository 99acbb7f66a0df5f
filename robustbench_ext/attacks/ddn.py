"""DDN: the direction by gradient, the norm by verdict, decoupled (Rony et al., CVPR 2019, arXiv 1811.09600)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from robustbench_ext.attacks.base import Passes
from robustbench_ext.attacks.minimum import MinimumNorm, cosine, lead
from robustbench_ext.attacks.search import Search
from robustbench_ext.attacks.threat import flat_norm, per_sample
from robustbench_ext.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class DDN(MinimumNorm):
    """delta <- delta + a g / ||g||, g the gradient of the cross-entropy (targeted: of log p_t) at x_i; then

        r <- (1 - gamma) r where x_i reaches the goal, (1 + gamma) r elsewhere;   x_{i+1} = clip(x + r delta / ||delta||)

    a falls from 1 to 0.01 along half a cosine.

    Args:
        steps: iterations (100, 300 and 1,000 in the paper).
        gamma: the factor by which the radius changes.
        radius: r at the beginning, in units of [0, 1] pixels.
    Cost: steps + 1 forward and `steps` backward passes, beside the clean pass that is shared.
    """

    steps: int = 100
    gamma: float = 0.05
    radius: float = 1.0

    name: ClassVar[str] = "ddn"
    norms: ClassVar[tuple[str, ...]] = ("L2",)
    reference: ClassVar[str] = "arXiv 1811.09600"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1 or not 0 < self.gamma < 1 or self.radius <= 0:
            raise ConfigError(
                f"ddn: steps = {self.steps}, gamma = {self.gamma}, radius = {self.radius}; expected steps >= 1, "
                f"0 < gamma < 1 and radius > 0"
            )

    def cost(self, num_classes: int) -> Passes:
        return Passes(self.looks * self.draws * (self.steps + 1), self.draws * self.steps)

    def _run(self, search: Search) -> None:
        x, delta = search.x, torch.zeros_like(search.x)
        radius = torch.full((len(x),), self.radius, device=x.device)
        for step in range(self.steps):
            logits, _, gradient = search.gradient(x, search.objective("ce"))
            reached = lead(search)(logits, search.y) > 0
            x, delta, radius, gradient, reached = search.judge(x, logits, x, delta, radius, gradient, reached)
            if search.done:
                return
            delta = delta + cosine(step, self.steps, 1.0, 0.01) * search.threat.steepest(gradient)
            radius = radius * torch.where(reached, 1.0 - self.gamma, 1.0 + self.gamma)
            # Nothing is farther than the farthest corner of the box.
            radius = torch.minimum(radius, flat_norm(torch.maximum(search.x, 1.0 - search.x), "L2"))
            length = flat_norm(delta, "L2").clamp_min(1e-12)
            x = (search.x + delta * per_sample(radius / length, delta)).clamp(0.0, 1.0)
            delta = x - search.x  # the path goes on from the rescaled, clipped point
        search.judge(x, search.logits(x))
