"""Two detectors on the same samples: the difference of their AUROCs, with an interval and a test (DeLong et al. 1988).

AUROC_a - AUROC_b is asymptotically normal; its variance is that of the differences of placements (each clean sample's
share of unknown ones above it, each unknown one's of clean ones below):

    V = var_clean(A_i - B_i) / n0 + var_unknown(A_j - B_j) / n1.

Sharing samples makes it far smaller than the sum of both variances, so a difference can be clear where intervals overlap.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr, ndtri

from robustbench_ext.errors import DataError
from robustbench_ext.metrics.detection import placements
from robustbench_ext.metrics.estimate import LEVEL, Estimate, require

FEWEST = 2


@dataclass(frozen=True)
class Comparison:
    """A difference with its interval, and the two-sided p-value of "no difference"."""

    difference: Estimate
    p_value: float


def compare_auroc(clean_a: np.ndarray, unknown_a: np.ndarray, clean_b: np.ndarray, unknown_b: np.ndarray) -> Comparison:
    """AUROC of detector a minus that of b, on the same clean (n0,) and unknown (n1,) samples in the same order.

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
    n0, n1 = len(clean_a), len(unknown_a)
    if n1 < FEWEST or n0 < FEWEST:
        few = Estimate.undefined(n0 + n1, f"{n0} clean and {n1} unknown inputs: a paired test needs two of each")
        return Comparison(few, math.nan)
    for what, scores in (("a", clean_a), ("a", unknown_a), ("b", clean_b), ("b", unknown_b)):
        require(f"paired test, detector {what}", scores=scores)
    a0, a1 = placements(clean_a, unknown_a)
    b0, b1 = placements(clean_b, unknown_b)
    value = float(a1.mean() - b1.mean())
    variance = float((a0 - b0).var(ddof=1)) / n0 + float((a1 - b1).var(ddof=1)) / n1
    if variance <= 1e-30:
        same = abs(value) < 1e-12
        ends = (0.0, 0.0) if same else (math.nan, math.nan)
        reason = "" if same else "the difference does not vary over samples"
        return Comparison(Estimate(0.0 if same else value, *ends, "none", n0 + n1, reason), 1.0 if same else math.nan)
    z = -float(ndtri((1 - LEVEL) / 2))
    half = z * math.sqrt(variance)
    estimate = Estimate(value, max(-1.0, value - half), min(1.0, value + half), "paired DeLong", n0 + n1)
    return Comparison(estimate, 2.0 * float(ndtr(-abs(value) / math.sqrt(variance))))


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
