"""DONE: doubly robust instance-reweighted adversarial training (Sow, Lin, Wang, Liang, ICLR 2024, arXiv 2308.00311).

Robust to the perturbation of each input and to the distribution of the samples. Over M samples with adversarial
losses l_i(theta) = CE(f(x_i + delta_i(theta)), y_i):

    min_theta max_{w in simplex} sum_i w_i l_i - r sum_i w_i log(M w_i)   =   min_theta r log( 1/M sum_i exp(l_i / r) ),

with w = softmax(l / r). The right-hand side is a function of an expectation u = E exp(l / r), which a batch estimates
with bias after the logarithm, so u is tracked: u <- (1 - eta) u + eta mean_batch exp(l / r), and the step is
mean( a_i dl_i/dtheta ) with a_i = exp(l_i / r) / u, never differentiated through.

delta_i(theta) minimises the barrier problem of `defenses.barrier`, so that

    dl_i/dtheta = grad_theta l_i + [d^2 l_i / dtheta ds] H_i^{-1} grad_s l_i.

The paper's own text was not available to us: r, eta, the barrier's weight and the inner steps are our choices, and the
formulas are derived again (and checked against finite differences in the tests).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from defenses.barrier import BarrierAttack, box, implicit_direction
from defenses.base import (
    Batch,
    Crafter,
    Defense,
    Loss,
    Task,
    at_least,
    batch_max,
    batch_mean,
    detached,
    one_of,
    read_booleans,
)
from robustbench_ext.attacks.inner import InnerAttack
from robustbench_ext.attacks.threat import Threat
from robustbench_ext.errors import ConfigError
from robustbench_ext.numbers import read_numbers

IMPLICIT = ("diagonal", "cg", "none")
OPTIMIZERS = ("sign", "gd", "adam")


def soft_worst_case(losses: Tensor, r: float) -> Tensor:
    """r log mean exp(l / r): between the mean (r -> infinity) and the maximum (r -> 0) of the losses (B,)."""
    return losses.mean() if math.isinf(r) else r * (torch.logsumexp(losses / r, dim=0) - math.log(len(losses)))


class Tracked(nn.Module):
    """log u, the moving average of mean exp(l / r), and whether it has begun; kept in logarithms, where it fits."""

    log_u: Tensor
    begun: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("log_u", torch.zeros((), dtype=torch.float64))
        self.register_buffer("begun", torch.zeros((), dtype=torch.bool))

    def update(self, log_mean: Tensor, eta: float) -> Tensor:
        """Move towards log mean exp of a batch; returns log u."""
        mixed = log_mean
        if eta < 1:
            mixed = torch.where(
                self.begun, torch.logaddexp(math.log1p(-eta) + self.log_u, math.log(eta) + log_mean), log_mean
            )
        self.log_u.copy_(mixed)
        self.begun.fill_(True)
        return mixed


@dataclass(frozen=True, kw_only=True)
class DONE(Defense):
    """KL-regularised worst-case weights over samples, with the compositional bilevel step.

    Args:
        r: temperature of the weights, in nats: large values give `pgd-at`, small ones follow a few samples (label noise!);
            "inf" is `pgd-at`. 1 to 3 helps on imbalanced digits, 3 changes nothing on balanced ones.
        eta: rate of the moving average u; 1 takes the batch's own, i.e. a softmax over the batch.
        cap: divide the weights by their mean where that exceeds 1. Without it a rising loss raises the weights
            exponentially when eta < 1, and training can diverge.
        implicit: what of the derivative of delta in theta is kept: "diagonal" (H for its diagonal, one double backward),
            "cg" (all of H, by conjugate gradients), "none" (a reweighted `pgd-at`, with the plain attack). Both are exact
            at minimisers of the barrier problem only. After a few inner steps with a small barrier on images most pixels are
            far from theirs: there the answer is held at the nearer face of the box (`held_share` is logged), the term is in
            effect a step of the attack towards it, and "cg" meets bad curvature and falls back on the diagonal. Gradient and
            curvature are those of the loss itself, whose batch norm is in training mode.
        barrier: c, weight of the barrier in units of s = delta / eps; with implicit = "none" there is none. It must be small
            against the gradient in a pixel's s, which is tiny on images: with 1e-2 the barrier keeps most pixels of 28x28
            images in the middle of their boxes, the attack is weak, and so is the network that trains on it.
        optimizer: of the inner steps: "sign", "gd" or "adam".
        cg_steps: with implicit = "cg".
    Linf only, unless implicit = "none".
    """

    r: float = 3.0
    eta: float = 1.0
    cap: bool = True
    implicit: str = "diagonal"
    barrier: float = 1e-5
    optimizer: str = "sign"
    cg_steps: int = 10

    name: ClassVar[str] = "done"
    reference: ClassVar[str] = "arXiv 2308.00311"

    def __post_init__(self) -> None:
        if isinstance(self.r, str) and self.r in ("inf", ".inf"):
            object.__setattr__(self, "r", math.inf)
        read_numbers(self, "done")
        read_booleans(self, "done")
        one_of(self.implicit, IMPLICIT, "done: implicit")
        one_of(self.optimizer, OPTIMIZERS, "done: optimizer")
        at_least(self.cg_steps, 1, "done: cg_steps")
        if not self.r > 0 or not 0 < self.eta <= 1 or not 0 < self.barrier < math.inf:
            raise ConfigError(
                f"done: r = {self.r}, eta = {self.eta}, barrier = {self.barrier}; expected r > 0, eta in (0, 1], barrier > 0"
            )

    def spec(self) -> dict[str, object]:
        values = super().spec()
        return {**values, "r": "inf"} if math.isinf(self.r) else values  # JSON has no infinity

    def attack(self, threat: Threat, steps: int, step_size: float | None) -> Crafter:
        if self.implicit == "none":
            return InnerAttack(threat, steps, step_size)
        if threat.norm != "Linf":
            raise ConfigError(f"done: the barrier is of a Linf box, not of {threat}; give implicit: none")
        return BarrierAttack(threat, steps, step_size, self.optimizer, self.barrier)  # type: ignore[arg-type]

    def state(self, model: nn.Module, task: Task) -> nn.Module:
        return Tracked()

    def loss(self, model: nn.Module, batch: Batch, state: nn.Module | None = None) -> Loss:
        plain = self.implicit == "none" or batch.eps == 0
        x_adv = batch.x_adv if plain else batch.x_adv.detach().requires_grad_(True)
        losses = F.cross_entropy(model(x_adv), batch.y, reduction="none")
        weights = self.weights(losses.detach(), state)
        value = (weights * losses).mean()
        held = losses.new_zeros(())
        if not plain:
            term, held = self._implicit(losses, x_adv, batch)
            # Its gradient counts; its value is none of the objective's.
            value = value + (weights * (term - term.detach())).mean()
        size = weights.sum().square() / (len(weights) * weights.square().sum())
        logs = detached(adversarial_ce=losses, mean_weight=weights, effective_share=size)
        return Loss(value, logs if plain else logs | detached(held_share=held))

    def weights(self, losses: Tensor, state: nn.Module | None = None) -> Tensor:
        """a_i = exp(l_i / r) / u, (B,); with eta = 1 their mean is 1."""
        if math.isinf(self.r):
            return torch.ones_like(losses)
        scaled = losses.double() / self.r
        shift = batch_max(scaled)
        log_mean = shift + batch_mean((scaled - shift).exp()).log()
        log_u = log_mean if not isinstance(state, Tracked) else state.update(log_mean, self.eta)
        weights = (scaled - log_u).exp()
        if self.cap:
            weights = weights / batch_mean(weights).clamp_min(1.0)
        return weights.to(losses.dtype)

    def _implicit(self, losses: Tensor, x_adv: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Per sample, a scalar whose gradient in theta is [d^2 l / dtheta ds] H^{-1} grad_s l; and the share of pixels
        whose answer is held at a face of the box.
        """
        eps = batch.eps
        (gradient,) = torch.autograd.grad(losses.sum(), x_adv, create_graph=True)
        gradient = eps * gradient  # in s
        lo, hi = box(batch.x, eps)
        s = (x_adv.detach() - batch.x) / eps
        s = torch.minimum(torch.maximum(s, lo + 1e-4 * (hi - lo)), hi - 1e-4 * (hi - lo))  # x + eps s is rounded

        def curvature(u: Tensor) -> Tensor:
            """The Hessian of the losses in s, times u."""
            (product,) = torch.autograd.grad((gradient * u).sum(), x_adv, retain_graph=True)
            return eps * product

        exact = curvature if self.implicit == "cg" else None
        v = implicit_direction(gradient.detach(), s, lo, hi, self.barrier, exact, self.cg_steps)
        held = (v.abs() >= torch.minimum(hi - s, s - lo)).to(losses.dtype).mean()
        return (gradient * v.detach()).flatten(1).sum(dim=1), held
