"""Relative accuracy: what training on long-tailed data costs against training on as many balanced samples.

Zhang, Kang, Hooi, Yan, Feng, *Deep Long-Tailed Learning: A Survey*, IEEE TPAMI 2023, arXiv 2110.04596. On the same test samples

    A_r = A_t / A_u,   A_u = max(A_v, A_b),

A_t the accuracy of a method trained on the long-tailed set, A_v that of plain cross-entropy and A_b that of the same method,
both trained on a balanced set of similar size. It may exceed 1. Robust relative accuracy has robust accuracies in all places.

**The maximum is biased.** A_u is chosen on the very samples, so the plug-in A_u is too high and A_r too low, by up to about
half a standard error where A_v and A_b are alike. The interval allows for it, since A_r = min(A_t / A_v, A_t / A_b) is the
smaller of two ratios that no choice is part of:

    lower end   the smaller of their lower ends: whichever ratio is the smaller in truth, its lower end is not below this one;
    upper end   the smaller of their upper ends, each at half the error: either of them may be the one that is too low.

**Each ratio** of two shares on the same samples has the interval of Donner and Zou (Statistics in Medicine 31, 2012): Fieller's
argument with Wilson's limits, and the correlation of both answers as in Newcombe's interval for a difference. It agrees with a
paired bootstrap where there are many right and wrong answers (a test compares them), and does not collapse where there are
few: no resample shows a mistake that no sample shows.
"""

from __future__ import annotations

import math

import numpy as np

from robustbench_ext.metrics.estimate import LEVEL, Estimate, require
from robustbench_ext.metrics.intervals import wilson
from robustbench_ext.metrics.paired import answers_correlation

METHOD = "Wilson ratio, paired, smaller of two"


def relative_accuracy(right: np.ndarray, plain: np.ndarray, same: np.ndarray) -> Estimate:
    """A_r of three models' right answers.

    Args:
        right, plain, same: bool (N,), of the long-tailed model, of plain training on balanced data, and of the same method on
            balanced data; the same samples in the same order. `plain` and `same` may be one model's.
    """
    require("relative accuracy", right=right, plain=plain, same=same)
    right, plain, same = (np.asarray(v).astype(bool) for v in (right, plain, same))
    n, upper_bound = len(right), max(plain.mean(), same.mean())
    if upper_bound == 0:
        return Estimate.undefined(n, "A_u = 0: neither model of balanced data is ever right")
    bases = [plain] if np.array_equal(plain, same) else [plain, same]
    lows = [ratio_interval(right, base)[0] for base in bases]
    highs = [ratio_interval(right, base, 1 - (1 - LEVEL) / len(bases))[1] for base in bases]
    method = METHOD if len(bases) > 1 else METHOD.partition(", smaller")[0]
    return Estimate(float(right.mean() / upper_bound), min(lows), min(highs), method, n)


def ratio_interval(a: np.ndarray, b: np.ndarray, level: float = LEVEL) -> tuple[float, float]:
    """Both ends for the ratio of two shares of right answers on the same samples, p_a / p_b.

    With Wilson's limits l, u and correlation phi the ends solve p_a - theta p_b = -/+ the half-width of that difference,

        theta^2 u_b (2 p_b - u_b) - 2 theta [p_a p_b - phi (p_a - l_a)(u_b - p_b)] + l_a (2 p_a - l_a) = 0,

    the smaller root, and the larger one with l and u exchanged. The upper end is infinite where b is never right.

    Args:
        a, b: bool (N,).
    """
    n, k_a, k_b = len(a), int(a.sum()), int(b.sum())
    phi = answers_correlation(int((a & b).sum()), int((a & ~b).sum()), int((~a & b).sum()), int((~a & ~b).sum()))
    p_a, p_b = k_a / n, k_b / n
    (low_a, high_a), (low_b, high_b) = wilson(k_a, n, level), wilson(k_b, n, level)
    low = _root(p_a, p_b, low_a, high_b, phi)[0]
    high = _root(p_a, p_b, high_a, low_b, phi)[1] if k_b else math.inf
    return low, high


def _root(p_a: float, p_b: float, end_a: float, end_b: float, phi: float) -> tuple[float, float]:
    """Both roots of the equation above, without the cancellation of the usual formula."""
    square, constant = end_b * (2 * p_b - end_b), end_a * (2 * p_a - end_a)
    half = p_a * p_b - phi * abs(p_a - end_a) * abs(end_b - p_b)
    root = math.sqrt(max(0.0, half * half - square * constant))
    small = constant / (half + root) if half + root > 0 else 0.0
    return small, (half + root) / square if square > 0 else math.inf
