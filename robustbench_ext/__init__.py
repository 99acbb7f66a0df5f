"""Robustness and uncertainty evaluation of PyTorch models: one run, one report, error bars on everything.

Importing this package imports neither torch nor anything heavy, so that the command line and the pytest plugin
start at once. The names below are resolved on first use.

>>> import robustbench_ext as rbx
>>> rbx.parse_number("8/255")
0.03137254901960784
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from robustbench_ext.data import Dataset, load_dataset
    from robustbench_ext.engine import run_suite
    from robustbench_ext.errors import RobustBenchExtError
    from robustbench_ext.models import load_model
    from robustbench_ext.models.wrap import wrap
    from robustbench_ext.numbers import parse_number
    from robustbench_ext.suite import load_suite

_LAZY = {
    "Dataset": "robustbench_ext.data",
    "RobustBenchExtError": "robustbench_ext.errors",
    "load_dataset": "robustbench_ext.data",
    "load_model": "robustbench_ext.models",
    "load_suite": "robustbench_ext.suite",
    "parse_number": "robustbench_ext.numbers",
    "run_suite": "robustbench_ext.engine",
    "wrap": "robustbench_ext.models",
}

__all__ = [
    "Dataset",
    "RobustBenchExtError",
    "__version__",
    "load_dataset",
    "load_model",
    "load_suite",
    "parse_number",
    "run_suite",
    "wrap",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'robustbench_ext' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
