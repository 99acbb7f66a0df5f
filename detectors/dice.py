"""DICE (Sun, Li, ECCV 2022, arXiv 2111.09805): keep the weights that matter on known data, then take the energy."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from detectors.base import Detector
from detectors.head import Head, head_of
from robustbench_ext.errors import ConfigError
from robustbench_ext.models.energy import marginal_energy
from robustbench_ext.models.observe import PENULTIMATE, Observations
from robustbench_ext.numbers import parse_number


class DICE(Detector):
    """score = E(f (M * W)^T + b), M the weights whose contribution W_kj mean(f_j) lies above a quantile of all.

    Args:
        sparsity: the share of weights that is dropped; 0.9 in the paper for CIFAR, 0.7 for ImageNet.
        temperature: of the energy.
    """

    name: ClassVar[str] = "dice"
    taps = (PENULTIMATE,)
    needs_fit = True
    needs_model = True
    reference: ClassVar[str] = "arXiv 2111.09805"

    def __init__(self, sparsity: float = 0.7, temperature: float = 1.0) -> None:
        self.sparsity = parse_number(sparsity, "dice: sparsity")
        self.temperature = parse_number(temperature, "dice: temperature")
        if not 0 <= self.sparsity < 1 or self.temperature <= 0:
            raise ConfigError(
                f"dice: sparsity = {sparsity!r}, temperature = {temperature!r}; expected 0 <= sparsity < 1, temperature > 0"
            )

    def parameters(self) -> dict[str, Any]:
        return {"sparsity": self.sparsity, "temperature": self.temperature}

    def _fit(self, train: Observations, model: nn.Module | None) -> None:
        head = head_of(model, train, self.name)
        contribution = head.weight * train.features[PENULTIMATE].double().mean(dim=0)
        threshold = float(np.quantile(contribution.numpy(), self.sparsity))
        kept = contribution > threshold if self.sparsity > 0 else torch.ones_like(contribution, dtype=torch.bool)
        self._head = Head(torch.where(kept, head.weight, 0.0), head.bias)

    def _score(self, seen: Observations) -> Tensor:
        return marginal_energy(self._head(seen.features[PENULTIMATE]), self.temperature)
