"""MAIL: margin-aware instance-reweighted learning (Wang et al., NeurIPS 2021, arXiv 2106.07904).

    m_i = p_y(x*_i) - max_{k != y} p_k(x*_i),   omega_i = sigmoid(-slope (m_i - bias)), detached.

Samples of small margin on the adversarial input weigh most. On `pgd-at` the weights multiply the cross-entropy, on
`trades` the divergence alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from defenses.base import (
    Batch,
    Crafter,
    Defense,
    Loss,
    at_least,
    batch_mean,
    detached,
    one_of,
    probability_margin,
    share,
)
from defenses.trades import kl_natural_adversarial
from robustbench_ext.attacks.inner import InnerAttack, Objective
from robustbench_ext.attacks.threat import Threat
from robustbench_ext.numbers import read_numbers

PUBLISHED = {"pgd-at": (10.0, -0.5), "trades": (2.0, 0.0)}  # slope, bias


def margin_weights(margins: Tensor, slope: float, bias: float) -> Tensor:
    """sigmoid(-slope (m - bias)), float64 (B,), in (0, 1), falling in the margin; not normalised."""
    return torch.sigmoid(-slope * (margins.double() - bias))


@dataclass(frozen=True, kw_only=True)
class MAIL(Defense):
    """Weights from the probability margin of the adversarial input.

    Args:
        base: "pgd-at" (MAIL-AT) or "trades" (MAIL-TRADES).
        slope, bias: of the sigmoid; the published ones of the base by default: 10 and -0.5, or 2 and 0.
        beta: weight of the divergence, with base = "trades".
        normalise: "batch": weights have mean 1 in the batch, as the paper describes; "constant": they are multiplied by
            3, as in the public code.
        burn_in: share of the training without weights first; published: epoch 75 of 120.
    """

    base: str = "pgd-at"
    slope: float | None = None
    bias: float | None = None
    beta: float = 5.0
    normalise: str = "batch"
    burn_in: float = 0.625

    name: ClassVar[str] = "mail"
    reference: ClassVar[str] = "arXiv 2106.07904"

    def __post_init__(self) -> None:
        read_numbers(self, "mail")
        one_of(self.base, tuple(PUBLISHED), "mail: base")
        one_of(self.normalise, ("batch", "constant"), "mail: normalise")
        at_least(self.beta, 0, "mail: beta")
        share(self.burn_in, "mail: burn_in")

    def attack(self, threat: Threat, steps: int, step_size: float | None) -> Crafter:
        objective: Objective = "kl" if self.base == "trades" else "ce"
        return InnerAttack(threat, steps, step_size, objective=objective, start="gaussian")

    def loss(self, model: nn.Module, batch: Batch, state: nn.Module | None = None) -> Loss:
        natural = None
        if self.base == "trades":
            logits, logits_adv = model(batch.x), model(batch.x_adv)
            natural = F.cross_entropy(logits, batch.y)
            losses = self.beta * kl_natural_adversarial(logits, logits_adv)
        else:
            logits_adv = model(batch.x_adv)
            losses = F.cross_entropy(logits_adv, batch.y, reduction="none")
        weights = torch.ones_like(losses)
        if batch.progress >= self.burn_in:
            weights = self._weights(logits_adv.detach(), batch.y)
        value = (weights * losses).mean()
        return Loss(value if natural is None else natural + value, detached(largest_weight=weights.max()))

    def _weights(self, logits_adv: Tensor, y: Tensor) -> Tensor:
        slope, bias = PUBLISHED[self.base]
        slope = slope if self.slope is None else self.slope
        bias = bias if self.bias is None else self.bias
        weights = margin_weights(probability_margin(logits_adv, y), slope, bias)
        weights = 3 * weights if self.normalise == "constant" else weights / batch_mean(weights)
        return weights.to(logits_adv.dtype)
