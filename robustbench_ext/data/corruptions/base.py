"""What every corruption promises: images in, images of the same shape out, in [0, 1], seeded per sample.

Whatever is drawn comes from the samples' own random stream, so a corrupted image does not depend on the batch, the machine or
the device that it was made on (beyond rounding).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from robustbench_ext.data.corruptions.levels import LEVELS, SMALL, TABLE
from robustbench_ext.errors import ConfigError, DataError
from robustbench_ext.models.contract import check_images
from robustbench_ext.randomness import SampleRandom

LEAST_SIDE = 8
Function = Callable[[Tensor, Any, SampleRandom], Tensor]


def levels_for(x_shape: tuple[int, ...], levels: str | None = None) -> str:
    """The table of severities for images (..., H, W): as told, otherwise by their shorter side.

    Raises:
        ConfigError: `levels` is neither "imagenet-c" nor "cifar-c".
    """
    if levels is None:
        return "cifar-c" if min(x_shape[-2:]) < SMALL else "imagenet-c"
    if levels not in LEVELS:
        raise ConfigError(f"corruption: levels = {levels!r}, expected one of {', '.join(LEVELS)}")
    return levels


class Corruption:
    """A corruption by name; call it on a batch."""

    version: int | str = 2  # part of every record's key: raise it when outputs change

    def __init__(self, name: str, function: Function) -> None:
        self.name = name
        self.function = function
        self.__doc__ = function.__doc__

    def parameters(self, severity: int, levels: str) -> Any:
        """The published numbers behind a severity."""
        if isinstance(severity, bool) or severity not in (1, 2, 3, 4, 5):
            raise ConfigError(f"corruption {self.name}: severity = {severity!r}, expected 1, 2, 3, 4 or 5")
        return TABLE[self.name][1 + LEVELS.index(levels)][severity - 1]

    @torch.no_grad()
    def __call__(self, x: Tensor, severity: int, random: SampleRandom, levels: str | None = None) -> Tensor:
        """Corrupt a batch.

        Args:
            x: float32 (N, C, H, W) in [0, 1], C = 1 or 3, sides of at least 8.
            severity: 1 (mild) to 5.
            random: the samples' random stream, on the device of x.
            levels: "imagenet-c" or "cifar-c": whose severities; by default the latter for sides below 64.

        Returns:
            float32 (N, C, H, W) in [0, 1], on the device of x.
        """
        check_images(x, f"corruption {self.name}: inputs")
        if x.shape[1] not in (1, 3) or min(x.shape[2:]) < LEAST_SIDE:
            raise DataError(
                f"corruption {self.name}: inputs of shape {tuple(x.shape)}, expected 1 or 3 channels and sides of at least "
                f"{LEAST_SIDE}"
            )
        if len(random.keys) != len(x):
            raise DataError(f"corruption {self.name}: {len(x)} inputs, but a random stream for {len(random.keys)}")
        if not len(x):
            return x.clone()
        parameters = self.parameters(severity, levels_for(tuple(x.shape), levels))
        return self.function(x, parameters, random).clamp(0.0, 1.0).float()


class OwnCorruption(Corruption):
    """A corruption of the user's own: a function of the severity itself, with no published numbers behind it."""

    def parameters(self, severity: int, levels: str) -> int:
        return severity

    def __init__(self, function: Any) -> None:
        super().__init__(function.name, self._checked)
        self._own = function
        self.version = function.version
        self.origin = function.origin
        self.__doc__ = function.__doc__

    def _checked(self, x: Tensor, severity: int, random: SampleRandom) -> Tensor:
        made = self._own(x.clone(), severity, random)
        if not isinstance(made, Tensor) or made.shape != x.shape or not bool(torch.isfinite(made).all()):
            told = f"shape {tuple(made.shape)}" if isinstance(made, Tensor) else type(made).__name__
            raise DataError(
                f"corruption {self.name} ({self.origin}) gave {told}, expected finite images of shape {tuple(x.shape)}"
            )
        return made


def own_corruption(function: Any) -> OwnCorruption:
    """A corruption of a user's own function `(x, severity, random) -> images`, see `robustbench_ext.own`.

    x is float32 (N, C, H, W) in [0, 1], severity 1 to 5, `random` the samples' stream; what it gives is clipped to [0, 1].
    """
    return OwnCorruption(function)


def corruption(name: str) -> Callable[[Function], Corruption]:
    """Turn a function (x, parameters of a severity, random) into a `Corruption`."""

    def wrap(function: Function) -> Corruption:
        return Corruption(name, function)

    return wrap
