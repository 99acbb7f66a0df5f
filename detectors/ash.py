"""Activation shaping (Djurisic, Bozanic, Ashok, Liu, ICLR 2023, arXiv 2209.09858): remove most of a feature, go on.

Per sample, the activations below the p-quantile are set to zero. With s1 and s2 the sums before and after,
ASH-S multiplies what is left by exp(s1 / s2), ASH-P leaves it as it is, ASH-B replaces it by s1 / (number left).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from detectors.base import Detector
from detectors.head import head_of
from robustbench_ext.errors import ConfigError
from robustbench_ext.models.energy import marginal_energy
from robustbench_ext.models.observe import PENULTIMATE, Observations
from robustbench_ext.numbers import parse_number

VARIANTS = ("s", "p", "b")


def shaped(features: Tensor, quantile: float, variant: str = "s") -> Tensor:
    """Features (N, d), non-negative as behind a ReLU, with all but the n - round(n quantile) largest of a row removed."""
    d = features.shape[1]
    kept = d - round(d * quantile)
    if kept < 1:
        raise ConfigError(f"ash: quantile = {quantile} leaves none of {d} activations; give a smaller one")
    values, index = features.topk(kept, dim=1)
    total = features.sum(dim=1, keepdim=True)
    left = values.sum(dim=1, keepdim=True)
    if variant == "b":
        values = (total / kept).expand_as(values)
    elif variant == "s":
        # A row of zeros stays one: there is nothing to scale.
        values = values * torch.exp(torch.where(left > 0, total / left.clamp_min(1e-12), 0.0))
    return torch.zeros_like(features).scatter(1, index, values)


class ASH(Detector):
    """score = E(shaped(f) W^T + b).

    Args:
        quantile: the share of activations that is removed; 0.65 (ASH-B) to 0.95 in the paper.
        variant: "s" (default), "p" or "b".
        temperature: of the energy.
    """

    name: ClassVar[str] = "ash"
    taps = (PENULTIMATE,)
    needs_fit = True  # to recognise the last layer
    needs_model = True
    reference: ClassVar[str] = "arXiv 2209.09858"

    def __init__(self, quantile: float = 0.65, variant: str = "s", temperature: float = 1.0) -> None:
        self.quantile = parse_number(quantile, "ash: quantile")
        self.temperature = parse_number(temperature, "ash: temperature")
        self.variant = variant
        if not 0 <= self.quantile < 1 or self.temperature <= 0 or variant not in VARIANTS:
            raise ConfigError(
                f"ash: quantile = {quantile!r}, variant = {variant!r}, temperature = {temperature!r}; expected 0 <= quantile "
                f"< 1, one of {', '.join(VARIANTS)}, temperature > 0"
            )

    def parameters(self) -> dict[str, Any]:
        return {"quantile": self.quantile, "variant": self.variant, "temperature": self.temperature}

    def _fit(self, train: Observations, model: nn.Module | None) -> None:
        self._head = head_of(model, train, self.name)

    def _score(self, seen: Observations) -> Tensor:
        features = shaped(seen.features[PENULTIMATE].double(), self.quantile, self.variant)
        return marginal_energy(self._head(features), self.temperature)
