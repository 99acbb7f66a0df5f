"""Conformal calibration of regression intervals: split, on quantiles, by cross-validation. Pure functions of arrays.

Let s_1 .. s_n be scores of calibration samples that nothing was fitted to, and t the k-th smallest with
k = ceil((1 - alpha)(n + 1)), infinite where k > n. A new sample that is exchangeable with them has s <= t with a probability
of at least 1 - alpha, and at most 1 - alpha + 1/(n + 1) where scores have no ties (Vovk, Gammerman, Shafer 2005; Lei et al.,
JASA 2018). That holds on average over calibration sets and over samples, not given one x.

    absolute residuals    s = |y - v(x)| / sigma(x)            [v - t sigma, v + t sigma]
    quantiles (CQR)       s = max(l(x) - y, y - u(x))          [l - t, u + t]; t < 0 shrinks (Romano et al. 2019)
    CV+, jackknife+       bounds from predictions of the models that did not see sample i (Barber et al. 2021)
"""

from __future__ import annotations

import math

import numpy as np

from robustbench_ext.errors import ConfigError, DataError
from uq.regression import LEVELS, NOMINAL, Prediction, interval_columns

_CELLS = 1 << 24


def rank(n: int, alpha: float) -> int:
    """ceil((1 - alpha)(n + 1)): n + 1 or more means that n scores allow no finite threshold.

    Raises:
        ConfigError: alpha is outside (0, 1).
    """
    if not 0 < alpha < 1:
        raise ConfigError(f"alpha must lie strictly between 0 and 1, got {alpha}")
    return math.ceil((1 - alpha) * (n + 1) - 1e-9)  # 0.9 * 10 is 9, whatever floating point makes of it


def threshold(scores: np.ndarray, alpha: float) -> float:
    """The rank-th smallest of the scores (n,), or infinity; scores may be negative."""
    if scores.ndim != 1 or not np.isfinite(scores).all():
        raise DataError(f"conformal scores must be finite, of shape (n,), got shape {scores.shape}")
    k = rank(len(scores), alpha)
    return math.inf if k > len(scores) else float(np.partition(scores, k - 1)[k - 1])


def interval_scores(y: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """max(low - y, y - high) (n,): how far y lies outside the interval, negative inside."""
    return np.asarray(np.maximum(low - y, y - high))


def thresholds(y: np.ndarray, quantiles: np.ndarray, sides: str = "both") -> np.ndarray:
    """By how much to move the two ends of every interval of NOMINAL outwards, (len(NOMINAL), 2).

    Args:
        y, quantiles: (n,) and (n, len(LEVELS)) of calibration samples.
        sides: "both" ends by one threshold, of the interval's score at 1 - alpha; or "each" by its own, of that end's score
            at 1 - alpha / 2: then each tail has its share, at the price of wider intervals.

    Raises:
        ConfigError: `sides` is neither.
    """
    if sides not in ("both", "each"):
        raise ConfigError(f"sides must be 'both' or 'each', got {sides!r}")
    out = np.empty((len(NOMINAL), 2))
    for row, nominal in enumerate(NOMINAL):
        i, j = interval_columns(nominal)
        low, high, alpha = quantiles[:, i], quantiles[:, j], 1 - nominal
        if sides == "both":
            out[row] = threshold(interval_scores(y, low, high), alpha)
        else:
            out[row] = threshold(low - y, alpha / 2), threshold(y - high, alpha / 2)
    return out


def nested(point: np.ndarray, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Intervals (N, k) of rising coverage, each made to hold the point (N,) and the ones before it.

    Ends only move outwards, so no interval loses coverage; one that had shrunk past itself becomes a point.
    """
    lows = np.minimum.accumulate(np.column_stack([point, low]), axis=1)[:, 1:]
    return lows, np.maximum.accumulate(np.column_stack([point, high]), axis=1)[:, 1:]


def widened(quantiles: np.ndarray, moves: np.ndarray) -> Prediction:
    """A prediction from sorted quantiles (N, len(LEVELS)) whose ends are moved outwards by `moves` (len(NOMINAL), 2)."""
    columns = [interval_columns(c) for c in NOMINAL]
    low, high = quantiles[:, [i for i, _ in columns]], quantiles[:, [j for _, j in columns]]
    return assembled(quantiles[:, LEVELS.index(0.5)], low - moves[:, 0], high + moves[:, 1])


def assembled(point: np.ndarray, low: np.ndarray, high: np.ndarray) -> Prediction:
    """A prediction of nested intervals (N, len(NOMINAL)) about a median (N,), with their ends as its quantiles."""
    low, high = nested(point, low, high)
    quantiles = np.empty((len(point), len(LEVELS)))
    quantiles[:, LEVELS.index(0.5)] = point
    for k, nominal in enumerate(NOMINAL):
        i, j = interval_columns(nominal)
        quantiles[:, i], quantiles[:, j] = low[:, k], high[:, k]
    return Prediction(point, low, high, quantiles)


# Cross-validation ----------------------------------------------------------------------------------------------------


def cv_plus(
    low: np.ndarray, high: np.ndarray, fold: np.ndarray, scores: np.ndarray, alpha: float
) -> tuple[np.ndarray, np.ndarray]:
    """CV+ intervals (N,), (N,): of every new sample, the outer order statistics of low_k(i) - s_i and of high_k(i) + s_i.

    With one fold per sample this is jackknife+; with low = high = a regressor's predictions and absolute residuals it is
    Barber et al.'s original, with quantiles and `interval_scores` the conformalised quantiles of Romano et al.

    Args:
        low, high: (N, K), predictions for N new samples of the K models, model k fitted without fold k.
        fold: (n,), the fold of each of the n training samples.
        scores: (n,), of sample i under the model that did not see its fold.
        alpha: coverage is at least 1 - 2 alpha, less `cv_plus_slack`; about 1 - alpha in practice.
    """
    k, n = rank(len(scores), alpha), len(scores)
    if k > n:
        return np.full(len(low), -np.inf), np.full(len(low), np.inf)
    out_low, out_high = np.empty(len(low)), np.empty(len(low))
    rows = max(1, _CELLS // n)
    for start in range(0, len(low), rows):
        part = slice(start, start + rows)
        out_low[part] = np.partition(low[part][:, fold] - scores, n - k, axis=1)[:, n - k]  # floor(alpha (n + 1))-th
        out_high[part] = np.partition(high[part][:, fold] + scores, k - 1, axis=1)[:, k - 1]
    return np.minimum(out_low, out_high), np.maximum(out_low, out_high)


def cv_min_max(low: np.ndarray, high: np.ndarray, scores: np.ndarray, alpha: float) -> tuple[np.ndarray, np.ndarray]:
    """[min_k low_k - t, max_k high_k + t], arguments as of `cv_plus`; coverage at least 1 - alpha (jackknife-minmax)."""
    t = threshold(scores, alpha)
    least, most = low.min(1) - t, high.max(1) + t
    return np.minimum(least, most), np.maximum(least, most)


def cv_plus_slack(n: int, k: int) -> float:
    """What CV+ with k folds of n samples may lose below 1 - 2 alpha: less than sqrt(2 / n); zero for jackknife+."""
    return max(0.0, min(2 * (1 - 1 / k) / (n / k + 1), (1 - k / n) / (k + 1)))
