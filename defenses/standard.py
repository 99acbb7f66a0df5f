"""Standard training: cross-entropy on clean inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from defenses.base import Batch, Defense, Loss, cross_entropy


@dataclass(frozen=True, kw_only=True)
class Standard(Defense):
    """min E CE(f(x), y)."""

    name: ClassVar[str] = "standard"
    class_losses: ClassVar[bool] = True
    select_by: ClassVar[str] = "clean"
    soft_targets: ClassVar[bool] = True

    def loss(self, model: nn.Module, batch: Batch, state: nn.Module | None = None) -> Loss:
        return Loss(cross_entropy(model(batch.x), batch).mean())


@dataclass(frozen=True, kw_only=True)
class ERM(Standard):
    """`standard`, by the name that domain generalization has for it."""

    name: ClassVar[str] = "erm"
    reference: ClassVar[str] = "Vapnik 1998; DomainBed, arXiv 2007.01434"
