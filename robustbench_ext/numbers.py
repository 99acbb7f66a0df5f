"""Numbers as people write them: `8/255`, `0.3`, `1e-3`."""

from __future__ import annotations

import math
from dataclasses import fields
from fractions import Fraction
from typing import Any

from robustbench_ext.errors import ConfigError


def parse_number(value: Any, what: str = "number") -> float:
    """Read an int, a float, or a string such as `"8/255"`, `"0.3"` or `"1e-3"`.

    YAML 1.1 reads `1e-3` and `8/255` as strings, so every number of a suite comes through here.

    >>> parse_number("8/255") == 8 / 255
    True
    >>> parse_number("1e-3")
    0.001
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ConfigError(f"{what}: got {value!r}, expected a number such as 0.3, '8/255' or 1e-3")
    try:
        if isinstance(value, str) and "/" in value:
            numerator, denominator = value.split("/")
            number = float(Fraction(numerator.strip()) / Fraction(denominator.strip()))
        else:
            number = float(value)
    except (ValueError, ZeroDivisionError, OverflowError):
        raise ConfigError(f"{what}: got {value!r}, expected a number such as 0.3, '8/255' or 1e-3") from None
    if not math.isfinite(number):
        raise ConfigError(f"{what}: got {value!r}, expected a finite number")
    return number


def read_numbers(instance: Any, what: str) -> None:
    """Read every number of a frozen dataclass as people write them: a YAML `steps: 1e2` is the string "1e2".

    Raises:
        ConfigError: a field annotated as int or float holds something else, or an int field a fraction.
    """
    for spec in fields(instance):
        value, kind = getattr(instance, spec.name), str(spec.type)
        if value is None and "None" in kind:
            continue
        if kind.startswith(("float", "int")) and value != math.inf:
            number: float | int = parse_number(value, f"{what}: {spec.name}")
            if kind.startswith("int"):
                if number != int(number):
                    raise ConfigError(f"{what}: {spec.name} = {value!r}, expected a whole number")
                number = int(number)
            object.__setattr__(instance, spec.name, number)


def format_number(value: float) -> str:
    """The shortest familiar spelling: multiples of 1/255 as `k/255`, everything else in at most six digits.

    >>> format_number(8 / 255), format_number(0.2), format_number(0.0)
    ('8/255', '0.2', '0')
    """
    plain = f"{value:.6g}"
    steps = value * 255
    if len(plain) > 5 and abs(steps - round(steps)) < 1e-9 * 255 and round(steps) > 0:
        return f"{round(steps)}/255"
    return plain
