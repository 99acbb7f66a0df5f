"""Temperature scaling (Guo, Pleiss, Sun, Weinberger, ICML 2017, arXiv 1706.04599)."""

from __future__ import annotations

import math
from typing import ClassVar

from torch import Tensor, nn

from robustbench_ext.models.observe import Observations
from uq.base import Estimator

_LIMIT = 1e3


def optimal_temperature(logits: Tensor, labels: Tensor) -> float:
    """The T > 0 that minimises the NLL of softmax(logits / T).

    The NLL is convex in b = 1/T with derivative mean(sum_k p_k z_k - z_y), so the optimum is that derivative's only
    root. There is none where every sample is classified correctly (the NLL falls for ever as T -> 0) or where the true
    logits are on average no larger than the mean logit (T -> infinity): then the end of [1/1000, 1000] is returned.
    """
    from scipy.optimize import brentq

    z = logits.double()
    z = z - z.amax(dim=1, keepdim=True)
    true = z.gather(1, labels[:, None])[:, 0]

    def slope(log_b: float) -> float:
        weights = (z * math.exp(log_b)).softmax(dim=1)
        return float(((weights * z).sum(dim=1) - true).mean())

    low, high = -math.log(_LIMIT), math.log(_LIMIT)
    if slope(high) <= 0:
        return 1 / _LIMIT
    if slope(low) >= 0:
        return _LIMIT
    return math.exp(-float(brentq(slope, low, high, xtol=1e-10)))


class TemperatureScaling(Estimator):
    """logits / T with one T fitted on the calibration split. Predictions, and so accuracy, do not change."""

    name: ClassVar[str] = "temperature"
    reference: ClassVar[str] = "arXiv 1706.04599"

    temperature = math.nan

    def _fit(self, held_out: Observations, model: nn.Module | None) -> None:
        self.temperature = optimal_temperature(held_out.logits, held_out.labels)

    def _calibrate(self, seen: Observations) -> Tensor:
        return seen.logits.double() / self.temperature

    def warnings(self) -> list[str]:
        if self.temperature <= 1 / _LIMIT:
            return [
                "every calibration sample is classified correctly, so the temperature is at its lower limit and means nothing"
            ]
        if self.temperature >= _LIMIT:
            return ["the temperature is at its upper limit: the calibration logits say nothing of the labels"]
        return []

    def summary(self) -> dict[str, float]:
        return {"temperature": self.temperature}
