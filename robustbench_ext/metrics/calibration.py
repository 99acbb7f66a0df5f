"""Calibration of top-label confidence, and proper scores. Everything starts from logits, in float64."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy.special import log_softmax, softmax

from robustbench_ext.errors import DataError
from robustbench_ext.fingerprint import Rows
from robustbench_ext.metrics.blocks import each
from robustbench_ext.metrics.estimate import LEVEL, Estimate, require
from robustbench_ext.metrics.intervals import REPEATS, hash_seed, wilson
from robustbench_ext.metrics.resampling import LIMIT, bias_extended, resampled_bin_sums, sample_mean

BINS = 15

# For a perfectly calibrated bin the plug-in gap is |noise|, and a resample's is |noise + noise'|: sqrt(2) times as
# large on average. So the bias that resampling shows is (sqrt(2) - 1) of the bias of the plug-in itself.
BIAS_RATIO = 1 / (np.sqrt(2.0) - 1)


def confidence_and_correctness(logits: Rows, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Maximum softmax probability (N,) and whether its class is the label (N,) bool."""
    require("calibration", logits=logits, labels=labels)

    def both(z: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return softmax(z.astype(np.float64), axis=1).max(axis=1), z.argmax(axis=1) == y

    confidence, right = each(both, logits, labels)
    return confidence, right


def bin_index(confidence: np.ndarray, bins: int = BINS) -> np.ndarray:
    """Equal-width bins, right-closed: (0, 1/M], (1/M, 2/M], ...; 0 belongs to the first, 1 to the last."""
    if confidence.min() < 0 or confidence.max() > 1:
        raise DataError(f"confidences span [{confidence.min():.3g}, {confidence.max():.3g}], expected [0, 1]")
    edges = np.linspace(0, 1, bins + 1)[1:-1]
    return np.searchsorted(edges, confidence, side="left")


def ece(
    confidence: np.ndarray, correct: np.ndarray, bins: int = BINS, repeats: int = REPEATS, seed: int = 0
) -> Estimate:
    """Expected calibration error sum_b n_b/N |accuracy_b - confidence_b|, with a bootstrap interval.

    The plug-in is biased upwards, and a resample is biased once more, so a plain percentile interval would often lie
    above the truth, and above the value itself. Two corrections: the interval's upper end takes off the bias that
    resampling shows, its lower end also the plug-in's own bias as it would be at perfect calibration; and where the
    value is no larger than what a perfectly calibrated model would show (the 95 % quantile over outcomes drawn from the
    confidences themselves), the lower end is 0. At large n this is the percentile interval. A simulation in the tests
    shows its coverage for calibrated, slightly and strongly miscalibrated models.
    """
    require("ECE", confidence=confidence, correct=correct)
    return binned_error(confidence, correct, bin_index(confidence, bins), bins, repeats, seed)


def binned_error(
    confidence: np.ndarray,
    correct: np.ndarray,
    index: np.ndarray,
    bins: int,
    repeats: int = REPEATS,
    seed: int = 0,
) -> Estimate:
    """sum_b n_b/N |accuracy_b - confidence_b| over any bins, `index` (N,); the interval is described in `ece`."""
    n = len(confidence)
    gaps = correct - confidence.astype(np.float64)
    value = float(np.abs(np.bincount(index, gaps, bins)).sum() / n)
    values = np.abs(resampled_bin_sums(index, gaps, bins=bins, repeats=repeats, seed=seed)[0]).sum(axis=1) / n
    found = bias_extended(value, values, n, own=BIAS_RATIO, upper=1.0)
    chance = np.abs(calibrated_sums(confidence, index, bins, repeats, seed)).sum(axis=1) / n
    return replace(found, ci_low=0.0) if value <= np.quantile(chance, LEVEL) else found


def calibrated_sums(
    confidence: np.ndarray, index: np.ndarray, bins: int, repeats: int = REPEATS, seed: int = 0
) -> np.ndarray:
    """Sums of outcome - confidence in each bin for perfectly calibrated models with these confidences: (repeats, bins).

    Outcomes are drawn from the confidences. Resampled residuals would not do: where every sample is correct they show no
    variation at all. Above `LIMIT` samples the sums are drawn from their normal limit.
    """
    rng = np.random.Generator(np.random.Philox(hash_seed(seed, 0, 255)))
    n = len(confidence)
    if n > LIMIT:
        return rng.normal(size=(repeats, bins)) * np.sqrt(np.bincount(index, confidence * (1 - confidence), bins))
    weights = (index[:, None] == np.arange(bins)).astype(np.float64)
    rows = max(1, (1 << 22) // n)
    sums = []
    for start in range(0, repeats, rows):
        drawn = rng.random((min(rows, repeats - start), n)) < confidence
        sums.append((drawn - confidence) @ weights)
    return np.concatenate(sums)


def nll(logits: Rows, labels: np.ndarray) -> Estimate:
    """Mean negative log-likelihood, natural logarithm, from log-softmax without any clamp."""
    require("NLL", logits=logits, labels=labels)
    return sample_mean(nll_terms(logits, labels))


def nll_terms(logits: Rows, labels: np.ndarray) -> np.ndarray:
    """-log p(label) of each sample, float64 (N,)."""

    def terms(z: np.ndarray, y: np.ndarray) -> tuple[np.ndarray]:
        return (-log_softmax(z.astype(np.float64), axis=1)[np.arange(len(y)), y],)

    return each(terms, logits, labels)[0]


def brier(logits: Rows, labels: np.ndarray) -> Estimate:
    """Mean of sum_k (p_k - 1[y = k])^2, in [0, 2]."""
    require("Brier", logits=logits, labels=labels)
    return sample_mean(brier_terms(logits, labels))


def brier_terms(logits: Rows, labels: np.ndarray) -> np.ndarray:
    """sum_k (p_k - 1[y = k])^2 of each sample, float64 (N,)."""

    def terms(z: np.ndarray, y: np.ndarray) -> tuple[np.ndarray]:
        p = softmax(z.astype(np.float64), axis=1)
        return (1.0 - 2.0 * p[np.arange(len(y)), y] + np.square(p).sum(axis=1),)

    return each(terms, logits, labels)[0]


@dataclass(frozen=True)
class ReliabilityBin:
    """One bin of a reliability diagram; `low` and `high` are Wilson's interval of its accuracy."""

    confidence: float
    accuracy: float
    low: float
    high: float
    n: int


def reliability(confidence: np.ndarray, correct: np.ndarray, bins: int = BINS) -> list[ReliabilityBin]:
    """The non-empty bins of the reliability diagram that belongs to `ece`."""
    require("reliability", confidence=confidence, correct=correct)
    index = bin_index(confidence, bins)
    out = []
    for b in range(bins):
        members = index == b
        n = int(members.sum())
        if n:
            k = int(correct[members].sum())
            low, high = wilson(k, n)
            out.append(ReliabilityBin(float(confidence[members].mean()), k / n, low, high, n))
    return out


@dataclass(frozen=True)
class ConsistencyBand:
    """Where the accuracies of a perfectly calibrated model would lie, for the non-empty bins of `reliability`, in order.

    Attributes:
        confidence: (B,), mean confidence; the band is around it.
        low, high: (B,), each bin by itself: 95 % of calibrated models have this bin's accuracy within.
        low_all, high_all: (B,), all bins at once: 95 % of calibrated models have every bin's accuracy within.
        n: (B,), samples.
    """

    confidence: np.ndarray
    low: np.ndarray
    high: np.ndarray
    low_all: np.ndarray
    high_all: np.ndarray
    n: np.ndarray


def consistency_band(
    confidence: np.ndarray, bins: int = BINS, repeats: int = REPEATS, seed: int = 0
) -> ConsistencyBand:
    """Consistency bars of a reliability diagram (Broecker and Smith, Weather and Forecasting 22, 2007).

    They answer another question than Wilson's intervals in `reliability`: not where a bin's true accuracy lies, but which
    accuracies would be no surprise if the model were calibrated. Outcomes are drawn from the confidences themselves, which
    are kept as they are (Broecker and Smith resample them too). The simultaneous band is the same number of standard
    deviations wide in every bin. An accuracy outside it says: not calibrated, at the 5 % level.
    """
    require("consistency band", confidence=confidence)
    confidence = confidence.astype(np.float64)
    index = bin_index(confidence, bins)
    n = np.bincount(index, minlength=bins)
    there = n > 0
    n = n[there]
    mean = np.bincount(index, confidence, bins)[there] / n
    off = calibrated_sums(confidence, index, bins, repeats, seed)[:, there] / n
    spread = np.sqrt(np.bincount(index, confidence * (1 - confidence), bins)[there]) / n
    low, high = np.quantile(off, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    standardised = np.divide(np.abs(off), spread, out=np.zeros_like(off), where=spread > 0)
    wide = np.quantile(standardised.max(axis=1), LEVEL) * spread
    low_all, high_all = np.minimum(low, -wide), np.maximum(high, wide)
    low, high, low_all, high_all = (np.clip(mean + d, 0.0, 1.0) for d in (low, high, low_all, high_all))
    return ConsistencyBand(mean, low, high, low_all, high_all, n)
