"""MI-FGSM: gradient ascent with momentum (Dong et al., CVPR 2018, arXiv 1710.06081)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from robustbench_ext.attacks.base import Passes, Targeted
from robustbench_ext.attacks.losses import check_loss
from robustbench_ext.attacks.search import Search
from robustbench_ext.attacks.threat import per_sample
from robustbench_ext.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class MIFGSM(Targeted):
    """g <- decay g + grad / ||grad||_1,   x <- P(x + a d), d = sign(g) for Linf, g / ||g||_2 for L2; from x itself.

    Args:
        steps: iterations.
        step_size: a, in units of [0, 1] pixels; eps / steps by default, as published.
        decay: of the momentum; 0 gives PGD from the clean input.
        loss: "ce", "dlr", "margin", "joint-energy" or (without a target) "marginal-energy".
    Cost: steps + 1 forward and `steps` backward passes, for a sample that is not broken, beside the shared clean pass.
    """

    steps: int = 10
    step_size: float | None = None
    decay: float = 1.0
    loss: str = "ce"

    name: ClassVar[str] = "mi-fgsm"
    reference: ClassVar[str] = "arXiv 1710.06081"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1 or self.decay < 0:
            raise ConfigError(
                f"mi-fgsm: steps = {self.steps}, decay = {self.decay}; expected steps >= 1 and decay >= 0"
            )
        check_loss(self.loss, self.target)

    def cost(self, num_classes: int) -> Passes:
        return Passes(self.steps + 1, self.steps)

    def _run(self, search: Search) -> None:
        threat, late = search.threat, int(0.9 * self.steps)
        size = self.step_size if self.step_size is not None else self.eps / self.steps
        x = search.x
        momentum = torch.zeros_like(x)
        for step in range(self.steps):
            logits, _, gradient = search.gradient(x, search.objective(self.loss))
            # Divided by the largest entry first: the L1 norm of a vanishing gradient underflows in float32.
            gradient = gradient / per_sample(gradient.flatten(1).abs().amax(1).clamp_min(torch.finfo().tiny), gradient)
            gradient = gradient / per_sample(gradient.flatten(1).abs().sum(1).clamp_min(1e-12), gradient)
            momentum = self.decay * momentum + gradient
            x, momentum = search.submit(x, logits, x, momentum)
            if search.done:
                return
            if step == late:
                search.mark()
            x = threat.project(x + size * threat.steepest(momentum), search.x)
        search.submit(x, search.logits(x))
