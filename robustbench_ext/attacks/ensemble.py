"""Ensembles: several attacks in a row, each on the samples that all before it failed to break.

A sample is robust if no member breaks it: the pointwise worst case. `standard` follows AutoAttack (Croce and Hein, ICML
2020, arXiv 2003.01690): APGD-CE, targeted APGD-DLR, targeted FAB and Square, with the published budgets.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from robustbench_ext.attacks.apgd import APGDCE, APGDDLR, APGDT
from robustbench_ext.attacks.base import Attack, AttackResult, Passes
from robustbench_ext.attacks.fab import FABT
from robustbench_ext.attacks.losses import cross_entropy
from robustbench_ext.attacks.search import Search
from robustbench_ext.attacks.square import Square
from robustbench_ext.attacks.threat import flat_norm
from robustbench_ext.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Ensemble(Attack):
    """Runs `attacks` in order on the survivors, gathered into full batches again between members."""

    @abstractmethod
    def make(self) -> tuple[Attack, ...]:
        """The members, all of this ensemble's norm and budget."""

    def common(self) -> dict[str, Any]:
        """The parameters that all members share with the ensemble."""
        return {"eps": self.eps, "norm": self.norm, "draws": self.draws, "precision": self.precision}

    @cached_property
    def attacks(self) -> tuple[Attack, ...]:
        """The members."""
        return self.make()

    @property
    def members(self) -> tuple[str, ...]:
        """The members' names, in order: what `AttackResult.broken_by` counts."""
        return tuple(attack.name for attack in self.attacks)

    def cost(self, num_classes: int) -> Passes | None:
        total = Passes(0, 0)
        for attack in self.attacks:
            part = attack.cost(num_classes)
            if part is None:
                return None
            total = total + part
        return total

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stop != "broken":
            raise ConfigError(
                f"{self.name}: an ensemble gives a verdict, so stop must be 'broken'; attack with a member instead"
            )

    def _all(
        self, model: nn.Module, x: Tensor, y: Tensor, keys: Tensor, seed: int, clean_logits: Tensor, batch_size: int
    ) -> AttackResult:
        device = clean_logits.device
        wrong = clean_logits.argmax(dim=1) != y.to(device)
        none = torch.zeros(len(x), dtype=torch.int32, device=device)
        by = torch.full((len(x),), -1, dtype=torch.int16, device=device)
        late = torch.full((len(x),), torch.nan, device=device)
        total = AttackResult(
            x.to(device).clone(), clean_logits.clone(), wrong, none.float(), none, none.clone(), by, wrong.clone(), late
        )
        for number, attack in enumerate(self.attacks):
            rows = (~total.broken).nonzero()[:, 0]
            if not len(rows):
                break
            here = rows.to(x.device)
            found = attack._all(model, x[here], y[here], keys[rows], seed, clean_logits[rows], batch_size)
            found.broken_by.copy_(torch.where(found.broken, number, -1))
            self._merge(total, found, rows, y.to(device)[rows])
        total.norms.copy_(self._norms(total.x_adv, x))
        return total

    def _norms(self, x_adv: Tensor, x: Tensor) -> Tensor:
        return flat_norm(x_adv - x.to(x_adv.device), self.norm)

    @staticmethod
    def _merge(total: AttackResult, found: AttackResult, rows: Tensor, y: Tensor) -> None:
        total.forwards[rows] += found.forwards
        total.backwards[rows] += found.backwards
        # Of a sample that no member breaks: the largest share, so that one member's impatience is seen.
        total.late_gain[rows] = torch.fmax(total.late_gain[rows], found.late_gain)
        # A break, or the input that came nearest to one: that of the highest cross-entropy.
        better = found.broken | (cross_entropy(found.logits, y) > cross_entropy(total.logits[rows], y))
        for name in ("x_adv", "logits", "broken", "broken_by", "reached"):
            getattr(total, name)[rows[better]] = getattr(found, name)[better]

    def _run(self, search: Search) -> None:
        raise AssertionError("an ensemble's members search, not the ensemble")


@dataclass(frozen=True, kw_only=True)
class Standard(Ensemble):
    """The standard ensemble: APGD-CE (100 steps), APGD-T (9 x 100), FAB-T (9 x 100), Square (5,000 queries).

    With fewer than ten classes, K - 1 targets are tried. Samples leave inside each attack as soon as they are broken,
    clean logits are shared, and no pass is spent on bookkeeping; the protocol is unchanged.

    Args:
        steps: of the three gradient attacks.
        targets: of the two targeted ones.
        queries: of Square.
    Cost: up to 101 + 909 + 1,800 + 5,000 forward and 1,900 backward passes for a robust sample.
    """

    steps: int = 100
    targets: int = 9
    queries: int = 5000

    name: ClassVar[str] = "standard"
    access: ClassVar[str] = "white"
    stochastic: ClassVar[bool] = True
    reference: ClassVar[str] = "arXiv 2003.01690"

    def make(self) -> tuple[Attack, ...]:
        common = self.common()
        return (
            APGDCE(**common, steps=self.steps),
            APGDT(**common, steps=self.steps, targets=self.targets),
            FABT(**common, steps=self.steps, targets=self.targets),
            Square(**common, queries=self.queries),
        )


@dataclass(frozen=True, kw_only=True)
class Rand(Ensemble):
    """The ensemble for randomised models: APGD-CE and APGD-DLR (100 steps each) on means over 20 draws.

    A plain attack follows the gradient of one draw and judges by another, and so overstates the robustness of a model
    with random layers. Here gradients and predictions are means over draws (expectation over transformations, Athalye
    et al. 2018, arXiv 1802.00420), and an input counts as a break only if fresh draws agree. The published variant
    judges by the last draw alone.

    Args:
        draws: passes of each look at the model.
        steps: of each attack.
    """

    draws: int = 20
    steps: int = 100

    name: ClassVar[str] = "rand"
    access: ClassVar[str] = "white"
    stochastic: ClassVar[bool] = True
    per_sample_draws: ClassVar[bool] = False  # the model's own noise is drawn for a batch
    reference: ClassVar[str] = "arXiv 2003.01690"

    def make(self) -> tuple[Attack, ...]:
        common = {**self.common(), "steps": self.steps}
        return APGDCE(**common), APGDDLR(**common)
