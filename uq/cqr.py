"""Conformalised quantile regression (Romano, Patterson, Candes, NeurIPS 2019, arXiv 1905.03222), by a split or by CV+."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
from torch import nn

from robustbench_ext.errors import ConfigError
from uq.conformal import assembled, cv_plus, cv_plus_slack, interval_scores, thresholds, widened
from uq.fitting import folds
from uq.quantile_models import QuantileModel, make_model
from uq.regression import LEVELS, NOMINAL, Prediction, RegressionEstimator, Samples, from_quantiles, interval_columns


class CQR(RegressionEstimator):
    """Quantiles of a model of the training split, their intervals moved until they cover the calibration split as promised.

    Args:
        model: a name of `uq.quantile_models.MODELS`, or a mapping {"name": ..., options}.
        sides: "both" ends moved by one threshold, or "each" by its own (see `uq.conformal.thresholds`).
        method: "split"; or "cv+", which fits one model per fold of training and calibration samples together: no sample is
            kept from the models, the promise is 1 - 2 alpha less a little, about 1 - alpha in practice.
        folds: of "cv+".

    Intervals are nested and hold the median: where an inner interval reaches past an outer one, the outer is widened.

    Raises:
        ConfigError: an option is unknown, or "each" is asked of "cv+".
    """

    name: ClassVar[str] = "cqr"
    reference: ClassVar[str] = "arXiv 1905.03222"

    def __init__(
        self,
        model: str | Mapping[str, Any] = "boosting",
        sides: str = "both",
        method: str = "split",
        folds: int = 5,
    ) -> None:
        if sides not in ("both", "each") or method not in ("split", "cv+"):
            raise ConfigError(f"cqr: sides 'both' or 'each', method 'split' or 'cv+', got {sides!r} and {method!r}")
        if method == "cv+" and sides == "each":
            raise ConfigError("cqr: 'cv+' has one score per interval; take sides='both'")
        self.model: str | dict[str, Any] = model if isinstance(model, str) else dict(model)
        make_model(self.model)
        self.sides, self.method, self.folds = sides, method, folds

    def parameters(self) -> dict[str, Any]:
        return {"model": self.model, "sides": self.sides, "method": self.method, "folds": self.folds}

    def _fit(self, train: Samples, calibration: Samples, model: nn.Module | None, seed: int) -> None:
        assert train.y is not None and calibration.y is not None  # noqa: S101 - checked by fit
        self.n = len(calibration)
        if self.method == "split":
            self._models = [self._new(train.x, train.y, seed)]
            self._moves = thresholds(
                calibration.y, np.sort(self._models[0].quantiles(calibration.x), axis=1), self.sides
            )
            return
        x, y = np.concatenate([train.x, calibration.x]), np.concatenate([train.y, calibration.y])
        ids = None if train.ids is None or calibration.ids is None else np.concatenate([train.ids, calibration.ids])
        self.n, self._fold = len(y), folds(len(y), self.folds, seed, ids, "cqr")
        self._models = [self._new(x[self._fold != k], y[self._fold != k], seed) for k in range(self.folds)]
        self._scores = np.empty((len(y), len(NOMINAL)))
        for k, fitted in enumerate(self._models):
            away = self._fold == k
            q = np.sort(fitted.quantiles(x[away]), axis=1)
            for c, nominal in enumerate(NOMINAL):
                i, j = interval_columns(nominal)
                self._scores[away, c] = interval_scores(y[away], q[:, i], q[:, j])

    def _new(self, x: np.ndarray, y: np.ndarray, seed: int) -> QuantileModel:
        return make_model(self.model).fit(x, y, LEVELS, seed)

    def _predict(self, samples: Samples, model: nn.Module | None, seed: int) -> Prediction:
        raw = np.stack([fitted.quantiles(samples.x) for fitted in self._models])  # (K, N, m)
        q = np.sort(raw, axis=2)
        if self.method == "split":
            made = widened(q[0], self._moves)
        else:
            ends = []
            for c, nominal in enumerate(NOMINAL):
                i, j = interval_columns(nominal)
                ends.append(cv_plus(q[:, :, i].T, q[:, :, j].T, self._fold, self._scores[:, c], 1 - nominal))
            point = np.median(q[:, :, LEVELS.index(0.5)], axis=0)
            made = assembled(point, np.stack([e[0] for e in ends], 1), np.stack([e[1] for e in ends], 1))
        return replace(made, crossed=from_quantiles(raw.mean(axis=0)).crossed)

    def warnings(self) -> list[str]:
        if self.method == "cv+":
            slack = cv_plus_slack(self.n, self.folds)
            return [
                f"CV+ promises a coverage of 1 - 2 alpha - {slack:.3f}, not of 1 - alpha; it usually keeps the latter"
            ]
        if not np.isfinite(self._moves).all():
            return [f"{self.n} calibration samples are too few for every nominal coverage: some intervals are infinite"]
        return []

    def summary(self) -> dict[str, float]:
        if self.method == "cv+":
            return {}
        return {f"moved {c:g}": float(m) for c, m in zip(NOMINAL, self._moves.mean(axis=1), strict=True)}
