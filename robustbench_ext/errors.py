"""Every error a user can cause. A message says what was given, what was expected and how to fix it."""

from __future__ import annotations

import difflib
import os
import traceback
from collections.abc import Iterable
from pathlib import Path

_OURS = [Path(__file__).parents[1] / name for name in ("robustbench_ext", "defenses", "detectors", "uq", "reports")]
_PYTHON = Path(os.__file__).parent


class RobustBenchExtError(Exception):
    """Base class: catch this to catch everything that this project raises on purpose."""


class ConfigError(RobustBenchExtError):
    """A suite, a specification string or an option is wrong."""


class DataError(RobustBenchExtError):
    """Data cannot be loaded, or does not keep the contract (float32 images in [0, 1], labels 0..K-1)."""


class ModelError(RobustBenchExtError):
    """A model cannot be loaded, or does not keep the contract ((N, C, H, W) in, finite (N, K) logits out)."""


class ThreatModelError(RobustBenchExtError):
    """An attack returned an input outside its ball or outside [0, 1]: a defect of the attack, never of the model."""


class MissingExtraError(RobustBenchExtError):
    """An optional dependency is not installed; the message holds the line that installs it."""


class StoppedError(RobustBenchExtError):
    """A run had to stop before its end (disk full, its executor is gone); what it has computed is kept."""


class NotFittedError(RobustBenchExtError):
    """A detector or estimator was asked for scores before it was fitted."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """Say that `name` is no known `kind`, name the closest ones and list the rest.

    >>> unknown_name("attack", "pdg", ["pgd", "fgsm"])
    "unknown attack 'pdg'. Did you mean 'pgd'? Known: fgsm, pgd."
    """
    names = sorted(known)
    # What goes on where the name ends is nearer than what looks alike: apgd means apgd-ce, not pgd.
    longer = [known_name for known_name in names if name and known_name.startswith(name)]
    close = difflib.get_close_matches(name, longer or names, n=1, cutoff=0.0 if longer else 0.5)
    hint = f" Did you mean '{close[0]}'?" if close else ""
    return f"unknown {kind} '{name}'.{hint} Known: {', '.join(names) or 'none'}."


def line_of_user(error: BaseException) -> str:
    """Where code of the user's own went wrong, ` (net.py, line 12)`: the innermost frame that belongs neither to this project
    nor to Python nor to an installed package. Empty where there is none, and for errors of ours: their message says what to do.
    """
    if isinstance(error, RobustBenchExtError):
        return ""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        file = Path(frame.filename)
        installed = {"site-packages", "dist-packages"}.intersection(file.parts)
        if not (installed or frame.filename.startswith("<") or {_PYTHON, *_OURS}.intersection(file.parents)):
            return f" ({file.name}, line {frame.lineno})"
    return ""
