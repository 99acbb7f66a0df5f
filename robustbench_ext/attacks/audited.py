"""The audited ensemble: what the standard ensemble would find, estimated at a fraction of its cost.

On a robust model the standard ensemble spends nearly all of its passes on samples that nothing breaks. Here a short
screen attacks every sample, and only some of its survivors meet the full protocol: those of smallest margin, which it
is most likely to break, and a random draw of the others. See `robustbench_ext.metrics.audit` for the estimate.

A break that is found is a break: it is in the sample's verdict, and in the estimate. A sample that survives the screen
and is not audited has no verdict of the full protocol; its `broken` says that the screen did not break it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from robustbench_ext.attacks.apgd import APGDCE, APGDT
from robustbench_ext.attacks.base import Attack, AttackResult, Passes
from robustbench_ext.attacks.ensemble import Ensemble, Standard
from robustbench_ext.attacks.losses import margin
from robustbench_ext.errors import ConfigError
from robustbench_ext.metrics import audit
from robustbench_ext.randomness import SampleRandom


@dataclass(frozen=True, kw_only=True)
class Screen(Ensemble):
    """A short APGD-CE and a short APGD-T on a few targets: what breaks easily, and a margin for the rest.

    Args:
        steps: of each run.
        targets: of APGD-T.
    """

    steps: int = 20
    targets: int = 3

    name: ClassVar[str] = "screen"
    stochastic: ClassVar[bool] = True

    def make(self) -> tuple[Attack, ...]:
        common: dict[str, Any] = {**self.common(), "steps": self.steps}
        return APGDCE(**common), APGDT(**common, targets=self.targets)


@dataclass(frozen=True, kw_only=True)
class Audited(Ensemble):
    """A screen on all samples, the standard ensemble on an audit of the survivors, and an estimate with an interval.

    One of three budgets may be given; `widening` = 1.3 if none is.

    Args:
        passes: forward and backward passes per sample, on average, that the run may cost at most, the screen included.
        width: audit until the interval of the robust accuracy is at most this wide (ends apart), such as 0.03.
        widening: audit until it is at most this many times as wide as the standard ensemble's own.
        certain: share of the audit that goes to the survivors of smallest margin; the rest is drawn at random.
        steps, targets, queries: of the standard ensemble.
        screen_steps, screen_targets: of the screen.
    With `width` or `widening` the audit grows in looks, each doubling it, until the interval is narrow enough; the looks
    share the error of the interval. The last one would audit every survivor.
    Cost: the screen's, and the standard ensemble's for those that are audited.
    """

    passes: float | None = None
    width: float | None = None
    widening: float | None = None
    certain: float = 0.3
    steps: int = 100
    targets: int = 9
    queries: int = 5000
    screen_steps: int = 20
    screen_targets: int = 3

    name: ClassVar[str] = "audited"
    access: ClassVar[str] = "white"
    stochastic: ClassVar[bool] = True
    whole: ClassVar[bool] = True
    reference: ClassVar[str] = "arXiv 2003.01690"

    def __post_init__(self) -> None:
        super().__post_init__()
        given = {k: v for k in ("passes", "width", "widening") if (v := getattr(self, k)) is not None}
        if len(given) > 1:
            raise ConfigError(f"audited: {' and '.join(given)} are given; expected one budget at most")
        if not given:
            object.__setattr__(self, "widening", 1.3)
            given = {"widening": 1.3}
        (budget,) = given.items()
        if not budget[1] > (1 if budget[0] == "widening" else 0):
            raise ConfigError(
                f"audited: {budget[0]} = {budget[1]}, expected a number above {1 if budget[0] == 'widening' else 0}"
            )
        if not 0 <= self.certain < 1:
            raise ConfigError(f"audited: certain = {self.certain}, expected a number in [0, 1)")

    def make(self) -> tuple[Attack, ...]:
        return Screen(**self.common(), steps=self.screen_steps, targets=self.screen_targets), Standard(
            **self.common(), steps=self.steps, targets=self.targets, queries=self.queries
        )

    @property
    def members(self) -> tuple[str, ...]:
        """The screen, then the members of the standard ensemble."""
        screen, full = self.attacks
        return (screen.name, *full.members)

    def cost(self, num_classes: int) -> Passes | None:
        """None: how many samples are audited is seen on the way."""
        return None

    def _all(
        self, model: nn.Module, x: Tensor, y: Tensor, keys: Tensor, seed: int, clean_logits: Tensor, batch_size: int
    ) -> AttackResult:
        screen, full = self.attacks
        total = screen._all(model, x, y, keys, seed, clean_logits, batch_size)
        total.broken_by.copy_(torch.where(total.broken_by >= 0, 0, -1))  # the screen counts as one member
        labels = y.to(total.logits.device)

        def judge(positions: np.ndarray) -> np.ndarray:
            rows = torch.from_numpy(positions).to(labels.device)
            here = rows.to(x.device)
            found = full._all(model, x[here], y[here], keys[rows], seed, clean_logits[rows], batch_size)
            found.broken_by.add_((found.broken_by >= 0).to(torch.int16))  # after the screen
            self._merge(total, found, rows, labels[rows])
            return found.broken.cpu().numpy()

        standing = ~total.broken.cpu().numpy()
        margins = margin(total.logits, labels).cpu().numpy()
        lots = SampleRandom(seed, keys, "audit").uniform(()).cpu().numpy()
        budget = self._budget(total, clean_logits.shape[1])
        code, _, level = audit.conduct(standing, margins, lots, judge, budget, self.certain)
        total.norms.copy_(self._norms(total.x_adv, x))
        total.extra["audit"] = torch.from_numpy(code).to(x.device)
        total.extra["audit_level"] = torch.full((len(x),), level, dtype=torch.float64, device=x.device)
        return total

    def _budget(self, screened: AttackResult, num_classes: int) -> audit.Budget:
        if self.passes is None:
            return audit.Budget(width=self.width, widening=self.widening)
        full = self.attacks[1].cost(num_classes)
        each = full.forwards + full.backwards if full is not None else 1
        spent = int(screened.forwards.sum()) + int(screened.backwards.sum())
        return audit.Budget(size=max(0, int((self.passes * len(screened.broken) - spent) // each)))
