"""Blur: Gaussian, frosted glass, defocus, motion, zoom."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from robustbench_ext.data.corruptions import filters
from robustbench_ext.data.corruptions.base import corruption
from robustbench_ext.randomness import SampleRandom


@corruption("gaussian-blur")
def gaussian_blur(x: Tensor, sigma: float, random: SampleRandom) -> Tensor:
    """Convolve with a Gaussian; the border is repeated."""
    return filters.gaussian_blur(x, sigma)


@corruption("glass-blur")
def glass_blur(x: Tensor, parameters: tuple[float, int, int], random: SampleRandom) -> Tensor:
    """Blur, swap every pixel with a random one near by, and blur again.

    The published script means to swap, but its assignment through array views copies one pixel onto the other where images
    have channels. Here pixels are swapped, as in the packages that carried the benchmark on.
    """
    sigma, reach, rounds = parameters
    n, c, h, w = x.shape
    x = filters.gaussian_blur(x, sigma)
    index = _swapped(h, w, reach, rounds, random).to(x.device)
    x = x.reshape(n, c, h * w).gather(2, index[:, None].expand(-1, c, -1)).reshape(n, c, h, w)
    return filters.gaussian_blur(x, sigma)


def _swapped(h: int, w: int, reach: int, rounds: int, random: SampleRandom) -> Tensor:
    """Where each pixel comes from, (N, H W), after the swaps: pixel by pixel, from the last to the first, all images at once.

    Each pixel (away from the border) is swapped with the one at an offset uniform in {-reach, ..., reach - 1}^2.
    """
    n = len(random.keys)
    origin = np.repeat(np.arange(h * w)[:, None], n, axis=1)
    rows, columns = range(h - reach, reach, -1), range(w - reach, reach, -1)
    every = np.arange(n)
    for turn in range(rounds):
        steps = random.uniform((2, len(rows), len(columns)), -reach, reach, turn).floor().long().cpu().numpy()
        offset = (steps[:, 0] * w + steps[:, 1]).transpose(1, 2, 0)  # (rows, columns, N)
        for i, row in enumerate(rows):
            for j, column in enumerate(columns):
                here = row * w + column
                there = np.minimum(here + offset[i, j], h * w - 1)
                mine = origin[here].copy()
                origin[here] = origin[there, every]
                origin[there, every] = mine
    return torch.from_numpy(origin.T.copy())


@corruption("defocus-blur")
def defocus_blur(x: Tensor, parameters: tuple[float, float], random: SampleRandom) -> Tensor:
    """Convolve with a disk; borders are mirrored."""
    return filters.convolve(x, filters.disk_kernel(*parameters))


@corruption("motion-blur")
def motion_blur(x: Tensor, parameters: tuple[int, float], random: SampleRandom) -> Tensor:
    """A trail in a direction uniform in [-45, 45] degrees."""
    radius, sigma = parameters
    return filters.motion_blur(x, radius, sigma, random.uniform((), -45.0, 45.0))


@corruption("zoom-blur")
def zoom_blur(x: Tensor, parameters: tuple[float, float], random: SampleRandom) -> Tensor:
    """The mean of the image and of enlargements of its middle by 1, 1 + step, ... (below `end`)."""
    end, step = parameters
    factors = np.arange(1, end, step)
    h, w = x.shape[2:]
    total = x.clone()
    for factor in factors.tolist():
        total += filters.separable(x, filters.zoom_matrix(h, factor), filters.zoom_matrix(w, factor))
    return total / (len(factors) + 1)
