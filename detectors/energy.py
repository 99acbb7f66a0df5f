"""Energy score (Liu, Wang, Owens, Li, NeurIPS 2020, arXiv 2010.03759)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from detectors.base import Detector
from robustbench_ext.errors import ConfigError
from robustbench_ext.models.observe import Observations
from robustbench_ext.numbers import parse_number


def marginal_energy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """E_T(x) = -T logsumexp(f(x) / T), shape (N,), in float64; high = unlike the training data.

    Energies of different networks are not comparable: a constant added to all logits shifts them.
    """
    return -temperature * torch.logsumexp(logits.double() / temperature, dim=1)


class Energy(Detector):
    """score = E_T(x).

    Args:
        temperature: T > 0; 1 is the paper's recommendation. Large T approach the mean logit and lose the peak.
    """

    name: ClassVar[str] = "energy"
    reference: ClassVar[str] = "arXiv 2010.03759"

    def __init__(self, temperature: float = 1.0) -> None:
        self.temperature = parse_number(temperature, "energy: temperature")
        if self.temperature <= 0:
            raise ConfigError(f"energy: temperature = {self.temperature}, expected a number > 0")

    def parameters(self) -> dict[str, Any]:
        return {"temperature": self.temperature}

    def _score(self, seen: Observations) -> Tensor:
        return marginal_energy(seen.logits, self.temperature)
