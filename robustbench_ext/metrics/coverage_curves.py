"""Calibration of a regressor over many levels at once: nominal against observed coverage, and its distance from the diagonal.

A calibrated method's quantile at level t has a share t of the targets at or below it, and its central interval of coverage c a
share c inside. Equivalently the probability integral transform F(y) is uniform (Dawid 1984; Kuleshov, Fenner, Ermon 2018,
arXiv 1807.00263).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import ndtr

from robustbench_ext.errors import DataError
from robustbench_ext.metrics.calibration import BIAS_RATIO
from robustbench_ext.metrics.estimate import LEVEL, Estimate, require
from robustbench_ext.metrics.intervals import REPEATS, clopper_pearson, hash_seed
from robustbench_ext.metrics.quantiles import check_levels
from robustbench_ext.metrics.regression import check_intervals
from robustbench_ext.metrics.resampling import bias_extended, resampled_sums


@dataclass(frozen=True)
class CoverageCurve:
    """Observed against nominal coverage at m levels.

    Attributes:
        nominal, observed: (m,).
        low, high: (m,), a simultaneous band: with 95 % confidence the true coverages lie within at every level at once
            (Clopper-Pearson at level 1 - 0.05 / m, Bonferroni). A diagonal that leaves it says: not calibrated.
        n: samples.
    """

    nominal: np.ndarray
    observed: np.ndarray
    low: np.ndarray
    high: np.ndarray
    n: int


def interval_curve(y: np.ndarray, low: np.ndarray, high: np.ndarray, nominal: Sequence[float]) -> CoverageCurve:
    """Coverage of central intervals (N, m) at m nominal coverages."""
    return _curve(_inside(y, low, high, nominal), nominal)


def quantile_curve(y: np.ndarray, quantiles: np.ndarray, levels: Sequence[float]) -> CoverageCurve:
    """Share of targets at or below each quantile (N, m)."""
    return _curve(_below(y, quantiles, levels), levels)


def pit_curve(pit: np.ndarray, levels: Sequence[float]) -> CoverageCurve:
    """Share of PIT values F(y) (N,), in [0, 1], at or below each level: `quantile_curve` for a continuous distribution."""
    require("PIT", pit=pit)
    if pit.ndim != 1 or pit.min() < 0 or pit.max() > 1:
        raise DataError(
            f"PIT: values of shape {pit.shape} span [{pit.min():.3g}, {pit.max():.3g}], expected (N,) in [0, 1]"
        )
    return quantile_curve(pit, np.broadcast_to(np.asarray(levels, dtype=np.float64), (len(pit), len(levels))), levels)


def pit_gaussian(y: np.ndarray, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    """F(y) of N(mean, std^2), each (N,), std > 0: float64 (N,), uniform where the predictions are calibrated."""
    require("PIT", y=y, mean=mean, std=std)
    if std.min() <= 0:
        raise DataError(f"PIT: a standard deviation of {std.min()}, expected std > 0")
    return np.asarray(ndtr((y.astype(np.float64) - mean) / std))


def interval_ece(y: np.ndarray, low: np.ndarray, high: np.ndarray, nominal: Sequence[float]) -> Estimate:
    """mean over levels of |coverage - nominal|, for central intervals (N, m)."""
    return _distance(_inside(y, low, high, nominal), nominal)


def quantile_ece(y: np.ndarray, quantiles: np.ndarray, levels: Sequence[float]) -> Estimate:
    """mean over levels t of |share of y <= q_t - t|, for quantiles (N, m)."""
    return _distance(_below(y, quantiles, levels), levels)


def _distance(hits: np.ndarray, levels: Sequence[float]) -> Estimate:
    """The interval is made as ECE's (`calibration.ece`), for the same reason: the plug-in is biased upwards.

    The calibrated method that it is held against has nested intervals, as all central intervals of one distribution are.
    """
    n, t = len(hits), np.asarray(levels, dtype=np.float64)
    off = hits - t
    value = float(np.abs(off.mean(axis=0)).mean())
    values = np.abs(resampled_sums(off)).mean(axis=1) / n
    found = bias_extended(value, values, n, own=BIAS_RATIO, upper=1.0)
    order = np.sort(t)
    rng = np.random.Generator(np.random.Philox(hash_seed(0, 0, 251)))
    counts = rng.multinomial(n, np.diff(order, prepend=0.0, append=1.0), size=REPEATS)
    chance = np.abs(np.cumsum(counts[:, :-1], axis=1) / n - order).mean(axis=1)
    return replace(found, ci_low=0.0) if value <= np.quantile(chance, LEVEL) else found


def _curve(hits: np.ndarray, levels: Sequence[float]) -> CoverageCurve:
    n, level = len(hits), 1 - (1 - LEVEL) / hits.shape[1]
    counts = hits.sum(axis=0)
    low, high = np.array([clopper_pearson(int(k), n, level) for k in counts]).T
    return CoverageCurve(np.asarray(levels, dtype=np.float64), counts / n, low, high, n)


def _inside(y: np.ndarray, low: np.ndarray, high: np.ndarray, nominal: Sequence[float]) -> np.ndarray:
    check_intervals("coverage curve", low, high, y)
    if len(set(nominal)) != len(nominal):
        raise DataError(f"coverage curve: nominal coverages {list(nominal)} repeat")
    check_levels("coverage curve", low, sorted(nominal))
    return np.asarray((low <= y[:, None]) & (y[:, None] <= high))


def _below(y: np.ndarray, quantiles: np.ndarray, levels: Sequence[float]) -> np.ndarray:
    require("quantile curve", y=y, quantiles=quantiles)
    check_levels("quantile curve", quantiles, levels)
    return np.asarray(y[:, None] <= quantiles)
