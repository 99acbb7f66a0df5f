"""Distance to the k-th nearest training feature (Sun, Ming, Zhu, Li, ICML 2022, arXiv 2204.06507).

Features are normalised to unit length; score = |z - z_(k)|. Distances are taken block by block, so no array of
(test samples, training samples) is ever made.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from detectors.base import Detector
from detectors.selection import numbers
from robustbench_ext.errors import ConfigError, DataError
from robustbench_ext.models.observe import PENULTIMATE, Observations

QUERIES, BANK = 1024, 4096  # rows of a block of distances


def unit(features: Tensor) -> Tensor:
    """Rows of length one, float64; a row of zeros stays one."""
    f = features.double()
    out: Tensor = f / f.norm(dim=1, keepdim=True).clamp_min(1e-12)
    return out


def kth_distance(z: Tensor, bank: Tensor, k: int) -> Tensor:
    """The distance of each row of z (n, d) to the k-th nearest row of `bank` (m, d), shape (n,); differentiable."""
    found = []
    squares = bank.square().sum(dim=1)
    for i in range(0, len(z), QUERIES):
        query = z[i : i + QUERIES]
        nearest, index = query.new_empty(len(query), 0), torch.empty(len(query), 0, dtype=torch.int64)
        with torch.no_grad():
            for j in range(0, len(bank), BANK):
                block = squares[j : j + BANK] - 2 * query @ bank[j : j + BANK].T  # |z|^2 is the same for all
                there = torch.arange(j, j + block.shape[1]).expand_as(block)
                both, at = torch.cat([nearest, block], dim=1), torch.cat([index, there], dim=1)
                nearest, order = both.topk(min(k, both.shape[1]), dim=1, largest=False)
                index = at.gather(1, order)
        # The difference itself: the expanded square would lose the digits of a small distance.
        found.append((query - bank[index[:, k - 1]]).norm(dim=1))
    return torch.cat(found) if found else z.new_zeros(0)


class KNN(Detector):
    """score = distance of the normalised penultimate feature to the k-th nearest of the training data.

    Args:
        k: 50 in the paper for CIFAR-10 (of 50,000 samples), 200 for CIFAR-100, 1000 for ImageNet.
        normalize: unit length; without, distances also depend on the features' size.
        layer: the tap to read.
    """

    name: ClassVar[str] = "knn"
    taps: tuple[str, ...] = (PENULTIMATE,)
    needs_fit = True
    reference: ClassVar[str] = "arXiv 2204.06507"

    def __init__(self, k: int = 50, normalize: bool = True, layer: str = PENULTIMATE) -> None:
        (number,) = numbers(k, "knn: k", 1.0)
        if number != int(number):
            raise ConfigError(f"knn: k = {k!r}, expected a whole number >= 1")
        self.k, self.normalize, self.taps = int(number), bool(normalize), (layer,)

    def parameters(self) -> dict[str, Any]:
        return {"k": self.k, "normalize": self.normalize, "layer": self.taps[0]}

    def _prepared(self, seen: Observations) -> Tensor:
        features = seen.features[self.taps[0]]
        return unit(features) if self.normalize else features.double()

    def _fit(self, train: Observations, model: nn.Module | None) -> None:
        if len(train) < self.k:
            raise DataError(f"knn: k = {self.k}, but there are only {len(train)} training samples; give a smaller k")
        self._bank = self._prepared(train)

    def _score(self, seen: Observations) -> Tensor:
        z = self._prepared(seen)
        if z.shape[1] != self._bank.shape[1]:
            raise DataError(
                f"knn: features have {z.shape[1]} dimensions, the training data's had {self._bank.shape[1]}"
            )
        return kth_distance(z, self._bank, self.k)
