"""Probes: what is read off the model per sample, beside its logits. Detectors give scores, estimators better logits.

A probe is fitted on `train` (detectors) or `calibration` (estimators), never on `test`, and then read under every
condition. It depends on observations alone, so it costs no pass through the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robustbench_ext.attacks.adaptive import Scorer
from robustbench_ext.attacks.base import build
from robustbench_ext.catalog import DETECTORS, ESTIMATORS
from robustbench_ext.errors import ConfigError
from robustbench_ext.models.observe import Observations

CLASSIFIER = "classifier"


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
    """What an adaptive attack brings down: a fitted detector's score (evasion), an estimator's lack of confidence."""
    return _Score(fitted)


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
        return build(registry.load(self.name), self.name, dict(self.parameters))

    def spec(self) -> dict[str, Any]:
        """All that its outputs depend on, besides the observations."""
        spec: dict[str, Any] = self.fresh().spec()
        return spec

    def taps(self) -> tuple[str, ...]:
        """Features that it reads."""
        taps: tuple[str, ...] = self.fresh().taps
        return taps

    def fit(self, seen: Observations) -> Any:
        """A fitted detector or estimator."""
        return self.fresh().fit_observations(seen)

    def read(self, fitted: Any, seen: Observations) -> dict[str, np.ndarray]:
        """The probe's columns, one row per sample."""
        if self.kind == "detector":
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
            registry.get(name)
            probe = Probe(label, kind, split, name, tuple(sorted(options.items())))
            probe.fresh()  # unknown parameters are an error now, not after an hour of attacks
            if label == CLASSIFIER or any(p.label == label for p in probes):
                raise ConfigError(f"{kind} '{label}' is listed twice; give one of them a label: of its own")
            probes.append(probe)
    return probes
