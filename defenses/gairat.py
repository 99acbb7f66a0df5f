"""GAIRAT: geometry-aware instance-reweighted adversarial training (Zhang et al., ICLR 2021, arXiv 2010.01736).

    kappa_i = how many of the attack's n iterates, looked at before each step, are still classified correctly,
    omega_i = (1 + tanh(lambda + 5 (1 - 2 kappa_i / n))) / 2,   L = mean( B omega_i / sum_j omega_j  CE(f(x*_i), y_i) ).

Samples near the boundary (small kappa) weigh most. The public code divides by int(n / 2), which differs for odd n.
Its gains shrink strongly under AutoAttack: judge it by the worst case, not by PGD.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from defenses.base import Batch, Crafter, Defense, Loss, batch_mean, cross_entropy, detached, share
from robustbench_ext.attacks.inner import InnerAttack
from robustbench_ext.attacks.threat import Threat
from robustbench_ext.errors import ConfigError
from robustbench_ext.numbers import read_numbers


def geometry_weights(steps_correct: Tensor, steps: int, lam: float) -> Tensor:
    """omega of kappa, (B,), in (0, 1), falling in kappa; not normalised."""
    # (1 + tanh a) / 2 is the sigmoid of 2 a, which does not round to 0 where all samples are far from the boundary.
    return torch.sigmoid(2 * (lam + 5 * (1 - 2 * steps_correct.double() / steps)))


@dataclass(frozen=True, kw_only=True)
class GAIRAT(Defense):
    """PGD adversarial training with weights from how many steps the attack needs, normalised over the batch.

    Args:
        lam: lambda; -1 in the published runs. Large values give uniform weights, i.e. `pgd-at`.
        burn_in: share of the training that is plain `pgd-at` first; published: epoch 60 of 120, or 30 of 100.
    """

    lam: float = -1.0
    burn_in: float = 0.5

    name: ClassVar[str] = "gairat"
    class_losses: ClassVar[bool] = True
    reference: ClassVar[str] = "arXiv 2010.01736"

    def __post_init__(self) -> None:
        read_numbers(self, "gairat")
        share(self.burn_in, "gairat: burn_in")

    def attack(self, threat: Threat, steps: int, step_size: float | None) -> Crafter:
        return InnerAttack(threat, steps, step_size, count=True)

    def loss(self, model: nn.Module, batch: Batch, state: nn.Module | None = None) -> Loss:
        losses = cross_entropy(model(batch.x_adv), batch)
        if batch.progress < self.burn_in:
            return Loss(losses.mean())
        if batch.steps_correct is None or batch.attack_steps < 1:
            raise ConfigError("gairat: the batch has no steps_correct; craft it with the attack of this defense")
        weights = geometry_weights(batch.steps_correct, batch.attack_steps, self.lam)
        weights = (weights / batch_mean(weights)).to(losses.dtype)
        return Loss((weights * losses).mean(), detached(largest_weight=weights.max()))
