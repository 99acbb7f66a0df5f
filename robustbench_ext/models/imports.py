"""Factories of the user's own: `pkg.module:attribute` and `path/file.py:attribute`. Naming one runs its code."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from robustbench_ext.catalog import SOURCES
from robustbench_ext.errors import ModelError
from robustbench_ext.named_code import load_named, split_named


def made_by(spec: str, kwargs: Mapping[str, Any], is_ready: Callable[[Any], bool], expected: str) -> Any:
    """What a factory gives, or the named thing itself where that is ready already.

    Args:
        spec: where it is; kwargs: of the call.
        is_ready: whether a thing is what is wanted; expected: the same in words.

    Raises:
        ModelError: it cannot be imported, there is no such name, the call fails, or gives something else.
    """
    where, attribute = split_named(spec)
    # `hg:name` is a source that was misspelt more often than a module of that name.
    known = "" if "." in where or "/" in where else f" Sources of models are {', '.join(SOURCES.names())}."
    thing = load_named(spec, "model", ModelError, known)
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
