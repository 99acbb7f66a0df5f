"""What minimum-norm attacks share: no budget unless one is given, and the smallest perturbation is what is kept.

One run gives every sample's distance to the nearest mistake that was found, hence the robust accuracy at every budget.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from robustbench_ext.attacks.base import Targeted
from robustbench_ext.attacks.losses import Loss, margin
from robustbench_ext.attacks.search import Keep, Search, Stop
from robustbench_ext.attacks.threat import row_lengths


@dataclass(frozen=True, kw_only=True)
class MinimumNorm(Targeted):
    """An attack that minimises ||x' - x|| over the inputs that are misclassified (targeted: that reach the target).

    Args:
        eps: budget, by default none. With one, only what is found within it counts.
        norm: "L2" by default, the norm that these attacks were published for.
        stop: "never" by default: go on to make the perturbation smaller. "broken": the first one within the budget will do.
    """

    eps: float = math.inf
    norm: str = "L2"
    stop: Stop = "never"

    keep: ClassVar[Keep] = "norm"

    @property
    def looks(self) -> int:
        """Looks that a candidate may need: apparent breaks of a randomised model, or at lower precision, are confirmed."""
        return 1 if self.draws == 1 and self.precision == "float32" else 2


def lead(search: Search, rows: Tensor | None = None) -> Loss:
    """How far the goal is ahead, positive where it is reached: max_{k != y} z_k - z_y, or z_t - max_{k != t} z_k.

    It belongs to the samples that stand at the moment, or to those of them that `rows` (n,) bool chooses.
    """
    if search.target is None:
        return margin
    target = search.target if rows is None else search.target[rows]
    return lambda logits, labels: -margin(logits, target)


def offer(search: Search, rows: Tensor, candidates: Tensor, logits: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
    """Judge one candidate (m, ...) for each standing sample that `rows` (n,) bool chooses; the others stay as they are."""
    index = search.index
    everything, found = search.best[index], search.best_logits[index]
    everything[rows], found[rows] = candidates, logits
    return search.judge(everything, found, *state)


def cosine(step: int, steps: int, first: float, last: float) -> float:
    """Annealing from `first` at step 0 to `last` at step `steps - 1` along half a cosine."""
    share = step / max(1, steps - 1)
    return last + (first - last) * (1.0 + math.cos(math.pi * share)) / 2.0


def dual_norm(gradient: Tensor, norm: str) -> Tensor:
    """By how much a unit step in `norm` can raise a linear function with this gradient, (n,): L1 for Linf, L2 for L2."""
    flat = gradient.flatten(1)
    if norm == "Linf":
        return flat.abs().sum(dim=1)
    return row_lengths(flat)
