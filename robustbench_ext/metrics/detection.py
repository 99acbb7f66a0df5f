"""Detection of unknown inputs from scores: higher score = more unknown. `clean` are the known inputs' scores.

Tied scores are one threshold, so nothing depends on the order of samples.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.special import expit, logit, ndtri

from robustbench_ext.metrics.estimate import LEVEL, Estimate, require
from robustbench_ext.metrics.intervals import (
    REPEATS,
    clopper_pearson_all,
    hash_seed,
    resamples,
    simultaneous_level,
    wilson,
)
from robustbench_ext.metrics.resampling import LIMIT

TPR = 0.95
_CELLS = 2048  # of each group's scores
_AT_ONCE = 50  # resamples of cells: a few MiB


def auroc(clean: np.ndarray, unknown: np.ndarray) -> Estimate:
    """P(unknown > clean) + P(unknown = clean) / 2, with DeLong's interval on the logit scale.

    Where the two groups separate perfectly DeLong's variance is zero; there the interval is Newcombe's (Statistics in
    Medicine 2006, method 5), which does not collapse.
    """
    if not len(unknown):
        return Estimate.undefined(0, "no unknown inputs (no attack succeeded)")
    require("AUROC clean", scores=clean)
    require("AUROC unknown", scores=unknown)
    n0, n1 = len(clean), len(unknown)
    placed0, placed1 = placements(np.sort(clean), np.sort(unknown))
    value = float(placed1.mean())
    variance = (placed1.var(ddof=1) / n1 if n1 > 1 else 0.0) + (placed0.var(ddof=1) / n0 if n0 > 1 else 0.0)
    z = -float(ndtri((1 - LEVEL) / 2))
    if variance <= 0 or n1 < 2 or n0 < 2:
        return Estimate(value, *_newcombe(value, n0, n1, z), "Newcombe", n0 + n1)
    half = z * math.sqrt(variance) / (value * (1 - value))
    centre = float(logit(value))
    return Estimate(value, float(expit(centre - half)), float(expit(centre + half)), "DeLong, logit", n0 + n1)


def placements(clean: np.ndarray, unknown: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each clean sample the share of unknown ones above it, for each unknown one that of clean ones below; ties half.

    Both means are the AUROC, and DeLong's variance is that of these shares. In the order of the samples.
    """
    c, u = np.sort(clean), np.sort(unknown)
    above = 1.0 - (np.searchsorted(u, clean, "left") + np.searchsorted(u, clean, "right")) / (2.0 * len(u))
    below = (np.searchsorted(c, unknown, "left") + np.searchsorted(c, unknown, "right")) / (2.0 * len(c))
    return above, below


def area(clean: np.ndarray, unknown: np.ndarray) -> float:
    """The AUROC alone, without an interval."""
    require("AUROC clean", scores=clean)
    require("AUROC unknown", scores=unknown)
    u = np.sort(unknown)
    ranks = np.searchsorted(u, np.sort(clean), "left") + np.searchsorted(u, np.sort(clean), "right")
    return float(1.0 - ranks.mean() / (2.0 * len(u)))


def tnr_at_95(clean: np.ndarray, unknown: np.ndarray) -> float:
    """Share of unknown samples above the lowest threshold that keeps at least 95 % of the clean ones (TNR at 95 % TPR)."""
    require("TNR clean", scores=clean)
    require("TNR unknown", scores=unknown)
    kept = math.ceil(TPR * len(clean) - 1e-9)
    return float(np.mean(unknown > np.sort(clean)[kept - 1]))


def _newcombe(value: float, n0: int, n1: int, z: float) -> tuple[float, float]:
    """{t: |value - t| <= z sqrt(V(t))}, V the exponential-model variance at equal group sizes (n0 + n1) / 2."""
    from scipy.optimize import brentq

    extra = (n0 + n1) / 2 - 1

    def excess(t: float) -> float:
        variance = t * (1 - t) * (1 + extra * ((1 - t) / (2 - t) + t / (1 + t))) / (n0 * n1)
        return abs(value - t) - z * math.sqrt(variance)

    inside = min(max(value, 1e-9), 1 - 1e-9)
    low = 0.0 if excess(1e-12) <= 0 else float(brentq(excess, 1e-12, inside)) if excess(inside) <= 0 else inside
    high = (
        1.0 if excess(1 - 1e-12) <= 0 else float(brentq(excess, inside, 1 - 1e-12)) if excess(inside) <= 0 else inside
    )
    return (min(low, value), 1.0) if value == 1.0 else (0.0, max(high, value)) if value == 0.0 else (low, high)


class _Thresholds:
    """Counts of both groups at or above each distinct score, for one or many weightings at once."""

    def __init__(self, clean: np.ndarray, unknown: np.ndarray) -> None:
        scores = np.concatenate([clean, unknown])
        self._n0 = len(clean)
        self._order = np.argsort(-scores, kind="stable")
        ordered = scores[self._order]
        self._ends = np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True))
        self._is_unknown = self._order >= self._n0

    def cumulative(self, w0: np.ndarray, w1: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Weighted counts (r, G) of clean and unknown samples with score >= the g-th largest distinct score."""
        both = np.concatenate([w0, w1], axis=1)[:, self._order]
        unknown = np.cumsum(np.where(self._is_unknown, both, 0.0), axis=1)[:, self._ends]
        return np.cumsum(both, axis=1)[:, self._ends] - unknown, unknown


def _average_precision(positives: np.ndarray, negatives: np.ndarray) -> np.ndarray:
    """sum_k (R_k - R_{k-1}) P_k from cumulative counts (r, G), most positive first."""
    precision = positives / np.maximum(positives + negatives, 1e-300)
    recall = positives / positives[:, -1:]
    return np.asarray((np.diff(recall, axis=1, prepend=0.0) * precision).sum(axis=1))


def _from_below(counts: np.ndarray) -> np.ndarray:
    """Counts at or below each distinct score, lowest first, from counts at or above, highest first."""
    total = counts[:, -1:]
    below = total - np.concatenate([np.zeros_like(total), counts[:, :-1]], axis=1)
    return np.asarray(below[:, ::-1])


def _fpr(clean: np.ndarray, unknown: np.ndarray) -> np.ndarray:
    """Share of unknown samples at or below the lowest threshold that keeps >= 95 % of the clean ones."""
    below0, below1 = _from_below(clean), _from_below(unknown)
    first = np.argmax(below0 >= TPR * below0[:, -1:] - 1e-9, axis=1)[:, None]
    return np.asarray((np.take_along_axis(below1, first, axis=1) / below1[:, -1:])[:, 0])


def _detection_accuracy(clean: np.ndarray, unknown: np.ndarray) -> np.ndarray:
    """Max over thresholds of (detected unknown + accepted clean) / 2, from counts at or above each distinct score."""
    gain = unknown / unknown[:, -1:] - clean / clean[:, -1:]
    return np.asarray(0.5 + 0.5 * np.maximum(gain.max(axis=1), 0.0))


def _from_counts(zeros: np.ndarray, ones: np.ndarray) -> np.ndarray:
    """AUPR-out, AUPR-in, FPR@95 and detection accuracy (4, r) from counts (r, G) at or above each distinct score."""
    return np.stack(
        [
            _average_precision(ones, zeros),
            _average_precision(_from_below(zeros), _from_below(ones)),
            _fpr(zeros, ones),
            _detection_accuracy(zeros, ones),
        ]
    )


def _resampled_cells(clean: np.ndarray, unknown: np.ndarray) -> np.ndarray:
    """By how much resamples of many samples differ from them, in each of `_from_counts`' metrics: (4, `REPEATS`).

    The scores are cut into a few thousand cells of like counts, each group's counts are drawn anew (multinomial, which is what
    resampling does to counts), and a cell is taken for one score. That moves the metrics, in the resamples as in the sample, so
    that the differences stay. The cells are finer about the threshold of FPR@95, as fine as it varies.
    """
    n0 = len(clean)
    near = TPR + 6 * math.sqrt(TPR * (1 - TPR) / n0) * np.linspace(-1, 1, _CELLS // 4)
    even = np.linspace(0, 1, _CELLS)
    levels = np.concatenate([even, near[(near > 0) & (near < 1)]])
    edges = np.unique(np.concatenate([_at(clean, levels), _at(unknown, even)]))
    cells = [np.bincount(np.searchsorted(edges, s, side="left"), minlength=len(edges)) for s in (clean, unknown)]
    rng = np.random.Generator(np.random.Philox(hash_seed(0, 0, 249)))
    values = []
    for start in range(0, REPEATS, _AT_ONCE):
        repeats = min(_AT_ONCE, REPEATS - start)
        drawn = [rng.multinomial(count.sum(), count / count.sum(), size=repeats) for count in cells]
        values.append(_from_counts(*(np.cumsum(counts[:, ::-1], axis=1, dtype=np.float64) for counts in drawn)))
    as_is = _from_counts(*(np.cumsum(count[None, ::-1], axis=1, dtype=np.float64) for count in cells))
    return np.asarray(np.concatenate(values, axis=1) - as_is)


def _at(scores: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Scores at these levels, in [0, 1], of all of them: the lowest at 0, the highest at 1, each a score that occurs."""
    return np.asarray(np.sort(scores)[np.ceil(levels * (len(scores) - 1)).astype(np.int64)])


THRESHOLD_METRICS = ("aupr_out", "aupr_in", "fpr95", "tnr95", "detection_accuracy")


def threshold_metrics(clean: np.ndarray, unknown: np.ndarray) -> dict[str, Estimate]:
    """`aupr_out`, `aupr_in`, `fpr95`, `tnr95` and `detection_accuracy`, each with a stratified bootstrap interval; above
    `resampling.LIMIT` samples the bootstrap is one of counts.

    Known inputs are the positives of "95 % TPR". Detection accuracy takes its best threshold on the very samples that it is
    measured on, so it is optimistic; 0.5 is chance.
    """
    if not len(unknown):
        return dict.fromkeys(THRESHOLD_METRICS, Estimate.undefined(0, "no unknown inputs (no attack succeeded)"))
    require("detection clean", scores=clean)
    require("detection unknown", scores=unknown)
    counts = _Thresholds(clean, unknown)

    def all_of_them(w0: np.ndarray, w1: np.ndarray) -> np.ndarray:
        return _from_counts(*counts.cumulative(w0, w1))

    sizes = (len(clean), len(unknown))
    point = all_of_them(np.ones((1, sizes[0])), np.ones((1, sizes[1])))[:, 0]
    # One pass over the resamples serves all of them.
    if sum(sizes) <= LIMIT:
        drawn = np.concatenate([all_of_them(w0, w1) for w0, w1 in resamples(sizes)], axis=1)
    else:
        drawn = np.clip(point[:, None] + _resampled_cells(clean, unknown), 0.0, 1.0)
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=1)
    method = f"bootstrap ({REPEATS})"
    found = {
        name: Estimate(float(point[i]), float(low[i]), float(high[i]), method, sum(sizes))
        for i, name in ((0, "aupr_out"), (1, "aupr_in"), (3, "detection_accuracy"))
    }
    for i, name in ((0, "aupr_out"), (1, "aupr_in"), (3, "detection_accuracy")):
        if sizes[1] < 2 or low[i] == high[i]:
            reason = "fewer than two unknown inputs" if sizes[1] < 2 else "perfect separation: no resample differs"
            found[name] = Estimate(float(point[i]), math.nan, math.nan, "none", sum(sizes), reason)
    # No resample can show what no sample shows: with few unknown inputs "0 of 10" must not look certain. So the interval
    # of the FPR also covers Wilson's at the observed threshold, and where nothing varies the others have none.
    below, above = wilson(round(point[2] * sizes[1]), sizes[1])
    ends = min(float(low[2]), below), max(float(high[2]), above)
    both = f"{method} or Wilson, the wider"
    found["fpr95"] = Estimate(float(point[2]), *ends, both, sum(sizes))
    found["tnr95"] = Estimate(1.0 - float(point[2]), 1.0 - ends[1], 1.0 - ends[0], both, sum(sizes))
    return {name: found[name] for name in THRESHOLD_METRICS}


def roc_curve(clean: np.ndarray, unknown: np.ndarray, points: int = 101) -> tuple[np.ndarray, np.ndarray]:
    """(false alarm rate, detection rate), the exact ROC's corners thinned to about `points`, both ends kept."""
    zeros, ones = _corners(clean, unknown, points)
    return zeros / len(clean), ones / len(unknown)


def _corners(clean: np.ndarray, unknown: np.ndarray, points: int) -> tuple[np.ndarray, np.ndarray]:
    """Counts of both groups at or above thresholds, from none to all; thinned to about `points` of them."""
    zeros, ones = _Thresholds(clean, unknown).cumulative(np.ones((1, len(clean))), np.ones((1, len(unknown))))
    zeros, ones = np.append(0.0, zeros[0]), np.append(0.0, ones[0])
    if len(zeros) > points:
        # Keep the points nearest to equal steps of arc length, so that steep and flat parts are drawn alike.
        along = zeros / len(clean) + ones / len(unknown)
        keep = np.unique(np.searchsorted(along, np.linspace(0, along[-1], points)).clip(0, len(along) - 1))
        zeros, ones = zeros[keep], ones[keep]
    return zeros, ones


def roc_band(
    clean: np.ndarray, unknown: np.ndarray, points: int = 101, level: float = LEVEL
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(false alarm rate, detection rate, low, high): `roc_curve` with a band that holds the whole true ROC.

    At every threshold of the curve both rates have Clopper and Pearson's interval, at a level raised so that all of them hold
    at once (`intervals.simultaneous_level`; neighbouring thresholds share most of their samples). The true ROC rises from one
    of these boxes to the next: at a false alarm rate f it lies above the lower end of every box that is surely left of f, and
    below the upper end of every box that is surely right of it. Boxes bound more than the curve needs, so that the band covers
    more often than its level says.
    """
    require("ROC clean", scores=clean)
    require("ROC unknown", scores=unknown)
    n0, n1 = len(clean), len(unknown)
    zeros, ones = _corners(clean, unknown, points)
    fpr, tpr = zeros / n0, ones / n1
    with np.errstate(divide="ignore"):
        each = simultaneous_level([fpr / (1 - fpr), tpr / (1 - tpr)], level)
    left, right = clopper_pearson_all(zeros, np.full(len(zeros), n0), each)
    lower, upper = clopper_pearson_all(ones, np.full(len(ones), n1), each)
    right[0], lower[0] = 0.0, 0.0  # above all scores there is nothing
    # right and lower rise along the curve, and so do left and upper.
    before = np.searchsorted(right, fpr, side="left") - 1
    after = np.searchsorted(left, fpr, side="right")
    return fpr, tpr, lower[before.clip(0)], np.append(upper, 1.0)[after]
