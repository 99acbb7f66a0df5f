"""PGD adversarial training (Madry et al., ICLR 2018, arXiv 1706.06083)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from defenses.base import Batch, Crafter, Defense, Loss, cross_entropy
from robustbench_ext.attacks.inner import InnerAttack
from robustbench_ext.attacks.threat import Threat


@dataclass(frozen=True, kw_only=True)
class PGDAT(Defense):
    """min E max_{x'} CE(f(x'), y): uniform start, cross-entropy attack in evaluation mode, loss on x' alone."""

    name: ClassVar[str] = "pgd-at"
    class_losses: ClassVar[bool] = True
    soft_targets: ClassVar[bool] = True
    reference: ClassVar[str] = "arXiv 1706.06083"

    def attack(self, threat: Threat, steps: int, step_size: float | None) -> Crafter:
        return InnerAttack(threat, steps, step_size)

    def loss(self, model: nn.Module, batch: Batch, state: nn.Module | None = None) -> Loss:
        return Loss(cross_entropy(model(batch.x_adv), batch).mean())
