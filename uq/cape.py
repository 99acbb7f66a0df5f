"""Calibrated targets: instead of its 0 or 1, a sample is given how often the outcome came among samples of like prediction.

*Deep Probability Estimation* (Liu et al., ICML 2022, arXiv 2111.10734) fine-tunes on such targets from time to time (CaPE): a
network that is fitted to outcomes alone soon learns them by heart, and with them their chance. The training is in
`defenses.cape`.
"""

from __future__ import annotations

import numpy as np

from robustbench_ext.errors import ConfigError, DataError


def binned_targets(predicted: np.ndarray, outcome: np.ndarray, bins: int = 10) -> np.ndarray:
    """The mean outcome of each sample's bin, (N,): `bins` bins of equal counts (or one more) along the order of the
    predictions.

    The mean of the targets is that of the outcomes, there are at most `bins` different ones; one bin gives the base rate, N
    bins give the outcomes. Equal predictions keep their order, so they may be cut.

    Args:
        predicted: (N,), probabilities of the outcome; outcome: 0 or 1, (N,).

    >>> binned_targets(np.array([0.9, 0.1, 0.8, 0.2]), np.array([1, 0, 0, 0]), bins=2).tolist()
    [0.5, 0.0, 0.5, 0.0]
    """
    _check(predicted, outcome)
    if not 1 <= bins <= len(predicted):
        raise ConfigError(
            f"calibrated targets: {bins} bins of {len(predicted)} samples, expected 1 to as many as samples"
        )
    targets = np.empty(len(predicted))
    for members in np.array_split(np.argsort(predicted, kind="stable"), bins):
        targets[members] = outcome[members].mean()
    return targets


def kernel_targets(predicted: np.ndarray, outcome: np.ndarray, sigma: float = 0.1, reach: int = 500) -> np.ndarray:
    """The mean outcome around each sample, (N,), with weights exp(-(p_i - p_j)^2 / (2 sigma^2)) over the `reach` samples
    before and behind it in the order of the predictions.
    """
    _check(predicted, outcome)
    if not sigma > 0 or reach < 0:
        raise ConfigError(f"calibrated targets: sigma = {sigma}, reach = {reach}; expected sigma > 0, reach >= 0")
    order = np.argsort(predicted, kind="stable")
    p, y, n = predicted[order].astype(np.float64), outcome[order].astype(np.float64), len(order)
    hits, mass = np.zeros(n), np.zeros(n)
    for shift in range(-min(reach, n - 1), min(reach, n - 1) + 1):
        here, there = slice(max(0, -shift), min(n, n - shift)), slice(max(0, shift), min(n, n + shift))
        weight = np.exp(-0.5 * ((p[here] - p[there]) / sigma) ** 2)
        hits[here] += weight * y[there]
        mass[here] += weight
    targets = np.empty(n)
    targets[order] = hits / mass  # a sample is in its own neighbourhood with weight 1
    return targets


def _check(predicted: np.ndarray, outcome: np.ndarray) -> None:
    if predicted.ndim != 1 or predicted.shape != outcome.shape or not len(predicted):
        raise DataError(
            f"calibrated targets: predictions {predicted.shape}, outcomes {outcome.shape}, expected (N,) both"
        )
    if not np.isfinite(predicted).all() or not np.isin(outcome, (0, 1)).all():
        raise DataError("calibrated targets: expected finite predictions, and outcomes of 0 and 1")
