"""Conditions of regressors: tables whose features are noisy, missing, shifted, or moved by an attack."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any, ClassVar

import numpy as np
from torch import Tensor, nn

from robustbench_ext import fingerprint
from robustbench_ext.attacks.base import Passes, build
from robustbench_ext.attacks.regression import MARGIN, RegressionAttack, TableBudget
from robustbench_ext.catalog import REGRESSION_ATTACKS, SHIFTS
from robustbench_ext.conditions import Condition, Inputs, listed_values, only, parse_conditions
from robustbench_ext.data.base import Dataset, Split, Subset
from robustbench_ext.data.columns import Columns
from robustbench_ext.errors import ConfigError, unknown_name
from robustbench_ext.numbers import format_number, parse_number
from robustbench_ext.randomness import SampleRandom

SHIFT_VERSION = 1
RESAMPLING = "covariate-shift"  # it chooses among the samples; the others change them


@dataclass(frozen=True)
class Origin:
    """The training inputs that shifts and budgets are measured in.

    Attributes:
        data: whose train split they are.
        columns: their statistics.
        key: of all that the statistics depend on.
    """

    data: Dataset
    columns: Columns
    key: str

    @classmethod
    def of(cls, data: Dataset) -> Origin:
        """Of the train split."""
        features = [[feature.name, feature.group] for feature in data.features]
        key = fingerprint.key_of({"train": data["train"].fingerprint(), "features": features})
        return cls(data, Columns.of(data), key)


@dataclass(frozen=True)
class Shifted(Condition):
    """The samples with other features than they had, or another choice among them. The targets stay theirs.

    Attributes:
        name: in the registry of shifts.
        parameters: of its function.
    """

    name: str
    parameters: dict[str, Any]
    origin: Origin = field(compare=False, repr=False)
    kind: ClassVar[str] = "shift"

    @property
    def own_samples(self) -> bool:
        return self.name == RESAMPLING

    def samples(self, data: Dataset, split: str, n: int | None, seed: int = 0) -> Split:
        given = data[split].take(n)
        if not self.own_samples:
            return given
        return Subset(given, self._shift(given.inputs(slice(None)), given.ids, seed).index)

    def spec(self) -> dict[str, Any]:
        said = {"condition": "shift", "name": self.name, "version": SHIFT_VERSION, "train": self.origin.key}
        return {**said, "parameters": self.parameters}

    def facts(self) -> dict[str, Any]:
        return {"shift": self.name, "parameters": self.parameters}

    def apply(
        self, model: nn.Module, x: Tensor, y: Tensor, ids: np.ndarray, seed: int, clean: Tensor | None, batch_size: int
    ) -> Inputs:
        return Inputs(x if self.own_samples else self._shift(x, ids, seed), {})

    def _shift(self, x: Tensor, ids: np.ndarray, seed: int) -> Any:
        random = SampleRandom.of(seed, ids, f"shift/{self.name}")
        return SHIFTS.load(self.name)(x, random=random, columns=self.origin.columns, **self.parameters)


@dataclass(frozen=True)
class UnderRegressionAttack(Condition):
    """The samples under an attack on the regressor, within a budget for each column.

    Attributes:
        limits: what the budget was told: `margin`, `columns`.
    """

    attack: RegressionAttack
    budget: TableBudget = field(compare=False, repr=False)
    limits: dict[str, Any]
    origin: Origin = field(compare=False, repr=False)
    kind: ClassVar[str] = "attack"

    def spec(self) -> dict[str, Any]:
        return {"condition": "attack", **self.attack.spec(), "budget": self.limits, "train": self.origin.key}

    def cost(self, outputs: int) -> Passes | None:
        return self.attack.cost()

    def facts(self) -> dict[str, Any]:
        spec = self.attack.spec()
        parameters = {k: v for k, v in spec.items() if k not in ("attack", "version", "eps")}
        return {
            "attack": self.attack.name,
            "norm": "Linf",
            "unit": "standard deviations of the training columns",
            "eps": self.attack.eps,
            "members": [self.attack.name],
            "minimum_norm": False,
            "parameters": {**parameters, **self.limits},
        }

    def apply(
        self, model: nn.Module, x: Tensor, y: Tensor, ids: np.ndarray, seed: int, clean: Tensor | None, batch_size: int
    ) -> Inputs:
        options = {"ids": ids, "seed": seed, "clean_predictions": clean, "batch_size": batch_size}
        result = self.attack(model, x, y, self.budget, **options)  # type: ignore[arg-type]
        passes = {"forwards": result.forwards, "backwards": result.backwards}
        return Inputs(result.x_adv.cpu(), {name: count.cpu().numpy() for name, count in passes.items()})


def parse_regression_conditions(entries: Sequence[str | Mapping[str, Any]], data: Dataset) -> list[Condition]:
    """The conditions of a suite of regressors: `clean`, or a mapping with `attack` or `shift`.

        {shift: feature-noise, size: [0.1, 0.3, 1.0], flip: 0}   numbers + N(0, (size s_j)^2), categories replaced
        {shift: missing-features, fraction: [0.1, 0.3]}          features lost and imputed
        {shift: covariate-shift, strength: [1, 3]}               samples drawn from one side of an axis (along:, keep:)
        {attack: pgd, eps: [0.1, 0.3]}                           every number within eps s_j (margin:, columns:)

    s_j is the standard deviation of column j in training. A list makes one condition for each of its values. An attack's
    `margin` widens the box of the training range by that share on both sides, `columns` names those that may move.

    Raises:
        ConfigError: an unknown name or parameter, a value out of range, or what only images have.
        DataError: a shift or an attack, and data without a train split.
    """

    @cache
    def origin() -> Origin:
        return Origin.of(data)

    elsewhere = {
        "corruption": "corruptions change images; for tables take a shift, such as {shift: feature-noise, size: 0.3}",
        "outliers": "outlier sets are images; for tables take {shift: covariate-shift, strength: 3}",
    }
    makers = {"attack": partial(_attacks, origin), "shift": partial(_shifts, origin)}
    return parse_conditions(entries, makers, elsewhere)


def _shifts(origin_of: Callable[[], Origin], name: Any, rest: Mapping[str, Any]) -> list[Condition]:
    function, what, origin = SHIFTS.load(str(name)), f"shift {name}", origin_of()
    known = [p for p in inspect.signature(function).parameters.values() if p.name not in ("x", "random", "columns")]
    listed = next(p.name for p in known if p.default is inspect.Parameter.empty)
    only(rest, [p.name for p in known], what)
    if listed not in rest:
        raise ConfigError(f"{what}: missing {listed}, for example {listed}: [0.1, 0.3]")
    options: dict[str, Any] = {}
    for p in known:
        if p.name != listed:
            value = rest.get(p.name, p.default)
            options[p.name] = str(value) if isinstance(p.default, str) else parse_number(value, f"{what}: {p.name}")
    made: list[Condition] = []
    for value in listed_values(rest[listed], f"{what}: {listed}"):
        size = parse_number(value, f"{what}: {listed}")
        condition = Shifted(f"{name} {format_number(size)}", str(name), {listed: size, **options}, origin)
        some = origin.data["train"].take(2)
        condition._shift(some.inputs(slice(None)), some.ids, 0)  # a value out of range is an error now
        made.append(condition)
    return made


def _attacks(origin_of: Callable[[], Origin], name: Any, rest: Mapping[str, Any]) -> list[Condition]:
    cls, origin, rest = REGRESSION_ATTACKS.load(str(name)), origin_of(), dict(rest)
    margin = parse_number(rest.pop("margin", MARGIN), f"{name}: margin")
    budget = TableBudget.of(origin.data, margin)
    limits: dict[str, Any] = {"margin": margin}
    if "columns" in rest:
        limits["columns"] = chosen = [str(c) for c in listed_values(rest.pop("columns"), f"{name}: columns")]
        names = origin.columns.names
        for column in chosen:
            if column not in names:
                raise ConfigError(f"{name}: columns: {unknown_name('column', column, names)}")
        budget = replace(budget, scale=np.where([column in chosen for column in names], budget.scale, 0.0))
    made: list[Condition] = []
    if "eps" not in rest:
        raise ConfigError(f"{name}: missing eps, for example eps: [0.1, 0.3] of each column's standard deviation")
    for eps in listed_values(rest.pop("eps"), f"{name}: eps"):
        attack = build(cls, str(name), {**rest, "eps": eps})
        made.append(
            UnderRegressionAttack(
                f"{REGRESSION_ATTACKS.label(str(name))} {format_number(attack.eps)}", attack, budget, limits, origin
            )
        )
    return made
