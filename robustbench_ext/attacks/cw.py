"""C&W: the least L2 perturbation as an unconstrained minimum (Carlini and Wagner, S&P 2017, arXiv 1608.04644)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robustbench_ext.attacks.base import Passes
from robustbench_ext.attacks.minimum import MinimumNorm, lead, offer
from robustbench_ext.attacks.search import Search
from robustbench_ext.attacks.threat import flat_norm, per_sample
from robustbench_ext.errors import ConfigError

_DECAY_1, _DECAY_2, _TINY = 0.9, 0.999, 1e-8  # Adam's published values
_INSIDE = 1.0 - 1e-6  # keeps atanh finite where a pixel is 0 or 1
_LARGEST = 1e10  # c of a sample that is never broken stops growing here
_LOOKS = 10  # times that a run's progress is looked at


@dataclass(frozen=True, kw_only=True)
class CW(MinimumNorm):
    """Minimise ||x' - x||^2 + c f(x') over w, where x' = (1 + tanh w) / 2 and f(x') = max(-lead(x'), -kappa).

    lead is max_{k != y} z_k - z_y, or with a target z_t - max_{k != t} z_k. Adam walks down, with a state per sample. An
    outer search finds c for each sample: multiplied by 10 until something is found, then halving the bracket.

    Args:
        steps: Adam steps for each c (10,000 in the paper's code).
        rounds: values of c tried.
        step_size: Adam's learning rate, in tanh space.
        c: the first value.
        kappa: confidence: only inputs whose lead is at least this count.
        abort_early: end a sample's run when a tenth of the steps lowered its objective by less than 0.01 %.
    Cost: rounds (steps + 1) forward and rounds x steps backward passes, where no run is aborted.
    """

    steps: int = 200
    rounds: int = 6
    step_size: float = 0.05
    c: float = 1.0
    kappa: float = 0.0
    abort_early: bool = True

    name: ClassVar[str] = "cw"
    norms: ClassVar[tuple[str, ...]] = ("L2",)
    reference: ClassVar[str] = "arXiv 1608.04644"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1 or self.rounds < 1:
            raise ConfigError(f"cw: steps = {self.steps}, rounds = {self.rounds}; expected at least 1 of each")
        if self.step_size <= 0 or self.c <= 0 or self.kappa < 0:
            raise ConfigError(
                f"cw: step_size = {self.step_size}, c = {self.c}, kappa = {self.kappa}; expected step_size > 0, c > 0 and "
                f"kappa >= 0"
            )

    def cost(self, num_classes: int) -> Passes:
        return Passes(self.looks * self.draws * self.rounds * (self.steps + 1), self.draws * self.rounds * self.steps)

    def _run(self, search: Search) -> None:
        # Of all samples of the batch: c, and the bracket that it is searched in.
        c = torch.full((len(search.labels),), self.c, device=search.labels.device)
        low, high = torch.zeros_like(c), torch.full_like(c, torch.inf)
        for _ in range(self.rounds):
            search.restart()
            if search.done:
                return
            found = self._descend(search, c)
            low, high = torch.where(found, low, c), torch.where(found, c, high)
            c = torch.where(high < torch.inf, (low + high) / 2, (c * 10).clamp_max(_LARGEST))

    def _descend(self, search: Search, weight: Tensor) -> Tensor:
        """One run with the given c of all samples, (N,); returns which of them it found something for, bool (N,)."""
        found = torch.zeros_like(weight, dtype=torch.bool)
        w = torch.atanh((2.0 * search.x - 1.0) * _INSIDE)
        first, second = torch.zeros_like(w), torch.zeros_like(w)
        before = torch.full((len(w),), torch.inf, device=w.device)
        going = torch.ones(len(w), dtype=torch.bool, device=w.device)
        period = max(1, self.steps // _LOOKS)
        for step in range(self.steps + 1):
            x = (torch.tanh(w[going]) + 1.0) / 2.0
            if step == self.steps:
                self._judge(search, going, x, search.logits(x, rows=going), found)
                return found
            logits, ahead, gradient = search.gradient(x, lead(search, going), rows=going)
            delta, c = x - search.x[going], weight[search.index[going]]
            objective = flat_norm(delta, "L2").square() + c * (-ahead).clamp_min(-self.kappa)
            # d objective / dx', times dx' / dw = 2 x' (1 - x').
            pull = per_sample(c * (ahead < self.kappa), x)
            slope = (2.0 * delta - pull * gradient) * 2.0 * x * (1.0 - x)
            first[going] = _DECAY_1 * first[going] + (1.0 - _DECAY_1) * slope
            second[going] = _DECAY_2 * second[going] + (1.0 - _DECAY_2) * slope.square()
            mean = first[going] / (1.0 - _DECAY_1 ** (step + 1))
            spread = (second[going] / (1.0 - _DECAY_2 ** (step + 1))).sqrt()
            w[going] = w[going] - self.step_size * mean / (spread + _TINY)
            on = going.clone()
            if self.abort_early and step % period == 0:
                on[going] = objective < 0.9999 * before[going]
                before[going] = objective
            w, first, second, before, going = self._judge(search, going, x, logits, found, w, first, second, before, on)
            if not bool(going.any()):
                return found
        return found

    def _judge(
        self, search: Search, rows: Tensor, x: Tensor, logits: Tensor, found: Tensor, *state: Tensor
    ) -> tuple[Tensor, ...]:
        """Offer the candidates that reach the goal with confidence; note in `found`, (N,), whose they are."""
        ahead = lead(search, rows)(logits, search.y[rows])
        sure = (ahead > 0) & (ahead >= self.kappa)
        if not bool(sure.any()):
            return state
        chosen = rows.clone()
        chosen[rows] = sure
        found[search.index[chosen]] = True
        return offer(search, chosen, x[sure], logits[sure], *state)
