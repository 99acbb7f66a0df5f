"""Experiment trackers that follow a run: `tracker("mlflow")` gives a callback for `run_suite(..., callbacks=[...])`."""

from __future__ import annotations

from robustbench_ext.callbacks import Callback
from robustbench_ext.catalog import TRACKERS
from robustbench_ext.errors import ConfigError
from robustbench_ext.named_code import load_named
from robustbench_ext.own import is_own

ROWS = ("headline", "all")


def tracker(spec: str) -> Callback:
    """A tracker by name.

    Args:
        spec: `mlflow` or `mlflow:URI_OR_FOLDER`, `wandb` or `wandb:PROJECT` (or `wandb:ENTITY/PROJECT`), `tensorboard` or
            `tensorboard:FOLDER`; with `?rows=all` behind it, all rows of the results are sent, and not those of the headline
            alone. Or `file.py:factory`, `pkg.module:factory`: a function without arguments that gives a `Callback`, such as a
            class of one.

    Raises:
        ConfigError: no such tracker, or it is no `Callback`.
        MissingExtraError: its package is not installed.
    """
    told, option, rows = spec.rpartition("?rows=")
    if not option:
        told, rows = spec, "headline"
    if rows not in ROWS:
        raise ConfigError(f"tracker '{spec}': rows = {rows!r}, expected {' or '.join(ROWS)}")
    name, _, where = told.partition(":")
    if name not in TRACKERS and is_own(told):
        return _own(told)
    made: Callback = TRACKERS.load(name)(where, rows)
    return made


def _own(spec: str) -> Callback:
    factory = load_named(spec, "tracker")
    made = factory() if callable(factory) else factory
    if not isinstance(made, Callback):
        raise ConfigError(
            f"tracker '{spec}' gave {type(made).__name__}, expected an object of a class that derives from "
            f"robustbench_ext.callbacks.Callback"
        )
    return made
