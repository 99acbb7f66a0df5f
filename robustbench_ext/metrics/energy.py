"""Energies of natural and attacked inputs: what attacks and training do to them (arXiv 2407.06315).

From logits alone, in float64; the definitions are those of `robustbench_ext.models.energy`. The delta energy is paired,

    dE(x) = E(x) - E(x*),

positive where the attacked input x* looks more like the training data than x does. Means of dE and |dE| do not change
when a constant is added to all logits; they grow with the scale of the logits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import stdtrit

from robustbench_ext.errors import DataError
from robustbench_ext.fingerprint import Rows
from robustbench_ext.metrics.blocks import each
from robustbench_ext.metrics.estimate import LEVEL, Estimate, require
from robustbench_ext.models.energy import energies

BINS = 24


@dataclass(frozen=True)
class SampleEnergies:
    """E(x) and E(x, y) of each sample, each float64 (N,)."""

    marginal: np.ndarray
    joint: np.ndarray

    def __len__(self) -> int:
        return len(self.marginal)

    def of(self, chosen: np.ndarray) -> SampleEnergies:
        """Those of some samples, (N,) bool."""
        return SampleEnergies(self.marginal[chosen], self.joint[chosen])


def sample_energies(logits: Rows, labels: np.ndarray) -> SampleEnergies:
    """The energies of recorded logits (N, K) and labels (N,)."""
    require("energies", logits=logits, labels=labels)

    def both(z: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        found = energies(torch.from_numpy(z.astype(np.float64)), torch.from_numpy(y.astype(np.int64)))
        return found.marginal.numpy(), found.joint.numpy()

    return SampleEnergies(*each(both, logits, labels))


def mean_energy(values: np.ndarray) -> Estimate:
    """The mean of per-sample energies, or of their paired differences, with Student's interval; undefined for none."""
    if not len(values):
        return Estimate.undefined(0, "no sample is classified correctly clean and not of the target class")
    require("energy", values=values)
    n, mean = len(values), float(values.mean())
    if n < 2:
        return Estimate(mean, math.nan, math.nan, "none", n, "one sample has no interval")
    half = float(stdtrit(n - 1, (1 + LEVEL) / 2) * values.std(ddof=1) / math.sqrt(n))
    return Estimate(mean, mean - half, mean + half, "Student", n)


def clean_metrics(natural: SampleEnergies) -> dict[str, Estimate]:
    """The energies of inputs as they are, by metric."""
    return {"energy_marginal": mean_energy(natural.marginal), "energy_joint": mean_energy(natural.joint)}


def attack_metrics(natural: SampleEnergies, attacked: SampleEnergies) -> dict[str, Estimate]:
    """The energies of attacked inputs, and what the attack changed on the very same samples, by metric."""
    if len(natural) != len(attacked):
        raise DataError(f"energies of {len(natural)} natural and {len(attacked)} attacked inputs cannot be paired")
    delta = natural.marginal - attacked.marginal
    return {
        **clean_metrics(attacked),
        "delta_energy": mean_energy(delta),
        "abs_delta_energy": mean_energy(np.abs(delta)),
        "delta_energy_joint": mean_energy(natural.joint - attacked.joint),
    }


def energy_histograms(natural: SampleEnergies, attacked: SampleEnergies, bins: int = BINS) -> dict[str, np.ndarray]:
    """Shares of samples over common bins, between the 0.5 % and 99.5 % points of all four energies together.

    Returns "edges" (bins + 1,), and "natural", "attacked", "natural_joint", "attacked_joint"; the last share is repeated, so
    that all are of equal length.
    """
    groups = {
        "natural": natural.marginal,
        "attacked": attacked.marginal,
        "natural_joint": natural.joint,
        "attacked_joint": attacked.joint,
    }
    require("energy histograms", **groups)
    low, high = np.quantile(np.concatenate(list(groups.values())), [0.005, 0.995])
    if not high > low:
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, bins + 1)
    shares = {name: np.histogram(np.clip(v, low, high), edges)[0] / len(v) for name, v in groups.items()}
    return {"edges": edges, **{name: np.append(share, share[-1]) for name, share in shares.items()}}
