"""FAB: the nearest misclassified input, by linearising the decision boundary (Croce and Hein, ICML 2020, arXiv 1907.02044).

Targeted form, as in the standard ensemble: one boundary at a time, between the true class and each of the most likely
wrong ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
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
    Cost: 2 forward and 1 backward passes an iteration. Both are judged: the iterate and, where it is misclassified, the
    point that it is pulled back to.
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
        return Passes(self.draws * runs * 2 * self.steps, self.draws * runs * self.steps)

    def _run(self, search: Search) -> None:
        classes = rivals(search.clean_logits, search.labels, self.targets)
        for rank in range(classes.shape[1]):
            search.restart()
            if search.done:
                return
            search.search_fused()
            self._approach(search, classes[:, rank])

    def _approach(self, search: Search, target: Tensor) -> None:
        """Walk along one boundary; `target` holds a class per sample of the whole batch."""
        x = search.x
        for _ in range(self.steps):
            wanted = target[search.index]
            logits, gap, gradient = search.gradient(x, partial(margin_targeted, target=wanted))
            x, gap, gradient = search.judge(x, logits, x, gap, gradient)
            if search.done:
                return
            w = gradient.flatten(1)
            b = (w * x.flatten(1)).sum(dim=1) - gap
            both = torch.stack([x.flatten(1), search.x.flatten(1)])
            here, there = to_hyperplane(both, w, b, self.norm).view(2, *x.shape)
            lengths = flat_norm(here, self.norm).clamp_min(1e-8), flat_norm(there, self.norm).clamp_min(1e-8)
            bias = per_sample((lengths[0] / (lengths[0] + lengths[1])).clamp(0.0, self.alpha_max), x)
            x = ((x + self.eta * here) * (1 - bias) + (search.x + self.eta * there) * bias).clamp_(0.0, 1.0)
            logits = search.scores(x)
            wrong = per_sample(logits.argmax(dim=1) != search.y, x)
            back = torch.where(wrong, search.x + self.beta * (x - search.x), x)
            (x,) = search.judge(x, logits, back)
            if search.done:
                return
