"""What a regressor is trained to make small. Order, epochs, the choice of the best epoch and data belong to the trainer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from torch import Tensor
from torch.nn import functional as F

from robustbench_ext.models.mlp import Standardized


@dataclass(frozen=True, kw_only=True)
class Objective(ABC):
    """A training objective of regressors with its hyper-parameters."""

    name: ClassVar[str]
    version: ClassVar[int] = 1  # part of every training's key: raise it when weights change
    reference: ClassVar[str] = ""

    def spec(self) -> dict[str, Any]:
        """All that the trained weights depend on here."""
        return {"defense": self.name, "version": self.version, **asdict(self)}

    def check(self, network: Standardized) -> None:  # noqa: B027 - most take any network
        """Raise ConfigError where the objective needs something of a network that it has not."""

    @abstractmethod
    def loss(self, network: Standardized, x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """What to descend on, a scalar, and scalars for the curve: `squared_error`, which is drawn, and what else there is.

        Args:
            network: in training mode.
            x: float32 (B, d), raw units.
            y: float32 (B,), standardised; `network.scaled(x)` is to meet it.

        Raises:
            DataError: the batch is too small.
        """


@dataclass(frozen=True, kw_only=True)
class LeastSquares(Objective):
    """The mean squared error of standardised targets: the default of every regressor."""

    name: ClassVar[str] = "standard"

    def loss(self, network: Standardized, x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        error = F.mse_loss(network.scaled(x), y)
        return error, {"squared_error": error}
