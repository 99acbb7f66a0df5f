"""Small networks fitted on the CPU: one loop with early stopping, deterministic for a seed; folds and parts by sample id."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from robustbench_ext.errors import DataError
from robustbench_ext.randomness import SampleRandom


@dataclass(frozen=True)
class Fit:
    """How a network is fitted; the defaults are those of Fakoor et al. (JMLR 2023) but for the limit on steps.

    Args:
        steps: at most so many steps of Adam (AMSGrad); batch: samples a step, None for 2^(3 + floor(log10 n)).
        every, patience: validate after so many steps; stop after so many without a better value.
    """

    lr: float = 1e-3
    weight_decay: float = 1e-7
    steps: int = 3000
    batch: int | None = None
    every: int = 100
    patience: int = 500


def mlp(inputs: int, outputs: int, width: int = 64, layers: int = 2, dropout: float = 0.0) -> nn.Sequential:
    """A perceptron with `layers` hidden layers and ELU; drawn from the global generator (see `minimise`)."""
    parts: list[nn.Module] = []
    for _ in range(layers):
        parts += [nn.Linear(inputs, width), nn.ELU(), *([nn.Dropout(dropout)] if dropout else [])]
        inputs = width
    return nn.Sequential(*parts, nn.Linear(inputs, outputs))


def minimise(
    build: Callable[[], nn.Module],
    loss: Callable[[nn.Module, Tensor], Tensor],
    n: int,
    how: Fit,
    seed: int,
    validate: Callable[[nn.Module], Tensor] | None = None,
) -> tuple[nn.Module, int, float]:
    """Build a network and minimise loss(network, rows) over batches of row indices 0..n-1.

    Returns the network in evaluation mode, the steps it has seen and its validation value. With `validate` it is the network
    of the best validation, the untrained one included; without, the last one (value NaN). All draws come from the seed.
    """
    batch = min(n, how.batch or 2 ** (3 + int(math.log10(max(1, n)))))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = build()
        optimiser = torch.optim.Adam(
            net.parameters(), lr=how.lr, weight_decay=how.weight_decay, amsgrad=True, foreach=True
        )
        best, state, at = _value(net, validate), copy.deepcopy(net.state_dict()), 0
        order, position = torch.randperm(n), 0
        net.train()
        for step in range(1, how.steps + 1):
            if position + batch > n:
                order, position = torch.randperm(n), 0
            rows = order[position : position + batch]
            position += batch
            optimiser.zero_grad()
            loss(net, rows).backward()
            optimiser.step()
            if validate is not None and (step % how.every == 0 or step == how.steps):
                value = _value(net, validate)
                if value < best:
                    best, state, at = value, copy.deepcopy(net.state_dict()), step
                elif step - at >= how.patience:
                    break
    if validate is None:
        return net.eval(), how.steps, math.nan
    net.load_state_dict(state)
    return net.eval(), at, best


def _value(net: nn.Module, validate: Callable[[nn.Module], Tensor] | None) -> float:
    if validate is None:
        return math.nan
    net.eval()
    with torch.no_grad():
        value = float(validate(net))
    net.train()
    return value


def folds(n: int, k: int, seed: int, ids: np.ndarray | None = None, purpose: str = "folds") -> np.ndarray:
    """The fold 0..k-1 of each of n samples, int (n,), sizes equal but for one: by rank of a hash of (seed, id).

    A sample keeps its fold when the samples are reordered. Without ids the position counts as the id.

    Raises:
        DataError: fewer than k samples, or k < 2.
    """
    if k < 2 or n < k:
        raise DataError(f"{n} samples cannot be cut into {k} folds: take 2 <= folds <= samples")
    words = SampleRandom.of(seed, ids if ids is not None else np.arange(n), f"uq/{purpose}").bits(2).numpy()
    rank = np.empty(n, dtype=np.int64)
    rank[np.argsort(words[:, 0] * 2**31 + (words[:, 1] >> 1), kind="stable")] = np.arange(n)
    return np.asarray(rank % k)


class Scaling:
    """Centre and scale of arrays (N, ...) along the first axis, in float64; constant columns keep the scale 1."""

    def __init__(self, values: np.ndarray) -> None:
        values = values.astype(np.float64)
        self.centre = values.mean(axis=0)
        spread = values.std(axis=0)
        self.scale = np.where(spread > 1e-12 * (1 + np.abs(self.centre)), spread, 1.0)

    def to(self, values: np.ndarray) -> np.ndarray:
        """Values in standard units."""
        return np.asarray((values - self.centre) / self.scale)

    def back(self, values: np.ndarray) -> np.ndarray:
        """Values in their own units."""
        return np.asarray(values * self.scale + self.centre)
