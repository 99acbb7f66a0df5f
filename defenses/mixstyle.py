"""MixStyle: styles of two samples mixed (Zhou, Yang, Qiao, Xiang, ICLR 2021, arXiv 2104.02008).

    mu' = l mu + (1 - l) mu_pi,   sigma' = l sigma + (1 - l) sigma_pi,      l ~ Beta(alpha, alpha) per sample,

pi a random permutation of the batch; the statistics are constants for the gradient, the normalised map is not. l = 1 is the
identity.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from defenses.base import at_least, share
from defenses.style import StyleDefense, StyleModule, restyle, style_of
from robustbench_ext.numbers import read_numbers


def mix_styles(x: Tensor, share_kept: Tensor, permutation: Tensor) -> Tensor:
    """Maps (B, C, H, W) whose style is `share_kept` (B, 1, 1, 1) their own, the rest that of the permuted sample."""
    mu, sigma = (s.detach() for s in style_of(x))
    new_mu, new_sigma = (share_kept * s + (1 - share_kept) * s[permutation] for s in (mu, sigma))
    return restyle(x, mu, sigma, new_mu, new_sigma)


class MixStyleModule(StyleModule):
    """MixStyle for one layer: with probability p a call mixes the whole batch."""

    def __init__(self, channels: int, p: float = 0.5, alpha: float = 0.1) -> None:
        super().__init__()
        self.p, self.alpha = p, alpha

    def _change(self, x: Tensor) -> Tensor:
        if float(torch.rand(())) >= self.p:
            return x
        kept = torch.distributions.Beta(self.alpha, self.alpha).sample((len(x), 1, 1, 1)).to(x.device)
        return mix_styles(x, kept, torch.randperm(len(x)).to(x.device))


@dataclass(frozen=True, kw_only=True)
class MixStyle(StyleDefense):
    """Another defense on a network with MixStyle.

    Args:
        p: probability that a call of a module mixes.
        alpha: of the Beta distribution; small values keep most of one of the two styles.
    """

    p: float = 0.5
    alpha: float = 0.1

    name: ClassVar[str] = "mixstyle"
    reference: ClassVar[str] = "arXiv 2104.02008"

    def __post_init__(self) -> None:
        self._settle()
        read_numbers(self, "mixstyle")
        share(self.p, "mixstyle: p")
        at_least(self.alpha, 1e-3, "mixstyle: alpha")

    def _module(self, channels: int) -> StyleModule:
        return MixStyleModule(channels, self.p, self.alpha)
