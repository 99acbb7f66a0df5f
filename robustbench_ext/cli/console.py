"""What all commands share: exit codes, messages on stderr, parsing of options."""

from __future__ import annotations

import io
import sys
import textwrap
from typing import Any

from robustbench_ext.errors import ConfigError
from robustbench_ext.numbers import parse_number

CHECK_FAILED, USAGE, PARTIAL, INTERRUPTED = 1, 2, 4, 130


def spare_stdout() -> None:
    """Print a question mark for what stdout's encoding lacks; there are encodings of consoles and pipes without ↑."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def complain(message: str) -> None:
    """An error on stderr; its own line breaks stay."""
    lines = [
        textwrap.fill(
            line,
            80,
            subsequent_indent=" " * (len(line) - len(line.lstrip())),
            break_on_hyphens=False,
            break_long_words=False,
        )
        for line in f"rbx: {message}".split("\n")
    ]
    print("\n".join(lines), file=sys.stderr)


def say(message: str = "") -> None:
    """A progress message on stderr, at once."""
    print(message, file=sys.stderr, flush=True)


def paragraph(text: str, indent: str = "    ") -> None:
    """A longer message on stderr, wrapped to 80 columns."""
    print(textwrap.fill(text, 80, subsequent_indent=indent), file=sys.stderr, flush=True)


def numbers(text: str | None, what: str) -> list[float] | None:
    """A comma-separated list of numbers, such as 0.485,0.456,0.406."""
    return None if text is None else [parse_number(part.strip(), what) for part in text.split(",")]


def settings(pairs: list[str]) -> dict[str, Any]:
    """`key=value` options as a mapping; values are YAML."""
    import yaml

    out: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set {pair}: expected key=value")
        out[key.strip()] = yaml.safe_load(text)
    return out


def percent(value: float | None) -> str:
    """A proportion as 93.4 %, or a dash."""
    return "–" if value is None else f"{100 * value:.1f} %"
