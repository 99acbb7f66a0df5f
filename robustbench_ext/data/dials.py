"""Options of generated data, behind its name: `outcomes:sigmoid#n=1000,noise=0.1`."""

from __future__ import annotations

from collections.abc import Mapping

from robustbench_ext.errors import ConfigError, unknown_name
from robustbench_ext.numbers import parse_number

Dial = float | int | str


def read_dials(data: str, argument: str, defaults: Mapping[str, Dial]) -> tuple[str, dict[str, Dial]]:
    """What stands before the first #, and all options with their values; those that are not named keep their defaults.

    Args:
        data: the dataset's name, for messages; argument: what stands behind its colon.
        defaults: by option. Its type is that of the option: whole numbers, other numbers, or text.

    >>> read_dials("outcomes", "sigmoid#n=100,noise=1/20", {"n": 3000, "noise": 0.03})
    ('sigmoid', {'n': 100, 'noise': 0.05})

    Raises:
        ConfigError: an unknown option, one that is named twice, or a value of another type.
    """
    name, *parts = argument.replace(",", "#").split("#")
    values, named = dict(defaults), set[str]()
    for part in parts:
        key, equals, text = part.strip().partition("=")
        what = f"data '{data}:{argument}'"
        if key not in defaults:
            raise ConfigError(f"{what}: {unknown_name('option', key, defaults)}")
        if not equals or not text or key in named:
            raise ConfigError(f"{what}: expected each option once and with a value, as in #{key}={defaults[key]}")
        named.add(key)
        values[key] = _value(text, defaults[key], f"{what}: {key}")
    return name, values


def _value(text: str, default: Dial, what: str) -> Dial:
    if isinstance(default, str):
        return text
    number = parse_number(text, what)
    if isinstance(default, float):
        return number
    if number != int(number):
        raise ConfigError(f"{what} = {text}, expected a whole number")
    return int(number)
