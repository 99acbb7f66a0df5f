"""Standard training: cross-entropy on clean inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn
from torch.nn import functional as F

from defenses.base import Batch, Defense, Loss


@dataclass(frozen=True, kw_only=True)
class Standard(Defense):
    """min E CE(f(x), y)."""

    name: ClassVar[str] = "standard"
    select_by: ClassVar[str] = "clean"

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        return Loss(F.cross_entropy(model(batch.x), batch.y))
