"""What every uncertainty estimator of a classifier promises: fit on held-out data, then read.

An estimator is fitted on the `calibration` split (a few on `train`: `fit_on` says so), never on `test`. Where a network has
memorised its training data it is over-confident there, so what is fitted to its mistakes must see others.

Most estimators are functions of saved logits and features, so that all share one forward pass. Two kinds need more:
    needs_model: fitting looks at the model once (the weights of its last layer, say); reading needs it no more.
    reads_inputs: reading needs the inputs and the model itself (passes with dropout, other networks).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar, final

import numpy as np
import torch
from torch import Tensor, nn

from robustbench_ext.errors import ConfigError, DataError, NotFittedError
from robustbench_ext.models.contract import check_images, frozen_eval
from robustbench_ext.models.observe import Observations, Taps, observe
from robustbench_ext.randomness import SampleRandom

Self = TypeVar("Self", bound="Estimator")


@dataclass(frozen=True)
class Reading:
    """What an estimator says of N inputs.

    Attributes:
        logits: (N, K), float64; their softmax is the estimate of the class probabilities.
        aleatoric: (N,), uncertainty of the outcome itself, which more data would not remove; None where not estimated.
        epistemic: (N,), uncertainty for want of data; None where not estimated. Both: higher = more uncertain, finite, in
            units of the estimator's own.
        sets: (N, K) bool, the classes of the prediction set; None where there are no sets.
    """

    logits: Tensor
    aleatoric: Tensor | None = None
    epistemic: Tensor | None = None
    sets: Tensor | None = None


class Estimator(ABC):
    """An estimator with its parameters, and after fitting with its state.

    Attributes:
        taps: the features that it reads (see `robustbench_ext.models.Taps`).
        fit_on: the split that it is fitted on, "calibration" or "train".
        needs_fit: whether fitting needs data.
        needs_model, reads_inputs: see above.
        differentiable: whether an adaptive attack can follow the gradient of `calibrate`.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1  # part of every record's key: raise it when outputs change
    reference: ClassVar[str] = ""
    taps: tuple[str, ...] = ()
    fit_on: str = "calibration"
    needs_fit: bool = True
    needs_model: bool = False
    reads_inputs: bool = False
    differentiable: bool = True

    _taps: Taps | None = None
    _held_out: Any = None  # what `with_inputs` handed over
    _fitted = False

    def parameters(self) -> dict[str, Any]:
        """The constructor's arguments, as JSON-like values."""
        return {}

    @final
    def spec(self) -> dict[str, Any]:
        """All that an output depends on here."""
        return {"uq": self.name, "version": self.version, **self.parameters()}

    def warnings(self) -> list[str]:
        """What a reader should know of this fit, such as a parameter at its limit."""
        return []

    def summary(self) -> dict[str, float]:
        """Fitted numbers worth a line in a report."""
        return {}

    # Fitting ---------------------------------------------------------------------------------------------------------

    @final
    def fit(self: Self, model: nn.Module, x: Tensor, labels: Tensor, batch_size: int = 250) -> Self:
        """Fit on inputs float32 (N, C, H, W) in [0, 1] with true labels int64 (N,); keeps the model for `predict`.

        Of a model that was trained on these very inputs most estimators learn that it makes no mistakes: give held-out data
        (training data where `fit_on` is "train").
        """
        self._taps = Taps(model, self.taps)
        if self.fits_inputs and self._held_out is None:
            self.with_inputs(x)
        return self.fit_observations(observe(model, x, labels, self._taps, batch_size), model=model)

    @final
    def fit_observations(self: Self, held_out: Observations, *, model: nn.Module | None = None) -> Self:
        """Fit on logits (N, K), labels (N,) and features of the split `fit_on`; `model` where `needs_model`.

        Raises:
            ConfigError: the model is needed and missing.
            DataError: there are no labelled samples, or the logits or features hold NaN.
        """
        if self.needs_model and model is None:
            raise ConfigError(f"{self.name}: fitting looks at the model: fit_observations(held_out, model=model)")
        if self.needs_fit:
            labels = held_out.labels
            if len(labels) < 1 or int(labels.min()) < 0 or int(labels.max()) >= held_out.logits.shape[1]:
                raise DataError(
                    f"{self.name}: fitting needs labelled samples, got {len(labels)} with labels outside 0..K-1"
                )
        self._check(held_out)
        if self.needs_model and model is not None:
            with frozen_eval(model):
                self._fit(held_out, model)
        else:
            self._fit(held_out, None)
        self._fitted = True
        return self

    # Reading ---------------------------------------------------------------------------------------------------------

    @final
    def predict(self, x: Tensor, *, ids: Sequence[str] | None = None, seed: int = 0, batch_size: int = 250) -> Reading:
        """A reading of inputs in [0, 1]; `ids` and `seed` decide the draws of estimators that draw."""
        if self._taps is None:
            raise NotFittedError(f"{self.name}: call fit(model, x, labels) before predict(x)")
        return self.read_inputs(self._taps.model, x, ids=ids, seed=seed, batch_size=batch_size, reader=self._taps)

    @final
    def read_inputs(
        self,
        model: nn.Module,
        x: Tensor,
        *,
        ids: Sequence[str] | np.ndarray | None = None,
        seed: int = 0,
        batch_size: int = 250,
        reader: Taps | None = None,
        seen: Observations | None = None,
    ) -> Reading:
        """A reading of inputs to a model. `seen` saves the pass through the model where these inputs were observed already."""
        reader = reader if reader is not None else Taps(model, self.taps)
        if seen is None:
            seen = observe(model, x, torch.full((len(x),), -1), reader, batch_size)
        if not self.reads_inputs:
            return self.read(seen)
        self._ready()
        check_images(x)
        self._check(seen)
        names = np.asarray(ids if ids is not None else [str(i) for i in range(len(x))], dtype=np.str_)
        random = SampleRandom.of(seed, names, f"uq/{self.name}")
        with torch.no_grad(), frozen_eval(model):
            return self._checked(self._read_inputs(model, x, seen, random, batch_size), len(x))

    @final
    def read(self, seen: Observations) -> Reading:
        """A reading from saved logits and features; without gradient."""
        if self.reads_inputs:
            raise ConfigError(
                f"{self.name}: reading needs the inputs and the model, not only what was observed of them: predict(x) or "
                f"read_inputs(model, x)"
            )
        self._ready()
        self._check(seen)
        with torch.no_grad():
            return self._checked(self._read(seen), len(seen))

    @final
    def calibrate(self, seen: Observations) -> Tensor:
        """The reading's logits (N, K) alone, with their gradient where `differentiable`: what adaptive attacks follow."""
        self._ready()
        return self._calibrate(seen)

    def _ready(self) -> None:
        if not self._fitted:
            raise NotFittedError(f"{self.name}: call fit(...) or fit_observations(held_out) before reading")

    def _check(self, seen: Observations) -> None:
        if not bool(torch.isfinite(seen.logits).all()):
            raise DataError(f"{self.name}: logits hold NaN or infinity")
        for tap in self.taps:
            if tap not in seen.features:
                raise DataError(
                    f"{self.name}: features '{tap}' are missing; observe(model, x, y, taps={list(self.taps)})"
                )
            if not bool(torch.isfinite(seen.features[tap]).all()):
                raise DataError(f"{self.name}: features '{tap}' hold NaN or infinity; check the model's activations")

    def _checked(self, reading: Reading, n: int) -> Reading:
        for what in ("aleatoric", "epistemic"):
            part = getattr(reading, what)
            if part is not None and (part.shape != (n,) or not bool(torch.isfinite(part).all())):
                raise DataError(f"{self.name}: {what} must be finite, of shape ({n},), got shape {tuple(part.shape)}")
        if reading.logits.ndim != 2 or len(reading.logits) != n or bool(torch.isnan(reading.logits).any()):
            raise DataError(f"{self.name}: logits must be ({n}, K) without NaN, got {tuple(reading.logits.shape)}")
        return reading

    # What a new estimator writes -------------------------------------------------------------------------------------

    @property
    def fits_inputs(self) -> bool:
        """Whether fitting makes passes on the held-out inputs, which `with_inputs` hands over before."""
        return False

    def with_inputs(self: Self, x: Tensor, ids: Sequence[str] | np.ndarray | None = None, seed: int = 0) -> Self:
        """Hand over the held-out inputs, in the order of the observations to come."""
        return self

    @abstractmethod
    def _fit(self, held_out: Observations, model: nn.Module | None) -> None:
        """Compute the state; `model`, frozen and in evaluation mode, where `needs_model`."""

    def _calibrate(self, seen: Observations) -> Tensor:
        """Calibrated logits (N, K), float64."""
        raise NotImplementedError

    def _read(self, seen: Observations) -> Reading:
        """The whole reading; by default the calibrated logits alone."""
        return Reading(self._calibrate(seen))

    def _read_inputs(
        self, model: nn.Module, x: Tensor, seen: Observations, random: SampleRandom, batch_size: int
    ) -> Reading:
        """The reading where `reads_inputs`: all of x (N, C, H, W), what the model says of it, one random stream per sample."""
        raise NotImplementedError
