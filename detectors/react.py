"""ReAct (Sun, Guo, Li, NeurIPS 2021, arXiv 2111.12797): clip what unknown inputs activate too much, then take the energy."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from torch import Tensor, nn

from detectors.base import Detector
from detectors.head import head_of
from robustbench_ext.errors import ConfigError
from robustbench_ext.models.energy import marginal_energy
from robustbench_ext.models.observe import PENULTIMATE, Observations
from robustbench_ext.numbers import parse_number


class ReAct(Detector):
    """score = E(min(f, c) W^T + b), c a quantile of all training activations of the penultimate layer.

    Args:
        quantile: 0.9 in the paper.
        temperature: of the energy.
    """

    name: ClassVar[str] = "react"
    taps = (PENULTIMATE,)
    needs_fit = True
    needs_model = True
    reference: ClassVar[str] = "arXiv 2111.12797"

    def __init__(self, quantile: float = 0.9, temperature: float = 1.0) -> None:
        self.quantile = parse_number(quantile, "react: quantile")
        self.temperature = parse_number(temperature, "react: temperature")
        if not 0 < self.quantile <= 1 or self.temperature <= 0:
            raise ConfigError(
                f"react: quantile = {quantile!r}, temperature = {temperature!r}; expected 0 < quantile <= 1, temperature > 0"
            )

    def parameters(self) -> dict[str, Any]:
        return {"quantile": self.quantile, "temperature": self.temperature}

    def _fit(self, train: Observations, model: nn.Module | None) -> None:
        self._head = head_of(model, train, self.name)
        self.threshold = float(np.quantile(train.features[PENULTIMATE].numpy(), self.quantile))

    def _score(self, seen: Observations) -> Tensor:
        clipped = seen.features[PENULTIMATE].clamp_max(self.threshold)
        return marginal_energy(self._head(clipped), self.temperature)

    def summary(self) -> dict[str, float]:
        return {"threshold": self.threshold}
