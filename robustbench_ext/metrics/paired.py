"""Two models, or two detectors, on the same samples: their difference a - b, with an interval and the p-value of "none".

Pairing makes small differences visible: what both get right, or wrong, on the same samples cancels.

    shares of right answers   exact McNemar test; Newcombe's interval for paired proportions
    means of any numbers      Student's t, with and without Hall's correction for skewness
    AUROC                     DeLong's test; models may have been asked about samples that they share in part
    anything resampled        the spread of the differences over joint bootstrap resamples, biases allowed for

Interval and test agree wherever there is one: p < 0.05 exactly where the 95 % interval does not hold 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.special import bdtr, chdtrc, ndtr, ndtri, stdtr, stdtrit

from robustbench_ext.errors import DataError
from robustbench_ext.metrics.calibration import BIAS_RATIO
from robustbench_ext.metrics.detection import placements
from robustbench_ext.metrics.estimate import LEVEL, Estimate, require
from robustbench_ext.metrics.intervals import wilson

FEWEST = 2
_RESAMPLED = "paired bootstrap"
_MEANS = "paired t, skewness-corrected"
Kind = Literal["exact", "mid-p", "chi2", "chi2-corrected"]


@dataclass(frozen=True)
class Comparison:
    """A difference a - b with its interval, the two-sided p-value of "no difference", and the test that it is from."""

    difference: Estimate
    p_value: float
    test: str


# Proportions ---------------------------------------------------------------------------------------------------------


def mcnemar(b: int, c: int, kind: Kind = "exact") -> float:
    """Two-sided p-value of equal shares of right answers; b samples only the first gets right, c only the second.

    "exact": min(1, 2 P[X <= min(b, c)]), X binomial (b + c, 1/2). "mid-p": the outcome itself counts half, less conservative,
    its level is kept on average only. "chi2": (b - c)^2 / (b + c); "chi2-corrected": (|b - c| - 1)_+^2 / (b + c). 1 where
    b = c = 0.

    >>> [round(mcnemar(25, 12, kind), 6) for kind in ("exact", "mid-p", "chi2", "chi2-corrected")]
    [0.047031, 0.033552, 0.032583, 0.04852]
    """
    n, m = b + c, min(b, c)
    if m < 0:
        raise DataError(f"McNemar's test: b = {b}, c = {c}, expected counts")
    if n == 0:
        return 1.0
    if kind == "chi2":
        return float(chdtrc(1, (b - c) ** 2 / n))
    if kind == "chi2-corrected":
        return float(chdtrc(1, max(0, abs(b - c) - 1) ** 2 / n))
    if kind not in ("exact", "mid-p"):
        raise DataError(f"McNemar's test: kind '{kind}', expected exact, mid-p, chi2 or chi2-corrected")
    tail = float(bdtr(m, n, 0.5))
    if kind == "exact":
        return min(1.0, 2.0 * tail)
    return 1.0 if b == c else tail + (float(bdtr(m - 1, n, 0.5)) if m else 0.0)


def compare_proportions(right_a: np.ndarray, right_b: np.ndarray) -> Comparison:
    """Share of right answers of a minus that of b: exact McNemar test and Newcombe's interval.

    The exact test is the more careful of the two: where it does not reject, the interval is widened to hold 0, and says so. A
    test that rejects beside an interval that holds 0 does not occur (all tables up to n = 60 are gone through in the tests).

    Args:
        right_a, right_b: bool (N,), the same samples in the same order.
    """
    require("paired proportions", a=right_a, b=right_b)
    a, b, n = right_a.astype(bool), right_b.astype(bool), len(right_a)
    both, only_a, only_b = (int(np.count_nonzero(v)) for v in (a & b, a & ~b, ~a & b))
    low, high = newcombe_paired(both, only_a, only_b, n - both - only_a - only_b)
    p, method = mcnemar(only_a, only_b), "Newcombe, paired"
    if p >= 1 - LEVEL and not low <= 0 <= high:
        low, high, method = min(low, 0.0), max(high, 0.0), "Newcombe, paired, widened to 0"
    return Comparison(Estimate((only_a - only_b) / n, low, high, method, n), p, "exact McNemar")


def newcombe_paired(both: int, only_a: int, only_b: int, neither: int, level: float = LEVEL) -> tuple[float, float]:
    """Newcombe's interval for the difference of two paired proportions (Statistics in Medicine 17, 1998, method 10).

    Wilson's limits of both shares, squared and added, with the correlation phi of the two answers (its numerator ad - bc drawn
    n/2 towards 0 where it is positive): d - sqrt(x^2 - 2 phi x y + y^2), x = p_a - low_a, y = high_b - p_b, and likewise above.
    Does not collapse where no answer differs; stays in [-1, 1].
    """
    n, k_a, k_b = both + only_a + only_b + neither, both + only_a, both + only_b
    (low_a, high_a), (low_b, high_b) = wilson(k_a, n, level), wilson(k_b, n, level)
    p_a, p_b = k_a / n, k_b / n
    phi = answers_correlation(both, only_a, only_b, neither)
    return (
        (p_a - p_b) - _side(p_a - low_a, high_b - p_b, phi),
        (p_a - p_b) + _side(high_a - p_a, p_b - low_b, phi),
    )


def answers_correlation(both: int, only_a: int, only_b: int, neither: int) -> float:
    """Newcombe's phi of two answers on the same samples: the numerator ad - bc drawn n/2 towards 0 where it is positive."""
    n, k_a, k_b = both + only_a + only_b + neither, both + only_a, both + only_b
    excess = float(both * neither - only_a * only_b)
    if excess > 0:
        excess = max(0.0, excess - n / 2)
    margins = float(k_a) * (n - k_a) * k_b * (n - k_b)
    return excess / math.sqrt(margins) if margins else 0.0


def _side(x: float, y: float, phi: float) -> float:
    return math.sqrt(max(0.0, x * x - 2 * phi * x * y + y * y))


# Means ---------------------------------------------------------------------------------------------------------------


def compare_means(a: np.ndarray, b: np.ndarray) -> Comparison:
    """Mean of a minus mean of b: the wider of Student's interval and the one corrected for skewness, and their test.

    Student's statistic T of the N differences a_i - b_i is skewed where they are. Hall's monotone cubic makes it symmetric,
    g(T) = T + k T^2 + k^2 T^3 / 3 + k / 2 with k = skewness / (3 sqrt(N)) (J. R. Statist. Soc. B 54, 1992): the second-order
    accuracy of the studentised bootstrap without resampling, so that small p-values are not cut off at one over the number of
    resamples. Where a few differences are huge the measured skewness is itself mostly noise, and Student's own T is the safer;
    so both have to reject. That costs nothing at large N, where k vanishes.

    Args:
        a, b: (N,), the same samples in the same order.
    """
    require("paired means", a=a, b=b)
    a, b, n = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64), len(a)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return Comparison(Estimate.undefined(n, "an infinite term has no difference"), math.nan, _MEANS)
    d = a - b
    value, spread = float(d.mean()), float(d.std(ddof=1)) if n > 1 else 0.0
    if spread <= 1e-14 * float(np.abs(d).max()):
        return _constant(value, n, "the difference does not vary over samples", _MEANS)
    k = float((((d - value) / d.std()) ** 3).mean()) / (3 * math.sqrt(n))
    se, t = spread / math.sqrt(n), float(stdtrit(n - 1, (1 + LEVEL) / 2))
    low, high = value - se * max(t, _unbent(t, k)), value - se * min(-t, _unbent(-t, k))
    least = min(abs(value / se), abs(_bent(value / se, k)))
    p = 2.0 * float(stdtr(n - 1, -least))
    return Comparison(Estimate(value, low, high, "Student, skewness-corrected", n), p, _MEANS)


def _bent(t: float, k: float) -> float:
    """Hall's transformation; k = skewness / (3 sqrt(n))."""
    return t + k * t * t + k * k * t**3 / 3 + k / 2


def _unbent(y: float, k: float) -> float:
    """Its inverse."""
    if abs(k) < 1e-9:
        return y
    inside = 3 * k * (y - k / 2)
    # The difference of two numbers near 1, divided by a small k, would lose most of its digits.
    root = np.expm1(np.log1p(inside) / 3) if inside > -1 else np.cbrt(1 + inside) - 1
    return float(root) / k


def widened(
    found: Comparison, value_a: float, ends_a: tuple[float, float], value_b: float, ends_b: tuple[float, float]
) -> Comparison:
    """A comparison that is no surer than two independent intervals allow: their distances added as squares (Newcombe).

    For statistics whose resamples vary too little, such as the lowest of several shares where one is 0. The p-value follows the
    end of the interval that is nearer to 0.
    """
    d = found.difference
    low = value_a - value_b - math.hypot(value_a - ends_a[0], ends_b[1] - value_b)
    high = value_a - value_b + math.hypot(ends_a[1] - value_a, value_b - ends_b[0])
    if math.isnan(d.ci_low):
        d = Estimate(value_a - value_b, low, high, "", d.n)
    low, high = min(low, d.ci_low), max(high, d.ci_high)
    reach = d.value - low if d.value > 0 else high - d.value
    z = -float(ndtri((1 - LEVEL) / 2))
    p = 2.0 * float(ndtr(-z * abs(d.value) / reach)) if reach > 0 else 1.0
    worse = p if math.isnan(found.p_value) else max(p, found.p_value)
    method = "paired bootstrap, no narrower than both intervals"
    return Comparison(Estimate(d.value, low, high, method, d.n), worse, method)


def _constant(value: float, n: int, reason: str, test: str) -> Comparison:
    """Where nothing varies: no difference at all, or one of which nothing more can be said."""
    if abs(value) < 1e-12:
        return Comparison(Estimate(0.0, 0.0, 0.0, "none", n), 1.0, test)
    return Comparison(Estimate(value, math.nan, math.nan, "none", n, reason), math.nan, test)


# Statistics of resamples ---------------------------------------------------------------------------------------------


def compare_resampled(value_a: float, value_b: float, drawn_a: np.ndarray, drawn_b: np.ndarray, n: int) -> Comparison:
    """Any statistic of a minus that of b, from joint resamples: normal, with room for the statistic's bias.

    The standard error is that of the differences over resamples. Statistics with a kink (ECE, the worst class) are biased by as
    much as they scatter, and by other amounts for other models: ECE is biased upwards, more so for a blunt model than for a
    sharp one of the same true ECE, and the difference of two such values is not around 0 where the true one is. A resample of
    the sample shows some of it: C = 1 / (sqrt(2) - 1) times less than the bias itself where all the statistic is noise (any
    statistic that is homogeneous in its noise), more than the bias where little of it is (`calibration.BIAS_RATIO`). So each
    model's bias lies between 0 and C times what its resamples show, and the interval and the test allow for all of that. Shown
    biases within three standard errors of their mean over resamples count as none, as those of smooth statistics do.

    In simulation the level is kept for ECE and for the worst class, whatever the two models; the power for ECE is that of a
    comparison of debiased squares. Smooth statistics pay nothing. What stays is the error of a normal interval: with heavy
    tails and n of about 100, RMSE rejects in 6 to 12 of 100 cases instead of 5 (use `compare_means` where a mean will do).

    Args:
        value_a, value_b: on the N samples.
        drawn_a, drawn_b: (R,), on the same R bootstrap resamples of them, drawn with the same weights; resamples without a
            value (NaN) are left out.
        n: N.
    """
    if len(drawn_a) != len(drawn_b):
        raise DataError(
            f"paired resamples: {len(drawn_a)} and {len(drawn_b)} values, expected those of the same resamples"
        )
    there = np.isfinite(drawn_a) & np.isfinite(drawn_b)
    drawn_a, drawn_b = drawn_a[there], drawn_b[there]
    value, repeats = value_a - value_b, len(drawn_a)
    if not math.isfinite(value) or repeats < FEWEST:
        return Comparison(
            Estimate.undefined(n, "undefined for one of the two, or on their resamples"), math.nan, _RESAMPLED
        )
    se = float((drawn_a - drawn_b).std(ddof=1))
    if se <= 1e-14 * max(abs(value_a), abs(value_b), 1e-300):
        return _constant(value, n, "the difference does not vary over resamples", _RESAMPLED)
    bias_a, bias_b = _shown_bias(value_a, drawn_a), _shown_bias(value_b, drawn_b)
    least = value - max(0.0, bias_a) + min(0.0, bias_b)
    most = value - min(0.0, bias_a) + max(0.0, bias_b)
    half = -float(ndtri((1 - LEVEL) / 2)) * se
    p = 2.0 * float(ndtr(-max(least, -most, 0.0) / se))
    method = f"bootstrap ({repeats}), normal" + (", bias-extended" if bias_a or bias_b else "")
    return Comparison(Estimate(value, least - half, most + half, method, n), p, _RESAMPLED)


def _shown_bias(value: float, drawn: np.ndarray) -> float:
    """The largest bias that resamples are compatible with, with its sign; 0 where they show none."""
    shown, noise = float(drawn.mean()) - value, float(drawn.std(ddof=1)) / math.sqrt(len(drawn))
    return float(BIAS_RATIO) * shown if abs(shown) > 3 * noise else 0.0


# AUROC ---------------------------------------------------------------------------------------------------------------


def compare_auroc(clean_a: np.ndarray, unknown_a: np.ndarray, clean_b: np.ndarray, unknown_b: np.ndarray) -> Comparison:
    """AUROC of detector a minus that of b, on the same clean (n0,) and unknown (n1,) samples in the same order.

    Asymptotically normal (DeLong et al. 1988); the variance is that of the differences of placements (each clean sample's share
    of unknown ones above it, each unknown one's of clean ones below),

        V = var_clean(A_i - B_i) / n0 + var_unknown(A_j - B_j) / n1.

    Where the detectors rank all samples alike, the difference is exactly 0 and p is 1. Where no variance is left but a
    difference (both separate perfectly, one of them less), the interval is undefined.

    Raises:
        DataError: the scores are not of the same samples.
    """
    if len(clean_a) != len(clean_b) or len(unknown_a) != len(unknown_b):
        raise DataError(
            f"a paired test needs both detectors on the same samples, got {len(clean_a)} and {len(clean_b)} clean, "
            f"{len(unknown_a)} and {len(unknown_b)} unknown"
        )
    order = np.arange(len(unknown_a))
    return compare_auroc_models(clean_a, clean_b, unknown_a, unknown_b, order, order)


def compare_auroc_models(
    clean_a: np.ndarray,
    clean_b: np.ndarray,
    unknown_a: np.ndarray,
    unknown_b: np.ndarray,
    ids_a: np.ndarray,
    ids_b: np.ndarray,
) -> Comparison:
    """AUROC of model a minus that of b, on the same clean samples (n0,) and on unknown ones that they may share in part.

    An attack succeeds on other samples of each model. With theta the AUROCs, A_j and B_j the placements of unknown samples,
    the AUROCs' difference has the variance

        V = var_clean(A_i - B_i) / n0 + sum_j [1_a(j) (A_j - theta_a) / n_a - 1_b(j) (B_j - theta_b) / n_b]^2,

    j over the samples that either has (n_a and n_b of them, with DeLong's degrees of freedom): DeLong's test where they have
    all in common, the sum of both variances where they have none. Which samples fool a model is part of what is compared.

    Args:
        clean_a, clean_b: (n0,), the same samples in the same order.
        unknown_a, unknown_b: (n_a,) and (n_b,); ids_a, ids_b: which samples these are, each once.
    """
    if len(clean_a) != len(clean_b):
        raise DataError(
            f"a paired test needs both models on the same samples, got {len(clean_a)} and {len(clean_b)} clean"
        )
    if len(ids_a) != len(unknown_a) or len(ids_b) != len(unknown_b):
        raise DataError(
            f"paired AUROC: {len(ids_a)} and {len(ids_b)} ids of {len(unknown_a)} and {len(unknown_b)} unknown samples"
        )
    n0, n_a, n_b = len(clean_a), len(unknown_a), len(unknown_b)
    everyone, place = np.unique(np.concatenate([ids_a, ids_b]), return_inverse=True)
    at_a, at_b = place[:n_a], place[n_a:]
    if len(np.unique(at_a)) < n_a or len(np.unique(at_b)) < n_b:
        raise DataError("paired AUROC: an id occurs twice among a model's unknown samples, expected each once")
    n, test = n0 + len(everyone), "paired DeLong" if n_a == n_b == len(everyone) else "partly paired DeLong"
    if min(n0, n_a, n_b) < FEWEST:
        counts = f"{n_a}" if n_a == n_b else f"{n_a} and {n_b}"
        few = Estimate.undefined(n, f"{n0} clean and {counts} unknown inputs: a paired test needs two of each")
        return Comparison(few, math.nan, test)
    for what, scores in (("a", clean_a), ("a", unknown_a), ("b", clean_b), ("b", unknown_b)):
        require(f"paired test, detector {what}", scores=scores)
    a0, a1 = placements(clean_a, unknown_a)
    b0, b1 = placements(clean_b, unknown_b)
    value = float(a1.mean() - b1.mean())
    influence = np.zeros(len(everyone))
    influence[at_a] += (a1 - a1.mean()) / math.sqrt(n_a * (n_a - 1))
    influence[at_b] -= (b1 - b1.mean()) / math.sqrt(n_b * (n_b - 1))
    variance = float((a0 - b0).var(ddof=1)) / n0 + float(influence @ influence)
    if variance <= 1e-30:
        return _constant(value, n, "the difference does not vary over samples", test)
    half = -float(ndtri((1 - LEVEL) / 2)) * math.sqrt(variance)
    estimate = Estimate(value, max(-1.0, value - half), min(1.0, value + half), test, n)
    return Comparison(estimate, 2.0 * float(ndtr(-abs(value) / math.sqrt(variance))), test)


# Several comparisons -------------------------------------------------------------------------------------------------


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction for the number of tests, in the order given; NaN stays NaN and counts for nothing.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    order = sorted((i for i, p in enumerate(p_values) if not math.isnan(p)), key=lambda i: p_values[i])
    corrected = [math.nan] * len(p_values)
    running = 0.0
    for rank, i in enumerate(order):
        running = max(running, min(1.0, (len(order) - rank) * p_values[i]))
        corrected[i] = running
    return corrected
