"""Values of the plugin's options: what is wrong with one is said when pytest starts, not by every test that measures.

Imported only where an option is given, and imports nothing heavy.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from robustbench_ext.errors import ConfigError
from robustbench_ext.numbers import parse_number

UNITS = {"s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}


def seconds_of(budget: Any) -> float:
    """A time such as "60s", "10m", "1h" or a number of seconds.

    >>> seconds_of("1.5m")
    90.0
    """
    text = str(budget).strip().lower()
    unit = next((u for u in sorted(UNITS, key=len, reverse=True) if text.endswith(u)), "")
    try:
        seconds = parse_number(text.removesuffix(unit).strip(), "budget") * UNITS.get(unit, 1.0)
    except ConfigError:
        seconds = -1.0
    if seconds < 0:
        raise ConfigError(f"budget: got {budget!r}, expected a time such as 60s, 10m or 1h")
    return seconds


def wrong(name: str, value: str, root: Path) -> str | None:
    """What was expected of an option, or of the ini option of its name; None where the value is as it should be.

    Args:
        name: without `--robust-`; root: what relative paths of folders begin at.

    >>> wrong("n", "many", Path())
    'a whole number from 1 on, such as 500'
    >>> wrong("n", "500", Path())
    """
    if name not in _EXPECTED:
        return None
    expected, good = _EXPECTED[name]
    try:
        return None if good(value, root) else expected
    except (ConfigError, OSError):
        return expected


def _whole(least: int) -> Callable[[str, Path], bool]:
    def good(value: str, root: Path) -> bool:
        number = parse_number(value)
        return number == math.floor(number) and number >= least

    return good


def _no_file(value: str, root: Path) -> bool:
    return bool(value.strip()) and not (root / Path(value).expanduser()).is_file()


def _named(value: str, root: Path) -> bool:
    return bool(value.strip())


_EXPECTED: dict[str, tuple[str, Callable[[str, Path], bool]]] = {
    "n": ("a whole number from 1 on, such as 500", _whole(1)),
    "seed": ("a whole number from 0 on", _whole(0)),
    "budget": ("a time such as 60s, 10m or 1h", lambda value, root: seconds_of(value) >= 0),
    "confidence": ("a level from 0.5 to 1, such as 0.95 or 0.99", lambda value, root: 0.5 <= parse_number(value) < 1),
    "baseline-dir": ("a folder, which is made where it is not there; a file is in the way", _no_file),
    "cache": ("a folder, which is made where it is not there; a file is in the way", _no_file),
    "report": (
        "an HTML file to write, such as robustness.html",
        lambda v, root: _named(v, root) and not Path(v).is_dir(),
    ),
    "model": ("a model, such as pkg.module:factory or file.py:factory", _named),
    "data": ("data, such as digits or npz:PATH", _named),
    "suite": ("a suite, such as standard or the path of a YAML file", _named),
}
