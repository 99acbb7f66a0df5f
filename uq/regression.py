"""What every uncertainty estimator of a regressor promises: fit on training and held-out samples, then predict intervals.

Whatever the method, a prediction holds central intervals at the same nominal coverages (`NOMINAL`), so that coverage, width,
interval score and weighted interval score can be compared between all of them; quantiles at `LEVELS` where the method has
them. An interval need not consist of two quantiles (split-point's two sides have coverages of their own).

Everything is float64 NumPy, in the units of the data: what standardises inputs or targets does so inside.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar, final

import numpy as np
from torch import nn

from robustbench_ext.errors import ConfigError, DataError, NotFittedError

Self = TypeVar("Self", bound="RegressionEstimator")

NOMINAL = (0.5, 0.8, 0.9, 0.95)  # coverages of the intervals that every estimator gives
# Quantile levels that make these intervals, and the median: (1 -+ c) / 2.
LEVELS = tuple(sorted({0.5} | {round((1 + s * c) / 2, 6) for c in NOMINAL for s in (-1, 1)}))


@dataclass(frozen=True)
class Samples:
    """N samples as an estimator sees them.

    Attributes:
        x: inputs (N, d), raw units; NaN never.
        prediction: (N,), the regressor's own prediction.
        y: targets (N,); None where they are not to be known.
        features: by tap name, each (N, f), of a network.
        ids: str (N,), stable; randomness is drawn per id.
    """

    x: np.ndarray
    prediction: np.ndarray
    y: np.ndarray | None = None
    features: dict[str, np.ndarray] = field(default_factory=dict)
    ids: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.x)

    def take(self, index: np.ndarray | slice) -> Samples:
        """Some of the samples."""
        return Samples(
            self.x[index],
            self.prediction[index],
            None if self.y is None else self.y[index],
            {name: f[index] for name, f in self.features.items()},
            None if self.ids is None else self.ids[index],
        )


@dataclass(frozen=True)
class Prediction:
    """What an estimator says of N samples.

    Attributes:
        point: (N,), its point prediction: the regressor's own where the method leaves it alone, the median of quantile methods.
        low, high: (N, len(NOMINAL)), ends of the central intervals, low <= high; infinite where nothing less is justified.
        quantiles: (N, len(LEVELS)), not decreasing along the levels; None where the method has none.
        crossed: (N,) int, adjacent pairs of quantiles that crossed before they were sorted; None where there are none.
        aleatoric, epistemic: (N,) >= 0, in units of y (or of y^2: the estimator says so); None where not estimated.
    """

    point: np.ndarray
    low: np.ndarray
    high: np.ndarray
    quantiles: np.ndarray | None = None
    crossed: np.ndarray | None = None
    aleatoric: np.ndarray | None = None
    epistemic: np.ndarray | None = None


def from_quantiles(
    quantiles: np.ndarray, aleatoric: np.ndarray | None = None, epistemic: np.ndarray | None = None
) -> Prediction:
    """A prediction from quantiles (N, len(LEVELS)) at `LEVELS`, sorted where they cross; the point is the median."""
    crossed = (np.diff(quantiles, axis=1) < 0).sum(axis=1)
    q = np.sort(quantiles, axis=1)
    index = [interval_columns(c) for c in NOMINAL]
    low, high = q[:, [i for i, _ in index]], q[:, [j for _, j in index]]
    return Prediction(q[:, LEVELS.index(0.5)], low, high, q, crossed, aleatoric, epistemic)


def interval_columns(nominal: float) -> tuple[int, int]:
    """Positions in `LEVELS` of the two quantiles that make the central interval of that coverage."""
    return LEVELS.index(round((1 - nominal) / 2, 6)), LEVELS.index(round((1 + nominal) / 2, 6))


class RegressionEstimator(ABC):
    """An interval estimator with its parameters, and after fitting with its state.

    Attributes:
        taps: features of a network that it reads; estimators that need none work on any regressor.
        needs_model: whether it needs the network itself (passes with dropout, say), in fitting and in predicting.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1  # part of every record's key: raise it when outputs change
    reference: ClassVar[str] = ""
    taps: tuple[str, ...] = ()
    needs_model: bool = False

    _fitted = False

    def parameters(self) -> dict[str, Any]:
        """The constructor's arguments, as JSON-like values."""
        return {}

    @final
    def spec(self) -> dict[str, Any]:
        """All that an output depends on here."""
        return {"uq": self.name, "version": self.version, **self.parameters()}

    def warnings(self) -> list[str]:
        """What a reader should know of this fit."""
        return []

    def summary(self) -> dict[str, float]:
        """Fitted numbers worth a line in a report."""
        return {}

    @final
    def fit(self: Self, train: Samples, calibration: Samples, *, model: nn.Module | None = None, seed: int = 0) -> Self:
        """Fit on the samples that the regressor was trained on and on others that it was not; both with targets.

        Methods that need one of the two ignore the other; none looks at more. `seed` decides all draws.

        Raises:
            ConfigError: the network is needed and missing.
            DataError: no targets, NaN, too few samples.
        """
        if self.needs_model and model is None:
            raise ConfigError(f"{self.name}: it needs the network itself: fit(train, calibration, model=network)")
        for what, samples in (("train", train), ("calibration", calibration)):
            if samples.y is None:
                raise DataError(f"{self.name}: the {what} samples have no targets y")
            self._check(samples, what)
        self._fit(train, calibration, model, seed)
        self._fitted = True
        return self

    @final
    def predict(self, samples: Samples, *, model: nn.Module | None = None, seed: int = 0) -> Prediction:
        """Intervals for samples, whose targets are not looked at; `model` where `needs_model`."""
        if not self._fitted:
            raise NotFittedError(f"{self.name}: call fit(train, calibration) before predict(samples)")
        if self.needs_model and model is None:
            raise ConfigError(f"{self.name}: it needs the network itself: predict(samples, model=network)")
        self._check(samples, "given")
        return self._checked(self._predict(samples, model, seed), len(samples))

    def _check(self, samples: Samples, what: str) -> None:
        n = len(samples)
        if n < 1 or samples.x.ndim != 2 or samples.prediction.shape != (n,):
            raise DataError(
                f"{self.name}: {what} samples: x {samples.x.shape} and prediction {samples.prediction.shape}, expected "
                f"(N, d) and (N,) with N >= 1"
            )
        arrays = {"x": samples.x, "prediction": samples.prediction, **samples.features}
        if samples.y is not None:
            arrays["y"] = samples.y
        for name, array in arrays.items():
            if len(array) != n or not np.isfinite(array).all():
                raise DataError(f"{self.name}: {what} samples: {name} holds NaN or infinity, or is not of length {n}")
        for tap in self.taps:
            if tap not in samples.features:
                raise DataError(
                    f"{self.name}: {what} samples have no features '{tap}'. They come from a network's layer; for other "
                    f"regressors take an estimator that reads no features, or give tap='inputs'."
                )

    def _checked(self, made: Prediction, n: int) -> Prediction:
        shape = (n, len(NOMINAL))
        if made.point.shape != (n,) or made.low.shape != shape or made.high.shape != shape:
            raise DataError(
                f"{self.name}: point {made.point.shape}, low {made.low.shape}, high {made.high.shape}, expected ({n},), {shape}"
            )
        if np.isnan(made.point).any() or np.isnan(made.low).any() or np.isnan(made.high).any():
            raise DataError(f"{self.name}: predictions hold NaN")
        if (made.low > made.high).any():
            raise DataError(f"{self.name}: an interval ends before it begins")
        return made

    # What a new estimator writes -------------------------------------------------------------------------------------

    @abstractmethod
    def _fit(self, train: Samples, calibration: Samples, model: nn.Module | None, seed: int) -> None:
        """Compute the state."""

    @abstractmethod
    def _predict(self, samples: Samples, model: nn.Module | None, seed: int) -> Prediction:
        """Intervals; must not look at samples.y."""
