"""Tables and numbers: what the engine does with regressors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from robustbench_ext.attacks.base import build
from robustbench_ext.catalog import DEFENSES, REGRESSION_DEFENSES
from robustbench_ext.checks import Check
from robustbench_ext.conditions import Condition
from robustbench_ext.data.base import Split
from robustbench_ext.errors import ConfigError, RobustBenchExtError
from robustbench_ext.models import LoadedModel
from robustbench_ext.models.objective import LeastSquares, Objective
from robustbench_ext.models.observe import PENULTIMATE
from robustbench_ext.models.observe_regressor import observe_regressor
from robustbench_ext.models.predictor import SKLEARN, Predictor
from robustbench_ext.models.tabular import (
    RegressorRecipe,
    adopt_regressor,
    load_regressor,
    regressor_key,
    train_regressor,
)
from robustbench_ext.probes import IntervalProbe, Probe
from robustbench_ext.regression_conditions import UnderRegressionAttack, parse_regression_conditions
from robustbench_ext.regression_preflight import (
    REGRESSION_PREFLIGHT_VERSION,
    SAMPLES,
    has_gradient,
    preflight_regressor,
)
from robustbench_ext.suite import ModelEntry
from robustbench_ext.task import Columns, Task, Training
from uq.regression import Samples

if TYPE_CHECKING:
    from robustbench_ext.evaluate import Context

NETWORK = "mlp"
FEATURES = "features/"


@dataclass(frozen=True)
class _Reader:
    model: nn.Module
    taps: tuple[str, ...]


class Regression(Task):
    """Records hold `label` (the target), `prediction`, both float64 (n,), `input` float32 (n, d) and `features/NAME`."""

    estimator: ClassVar[type[IntervalProbe]] = IntervalProbe
    preflight_version: ClassVar[str] = f"regression-{REGRESSION_PREFLIGHT_VERSION}"
    preflight_n: ClassVar[int] = SAMPLES

    # Before anything runs --------------------------------------------------------------------------------------------

    def conditions(self, entries: Sequence[str | Mapping[str, Any]]) -> list[Condition]:
        return parse_regression_conditions(entries, self.data)

    def refuse(self, context: Context) -> None:
        if context.suite.relative or context.suite.shots is not None:
            raise ConfigError(
                f"relative and shots are about classes, and {self.data.name} is a regression task; leave them out"
            )
        for probe in context.probes:
            if probe.kind == "detector":
                raise ConfigError(
                    f"detector '{probe.label}': detectors score the outputs of classifiers, and {self.data.name} is a "
                    f"regression task. Leave detectors out; the epistemic part of an estimator under `uq` says what is "
                    f"unfamiliar."
                )
        for entry in context.suite.models:
            self._refuse_normalisation(entry)
        for name in context.evaluated:
            module = self._module(context, name)
            if module is None:
                continue  # it cannot be loaded: the run says so, and goes on with the other models
            for probe in context.probes_of(name):
                if missing := _missing(probe, module):
                    raise ConfigError(
                        f"estimator '{probe.label}' {missing}, which model '{name}' has not. {_elsewhere(context, name)}"
                    )
            for condition in context.conditions_of(name).values():
                white = isinstance(condition, UnderRegressionAttack) and condition.attack.access == "white"
                if white and not has_gradient(module, self._few()):
                    raise ConfigError(
                        f"condition '{condition.label}' follows the gradient of the prediction, which model '{name}' has not. "
                        f"Attack it with random-search. {_elsewhere(context, name)}"
                    )

    def _module(self, context: Context, name: str) -> nn.Module | None:
        """The model, with fresh weights where it is still to be trained; None where there is none to be had."""
        if name in context.training and not context.training[name].is_done:
            return context.training[name].fresh()
        try:
            return context.model(name).module
        except RobustBenchExtError:
            return None

    def _few(self) -> Tensor:
        return self.data["test"].take(2).inputs(slice(None))

    # Models ----------------------------------------------------------------------------------------------------------

    def training(self, entry: ModelEntry, models: Path, others: Mapping[str, Training]) -> Training:
        told, what = entry.train, f"model '{entry.name}'"
        if told is None or told.start is not None:
            raise ConfigError(f"{what}: start and make are for classifiers; regressors are trained from fresh weights")
        if told.data is not None:
            raise ConfigError(f"{what}: train: data: only classifiers can be trained on other data than the suite's")
        if told.keep:
            raise ConfigError(f"{what}: keep: only classifiers' trainings keep weights of their epochs; leave it out")
        objective = self._objective(told, what)
        network = told.network or NETWORK
        if network.startswith(SKLEARN) and not isinstance(objective, LeastSquares):
            raise ConfigError(f"{what}: {network} is fitted as it is; defense '{objective.name}' is for networks")
        if isinstance(told.recipe, str) or "name" in told.recipe:
            raise ConfigError(
                f"{what}: named recipes are for classifiers; give options, such as recipe: {{epochs: 200}}"
            )
        if network.startswith(SKLEARN) and told.recipe:
            raise ConfigError(f"{what}: a recipe is for networks; give the parameters of {network} as kwargs")
        recipe: RegressorRecipe = build(RegressorRecipe, f"{what}: recipe", told.recipe)
        folder = models / regressor_key(network, self.data, recipe, told.kwargs, told.seed, objective)

        def run(on_epoch: Callable[[dict[str, Any]], None]) -> None:
            options = {"seed": told.seed, "recipe": recipe, "kwargs": told.kwargs, "on_epoch": on_epoch}
            train_regressor(network, self.data, folder, objective=objective, **options)  # type: ignore[arg-type]

        def fresh() -> nn.Module:
            return load_regressor(network, self.data, kwargs=told.kwargs, seed=told.seed).module

        return Training(network, folder, 0 if network.startswith(SKLEARN) else recipe.epochs, fresh, run)

    def _objective(self, told: Any, what: str) -> Objective:
        name = told.defense_name() or "standard"
        if name in DEFENSES and name not in REGRESSION_DEFENSES:
            raise ConfigError(
                f"{what}: defense '{name}' trains classifiers; of regressors there are "
                f"{', '.join(REGRESSION_DEFENSES.names())}. Leave it out: regressors are trained by least squares."
            )
        try:
            objective: Objective = build(REGRESSION_DEFENSES.load(name), name, told.defense_options())
        except ConfigError as error:
            raise ConfigError(f"{what}: {error}") from None
        return objective

    def load(self, entry: ModelEntry) -> LoadedModel:
        return load_regressor(str(entry.spec), self.data, kwargs=entry.kwargs, weights=entry.weights)

    def adopt(self, module: nn.Module, entry: ModelEntry) -> LoadedModel:
        return adopt_regressor(module, self.data, str(entry.spec))

    def load_other(self, spec: str) -> LoadedModel:
        return load_regressor(spec, self.data)

    def _refuse_normalisation(self, entry: ModelEntry) -> None:
        if entry.mean is not None or entry.std is not None:
            raise ConfigError(
                f"model '{entry.name}': mean and std normalise images. A regressor takes raw columns and scales them inside."
            )

    def preflight_samples(self) -> list[str]:
        return [split.fingerprint() for split in self.data.splits.values()]

    def preflight(self, model: nn.Module, seed: int, n: int) -> list[Check]:
        return preflight_regressor(model, self.data, n)

    # Cells -----------------------------------------------------------------------------------------------------------

    def targets(self, samples: Split, rows: slice) -> np.ndarray:
        return samples.labels[rows]

    def inputs(self, samples: Split, rows: slice) -> Tensor:
        return samples.inputs(rows)

    def clean_outputs(self, columns: Sequence[Columns]) -> Tensor:
        return torch.cat([torch.from_numpy(c["prediction"]) for c in columns])

    def reader(self, model: nn.Module, taps: Sequence[str]) -> _Reader:
        return _Reader(model, tuple(taps))

    def observe(self, reader: _Reader, x: Tensor, targets: np.ndarray, batch_size: int) -> Columns:
        seen = observe_regressor(reader.model, x, reader.taps, batch_size)
        columns = {"label": targets, "prediction": seen.predictions.numpy(), "input": x.numpy()}
        return columns | {f"{FEATURES}{name}": value.numpy() for name, value in seen.features.items()}

    def seen(self, columns: Sequence[Columns]) -> Samples:
        def joined(name: str) -> np.ndarray:
            return np.concatenate([c[name] for c in columns])

        taps = [name for name in columns[0] if name.startswith(FEATURES)]
        features = {name.removeprefix(FEATURES): joined(name).astype(np.float64) for name in taps}
        return Samples(
            joined("input").astype(np.float64), joined("prediction"), joined("label"), features, joined("id")
        )

    def progress(self, columns: Columns) -> dict[str, Any]:
        return {"rmse": float(np.sqrt(np.mean((columns["prediction"] - columns["label"]) ** 2)))}


def _missing(probe: Probe, module: nn.Module) -> str:
    """What a probe needs of a model and does not find; empty where it finds all."""
    if isinstance(module, Predictor):
        needed = probe.taps() or (probe.reads_inputs and not probe.members)  # an ensemble takes any regressors
        return "needs a network" if needed else ""
    modules = dict(module.named_modules())
    for tap in probe.taps():
        there = any(isinstance(m, nn.Linear) for m in modules.values()) if tap == PENULTIMATE else tap in modules
        if not there:
            return f"reads the features '{tap}'"
    return ""


def _elsewhere(context: Context, name: str) -> str:
    others = [other for other in context.evaluated if other != name]
    return f"To keep it for other models, name them: only: [{', '.join(others)}]." if others else "Leave it out."
