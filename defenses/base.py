"""What a defense is: given a model and a batch, a loss and what it wants logged."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from robustbench_ext.attacks.inner import Objective, Start


@dataclass(frozen=True)
class Batch:
    """One training batch.

    Attributes:
        x, y: inputs (B, C, H, W) in [0, 1] and labels (B,).
        x_adv: adversarial inputs, detached; equal to x where the defense asks for none.
        epoch: counted from 0.
    """

    x: Tensor
    y: Tensor
    x_adv: Tensor
    epoch: int


@dataclass(frozen=True)
class Loss:
    """A scalar to descend on, and numbers to log (already detached)."""

    value: Tensor
    logs: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Defense(ABC):
    """A training objective with its hyper-parameters.

    Class attributes:
        objective: what the inner attack maximises, or None where no adversarial inputs are needed.
        start: how the inner attack starts.
        select_by: the accuracy by which the trainer keeps the best epoch, "robust" or "clean".
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1
    objective: ClassVar[Objective | None] = None
    start: ClassVar[Start] = "uniform"
    select_by: ClassVar[str] = "robust"
    reference: ClassVar[str] = ""

    def spec(self) -> dict[str, Any]:
        """All that the trained weights depend on here."""
        return {"defense": self.name, "version": self.version, **asdict(self)}

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """The loss of one batch; the model is in training mode. Natural and adversarial inputs go through separate
        forward passes: concatenating them would change the batch statistics, and so the method.
        """
