"""Methods of a user's own, in a file or an importable module, named where registered ones are: `file.py:MyAttack`.

Naming one runs its code, by the user's own words, as a model's factory does. It keeps what a method of ours keeps: it is of
the right class, its label cannot be mistaken for a registered method's, and it is part of every key. For that its `version`
gets the hash of the source files of its class and of its bases, and of the modules beside a named file that its import
statements lead to, so an edited method is computed again. Code elsewhere is not followed: raise `version` when it changes.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from robustbench_ext.errors import ConfigError
from robustbench_ext.named_code import followed, load_named, split_named

HASH_DIGITS = 12
ORIGIN = "origin"  # attribute of a method of one's own: how it was named first
_NOT_FOLLOWED = ("robustbench_ext", "detectors", "defenses", "uq", "reports", "torch", "builtins", "abc", "typing")


def is_own(name: str) -> bool:
    """Whether a name is `file.py:Name` or `pkg.module:Name`; of `module:Name`, only where there is such a module.

    >>> is_own("mine/attack.py:Mine"), is_own("mine.attacks:Mine"), is_own("json:dumps"), is_own("npz:data.npz"), is_own("pgd")
    (True, True, True, False, False)
    """
    where, attribute = split_named(name)
    if not attribute.isidentifier():
        return False
    if where.endswith(".py") or not all(part.isidentifier() for part in where.split(".")):
        return where.endswith(".py")
    return "." in where or _is_module(where)


def _is_module(name: str) -> bool:
    """Whether a module of that name can be found; imports nothing."""
    if name in sys.modules or Path(f"{name}.py").is_file() or Path(name, "__init__.py").is_file():
        return True
    return importlib.util.find_spec(name) is not None


def load_own(spec: str, what: str, expected: Any, known: Iterable[str] = ()) -> Any:
    """A method of the user's own, ready to be used like a registered one.

    Args:
        spec, what: see `load_named`.
        expected: the class that it must derive from; or a function that makes a method of it.
        known: registered names, which it must not take.

    Returns:
        The class, with `origin`, with a `name` (its Python name where it has none of its own), and with the hash of its source
        in `version`; or what `expected` made of it.

    Raises:
        ConfigError: see `load_named`; or it is no such class, leaves methods out, or takes a registered method's name.
    """
    thing = load_named(spec, what)
    given = f"the class {thing.__name__}" if isinstance(thing, type) else f"a {type(thing).__name__}"
    if not isinstance(expected, type):
        if isinstance(thing, type) or not inspect.isfunction(thing):
            raise ConfigError(f"{what} '{spec}' is {given}, expected a function")
        mark(thing, spec)
        made = expected(thing)
    else:
        wanted = f"{expected.__module__}.{expected.__qualname__}"
        if not isinstance(thing, type) or not issubclass(thing, expected):
            raise ConfigError(f"{what} '{spec}' is {given}, expected a class that derives from {wanted}")
        if inspect.isabstract(thing):
            missing = ", ".join(sorted(getattr(thing, "__abstractmethods__", ())))
            raise ConfigError(f"{what} '{spec}' does not define {missing}, which {wanted} asks for")
        mark(thing, spec)
        made = thing
    if made.name in known:
        raise ConfigError(
            f"{what} '{spec}' calls itself '{made.name}', the name of a registered {what}: reports would show it as that one. "
            f"Give it another name."
        )
    return made


def mark(thing: Any, spec: str) -> None:
    """Give a class or function `origin`, a `name` of its own, and the hash of its source in `version`; once."""
    if ORIGIN in vars(thing):
        return
    if "name" not in vars(thing):  # one that is inherited belongs to the base
        thing.name = thing.__name__
    thing.version = f"{str(getattr(thing, 'version', 1)).partition('+')[0]}+{source_hash(thing)}"
    thing.origin = spec


def source_hash(thing: Any) -> str:
    """A hash of the source files of a class and its bases, or of a function, and of what they import from beside themselves.

    Ours and torch's are left out.

    Raises:
        ConfigError: a class that was not read from a file.
    """
    parts = [
        part for part in getattr(thing, "__mro__", (thing,)) if part.__module__.partition(".")[0] not in _NOT_FOLLOWED
    ]
    digest, files, beside = hashlib.sha256(), set[Path](), set[Path]()
    for part in parts or [thing]:
        try:
            files.add(file := Path(inspect.getfile(part)))
            digest.update(file.read_bytes())
            beside |= set(followed(part))
        except (TypeError, OSError) as error:
            raise ConfigError(
                f"{part.__module__}.{part.__qualname__} was not read from a file, so results cannot be kept under its source. "
                f"Write it into a file, and name that: file.py:{part.__qualname__}"
            ) from error
    for file in sorted(beside - files):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:HASH_DIGITS]
