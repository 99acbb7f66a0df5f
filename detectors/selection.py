"""Choosing a parameter from a grid by how well known and unknown validation inputs come apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from torch import Tensor

from detectors.validation import Validation
from robustbench_ext.errors import ConfigError
from robustbench_ext.metrics.detection import area, tnr_at_95
from robustbench_ext.numbers import parse_number

T = TypeVar("T")


def separation(known: Tensor, unknown: Tensor, criterion: str) -> float:
    """AUROC, or the share of unknown inputs rejected where 95 % of the known ones are accepted (TNR at 95 % TPR)."""
    measure = area if criterion == "auroc" else tnr_at_95
    return measure(known.double().numpy(), unknown.double().numpy())


def best(grid: Sequence[T], score: Callable[[T, Tensor], Tensor], validation: Validation) -> tuple[T, float]:
    """The grid's first value of highest separation, and that separation.

    Args:
        score: scores (n,) of inputs (n, C, H, W) under a value of the grid.
    """
    found = [
        separation(score(value, validation.known), score(value, validation.unknown), validation.criterion)
        for value in grid
    ]
    top = max(range(len(found)), key=lambda i: found[i])
    return grid[top], found[top]


def numbers(value: object, what: str, low: float = 0.0, strict: bool = False) -> tuple[float, ...]:
    """One number or a list of them, each at least (`strict`: above) `low`."""
    listed = value if isinstance(value, (list, tuple)) else [value]
    found = tuple(parse_number(v, what) for v in listed)
    if not found or any(v < low or (strict and v == low) for v in found):
        raise ConfigError(f"{what} = {value!r}, expected numbers {'>' if strict else '>='} {low:g}")
    return found


def needs_choice(name: str, validate: object, **grids: Sequence[object]) -> None:
    """Raise ConfigError where a grid has several values and nothing to choose on."""
    for what, grid in grids.items():
        if len(grid) > 1 and validate is None:
            raise ConfigError(
                f"{name}: {what} has {len(grid)} values, so one must be chosen on validation data: add validate, such as "
                f"{{attack: fgsm, eps: 0.1}} or {{outliers: symbols}}, or give one value"
            )
