"""What follows the name of a dataset: `DOMAIN#size=224,resize=256`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from robustbench_ext.errors import ConfigError, unknown_name

ROOT = "root"


class Options:
    """The argument and the options of a specification.

    Args:
        spec: the whole of it, for errors; its options are `key=value`, each behind a # or a comma.
        known: the options that there are, beside `root`.

    Attributes:
        name: the specification in one way of writing it, without `root`: it says which data, not where on this machine.
        argument: what lies between the name and the options.
        root: the dataset's own folder, if it was given.

    Raises:
        ConfigError: an unknown option, or one without a value.
    """

    def __init__(self, name: str, rest: str, known: Sequence[str] = ()) -> None:
        self.spec = name + (":" if rest and not rest.startswith("#") else "") + rest
        self.argument, _, options = rest.partition("#")
        self._values: dict[str, str] = {}
        known = (*known, ROOT)
        for key, value in _pairs(options):
            if key not in known:
                raise ConfigError(f"data '{self.spec}': {unknown_name('option', key, known)}")
            if not value:
                raise ConfigError(f"data '{self.spec}': the option '{key}' needs a value, as in #{key}=...")
            self._values[key] = value
        said = ",".join(f"{key}={self._values[key]}" for key in sorted(set(self._values) - {ROOT}))
        self.name = name + (f":{self.argument}" if self.argument else "") + (f"#{said}" if said else "")
        self.root = Path(self._values[ROOT]).expanduser() if ROOT in self._values else None

    def number(self, key: str, default: int) -> int:
        """A whole number above 0."""
        text = self._values.get(key, str(default))
        if not (text.isdecimal() and int(text) > 0):
            raise ConfigError(
                f"data '{self.spec}': {key}={text}, expected a whole number of pixels, as in #{key}={default}"
            )
        return int(text)

    def choice(self, key: str, choices: Sequence[str]) -> str:
        """One of the choices; the first one by default."""
        text = self._values.get(key, choices[0])
        if text not in choices:
            raise ConfigError(f"data '{self.spec}': {unknown_name(key, text, choices)}")
        return text


def _pairs(options: str) -> list[tuple[str, str]]:
    """KEY=VALUE, each behind a # or a comma; where no KEY= follows, these belong to the name of a folder."""
    parts = re.split(r"[#,](?=[a-z-]+=)", options) if options else []
    return [(key, value) for key, _, value in (part.partition("=") for part in parts)]


def root_of(rest: str) -> Path | None:
    """The folder that `#root=` gives, whatever else there is."""
    given = dict(_pairs(rest.partition("#")[2])).get(ROOT)
    return Path(given).expanduser() if given else None
