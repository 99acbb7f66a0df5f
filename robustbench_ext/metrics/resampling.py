"""Bootstrap intervals that stay affordable at a million samples, and do not exclude the truth where a statistic is biased.

A statistic of sums over samples (a mean, a root mean square, anything binned) is resampled through its sums. Above `LIMIT`
samples these are first added up in `GROUPS` random groups, and groups are resampled: the same distribution, but for a standard
error that is itself known to 1 / sqrt(2 GROUPS) = 1.1 %. Statistics of ranks cannot be added up; above `LIMIT` samples their
standard error comes from `BATCHES` random batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from scipy.special import stdtrit

from robustbench_ext.metrics.estimate import LEVEL, Estimate
from robustbench_ext.metrics.intervals import REPEATS, bootstrap_mean, hash_seed, resamples

GROUPS, BATCHES = 4096, 64
LIMIT = 4 * GROUPS
_PURPOSE = 253  # of the generator that shuffles samples into groups


def resampled_sums(columns: np.ndarray, repeats: int = REPEATS, seed: int = 0) -> np.ndarray:
    """Sums of columns (N, d) over bootstrap resamples of the N samples: (repeats, d)."""
    if len(columns) > LIMIT:
        place = groups(len(columns), seed)
        columns = np.stack([np.bincount(place, column, GROUPS) for column in columns.T], axis=1)
    return weighted(columns, repeats, seed)


def resampled_bin_sums(
    index: np.ndarray, *values: np.ndarray, bins: int, repeats: int = REPEATS, seed: int = 0
) -> np.ndarray:
    """Sums of each of the values (N,) within each bin over bootstrap resamples: (len(values), repeats, bins).

    Args:
        index: int (N,), each sample's bin.
    """
    rows, place = bin_rows(len(index), seed)
    cells = place * bins + index
    table = np.concatenate([np.bincount(cells, v, rows * bins).reshape(rows, bins) for v in values], axis=1)
    sums = weighted(table, repeats, seed).reshape(-1, len(values), bins)
    return np.ascontiguousarray(sums.swapaxes(0, 1))


def bin_rows(n: int, seed: int = 0) -> tuple[int, np.ndarray]:
    """How many units are resampled (samples, or groups of them), and each sample's unit, int (n,)."""
    return (GROUPS, groups(n, seed)) if n > LIMIT else (n, np.arange(n))


def weighted(rows: np.ndarray, repeats: int, seed: int) -> np.ndarray:
    """Sums of rows (R, d) over resamples of the rows: (repeats, d)."""
    return np.concatenate([w @ rows for (w,) in resamples((len(rows),), repeats, seed)])


def groups(n: int, seed: int) -> np.ndarray:
    """A random group for each of n samples, int (n,) below `GROUPS`; sizes differ by one at most."""
    return np.asarray(_shuffled(n, seed) % GROUPS)


def _shuffled(n: int, seed: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(hash_seed(seed, 0, _PURPOSE))).permutation(n)


def percentile(value: float, values: np.ndarray, n: int, method: str = f"bootstrap ({REPEATS})") -> Estimate:
    """The percentile interval of resampled values (repeats,); none for one sample, whose resamples are all alike."""
    if n < 2:
        return Estimate(value, math.nan, math.nan, "none", n, "one sample has no bootstrap interval")
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(value, float(low), float(high), method, n)


def resampled_mean(values: np.ndarray) -> Estimate:
    """The mean of values (N,): `intervals.bootstrap_mean` up to `LIMIT` of them, `sample_mean`, which adds them up, above."""
    return bootstrap_mean(values) if len(values) <= LIMIT else sample_mean(values)


def sample_mean(values: np.ndarray, seed: int = 0) -> Estimate:
    """The mean of values (N,), with a bootstrap interval; none where a value is infinite."""
    values = np.asarray(values, dtype=np.float64)
    n, value = len(values), float(np.mean(values))
    if not np.isfinite(values).all():
        return Estimate(value, math.nan, math.nan, "none", n, "an infinite term has no bootstrap interval")
    drawn = resampled_sums(np.stack([np.ones(n), values - value], axis=1), seed=seed)
    return percentile(value, value + drawn[:, 1] / drawn[:, 0], n)


def bias_extended(
    value: float,
    values: np.ndarray,
    n: int,
    *,
    own: float = 1.0,
    downwards: bool = False,
    lower: float = 0.0,
    upper: float = math.inf,
) -> Estimate:
    """The percentile interval of a plug-in statistic that is biased, put right so that it does not miss the truth.

    Resampling does to the sample what sampling did to the truth: resampled values are biased against `value`, and `value`
    against the truth. The end away from the bias is moved back by the bias that resampling shows, and by the statistic's
    own bias as it would be at its worst; the other end by the former alone. The interval always holds `value`.

    Args:
        values: (repeats,), the statistic on resamples.
        own: the statistic's own bias over the one that resampling shows: 1 where it is quadratic.
        downwards: the bias is known to be downwards (of a concave statistic), not upwards (of a convex one).
        lower, upper: what the statistic can be.
    """
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    shown = float(values.mean()) - value
    bias = min(0.0, shown) if downwards else max(0.0, shown)
    low, high = float(low) - bias - max(0.0, own * bias), float(high) - bias - min(0.0, own * bias)
    ends = max(lower, min(value, low)), min(upper, max(value, high))
    return Estimate(value, *ends, f"bootstrap ({len(values)}), bias-extended", n)


def of_ranks(
    value: float,
    weighted_statistic: Callable[[np.ndarray], np.ndarray],
    statistic: Callable[[np.ndarray], float],
    n: int,
    *,
    lower: float = -math.inf,
    upper: float = math.inf,
    seed: int = 0,
) -> Estimate:
    """An interval for a statistic of ranks: bootstrap up to `LIMIT` samples, Student's t over random batches above.

    Args:
        value: on all samples.
        weighted_statistic: maps weights (r, n) to r values, NaN where undefined.
        statistic: maps positions (m,) of samples to the value of these.
        lower, upper: what the statistic can be.
    """
    if n <= LIMIT:
        values = np.concatenate([weighted_statistic(w) for (w,) in resamples((n,), REPEATS, seed)])
        values = values[~np.isnan(values)]
        if not len(values) or np.ptp(values) <= 1e-12 * max(1.0, abs(value)):
            # No resample can show what no sample shows: a perfect order of five samples must not look certain.
            return Estimate(value, math.nan, math.nan, "none", n, "no resample differs")
        return percentile(value, values, n)
    return over_batches(value, statistic, n, lower=lower, upper=upper, seed=seed)


def over_batches(
    value: float,
    statistic: Callable[[np.ndarray], float],
    n: int,
    *,
    lower: float = -math.inf,
    upper: float = math.inf,
    seed: int = 0,
) -> Estimate:
    """Student's interval from the spread of a statistic over `BATCHES` random batches of the n samples; see `of_ranks`.

    A statistic of m samples that varies as 1 / sqrt(m) varies sqrt(BATCHES) times less on all samples than on a batch.
    """
    found = np.array([statistic(batch) for batch in np.array_split(_shuffled(n, seed), BATCHES)])
    half = float(stdtrit(BATCHES - 1, (1 + LEVEL) / 2)) * float(found.std(ddof=1)) / math.sqrt(BATCHES)
    return Estimate(value, max(lower, value - half), min(upper, value + half), f"t over {BATCHES} batches", n)
