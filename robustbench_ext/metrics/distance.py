"""Distances to the nearest mistake that an attack found: the whole curve of robust accuracy, and the median.

A distance is 0 for a sample that is misclassified clean and infinite for one that the attack never broke.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.stats import binom

from robustbench_ext.metrics.estimate import LEVEL, Estimate, require

POINTS = 51


def robust_accuracy_curve(distances: np.ndarray, level: float = LEVEL) -> dict[str, np.ndarray]:
    """The share of samples whose distance exceeds eps, at evenly spaced eps from 0 to the largest finite distance.

    The band holds for all eps at once (Dvoretzky, Kiefer and Wolfowitz with Massart's constant): half its width is
    sqrt(log(2 / (1 - level)) / (2 n)).

    Args:
        distances: (N,), 0 or more; infinite where nothing was found.
    Returns "eps", "value", "low", "high", each (51,); nothing where no finite distance exceeds 0.
    """
    require("robust-accuracy curve", distances=distances)
    finite = distances[np.isfinite(distances)]
    if not len(finite) or not finite.max() > 0:
        return {}
    eps = np.linspace(0.0, finite.max(), POINTS)
    value = (distances[:, None] > eps).mean(axis=0)
    half = math.sqrt(math.log(2.0 / (1.0 - level)) / (2.0 * len(distances)))
    return {"eps": eps, "value": value, "low": np.maximum(value - half, 0.0), "high": np.minimum(value + half, 1.0)}


def median_distance(distances: np.ndarray, level: float = LEVEL) -> Estimate:
    """The median, with the interval between two order statistics that holds for any distribution.

    Their ranks are k and n + 1 - k, k the largest with P(B < k) <= (1 - level) / 2 for B binomial (n, 1/2).
    """
    n = len(distances)
    if not n:
        return Estimate.undefined(0, "no sample is classified correctly clean")
    ordered = np.sort(distances)
    median = float(np.mean(ordered[[(n - 1) // 2, n // 2]]))
    if not math.isfinite(median):
        never = int(np.count_nonzero(~np.isfinite(distances)))
        return Estimate.undefined(n, f"the attack never broke {never} of {n} samples, half of them or more")
    k = int(binom.ppf((1.0 - level) / 2.0, n, 0.5))
    if k < 1:
        reason = f"{n} samples are too few for an interval"
        return Estimate(median, math.nan, math.nan, "none", n, reason, level)
    low, high = float(ordered[k - 1]), float(ordered[n - k])
    reason = "" if math.isfinite(high) else "the interval has no upper end: it reaches samples that were never broken"
    return Estimate(median, low, high if math.isfinite(high) else math.nan, "order statistics", n, reason, level)
