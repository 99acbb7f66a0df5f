"""Confidence intervals: closed forms for proportions, a vectorised bootstrap for the rest."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Literal

import numpy as np
from scipy.special import betaincinv, ndtr, ndtri, stdtrit

from robustbench_ext.errors import DataError
from robustbench_ext.metrics.estimate import LEVEL, Estimate, require

REPEATS = 1000
_PATHS = 4000
_BLOCK = 1 << 22  # weights per block of resamples: 32 MiB
_DRAWN = 1 << 18  # samples drawn at once: 2 MiB
_KEPT = 1 << 24  # weights of all blocks that are kept for the next metric: 128 MiB


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


def clopper_pearson_all(k: np.ndarray, n: np.ndarray, level: float = LEVEL) -> tuple[np.ndarray, np.ndarray]:
    """Both ends of `clopper_pearson` for many counts k of n, (m,) each."""
    a = (1 - level) / 2
    with np.errstate(invalid="ignore"):
        low = np.where(k <= 0, 0.0, betaincinv(np.maximum(k, 1e-300), n - k + 1, a))
        high = np.where(k >= n, 1.0, betaincinv(k + 1, np.maximum(n - k, 1e-300), 1 - a))
    return low, high


def _check_counts(k: float, n: float) -> None:
    if n < 1 or not 0 <= k <= n:
        raise DataError(f"{k} successes of {n}: expected n >= 1 and 0 <= k <= n")


def simultaneous_level(spreads: Sequence[np.ndarray], level: float = LEVEL) -> float:
    """The pointwise level at which intervals hold at all points at once, with probability `level`.

    For independent running sums W_g over growing samples: the points of group g are W_g(t), t the given times, standardised.
    The quantile of the largest |W_g(t)| / sd is found by simulation (always the same numbers).

    Args:
        spreads: one (m,) of ascending times >= 0 per group; a bridge's time p / (1 - p) makes it an empirical distribution's.
    """
    rng = np.random.Generator(np.random.Philox(hash_seed(0, 0, 250)))
    largest = np.zeros(_PATHS)
    for times in spreads:
        times = np.unique(times[(times > 0) & np.isfinite(times)])
        if len(times):
            steps = rng.normal(size=(_PATHS, len(times))) * np.sqrt(np.diff(times, prepend=0.0))
            np.maximum(largest, (np.abs(np.cumsum(steps, axis=1)) / np.sqrt(times)).max(axis=1), out=largest)
    return 1 - 2 * float(ndtr(-np.quantile(largest, level)))


def proportion(successes: np.ndarray, level: float = LEVEL) -> Estimate:
    """The share of true entries, with Wilson's interval."""
    k, n = int(np.count_nonzero(successes)), len(successes)
    low, high = wilson(k, n, level)
    return Estimate(k / n, low, high, "Wilson", n, level=level)


def _weights(n: int, repeats: int, seed: int) -> np.ndarray:
    """How often each of n samples is drawn in each of `repeats` resamples of size n: (repeats, n) float64.

    A sample's weights lie side by side in memory, so that statistics of ranks can take `weights.T` sample by sample.
    """
    rng = np.random.Generator(np.random.Philox(seed))
    weights: np.ndarray = np.empty((n, repeats)).T
    rows = max(1, _DRAWN // n)
    for start in range(0, repeats, rows):
        count = min(rows, repeats - start)
        drawn = rng.integers(0, n, size=(count, n)) + np.arange(count)[:, None] * n
        weights[start : start + count] = np.bincount(drawn.ravel(), minlength=count * n).reshape(count, n)
    return weights


def running_sums(rows: np.ndarray) -> np.ndarray:
    """Sums of the first 0, 1, ..., n rows of (n, r): (n + 1, r) float64.

    Row by row: adding whole rows is several times faster than numpy's cumulative sum, which adds number by number.
    """
    sums = np.empty((len(rows) + 1, rows.shape[1]))
    sums[0] = 0.0
    if rows.shape[1] == 1:
        np.cumsum(rows[:, 0], out=sums[1:, 0])
        return sums
    for i, row in enumerate(rows):
        np.add(sums[i], row, out=sums[i + 1])
    return sums


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
        make = _cached_weights if repeats * sum(sizes) <= _KEPT else _weights
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
    method: Literal["percentile", "bca"] = "percentile",
) -> Estimate:
    """A bootstrap interval of a statistic, the groups resampled each by itself.

    "bca" (Efron, J. Am. Statist. Assoc. 82, 1987) reads the percentiles where the median bias of the resamples and the
    acceleration (from a jackknife, of groups of samples where there are many) say; second-order accurate for smooth statistics.
    It has to know the statistic at weights that are not whole numbers, and takes `_JACKKNIFE` more values of it per group.

    Args:
        value: the statistic on the sample itself.
        statistic: maps weights (r, n_g), one argument per group, each adding up to n_g, to r values.
        sizes: the groups' sizes.
    """
    values = np.concatenate([statistic(*weights) for weights in resamples(sizes, repeats, seed)])
    if method == "percentile":
        low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
        return Estimate(value, float(low), float(high), f"bootstrap ({repeats})", n, level=level)
    below = ((values < value).mean() + (values <= value).mean()) / 2
    if not 0 < below < 1:
        reason = "all resamples lie on one side of the value"
        return Estimate(value, math.nan, math.nan, "none", n, reason, level)
    bias, z = float(ndtri(below)), np.array([1.0, -1.0]) * float(ndtri((1 - level) / 2))
    at = ndtr(bias + (bias + z) / (1 - _acceleration(statistic, sizes, seed) * (bias + z)))
    low, high = np.quantile(values, at)
    return Estimate(value, float(low), float(high), f"BCa bootstrap ({repeats})", n, level=level)


_JACKKNIFE = 512  # values per group of samples


def _acceleration(statistic: Callable[..., np.ndarray], sizes: tuple[int, ...], seed: int) -> float:
    """A sixth of the skewness of the statistic's empirical influences, from a jackknife over (random sets of) samples."""
    cubes, squares = 0.0, 0.0
    for group, size in enumerate(sizes):
        parts = min(size, _JACKKNIFE)
        rng = np.random.Generator(np.random.Philox(hash_seed(seed, 1, 252 - group)))
        member = rng.permutation(size) % parts
        rows = max(1, _BLOCK // size)
        found = []
        for start in range(0, parts, rows):
            left_out = np.arange(start, min(start + rows, parts))[:, None] == member
            kept = size - left_out.sum(axis=1, keepdims=True)
            weights = [np.ones((len(left_out), m)) for m in sizes]
            weights[group] = np.where(left_out, 0.0, size / np.maximum(kept, 1))
            found.append(statistic(*weights))
        influence = (parts - 1) / parts * (np.mean(np.concatenate(found)) - np.concatenate(found))
        cubes, squares = cubes + float((influence**3).sum()), squares + float((influence**2).sum())
    return cubes / (6 * squares**1.5) if squares > 0 else 0.0


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
