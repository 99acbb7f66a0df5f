"""Methods of a user's own, in a file or an importable module, named where registered ones are: `file.py:MyAttack`.

Naming one runs its code, by the user's own words, as a model's factory does. It keeps what a method of ours keeps: it is of
the right class, its label cannot be mistaken for a registered method's, and it is part of every key. For that its `version`
gets the hash of the source files of its class and of its bases, so an edited method is computed again. Code in other files
that those call is not followed: raise `version` when it changes.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from robustbench_ext.errors import ConfigError, unknown_name

HASH_DIGITS = 12
ORIGIN = "origin"  # attribute of a method of one's own: how it was named first
_NOT_FOLLOWED = ("robustbench_ext", "detectors", "defenses", "uq", "reports", "torch", "builtins", "abc", "typing")


def is_own(name: str) -> bool:
    """Whether a name is `file.py:Name` or `pkg.module:Name`; of `module:Name`, only where there is such a module.

    >>> is_own("mine/attack.py:Mine"), is_own("mine.attacks:Mine"), is_own("json:dumps"), is_own("npz:data.npz"), is_own("pgd")
    (True, True, True, False, False)
    """
    where, colon, attribute = name.rpartition(":")
    if not colon or not attribute.isidentifier():
        return False
    if where.endswith(".py") or not all(part.isidentifier() for part in where.split(".")):
        return where.endswith(".py")
    return "." in where or _is_module(where)


def _is_module(name: str) -> bool:
    """Whether a module of that name can be found; imports nothing."""
    if name in sys.modules or Path(f"{name}.py").is_file() or Path(name, "__init__.py").is_file():
        return True
    return importlib.util.find_spec(name) is not None


def load_named(spec: str, what: str) -> Any:
    """What stands in a file or a module under a name, as it is.

    Args:
        spec: `file.py:Name`, relative to the working directory, or `pkg.module:Name`.
        what: what it is to be, for messages: "attack".

    Raises:
        ConfigError: no such file, module or name, or importing it fails.
    """
    where, _, attribute = spec.rpartition(":")
    try:
        python = _from_file(where, f"{what} '{spec}'") if where.endswith(".py") else _from_module(where)
    except ConfigError:
        raise
    except Exception as error:  # whatever the user's file raises
        raise ConfigError(f"{what} '{spec}': importing {where} failed with {type(error).__name__}: {error}") from error
    if not hasattr(python, attribute):
        here = [n for n, thing in vars(python).items() if getattr(thing, "__module__", None) == python.__name__]
        raise ConfigError(f"{what} '{spec}': {unknown_name(f'name in {where}', attribute, here)}")
    return getattr(python, attribute)


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
    """A hash of the source files of a class and its bases, or of a function; ours and torch's are left out.

    Raises:
        ConfigError: a class that was not read from a file.
    """
    parts = [
        part for part in getattr(thing, "__mro__", (thing,)) if part.__module__.partition(".")[0] not in _NOT_FOLLOWED
    ]
    digest = hashlib.sha256()
    for part in parts or [thing]:
        try:
            digest.update(Path(inspect.getfile(part)).read_bytes())
        except (TypeError, OSError) as error:
            raise ConfigError(
                f"{part.__module__}.{part.__qualname__} was not read from a file, so results cannot be kept under its source. "
                f"Write it into a file, and name that: file.py:{part.__qualname__}"
            ) from error
    return digest.hexdigest()[:HASH_DIGITS]


def _from_file(where: str, who: str) -> ModuleType:
    file = Path(where).expanduser().resolve()
    if not file.is_file():
        raise ConfigError(f"{who}: there is no file {file}. Relative paths begin where the command runs, {Path.cwd()}")
    # Named by its content: an edited file is another module, and two files of one name do not meet.
    name = f"_rbx_{hashlib.sha256(str(file).encode() + file.read_bytes()).hexdigest()[:HASH_DIGITS]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{who}: {file} cannot be imported")
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))  # it may import its neighbours; last, so that it hides nothing
    python = importlib.util.module_from_spec(spec)
    sys.modules[name] = python  # dataclasses look there
    try:
        spec.loader.exec_module(python)
    except BaseException:
        del sys.modules[name]
        raise
    return python


def _from_module(where: str) -> ModuleType:
    if os.getcwd() not in sys.path:  # noqa: PTH109 - the string is what sys.path holds
        sys.path.insert(0, os.getcwd())  # noqa: PTH109
    return importlib.import_module(where)
