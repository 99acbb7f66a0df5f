"""GradNorm (Huang, Geng, Li, NeurIPS 2021, arXiv 2110.00218): known inputs pull harder on the last layer's weights.

The gradient of KL(uniform || softmax(f W^T + b)) with respect to W is (p - 1/K) f^T, so its L1 norm factors:

    |gradient|_1 = |f|_1 |softmax(logits / T) - 1/K|_1 / T,   score = -|gradient|_1.

No backward pass, and any number of samples at once.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from detectors.base import Detector
from robustbench_ext.errors import ConfigError
from robustbench_ext.models.observe import PENULTIMATE, Observations
from robustbench_ext.numbers import parse_number


def gradient_norm(features: Tensor, logits: Tensor, temperature: float = 1.0) -> Tensor:
    """L1 norm (N,) of the gradient with respect to the last layer's weights, in float64."""
    p = torch.softmax(logits.double() / temperature, dim=1)
    return features.double().abs().sum(dim=1) * (p - 1 / p.shape[1]).abs().sum(dim=1) / temperature


class GradNorm(Detector):
    """score = -|d KL(uniform || softmax(logits / T)) / d W|_1, W the last linear layer's weights."""

    name: ClassVar[str] = "gradnorm"
    taps = (PENULTIMATE,)
    reference: ClassVar[str] = "arXiv 2110.00218"

    def __init__(self, temperature: float = 1.0) -> None:
        self.temperature = parse_number(temperature, "gradnorm: temperature")
        if self.temperature <= 0:
            raise ConfigError(f"gradnorm: temperature = {temperature!r}, expected a number > 0")

    def parameters(self) -> dict[str, Any]:
        return {"temperature": self.temperature}

    def _score(self, seen: Observations) -> Tensor:
        return -gradient_norm(seen.features[PENULTIMATE], seen.logits, self.temperature)
