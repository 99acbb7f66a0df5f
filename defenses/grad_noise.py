"""Annealed gradient noise: every gradient with Gaussian noise that fades as training goes on.

Neelakantan et al., *Adding Gradient Noise Improves Learning for Very Deep Networks*, arXiv 1511.06807:

    g <- g + N(0, sigma_t^2),   sigma_t^2 = eta / (1 + t)^gamma,   t the step, from 0;   gamma 0.55, eta 0.01, 0.3 or 1.

eta is a variance: at t = 0 the standard deviation is its root. (ESPnet's helper sets the standard deviation, and anneals it
every 100 steps.) It is added behind gradient clipping, so that clipping does not undo it and its size is what it says. It is no
differential privacy: clipping is of the batch's gradient and not of each sample's, and nothing is accounted for.

A draw is a function of (seed, step, parameter's name, element): an interrupted training goes on with the noise it would have
had, and processes of a distributed one add the same noise to their common gradient.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from robustbench_ext.errors import ConfigError
from robustbench_ext.numbers import read_numbers
from robustbench_ext.randomness import SampleRandom


@dataclass(frozen=True, kw_only=True)
class GradientNoise:
    """How much noise, and how it fades.

    Args:
        eta: the variance at the first step; 0 for no noise.
        gamma: how fast it fades; 0 for never.
    """

    eta: float = 0.01
    gamma: float = 0.55

    def __post_init__(self) -> None:
        read_numbers(self, "grad_noise")
        if not (0 <= self.eta < math.inf and 0 <= self.gamma < math.inf):
            raise ConfigError(
                f"grad_noise: eta = {self.eta}, gamma = {self.gamma}; expected finite numbers >= 0. eta is a variance"
            )

    def variance(self, step: int) -> float:
        """sigma_t^2 of step t, counted from 0 over all epochs.

        >>> round(GradientNoise(eta=1).variance(1000), 6)
        0.022375
        """
        return float(self.eta / (1 + step) ** self.gamma)

    @torch.no_grad()
    def add(self, parameters: Iterable[tuple[str, nn.Parameter]], seed: int, step: int) -> None:
        """Add it to the gradients of named parameters; those without a gradient stay without."""
        if self.eta == 0:
            return
        deviation = math.sqrt(self.variance(step))
        for name, parameter in parameters:
            if parameter.grad is None:
                continue
            random = SampleRandom.of(seed, [name], "gradient-noise", parameter.device)
            noise = random.normal((parameter.numel(),), step=step).reshape(parameter.shape)
            parameter.grad.add_(deviation * noise.to(parameter.grad.dtype))
