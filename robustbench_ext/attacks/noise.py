"""Random noise: the weakest attack there is, and so a control. A gradient attack that does not beat it is broken."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from robustbench_ext.attacks.base import Attack, Passes
from robustbench_ext.attacks.search import Search
from robustbench_ext.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class RandomNoise(Attack):
    """Random points of the threat model: uniform in the Linf ball, or uniform in the L2 ball's volume.

    Args:
        tries: points a sample may cost.
    Cost: `tries` forward passes, beside the shared clean pass.
    """

    tries: int = 100

    name: ClassVar[str] = "random-noise"
    access: ClassVar[str] = "decision"
    stochastic: ClassVar[bool] = True
    reference: ClassVar[str] = "a control, without a source"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tries < 1:
            raise ConfigError(f"random-noise: tries = {self.tries}, expected at least 1")

    def cost(self, num_classes: int) -> Passes:
        return Passes(self.tries, 0)

    def _run(self, search: Search) -> None:
        for attempt in range(self.tries):
            if search.done:
                return
            x = search.threat.random_point(search.x, search.random, step=attempt)
            search.submit(x, search.logits(x))
