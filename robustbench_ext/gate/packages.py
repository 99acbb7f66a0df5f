"""Our sibling packages beside modules of the same names in the tested project.

`defenses`, `detectors`, `uq` and `reports` are plain names. pytest puts the folder of a test file in front of `sys.path`, so a
project's own `reports.py` beside its tests hides our package. Both are needed in one process: theirs by the tests, ours by the
measurements. So while we work, the names stand for our packages, and afterwards for theirs again. Where nothing hides our
packages, nothing is done at all.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

HOME = Path(__file__).resolve().parents[2]
SIBLINGS = ("defenses", "detectors", "reports", "uq")

_ours: dict[str, ModuleType] = {}  # what we imported while the names were hidden
_depth = 0


@contextmanager
def own_packages() -> Iterator[None]:
    """Within this context the names of our sibling packages stand for ours. Contexts may be nested."""
    global _depth  # sys.modules is one for the whole process, too
    if _depth or not any(_hidden(name) for name in SIBLINGS):
        yield
        return
    theirs = _taken()
    sys.modules.update(_ours)
    sys.path.insert(0, str(HOME))
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1
        sys.path.remove(str(HOME))
        _ours.update(_taken())
        sys.modules.update(theirs)


def _taken() -> dict[str, ModuleType]:
    """Take all modules of these names out of `sys.modules`."""
    names = [name for name in sys.modules if name.partition(".")[0] in SIBLINGS]
    return {name: sys.modules.pop(name) for name in names}


def _hidden(name: str) -> bool:
    """Whether an import of that name would give another package than ours."""
    loaded = sys.modules.get(name)
    try:
        spec = loaded.__spec__ if loaded is not None else find_spec(name)
    except (ImportError, ValueError):
        spec = None
    origin = spec.origin if spec is not None else None
    return origin is None or Path(origin).resolve() != HOME / name / "__init__.py"
