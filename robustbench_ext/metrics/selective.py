"""Selective prediction: answer the samples that look safest, and measure the errors among them.

Sort by score, least suspicious first; e_(i) = 1 where the classifier errs. The risk at coverage i/N is R_i = mean of the
first i errors, and AURC = mean of R_i (Geifman, Uziel, El-Yaniv 2019, arXiv 1805.08206). With k errors the best possible
is AURC* = 1/N sum_{i=N-k+1}^{N} (i - (N - k)) / i, and E-AURC = AURC - AURC*. Tied scores take the expectation over random
orders: within a block of ties every error is replaced by the block's mean, so nothing depends on the order of samples.

AUGRC (Traub et al. 2024, arXiv 2407.01032) takes the generalised risk, the probability of being answered and wrong, in place of
R_i: 1/N sum_i 1/N sum_{j <= i} e_(j). AUSE (Ilg et al. 2018, arXiv 1802.07095) does for errors of any size what E-AURC does for
mistakes: it is the area between the curve of R_i and the oracle's, which sorts by the errors themselves.
"""

from __future__ import annotations

import math

import numpy as np

from robustbench_ext.errors import DataError
from robustbench_ext.metrics.estimate import LEVEL, Estimate, require
from robustbench_ext.metrics.intervals import clopper_pearson_all, resamples, running_sums, simultaneous_level
from robustbench_ext.metrics.resampling import LIMIT, of_ranks, over_batches, percentile

_EDGE = 0.05  # how far around a coverage, in samples over N, its edge is taken to reach


class _Blocks:
    """Samples in order of their scores, with blocks of ties."""

    def __init__(self, scores: np.ndarray, errors: np.ndarray) -> None:
        require("selective prediction", scores=scores, errors=errors)
        order = np.argsort(scores, kind="stable")
        ordered = scores[order]
        first = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))
        self.order, self._first = order, first
        self._sizes = np.diff(np.append(first, len(order)))
        self._errors = errors[order].astype(np.float64)

    def expected(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Weights (r, N) as (N, r), in order, and each sample's expected error, (N, 1) or (N, r): the mean of its block."""
        w = weights.T[self.order]
        if len(self._first) == len(self.order):
            return w, self._errors[:, None]
        mass = np.add.reduceat(w, self._first, axis=0)
        mean = np.add.reduceat(w * self._errors[:, None], self._first, axis=0) / np.maximum(mass, 1e-300)
        return w, np.repeat(mean, self._sizes, axis=0)


def _aurc(blocks: _Blocks, weights: np.ndarray) -> np.ndarray:
    """AURC (r,) under integer weights (r, N): a sample of weight w stands for w copies of equal score.

    The copies' mean risk is taken at their middle, which is exact for w = 1.
    """
    w, error = blocks.expected(weights)
    coverage, errors = running_sums(w)[1:], running_sums(w * error)[1:]
    half = (w - 1) / 2
    risk = (errors - half * error) / (coverage - half)
    return np.asarray((w * risk).sum(axis=0) / coverage[-1])


def best_aurc(n: int, k: float) -> float:
    """AURC* of n samples with k errors, all of them last.

    >>> round(best_aurc(5, 2), 6)
    0.13
    """
    i = np.arange(n - int(k) + 1, n + 1)
    return float(((i - (n - k)) / i).sum() / n)


def aurc(scores: np.ndarray, errors: np.ndarray) -> Estimate:
    """Area under the risk-coverage curve; see `aurc_and_excess`."""
    return aurc_and_excess(scores, errors)[0]


def excess_aurc(scores: np.ndarray, errors: np.ndarray) -> Estimate:
    """AURC minus the best possible with as many errors: 0 is a perfect order; see `aurc_and_excess`."""
    return aurc_and_excess(scores, errors)[1]


def aurc_and_excess(scores: np.ndarray, errors: np.ndarray) -> tuple[Estimate, Estimate]:
    """AURC and E-AURC from the same resamples, each with a bootstrap interval over samples; above `resampling.LIMIT` of them
    Student's over random batches.

    Args:
        scores: (N,), higher = less to be trusted; errors: bool (N,), where the classifier is wrong.
    """
    blocks = _Blocks(scores, errors)
    n, flags = len(scores), errors.astype(np.float64)
    harmonic = np.concatenate([[0.0], np.cumsum(1.0 / np.arange(1, n + 1))])

    def both(weights: np.ndarray) -> np.ndarray:
        found, k = _aurc(blocks, weights), weights @ flags
        right = np.rint(n - k).astype(np.int64)
        # sum_{i=N-k+1}^{N} (1 - (N-k)/i) = k - (N-k)(H_N - H_{N-k})
        return np.stack([found, found - (k - (n - k) * (harmonic[n] - harmonic[right])) / n])

    values = both(np.ones((1, n)))[:, 0]
    if n <= LIMIT:
        drawn = np.concatenate([both(w) for (w,) in resamples((n,))], axis=1)
        first, second = (percentile(float(v), d, n) for v, d in zip(values, drawn, strict=True))
        return first, second

    def alone(part: np.ndarray) -> float:
        return float(_aurc(_Blocks(scores[part], errors[part]), np.ones((1, len(part))))[0])

    def excess(part: np.ndarray) -> float:
        return alone(part) - best_aurc(len(part), int(np.count_nonzero(errors[part])))

    return (
        over_batches(float(values[0]), alone, n, lower=0.0, upper=1.0),
        over_batches(float(values[1]), excess, n, lower=0.0, upper=1.0),
    )


def _augrc(blocks: _Blocks, weights: np.ndarray) -> np.ndarray:
    """AUGRC (r,) under integer weights (r, N), exact: w copies of equal score take the expectation over their orders."""
    w, error = blocks.expected(weights)
    errors = running_sums(w * error)[1:]
    return np.asarray((w * (errors - (w - 1) / 2 * error)).sum(axis=0) / w.sum(axis=0) ** 2)


def augrc(scores: np.ndarray, errors: np.ndarray) -> Estimate:
    """Area under the generalised risk-coverage curve, in [0, 1/2 + 1/(2N)], with an interval over samples.

    Args:
        scores: (N,), higher = less to be trusted; errors: bool (N,), where the classifier is wrong.
    """
    blocks, n = _Blocks(scores, errors), len(scores)

    def alone(part: np.ndarray) -> float:
        return float(_augrc(_Blocks(scores[part], errors[part]), np.ones((1, len(part))))[0])

    value = float(_augrc(blocks, np.ones((1, n)))[0])
    return of_ranks(value, lambda w: _augrc(blocks, w), alone, n, lower=0.0)


def ause(scores: np.ndarray, errors: np.ndarray) -> Estimate:
    """Area under the sparsification error, over the mean error; undefined where scores or errors are constant.

    mean_i (R_i - R*_i) / R_N, i = 1 .. N samples kept, R* for the oracle. Dividing by the mean error makes it free of units;
    papers that do not divide, or that integrate from 0, differ.

    Args:
        scores: (N,), uncertainty; errors: (N,), >= 0, absolute or squared.
    """
    require("AUSE", scores=scores, errors=errors)
    n = len(scores)
    if errors.min() < 0 or not np.isfinite(errors).all():
        raise DataError("AUSE: errors must be finite and not negative: give |y - prediction| or its square")
    for name, values in (("errors", errors), ("uncertainties", scores)):
        if values.min() == values.max():
            return Estimate.undefined(n, f"all {name} are equal")

    flat = errors.astype(np.float64)
    blocks, oracle = _Blocks(scores, flat), _Blocks(flat, flat)

    def alone(part: np.ndarray) -> float:
        s, e = scores[part], flat[part]
        return float(_sparsification(_Blocks(s, e), _Blocks(e, e), e, np.ones((1, len(e))))[0])

    value = alone(np.arange(n))
    return of_ranks(value, lambda w: _sparsification(blocks, oracle, flat, w), alone, n, lower=0.0)


def _sparsification(blocks: _Blocks, oracle: _Blocks, errors: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """AUSE (r,) under weights (r, N); NaN where no error is left."""
    mean = weights @ errors / weights.sum(axis=1)
    between = _aurc(blocks, weights) - _aurc(oracle, weights)
    return np.asarray(np.divide(between, mean, out=np.full(len(mean), np.nan), where=mean > 0))


def sparsification_curve(
    scores: np.ndarray, errors: np.ndarray, points: int = 101
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(coverage, mean error of the samples kept, the oracle's), thinned to about `points`; errors (N,), >= 0."""
    coverage, curve = risk_coverage(scores, errors, points)
    return coverage, curve, risk_coverage(errors, errors, points)[1]


def _curve(scores: np.ndarray, errors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Coverage i/N and risk R_i, each (N,)."""
    _, error = _Blocks(scores, errors).expected(np.ones((1, len(scores))))
    count = np.arange(1, len(scores) + 1)
    return count / len(scores), np.cumsum(error[:, 0]) / count


def risk_coverage(scores: np.ndarray, errors: np.ndarray, points: int = 101) -> tuple[np.ndarray, np.ndarray]:
    """(coverage, risk), thinned to about `points`; the last point is the error rate at full coverage."""
    coverage, risk = _curve(scores, errors)
    keep = np.unique(np.linspace(0, len(scores) - 1, min(points, len(scores))).round().astype(int))
    return coverage[keep], risk[keep]


def risk_coverage_band(
    scores: np.ndarray, errors: np.ndarray, points: int = 101, level: float = LEVEL
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(coverage, risk, low, high): `risk_coverage` with a band that holds the true curve at all of these coverages at once.

    The risk at coverage c = i/N is a mean over the i safest samples; which samples these are is an estimate too, and its
    variance is [R (1 - R) + (1 - c) (R - r)^2] / i, r the error rate of the samples just at the edge (those within `_EDGE` of
    c). The band is Clopper and Pearson's interval with as many samples as make a proportion vary so, at a level raised for all
    coverages (`intervals.simultaneous_level`).

    Args:
        scores: (N,), higher = less to be trusted; errors: bool (N,), where the classifier is wrong.
    """
    coverage, risk = risk_coverage(scores, errors, points)
    if errors.min() < 0 or errors.max() > 1:
        raise DataError("risk-coverage band: errors must be true or false, or 0 or 1")
    n = len(scores)
    count = np.rint(coverage * n)
    every = np.append(0.0, _curve(scores, errors)[1] * np.arange(1, n + 1))  # errors among the i safest
    reach = max(math.ceil(_EDGE * n), 1)
    start, stop = np.maximum(count - reach, 0).astype(int), np.minimum(count + reach, n).astype(int)
    edge = (every[stop] - every[start]) / (stop - start)
    p = (risk * count + every[-1] / n) / (count + 1)  # so that a start without errors has a variance
    own = np.maximum(p * (1 - p), 1e-300)
    effective = count * own / (own + (1 - coverage) * (risk - edge) ** 2)
    low, high = clopper_pearson_all(risk * effective, effective, simultaneous_level([count], level))
    return coverage, risk, low, high


def coverage_at_risk(scores: np.ndarray, errors: np.ndarray, risk: float) -> float:
    """The largest coverage i/N with R_i <= risk; 0 where even the safest samples are too risky."""
    if not 0 <= risk <= 1:
        raise DataError(f"selective prediction: risk = {risk}, expected a number between 0 and 1")
    coverage, found = _curve(scores, errors)
    fits = np.flatnonzero(found <= risk + 1e-12)
    return float(coverage[fits[-1]]) if len(fits) else 0.0


def accuracy_at_coverage(scores: np.ndarray, errors: np.ndarray, coverage: float) -> float:
    """Accuracy of the ceil(coverage N) safest samples."""
    if not 0 < coverage <= 1:
        raise DataError(f"selective prediction: coverage = {coverage}, expected a number in (0, 1]")
    _, risk = _curve(scores, errors)
    return float(1.0 - risk[math.ceil(coverage * len(scores) - 1e-9) - 1])
