"""Options of networks, read as people write them, and the sizes of images that a network can take."""

from __future__ import annotations

from typing import Any

from robustbench_ext.errors import ConfigError, ModelError
from robustbench_ext.numbers import parse_number


def whole(value: Any, least: int, what: str) -> int:
    """A whole number of at least `least`.

    Raises:
        ConfigError: anything else.
    """
    number = parse_number(value, what)
    if number != int(number) or number < least:
        raise ConfigError(f"{what} = {value!r}, expected a whole number >= {least}")
    return int(number)


def dropout_rate(value: Any, what: str) -> float:
    """A share of units to drop, in [0, 1).

    Raises:
        ConfigError: anything else.
    """
    rate = parse_number(value, what)
    if not 0 <= rate < 1:
        raise ConfigError(f"{what} = {value!r}, expected a share in [0, 1)")
    return rate


def check_size(name: str, image_size: int, least: int, why: str) -> None:
    """Refuse images smaller than `least` pixels a side.

    Raises:
        ModelError: they are; the message says why the network needs more, and which networks take less.
    """
    if image_size < least:
        raise ModelError(
            f"{name} needs inputs of at least {least}x{least}, not {image_size}x{image_size}: {why}. small-cnn and "
            f"small-resnet take 8x8 to 64x64"
        )
