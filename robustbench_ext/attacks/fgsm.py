"""FGSM: one gradient step of the full budget (Goodfellow, Shlens, Szegedy, ICLR 2015, arXiv 1412.6572)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from robustbench_ext.attacks.base import Passes, Targeted
from robustbench_ext.attacks.losses import check_loss
from robustbench_ext.attacks.search import Search


@dataclass(frozen=True, kw_only=True)
class FGSM(Targeted):
    """x' = P(x + eps d), d = sign(g) for Linf, g / ||g|| for L2, g the gradient of the loss at x.

    Args:
        loss: "ce", "dlr", "margin", "joint-energy" or (without a target) "marginal-energy".
    Cost: 2 forward and 1 backward passes a sample, beside the clean pass that is shared.
    """

    loss: str = "ce"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_loss(self.loss, self.target)

    name: ClassVar[str] = "fgsm"
    reference: ClassVar[str] = "arXiv 1412.6572"

    def cost(self, num_classes: int) -> Passes:
        return Passes(2, 1)

    def _run(self, search: Search) -> None:
        _, _, gradient = search.gradient(search.x, search.objective(self.loss))
        step = self.eps * search.threat.steepest(gradient)
        candidates = search.threat.project(search.x + step, search.x)
        search.submit(candidates, search.logits(candidates))
