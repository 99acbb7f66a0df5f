"""APGD: projected gradient ascent that sets its own step size (Croce and Hein, ICML 2020, arXiv 2003.01690)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robustbench_ext.attacks.base import Passes, Targeted
from robustbench_ext.attacks.losses import Loss, dlr_targeted, rivals
from robustbench_ext.attacks.search import Search
from robustbench_ext.attacks.threat import flat_norm, per_sample
from robustbench_ext.errors import ConfigError

_MOMENTUM = 0.75  # alpha of the paper's update


def checkpoints(steps: int) -> list[int]:
    """The iterations at which the step size is reviewed: periods shrink from 22 % to 6 % of the steps by 3 %.

    In whole iterations, as the published attack counts them.

    >>> checkpoints(100)[:5]
    [22, 41, 57, 70, 80]
    """
    period, shrink, least = max(int(0.22 * steps), 1), max(int(0.03 * steps), 1), max(int(0.06 * steps), 1)
    marks, at = [], 0
    while at + period <= steps:
        at += period
        marks.append(at)
        period = max(period - shrink, least)
    return marks


@dataclass(frozen=True, kw_only=True)
class APGD(Targeted):
    """Adaptive PGD; see `APGDCE`, `APGDDLR`, `APGDT`.

    Args:
        steps: iterations of one run (100 in the standard ensemble).
        restarts: runs from different random points of the sphere.
        rho: a step size is halved when at most this share of a period's iterations raised the loss.
    Cost: steps + 1 forward and `steps` backward passes a run, for a sample that is not broken, beside the clean
    pass that is shared; with stop="never" one backward pass more.
    """

    steps: int = 100
    restarts: int = 1
    rho: float = 0.75

    stochastic: ClassVar[bool] = True
    reference: ClassVar[str] = "arXiv 2003.01690"
    loss: ClassVar[str]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1 or self.restarts < 1:
            raise ConfigError(
                f"{self.name}: steps = {self.steps}, restarts = {self.restarts}; expected at least 1 of each"
            )
        if not 0 < self.rho < 1:
            raise ConfigError(f"{self.name}: rho = {self.rho}, expected a number between 0 and 1")

    def cost(self, num_classes: int) -> Passes:
        runs = self.restarts * self._runs(num_classes)
        backwards = runs * (self.steps if self.stop == "broken" else self.steps + 1)
        looks = 1 if self.draws == 1 and self.precision == "float32" else 2  # such apparent breaks are looked at again
        return Passes(looks * self.draws * runs * (self.steps + 1), self.draws * backwards)

    def _runs(self, num_classes: int) -> int:
        """Runs of one restart."""
        return 1

    def _run(self, search: Search) -> None:
        for restart in range(self.restarts):
            search.restart()
            if search.done:
                return
            self._climb(search, restart)

    def _start(self, search: Search, run: int) -> Tensor:
        """A random point on the sphere of radius eps: the largest coordinate (Linf) or the length (L2) is eps."""
        shape = search.x.shape[1:]
        if self.norm == "Linf":
            direction = search.random.uniform(shape, -1.0, 1.0, step=run)
        else:
            direction = search.random.normal(shape, step=run)
        length = flat_norm(direction, self.norm).clamp_min(1e-12)
        return search.threat.project(search.x + self.eps * direction / per_sample(length, direction), search.x)

    def _objective(self, search: Search, target: Tensor | None) -> Loss:
        return search.objective(self.loss)

    def _climb(self, search: Search, run: int, target: Tensor | None = None) -> None:
        """One run. `target` holds a class per sample of the whole batch, for targeted losses."""
        threat = search.threat
        x = self._start(search, run)
        logits, value, gradient = search.gradient(x, self._objective(search, target))
        x, value, gradient = search.submit(x, logits, x, value, gradient)
        previous = x
        # The best point of this run, per standing sample, with its loss and gradient: where a run goes back to.
        best_x, best_value, best_gradient = x, value, gradient
        size = torch.full_like(value, 2.0 * self.eps)
        # Of the current period: iterations that raised the loss; the best loss and "was halved" at its beginning.
        rises = torch.zeros_like(value)
        best_then, halved_then = best_value, torch.ones_like(value, dtype=torch.bool)
        marks = set(checkpoints(self.steps))
        period_start, late = 0, int(0.9 * self.steps)
        for iteration in range(self.steps):
            if search.done:
                return
            momentum = _MOMENTUM if iteration > 0 else 1.0
            ahead = threat.project(torch.addcmul(x, per_sample(size, x), threat.steepest(gradient)), search.x)
            if iteration > 0:
                ahead = threat.project(x + momentum * (ahead - x) + (1.0 - momentum) * (x - previous), search.x)
            previous, x = x, ahead
            if iteration == self.steps - 1 and self.stop == "broken":
                search.submit(x, search.logits(x))  # the last gradient would serve nobody
                return
            last_value = value
            logits, value, gradient = search.gradient(x, self._objective(search, target))
            rises = rises + (value > last_value)
            if iteration == late:
                search.mark()
            state = (
                x,
                previous,
                value,
                gradient,
                best_x,
                best_value,
                best_gradient,
                size,
                rises,
                best_then,
                halved_then,
            )
            (x, previous, value, gradient, best_x, best_value, best_gradient, size, rises, best_then, halved_then) = (
                search.submit(x, logits, *state)
            )
            better = value > best_value
            rows = per_sample(better, x)
            best_x, best_gradient = torch.where(rows, x, best_x), torch.where(rows, gradient, best_gradient)
            best_value = torch.where(better, value, best_value)
            if iteration + 1 in marks:
                oscillates = rises <= self.rho * (iteration + 1 - period_start)
                stuck = ~halved_then & (best_then >= best_value)
                halve = oscillates | stuck
                size = torch.where(halve, size / 2, size)
                rows = per_sample(halve, x)
                x, gradient = torch.where(rows, best_x, x), torch.where(rows, best_gradient, gradient)
                rises, best_then, halved_then = torch.zeros_like(rises), best_value, halve
                period_start = iteration + 1


@dataclass(frozen=True, kw_only=True)
class APGDCE(APGD):
    """APGD on the cross-entropy, the first attack of the standard ensemble."""

    name: ClassVar[str] = "apgd-ce"
    loss: ClassVar[str] = "ce"


@dataclass(frozen=True, kw_only=True)
class APGDDLR(APGD):
    """APGD on the difference of logits ratio, which neither shifts nor scales of the logits can hide."""

    name: ClassVar[str] = "apgd-dlr"
    loss: ClassVar[str] = "dlr"


@dataclass(frozen=True, kw_only=True)
class APGDT(APGD):
    """APGD on the targeted DLR loss, once for each of the most likely wrong classes; any mistake counts.

    Args:
        targets: wrong classes tried, in the order of their clean logits; K - 1 where there are fewer.
    """

    targets: int = 9

    name: ClassVar[str] = "apgd-t"
    loss: ClassVar[str] = "dlr"

    def _runs(self, num_classes: int) -> int:
        return min(self.targets, num_classes - 1) if self.target == "none" else 1

    def _objective(self, search: Search, target: Tensor | None) -> Loss:
        if target is None:
            return search.objective(self.loss)
        wanted = target[search.index]
        return lambda logits, labels: dlr_targeted(logits, labels, wanted)

    def _run(self, search: Search) -> None:
        if self.target != "none":
            super()._run(search)
            return
        classes = rivals(search.clean_logits, search.labels, self.targets)
        for restart in range(self.restarts):
            for rank in range(classes.shape[1]):
                search.restart()
                if search.done:
                    return
                self._climb(search, restart * classes.shape[1] + rank, classes[:, rank])
