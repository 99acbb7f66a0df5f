"""Loss-based reweighting: samples weighted by where their loss lies in the range of the batch's losses.

Sow et al., *Dynamic Loss-Based Sample Reweighting for Improved Large Language Model Pretraining*, ICLR 2025, arXiv 2502.06733.
With the smallest and largest loss of the joint batch,

    h_i = delta (2 l_i - l_min - l_max) / max(l_max - l_min, 1e-6)  in [-delta, delta],   w = softmax(f(h) / r), detached,

    linupper: min(h + delta, delta)    quadratic: 1 - h^2 / delta^2    extremes: |h|    upper: (h + delta) / 2

Weights are bounded, unlike those of KL-DRO (exp(l / lambda)): with linupper the largest is at most exp(delta / r) times the
smallest, and all losses above the middle of the range share one weight. It is the control of `weat` and `done`: is it *which*
samples weigh more, or that some do? The middle is that of the range, not the median: one huge loss pushes all others below it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from defenses.base import Batch, Crafter, Defense, Loss, at_least, batch_max, batch_mean, detached, one_of, share
from robustbench_ext.attacks.inner import InnerAttack
from robustbench_ext.attacks.threat import Threat
from robustbench_ext.errors import ConfigError
from robustbench_ext.numbers import read_numbers

SHAPES = ("linupper", "quadratic", "extremes", "upper")


def loss_weights(losses: Tensor, shape: str = "linupper", delta: float = 1.0, r: float = 1.0) -> Tensor:
    """The weights of losses (B,), float64 (B,), detached, with mean 1 over the joint batch of all processes."""
    values = losses.detach().double()
    low, high = -batch_max(-values), batch_max(values)
    h = delta * (2 * values - low - high) / (high - low).clamp_min(1e-6)
    if shape == "linupper":
        f = (h + delta).clamp_max(delta)
    elif shape == "quadratic":
        f = 1 - (h / delta).square()
    elif shape == "extremes":
        f = h.abs()
    else:
        f = (h + delta) / 2
    raised = torch.exp(f / r)
    return raised / batch_mean(raised)


@dataclass(frozen=True, kw_only=True)
class Reweight(Defense):
    """Cross-entropy with bounded weights by loss.

    Args:
        base: "pgd-at": losses and weights of adversarial inputs; "standard": of clean ones, as published.
        shape: of the weights: linupper, quadratic (`mid` in the published code), extremes or upper.
        delta, r: range and temperature; published: 1 and 1.
        burn_in: share of the training without weights first; published: 1,000 steps of language-model pre-training.
    """

    base: str = "pgd-at"
    shape: str = "linupper"
    delta: float = 1.0
    r: float = 1.0
    burn_in: float = 0.1

    name: ClassVar[str] = "reweight"
    reference: ClassVar[str] = "arXiv 2502.06733"

    def __post_init__(self) -> None:
        read_numbers(self, "reweight")
        one_of(self.base, ("pgd-at", "standard"), "reweight: base")
        one_of(self.shape, SHAPES, "reweight: shape")
        share(self.burn_in, "reweight: burn_in")
        for name in ("delta", "r"):
            at_least(getattr(self, name), 0, f"reweight: {name}")
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"reweight: {name} = {getattr(self, name)}, expected a number > 0")

    def attack(self, threat: Threat, steps: int, step_size: float | None) -> Crafter | None:
        return None if self.base == "standard" else InnerAttack(threat, steps, step_size)

    def loss(self, model: nn.Module, batch: Batch, state: nn.Module | None = None) -> Loss:
        losses = F.cross_entropy(model(batch.x_adv), batch.y, reduction="none")
        weights = torch.ones_like(losses)
        if batch.progress >= self.burn_in:
            weights = loss_weights(losses, self.shape, self.delta, self.r).to(losses.dtype)
        return Loss((weights * losses).mean(), detached(largest_weight=weights.max()))
