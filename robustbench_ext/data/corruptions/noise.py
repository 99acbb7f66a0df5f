"""Noise: Gaussian, shot (Poisson), impulse (salt and pepper), speckle (multiplicative Gaussian)."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from robustbench_ext.data.corruptions.base import corruption
from robustbench_ext.randomness import SampleRandom


@corruption("gaussian-noise")
def gaussian_noise(x: Tensor, std: float, random: SampleRandom) -> Tensor:
    """Add N(0, std^2) to every value."""
    return x + std * random.normal(x.shape[1:])


@corruption("shot-noise")
def shot_noise(x: Tensor, photons: float, random: SampleRandom) -> Tensor:
    """Replace every value v by Poisson(photons * v) / photons."""
    out = torch.zeros_like(x)
    lit = x > 0
    value, u = x[lit], random.uniform(x.shape[1:])[lit].double()
    level = (value * 255).round()
    eight_bits = torch.equal(level / 255, value)
    count = _looked_up(photons, level, u) if eight_bits else poisson_quantile(photons * value.double(), u)
    out[lit] = (count / photons).float()
    return out


def _looked_up(photons: float, level: Tensor, u: Tensor) -> Tensor:
    """`poisson_quantile` for values of eight bits (level / 255): 255 rates, whose distributions fit into a table."""
    table = _distributions(photons).to(u.device)
    # Row after row, each raised by its number: one ascending line.
    count: Tensor = torch.searchsorted(table.flatten(), level.double() + u) - level.long() * table.shape[1]
    return count.clamp_min(0)  # u = 0 finds the end of the row before


@lru_cache(maxsize=16)
def _distributions(photons: float) -> Tensor:
    """i + P(X <= k) for X ~ Poisson(photons i / 255), float64 (256, k), on and on until what is left is below 2^-24."""
    rate = photons * (torch.arange(256.0) / 255).double()[:, None]  # as the values are rounded: in float32
    most = int(photons + 7 * photons**0.5 + 20)
    table: Tensor = torch.arange(256.0).double()[:, None] + torch.special.gammaincc(
        1.0 + torch.arange(most).double(), rate
    )
    return table


@corruption("impulse-noise")
def impulse_noise(x: Tensor, amount: float, random: SampleRandom) -> Tensor:
    """Turn a share `amount` of the values into 0 or 1, either with probability 1/2."""
    u = random.uniform(x.shape[1:])
    return torch.where(u < amount / 2, 0.0, torch.where(u < amount, 1.0, x))


@corruption("speckle-noise")
def speckle_noise(x: Tensor, std: float, random: SampleRandom) -> Tensor:
    """Multiply every value by 1 + N(0, std^2)."""
    return x + x * (std * random.normal(x.shape[1:]))


def poisson_quantile(rate: Tensor, u: Tensor) -> Tensor:
    """The least k with P(X <= k) >= u for X ~ Poisson(rate), by one evaluation of the distribution and a short walk.

    Args:
        rate: > 0, float64 (n,).
        u: in [0, 1), float64 (n,).
    """
    z = torch.special.ndtri(u.clamp(2.0**-26, 1 - 2.0**-26))
    k: Tensor = (rate + rate.sqrt() * z + (z * z - 1) / 6).floor().clamp_min(0.0)
    below = torch.special.gammaincc(k + 1, rate)  # P(X <= k)
    mass = torch.exp(k * rate.log() - rate - torch.lgamma(k + 1))
    up = torch.nonzero(below < u)[:, 0]
    down = torch.nonzero((k > 0) & (below - mass >= u))[:, 0]
    while len(up):
        k[up] += 1
        mass[up] *= rate[up] / k[up]
        below[up] += mass[up]
        # Where the mass has run out, the sum is as near to 1 as it gets.
        up = up[(below[up] < u[up]) & (mass[up] > 1e-18)]
    while len(down):
        below[down] -= mass[down]
        mass[down] *= k[down] / rate[down]
        k[down] -= 1
        down = down[(k[down] > 0) & (below[down] - mass[down] >= u[down])]
    return k
