"""How unevenly a model serves its classes, and how much of its accuracy a change of the inputs costs.

With m_g the accuracy of class g, g = 1..G, and mu their mean, each class counting the same:

    spread            sqrt V,  V = (1/G) sum (m_g - mu)^2, in [0, 1/2] for accuracies
    lower tail        T_q = the mean of the ceil(q G) smallest m_g
    relative change   RC = (mu_changed - mu_clean) / mu_clean: negative is a loss, -1 all of it

After Wu et al., *Are Neural Ranking Models Robust?* (TOIS 2022, arXiv 2108.05018), who ask for spread, unknown inputs and
attacks side by side; the paper's own formulas could not be had, these are this project's. The spread over classes is not the
spread over training seeds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy.special import chndtr, chndtrinc

from robustbench_ext.errors import DataError
from robustbench_ext.metrics.estimate import LEVEL, Estimate, require
from robustbench_ext.metrics.intervals import wilson
from robustbench_ext.metrics.resampling import resampled_bin_sums, resampled_mean
from robustbench_ext.metrics.tails import class_mean_accuracy

Verdicts = tuple[np.ndarray, np.ndarray]  # right answers (N,) bool, labels (N,) int
LOWEST = 0.1


def variance(scores: np.ndarray) -> float:
    """V: the population variance (divisor G) of group scores (G,)."""
    require("spread", scores=scores)
    return float(np.var(np.asarray(scores, dtype=np.float64)))


def lower_tail_mean(scores: np.ndarray, share: float = LOWEST) -> float:
    """T_q: the mean of the ceil(q G) smallest of group scores (G,); q = `share` in (0, 1]."""
    require("lower tail", scores=scores)
    if not 0 < share <= 1:
        raise DataError(f"lower tail: share = {share}, expected a number in (0, 1]")
    count = math.ceil(share * len(scores) - 1e-9)
    return float(np.sort(np.asarray(scores, dtype=np.float64))[:count].mean())


def relative_change(changed: float, plain: float) -> float:
    """RC of two means.

    Raises:
        DataError: `plain` is not above 0, so that nothing can be relative to it.
    """
    if not plain > 0:
        raise DataError(f"relative change: relative to {plain}, expected a number above 0")
    return (changed - plain) / plain


# Spread --------------------------------------------------------------------------------------------------------------


def class_spread(right: np.ndarray, labels: np.ndarray) -> Estimate:
    """sqrt V of the classes' true accuracies.

    Measured accuracies scatter even where the true ones are equal, so V of them is too large by s^2 (G - 1) / G, with s^2 the
    mean variance of a class's accuracy; that is taken off, down to 0 at least. G V / s^2 follows a noncentral chi-squared law
    with G - 1 degrees of freedom whose noncentrality is G V_true / s^2, and the interval is where that one cannot be refused.
    It runs over several s^2: the mean one; the one weighted by the squared deviations, since bad classes scatter more; at the
    upper end also one that allows for mistakes that did not happen to be seen. A value that is small by luck does not shorten
    the upper end. Simulations in the tests hold the coverage to its level.

    Args:
        right, labels: (N,), bool and int; classes without samples count for nothing.
    """
    require("spread over classes", right=right, labels=labels)
    _, index, n = np.unique(labels, return_inverse=True, return_counts=True)
    count, samples = len(n), len(labels)
    if count < 2:
        return Estimate.undefined(samples, "one class has no spread")
    k = np.bincount(index, right)
    shares = k / n
    off = (shares - shares.mean()) ** 2
    total, df = float(off.sum()), count - 1
    prior = (k.sum() + 1) / (samples + 2)
    own = _variances((k + 2 * prior) / (n + 2), n)  # so that a class without a mistake has a variance
    noise = float(own.mean())
    uneven = float((own * off).sum() / total) if total > 0 else noise
    unseen = float(_variances((k + 1) / (n + 2), n).mean())  # one mistake and one right answer more in each class
    value = max(0.0, total - df * noise)
    low = min(value, *(s2 * _noncentrality(total / s2, df)[0] for s2 in (noise, uneven)))
    high = max(value, *(s2 * _noncentrality(total / s2, df)[1] for s2 in (noise, uneven, unseen)))
    value, low, high = (math.sqrt(v / count) for v in (value, low, high))
    return Estimate(value, low, min(0.5, high), "noncentral chi-squared", samples)


def _variances(p: np.ndarray, n: np.ndarray) -> np.ndarray:
    return np.asarray(p * (1 - p) / n)


def _noncentrality(x: float, df: int) -> tuple[float, float]:
    """Ends of the noncentralities under which an observation as small, or as large, as x is no surprise."""
    tail = (1 - LEVEL) / 2
    low = float(chndtrinc(x, df, 1 - tail)) if chndtr(x, df, 0.0) > 1 - tail else 0.0
    return low, float(chndtrinc(max(x, df), df, tail))


def resampled_spread(right: np.ndarray, labels: np.ndarray) -> tuple[float, np.ndarray]:
    """The spread as in `class_spread`, and on bootstrap resamples (R,) that depend on N alone.

    A resample's V is biased against the sample's as the sample's is against the truth; both are taken off.
    """
    _, index, n = np.unique(labels, return_inverse=True, return_counts=True)
    hits, sizes = resampled_bin_sums(index, right.astype(np.float64), np.ones(len(index)), bins=len(n))
    shares = hits / np.maximum(sizes, 1)
    there = np.where(sizes > 0, 1.0, 0.0)  # a class that a resample misses does not count in it
    mean = (shares * there).sum(axis=1, keepdims=True) / there.sum(axis=1, keepdims=True)
    drawn = (there * (shares - mean) ** 2).sum(axis=1) / there.sum(axis=1)
    noise = float(_variances(np.bincount(index, right) / n, n).mean()) * (len(n) - 1) / len(n)
    return class_spread(right, labels).value, np.sqrt(np.maximum(0.0, drawn - 2 * noise))


# Relative change -----------------------------------------------------------------------------------------------------


def group_values(right: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Values (N,) whose mean is the mean over groups of the groups' shares of right answers, and which vary as that mean does:
    within groups alone, a group's samples weighing N / (number of groups x size).
    """
    _, index, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    shares = np.bincount(index, right) / sizes
    return np.asarray(shares.mean() + len(groups) / (len(sizes) * sizes[index]) * (right - shares[index]))


def change_values(clean: Verdicts, changed: Sequence[Verdicts], paired: bool) -> np.ndarray:
    """Values (N,) whose mean is the relative change of the mean over classes, and which vary as it does, to first order.

    With R = mu_changed / mu_clean the change of R is (d mu_changed - R d mu_clean) / mu_clean.

    Args:
        clean: verdicts on clean inputs.
        changed: verdicts under each of several conditions, whose means over classes are averaged.
        paired: they are of the same samples in the same order: N of them. Otherwise N counts all samples, the clean ones first.

    Raises:
        DataError: no sample is classified correctly clean.
    """
    plain, parts = group_values(*clean), [group_values(*part) for part in changed]
    base, after = _means(clean, changed)
    change = relative_change(after, base)
    if paired:
        return np.asarray(change + (np.mean(parts, axis=0) - after - (1 + change) * (plain - base)) / base)
    total = len(plain) + sum(map(len, parts))
    off = [-(1 + change) * total / len(plain) * (plain - base)]
    off += [total / (len(parts) * len(part)) * (part - part.mean()) for part in parts]
    return np.asarray(change + np.concatenate(off) / base)


def _means(clean: Verdicts, changed: Sequence[Verdicts]) -> tuple[float, float]:
    """mu of the clean verdicts, and the mean of those of the changed ones."""
    before, *after = (_class_mean(*part) for part in (clean, *changed))
    return before, sum(after) / len(after)


def _class_mean(right: np.ndarray, labels: np.ndarray) -> float:
    _, index, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    return float((np.bincount(index, right) / sizes).mean())


def accuracy_change(clean: Verdicts, changed: Sequence[Verdicts], paired: bool) -> Estimate:
    """RC of the mean over classes, with a bootstrap interval over samples; see `change_values`.

    Where nothing varies the interval is Wilson's of what was not seen: of the accuracy that is left, where none is left; of
    changed verdicts, where none has changed.
    """
    n = len(clean[0])
    if not clean[0].any():
        return Estimate.undefined(n, "no sample is classified correctly clean")
    base, after = _means(clean, changed)
    value, values = relative_change(after, base), change_values(clean, changed, paired)
    if np.ptp(values) > 1e-12:
        found = resampled_mean(values)
        return Estimate(value, max(-1.0, found.ci_low), found.ci_high, found.ci_method, found.n)
    if not any(right.any() for right, _ in changed):
        right, labels = changed[0]
        left = class_mean_accuracy(right, labels, np.unique(labels))
        return Estimate(-1.0, -1.0, left.ci_high / base - 1, "Wilson of what is left", n)
    reach = wilson(0, n)[1] / base
    return Estimate(value, value - reach, value + reach, "Wilson of changed verdicts", n)
