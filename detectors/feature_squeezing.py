"""Feature squeezing (Xu, Evans, Qi, NDSS 2018, arXiv 1704.01155): an adversarial input changes more when it is simplified.

    score = max over squeezers q of |softmax(f(x)) - softmax(f(q(x)))|_1, in [0, 2].

Squeezers: fewer bits per pixel, a median filter, and non-local means (Buades, Coll, Morel, CVPR 2005).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from detectors.base import Detector
from detectors.selection import numbers
from robustbench_ext.errors import ConfigError
from robustbench_ext.models.observe import Observations, Taps


def fewer_bits(x: Tensor, bits: int) -> Tensor:
    """Values rounded to 2^bits levels between 0 and 1."""
    levels = 2**bits - 1
    out: Tensor = (x * levels).round() / levels
    return out


def median(x: Tensor, size: int) -> Tensor:
    """Median over size x size windows, edges mirrored. Even sizes look up and left, and take the upper of two middles."""
    before = size // 2
    padded = _mirrored(x, before, size - 1 - before)
    windows = padded.unfold(2, size, 1).unfold(3, size, 1).flatten(4)
    return windows.kthvalue(size * size // 2 + 1, dim=-1).values


def non_local_means(x: Tensor, window: int = 11, patch: int = 3, strength: float = 4 / 255) -> Tensor:
    """Each pixel becomes a mean over its window, weighted by exp(-mean squared difference of patches / strength^2).

    Colours share their weights. Work grows with window^2; memory does not.
    """
    reach, edge = window // 2, patch // 2
    padded = _mirrored(x, reach, reach)
    height, width = x.shape[2:]
    total, mass = torch.zeros_like(x), torch.zeros_like(x[:, :1])
    for dy in range(window):
        for dx in range(window):
            shifted = padded[:, :, dy : dy + height, dx : dx + width]
            apart = (shifted - x).square().mean(dim=1, keepdim=True)
            apart = F.avg_pool2d(_mirrored(apart, edge, edge), patch, 1)
            weight = torch.exp(-apart / strength**2)
            total, mass = total + weight * shifted, mass + weight
    return total / mass


def _mirrored(x: Tensor, before: int, after: int) -> Tensor:
    """Padded by mirroring with the edge repeated, as scipy's "reflect"."""
    for dim in (2, 3):
        n = x.shape[dim]
        index = torch.arange(-before, n + after, device=x.device) % (2 * n)
        x = x.index_select(dim, torch.where(index < n, index, 2 * n - 1 - index))
    return x


class FeatureSqueezing(Detector):
    """score = max over squeezers of the L1 change of the predicted distribution.

    Args:
        bits: per pixel, 1 to 8; 0 leaves this squeezer out. The paper takes 1 for MNIST, 5 for colour images.
        window: of the median filter; 0 leaves it out.
        means: strength of non-local means in units of [0, 1] pixels (the paper: 2/255 to 4/255, colour images); 0: left out.
    Cost: one forward pass, and one for each squeezer.
    """

    name: ClassVar[str] = "feature-squeezing"
    reads_inputs = True
    differentiable = False
    reference: ClassVar[str] = "arXiv 1704.01155"

    def __init__(self, bits: int = 1, window: int = 2, means: float = 0.0) -> None:
        ((b,), (w,), (self.means,)) = (
            numbers(v, f"feature-squeezing: {n}") for n, v in (("bits", bits), ("window", window), ("means", means))
        )
        if b != int(b) or b > 8 or w != int(w):
            raise ConfigError(
                f"feature-squeezing: bits = {bits!r}, window = {window!r}; expected whole numbers, bits <= 8"
            )
        self.bits, self.window = int(b), int(w)
        if not (self.bits or self.window or self.means):
            raise ConfigError("feature-squeezing: all squeezers are 0, so nothing would change; give one of them")

    def parameters(self) -> dict[str, Any]:
        return {"bits": self.bits, "window": self.window, "means": self.means}

    def _score_inputs(self, reader: Taps, x: Tensor) -> Tensor:
        squeezed = []
        if self.bits:
            squeezed.append(fewer_bits(x, self.bits))
        if self.window:
            squeezed.append(median(x, self.window))
        if self.means:
            squeezed.append(non_local_means(x, strength=self.means))
        with torch.no_grad():
            before = torch.softmax(reader(x)[0].double(), dim=1)
            changes = [(torch.softmax(reader(q)[0].double(), dim=1) - before).abs().sum(dim=1) for q in squeezed]
        return torch.stack(changes).amax(dim=0)

    def _score(self, seen: Observations) -> Tensor:
        raise NotImplementedError
