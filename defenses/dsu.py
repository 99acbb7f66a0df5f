"""DSU: domain shifts with uncertainty (Li et al., ICLR 2022, arXiv 2202.03958).

    mu' = mu + e S_mu,   sigma' = sigma + e' S_sigma,      e, e' ~ N(0, 1) per sample and channel,

S the deviation of the statistic over the batch. What is left of AdvStyle without its adversary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from defenses.base import share
from defenses.style import StyleDefense, StyleModule, batch_deviation, restyle, style_of
from robustbench_ext.numbers import read_numbers


class DSUModule(StyleModule):
    """DSU for one layer: with probability p a call perturbs the whole batch."""

    def __init__(self, channels: int, p: float = 0.5) -> None:
        super().__init__()
        self.p = p

    def _change(self, x: Tensor) -> Tensor:
        if float(torch.rand(())) >= self.p:
            return x
        mu, sigma = style_of(x)
        noise_mu, noise_sigma = (torch.randn(mu.shape).to(mu.device) for _ in range(2))
        return restyle(x, mu, sigma, mu + noise_mu * batch_deviation(mu), sigma + noise_sigma * batch_deviation(sigma))


@dataclass(frozen=True, kw_only=True)
class DSU(StyleDefense):
    """Another defense on a network with DSU.

    Args:
        p: probability that a call of a module perturbs.
    """

    p: float = 0.5

    name: ClassVar[str] = "dsu"
    reference: ClassVar[str] = "arXiv 2202.03958"

    def __post_init__(self) -> None:
        self._settle()
        read_numbers(self, "dsu")
        share(self.p, "dsu: p")

    def _module(self, channels: int) -> StyleModule:
        return DSUModule(channels, self.p)
