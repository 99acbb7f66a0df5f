"""Energies of a classifier: one definition for defenses, detectors, attacks and metrics.

A softmax classifier with logits f(x) is an energy-based model (Grathwohl et al., ICLR 2020, arXiv 1912.03263; of robust
classifiers: arXiv 2407.06315):

    joint       E(x, y) = -f(x)[y]
    marginal    E(x)    = -log sum_k exp f(x)[k],   with a temperature  E_T(x) = -T log sum_k exp(f(x)[k] / T)
    I1          CE(f(x), y) = E(x, y) - E(x)
    I2          KL(p(x) || p(x')) = sum_k p_k(x) [E(x', k) - E(x, k)] + E(x) - E(x')

A constant added to all logits of a sample changes no prediction and shifts both energies by minus that constant, so the
energies of two networks cannot be compared by their level.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def _wide(logits: Tensor) -> Tensor:
    """Half precision as float32: its sums of exponentials overflow or lose the small terms. Others as they are."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def marginal_energy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """E_T(x) = -T logsumexp(f(x) / T), shape (N,); differentiable; high = unlike the training data.

    Args:
        logits: (N, K) floats.
        temperature: T > 0.
    Returns the logits' dtype, float32 for half precision.
    """
    wide = _wide(logits)
    if temperature == 1.0:
        return -torch.logsumexp(wide, dim=1)
    return -temperature * torch.logsumexp(wide / temperature, dim=1)


def joint_energy(logits: Tensor, y: Tensor) -> Tensor:
    """E(x, y) = -f(x)[y], shape (N,); differentiable.

    Args:
        logits: (N, K) floats.
        y: int64 (N,), one class for each sample: the label, or an attack's target.
    Returns the logits' dtype, float32 for half precision.
    """
    return -_wide(logits).gather(1, y[:, None])[:, 0]


class Energies(NamedTuple):
    """E(x) and E(x, y), each (N,)."""

    marginal: Tensor
    joint: Tensor


def energies(logits: Tensor, y: Tensor) -> Energies:
    """Both energies of a batch; their difference, joint minus marginal, is the cross-entropy (I1)."""
    return Energies(marginal_energy(logits), joint_energy(logits, y))
