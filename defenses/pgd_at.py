"""PGD adversarial training (Madry et al., ICLR 2018, arXiv 1706.06083)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn
from torch.nn import functional as F

from defenses.base import Batch, Defense, Loss
from robustbench_ext.attacks.inner import Objective


@dataclass(frozen=True, kw_only=True)
class PGDAT(Defense):
    """min E max_{x'} CE(f(x'), y): uniform start, cross-entropy attack in evaluation mode, loss on x' alone."""

    name: ClassVar[str] = "pgd-at"
    objective: ClassVar[Objective | None] = "ce"
    reference: ClassVar[str] = "arXiv 1706.06083"

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        return Loss(F.cross_entropy(model(batch.x_adv), batch.y))
