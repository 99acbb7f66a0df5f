"""Calibration of top-label confidence, and proper scores. Everything starts from logits, in float64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import log_softmax, softmax

from robustbench_ext.errors import DataError
from robustbench_ext.metrics.estimate import LEVEL, Estimate, require
from robustbench_ext.metrics.intervals import REPEATS, bootstrap_mean, hash_seed, resamples, wilson

BINS = 15

# For a perfectly calibrated bin the plug-in gap is |noise|, and a resample's is |noise + noise'|: sqrt(2) times as
# large on average. So the bias that resampling shows is (sqrt(2) - 1) of the bias of the plug-in itself.
_BIAS_RATIO = 1 / (np.sqrt(2.0) - 1)


def confidence_and_correctness(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Maximum softmax probability (N,) and whether its class is the label (N,) bool."""
    require("calibration", logits=logits, labels=labels)
    p = softmax(logits.astype(np.float64), axis=1)
    return p.max(axis=1), logits.argmax(axis=1) == labels


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
    n = len(confidence)
    index = bin_index(confidence, bins)
    gaps = np.zeros((n, bins))
    gaps[np.arange(n), index] = correct - confidence
    total = gaps.sum(axis=0)
    value = float(np.abs(total).sum() / n)
    sums = np.concatenate([w @ gaps for (w,) in resamples((n,), repeats, seed)])
    values = np.abs(sums).sum(axis=1) / n
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    bias = max(0.0, float(values.mean()) - value)
    low = max(0.0, min(value, float(low) - bias - _BIAS_RATIO * bias))
    if value <= np.quantile(_calibrated(confidence, index[:, None] == np.arange(bins), repeats, seed), LEVEL):
        low = 0.0
    return Estimate(value, low, min(1.0, max(value, float(high) - bias)), f"bootstrap ({repeats}), bias-extended", n)


def _calibrated(confidence: np.ndarray, member: np.ndarray, repeats: int, seed: int) -> np.ndarray:
    """ECE of `repeats` perfectly calibrated models with these confidences: outcomes are drawn from the confidences.

    Resampled residuals would not do: where every sample is correct they show no variation at all.
    """
    rng = np.random.Generator(np.random.Philox(hash_seed(seed, 0, 255)))
    n, weights = len(confidence), member.astype(np.float64)
    rows = max(1, (1 << 22) // n)
    values = []
    for start in range(0, repeats, rows):
        drawn = rng.random((min(rows, repeats - start), n)) < confidence
        values.append(np.abs((drawn - confidence) @ weights).sum(axis=1) / n)
    return np.concatenate(values)


def nll(logits: np.ndarray, labels: np.ndarray) -> Estimate:
    """Mean negative log-likelihood, natural logarithm, from log-softmax without any clamp."""
    require("NLL", logits=logits, labels=labels)
    terms = -log_softmax(logits.astype(np.float64), axis=1)[np.arange(len(labels)), labels]
    return bootstrap_mean(terms)


def brier(logits: np.ndarray, labels: np.ndarray) -> Estimate:
    """Mean of sum_k (p_k - 1[y = k])^2, in [0, 2]."""
    require("Brier", logits=logits, labels=labels)
    p = softmax(logits.astype(np.float64), axis=1)
    terms = 1.0 - 2.0 * p[np.arange(len(labels)), labels] + np.square(p).sum(axis=1)
    return bootstrap_mean(terms)


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
