"""The inner problem of DONE: an attack that stays strictly inside its box, held there by a log barrier.

With s = delta / eps and the box lo <= s <= hi of each pixel (lo = max(-1, -x / eps), hi = min(1, (1 - x) / eps)),

    phi_bar(theta, s) = -CE(f(x + eps s), y) - c sum_j [ log(hi_j - s_j) + log(s_j - lo_j) ],

is minimised. Its minimiser is a differentiable function of theta, which the hard constraint's is not. Iterates are kept
in the box shrunken by a share rho on each side, where the barrier is finite, and they start in its interior: a pixel of
exactly 0 or 1 has delta = 0 on the boundary, where the barrier is infinite.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robustbench_ext.attacks.inner import Crafted, Mode, attacked_in
from robustbench_ext.attacks.threat import Threat, per_sample
from robustbench_ext.randomness import SampleRandom

Optimizer = Literal["sign", "gd", "adam"]


def box(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """lo and hi of s = delta / eps, each of the shape of x."""
    return (-x / eps).clamp_min(-1.0), ((1 - x) / eps).clamp_max(1.0)


def barrier_gradient(s: Tensor, lo: Tensor, hi: Tensor, c: float) -> Tensor:
    """The gradient of -c sum_j [log(hi_j - s_j) + log(s_j - lo_j)] in s."""
    return c * (1 / (hi - s) - 1 / (s - lo))


def barrier_curvature(s: Tensor, lo: Tensor, hi: Tensor, c: float) -> Tensor:
    """Its second derivative in each s_j, > 0: the diagonal that stands for the Hessian of phi_bar."""
    return c * ((hi - s).pow(-2) + (s - lo).pow(-2))


@dataclass(frozen=True)
class BarrierAttack:
    """Steps on phi_bar. Linf only.

    Attributes:
        steps, step_size: step_size in units of [0, 1] pixels, eps / 4 by default.
        optimizer: of the steps: "sign", "gd" (the gradient, scaled so that a sample's largest entry makes a full step) or
            "adam".
        c: weight of the barrier.
        start: the share of the box, about its centre, that the uniform start covers.
        rho: how much of the box is shaved off each side.
    """

    threat: Threat
    steps: int
    step_size: float | None = None
    optimizer: Optimizer = "sign"
    c: float = 1e-5
    start: float = 0.9
    rho: float = 1e-3
    mode: Mode = "eval"

    def craft(
        self, model: nn.Module, x: Tensor, y: Tensor, random: SampleRandom, step: int = 0, targets: Tensor | None = None
    ) -> Crafted:
        """Adversarial inputs, strictly inside the box."""
        eps = self.threat.eps
        if eps == 0 or self.steps == 0:
            return Crafted(x.clone())
        lo, hi = box(x, eps)
        width = hi - lo
        low, high = lo + self.rho * width, hi - self.rho * width
        s = (lo + hi) / 2 + self.start * random.uniform(x.shape[1:], -1.0, 1.0, step=step) * width / 2
        rate = 0.25 if self.step_size is None else self.step_size / eps
        first, second = torch.zeros_like(s), torch.zeros_like(s)
        with attacked_in(model, self.mode):
            for k in range(1, self.steps + 1):
                inputs = (x + eps * s).detach().requires_grad_(True)
                loss = F.cross_entropy(model(inputs).float(), y if targets is None else targets, reduction="sum")
                (gradient,) = torch.autograd.grad(loss, inputs)
                descent = barrier_gradient(s, lo, hi, self.c) - eps * gradient
                if self.optimizer == "sign":
                    descent = descent.sign()
                elif self.optimizer == "gd":
                    # Gradients of images differ by orders of magnitude between samples: no one rate fits them.
                    descent = descent / per_sample(descent.flatten(1).abs().amax(dim=1).clamp_min(1e-30), descent)
                elif self.optimizer == "adam":
                    first = 0.9 * first + 0.1 * descent
                    second = 0.999 * second + 0.001 * descent.square()
                    descent = first / (1 - 0.9**k) / ((second / (1 - 0.999**k)).sqrt() + 1e-12)
                s = torch.minimum(torch.maximum(s - rate * descent, low), high)
        return Crafted((x + eps * s).detach())


def implicit_direction(
    gradient: Tensor,
    s: Tensor,
    lo: Tensor,
    hi: Tensor,
    c: float,
    curvature: Callable[[Tensor], Tensor] | None = None,
    steps: int = 10,
) -> Tensor:
    """v with H v = gradient, where H = diag(barrier_curvature) - (Hessian of the loss in s), (B, ...).

    Args:
        gradient: of each sample's loss in its s.
        curvature: u -> (Hessian of the loss in s) u; None takes H for its diagonal, which is exact for a piecewise
            linear loss. At a stationary point of phi_bar that answer is at most the distance to the nearer face; where the
            inner steps have not arrived at one, and g is far from the barrier's own gradient, it is held there. The
            answer of conjugate gradients, which may be larger, is held at the width of the box.
        steps: conjugate-gradient steps, with the diagonal as preconditioner. H is positive definite at a minimiser of
            phi_bar only: a sample that meets a direction of non-positive curvature keeps what it has by then.
    """
    diagonal = barrier_curvature(s, lo, hi, c)
    nearer = torch.minimum(hi - s, s - lo)
    plain = torch.minimum(torch.maximum(gradient / diagonal, -nearer), nearer)
    if curvature is None:
        return plain
    v, residual = torch.zeros_like(gradient), gradient.clone()
    direction = z = residual / diagonal
    rho = _dot(residual, z)
    target, going = 1e-24 * _dot(gradient, gradient), rho > 0
    for _ in range(steps):
        product = diagonal * direction - curvature(direction)
        bend = _dot(direction, product)
        going = going & (bend > 0) & (_dot(residual, residual) > target)
        alpha = torch.where(going, rho / torch.where(going, bend, 1.0), 0.0)
        v = v + per_sample(alpha, v) * direction
        residual = residual - per_sample(alpha, v) * product
        z = residual / diagonal
        following = _dot(residual, z)
        beta = torch.where(going, following / torch.where(going, rho, 1.0), 0.0)
        direction, rho = z + per_sample(beta, v) * direction, following
    # Where the very first direction was bad there is nothing yet: the diagonal's answer stands in.
    moved = (v.flatten(1) != 0).any(dim=1)
    return torch.where(per_sample(moved, v), torch.minimum(torch.maximum(v, lo - hi), hi - lo), plain)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """One scalar product per sample, (B,)."""
    return (a * b).flatten(1).sum(dim=1)
