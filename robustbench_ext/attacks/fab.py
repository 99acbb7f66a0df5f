"""FAB: the nearest misclassified input, by linearising the decision boundary (Croce and Hein, ICML 2020, arXiv 1907.02044).

Targeted form, as in the standard ensemble: one boundary at a time, between the true class and each of the most likely
wrong ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robustbench_ext.attacks.base import Attack, Passes
from robustbench_ext.attacks.losses import margin_targeted, rivals
from robustbench_ext.attacks.projections import to_hyperplane
from robustbench_ext.attacks.search import Search
from robustbench_ext.attacks.threat import flat_norm, per_sample
from robustbench_ext.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class FABT(Attack):
    """FAB-T. Each iterate projects both itself and the original onto the linearised boundary and mixes the two.

    With g = grad (z_t - z_y) at x_i, and d_i, d_0 the least steps of x_i and of the original x onto the plane where the
    linearised difference is zero:

        x_{i+1} = clip((1 - a)(x_i + eta d_i) + a (x + eta d_0)),   a = min(|d_i| / (|d_i| + |d_0|), alpha_max)

    and an iterate that is misclassified is pulled back to x + beta (x_i - x). It searches for the least perturbation;
    here a sample is done once one within the budget is found.

    Args:
        steps: iterations for each target class.
        targets: wrong classes tried, in the order of their clean logits.
        alpha_max, eta, beta: bias towards the original, overshoot, pull back; the published values.
    Cost: about 2 forward and 1 backward passes an iteration; where an iterate is not misclassified, 1 and 1.
    """

    steps: int = 100
    targets: int = 9
    alpha_max: float = 0.1
    eta: float = 1.05
    beta: float = 0.9

    name: ClassVar[str] = "fab-t"
    stochastic: ClassVar[bool] = False
    reference: ClassVar[str] = "arXiv 1907.02044"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1 or self.targets < 1:
            raise ConfigError(f"fab-t: steps = {self.steps}, targets = {self.targets}; expected at least 1 of each")

    def cost(self, num_classes: int) -> Passes:
        runs = min(self.targets, num_classes - 1)
        # An iterate that crosses is looked at twice: with gradients where that was not foreseen.
        return Passes(runs * (2 * self.steps + 1), runs * 2 * self.steps)

    def _run(self, search: Search) -> None:
        classes = rivals(search.clean_logits, search.labels, self.targets)
        for rank in range(classes.shape[1]):
            search.restart()
            if search.done:
                return
            self._approach(search, classes[:, rank])

    def _approach(self, search: Search, target: Tensor) -> None:
        """Walk along one boundary; `target` holds a class per sample of the whole batch."""
        x = search.x
        # Which samples were misclassified at their last iterate: those are looked at with a forward pass first, since
        # their gradient is needed at the pulled-back point only. The others get logits and gradient in one go.
        crossed = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        for step in range(self.steps + 1):
            x, crossed, gap, gradient = self._look(search, x, crossed, target, last=step == self.steps)
            if search.done or step == self.steps:
                return
            w = gradient.flatten(1)
            b = (w * x.flatten(1)).sum(dim=1) - gap
            both = torch.cat([x.flatten(1), search.x.flatten(1)])
            moves = to_hyperplane(both, w.repeat(2, 1), b.repeat(2), self.norm)
            here, there = moves.view(2, len(x), *x.shape[1:])
            lengths = flat_norm(here, self.norm).clamp_min(1e-8), flat_norm(there, self.norm).clamp_min(1e-8)
            bias = per_sample((lengths[0] / (lengths[0] + lengths[1])).clamp(0.0, self.alpha_max), x)
            x = ((x + self.eta * here) * (1 - bias) + (search.x + self.eta * there) * bias).clamp(0.0, 1.0)

    def _look(
        self, search: Search, x: Tensor, crossed: Tensor, target: Tensor, last: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Verdicts at x; then z_t - z_y and its gradient there, or at the pulled-back point of misclassified samples.

        Samples that are done leave. Returns x, "misclassified at the iterate", gap, gradient of those that stand.
        """
        gap, gradient = x.new_zeros(len(x)), torch.zeros_like(x)
        if last:
            search.judge(x, search.logits(x))
            return x, crossed, gap, gradient
        fresh = ~crossed
        logits = torch.empty((len(x), search.clean_logits.shape[1]), device=x.device)
        if bool(fresh.any()):
            logits[fresh], gap[fresh], gradient[fresh] = self._gradient(search, x, target, fresh)
        if bool(crossed.any()):
            logits[crossed] = search.logits(x[crossed], rows=crossed)
        wrong = logits.argmax(dim=1) != search.y
        again = wrong | crossed
        x, wrong, again, gap, gradient = search.judge(x, logits, x, wrong, again, gap, gradient)
        if search.done:
            return x, wrong, gap, gradient
        x = torch.where(per_sample(wrong, x), search.x + self.beta * (x - search.x), x)
        if bool(again.any()):
            _, gap[again], gradient[again] = self._gradient(search, x, target, again)
        return x, wrong, gap, gradient

    def _gradient(self, search: Search, x: Tensor, target: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        wanted = target[search.index][rows]
        return search.gradient(x[rows], lambda z, y: margin_targeted(z, y, wanted), rows=rows)
