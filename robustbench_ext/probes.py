"""Probes: what is read off the model per sample, beside its outputs. Detectors give scores, estimators of a classifier better
logits, uncertainties and prediction sets, estimators of a regressor intervals and quantiles.

A probe is fitted on the splits that it names - detectors on `train`, estimators mostly on `calibration`, never on `test` -
and then read under every condition. Most depend on observations alone and cost no pass through the model. One that reads
inputs (a gradient, passes with dropout, other networks) is computed in the cell where the inputs are made; one that chooses
its parameters on known and unknown inputs gets them from the calibration split (`robustbench_ext.validation`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from torch import Tensor, nn

from robustbench_ext.attacks.adaptive import Scorer
from robustbench_ext.attacks.base import build
from robustbench_ext.catalog import DETECTORS, ESTIMATORS, REGRESSION_ESTIMATORS
from robustbench_ext.errors import ConfigError
from robustbench_ext.models.observe import Observations
from robustbench_ext.registry import Registry

CLASSIFIER = "classifier"
ORACLE = "oracle"
RESERVED = (CLASSIFIER, "regressor", ORACLE)  # what the model itself says, and the truth where the data knows it
Columns = dict[str, np.ndarray]


class _Score:
    """A fitted detector's score, or minus a fitted estimator's log-confidence."""

    def __init__(self, fitted: Any) -> None:
        self.taps: tuple[str, ...] = fitted.taps
        self._fitted = fitted

    def __call__(self, seen: Observations) -> Tensor:
        # What was fitted lies on the CPU; wherever the model is, its outputs are taken there, and the score back.
        features = {name: feature.cpu() for name, feature in seen.features.items()}
        here = Observations(seen.logits.cpu(), seen.labels.cpu(), features)
        if hasattr(self._fitted, "score_observations"):
            score: Tensor = self._fitted.score_observations(here)
        else:
            logits: Tensor = self._fitted.calibrate(here)
            score = -logits.log_softmax(dim=1).amax(dim=1)
        return score.to(seen.logits.device)


def scorer(fitted: Any) -> Scorer:
    """What an adaptive attack brings down: a fitted detector's score (evasion), an estimator's lack of confidence.

    Raises:
        ConfigError: there is no gradient to follow.
    """
    if not has_gradient(fitted):
        raise ConfigError(no_gradient(fitted.name))
    return _Score(fitted)


def has_gradient(method: Any) -> bool:
    """Whether an adaptive attack can follow it: a differentiable function of what one pass of the model gives."""
    # A detector that reads inputs says itself that it is not differentiable; an estimator's `calibrate` sees no inputs.
    by_inputs = getattr(method, "reads_inputs", False) and not hasattr(method, "score_observations")
    return bool(getattr(method, "differentiable", True)) and not by_inputs


def no_gradient(name: str) -> str:
    """Why a probe cannot be attacked by gradient, and what to do instead."""
    return (
        f"adaptive: '{name}' has no gradient with respect to its inputs that one pass of the model gives (it changes them by "
        f"steps or rounding, makes passes of its own, or its code switches gradients off), so it cannot be attacked this way. "
        f"Attack a probe that has one, such as energy, mahalanobis without eps, or temperature: inputs that evade it often "
        f"evade this one too, and all probes are read under it."
    )


@dataclass(frozen=True)
class Shown:
    """What a cell shows to its model, for probes that read more than observations.

    Attributes:
        model: the model itself.
        inputs: gives the inputs, float32 (n, ...), as the condition made them. They may have to be made again, so only probes
            that read them ask.
        ids, seed: what random draws depend on.
    """

    model: nn.Module
    inputs: Callable[[], Tensor]
    ids: np.ndarray
    seed: int = 0
    batch_size: int = 250


@dataclass(frozen=True)
class Fitting:
    """What a probe is fitted with; most look at a part of it.

    Attributes:
        seen: the observations of each split in `fit_on`: `models.Observations`, or `uq.Samples` of a regressor.
        model: the model itself.
        seed: what random draws depend on.
        inputs: gives the inputs of a split and their ids.
        members: the loaded `members`, in their order.
        validation: `detectors.Validation` where the method asks for it.
        checkpoints: the model after epochs of its training, in their order, where the method asks for them.
    """

    seen: Mapping[str, Any]
    model: nn.Module
    seed: int
    inputs: Callable[[str], tuple[Tensor, np.ndarray]]
    members: Sequence[nn.Module] = ()
    validation: Any = None
    checkpoints: Sequence[nn.Module] = ()


@dataclass(frozen=True)
class Probe:
    """A detector or an estimator with a label.

    Attributes:
        kind: "detector" or "estimator".
        name, parameters: of the method in its registry.
        only: the models that it is read off; all of them where it is empty.
    """

    label: str
    name: str
    parameters: tuple[tuple[str, Any], ...] = ()
    only: tuple[str, ...] = ()
    kind: ClassVar[str]
    registry: ClassVar[Registry]

    def fresh(self) -> Any:
        """A new, unfitted detector or estimator."""
        family, variant = self.registry.split(self.name)
        parameters = {"detector": variant} if variant else {}
        return build(self.registry.load(family), self.name, {**parameters, **dict(self.parameters)})

    @cached_property
    def _unfitted(self) -> Any:
        """One that is never fitted, to ask what it needs: keys ask for every cell."""
        return self.fresh()

    def spec(self) -> dict[str, Any]:
        """All that its outputs depend on, besides the observations."""
        spec: dict[str, Any] = self._unfitted.spec()
        return spec

    def taps(self) -> tuple[str, ...]:
        """Features that it reads."""
        taps: tuple[str, ...] = self._unfitted.taps
        return taps

    @property
    def fit_on(self) -> tuple[str, ...]:
        """The splits whose observations it is fitted on."""
        raise NotImplementedError

    @property
    def reads_inputs(self) -> bool:
        """Whether its outputs need the inputs and the model, beside what was observed."""
        return bool(getattr(self._unfitted, "reads_inputs", False))

    @property
    def needs_gradient(self) -> bool:
        """Whether it follows a gradient of the model."""
        return bool(getattr(self._unfitted, "needs_gradient", False))

    @property
    def validate(self) -> Mapping[str, Any] | None:
        """The condition whose inputs it chooses its parameters on, as in a suite; None for most."""
        validate: Mapping[str, Any] | None = getattr(self._unfitted, "validate", None)
        return validate

    @property
    def members(self) -> tuple[str, ...]:
        """Other models that it needs: names of the suite's models, or model specifications."""
        return tuple(map(str, getattr(self._unfitted, "members", ())))

    @property
    def checkpoints(self) -> str | tuple[int, ...]:
        """The epochs of the model's own training whose weights it looks at: "all" that are kept, or these; none for most."""
        epochs: str | tuple[int, ...] = getattr(self._unfitted, "checkpoints_after", ())
        return epochs

    @property
    def forwards(self) -> int:
        """Forward passes per sample that an estimator makes of its own; 0 where it makes none, or does not say."""
        if self.kind == "detector" or not self.reads_inputs:
            return 0
        return int(getattr(self._unfitted, "passes", 0)) or len(self.members)

    def beside(self, model: str) -> Probe:
        """The probe as it is read off a model: one that is among its own members counts once, as itself."""
        if model not in self.members:
            return self
        others = [member for member in self.members if member != model]
        if not others:
            raise ConfigError(
                f"{self.kind} '{self.label}': '{model}' is its only member, and the model that it is read off"
            )
        return replace(self, parameters=tuple(sorted({**dict(self.parameters), "members": others}.items())))

    def fit(self, fitting: Fitting) -> Any:
        """A fitted method."""
        method = self.fresh()
        if fitting.members:
            method = method.with_members(list(fitting.members))
        if self.checkpoints:
            method = method.with_checkpoints(list(fitting.checkpoints))
        return self._fit(method, fitting)

    def _fit(self, method: Any, fitting: Fitting) -> Any:
        raise NotImplementedError

    def read(self, fitted: Any, seen: Any, shown: Shown) -> Columns:
        """The probe's columns, one row per sample."""
        raise NotImplementedError


@dataclass(frozen=True)
class DetectorProbe(Probe):
    """Column `score`."""

    kind: ClassVar[str] = "detector"
    registry: ClassVar[Registry] = DETECTORS

    @property
    def fit_on(self) -> tuple[str, ...]:
        return ("train",) if self._unfitted.needs_fit else ()

    def _fit(self, method: Any, fitting: Fitting) -> Any:
        return method.fit_observations(fitting.seen.get("train"), model=fitting.model, validation=fitting.validation)

    def read(self, fitted: Any, seen: Any, shown: Shown) -> Columns:
        if fitted.reads_inputs:
            return {"score": fitted.score_inputs(shown.model, shown.inputs(), shown.batch_size).numpy()}
        return {"score": fitted.score_observations(seen).numpy()}


@dataclass(frozen=True)
class EstimatorProbe(Probe):
    """Column `logits`; `aleatoric`, `epistemic` and `sets` where the estimator has them."""

    kind: ClassVar[str] = "estimator"
    registry: ClassVar[Registry] = ESTIMATORS

    @property
    def fit_on(self) -> tuple[str, ...]:
        return (str(self._unfitted.fit_on),)

    def _fit(self, method: Any, fitting: Fitting) -> Any:
        if getattr(method, "fits_inputs", False):
            x, ids = fitting.inputs(method.fit_on)
            method = method.with_inputs(x, ids, fitting.seed)
        return method.fit_observations(fitting.seen[method.fit_on], model=fitting.model)

    def read(self, fitted: Any, seen: Any, shown: Shown) -> Columns:
        if fitted.reads_inputs:
            given = {"ids": shown.ids, "seed": shown.seed, "batch_size": shown.batch_size}
            reading = fitted.read_inputs(shown.model, shown.inputs(), seen=seen, **given)
        else:
            reading = fitted.read(seen)
        return _present(reading, ("logits", "aleatoric", "epistemic", "sets"))


@dataclass(frozen=True)
class IntervalProbe(Probe):
    """An estimator of a regressor: columns `point`, `low`, `high`; `quantiles`, `crossed`, `aleatoric` and `epistemic` where
    the estimator has them. It never needs more than the records: a regressor's inputs are among their columns.
    """

    kind: ClassVar[str] = "estimator"
    registry: ClassVar[Registry] = REGRESSION_ESTIMATORS

    @property
    def fit_on(self) -> tuple[str, ...]:
        return ("train", "calibration")

    def _fit(self, method: Any, fitting: Fitting) -> Any:
        train, calibration = fitting.seen["train"], fitting.seen["calibration"]
        return method.fit(train, calibration, model=fitting.model, seed=fitting.seed)

    @property
    def reads_inputs(self) -> bool:
        return bool(self.fresh().needs_model)

    def read(self, fitted: Any, seen: Any, shown: Shown) -> Columns:
        names = ("point", "low", "high", "quantiles", "crossed", "aleatoric", "epistemic")
        return _present(fitted.predict(seen, model=shown.model, seed=shown.seed), names)


def _present(found: Any, names: Sequence[str]) -> Columns:
    """Those attributes of a reading that are there, as arrays."""
    values = {name: getattr(found, name) for name in names}
    return {name: np.asarray(value) for name, value in values.items() if value is not None}


def parse_probes(
    detectors: Sequence[Any], estimators: Sequence[Any], estimator: type[Probe] = EstimatorProbe
) -> list[Probe]:
    """The probes of a suite. An entry is a name, or a mapping {name: ..., label: ..., only: [MODEL, ...], parameters...}.

    Args:
        estimator: `EstimatorProbe`, or `IntervalProbe` for a suite of regressors.
    """
    probes: list[Probe] = []
    kinds: tuple[tuple[type[Probe], Sequence[Any]], ...] = ((DetectorProbe, detectors), (estimator, estimators))
    for kind, entries in kinds:
        for entry in entries:
            options = {"name": entry} if isinstance(entry, str) else dict(entry) if isinstance(entry, Mapping) else {}
            if "name" not in options:
                raise ConfigError(
                    f"{kind.kind} {entry!r}: expected a name, or a mapping such as {{name: energy, temperature: 2}}"
                )
            name = str(options.pop("name"))
            label = str(options.pop("label", None) or kind.registry.label(name))
            only = options.pop("only", ())
            only = (only,) if isinstance(only, str) else tuple(map(str, only))
            _refuse_other_task(kind, name)
            kind.registry.get(kind.registry.split(name)[0])
            probe = kind(label, name, tuple(sorted(options.items())), only)
            probe.fresh()  # unknown parameters are an error now, not after an hour of attacks
            if label in RESERVED or " · " in label:
                raise ConfigError(
                    f"{kind.kind} '{label}': results call the models' own outputs {' and '.join(RESERVED)}, and an estimator's "
                    f"uncertainties 'LABEL · epistemic'. Give it another label."
                )
            if any(p.label == label for p in probes):
                raise ConfigError(f"{kind.kind} '{label}' is listed twice; give one of them a label: of its own")
            probes.append(probe)
    return probes


def _refuse_other_task(kind: type[Probe], name: str) -> None:
    """A name that only the other task knows deserves a better answer than the nearest known one."""
    others: tuple[tuple[type[Probe], type[Probe], str], ...] = (
        (EstimatorProbe, IntervalProbe, "regressors, and this suite's data is a classification task"),
        (IntervalProbe, EstimatorProbe, "classifiers, and this suite's data is a regression task"),
    )
    for mine, other, why in others:
        if kind is mine and name not in mine.registry and name in other.registry:
            raise ConfigError(f"uq '{name}' is for {why}. Here there are: {', '.join(mine.registry.names())}.")
