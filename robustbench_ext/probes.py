"""Probes: what is read off the model per sample, beside its logits. Detectors give scores, estimators better logits.

A probe is fitted on `train` (detectors) or `calibration` (estimators), never on `test`, and then read under every
condition. Most depend on observations alone and cost no pass through the model. A detector that reads inputs (a gradient,
a second pass on changed inputs) is computed in the cell where the inputs are made; one that chooses its parameters on known
and unknown inputs gets them from the calibration split (`robustbench_ext.validation`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robustbench_ext.attacks.adaptive import Scorer
from robustbench_ext.attacks.base import build
from robustbench_ext.catalog import DETECTORS, ESTIMATORS
from robustbench_ext.errors import ConfigError
from robustbench_ext.models.observe import Observations

CLASSIFIER = "classifier"
Columns = dict[str, np.ndarray]


class _Score:
    """A fitted detector's score, or minus a fitted estimator's log-confidence."""

    def __init__(self, fitted: Any) -> None:
        self.taps: tuple[str, ...] = fitted.taps
        self._fitted = fitted

    def __call__(self, seen: Observations) -> Tensor:
        if hasattr(self._fitted, "score_observations"):
            score: Tensor = self._fitted.score_observations(seen)
            return score
        return -torch.log_softmax(self._fitted.calibrate(seen), dim=1).amax(dim=1)


def scorer(fitted: Any) -> Scorer:
    """What an adaptive attack brings down: a fitted detector's score (evasion), an estimator's lack of confidence.

    Raises:
        ConfigError: the detector's score has no gradient to follow.
    """
    if not getattr(fitted, "differentiable", True):
        raise ConfigError(no_gradient(fitted.name))
    return _Score(fitted)


def no_gradient(name: str) -> str:
    """Why a detector cannot be attacked by gradient, and what to do instead."""
    return (
        f"adaptive: '{name}' has no gradient with respect to its inputs (it changes them by steps or rounding, or its code "
        f"switches gradients off), so it cannot be attacked this way. Attack a detector that has one, such as energy or "
        f"mahalanobis without eps: inputs that evade it often evade this one too, and all probes are read under it."
    )


@dataclass(frozen=True)
class Probe:
    """A detector or an estimator with a label.

    Attributes:
        kind: "detector" (column `score`) or "estimator" (column `logits`).
        fit_on: the split whose observations it is fitted on.
        method: an unfitted `detectors.Detector` or `uq.Estimator`; use `fresh()` to get one to fit.
    """

    label: str
    kind: str
    fit_on: str
    name: str
    parameters: tuple[tuple[str, Any], ...]

    def fresh(self) -> Any:
        """A new, unfitted detector or estimator."""
        registry = DETECTORS if self.kind == "detector" else ESTIMATORS
        family, _, variant = self.name.partition(":")
        parameters = {"detector": variant} if variant else {}
        return build(registry.load(family), self.name, {**parameters, **dict(self.parameters)})

    def spec(self) -> dict[str, Any]:
        """All that its outputs depend on, besides the observations."""
        spec: dict[str, Any] = self.fresh().spec()
        return spec

    def taps(self) -> tuple[str, ...]:
        """Features that it reads."""
        taps: tuple[str, ...] = self.fresh().taps
        return taps

    @property
    def reads_inputs(self) -> bool:
        """Whether its outputs need the inputs and the model, beside what was observed."""
        return bool(getattr(self.fresh(), "reads_inputs", False))

    @property
    def validate(self) -> Mapping[str, Any] | None:
        """The condition whose inputs it chooses its parameters on, as in a suite; None for most."""
        validate: Mapping[str, Any] | None = getattr(self.fresh(), "validate", None)
        return validate

    def fit(self, seen: Observations, model: nn.Module | None = None, validation: Any = None) -> Any:
        """A fitted detector or estimator; `model` and `validation` (`detectors.Validation`) where it asks for them."""
        if self.kind == "detector":
            return self.fresh().fit_observations(seen, model=model, validation=validation)
        return self.fresh().fit_observations(seen)

    def read(self, fitted: Any, seen: Observations, model: nn.Module | None = None, x: Tensor | None = None) -> Columns:
        """The probe's columns, one row per sample; the model and its inputs where `reads_inputs`."""
        if self.kind == "detector":
            if fitted.reads_inputs:
                return {"score": fitted.score_inputs(model, x).numpy()}
            return {"score": fitted.score_observations(seen).numpy()}
        return {"logits": fitted.calibrate(seen).numpy()}


def parse_probes(detectors: Sequence[Any], estimators: Sequence[Any]) -> list[Probe]:
    """The probes of a suite. An entry is a name, or a mapping {name: ..., label: ..., parameters...}."""
    probes: list[Probe] = []
    for kind, split, registry, entries in (
        ("detector", "train", DETECTORS, detectors),
        ("estimator", "calibration", ESTIMATORS, estimators),
    ):
        for entry in entries:
            options = {"name": entry} if isinstance(entry, str) else dict(entry) if isinstance(entry, Mapping) else {}
            if "name" not in options:
                raise ConfigError(
                    f"{kind} {entry!r}: expected a name, or a mapping such as {{name: energy, temperature: 2}}"
                )
            name = str(options.pop("name"))
            label = str(options.pop("label", name))
            registry.get(name.partition(":")[0])
            probe = Probe(label, kind, split, name, tuple(sorted(options.items())))
            probe.fresh()  # unknown parameters are an error now, not after an hour of attacks
            if label == CLASSIFIER or any(p.label == label for p in probes):
                raise ConfigError(f"{kind} '{label}' is listed twice; give one of them a label: of its own")
            probes.append(probe)
    return probes
