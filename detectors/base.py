"""What every detector promises: fit, then score; higher = more out-of-distribution.

The mathematics of a detector is a function of saved logits and features, so that all detectors share one forward
pass. `fit` and `score` are the same thing for people who hold a model and inputs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, TypeVar, final

import torch
from torch import Tensor, nn

from robustbench_ext.errors import DataError, NotFittedError
from robustbench_ext.models.observe import Observations, Taps, observe

Self = TypeVar("Self", bound="Detector")


class Detector(ABC):
    """A detector with its parameters, and after `fit` with its state.

    Class attributes:
        taps: the features that it reads (see `robustbench_ext.models.Taps`); none for detectors on logits.
        needs_fit: whether training data is needed. A detector that needs none may still be given a model by `fit`.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1  # part of every record's key: raise it when scores change
    taps: ClassVar[tuple[str, ...]] = ()
    needs_fit: ClassVar[bool] = False
    reference: ClassVar[str] = ""

    _taps: Taps | None = None
    _fitted = False

    def parameters(self) -> dict[str, Any]:
        """The constructor's arguments, as JSON-like values."""
        return {}

    @final
    def spec(self) -> dict[str, Any]:
        """All that a score depends on here."""
        return {"detector": self.name, "version": self.version, **self.parameters()}

    @final
    def fit(self: Self, model: nn.Module, x: Tensor, labels: Tensor, batch_size: int = 250) -> Self:
        """Fit on training inputs with their true labels; keeps the model for `score`.

        Args:
            x: float32 (N, C, H, W) in [0, 1].
            labels: int64 (N,).
        """
        self._taps = Taps(model, self.taps)
        if self.needs_fit:
            self.fit_observations(observe(model, x, labels, self._taps, batch_size))
        return self

    @final
    def score(self, x: Tensor, batch_size: int = 250) -> Tensor:
        """Scores (N,) of inputs in [0, 1]; higher = more out-of-distribution."""
        if self._taps is None:
            raise NotFittedError(f"{self.name}: call fit(model, x, labels) before score(x)")
        labels = torch.full((len(x),), -1)
        return self.score_observations(observe(self._taps.model, x, labels, self._taps, batch_size))

    @final
    def fit_observations(self: Self, train: Observations) -> Self:
        """Fit on saved logits and features."""
        if self.needs_fit:
            self._check(train)
            self._fit(train)
        self._fitted = True
        return self

    @final
    def score_observations(self, seen: Observations) -> Tensor:
        """Scores (N,), float64, from saved logits and features."""
        if self.needs_fit and not self._fitted:
            raise NotFittedError(f"{self.name}: call fit(...) or fit_observations(...) before asking for scores")
        self._check(seen)
        scores = self._score(seen)
        if scores.shape != (len(seen),):
            raise DataError(f"{self.name}: scores have shape {tuple(scores.shape)}, expected ({len(seen)},)")
        return scores.double()

    def _check(self, seen: Observations) -> None:
        for tap in self.taps:
            if tap not in seen.features:
                raise DataError(
                    f"{self.name}: features '{tap}' are missing; observe(model, x, y, taps={list(self.taps)})"
                )
            if not bool(torch.isfinite(seen.features[tap]).all()):
                raise DataError(f"{self.name}: features '{tap}' hold NaN or infinity; check the model's activations")

    def _fit(self, train: Observations) -> None:  # noqa: B027 - most detectors have nothing to fit
        """Compute the state; only called where `needs_fit`."""

    @abstractmethod
    def _score(self, seen: Observations) -> Tensor:
        """Scores (N,)."""
