"""Calibration of top-label confidence beside plain ECE: equal-mass bins, without bias, the largest gap.

Bins are of equal width (right-closed, as in `calibration`) or of equal mass: samples sorted ascending, cut into M bins of equal
counts (the first N mod M one larger), and equal values all in the bin of the first of them, so that nothing depends on the
order of samples. When samples are resampled the bins stay where the data put them.
"""

from __future__ import annotations

import math

import numpy as np

from robustbench_ext.errors import DataError
from robustbench_ext.metrics.calibration import BINS, bin_index, binned_error
from robustbench_ext.metrics.estimate import LEVEL, Estimate, require
from robustbench_ext.metrics.intervals import REPEATS, clopper_pearson
from robustbench_ext.metrics.resampling import percentile, resampled_bin_sums


def equal_mass_index(values: np.ndarray, bins: int = BINS) -> np.ndarray:
    """The equal-mass bin of each of N values, int (N,); bins that ties leave empty stay empty.

    >>> equal_mass_index(np.array([0.9, 0.1, 0.5, 0.5, 0.5]), 2).tolist()
    [1, 0, 0, 0, 0]
    """
    if bins < 1:
        raise DataError(f"equal-mass bins: bins = {bins}, expected at least 1")
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    sizes = len(values) // bins + (np.arange(bins) < len(values) % bins)
    first = np.searchsorted(ordered, ordered, side="left")
    index = np.empty(len(values), dtype=np.intp)
    index[order] = np.repeat(np.arange(bins), sizes)[first]
    return index


def ece_equal_mass(confidence: np.ndarray, correct: np.ndarray, bins: int = BINS) -> Estimate:
    """ECE over bins of equal counts; the interval is the one of `calibration.ece`."""
    _check("equal-mass ECE", confidence, correct)
    return binned_error(confidence, correct, equal_mass_index(confidence, bins), bins)


def ece_debiased(confidence: np.ndarray, correct: np.ndarray, bins: int = BINS) -> dict[str, Estimate]:
    """`ece2_debiased` and its root `rmsce_debiased`, over equal-mass bins (Kumar, Liang, Ma 2019, arXiv 1909.10155).

    ECE^2 = sum_b n_b/N [(accuracy_b - confidence_b)^2 - accuracy_b (1 - accuracy_b) / (n_b - 1)] may be negative: it is an
    estimate of a square whose own noise is taken off. Bins of one sample contribute 0. The root is that of max(0, .), for
    display. The interval takes off the bias of resampling; its lower end may be negative too.
    """
    _check("debiased ECE", confidence, correct)
    index, n = equal_mass_index(confidence, bins), len(confidence)
    hits = correct.astype(np.float64)
    columns = np.ones(n), hits, hits - confidence

    def statistic(count: np.ndarray, right: np.ndarray, gap: np.ndarray) -> np.ndarray:
        several, m = count > 1, np.maximum(count, 2)
        noise = right * (1 - right / m) / (m - 1)
        return np.asarray(np.where(several, gap**2 / m - noise, 0.0).sum(axis=-1) / n)

    value = float(statistic(*(np.bincount(index, c, bins) for c in columns)))
    values = statistic(*resampled_bin_sums(index, *columns, bins=bins))
    found = percentile(value, values - (values.mean() - value), n, method=f"bootstrap ({REPEATS}), bias-corrected")
    root, low, high = (math.sqrt(max(0.0, v)) for v in (found.value, found.ci_low, found.ci_high))
    return {"ece2_debiased": found, "rmsce_debiased": Estimate(root, low, high, found.ci_method, n)}


def mce(confidence: np.ndarray, correct: np.ndarray, bins: int = BINS) -> Estimate:
    """max_b |accuracy_b - confidence_b| over the non-empty equal-width bins.

    The interval runs from the largest lower to the largest upper limit of any bin's |gap|, from Clopper and Pearson's
    intervals of the accuracies at level 1 - (1 - level) / B: it holds for the largest true gap, whichever bin has it. A bin
    of few samples makes it wide, and rightly so.
    """
    _check("MCE", confidence, correct)
    index = bin_index(confidence, bins)
    count = np.bincount(index, minlength=bins)
    there = count > 0
    n, right = count[there], np.bincount(index, correct, bins)[there]
    mean = np.bincount(index, confidence, bins)[there] / n
    level = 1 - (1 - LEVEL) / len(n)
    ends = np.array([clopper_pearson(int(k), int(m), level) for k, m in zip(right, n, strict=True)]) - mean[:, None]
    least = np.maximum(0.0, np.maximum(ends[:, 0], -ends[:, 1]))
    gap = np.abs(right / n - mean)
    most = np.abs(ends).max(axis=1)
    return Estimate(
        float(gap.max()), float(least.max()), float(most.max()), "Clopper-Pearson, Bonferroni", len(confidence)
    )


def _check(name: str, confidence: np.ndarray, correct: np.ndarray) -> None:
    require(name, confidence=confidence, correct=correct)
    if confidence.ndim != 1 or confidence.min() < 0 or confidence.max() > 1:
        raise DataError(
            f"{name}: confidences of shape {confidence.shape} span [{confidence.min():.3g}, {confidence.max():.3g}], "
            f"expected (N,) in [0, 1]"
        )
