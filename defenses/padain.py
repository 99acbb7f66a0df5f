"""pAdaIN: permuted adaptive instance normalisation (Nuriel, Benaim, Wolf, CVPR 2021, arXiv 2010.05785).

With a small probability a layer gives every map the style of another sample of the batch,

    x_out = sigma_pi (x - mu) / sigma + mu_pi,

behind every convolution, before its batch norm. The style's statistics are constants for the gradient, the content's are not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from defenses.base import share
from defenses.style import StyleDefense, StyleModule, convolutions, restyle, style_of
from robustbench_ext.numbers import read_numbers

EPS = 1e-5


def permute_styles(x: Tensor, permutation: Tensor) -> Tensor:
    """Maps (B, C, H, W) in the style of the permuted sample."""
    mu, sigma = style_of(x, EPS)
    return restyle(x, mu, sigma, mu.detach()[permutation], sigma.detach()[permutation])


class PAdaINModule(StyleModule):
    """pAdaIN for one layer."""

    def __init__(self, channels: int, p: float = 0.01) -> None:
        super().__init__()
        self.p = p

    def _change(self, x: Tensor) -> Tensor:
        if float(torch.rand(())) >= self.p:
            return x
        return permute_styles(x, torch.randperm(len(x)).to(x.device))


@dataclass(frozen=True, kw_only=True)
class PAdaIN(StyleDefense):
    """Another defense on a network with pAdaIN behind every convolution (or behind `layers`).

    Args:
        p: probability that a call of a module changes styles.
    """

    p: float = 0.01

    name: ClassVar[str] = "padain"
    reference: ClassVar[str] = "arXiv 2010.05785"

    def __post_init__(self) -> None:
        self._settle()
        read_numbers(self, "padain")
        share(self.p, "padain: p")

    def _places(self, model: nn.Module) -> tuple[str, ...]:
        return tuple(convolutions(model))

    def _module(self, channels: int) -> StyleModule:
        return PAdaINModule(channels, self.p)
