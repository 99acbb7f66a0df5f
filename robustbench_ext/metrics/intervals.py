"""Confidence intervals: closed forms for proportions, a vectorised bootstrap for the rest."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import lru_cache

import numpy as np
from scipy.special import betaincinv, ndtri, stdtrit

from robustbench_ext.errors import DataError
from robustbench_ext.metrics.estimate import LEVEL, Estimate, require

REPEATS = 1000
_BLOCK = 1 << 22  # weights per block of resamples: 32 MiB


def wilson(k: float, n: float, level: float = LEVEL) -> tuple[float, float]:
    """Wilson's score interval for k successes of n. Never leaves [0, 1]; exact at the ends k = 0 and k = n.

    Effective counts need not be whole numbers.

    >>> [round(v, 6) for v in wilson(5, 10)]
    [0.236593, 0.763407]
    """
    _check_counts(k, n)
    z = -float(ndtri((1 - level) / 2))
    p, z2 = k / n, z * z
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return (0.0 if k == 0 else max(0.0, centre - half)), (1.0 if k == n else min(1.0, centre + half))


def clopper_pearson(k: float, n: float, level: float = LEVEL) -> tuple[float, float]:
    """The exact (conservative) interval for k successes of n; effective counts need not be whole numbers.

    >>> [round(v, 6) for v in clopper_pearson(0, 10)]
    [0.0, 0.308497]
    """
    _check_counts(k, n)
    a = (1 - level) / 2
    low = 0.0 if k == 0 else float(betaincinv(k, n - k + 1, a))
    high = 1.0 if k == n else float(betaincinv(k + 1, n - k, 1 - a))
    return low, high


def _check_counts(k: float, n: float) -> None:
    if n < 1 or not 0 <= k <= n:
        raise DataError(f"{k} successes of {n}: expected n >= 1 and 0 <= k <= n")


def proportion(successes: np.ndarray, level: float = LEVEL) -> Estimate:
    """The share of true entries, with Wilson's interval."""
    k, n = int(np.count_nonzero(successes)), len(successes)
    low, high = wilson(k, n, level)
    return Estimate(k / n, low, high, "Wilson", n, level=level)


def _weights(n: int, repeats: int, seed: int) -> np.ndarray:
    """How often each of n samples is drawn in each of `repeats` resamples of size n: (repeats, n) float64."""
    rng = np.random.Generator(np.random.Philox(seed))
    drawn = rng.integers(0, n, size=(repeats, n)) + np.arange(repeats)[:, None] * n
    return np.bincount(drawn.ravel(), minlength=repeats * n).reshape(repeats, n).astype(np.float64)


@lru_cache(maxsize=8)
def _cached_weights(n: int, repeats: int, seed: int) -> np.ndarray:
    return _weights(n, repeats, seed)


def resamples(sizes: tuple[int, ...], repeats: int = REPEATS, seed: int = 0) -> Iterator[tuple[np.ndarray, ...]]:
    """Blocks of bootstrap weights for one or more groups, each resampled by itself (stratified).

    The same (sizes, repeats, seed) always gives the same weights, so metrics of one condition, and of two models on the
    same samples, are resampled jointly. Memory stays bounded at any n; small cases are kept for the next metric.
    """
    rows = max(1, _BLOCK // max(1, sum(sizes)))
    for block, start in enumerate(range(0, repeats, rows)):
        count = min(rows, repeats - start)
        make = _cached_weights if count == repeats else _weights
        yield tuple(make(n, count, hash_seed(seed, block, group)) for group, n in enumerate(sizes))


def hash_seed(seed: int, block: int, group: int) -> int:
    """Distinct generator keys for distinct (seed, block, group)."""
    return ((seed + 1) << 40) + (block << 8) + group


def bootstrap(
    value: float,
    statistic: Callable[..., np.ndarray],
    sizes: tuple[int, ...],
    n: int,
    *,
    repeats: int = REPEATS,
    seed: int = 0,
    level: float = LEVEL,
) -> Estimate:
    """Percentile interval of a statistic.

    Args:
        value: the statistic on the sample itself.
        statistic: maps weights (r, n_g), one argument per group, to r values.
        sizes: the groups' sizes.
    """
    values = np.concatenate([statistic(*weights) for weights in resamples(sizes, repeats, seed)])
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(value, float(low), float(high), f"bootstrap ({repeats})", n, level=level)


def bootstrap_mean(values: np.ndarray, **options: int) -> Estimate:
    """The mean of per-sample values, with a percentile interval."""
    n = len(values)
    if not np.isfinite(values).all():
        return Estimate(
            float(values.mean()), math.nan, math.nan, "none", n, "an infinite term has no bootstrap interval"
        )
    return bootstrap(float(values.mean()), lambda w: w @ values / n, (n,), n, **options)  # type: ignore[arg-type]


def seed_spread(values: np.ndarray, level: float = LEVEL) -> Estimate:
    """The mean of a metric over k trainings from different seeds, with Student's interval: what another training would give.

    The test samples are taken as they are: the interval says nothing of other samples. The trainings' own spread is all that it
    knows, so with two or three of them it is wide.

    Args:
        values: (k,), one per training.
    """
    require("spread over seeds", values=values)
    values = np.asarray(values, dtype=np.float64)
    k, mean = len(values), float(np.mean(values))
    method = f"Student over {k} seeds"
    if k < 2:
        return Estimate(mean, math.nan, math.nan, "none", k, "one seed shows no spread", level)
    if not np.isfinite(values).all():
        return Estimate(mean, math.nan, math.nan, "none", k, "an infinite value has no spread", level)
    half = float(stdtrit(k - 1, (1 + level) / 2)) * float(values.std(ddof=1)) / math.sqrt(k)
    return Estimate(mean, mean - half, mean + half, method, k, level=level)
