"""Prediction sets of classifiers by split conformal prediction; LAC, APS and RAPS differ in the score alone.

A score s(x, y) is small where class y is plausible. The set holds all y with s(x, y) <= q, the ceil((n + 1)(1 - alpha))-th
smallest score of the true classes of n calibration samples (Vovk, Gammerman, Shafer 2005; Sadinle, Lei, Wasserman 2019,
arXiv 1609.00451). A new sample that is exchangeable with them has its class in the set with a probability of at least
1 - alpha, and of at most 1 - alpha + 1 / (n + 1) where scores have no ties: on average over inputs and calibration sets, not
for every input or class. Under attack, corruption or for unknown inputs nothing is promised. Where
n < ceil((n + 1)(1 - alpha)), q is infinite and every set holds all classes.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from robustbench_ext.errors import ConfigError, DataError
from robustbench_ext.metrics.conformal import threshold
from robustbench_ext.models.observe import Observations
from robustbench_ext.numbers import parse_number
from robustbench_ext.randomness import SampleRandom
from uq.base import Estimator, Reading
from uq.temperature import optimal_temperature


def tuning_rows(n: int, share: float) -> Tensor:
    """Which of n samples are for tuning: bool (n,), evenly spread, floor(n share) of them true."""
    steps = torch.floor(torch.arange(n + 1, dtype=torch.float64) * share + 1e-9)
    return steps.diff() > 0


class PredictionSets(Estimator):
    """What the three share: the split of the calibration samples, the threshold, the reading.

    What is tuned - a temperature, RAPS' k_reg and penalty - is tuned on the share `tune` of the calibration samples, which the
    threshold then does not see: tuned on the same samples, the guarantee would be lost. Where nothing is tuned, all count.
    """

    _tunes = False
    randomised = False
    _temperature = 1.0

    def __init__(self, alpha: float = 0.1, temperature: bool = False, tune: float = 0.2) -> None:
        self.alpha = parse_number(alpha, f"{self.name}: alpha")
        self.tune = parse_number(tune, f"{self.name}: tune")
        for what, value in (("alpha", self.alpha), ("tune", self.tune)):
            if not 0 < value < 1:
                raise ConfigError(f"{self.name}: {what} = {value}, expected a number between 0 and 1")
        if not isinstance(temperature, bool):
            raise ConfigError(f"{self.name}: temperature = {temperature!r}, expected true or false")
        self.temperature = temperature

    def parameters(self) -> dict[str, Any]:
        return {"alpha": self.alpha, "temperature": self.temperature, "tune": self.tune}

    def _fit(self, held_out: Observations, model: nn.Module | None) -> None:
        z, labels = held_out.logits.double(), held_out.labels
        # One draw a position: the samples of a calibration split have an order, but no names here.
        u = SampleRandom.of(0, range(len(z)), f"uq/{self.name}/fit").uniform((1,)).double() if self.randomised else None
        if self.temperature or self._tunes:
            rows = tuning_rows(len(z), self.tune)
            if not bool(rows.any()):
                raise DataError(
                    f"{self.name}: {len(z)} calibration samples leave none to tune on at tune = {self.tune}; give at least "
                    f"{math.ceil(1 / self.tune)}"
                )
            if self.temperature:
                self._temperature = optimal_temperature(z[rows], labels[rows])
            self._choose((z[rows] / self._temperature).softmax(dim=1), labels[rows], None if u is None else u[rows])
            z, labels, u = z[~rows], labels[~rows], None if u is None else u[~rows]
        scores = self._scores((z / self._temperature).softmax(dim=1), u)
        self.threshold = threshold(scores.gather(1, labels[:, None])[:, 0].numpy(), self.alpha)
        self._n = len(z)

    @abstractmethod
    def _scores(self, p: Tensor, u: Tensor | None) -> Tensor:
        """Scores (N, K) of probabilities (N, K); u (N, 1) where randomised."""

    def _choose(self, p: Tensor, labels: Tensor, u: Tensor | None) -> None:
        """Choose parameters on the tuning samples."""

    def _calibrate(self, seen: Observations) -> Tensor:
        return seen.logits.double() / self._temperature

    def _read(self, seen: Observations) -> Reading:
        return self._with_sets(self._calibrate(seen), None)

    def _read_inputs(
        self, model: nn.Module, x: Tensor, seen: Observations, random: SampleRandom, batch_size: int
    ) -> Reading:
        # One draw a sample; the pass is done.
        return self._with_sets(self._calibrate(seen), random.uniform((1,)).double())

    def _with_sets(self, logits: Tensor, u: Tensor | None) -> Reading:
        return Reading(logits, sets=self._scores(logits.softmax(dim=1), u) <= self.threshold)

    def warnings(self) -> list[str]:
        if math.isinf(self.threshold):
            least = math.ceil(1 / self.alpha - 1e-9) - 1
            return [
                f"{self._n} calibration samples are too few for alpha = {self.alpha} (at least {least}): all classes"
            ]
        if self.temperature and not 1e-3 < self._temperature < 1e3:
            return [
                "the temperature is at its limit, so the logits mean nothing (the sets keep their coverage): tune on more"
            ]
        return []

    def summary(self) -> dict[str, float]:
        found = {"calibration samples": float(self._n)}
        if math.isfinite(self.threshold):
            found["threshold"] = self.threshold
        if self.temperature:
            found["temperature"] = self._temperature
        return found
