"""Calibration of all classes' probabilities, not of the largest alone: classwise ECE, ACE, TACE, the parts of the Brier score.

Sources: ACE and TACE, Nixon et al. 2019 (arXiv 1904.01685); the within-bin part of the Brier score, Stephenson, Coelho and
Jolliffe (Weather and Forecasting 23, 2008). Bins as in `calibration` (equal width) and `binned` (equal mass).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
from scipy.special import softmax

from robustbench_ext.errors import DataError
from robustbench_ext.metrics.binned import equal_mass_index
from robustbench_ext.metrics.calibration import BIAS_RATIO, BINS, bin_index
from robustbench_ext.metrics.estimate import LEVEL, Estimate, require
from robustbench_ext.metrics.intervals import REPEATS, hash_seed
from robustbench_ext.metrics.resampling import bias_extended, bin_rows, percentile, weighted

TACE_THRESHOLD = 0.01
_TABLE = 1 << 23  # entries of a table of units by (class, bin): 64 MiB

Indexer = Callable[[np.ndarray, int], np.ndarray]


def classwise_ece(logits: np.ndarray, labels: np.ndarray, bins: int = BINS) -> Estimate:
    """1/K sum_k sum_b n_kb/N |share of class k - mean p_k|, over all samples and equal-width bins of p_k."""
    return _mean_over_classes("classwise ECE", logits, labels, bins, bin_index, 0.0)


def ace(logits: np.ndarray, labels: np.ndarray, bins: int = BINS) -> Estimate:
    """Adaptive calibration error: classwise ECE over equal-mass bins of each class's p_k."""
    return _mean_over_classes("ACE", logits, labels, bins, equal_mass_index, 0.0)


def tace(logits: np.ndarray, labels: np.ndarray, bins: int = BINS, threshold: float = TACE_THRESHOLD) -> Estimate:
    """ACE over the p_k >= `threshold` alone.

    What is dropped counts nowhere: a class's term is divided by the number of probabilities it keeps, and the mean is over
    the classes that keep any. Other codes divide by N, which makes the value small where the threshold bites.
    """
    return _mean_over_classes("TACE", logits, labels, bins, equal_mass_index, threshold)


def _mean_over_classes(
    name: str, logits: np.ndarray, labels: np.ndarray, bins: int, indexer: Indexer, threshold: float
) -> Estimate:
    """The interval as in `calibration.ece`; the calibrated model's outcomes are drawn bin by bin."""
    p = _probabilities(name, logits, labels)
    n, classes = p.shape
    rng = np.random.Generator(np.random.Philox(hash_seed(0, 0, 252)))
    total, chance, values, there = 0.0, np.zeros(REPEATS), np.zeros(REPEATS), 0
    seen = np.zeros(REPEATS)
    for chunk in _chunks(n, classes, bins + 1):
        parts = []
        for k in chunk:
            kept = p[:, k] >= threshold
            if not kept.any():
                continue
            there += 1
            q, hit = p[kept, k], (labels[kept] == k).astype(np.float64)
            index = indexer(q, bins)
            total += float(np.abs(np.bincount(index, hit - q, bins)).sum() / len(q))
            count = np.bincount(index, minlength=bins)
            mean = np.bincount(index, q, bins) / np.maximum(count, 1)
            drawn = rng.binomial(count, np.clip(mean, 0.0, 1.0), size=(REPEATS, bins))
            chance += np.abs(drawn - count * mean).sum(axis=1) / len(q)
            parts.append(_table(n, kept, index, bins, hit - q))
        if parts:
            sums = weighted(np.concatenate(parts, axis=1), REPEATS, 0).reshape(REPEATS, len(parts), bins + 1)
            size = sums[:, :, -1]
            terms = np.abs(sums[:, :, :-1]).sum(axis=2) / np.maximum(size, 1e-300)
            values += np.where(size > 0, terms, 0.0).sum(axis=1)
            seen += (size > 0).sum(axis=1)
    if not there:
        return Estimate.undefined(n, f"no probability reaches {threshold}")
    value = total / there
    found = bias_extended(value, values / np.maximum(seen, 1), n, own=BIAS_RATIO, upper=1.0)
    return replace(found, ci_low=0.0) if value <= np.quantile(chance / there, LEVEL) else found


def _table(n: int, kept: np.ndarray, index: np.ndarray, bins: int, gap: np.ndarray) -> np.ndarray:
    """Per unit of resampling (rows): the sum of gaps in each bin, then the number of probabilities kept."""
    rows, place = bin_rows(n)
    place = place[kept]
    sums = np.bincount(place * bins + index, gap, rows * bins).reshape(rows, bins)
    return np.concatenate([sums, np.bincount(place, minlength=rows)[:, None]], axis=1)


def brier_parts(logits: np.ndarray, labels: np.ndarray, bins: int = BINS) -> dict[str, Estimate]:
    """`brier_reliability` - `brier_resolution` + `brier_uncertainty` + `brier_within` = Brier score (sum form), exactly.

    For each class k, with bins b of p_k, means over a bin's samples, and o_k the share of class k:

        reliability  sum_b n_b/N (mean p - mean 1[y=k])^2        resolution  sum_b n_b/N (mean 1[y=k] - o_k)^2
        uncertainty  o_k (1 - o_k)                               within      sum_b n_b/N (var_b p - 2 cov_b(p, 1[y=k]))

    summed over classes. The textbook's three parts add up only where all samples of a bin share one forecast; the fourth is
    what they leave out. Reliability and resolution are squares of noisy means, biased upwards; their intervals allow for it,
    as does that of the uncertainty, which is biased downwards.
    """
    p = _probabilities("Brier parts", logits, labels)
    n, classes = p.shape
    rows, place = bin_rows(n)
    point, drawn = np.zeros((1, 4)), np.zeros((REPEATS, 4))
    for chunk in _chunks(n, classes, 3 * bins + 1):
        parts = []
        for k in chunk:
            q, hit = p[:, k], (labels == k).astype(np.float64)
            cells = place * bins + bin_index(q, bins)
            table = [np.bincount(cells, v, rows * bins).reshape(rows, bins) for v in (np.ones(n), q, hit)]
            parts.append(np.concatenate([*table, np.bincount(place, (q - hit) ** 2, rows)[:, None]], axis=1))
        joined = np.concatenate(parts, axis=1)
        point += _brier_sums(joined.sum(axis=0, keepdims=True), len(parts), bins)
        drawn += _brier_sums(weighted(joined, REPEATS, 0), len(parts), bins)
    value = [float(v) for v in point[0]]
    return {
        "brier_reliability": bias_extended(value[0], drawn[:, 0], n, upper=2.0),
        "brier_resolution": bias_extended(value[1], drawn[:, 1], n, upper=1.0),
        "brier_uncertainty": bias_extended(value[2], drawn[:, 2], n, downwards=True, upper=1 - 1 / classes),
        "brier_within": percentile(value[3], drawn[:, 3], n),
    }


def _brier_sums(sums: np.ndarray, classes: int, bins: int) -> np.ndarray:
    """The four parts (r, 4), added up over classes, from sums (r, classes * (3 bins + 1))."""
    by_class = sums.reshape(len(sums), classes, 3 * bins + 1)
    count, forecast, hit = (by_class[:, :, i * bins : (i + 1) * bins] for i in range(3))
    n = count.sum(axis=2)
    share = hit.sum(axis=2) / n
    m = np.maximum(count, 1e-300)
    reliability = ((forecast - hit) ** 2 / m).sum(axis=2) / n
    resolution = (count * (hit / m - share[:, :, None]) ** 2).sum(axis=2) / n
    uncertainty = share * (1 - share)
    within = by_class[:, :, -1] / n - reliability + resolution - uncertainty
    return np.asarray(np.stack([reliability, resolution, uncertainty, within], axis=2).sum(axis=1))


def _chunks(n: int, classes: int, columns: int) -> Iterator[range]:
    """Ranges of classes whose table fits into memory."""
    size = max(1, _TABLE // (bin_rows(n)[0] * columns))
    for start in range(0, classes, size):
        yield range(start, min(start + size, classes))


def _probabilities(name: str, logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    require(name, logits=logits, labels=labels)
    if logits.ndim != 2 or labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise DataError(
            f"{name}: logits {logits.shape} and labels from {labels.min()} to {labels.max()}, expected (N, K) and 0 to K - 1"
        )
    p: np.ndarray = softmax(logits.astype(np.float64), axis=1)
    return p
