"""Regressors of which several predictions are at hand: their mean, their spread, and intervals by calibration.

The passes predict means and no variances, so the aleatoric part is one number, estimated where the regressor was not
trained: what the squared residuals of the mean have beyond the variance over passes, on average. Both make the scale of a
sample, tau^2 = aleatoric + epistemic, and the intervals are mean -+ z tau, with z by one of

    conformal: the ceil((n + 1) c)-th smallest |residual| / tau of n other calibration samples, so that coverage is at least
        c on average over calibration sets, whatever the distribution (Lei et al. 2018, arXiv 1604.04173);
    gaussian: the normal quantile. Coverage is what the residuals' shape makes of it.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import ndtri
from torch import Tensor, nn

from robustbench_ext.errors import ConfigError, DataError
from robustbench_ext.models.observe_regressor import check_predictions
from robustbench_ext.randomness import SampleRandom
from uq.monte_carlo import Source, sample_outputs, total_variance
from uq.regression import LEVELS, NOMINAL, Prediction, RegressionEstimator, Samples

INTERVALS = ("conformal", "gaussian")
_TINY = 1e-150  # a scale whose square is still a number


@dataclass(frozen=True)
class Mixture:
    """Predictions of S passes (S, N) and of the single, deterministic pass (N,), float64; `weight` of the passes' mean.

    It stands for the mixture of S + 1 predictions with weights alpha / S and 1 - alpha.
    """

    passes: Tensor
    single: Tensor
    weight: float = 1.0

    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and variance over the mixture, each (N,); the variance over passes is taken as the unbiased one."""
        a = self.weight
        mean, _, spread = total_variance(self.passes)
        apart = (mean - self.single).square()
        point = mean if a == 1 else a * mean + (1 - a) * self.single
        return point.numpy(), (a * spread + a * (1 - a) * apart).numpy()


def sample_predictions(source: Source, model: nn.Module, samples: Samples, seed: int, name: str, passes: int) -> Tensor:
    """Predictions of a network's passes, (S, N), float64.

    Raises:
        ModelError: a pass is not one finite number a sample.
    """
    ids = samples.ids if samples.ids is not None else np.arange(len(samples))
    random = SampleRandom.of(seed, [str(i) for i in ids], f"uq/{name}")
    out = sample_outputs(source, model, torch.from_numpy(samples.x).float(), random, passes)
    return torch.stack([check_predictions(one, len(samples)) for one in out])


class MonteCarloRegressor(RegressionEstimator):
    """Point = mean over passes, aleatoric and epistemic variance (in y^2), intervals of half-width z tau.

    Only the calibration split is looked at. With conformal intervals every second of its samples fits the scale (and whatever
    else is fitted), the others z.
    """

    needs_model = True

    def __init__(self, intervals: str) -> None:
        if intervals not in INTERVALS:
            raise ConfigError(f"{self.name}: intervals = {intervals!r}, expected one of {', '.join(INTERVALS)}")
        self.intervals = intervals
        self.noise = math.nan  # aleatoric variance
        self.z = np.full(len(NOMINAL), math.nan)

    @abstractmethod
    def _passes(self, samples: Samples, model: nn.Module, seed: int) -> Mixture:
        """All passes on some samples."""

    def _learn(self, mixture: Mixture, y: Tensor) -> None:
        """Fit what else there is to fit, on samples with targets y (N,)."""

    def _fit(self, train: Samples, calibration: Samples, model: nn.Module | None, seed: int) -> None:
        if model is None or calibration.y is None:
            raise ConfigError(f"{self.name}: it needs the network and calibration targets")
        conformal = self.intervals == "conformal"
        if len(calibration) < (2 if conformal else 1):
            raise DataError(f"{self.name}: {len(calibration)} calibration samples, expected at least 2")
        first = slice(0, None, 2) if conformal else slice(None)
        scale, rest = calibration.take(first), calibration.take(slice(1, None, 2))
        mixture = self._passes(scale, model, seed)
        y = np.asarray(scale.y, dtype=np.float64)
        self._learn(mixture, torch.from_numpy(y))
        point, spread = self._mixed(mixture).moments()
        self.noise = max(0.0, float(np.mean((y - point) ** 2 - spread)))
        if not conformal:
            self.z = np.asarray(ndtri((1 + np.array(NOMINAL)) / 2))
            return
        point, spread = self._mixed(self._passes(rest, model, seed)).moments()
        scores = np.sort(np.abs(np.asarray(rest.y) - point) / self._tau(spread))
        ranks = [math.ceil((len(scores) + 1) * c - 1e-9) for c in NOMINAL]
        self.z = np.array([scores[k - 1] if k <= len(scores) else math.inf for k in ranks])

    def _mixed(self, mixture: Mixture) -> Mixture:
        """The mixture as it is read."""
        return mixture

    def _tau(self, spread: np.ndarray) -> np.ndarray:
        return np.sqrt(np.maximum(self.noise + spread, _TINY**2))

    def _predict(self, samples: Samples, model: nn.Module | None, seed: int) -> Prediction:
        if model is None:
            raise ConfigError(f"{self.name}: it needs the network itself")
        point, spread = self._mixed(self._passes(samples, model, seed)).moments()
        tau = self._tau(spread)
        half = self.z[None, :] * tau[:, None]
        quantiles = None
        if self.intervals == "gaussian":
            quantiles = point[:, None] + np.asarray(ndtri(np.array(LEVELS)))[None, :] * tau[:, None]
        noise = np.full(len(point), self.noise)
        centre = point[:, None]
        return Prediction(point, centre - half, centre + half, quantiles, aleatoric=noise, epistemic=spread)

    def warnings(self) -> list[str]:
        found = []
        if self.noise == 0:
            found.append(
                "the spread over passes exceeds the calibration residuals: the aleatoric variance is estimated as 0"
            )
        if np.isinf(self.z).any():
            found.append("too few calibration samples for the widest intervals, which are infinite")
        return found

    def summary(self) -> dict[str, float]:
        return {"aleatoric_std": math.sqrt(self.noise)}
