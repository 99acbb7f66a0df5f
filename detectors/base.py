"""What every detector promises: fit, then score; higher = more out-of-distribution.

The mathematics of a detector is a function of saved logits and features, so that all detectors share one forward
pass. `fit` and `score` are the same thing for people who hold a model and inputs.

Three kinds need more than observations, and say so:
    needs_model: `fit` looks at the model once, for the weights of its last layer or the like; scores need it no more.
    reads_inputs: scores need the inputs and the model itself (a gradient, a second pass on changed inputs). The engine
        computes them where the inputs are made.
    validate: parameters are chosen on known and unknown inputs of the calibration split (`detectors.validation`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar, final

import torch
from torch import Tensor, nn

from detectors.validation import Validation
from robustbench_ext import device as devices
from robustbench_ext.errors import ConfigError, DataError, NotFittedError
from robustbench_ext.models.contract import check_images, frozen_eval
from robustbench_ext.models.observe import Observations, Taps, observe

Self = TypeVar("Self", bound="Detector")


class Detector(ABC):
    """A detector with its parameters, and after `fit` with its state.

    Attributes:
        taps: the features that it reads (see `robustbench_ext.models.Taps`); none for detectors on logits.
        needs_fit: whether training data is needed. A detector that needs none may still be given a model by `fit`.
        needs_model, reads_inputs, validate: see above; `validate` is a suite's condition such as {attack: fgsm, eps: 0.1}.
        differentiable: whether an adaptive attack can follow the score's gradient.
        needs_gradient: whether it follows a gradient of the model itself, which not every model has.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1  # part of every record's key: raise it when scores change
    taps: tuple[str, ...] = ()
    needs_fit: bool = False
    needs_model: bool = False
    reads_inputs: bool = False
    reads: ClassVar[str] = "logits"  # what it reads by default: "logits", "features" or "inputs"; for lists of methods
    differentiable: bool = True
    needs_gradient: bool = False
    validate: Mapping[str, Any] | None = None
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

    def warnings(self) -> list[str]:
        """What a reader should know of this fit, such as a singular covariance."""
        return []

    def summary(self) -> dict[str, float]:
        """Fitted numbers worth a line in a report."""
        return {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.reads = "inputs" if cls.reads_inputs else "features" if cls.taps else "logits"

    # Fitting ---------------------------------------------------------------------------------------------------------

    @final
    def fit(
        self: Self,
        model: nn.Module,
        x: Tensor,
        labels: Tensor,
        batch_size: int = 250,
        validation: Validation | None = None,
    ) -> Self:
        """Fit on training inputs with their true labels; keeps the model for `score`.

        Args:
            x: float32 (N, C, H, W) in [0, 1].
            labels: int64 (N,).
            validation: for detectors that choose parameters on known and unknown inputs; never test data.
        """
        self._taps = Taps(model, self.taps)
        train = observe(model, x, labels, self._taps, batch_size) if self.needs_fit else None
        return self.fit_observations(train, model=model, validation=validation)

    @final
    def fit_observations(
        self: Self, train: Observations | None, *, model: nn.Module | None = None, validation: Validation | None = None
    ) -> Self:
        """Fit on saved logits and features; `model` and `validation` where the detector asks for them.

        Raises:
            ConfigError: the model or the validation data is missing.
            DataError: the features cannot be fitted to.
        """
        if self.needs_fit:
            if train is None:
                raise ConfigError(f"{self.name}: fitting needs observations of training data")
            self._check(train)
        if (self.needs_model or self.validate is not None) and model is None:
            raise ConfigError(f"{self.name}: fitting looks at the model: fit_observations(train, model=model)")
        if self.validate is not None and validation is None:
            raise ConfigError(
                f"{self.name}: validate = {dict(self.validate)!r} needs data to choose on: give validation=, see "
                f"detectors.validation (a suite makes it from its calibration split)"
            )
        if train is not None and self.needs_fit:
            self._fit(train, model)
        elif model is not None and self.needs_model:
            self._fit_model(model)
        if self.validate is not None and validation is not None and model is not None:
            with frozen_eval(model), devices.float32():
                self._tune(Taps(model, self.taps), validation)
        self._fitted = True
        return self

    # Scoring ---------------------------------------------------------------------------------------------------------

    @final
    def score(self, x: Tensor, batch_size: int = 250) -> Tensor:
        """Scores (N,) of inputs in [0, 1]; higher = more out-of-distribution."""
        if self._taps is None:
            raise NotFittedError(f"{self.name}: call fit(model, x, labels) before score(x)")
        return self.score_inputs(self._taps.model, x, batch_size, self._taps)

    @final
    def score_inputs(self, model: nn.Module, x: Tensor, batch_size: int = 250, reader: Taps | None = None) -> Tensor:
        """Scores (N,), float64, of inputs in [0, 1] to a model."""
        reader = reader if reader is not None else Taps(model, self.taps)
        if not self.reads_inputs:
            return self.score_observations(observe(model, x, torch.full((len(x),), -1), reader, batch_size))
        self._ready()
        check_images(x)
        with frozen_eval(model), devices.float32():
            parts = [
                self._score_inputs(reader, x[start : start + batch_size].clone()).detach().double().cpu()
                for start in range(0, len(x), batch_size)
            ]
        return self._checked(torch.cat(parts) if parts else torch.empty(0, dtype=torch.float64), len(x))

    @final
    def score_observations(self, seen: Observations) -> Tensor:
        """Scores (N,), float64, from saved logits and features."""
        if self.reads_inputs:
            raise ConfigError(
                f"{self.name}: its scores need the inputs and the model, not only what was observed of them: score(x) or "
                f"score_inputs(model, x)"
            )
        self._ready()
        self._check(seen)
        return self._checked(self._score(seen), len(seen)).double()

    def _ready(self) -> None:
        if (self.needs_fit or self.needs_model or self.validate is not None) and not self._fitted:
            raise NotFittedError(f"{self.name}: call fit(...) or fit_observations(...) before asking for scores")

    def _checked(self, scores: Tensor, n: int) -> Tensor:
        if scores.shape != (n,):
            raise DataError(f"{self.name}: scores have shape {tuple(scores.shape)}, expected ({n},)")
        return scores

    def _check(self, seen: Observations) -> None:
        for tap in self.taps:
            if tap not in seen.features:
                raise DataError(
                    f"{self.name}: features '{tap}' are missing; observe(model, x, y, taps={list(self.taps)})"
                )
            # A finite sum means finite terms, and is read faster; a sum that overflows is looked at again.
            feature = seen.features[tap]
            if not bool(torch.isfinite(feature.detach().sum())) and not bool(torch.isfinite(feature).all()):
                raise DataError(f"{self.name}: features '{tap}' hold NaN or infinity; check the model's activations")

    # What a new detector writes --------------------------------------------------------------------------------------

    def _fit(self, train: Observations, model: nn.Module | None) -> None:  # noqa: B027 - many have nothing to fit
        """Compute the state; only called where `needs_fit`. `model` is there where `needs_model`."""

    def _fit_model(self, model: nn.Module) -> None:  # noqa: B027
        """Look at the model; only called where `needs_model` and not `needs_fit`."""

    def _tune(self, reader: Taps, validation: Validation) -> None:  # noqa: B027
        """Choose parameters; only called where `validate` is given, after `_fit`, on the model in evaluation mode."""

    @abstractmethod
    def _score(self, seen: Observations) -> Tensor:
        """Scores (N,) of observations."""

    def _score_inputs(self, reader: Taps, x: Tensor) -> Tensor:
        """Scores (n,) of one batch, where `reads_inputs`; gradients are on, the model is frozen and in eval mode.

        x is where the caller has it, mostly on the CPU; `reader` takes it to the model and brings back what the model says.
        """
        raise NotImplementedError
