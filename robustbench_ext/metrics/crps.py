"""The continuous ranked probability score of a predictive distribution F, in units of y; proper, lower is better.

    CRPS(F, y) = integral (F(x) - 1[x >= y])^2 dx = E|X - y| - E|X - X'| / 2 = 2 integral_0^1 psi_t(y - F^-1(t)) dt

(Gneiting and Raftery 2007), psi the pinball loss. A point prediction's CRPS is its absolute error.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.special import ndtr

from robustbench_ext.errors import DataError
from robustbench_ext.metrics.estimate import Estimate, require
from robustbench_ext.metrics.quantiles import pinball_losses
from robustbench_ext.metrics.resampling import sample_mean


def crps_quantiles(y: np.ndarray, quantiles: np.ndarray, levels: Sequence[float]) -> Estimate:
    """The integral over levels as a sum: 2 sum_k w_k psi_k, w_k the share of (0, 1) that is nearest to level k.

    An approximation. At the levels (k - 1/2) / m it is 2 mean psi, exactly the CRPS of an ensemble of these m quantiles, and
    its error falls as 1/m. With few levels it says little of the tails: compare it between methods with equal levels only.

    Args:
        y: (N,); quantiles: (N, m); levels: m increasing numbers between 0 and 1.
    """
    losses = pinball_losses(y, quantiles, levels)
    t = np.asarray(levels, dtype=np.float64)
    weights = np.diff(np.concatenate([[0.0], (t[1:] + t[:-1]) / 2, [1.0]]))
    return sample_mean(2.0 * losses @ weights)


def crps_gaussian(y: np.ndarray, mean: np.ndarray, std: np.ndarray) -> Estimate:
    """The closed form for N(mean, std^2), each (N,): std (z (2 Phi(z) - 1) + 2 phi(z) - 1 / sqrt(pi)), z = (y - mean) / std.

    Where std is 0 it is |y - mean|, the limit.
    """
    require("CRPS", y=y, mean=mean, std=std)
    if not y.shape == mean.shape == std.shape == (len(y),) or std.min() < 0:
        raise DataError(f"CRPS: y {y.shape}, mean {mean.shape}, std {std.shape}, expected (N,) each and std >= 0")
    if not all(np.isfinite(a).all() for a in (y, mean, std)):
        raise DataError("CRPS: y, mean and std must be finite")
    off, sd = y.astype(np.float64) - mean, std.astype(np.float64)
    z = np.divide(off, sd, out=np.zeros_like(off), where=sd > 0)
    density = np.exp(-0.5 * z**2) / np.sqrt(2 * np.pi)
    terms = off * (2 * ndtr(z) - 1) + sd * (2 * density - 1 / np.sqrt(np.pi))
    return sample_mean(np.where(sd > 0, terms, np.abs(off)))


def crps_ensemble(y: np.ndarray, members: np.ndarray, fair: bool = False) -> Estimate:
    """mean_i |x_i - y| - (1 / 2D) sum_ij |x_i - x_j| for M members; D = M^2, or M (M - 1) where `fair`.

    The former ("NRG") is the CRPS of the ensemble itself; the fair one estimates the CRPS of the distribution that the
    members are drawn from, without bias, and may be negative (Ferro 2014). It is undefined with one member.

    Args:
        y: (N,); members: (N, M), in any order.
    """
    require("CRPS", y=y, members=members)
    if y.ndim != 1 or members.ndim != 2 or not members.shape[1]:
        raise DataError(f"CRPS: y {y.shape} and members {members.shape}, expected (N,) and (N, M) with M >= 1")
    if not (np.isfinite(y).all() and np.isfinite(members).all()):
        raise DataError("CRPS: y and members must be finite")
    m = members.shape[1]
    if fair and m < 2:
        return Estimate.undefined(len(y), "the fair CRPS needs two members")
    x = np.sort(members.astype(np.float64), axis=1)
    # sum_{i<j} (x_j - x_i) = sum_i (2 i - M - 1) x_i over the sorted members.
    apart = (x - x[:, :1]) @ (2.0 * np.arange(1, m + 1) - m - 1)
    return sample_mean(np.abs(x - y[:, None]).mean(axis=1) - apart / (m * (m - 1) if fair else m * m))
