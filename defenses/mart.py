"""MART: misclassification-aware adversarial training (Wang et al., ICLR 2020).

    L = mean[ BCE(f(x*), y) ] + lambda mean[ KL(p(x) || p(x*)) (1 - p_y(x)) ],
    BCE = -log p_y(x*) - log(1 - max_{k != y} p_k(x*)).

The weight 1 - p_y(x) comes from the natural input and is not detached. The public code keeps its logarithms finite by
adding 1e-4 and 1e-12; here log(1 - p_j) is computed as the logsumexp of all other logits, which needs no guard.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from defenses.base import Batch, Crafter, Defense, Loss, at_least, detached
from defenses.trades import kl_natural_adversarial
from robustbench_ext.attacks.inner import InnerAttack
from robustbench_ext.attacks.threat import Threat
from robustbench_ext.numbers import read_numbers


def boosted_cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """-log p_y - log(1 - p_j), (B,), with j the most likely wrong class; at least the cross-entropy."""
    log_p = logits.log_softmax(dim=1)
    true = y[:, None]
    rival = log_p.scatter(1, true, -torch.inf).argmax(dim=1, keepdim=True)
    others = log_p.scatter(1, rival, -torch.inf).logsumexp(dim=1)  # log(1 - p_j)
    return -log_p.gather(1, true)[:, 0] - others


@dataclass(frozen=True, kw_only=True)
class MART(Defense):
    """Boosted cross-entropy on x*, and a divergence that counts where the natural input is in doubt.

    Args:
        lam: lambda, weight of the divergence; 5 in the published ResNet-18 run, 6 in the function's default.
    """

    lam: float = 5.0

    name: ClassVar[str] = "mart"
    reference: ClassVar[str] = "https://openreview.net/forum?id=rklOg6EFwS"

    def __post_init__(self) -> None:
        read_numbers(self, "mart")
        at_least(self.lam, 0, "mart: lam")

    def attack(self, threat: Threat, steps: int, step_size: float | None) -> Crafter:
        return InnerAttack(threat, steps, step_size, start="gaussian")

    def loss(self, model: nn.Module, batch: Batch, state: nn.Module | None = None) -> Loss:
        logits, logits_adv = model(batch.x), model(batch.x_adv)
        boosted = boosted_cross_entropy(logits_adv, batch.y)
        doubt = 1 - logits.softmax(dim=1).gather(1, batch.y[:, None])[:, 0]
        weighted = doubt * kl_natural_adversarial(logits, logits_adv)
        value = boosted.mean() + self.lam * weighted.mean()
        return Loss(value, detached(bce=boosted, weighted_kl=weighted, doubt=doubt))
