"""Calibration of all classes' probabilities, not of the largest alone: classwise ECE, ACE, TACE, the parts of the Brier score.

Sources: ACE and TACE, Nixon et al. 2019 (arXiv 1904.01685); the within-bin part of the Brier score, Stephenson, Coelho and
Jolliffe (Weather and Forecasting 23, 2008). Bins as in `calibration` (equal width) and `binned` (equal mass).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import softmax

from robustbench_ext.errors import DataError
from robustbench_ext.fingerprint import Rows
from robustbench_ext.metrics.binned import equal_mass_index
from robustbench_ext.metrics.blocks import blocks
from robustbench_ext.metrics.calibration import BIAS_RATIO, BINS, bin_index
from robustbench_ext.metrics.estimate import LEVEL, Estimate, require
from robustbench_ext.metrics.intervals import REPEATS, hash_seed
from robustbench_ext.metrics.resampling import bias_extended, bin_rows, percentile, weighted

TACE_THRESHOLD = 0.01
_TABLE = 1 << 23  # entries of a table of units by (class, bin): 64 MiB


def classwise_ece(logits: Rows, labels: np.ndarray, bins: int = BINS) -> Estimate:
    """1/K sum_k sum_b n_kb/N |share of class k - mean p_k|, over all samples and equal-width bins of p_k."""
    classes = _checked("classwise ECE", logits, labels)

    def sums(chunk: range) -> tuple[np.ndarray, list[_Sums]]:
        return _equal_width(logits, labels, chunk, bins)

    return _mean_over_classes(len(labels), classes, bins, sums)


def ace(logits: np.ndarray, labels: np.ndarray, bins: int = BINS) -> Estimate:
    """Adaptive calibration error: classwise ECE over equal-mass bins of each class's p_k. Needs all probabilities at once."""
    return _adaptive("ACE", logits, labels, bins, 0.0)


def tace(logits: np.ndarray, labels: np.ndarray, bins: int = BINS, threshold: float = TACE_THRESHOLD) -> Estimate:
    """ACE over the p_k >= `threshold` alone.

    What is dropped counts nowhere: a class's term is divided by the number of probabilities it keeps, and the mean is over
    the classes that keep any. Other codes divide by N, which makes the value small where the threshold bites.
    """
    found = _adaptive("TACE", logits, labels, bins, threshold)
    return found if found.n else Estimate.undefined(len(labels), f"no probability reaches {threshold}")


def _adaptive(name: str, logits: np.ndarray, labels: np.ndarray, bins: int, threshold: float) -> Estimate:
    classes = _checked(name, logits, labels)
    p = softmax(logits.astype(np.float64), axis=1)

    def sums(chunk: range) -> tuple[np.ndarray, list[_Sums]]:
        return _equal_mass(p, labels, chunk, bins, threshold)

    return _mean_over_classes(len(labels), classes, bins, sums)


@dataclass(frozen=True)
class _Sums:
    """Of one class, over the samples whose p_k is kept: how many there are, and sums in each bin, each (bins,).

    Attributes:
        gap: of 1[y = k] - p_k; count: of 1; forecast: of p_k.
    """

    kept: int
    gap: np.ndarray
    count: np.ndarray
    forecast: np.ndarray


def _mean_over_classes(
    n: int, classes: int, bins: int, sums_of: Callable[[range], tuple[np.ndarray, list[_Sums]]]
) -> Estimate:
    """The mean over classes that keep samples; its interval is made as in `calibration.ece`, the calibrated model's outcomes
    being drawn bin by bin. Undefined, with n = 0, where no class keeps any.

    Args:
        sums_of: gives, for the classes of a range, the table that is resampled, (units, classes * (bins + 1)), each class's
            gaps by bin and then its number of samples kept; and each class's sums.
    """
    rng = np.random.Generator(np.random.Philox(hash_seed(0, 0, 252)))
    total, chance, values, there = 0.0, np.zeros(REPEATS), np.zeros(REPEATS), 0
    seen = np.zeros(REPEATS)
    for chunk in _chunks(n, classes, bins + 1):
        table, found = sums_of(chunk)
        for of_class in found:
            if of_class.kept:
                there += 1
                total += float(np.abs(of_class.gap).sum() / of_class.kept)
                count, mean = of_class.count, of_class.forecast / np.maximum(of_class.count, 1)
                drawn = rng.binomial(count, np.clip(mean, 0.0, 1.0), size=(REPEATS, bins))
                chance += np.abs(drawn - count * mean).sum(axis=1) / of_class.kept
        sums = weighted(table, REPEATS, 0).reshape(REPEATS, len(chunk), bins + 1)
        size = sums[:, :, -1]
        terms = np.abs(sums[:, :, :-1]).sum(axis=2) / np.maximum(size, 1e-300)
        values += np.where(size > 0, terms, 0.0).sum(axis=1)
        seen += (size > 0).sum(axis=1)
    if not there:
        return Estimate.undefined(0, "no class keeps a sample")
    value = total / there
    bound = bias_extended(value, values / np.maximum(seen, 1), n, own=BIAS_RATIO, upper=1.0)
    return replace(bound, ci_low=0.0) if value <= np.quantile(chance / there, LEVEL) else bound


def _equal_width(logits: Rows, labels: np.ndarray, chunk: range, bins: int) -> tuple[np.ndarray, list[_Sums]]:
    """Over equal-width bins all sums add up block by block."""
    units, place = bin_rows(len(labels))
    table = np.zeros((units, len(chunk), bins + 1))
    gap, forecast = np.zeros((2, len(chunk), bins))
    count = np.zeros((len(chunk), bins), dtype=np.int64)
    which = np.arange(len(chunk))
    for here, q, hit in _probabilities(logits, labels, chunk):
        index = bin_index(q, bins)
        off = hit - q
        np.add.at(table, (place[here, None], which, index), off)
        np.add.at(gap, (which, index), off)
        np.add.at(forecast, (which, index), q)
        np.add.at(count, (which, index), 1)
    table[:, :, -1] = np.bincount(place, minlength=units)[:, None]
    return table.reshape(units, -1), [
        _Sums(len(labels), *of_class) for of_class in zip(gap, count, forecast, strict=True)
    ]


def _equal_mass(
    p: np.ndarray, labels: np.ndarray, chunk: range, bins: int, threshold: float
) -> tuple[np.ndarray, list[_Sums]]:
    """Over equal-mass bins of the p_k of at least `threshold`, p (N, K)."""
    units, place = bin_rows(len(labels))
    table, found = np.zeros((units, len(chunk), bins + 1)), []
    for number, k in enumerate(chunk):
        kept = p[:, k] >= threshold
        if not kept.any():
            found.append(_Sums(0, *np.zeros((3, bins))))
            continue
        q, hit = p[kept, k], (labels[kept] == k).astype(np.float64)
        index = equal_mass_index(q, bins)
        count, forecast = np.bincount(index, minlength=bins), np.bincount(index, q, bins)
        found.append(_Sums(len(q), np.bincount(index, hit - q, bins), count, forecast))
        cells = place[kept] * bins + index
        table[:, number, :-1] = np.bincount(cells, hit - q, units * bins).reshape(units, bins)
        table[:, number, -1] = np.bincount(place[kept], minlength=units)
    return table.reshape(units, -1), found


def brier_parts(logits: Rows, labels: np.ndarray, bins: int = BINS) -> dict[str, Estimate]:
    """`brier_reliability` - `brier_resolution` + `brier_uncertainty` + `brier_within` = Brier score (sum form), exactly.

    For each class k, with bins b of p_k, means over a bin's samples, and o_k the share of class k:

        reliability  sum_b n_b/N (mean p - mean 1[y=k])^2        resolution  sum_b n_b/N (mean 1[y=k] - o_k)^2
        uncertainty  o_k (1 - o_k)                               within      sum_b n_b/N (var_b p - 2 cov_b(p, 1[y=k]))

    summed over classes. The textbook's three parts add up only where all samples of a bin share one forecast; the fourth is
    what they leave out. Reliability and resolution are squares of noisy means, biased upwards; their intervals allow for it,
    as does that of the uncertainty, which is biased downwards.
    """
    classes, n = _checked("Brier parts", logits, labels), len(labels)
    units, place = bin_rows(n)
    point, drawn = np.zeros((1, 4)), np.zeros((REPEATS, 4))
    for chunk in _chunks(n, classes, 3 * bins + 1):
        table = np.zeros((units, len(chunk), 3 * bins + 1))
        which = np.arange(len(chunk))
        for here, q, hit in _probabilities(logits, labels, chunk):
            unit, index = place[here, None], bin_index(q, bins)
            for number, values in enumerate((np.ones_like(q), q, hit)):
                np.add.at(table, (unit, which, number * bins + index), values)
            np.add.at(table[:, :, -1], (unit, which), (q - hit) ** 2)
        joined = table.reshape(units, -1)
        point += _brier_sums(joined.sum(axis=0, keepdims=True), len(chunk), bins)
        drawn += _brier_sums(weighted(joined, REPEATS, 0), len(chunk), bins)
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


def _checked(name: str, logits: Rows, labels: np.ndarray) -> int:
    """The number of classes of logits (N, K) whose labels (N,) fit."""
    require(name, logits=logits, labels=labels)
    if len(logits.shape) != 2 or labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise DataError(
            f"{name}: logits {logits.shape} and labels from {labels.min()} to {labels.max()}, expected (N, K) and 0 to K - 1"
        )
    return logits.shape[1]


def _probabilities(logits: Rows, labels: np.ndarray, chunk: range) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """Block by block: where its rows lie, p_k and 1[y = k] for the classes of a range, each float64 (n, k)."""
    for here, z in blocks(logits):
        p = softmax(z.astype(np.float64), axis=1)[:, chunk.start : chunk.stop]
        yield here, p, (labels[here, None] == np.arange(chunk.start, chunk.stop)).astype(np.float64)
