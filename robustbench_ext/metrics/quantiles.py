"""Scores of predicted quantiles: pinball loss, weighted interval score, crossing. Units are those of y.

With psi_t(y - q) = max(t (y - q), (t - 1)(y - q)), the interval score of the quantiles at a/2 and 1 - a/2 is 2/a times the sum
of their pinball losses. The weighted interval score comes on two scales, kept apart by name:

    wis_sum    |y - median| + sum_a a IS_a = 2 sum_t psi_t           (Fakoor et al. 2023, arXiv 2103.00083)
    wis_mean   wis_sum / number of levels = 2 mean_t psi_t           (Bracher et al. 2021, arXiv 2005.12881)

so that quantiles, and the median with its nested central intervals, give the same number.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from robustbench_ext.errors import DataError
from robustbench_ext.metrics.estimate import Estimate, require
from robustbench_ext.metrics.intervals import wilson
from robustbench_ext.metrics.regression import interval_scores
from robustbench_ext.metrics.resampling import sample_mean


def pinball_losses(y: np.ndarray, quantiles: np.ndarray, levels: Sequence[float]) -> np.ndarray:
    """psi of every sample and level, float64 (N, m), each >= 0.

    Args:
        y: targets (N,), finite; quantiles: (N, m), an infinite one costs infinitely much; levels: m increasing numbers
            between 0 and 1.
    """
    require("pinball loss", y=y, quantiles=quantiles)
    check_levels("pinball loss", quantiles, levels)
    if y.ndim != 1 or not np.isfinite(y).all():
        raise DataError(f"pinball loss: y of shape {y.shape}, expected (N,), finite")
    off = y.astype(np.float64)[:, None] - quantiles
    t = np.asarray(levels, dtype=np.float64)
    return np.asarray(np.maximum(t * off, (t - 1) * off))


def pinball(y: np.ndarray, quantiles: np.ndarray, levels: Sequence[float]) -> Estimate:
    """The mean pinball loss over samples and levels; percentile bootstrap over samples."""
    return sample_mean(pinball_losses(y, quantiles, levels).mean(axis=1))


def wis_from_quantiles(y: np.ndarray, quantiles: np.ndarray, levels: Sequence[float]) -> dict[str, Estimate]:
    """`wis_sum` and `wis_mean` from quantiles (N, m) at levels that are symmetric about 1/2.

    Without a median among the levels it is the score of the intervals alone.
    """
    t = np.asarray(levels, dtype=np.float64)
    losses = pinball_losses(y, quantiles, levels)
    if not np.allclose(t + t[::-1], 1.0, atol=1e-9):
        raise DataError(f"WIS: levels {list(levels)} are not symmetric about 1/2, so they make no central intervals")
    return _wis(2.0 * losses.sum(axis=1), len(t))


def wis_from_intervals(
    y: np.ndarray, median: np.ndarray, low: np.ndarray, high: np.ndarray, nominal: Sequence[float]
) -> dict[str, Estimate]:
    """`wis_sum` and `wis_mean` from the median (N,) and central intervals (N, K) of K nominal coverages.

    A method whose point prediction is no median is scored as if it were: what it says in the median's place counts.
    """
    require("WIS", y=y, median=median, low=low)
    if low.ndim != 2 or low.shape[1] != len(nominal) or high.shape != low.shape or median.shape != y.shape:
        raise DataError(
            f"WIS: y {y.shape}, median {median.shape}, low {low.shape}, high {high.shape}, {len(nominal)} nominal coverages; "
            f"expected (N,), (N,), (N, K), (N, K), K"
        )
    total = np.abs(y.astype(np.float64) - median)
    for k, c in enumerate(nominal):
        total = total + (1.0 - c) * interval_scores(y, low[:, k], high[:, k], c)
    return _wis(total, 2 * len(nominal) + 1)


def _wis(sums: np.ndarray, levels: int) -> dict[str, Estimate]:
    return {"wis_sum": sample_mean(sums), "wis_mean": sample_mean(sums / levels)}


def crossings(quantiles: np.ndarray) -> np.ndarray:
    """How many adjacent pairs of a sample's quantiles (N, m) cross, q_{k+1} < q_k: int (N,)."""
    require("crossing", quantiles=quantiles)
    return np.asarray((np.diff(quantiles, axis=1) < 0).sum(axis=1))


def crossing_rate(crossed: np.ndarray, pairs: int) -> Estimate:
    """Share of adjacent pairs of quantiles that crossed.

    The interval is Wilson's with n samples, not pairs: the pairs of a sample are not independent, and no variable in [0, 1]
    varies more than a proportion of the same mean. So it is on the wide side, and does not collapse where nothing crossed.

    Args:
        crossed: (N,), pairs that crossed, of each sample, as `crossings` counts them before the quantiles are sorted.
        pairs: adjacent pairs of each sample: levels less one.
    """
    require("crossing rate", crossed=crossed)
    if pairs < 1 or crossed.min() < 0 or crossed.max() > pairs:
        raise DataError(f"crossing rate: counts from {crossed.min()} to {crossed.max()} of {pairs} pairs")
    n, value = len(crossed), float(crossed.mean()) / pairs
    return Estimate(value, *wilson(value * n, n), "Wilson, samples", n)


def check_levels(name: str, quantiles: np.ndarray, levels: Sequence[float]) -> None:
    """Raise DataError unless the levels increase within (0, 1) and there is one column of quantiles for each."""
    t = np.asarray(levels, dtype=np.float64)
    if quantiles.ndim != 2 or quantiles.shape[1] != len(t) or not len(t):
        raise DataError(f"{name}: quantiles {quantiles.shape} and {len(t)} levels, expected (N, m) and m >= 1")
    if t[0] <= 0 or t[-1] >= 1 or (np.diff(t) <= 0).any():
        raise DataError(f"{name}: levels {list(levels)}, expected increasing numbers between 0 and 1")
