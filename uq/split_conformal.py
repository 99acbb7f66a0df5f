"""Split conformal prediction on the residuals of any regressor (Papadopoulos et al. 2002; Lei et al., JASA 2018)."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from torch import nn

from robustbench_ext.errors import ConfigError
from uq.conformal import nested, threshold
from uq.fitting import folds
from uq.regression import NOMINAL, Prediction, RegressionEstimator, Samples


class SplitConformal(RegressionEstimator):
    """prediction +- t sigma(x), t from the calibration split: covers as promised for any regressor that did not see it.

    Args:
        scale: "none" for sigma = 1, the same width everywhere; "local" for a random forest of the absolute residual. It
            is fitted to half of the calibration samples (by id), and t to the other half: residuals of the training split are
            too small where the regressor has learnt them by heart.

    There are no quantiles: the two tails need not have equal shares.

    Raises:
        ConfigError: the scale is neither.
    """

    name: ClassVar[str] = "split-conformal"
    reference: ClassVar[str] = "Lei, G'Sell, Rinaldo, Tibshirani, Wasserman, JASA 2018"

    def __init__(self, scale: str = "none") -> None:
        if scale not in ("none", "local"):
            raise ConfigError(f"split-conformal: scale must be 'none' or 'local', got {scale!r}")
        self.scale = scale

    def parameters(self) -> dict[str, Any]:
        return {"scale": self.scale}

    def _fit(self, train: Samples, calibration: Samples, model: nn.Module | None, seed: int) -> None:
        assert calibration.y is not None  # noqa: S101 - checked by fit
        residuals = np.abs(calibration.y - calibration.prediction)
        if self.scale == "local":
            half = folds(len(calibration), 2, seed, calibration.ids, "split-conformal") == 0
            self._fit_scale(calibration.x[half], residuals[half], seed)
            calibration, residuals = calibration.take(~half), residuals[~half]
            residuals = residuals / self._sigma(calibration.x)
        self.n = len(residuals)
        self.thresholds = np.array([threshold(residuals, 1 - nominal) for nominal in NOMINAL])

    def _fit_scale(self, x: np.ndarray, residuals: np.ndarray, seed: int) -> None:
        from sklearn.ensemble import RandomForestRegressor

        forest = RandomForestRegressor(100, min_samples_leaf=10, max_features=1 / 3, random_state=seed, n_jobs=1)
        self._forest = forest.fit(x, residuals)
        self._floor = float(0.01 * residuals.mean()) or 1.0  # no sample is certain; all residuals zero: sigma = 1

    def _sigma(self, x: np.ndarray) -> np.ndarray:
        return np.asarray(np.maximum(self._forest.predict(x), self._floor))

    def _predict(self, samples: Samples, model: nn.Module | None, seed: int) -> Prediction:
        sigma = self._sigma(samples.x) if self.scale == "local" else np.ones(len(samples))
        half, point = sigma[:, None] * self.thresholds, samples.prediction.astype(np.float64)
        return Prediction(point, *nested(point, point[:, None] - half, point[:, None] + half))

    def warnings(self) -> list[str]:
        return [
            f"{self.n} calibration samples are too few for an interval of {nominal:.0%}: it is infinite"
            for nominal, t in zip(NOMINAL, self.thresholds, strict=True)
            if not np.isfinite(t)
        ]

    def summary(self) -> dict[str, float]:
        return {f"threshold {nominal:g}": float(t) for nominal, t in zip(NOMINAL, self.thresholds, strict=True)}
