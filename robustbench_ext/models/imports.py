"""Factories of the user's own: `pkg.module:attribute` and `path/file.py:attribute`. Naming one runs its code."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from robustbench_ext.catalog import SOURCES
from robustbench_ext.errors import ModelError, unknown_name


def made_by(spec: str, kwargs: Mapping[str, Any], is_ready: Callable[[Any], bool], expected: str) -> Any:
    """What a factory gives, or the named thing itself where that is ready already.

    Args:
        spec: where it is; kwargs: of the call.
        is_ready: whether a thing is what is wanted; expected: the same in words.

    Raises:
        ModelError: it cannot be imported, there is no such name, the call fails, or gives something else.
    """
    where, _, attribute = spec.rpartition(":")
    python = _imported(spec, where)
    if not hasattr(python, attribute):
        public = [n for n in vars(python) if not n.startswith("_")]
        raise ModelError(f"model '{spec}': " + unknown_name(f"name in {where}", attribute, public))
    thing = getattr(python, attribute)
    if not is_ready(thing):
        try:
            thing = thing(**kwargs)
        except Exception as error:
            raise ModelError(
                f"model '{spec}': calling {attribute}({', '.join(f'{k}={v!r}' for k, v in kwargs.items())}) failed with "
                f"{type(error).__name__}: {error}. Arguments can be given as `kwargs:` in a suite."
            ) from error
    if not is_ready(thing):
        raise ModelError(f"model '{spec}': {attribute} gave {type(thing).__name__}, expected {expected}")
    return thing


def _imported(spec: str, where: str) -> ModuleType:
    try:
        if where.endswith(".py"):
            return _from_file(spec, Path(where).resolve())
        if os.getcwd() not in sys.path:  # noqa: PTH109 - the string is what sys.path holds
            sys.path.insert(0, os.getcwd())  # noqa: PTH109
        return importlib.import_module(where)
    except ModelError:
        raise
    except Exception as error:
        # `hg:name` is a source that was misspelt more often than a module of that name.
        known = "" if "." in where or "/" in where else f" Sources of models are {', '.join(SOURCES.names())}."
        raise ModelError(
            f"model '{spec}': importing {where} failed with {type(error).__name__}: {error}.{known}"
        ) from error


def _from_file(spec: str, file: Path) -> ModuleType:
    if not file.is_file():
        raise ModelError(f"model '{spec}': there is no file {file}")
    # New when the file changes, so that an edited factory is read again.
    name = f"_rbx_{hashlib.sha256(str(file).encode() + file.read_bytes()).hexdigest()[:12]}"
    found = importlib.util.spec_from_file_location(name, file)
    if found is None or found.loader is None:
        raise ModelError(f"model '{spec}': {file} cannot be imported")
    python = importlib.util.module_from_spec(found)
    sys.modules[name] = python
    found.loader.exec_module(python)
    return python
