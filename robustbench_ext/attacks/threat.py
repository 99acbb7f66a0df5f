"""Threat models: what an attacker may do to an input. A ball of a norm around it, cut with the box [0, 1].

Or a motion ("spatial"), which is no ball of a norm: the attack's own parameters bound it, and only the box is checked.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robustbench_ext.device import has_float64
from robustbench_ext.errors import ConfigError
from robustbench_ext.numbers import format_number
from robustbench_ext.randomness import SampleRandom

NORMS = ("Linf", "L2", "spatial")
TOLERANCE = 1e-6  # float32 rounding of x + delta for values in [0, 1] is below 1.2e-7


def flat_norm(delta: Tensor, norm: str) -> Tensor:
    """The norm of each sample's perturbation, (N,); L2 for motions ("spatial"), which have no norm of their own."""
    flat = delta.flatten(1)
    if norm == "Linf":
        return flat.abs().amax(dim=1) if flat.shape[1] else flat.new_zeros(len(flat))
    return row_lengths(flat)


def row_lengths(flat: Tensor) -> Tensor:
    """The L2 norm of each row of (N, D), (N,), like it.

    In float64: over 150,000 pixels float32 loses 1e-6 of the length, which is more than the tolerance, and squares of entries
    below 1e-19 underflow to zero. A device that has no float64 leaves it to the CPU.
    """
    there = flat if has_float64(flat.device) else flat.cpu()
    norms: Tensor = torch.linalg.vector_norm(there, dim=1, dtype=torch.float64)
    return norms.to(flat.dtype).to(flat.device)


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """(N,) as (N, 1, 1, ...), to broadcast over the samples of `like`."""
    return values.view(-1, *([1] * (like.ndim - 1)))


@dataclass(frozen=True)
class Threat:
    """{x' : ||x' - x|| <= eps, 0 <= x' <= 1}.

    Attributes:
        norm: "Linf" or "L2", over all pixels of a sample; or "spatial", which has no ball.
        eps: radius in units of [0, 1] pixels; `inf` (minimum-norm attacks without a budget, motions) leaves only the box.
    """

    norm: str
    eps: float

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise ConfigError(f"norm '{self.norm}': expected one of {', '.join(NORMS)}")
        if self.norm == "spatial" and self.eps != float("inf"):
            raise ConfigError(f"eps = {format_number(self.eps)}: motions have no budget of a norm; leave eps out")
        if self.norm == "Linf" and 1 < self.eps < float("inf"):
            raise ConfigError(
                f"eps = {format_number(self.eps)}: a Linf budget above 1 allows any image in [0, 1]. Budgets are in units of "
                f"[0, 1] pixels: did you mean {format_number(self.eps)}/255?"
            )
        if not self.eps >= 0:
            raise ConfigError(f"eps = {self.eps}: expected a number >= 0, such as 8/255")

    def __str__(self) -> str:
        return self.norm if self.norm == "spatial" else f"{self.norm} {format_number(self.eps)}"

    def project(self, candidates: Tensor, x: Tensor) -> Tensor:
        """The nearest input of the ball (exactly so for Linf), then clipped to the box.

        Clipping to the box cannot leave the ball, since x is inside the box.
        """
        if self.eps == float("inf"):
            return candidates.clamp(0.0, 1.0)
        if self.norm == "Linf":
            return torch.minimum(torch.maximum(candidates, x - self.eps), x + self.eps).clamp(0.0, 1.0)
        delta = candidates - x
        length = flat_norm(delta, "L2").clamp_min(1e-12)
        # One part in a million inside, so that rounding x + delta back to float32 does not end outside.
        return (x + delta * per_sample((self.eps * (1 - 1e-6) / length).clamp_max(1.0), x)).clamp(0.0, 1.0)

    def steepest(self, gradient: Tensor) -> Tensor:
        """The direction of steepest ascent of unit length in this norm: the sign, or the normalised gradient."""
        if self.norm == "Linf":
            return gradient.sign()
        # Scale by the largest entry first: squares of gradients below 1e-19 underflow to zero in float32.
        scaled = gradient / per_sample(gradient.flatten(1).abs().amax(dim=1).clamp_min(torch.finfo().tiny), gradient)
        return scaled / per_sample(flat_norm(scaled, "L2").clamp_min(1e-12), gradient)

    def random_point(self, x: Tensor, random: SampleRandom, step: int = 0) -> Tensor:
        """A random input of the threat model: uniform in the Linf ball; for L2 uniform in the ball's volume."""
        shape = x.shape[1:]
        if self.norm == "Linf":
            return self.project(x + random.uniform(shape, -self.eps, self.eps, step=step), x)
        direction = self.steepest(random.normal(shape, step=step))
        radius = random.child("radius").uniform((), step=step) ** (1.0 / x[0].numel())
        return self.project(x + direction * per_sample(self.eps * radius, x), x)

    def excess(self, adversarial: Tensor, x: Tensor) -> tuple[float, float]:
        """By how much the worst sample leaves the ball and the box; both at most 0 where all is well."""
        if not len(x):
            return 0.0, 0.0
        ball = float(flat_norm(adversarial - x, self.norm).max()) - self.eps
        low, high = (float(v) for v in torch.aminmax(adversarial))
        return ball, max(-low, high - 1.0)
