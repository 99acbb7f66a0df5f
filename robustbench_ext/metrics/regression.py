"""Regression: errors of the point prediction; coverage, width and score of central intervals. Units are those of y.

An interval [l, u] of nominal coverage 1 - a covers y where l <= y <= u, both ends included. Coverage alone says nothing:
infinite intervals cover everything. The interval score (Winkler 1972; Gneiting and Raftery 2007)

    IS_a = (u - l) + 2/a (l - y)+ + 2/a (y - u)+

is smallest on average for the true quantiles at a/2 and 1 - a/2, and pays for width and misses at once.

The interval of a coverage is Wilson's, as of every proportion in this project: it has its level on average over true values
(Clopper and Pearson's has more), and unlike a bootstrap it does not collapse where every sample is covered. It speaks of this
fitted estimator; what another calibration set would have made of it is not in it.
"""

from __future__ import annotations

import numpy as np

from robustbench_ext.errors import DataError
from robustbench_ext.metrics.estimate import LEVEL, Estimate, require
from robustbench_ext.metrics.intervals import proportion, wilson
from robustbench_ext.metrics.resampling import percentile, resampled_sums, sample_mean

# Point predictions --------------------------------------------------------------------------------------------------------


def rmse(y: np.ndarray, point: np.ndarray) -> Estimate:
    """sqrt(mean (y - point)^2) of targets and predictions, each (N,); percentile bootstrap over samples."""
    squares = _errors("RMSE", y, point) ** 2
    drawn = resampled_sums(np.stack([np.ones(len(y)), squares], axis=1))
    return percentile(float(np.sqrt(squares.mean())), np.sqrt(drawn[:, 1] / drawn[:, 0]), len(y))


def mae(y: np.ndarray, point: np.ndarray) -> Estimate:
    """mean |y - point|, each (N,); percentile bootstrap over samples."""
    return sample_mean(np.abs(_errors("MAE", y, point)))


def r2(y: np.ndarray, point: np.ndarray) -> Estimate:
    """1 - sum (y - point)^2 / sum (y - mean y)^2; undefined where all targets are equal. Percentile bootstrap."""
    errors, n = _errors("R2", y, point), len(y)
    off = y - y.astype(np.float64).mean()
    if not (off**2).sum() > 0 or y.min() == y.max():
        return Estimate.undefined(n, "all targets are equal")
    drawn = resampled_sums(np.stack([np.ones(n), off, off**2, errors**2], axis=1))
    spread = drawn[:, 2] - drawn[:, 1] ** 2 / drawn[:, 0]
    spread_there = spread > 1e-12 * drawn[:, 2]  # a resample may hold one target alone, many times
    values = 1 - drawn[spread_there, 3] / spread[spread_there]
    return percentile(float(1 - (errors**2).sum() / (off**2).sum()), values, n)


# Intervals ----------------------------------------------------------------------------------------------------------------


def covered(y: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Whether l <= y <= u, bool (N,), for one interval per sample; ends may be infinite.

    Raises:
        DataError: empty, NaN, different lengths, an interval that ends before it begins.
    """
    check_intervals("coverage", low, high, y)
    return np.asarray((low <= y) & (y <= high))


def coverage(y: np.ndarray, low: np.ndarray, high: np.ndarray) -> Estimate:
    """Share of samples inside their interval (PICP), with Wilson's interval."""
    return proportion(covered(y, low, high))


def side_coverage(y: np.ndarray, point: np.ndarray, low: np.ndarray, high: np.ndarray) -> dict[str, Estimate]:
    """`coverage_above` = P(y <= u | y > point) and `coverage_below` = P(y >= l | y < point), with Wilson's intervals.

    Undefined where a side has no samples. Samples that hit the point exactly are on neither side.
    """
    check_intervals("coverage of sides", low, high, y)
    above, below = y > _same("coverage of sides", y, point), y < point
    return {
        "coverage_above": _share((y <= high)[above], "no target lies above its point prediction"),
        "coverage_below": _share((y >= low)[below], "no target lies below its point prediction"),
    }


def side_error(y: np.ndarray, point: np.ndarray, low: np.ndarray, high: np.ndarray, nominal: float) -> Estimate:
    """|coverage above - nominal| + |coverage below - nominal| (SPIECE, arXiv 2509.13262).

    The interval adds what both sides' Wilson intervals at level 1 - (1 - level) / 2 allow; undefined where a side is empty.
    """
    _check_nominal(nominal)
    sides = side_coverage(y, point, low, high).values()
    for side in sides:
        if not side.n:
            return Estimate.undefined(0, side.reason)
    value = sum(abs(side.value - nominal) for side in sides)
    least = most = 0.0
    for side in sides:
        a, b = wilson(round(side.value * side.n), side.n, 1 - (1 - LEVEL) / 2)
        least += max(0.0, a - nominal, nominal - b)
        most += max(abs(a - nominal), abs(b - nominal))
    return Estimate(value, least, most, "Wilson, Bonferroni", sum(side.n for side in sides))


def width(low: np.ndarray, high: np.ndarray) -> Estimate:
    """mean (u - l) (MPIW): how sharp the intervals are. Infinite, without an interval, where one of them is."""
    check_intervals("width", low, high)
    return sample_mean(high.astype(np.float64) - low)


def width_normalised(y: np.ndarray, low: np.ndarray, high: np.ndarray, by: str = "std") -> Estimate:
    """Mean width divided by the spread of y over these samples (NMPIW): 1 is as wide as y varies.

    Args:
        by: "std", the standard deviation of y (divisor N), or "range", its range, which grows with N.
    """
    check_intervals("normalised width", low, high, y)
    if by not in ("std", "range"):
        raise DataError(f"normalised width: by = {by!r}, expected 'std' or 'range'")
    wide, n = high.astype(np.float64) - low, len(y)
    off = y - y.astype(np.float64).mean()
    if y.min() == y.max():
        return Estimate.undefined(n, "all targets are equal")
    if by == "range" or not np.isfinite(wide).all():
        scale = float(y.max() - y.min()) if by == "range" else float(off.std())
        return sample_mean(wide / scale)  # a range has no bootstrap distribution to speak of: it is taken as given
    drawn = resampled_sums(np.stack([np.ones(n), off, off**2, wide], axis=1))
    variance = drawn[:, 2] / drawn[:, 0] - (drawn[:, 1] / drawn[:, 0]) ** 2
    there = variance > 1e-12 * off.var()
    values = (drawn[:, 3] / drawn[:, 0])[there] / np.sqrt(variance[there])
    return percentile(float(wide.mean() / off.std()), values, n)


def interval_scores(y: np.ndarray, low: np.ndarray, high: np.ndarray, nominal: float) -> np.ndarray:
    """IS_a of each sample, float64 (N,), with a = 1 - nominal: the width where y is covered, more where it is not.

    >>> interval_scores(np.array([3.0, 1.0]), np.zeros(2), np.full(2, 2.0), 0.9).round(9).tolist()
    [22.0, 2.0]
    """
    _check_nominal(nominal)
    check_intervals("interval score", low, high, y)
    missed = np.maximum(low - y.astype(np.float64), 0.0) + np.maximum(y.astype(np.float64) - high, 0.0)
    return np.asarray((high.astype(np.float64) - low) + 2.0 / (1.0 - nominal) * missed)


def interval_score(y: np.ndarray, low: np.ndarray, high: np.ndarray, nominal: float) -> Estimate:
    """The mean interval score; percentile bootstrap. Infinite, without an interval, where an interval is."""
    return sample_mean(interval_scores(y, low, high, nominal))


def sharpness(std: np.ndarray) -> Estimate:
    """sqrt(mean sd^2) of predicted standard deviations (N,), each >= 0; percentile bootstrap.

    For intervals sharpness is their `width`.
    """
    require("sharpness", std=std)
    if std.ndim != 1 or std.min() < 0 or not np.isfinite(std).all():
        raise DataError(f"sharpness: standard deviations of shape {std.shape}, expected (N,), finite and not negative")
    return rmse(std, np.zeros(len(std)))


# Checks -------------------------------------------------------------------------------------------------------------------


def check_intervals(name: str, low: np.ndarray, high: np.ndarray, y: np.ndarray | None = None) -> None:
    """Raise DataError unless low <= high are of equal shape without NaN, one row per target; targets are finite.

    Ends may be infinite, but not both at the same place: such an interval has no width.
    """
    require(name, low=low, high=high, **({} if y is None else {"y": y}))
    if low.shape != high.shape:
        raise DataError(f"{name}: low {low.shape} and high {high.shape}, expected equal shapes")
    if y is not None and (y.ndim != 1 or not np.isfinite(y).all()):
        raise DataError(f"{name}: y of shape {y.shape}, expected (N,), finite")
    if (low > high).any() or (low == np.inf).any() or (high == -np.inf).any():
        raise DataError(
            f"{name}: an interval ends before it begins, or begins at infinity, at row {_first_bad(low, high)}. Sort crossed "
            f"quantiles first."
        )


def _first_bad(low: np.ndarray, high: np.ndarray) -> int:
    bad = (low > high) | (low == np.inf) | (high == -np.inf)
    return int(np.argwhere(bad)[0][0])


def _check_nominal(nominal: float) -> None:
    if not 0 < nominal < 1:
        raise DataError(f"nominal coverage = {nominal}, expected a number between 0 and 1, such as 0.9")


def _same(name: str, y: np.ndarray, point: np.ndarray) -> np.ndarray:
    require(name, y=y, point=point)
    if y.shape != point.shape or y.ndim != 1 or not (np.isfinite(y).all() and np.isfinite(point).all()):
        raise DataError(f"{name}: y {y.shape} and point {point.shape}, expected (N,) and (N,), finite")
    return point


def _errors(name: str, y: np.ndarray, point: np.ndarray) -> np.ndarray:
    return np.asarray(y.astype(np.float64) - _same(name, y, point))


def _share(flags: np.ndarray, reason: str) -> Estimate:
    return proportion(flags) if len(flags) else Estimate.undefined(0, reason)
