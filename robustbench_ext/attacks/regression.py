"""The worst input of a regressor within a budget for each column of a table.

    max over x' of |f(x') - y|   with   |x'_j - x_j| <= eps s_j  and  low_j <= x'_j <= high_j   for every column j

s_j is the column's standard deviation in training unless said otherwise, and 0 for indicators: a category is not moved by a
small step. The error is largest where the prediction is largest or smallest, so a search for the worst error is one for the
largest and one for the smallest prediction: its gradient does not vanish where the prediction is right, and a linear regressor
is attacked to its optimum also where the box cuts off one side.

`RegressionAttack.__call__` is final, like that of the attacks on classifiers: it checks, freezes the model, seeds every
sample by its id, verifies the budget at the end and counts passes. A new attack writes `_run`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, final

import numpy as np
import torch
from torch import Tensor, nn

from robustbench_ext import device as devices
from robustbench_ext.attacks.base import Passes, seeded
from robustbench_ext.data.base import Dataset
from robustbench_ext.data.columns import Columns
from robustbench_ext.errors import ConfigError, DataError, ModelError, ThreatModelError
from robustbench_ext.models.contract import ask_if_finite, finite_later, frozen_eval
from robustbench_ext.models.observe_regressor import check_predictions, check_table, predictions_of
from robustbench_ext.numbers import read_numbers
from robustbench_ext.randomness import SampleRandom

OBJECTIVES = {"error": (1, -1), "up": (1,), "down": (-1,)}  # and the directions in which the prediction is pushed
MARGIN = 0.1


@dataclass(frozen=True)
class TableBudget:
    """What an attacker may do to each column, float64 (d,) each.

    Attributes:
        scale: s_j >= 0, the unit of eps in this column; 0: the column stays as it is.
        low, high: the box. Where an input lies outside it already, the box ends at the input.
    """

    scale: np.ndarray
    low: np.ndarray
    high: np.ndarray

    def __post_init__(self) -> None:
        if not self.scale.shape == self.low.shape == self.high.shape or self.scale.ndim != 1:
            raise DataError(
                f"budget: scale {self.scale.shape}, low {self.low.shape}, high {self.high.shape}, expected (d,) each"
            )
        if not (np.isfinite(self.scale).all() and (self.scale >= 0).all() and (self.low <= self.high).all()):
            raise DataError("budget: expected finite scale >= 0 and low <= high in every column")

    @classmethod
    def of(cls, dataset: Dataset, margin: float = MARGIN) -> TableBudget:
        """Standard deviations and ranges of the train split; the range grows by `margin` of its width on both sides."""
        columns = Columns.of(dataset)
        width = margin * (columns.high - columns.low)
        return cls(np.where(columns.numeric, columns.std, 0.0), columns.low - width, columns.high + width)

    def bounds(self, x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """The least and the largest admissible value of every entry of x (N, d), float64."""
        scale, low, high = (torch.as_tensor(v, dtype=torch.float64, device=x.device) for v in vars(self).values())
        x64 = x.double()
        return (
            torch.maximum(x64 - eps * scale, torch.minimum(low, x64)),
            torch.minimum(x64 + eps * scale, torch.maximum(high, x64)),
        )


@dataclass(frozen=True)
class RegressionAttackResult:
    """What an attack did to N samples.

    Attributes:
        x_adv: float32 (N, d), within the budget; the clean input where nothing worse was found.
        prediction, clean_prediction: float64 (N,), at x_adv and at x.
        error_before, error_after: float64 (N,), absolute errors |f(x) - y| and |f(x_adv) - y|.
        forwards, backwards: int32 (N,), passes spent on each sample, the clean forward included where it was needed.
    All of it lies where the inputs were, wherever the model is.
    """

    x_adv: Tensor
    prediction: Tensor
    clean_prediction: Tensor
    error_before: Tensor
    error_after: Tensor
    forwards: Tensor
    backwards: Tensor

    def rows(self, index: Tensor) -> RegressionAttackResult:
        """The result of some of the samples."""
        return RegressionAttackResult(**{name: getattr(self, name)[index] for name in _COLUMNS})


_COLUMNS = tuple(f.name for f in fields(RegressionAttackResult))


class TableSearch:
    """The books of an attack on one batch: what is admissible, what was the worst so far, what it cost.

    Attributes:
        x, y: float32 (N, d), float64 (N,).
        lower, upper: float32 (N, d), inside the budget and round x.
        random: the samples' random stream.
        directions: of the prediction, 1 or -1, one after the other.
        best, best_prediction: the worst input so far, (N, d), and the prediction there, (N,).
        forwards, backwards: int32 (N,).
    """

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        bounds: tuple[Tensor, Tensor],
        random: SampleRandom,
        objective: str,
        clean: Tensor,
    ) -> None:
        self.x, self.y, self.random = x, y, random
        self.lower, self.upper = _inwards(bounds[0], 1), _inwards(bounds[1], -1)
        self.directions = OBJECTIVES[objective]
        self.clean = clean
        self.best, self.best_prediction = x.clone(), clean.clone()
        self.forwards = torch.zeros(len(x), dtype=torch.int32, device=x.device)
        self.backwards = torch.zeros_like(self.forwards)
        self._model, self._objective = model, objective

    def clip(self, candidates: Tensor) -> Tensor:
        """The nearest admissible inputs."""
        return torch.minimum(torch.maximum(candidates, self.lower), self.upper)

    def submit(self, candidates: Tensor) -> Tensor:
        """Predictions (N,) at admissible candidates; the worst of each sample is kept."""
        with torch.no_grad():
            predictions = predictions_of(self._model, candidates.clone())
        self.forwards += 1
        self._keep(candidates, predictions)
        return predictions

    def gradient(self, candidates: Tensor) -> Tensor:
        """The gradient (N, d) of each prediction at admissible candidates, which are submitted too."""
        at = candidates.clone().requires_grad_(True)
        with torch.enable_grad():
            predictions = check_predictions(self._model(at), len(at))
            if predictions.grad_fn is None:
                raise ModelError(
                    "the regressor's prediction has no gradient with respect to its inputs (a forest, or another model that "
                    "is no network): attack it with random-search"
                )
            (gradient,) = torch.autograd.grad(predictions.sum(), at)
        self.forwards += 1
        self.backwards += 1
        self._keep(candidates, predictions.detach())
        return gradient

    def _keep(self, candidates: Tensor, predictions: Tensor) -> None:
        worse = self._badness(predictions) > self._badness(self.best_prediction)
        self.best = torch.where(worse[:, None], candidates, self.best)
        self.best_prediction = torch.where(worse, predictions, self.best_prediction)

    def _badness(self, predictions: Tensor) -> Tensor:
        return (predictions - self.y).abs() if self._objective == "error" else predictions * self.directions[0]


def _inwards(bound: Tensor, sign: int) -> Tensor:
    """A float64 bound as the nearest float32 that does not exceed it: rounding must not leave the budget."""
    rounded = bound.float()
    outside = (rounded.double() - bound) * sign < 0
    return torch.where(outside, torch.nextafter(rounded, torch.full_like(rounded, sign * torch.inf)), rounded)


@dataclass(frozen=True, kw_only=True)
class RegressionAttack(ABC):
    """An attack on regressors with its parameters.

    Args:
        eps: budget in units of each column's scale (training standard deviations).
        objective: "error" (default): the largest |f(x') - y|. "up", "down": the largest or smallest prediction.
    """

    eps: float
    objective: str = "error"

    name: ClassVar[str]
    version: ClassVar[int] = 1  # part of every record's key: raise it when results change
    access: ClassVar[str] = "white"
    stochastic: ClassVar[bool] = True
    reference: ClassVar[str] = ""

    def __post_init__(self) -> None:
        read_numbers(self, self.name)
        if not 0 <= self.eps < float("inf"):
            raise ConfigError(f"{self.name}: eps = {self.eps}, expected a number >= 0 of training standard deviations")
        if self.objective not in OBJECTIVES:
            raise ConfigError(f"{self.name}: objective = {self.objective!r}, expected one of {', '.join(OBJECTIVES)}")

    def spec(self) -> dict[str, Any]:
        """All that a result depends on, as JSON-like values."""
        return {"attack": self.name, "version": self.version, **asdict(self)}

    @abstractmethod
    def cost(self) -> Passes:
        """Passes that every sample costs, beside the clean pass; none where eps = 0."""

    @final
    def __call__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        budget: TableBudget,
        *,
        ids: Sequence[object] | np.ndarray | None = None,
        seed: int = 0,
        clean_predictions: Tensor | None = None,
        batch_size: int = 1000,
    ) -> RegressionAttackResult:
        """Attack `model` at inputs x with targets y.

        Args:
            model: float32 (N, d) in raw units to (N,) or (N, 1). It comes back in the mode and with the gradient flags it had.
            x: float32 (N, d).
            y: (N,), in units of the target.
            budget: of the columns, `TableBudget.of(dataset)`.
            ids: one id per sample, for its random draws; the position 0..N-1 by default.
            seed: of the random draws.
            clean_predictions: (N,) at x, if they are known; saves a forward pass.
            batch_size: changes speed and memory, not draws; results only by rounding.

        Raises:
            DataError, ModelError: inputs, targets or predictions break the contract, or a gradient is missing.
            ThreatModelError: the attack left its budget.
        """
        check_table(x, len(budget.scale))
        n = len(x)
        if not n or tuple(y.shape) != (n,) or not bool(torch.isfinite(y).all()):
            raise DataError(f"targets: shape {tuple(y.shape)} for {n} inputs, expected finite (N,) with N >= 1")
        if ids is not None and len(ids) != n:
            raise DataError(f"{len(ids)} ids for {n} inputs, expected one each")
        device = devices.of(model, x.device)
        random = SampleRandom.of(seed, range(n) if ids is None else list(ids), f"regression/{self.name}", device)
        results = []
        with frozen_eval(model), seeded(seed, device), devices.float32(), finite_later():
            for start in range(0, n, batch_size):
                rows = slice(start, start + batch_size)
                part = devices.send(x[rows], device, copy=True)
                clean = None if clean_predictions is None else clean_predictions[rows].to(device)
                chosen = random.select(torch.arange(n, device=device)[rows])
                found = self._batch(model, part, y[rows].to(device).double(), budget, chosen, clean)
                results.append({c: getattr(found, c).to(x.device) for c in _COLUMNS})
        return RegressionAttackResult(**{c: torch.cat([r[c] for r in results]) for c in _COLUMNS})

    def _batch(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        budget: TableBudget,
        random: SampleRandom,
        clean: Tensor | None,
    ) -> RegressionAttackResult:
        paid = clean is None
        if clean is None:
            with torch.no_grad():
                clean = predictions_of(model, x.clone())
        clean = check_predictions(clean, len(x))
        lower, upper = budget.bounds(x, self.eps)
        search = TableSearch(model, x, y, (lower, upper), random, self.objective, clean)
        search.forwards += int(paid)
        if bool((search.lower < search.upper).any()):
            self._run(search)
        ask_if_finite()
        excess = torch.maximum(lower - search.best, search.best - upper)
        # An attack that clips in float32 by itself may be off by a rounding of the bound.
        room = torch.maximum(lower.abs(), upper.abs()) * 2.0**-23
        if not bool((excess <= room).all()):  # also catches NaN
            raise ThreatModelError(
                f"{self.name}: returned inputs leave the budget by up to {float(excess.max()):.3g}. An attack must submit "
                f"clipped candidates only: search.clip(candidates)."
            )
        return RegressionAttackResult(
            search.best,
            search.best_prediction,
            clean,
            (clean - y).abs(),
            (search.best_prediction - y).abs(),
            search.forwards,
            search.backwards,
        )

    @abstractmethod
    def _run(self, search: TableSearch) -> None:
        """Submit clipped candidates; `search` keeps the worst."""


@dataclass(frozen=True, kw_only=True)
class RegressionPGD(RegressionAttack):
    """Projected gradient ascent on the prediction, up and down, by the sign of the gradient in units of the budget.

    The step falls linearly from `step_size` to 0, so the first steps cross the box and the last ones refine.

    Args:
        steps: of each ascent, each one forward and one backward pass; one more forward pass at the end.
        restarts: the first starts at the input, the others at uniform points of the budget.
        step_size: of the first step, in units of the budget.
    """

    steps: int = 20
    restarts: int = 2
    step_size: float = 1.0

    name: ClassVar[str] = "pgd"
    reference: ClassVar[str] = "Madry et al. 2018, arXiv 1706.06083, on the prediction of a regressor"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1 or self.restarts < 1 or not self.step_size > 0:
            raise ConfigError(
                f"pgd: steps = {self.steps}, restarts = {self.restarts}, step_size = {self.step_size}; expected at least 1, 1 "
                f"and a number > 0"
            )

    def cost(self) -> Passes:
        ascents = self.restarts * len(OBJECTIVES[self.objective])
        return Passes(ascents * (self.steps + 1), ascents * self.steps)

    def _run(self, search: TableSearch) -> None:
        reach = (search.upper - search.lower) / 2
        for restart in range(self.restarts):
            start = search.x
            if restart:
                start = search.clip(search.lower + 2 * reach * search.random.uniform(search.x.shape[1:], step=restart))
            for direction in search.directions:
                candidates = start
                for step in range(self.steps):
                    size = self.step_size * (1 - step / self.steps)
                    move = direction * size * reach * search.gradient(candidates).sign()
                    candidates = search.clip(candidates + move)
                search.submit(candidates)


@dataclass(frozen=True, kw_only=True)
class RegressionRandomSearch(RegressionAttack):
    """Random search from predictions alone: for forests and whatever else has no gradient.

    Keeps an input per direction. A query moves some of its columns, each to an end of its range or to a uniform point of it,
    and is kept where the prediction goes further. The share of columns falls from all of them to one.

    Args:
        queries: forward passes for each sample, shared by the directions.
    """

    queries: int = 500

    name: ClassVar[str] = "random-search"
    access: ClassVar[str] = "score"
    reference: ClassVar[str] = (
        "random search as in Andriushchenko et al. 2020, arXiv 1912.00049, on the columns of a table"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.queries < 2:
            raise ConfigError(f"random-search: queries = {self.queries}, expected at least 2")

    def cost(self) -> Passes:
        directions = len(OBJECTIVES[self.objective])
        return Passes(self.queries // directions * directions, 0)

    def _run(self, search: TableSearch) -> None:
        each = self.queries // len(search.directions)
        for direction in search.directions:
            random = search.random.child("up" if direction > 0 else "down")
            current, reached = search.x, direction * search.clean
            for query in range(each):
                candidates = _moved(current, search, random, query, 1 - query / each)
                predictions = direction * search.submit(candidates)
                better = predictions > reached
                current = torch.where(better[:, None], candidates, current)
                reached = torch.where(better, predictions, reached)


def _moved(current: Tensor, search: TableSearch, random: SampleRandom, query: int, share: float) -> Tensor:
    """The current inputs with about `share` of the columns that may move, and at least one of them, moved."""
    free = search.lower < search.upper
    where, what, point = random.uniform((3, *current.shape[1:]), step=query).unbind(dim=1)
    priority = where.masked_fill(~free, 2.0)
    rank = priority.argsort(dim=1, stable=True).argsort(dim=1)
    chosen = free & (rank < torch.ceil(share**2 * free.sum(dim=1, keepdim=True)))
    # Half of the moves go to an end: the extremes of a monotone column are there.
    along = torch.where(what < 0.5, (what < 0.25).float(), point)
    moved = torch.where(along == 1, search.upper, search.lower + along * (search.upper - search.lower))
    return torch.where(chosen, search.clip(moved), current)
