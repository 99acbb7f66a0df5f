"""An attack of your own, in one file, named in a suite or on the command line as `examples/own_attack.py:Lion`.

    rbx check --attack examples/own_attack.py:Lion     # does it keep what every attack must keep?
    rbx run examples/own_suite.yaml --out runs/own     # beside the attacks that there are

`Attack` checks inputs and labels, freezes the model, leaves misclassified samples out, verifies ball and box, and keeps the
books. A new attack writes `_run`: it asks the search for gradients or logits, and submits what it found.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from robustbench_ext.attacks.base import Attack, Passes
from robustbench_ext.attacks.search import Search
from robustbench_ext.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Lion(Attack):
    """Gradient ascent with the update of Lion (Chen et al. 2023, arXiv 2302.06675), from the clean input.

        x <- P(x + a d(b1 m + (1 - b1) g)),   m <- b2 m + (1 - b2) g,   d = sign for Linf, normalised for L2

    Args:
        steps: gradient steps, of size a = 2.5 eps / steps.
        b1, b2: how much of the past counts in a step, and is kept.
    """

    steps: int = 20
    b1: float = 0.9
    b2: float = 0.99

    name: ClassVar[str] = "lion"  # what reports call it
    reference: ClassVar[str] = "arXiv 2302.06675"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1:
            raise ConfigError(f"lion: steps = {self.steps}, expected at least 1")

    def cost(self, num_classes: int) -> Passes:
        """The most that a sample can cost; `rbx plan` asks."""
        return Passes(self.steps + 1, self.steps)

    def _run(self, search: Search) -> None:
        size = 2.5 * self.eps / self.steps
        x = search.x
        mean = torch.zeros_like(x)
        for _ in range(self.steps):
            logits, _, gradient = search.gradient(x, search.objective("ce"))
            # Every submitted input is judged; what is broken leaves, and our own state comes back without it.
            x, gradient, mean = search.submit(x, logits, x, gradient, mean)
            if search.done:
                return
            direction = search.threat.steepest(self.b1 * mean + (1 - self.b1) * gradient)
            mean = self.b2 * mean + (1 - self.b2) * gradient
            x = search.threat.project(x + size * direction, search.x)
        search.submit(x, search.logits(x))
