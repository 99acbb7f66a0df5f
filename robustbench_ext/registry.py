"""Names to things, lazily: listing a registry imports nothing, asking for one entry imports one module.

The entries themselves are written down in `robustbench_ext.catalog`. A third-party package joins through an entry
point in the group `robustbench_ext.<kind>`, for example `[project.entry-points."robustbench_ext.attacks"]`. A single file
needs no package: where a kind allows it, `file.py:Name` and `pkg.module:Name` do as names (`robustbench_ext.own`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from robustbench_ext.errors import ConfigError, unknown_name
from robustbench_ext.own import is_own, load_own

_HOME = Path(__file__).resolve().parent.parent
_SIBLINGS = {"defenses", "detectors", "uq", "reports"}


@dataclass(frozen=True)
class Entry:
    """One named method.

    Args:
        name: the name in the literature, lower case with hyphens.
        target: where it lives, `"package.module:attribute"`.
        summary: one line, shown by `rbx list`.
        facts: machine-readable properties, equal to the class attributes of the same names (a test compares them).
    """

    name: str
    target: str
    summary: str
    facts: Mapping[str, Any] = field(default_factory=dict)

    def load(self) -> Any:
        """Import the module and return the attribute."""
        module_name, _, attribute = self.target.partition(":")
        top = module_name.partition(".")[0]
        if top in _SIBLINGS:
            _refuse_impostor(top)
        return getattr(import_module(module_name), attribute)


def _refuse_impostor(package: str) -> None:
    """Raise where a file of the user's own, such as `reports.py` beside a script, hides one of our packages."""
    found = getattr(import_module(package), "__file__", None)
    if found is None or Path(found).resolve() != _HOME / package / "__init__.py":
        raise ConfigError(
            f"the name '{package}' is taken by {found or 'a folder without __init__.py'}, which hides the package "
            f"'{package}' of robustbench-ext. Rename that file or folder, or take its folder off sys.path."
        )


class Registry:
    """The entries of one kind, in the order in which they were added.

    Args:
        base: `"package.module:Class"` that a user's own class of this kind derives from, or the function that makes a method
            of a user's own function; None where there are registered names alone.
    """

    def __init__(self, kind: str, group: str, entries: tuple[Entry, ...] = (), base: str | None = None) -> None:
        self.kind = kind
        self.group = group
        self._base = base
        self._entries: dict[str, Entry] = {}
        self._discovered = False
        for entry in entries:
            self.add(entry)

    def add(self, entry: Entry) -> None:
        """Register an entry; a second one of the same name is an error that names both."""
        if entry.name in self._entries:
            other = self._entries[entry.name].target
            raise ConfigError(f"{self.kind} '{entry.name}' is registered twice: {other} and {entry.target}")
        self._entries[entry.name] = entry

    def _discover(self) -> None:
        if not self._discovered:
            self._discovered = True
            for point in entry_points(group=f"robustbench_ext.{self.group}"):
                origin = point.dist.name if point.dist is not None else "an installed package"
                self.add(Entry(point.name, point.value, f"from {origin}"))

    def __iter__(self) -> Iterator[Entry]:
        self._discover()
        return iter(list(self._entries.values()))

    def __contains__(self, name: object) -> bool:
        return any(entry.name == name for entry in self)

    def names(self) -> list[str]:
        """All registered names."""
        return [entry.name for entry in self]

    def get(self, name: str) -> Entry:
        """The entry of that name; an unknown name is an error that names the closest known one."""
        self._discover()
        if self._is_own(name):
            return Entry(name, name, "one of your own")
        if name not in self._entries:
            raise ConfigError(unknown_name(self.kind, name, self._entries))
        return self._entries[name]

    def load(self, name: str) -> Any:
        """Import and return the thing of that name."""
        entry = self.get(name)
        if self._base is None or not self._is_own(name):
            return entry.load()
        return load_own(name, self.kind, Entry("base", self._base, "").load(), self._entries)

    def split(self, name: str) -> tuple[str, str]:
        """Family and variant: `torchattacks` and `CW`. A class of one's own, `file.py:Mine`, has no variants."""
        family, _, variant = name.partition(":")
        return (name, "") if self._is_own(name) else (family, variant)

    def label(self, name: str) -> str:
        """What reports call it: the name itself, or what a class of one's own calls itself."""
        return str(self.load(name).name) if self._is_own(name) else name

    def _is_own(self, name: str) -> bool:
        return self._base is not None and name.partition(":")[0] not in self and is_own(name)
