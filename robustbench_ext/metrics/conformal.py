"""From a detector's score to an alarm with a stated false-alarm rate, by held-out clean samples.

With calibration scores s_1 .. s_n of clean inputs, the conformal p-value of a new input with score s is

    p = (1 + #{i : s_i >= s}) / (n + 1).

If the new input is clean too (exchangeable with the calibration samples), P(p <= a) <= a for every a, whatever the
detector (Vovk, Gammerman, Shafer 2005; Bates et al. 2023, arXiv 2104.08279). That is on average over calibration sets;
given one set, the false-alarm rate at level a follows a beta distribution about floor(a (n + 1)) / (n + 1).
"""

from __future__ import annotations

import math

import numpy as np
from scipy.special import betaincinv

from robustbench_ext.errors import DataError
from robustbench_ext.metrics.estimate import LEVEL, Estimate, require
from robustbench_ext.metrics.intervals import proportion

ALARM = 0.05


def p_values(calibration: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Conformal p-values (N,) of scores (N,), in [1/(n+1), 1]; small = unlike the clean calibration samples."""
    require("conformal calibration", scores=calibration)
    require("conformal scores", scores=scores)
    ordered = np.sort(calibration)
    at_least = len(ordered) - np.searchsorted(ordered, scores, "left")
    return np.asarray((1.0 + at_least) / (len(ordered) + 1.0))


def threshold(calibration: np.ndarray, level: float = ALARM) -> float:
    """The score above which an input is flagged: p <= level exactly where score > threshold.

    Infinite where n + 1 < 1 / level: so few calibration samples allow no alarm at that level.
    """
    require("conformal calibration", scores=calibration)
    _check_level(level)
    n = len(calibration)
    allowed = math.floor(level * (n + 1) + 1e-9) - 1  # calibration samples that may lie at or above a flagged score
    return math.inf if allowed < 0 else float(np.sort(calibration)[n - 1 - allowed])


def alarms(calibration: np.ndarray, scores: np.ndarray, level: float = ALARM) -> Estimate:
    """Share of inputs that are flagged at that level: false alarms on clean inputs, detections on others."""
    _check_level(level)
    return proportion(p_values(calibration, scores) <= level + 1e-12)


def false_alarm_range(n: int, level: float = ALARM) -> tuple[float, float]:
    """Where the true false-alarm rate lies for 95 % of calibration sets of n samples (no ties), at that level."""
    _check_level(level)
    k = math.floor(level * (n + 1) + 1e-9)
    if n < 1 or k < 1:
        return 0.0, 0.0
    tail = (1 - LEVEL) / 2
    return float(betaincinv(k, n + 1 - k, tail)), float(betaincinv(k, n + 1 - k, 1 - tail))


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise DataError(f"conformal: level = {level}, expected a number between 0 and 1, such as 0.05")
