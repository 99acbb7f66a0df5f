"""Detection of unknown inputs from scores: higher score = more unknown. `clean` are the known inputs' scores.

Tied scores are one threshold, so nothing depends on the order of samples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.special import expit, logit, ndtri

from robustbench_ext.metrics.estimate import LEVEL, Estimate, require
from robustbench_ext.metrics.intervals import (
    REPEATS,
    clopper_pearson_all,
    hash_seed,
    resamples,
    running_sums,
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


@dataclass(frozen=True)
class _Cuts:
    """Where thresholds cut the sorted scores of both groups, as numbers of samples below.

    Attributes:
        unknown: at each distinct score of an unknown sample: unknown ones below, unknown ones not above, clean ones below.
        clean: at each distinct score of a clean sample: clean ones below, clean ones not above, unknown ones not above.
    """

    unknown: tuple[np.ndarray, np.ndarray, np.ndarray]
    clean: tuple[np.ndarray, np.ndarray, np.ndarray]

    @classmethod
    def of(cls, clean: np.ndarray, unknown: np.ndarray) -> _Cuts:
        """Of sorted scores."""

        def cut(own: np.ndarray, other: np.ndarray, side: Literal["left", "right"]) -> tuple[np.ndarray, ...]:
            at = own[np.append(True, own[1:] != own[:-1])]
            return np.searchsorted(own, at, "left"), np.searchsorted(own, at, "right"), np.searchsorted(other, at, side)

        return cls(cut(unknown, clean, "left"), cut(clean, unknown, "right"))  # type: ignore[arg-type]


def _from_counts(zeros: np.ndarray, ones: np.ndarray, cuts: _Cuts) -> np.ndarray:
    """AUPR-out, AUPR-in, FPR@95 and detection accuracy (4, r) from running counts of the sorted clean samples (n0 + 1, r), the
    first 0, and of the unknown ones (n1 + 1, r).

    Precision counts where its recall grows, so that thresholds at the positives' own scores are enough. At least 95 % of the
    clean samples are first kept at a clean one's score; the best accuracy is at an unknown one's.
    """
    all0, all1 = zeros[-1], ones[-1]
    below, upto, others = cuts.unknown
    detected, alarms = all1 - ones[below], all0 - zeros[others]
    gains = ones[upto] - ones[below]
    aupr_out = (gains * detected / np.maximum(detected + alarms, 1e-300)).sum(axis=0) / all1
    best = (detected / all1 - alarms / all0).max(axis=0)
    below, upto, others = cuts.clean
    kept, missed = zeros[upto], ones[others]
    aupr_in = ((kept - zeros[below]) * kept / np.maximum(kept + missed, 1e-300)).sum(axis=0) / all0
    first = (kept < TPR * all0 - 1e-9).sum(axis=0)[None]
    fpr = np.take_along_axis(missed, first, axis=0)[0] / all1
    return np.stack([aupr_out, aupr_in, fpr, 0.5 + 0.5 * np.maximum(best, 0.0)])


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
    every = np.arange(len(edges))
    cuts = _Cuts((every, every + 1, every), (every, every + 1, every + 1))
    rng = np.random.Generator(np.random.Philox(hash_seed(0, 0, 249)))
    values = []
    for start in range(0, REPEATS, _AT_ONCE):
        repeats = min(_AT_ONCE, REPEATS - start)
        zeros, ones = (rng.multinomial(count.sum(), count / count.sum(), size=repeats).T for count in cells)
        values.append(_from_counts(running_sums(zeros), running_sums(ones), cuts))
    zeros, ones = (running_sums(count[:, None]) for count in cells)
    as_is = _from_counts(zeros, ones, cuts)
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
    order0, order1 = np.argsort(clean, kind="stable"), np.argsort(unknown, kind="stable")
    cuts = _Cuts.of(clean[order0], unknown[order1])

    def all_of_them(w0: np.ndarray, w1: np.ndarray) -> np.ndarray:
        return _from_counts(running_sums(w0.T[order0]), running_sums(w1.T[order1]), cuts)

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
    at = np.unique(np.concatenate([clean, unknown]))[::-1]
    zeros, ones = (np.append(0.0, len(s) - np.searchsorted(np.sort(s), at, "left")) for s in (clean, unknown))
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
