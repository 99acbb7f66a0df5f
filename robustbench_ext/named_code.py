"""Code of a user's own by name: `FILE.py:NAME` and `pkg.module:NAME`. Naming it runs it.

A file finds the modules beside it by plain import statements (`import blocks`, `from blocks import Net`, `from .blocks import
Net`), wherever the command runs and in every worker, and so do they. It is imported as a module of a package of its own that
stands for its folder: nothing is put on `sys.path`, so two folders may each have a `blocks.py`, and a file beside a model hides
nothing from us. As for a script, what lies beside comes before what is installed; the standard library and our own packages
come before both. A name that is put together at run time (`importlib.import_module`) is looked for where Python looks.
"""

from __future__ import annotations

import ast
import builtins
import hashlib
import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Iterator
from functools import cache, lru_cache
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

from robustbench_ext.errors import ConfigError, unknown_name

DIGITS = 12
_PACKAGE = "_rbx_"  # how the names of those packages start
_DRIVE = re.compile(r"[A-Za-z]:[\\/]")
_FIRST = {"robustbench_ext", "defenses", "detectors", "uq", "reports", *sys.stdlib_module_names}


def split_source(spec: str) -> tuple[str, str]:
    """Source and argument of `SOURCE:ARGUMENT`; the source is empty where there is none. The colon of a drive is no separator.

    >>> split_source("npz:data.npz"), split_source("npz:C:/data.npz"), split_source("C:/data.npz"), split_source("digits")
    (('npz', 'data.npz'), ('npz', 'C:/data.npz'), ('', 'C:/data.npz'), ('', 'digits'))
    """
    source, colon, argument = spec.partition(":")
    return (source, argument) if colon and not _DRIVE.match(spec) else ("", spec)


def split_named(spec: str) -> tuple[str, str]:
    """File or module, and name, of `FILE:NAME`; the name is empty where there is none.

    >>> split_named("net.py:build"), split_named("C:/net.py:build"), split_named("C:/runs/net"), split_named("pkg.nets:build")
    (('net.py', 'build'), ('C:/net.py', 'build'), ('C:/runs/net', ''), ('pkg.nets', 'build'))
    """
    where, colon, name = spec.rpartition(":")
    drive = len(where) == 1 and _DRIVE.match(spec)
    return (where, name) if colon and not drive else (spec, "")


def load_named(spec: str, what: str, wrong: type[Exception] = ConfigError, advice: str = "") -> Any:
    """What stands in a file or a module under a name, as it is.

    Args:
        spec: `file.py:Name`, relative to the working directory, or `pkg.module:Name`.
        what: what it is to be, for messages: "attack".
        wrong: the class of what is raised; advice: a sentence to follow where nothing can be imported.

    Raises:
        `wrong`: no such file, module or name, or importing it fails.
    """
    where, name = split_named(spec)
    if where.endswith(".py") and not (file := _file(where)).is_file():
        raise wrong(
            f"{what} '{spec}': there is no file {file}. Relative paths begin where the command runs, {Path.cwd()}"
        )
    try:
        python = _from_file(_file(where)) if where.endswith(".py") else _from_module(where)
    except Exception as error:  # whatever the user's code raises
        raise wrong(
            f"{what} '{spec}': importing {where} failed with {type(error).__name__}: {error}.{advice}"
        ) from error
    if not hasattr(python, name):
        public = [n for n, thing in vars(python).items() if n[:1] != "_" and not isinstance(thing, ModuleType)]
        own = [n for n in public if getattr(vars(python)[n], "__module__", None) == python.__name__]
        raise wrong(f"{what} '{spec}': {unknown_name(f'name in {where}', name, own or public)}")
    return getattr(python, name)


def _file(where: str) -> Path:
    return Path(where).expanduser().resolve()


def _from_module(where: str) -> ModuleType:
    if os.getcwd() not in sys.path:  # noqa: PTH109 - the string is what sys.path holds
        sys.path.insert(0, os.getcwd())  # noqa: PTH109
    return importlib.import_module(where)


# Files ---------------------------------------------------------------------------------------------------------------


def _from_file(file: Path) -> ModuleType:
    """The module of a file; a new one where the file changed, or a module beside it that it imports."""
    if (name := _module_name(file)) in sys.modules:
        return sys.modules[name]
    importlib.invalidate_caches()  # a module beside it may be younger than the last look into its folder
    name, before = _module_name(file), set(sys.modules)
    package = name.partition(".")[0]
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    if package not in sys.modules:
        sys.modules[package] = ModuleType(package)
        sys.modules[package].__path__ = [str(file.parent)]
    loader = _Loader(name, str(file))
    spec = importlib.util.spec_from_file_location(name, file, loader=loader)
    assert spec is not None  # noqa: S101 - it is None only where there is no loader
    python = importlib.util.module_from_spec(spec)
    sys.modules[name] = python  # dataclasses look there
    try:
        loader.exec_module(python)
    except BaseException:
        for new in set(sys.modules) - before:
            if new.partition(".")[0] == package:
                del sys.modules[new]
        raise
    return python


def _module_name(file: Path) -> str:
    """Named by the contents of all that it imports from its folder: an edited file is another module."""
    content = [part for path in sources(file) for part in (str(path).encode(), path.read_bytes())]
    package = _PACKAGE + hashlib.sha256(b"\0".join(content)).hexdigest()[:DIGITS]
    return f"{package}.{re.sub(r'[^0-9A-Za-z_]', '_', file.stem)}"


class _Finder(MetaPathFinder):
    """Finds the modules of the packages that stand for folders, as Python would, and has `_Loader` load them."""

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if not fullname.startswith(_PACKAGE) or path is None:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


class _Loader(SourceFileLoader):
    """Gives a module an `__import__` that looks beside it first: Python asks the module that imports for it."""

    def exec_module(self, module: ModuleType) -> None:
        vars(module)["__builtins__"] = {**vars(builtins), "__import__": _import_of(module.__name__.partition(".")[0])}
        super().exec_module(module)

    def path_stats(self, path: str) -> Any:
        """Refused, so that no bytecode is kept: its dates would not tell two edits of one second apart."""
        raise OSError(f"{path} is compiled each time")


@cache
def _import_of(package: str) -> Callable[..., ModuleType]:
    (folder,) = sys.modules[package].__path__
    known = cache(lambda top: is_beside(top, Path(folder)))

    def import_(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> ModuleType:  # noqa: A002
        top, here = name.partition(".")[0], globals or {}
        # `timm.py` may import timm; a package imports its own parts by its own name.
        is_itself = here.get("__name__") == f"{package}.{top}" and "__path__" not in here
        if level or is_itself or not known(top):
            return builtins.__import__(name, globals, locals, fromlist, level)
        if fromlist:
            return builtins.__import__(f"{package}.{name}", globals, locals, fromlist, 0)
        importlib.import_module(f"{package}.{name}")
        return sys.modules[f"{package}.{top}"]

    return import_


def is_beside(top: str, folder: Path) -> bool:
    """Whether `import TOP` in a file of that folder means what lies in it.

    A folder without `__init__.py` counts where there is nothing else of the name, as for Python.
    """
    if top in _FIRST:
        return False
    spec = PathFinder.find_spec(top, [str(folder)])
    if spec is None:
        return False
    if spec.origin is not None:
        return True
    try:
        return importlib.util.find_spec(top) is None
    except ValueError:  # something in sys.modules that is no module from a file
        return False


def source_files(spec: str) -> list[Path]:
    """The files that make `FILE.py:NAME` what it is; none for what a module names."""
    where = split_named(spec)[0]
    return sources(_file(where)) if where.endswith(".py") and _file(where).is_file() else []


# What is followed ----------------------------------------------------------------------------------------------------


def followed(thing: Any) -> list[Path]:
    """The modules that a class or function of a file imports from beside that file, with those that they import; and its own.

    Empty for what was not imported as `FILE.py:NAME`.
    """
    package = str(getattr(thing, "__module__", "")).partition(".")[0]
    if not package.startswith(_PACKAGE) or package not in sys.modules:
        return []
    file = getattr(sys.modules.get(thing.__module__), "__file__", None)
    return [] if file is None else sources(Path(file), Path(sys.modules[package].__path__[0]))


def sources(file: Path, folder: Path | None = None) -> list[Path]:
    """A file and the modules beside it that its import statements name, wherever they stand in it, and those that they name.

    It is read, not run, so the answer does not depend on what has been imported yet.

    Args:
        folder: where absolute imports look; by default the file's own.
    """
    root, todo, found = folder or file.parent, [file], set[Path]()
    while todo:
        path = todo.pop()
        if path not in found:
            found.add(path)
            todo += _imported_by(path, root)
    return sorted(found)


def _imported_by(file: Path, root: Path) -> Iterator[Path]:
    for level, parts in _statements(file.read_bytes()):
        if not level and not is_beside(parts[0], root):
            continue
        base = root if not level else file.parents[level - 1]
        for i in range(len(parts)):
            stem = base.joinpath(*parts[: i + 1])
            yield from (path for path in (stem.parent / f"{stem.name}.py", stem / "__init__.py") if path.is_file())


@lru_cache(maxsize=256)
def _statements(content: bytes) -> tuple[tuple[int, tuple[str, ...]], ...]:
    """Level and dotted name of all that a source imports; of `from a import b` that is a.b, which may be a module."""
    try:
        tree = ast.parse(content)
    except (SyntaxError, ValueError):
        return ()  # importing it will say so
    found: dict[tuple[int, tuple[str, ...]], None] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {(0, tuple(alias.name.split("."))): None for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = tuple(node.module.split(".")) if node.module else ()
            found |= {(node.level, (*start, alias.name)): None for alias in node.names}
    return tuple(found)
