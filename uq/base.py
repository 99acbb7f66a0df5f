"""What every classification estimator promises: calibrate on held-out logits, then give better logits.

An estimator is fitted on the `calibration` split, never on `train` (where a network is over-confident about what it
has memorised) and never on `test`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, TypeVar, final

import torch
from torch import Tensor

from robustbench_ext.errors import DataError, NotFittedError
from robustbench_ext.models.observe import Observations

Self = TypeVar("Self", bound="Estimator")


class Estimator(ABC):
    """An estimator with its parameters, and after fitting with its state."""

    name: ClassVar[str]
    version: ClassVar[int] = 1  # part of every record's key: raise it when outputs change
    taps: ClassVar[tuple[str, ...]] = ()
    reference: ClassVar[str] = ""

    _fitted = False

    def parameters(self) -> dict[str, Any]:
        """The constructor's arguments, as JSON-like values."""
        return {}

    @final
    def spec(self) -> dict[str, Any]:
        """All that an output depends on here."""
        return {"uq": self.name, "version": self.version, **self.parameters()}

    @final
    def fit_observations(self: Self, calibration: Observations) -> Self:
        """Fit on logits (N, K) with true labels (N,) of the calibration split."""
        labels = calibration.labels
        if len(labels) < 1 or int(labels.min()) < 0 or int(labels.max()) >= calibration.logits.shape[1]:
            raise DataError(
                f"{self.name}: fitting needs labelled samples, got {len(labels)} with labels outside 0..K-1"
            )
        if not bool(torch.isfinite(calibration.logits).all()):
            raise DataError(f"{self.name}: logits hold NaN or infinity")
        self._fit(calibration)
        self._fitted = True
        return self

    @final
    def calibrate(self, seen: Observations) -> Tensor:
        """Calibrated logits (N, K), float64: their softmax is the estimate of the class probabilities."""
        if not self._fitted:
            raise NotFittedError(f"{self.name}: call fit_observations(calibration) before calibrate(...)")
        return self._calibrate(seen)

    def warnings(self) -> list[str]:
        """What a reader should know of this fit, such as a parameter at its limit."""
        return []

    def summary(self) -> dict[str, float]:
        """Fitted numbers worth a line in a report."""
        return {}

    @abstractmethod
    def _fit(self, calibration: Observations) -> None: ...

    @abstractmethod
    def _calibrate(self, seen: Observations) -> Tensor: ...
