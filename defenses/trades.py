"""TRADES (Zhang et al., ICML 2019, arXiv 1901.08573) and its energy view (Mirza et al., ECCV 2024, arXiv 2407.06315).

With E(x, k) = -f_k(x) and E(x) = -logsumexp f(x), the divergence of TRADES is

    KL(p(x) || p(x*)) = sum_k p_k(x) [E(x*, k) - E(x, k)]  +  E(x) - E(x*),
                        \\_______ conditional term _______/     \\_ marginal term _/

and the whole loss  E(x, y) + (beta - 1) E(x) - beta E(x*) + beta (conditional term). The terms are logged. Neither has a
sign of its own, and a constant added to all logits of x* moves between them: TRADES does not force E(x) = E(x*).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from defenses.base import Batch, Crafter, Defense, Loss, at_least, cross_entropy, detached
from robustbench_ext.attacks.inner import InnerAttack
from robustbench_ext.attacks.threat import Threat
from robustbench_ext.models.energy import joint_energy, marginal_energy
from robustbench_ext.numbers import read_numbers


def kl_natural_adversarial(logits: Tensor, logits_adv: Tensor) -> Tensor:
    """KL(p(x) || p(x*)) per sample, (B,), from log-softmax; gradients flow through both arguments."""
    return F.kl_div(
        F.log_softmax(logits_adv, dim=1), F.log_softmax(logits, dim=1), reduction="none", log_target=True
    ).sum(dim=1)


def energy_terms(logits: Tensor, logits_adv: Tensor, y: Tensor) -> dict[str, Tensor]:
    """The energy view of one batch, each (B,).

    Returns:
        "energy" E(x), "energy_adv" E(x*), "joint_energy" E(x, y), "conditional" and "marginal" (= E(x) - E(x*)), whose
        sum is KL(p(x) || p(x*)).
    """
    energy, energy_adv = marginal_energy(logits), marginal_energy(logits_adv)
    return {
        "energy": energy,
        "energy_adv": energy_adv,
        "joint_energy": joint_energy(logits, y),
        "conditional": (logits.softmax(dim=1) * (logits - logits_adv)).sum(dim=1),
        "marginal": energy - energy_adv,
    }


@dataclass(frozen=True, kw_only=True)
class TRADES(Defense):
    """min E [ CE(f(x), y) + beta max_{x'} KL(p(x) || p(x')) ].

    The natural distribution is the first argument of the divergence. The attack maximises the same divergence from a
    Gaussian start (at x' = x its gradient is exactly zero). The published script runs the natural batch through the
    network twice in training mode, which weighs natural data 2:1 in the batch-norm statistics; here it runs once.

    Args:
        beta: weight of the divergence; 6 on CIFAR-10, 1 in the published MNIST script. 0 is standard training.
    """

    beta: float = 6.0

    name: ClassVar[str] = "trades"
    class_losses: ClassVar[bool] = True
    soft_targets: ClassVar[bool] = True
    reference: ClassVar[str] = "arXiv 1901.08573"

    def __post_init__(self) -> None:
        read_numbers(self, "trades")
        at_least(self.beta, 0, "trades: beta")

    def attack(self, threat: Threat, steps: int, step_size: float | None) -> Crafter | None:
        if self.beta == 0:
            return None
        return InnerAttack(threat, steps, step_size, objective="kl", start="gaussian")

    def loss(self, model: nn.Module, batch: Batch, state: nn.Module | None = None) -> Loss:
        logits = model(batch.x)
        natural = cross_entropy(logits, batch).mean()
        if self.beta == 0:
            return Loss(natural)
        logits_adv = model(batch.x_adv)
        divergence = kl_natural_adversarial(logits, logits_adv).mean()
        terms = energy_terms(logits.detach(), logits_adv.detach(), batch.y)
        return Loss(natural + self.beta * divergence, detached(ce=natural, kl=divergence, **terms))
