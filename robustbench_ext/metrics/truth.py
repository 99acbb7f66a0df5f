"""Predictions against the true law of the outcome, where it is known: no outcome's chance is in the way.

Of probabilities, p true and q predicted, K classes (arXiv 2111.10734):

    MSE_p = mean_i 1/2 sum_k (p_ik - q_ik)^2            E[Brier] = 2 MSE_p + mean_i sum_k p_ik (1 - p_ik)
    KL    = mean_i sum_k p_ik log(p_ik / q_ik)          E[NLL]   = KL + mean_i H(p_i)

(Brier as everywhere here, the sum over classes; with two classes MSE_p is the squared error of either probability). So proper
scores follow MSE_p and KL up to what no model can help, while calibration errors and ranks need not: a constant base rate is
perfectly calibrated, and its MSE_p is the variance of p.

Of intervals, F the true law at each x: the probability F(u) - F(l) that [l, u] holds the outcome *at this x*, which is what a
reader of one interval wants, and what no test on outcomes can show for a single x.

Of means and variances: an interval estimator's point m, and the standard deviation s that its intervals would have if they were
normal, the mean over coverages c of (u_c - l_c) / (2 z_c). The truth's own m* and s* are taken in the same way from its
quantiles, so that the truth itself scores 0 whatever its shape.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.special import entr, log_softmax, ndtri, xlogy

from robustbench_ext.errors import DataError
from robustbench_ext.fingerprint import Rows
from robustbench_ext.metrics.blocks import each
from robustbench_ext.metrics.calibration import BIAS_RATIO, calibrated_sums, nll_terms
from robustbench_ext.metrics.estimate import LEVEL, Estimate, require
from robustbench_ext.metrics.resampling import bias_extended, resampled_bin_sums

KS_STEPS = 512  # places at which the resampled curves behind the interval of a KS error are looked at

# Probabilities -------------------------------------------------------------------------------------------------------


def probability_errors(p: np.ndarray, logits: Rows) -> np.ndarray:
    """1/2 sum_k (p_k - q_k)^2 of each sample, (N,); the mean is MSE_p.

    Args:
        p: true probabilities (N, K); logits: (N, K) of the predicted ones.
    """
    _check(p, logits)
    return each(lambda z, t: (((np.exp(_log_q(z)) - t) ** 2).sum(axis=1) / 2,), logits, p)[0]


def divergences(p: np.ndarray, logits: Rows) -> np.ndarray:
    """KL(p || q) = sum_k p_k log(p_k / q_k) of each sample, natural logarithm, (N,), >= 0; the mean is the expected excess NLL.

    Nothing is clipped: infinite where a class of positive probability is given none.
    """
    _check(p, logits)

    def terms(z: np.ndarray, t: np.ndarray) -> tuple[np.ndarray]:
        # xlogy and the mask: a class that cannot be costs nothing, whatever it is given.
        cross = np.where(t > 0, t * np.where(t > 0, _log_q(z), 0.0), 0.0)
        return (np.maximum(xlogy(t, t).sum(axis=1) - cross.sum(axis=1), 0.0),)

    return each(terms, logits, p)[0]


def excess_nll_terms(p: np.ndarray, logits: Rows, y: np.ndarray) -> np.ndarray:
    """-log q_y + log p_y of each sample, (N,): what the labels y (N,) show of the KL."""
    _check(p, logits)
    return np.asarray(nll_terms(logits, y) + np.log(p[np.arange(len(y)), y]))


def entropies(p: np.ndarray) -> np.ndarray:
    """H(p) of each row, natural logarithm, (N,): how uncertain the outcome truly is."""
    return np.asarray(entr(p).sum(axis=1))


def ks_value(q: np.ndarray, y: np.ndarray) -> float:
    """max over thresholds t of |sum over q <= t of (q - y)| / N, in [0, 1].

    Samples of equal q come together: in the published form, which adds them up one by one, a thousand forecasts of 1/2 give
    0.25 or 0.0005 as the order of the outcomes will have it.

    Args:
        q: predicted probabilities (N,) of an outcome; y: whether it came, 0 or 1 (N,).
    """
    require("KS error", q=q, y=y)
    _, place = np.unique(q, return_inverse=True)
    return float(np.abs(np.cumsum(np.bincount(place, q.astype(np.float64) - y))).max() / len(q))


def ks_error(q: np.ndarray, y: np.ndarray) -> Estimate:
    """`ks_value` with a bootstrap interval that allows for its bias, as that of ECE does: 0 is inside where chance explains it.

    Where there are more than `KS_STEPS` different forecasts, resamples are looked at at as many of them, of equal counts.
    """
    value, n = ks_value(q, y), len(q)
    q = q.astype(np.float64)
    _, place, counts = np.unique(q, return_inverse=True, return_counts=True)
    steps = min(KS_STEPS, len(counts))
    index = np.minimum(((np.cumsum(counts) - counts / 2) * steps / n).astype(np.int64), steps - 1)[place]

    def highest(sums: np.ndarray) -> np.ndarray:
        return np.asarray(np.abs(np.cumsum(sums, axis=1)).max(axis=1) / n)

    values = highest(resampled_bin_sums(index, q - y, bins=steps)[0])
    found = bias_extended(value, values, n, own=BIAS_RATIO, upper=1.0)
    chance = highest(calibrated_sums(q, index, steps))
    low = 0.0 if value <= np.quantile(chance, LEVEL) else found.ci_low
    return Estimate(value, low, found.ci_high, found.ci_method, n)


def set_probabilities(p: np.ndarray, sets: np.ndarray) -> np.ndarray:
    """P(label in the set) of each sample, (N,), of prediction sets bool (N, K)."""
    if p.shape != sets.shape:
        raise DataError(f"true coverage: probabilities {p.shape} and sets {sets.shape}, expected equal shapes")
    return np.asarray((p * sets).sum(axis=1))


def _log_q(logits: np.ndarray) -> np.ndarray:
    return np.asarray(log_softmax(logits.astype(np.float64), axis=1))


def _check(p: np.ndarray, logits: Rows) -> None:
    require("truth", probabilities=p, logits=logits)
    if p.ndim != 2 or p.shape != tuple(logits.shape):
        raise DataError(f"truth: probabilities {p.shape} and logits {tuple(logits.shape)}, expected (N, K) and (N, K)")
    if p.min() < 0 or np.abs(p.sum(axis=1) - 1).max() > 1e-9:
        raise DataError("truth: probabilities must not be negative, and each row adds up to 1")


# Means, variances, intervals -----------------------------------------------------------------------------------------


def implied_std(low: np.ndarray, high: np.ndarray, nominal: Sequence[float]) -> np.ndarray:
    """The mean over coverages of (u_c - l_c) / (2 z_c), (N,): the standard deviation of normal intervals like these.

    Args:
        low, high: (N, m), ends of the central intervals of the m coverages `nominal`; infinite ones give infinity.
    """
    if low.shape != high.shape or low.ndim != 2 or low.shape[1] != len(nominal):
        raise DataError(f"implied std: low {low.shape}, high {high.shape}, expected (N, {len(nominal)}) both")
    z = ndtri((1 + np.asarray(nominal)) / 2)
    return np.asarray(((high.astype(np.float64) - low) / (2 * z)).mean(axis=1))


def normal_divergences(mean: np.ndarray, std: np.ndarray, point: np.ndarray, spread: np.ndarray) -> np.ndarray:
    """KL(N(mean, std^2) || N(point, spread^2)) of each sample, (N,), >= 0.

    Where the truth is normal, the mean is the expected excess of the Gaussian NLL over the oracle's.
    """
    ratio = (std / spread) ** 2
    return np.asarray((ratio - 1 - np.log(ratio)) / 2 + ((point - mean) / spread) ** 2 / 2)


def gaussian_nll(y: np.ndarray, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    """-log N(y; mean, std^2) of each sample, (N,)."""
    return np.asarray(np.log(std) + ((y - mean) / std) ** 2 / 2 + np.log(2 * np.pi) / 2)


def log_variance_errors(std: np.ndarray, spread: np.ndarray) -> np.ndarray:
    """|log spread^2 - log std^2| of each sample, (N,)."""
    return np.asarray(2 * np.abs(np.log(spread) - np.log(std)))
