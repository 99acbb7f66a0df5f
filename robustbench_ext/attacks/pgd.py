"""PGD: projected gradient ascent from random starts (Madry et al., ICLR 2018, arXiv 1706.06083)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from robustbench_ext.attacks.base import Passes, Targeted
from robustbench_ext.attacks.losses import check_loss
from robustbench_ext.attacks.search import Search
from robustbench_ext.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class PGD(Targeted):
    """x <- P(x + a d), d = sign(g) for Linf, g / ||g|| for L2; every iterate counts, not only the last.

    Args:
        steps: gradient steps of one run.
        step_size: a, in units of [0, 1] pixels; 2.5 eps / steps by default (Madry's advice).
        restarts: runs from different random points, each on the samples that still stand.
        random_start: start at a random point of the threat model; otherwise at x (then more restarts change nothing).
        loss: "ce", "dlr", "margin", "joint-energy" or (without a target) "marginal-energy".
    Cost: (steps + 1) forward and `steps` backward passes a restart, for a sample that is not broken, beside the
    clean pass that is shared.
    """

    steps: int = 20
    step_size: float | None = None
    restarts: int = 1
    random_start: bool = True
    loss: str = "ce"

    name: ClassVar[str] = "pgd"
    stochastic: ClassVar[bool] = True
    reference: ClassVar[str] = "arXiv 1706.06083"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1 or self.restarts < 1:
            raise ConfigError(f"pgd: steps = {self.steps}, restarts = {self.restarts}; expected at least 1 of each")
        check_loss(self.loss, self.target)

    def cost(self, num_classes: int) -> Passes:
        return Passes(self.restarts * (self.steps + 1), self.restarts * self.steps)

    def _run(self, search: Search) -> None:
        threat, late = search.threat, int(0.9 * self.steps)
        size = self.step_size if self.step_size is not None else 2.5 * self.eps / self.steps
        for restart in range(self.restarts):
            search.restart()
            if search.done:
                return
            x = threat.random_point(search.x, search.random, step=restart) if self.random_start else search.x
            for step in range(self.steps):
                logits, _, gradient = search.gradient(x, search.objective(self.loss))
                x, gradient = search.submit(x, logits, x, gradient)
                if search.done:
                    break
                if step == late:
                    search.mark()
                x = threat.project(x + size * threat.steepest(gradient), search.x)
            else:
                search.submit(x, search.logits(x))
