"""Linear filters on batches of images. What works on rows and columns alike is one small matrix, applied from both sides:
its borders are exact, and the cost does not grow with the width of the kernel."""

from __future__ import annotations

import itertools
import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


def separable(x: Tensor, rows: np.ndarray, columns: np.ndarray) -> Tensor:
    """R x C^T for images (..., H, W), with R (H', H) and C (W', W)."""
    r, c = (torch.from_numpy(m).to(x.device, x.dtype) for m in (rows, columns))
    return r @ x @ c.T


def _index(position: np.ndarray, n: int, mode: str) -> np.ndarray:
    """Pixels that positions beyond the border stand for: "nearest" repeats it, "reflect" mirrors it (edge pixel twice)."""
    if mode == "nearest":
        return np.asarray(np.clip(position, 0, n - 1))
    folded = np.mod(position, 2 * n)
    return np.asarray(np.minimum(folded, 2 * n - 1 - folded))


@lru_cache(maxsize=64)
def gaussian_matrix(n: int, sigma: float, mode: str = "nearest", truncate: float = 4.0) -> np.ndarray:
    """(n, n): convolution with a normalised Gaussian cut off at `truncate` sigma."""
    radius = int(truncate * sigma + 0.5)
    offsets = np.arange(-radius, radius + 1)
    weights = np.exp(-0.5 * (offsets / max(sigma, 1e-12)) ** 2)
    weights /= weights.sum()
    out = np.zeros((n, n))
    rows = np.arange(n)
    for offset, weight in zip(offsets, weights, strict=True):
        np.add.at(out, (rows, _index(rows + offset, n, mode)), weight)
    return out


def gaussian_blur(x: Tensor, sigma: float, mode: str = "nearest", truncate: float = 4.0) -> Tensor:
    """Gaussian blur of images (..., H, W)."""
    h, w = x.shape[-2:]
    return separable(x, gaussian_matrix(h, sigma, mode, truncate), gaussian_matrix(w, sigma, mode, truncate))


@lru_cache(maxsize=512)
def zoom_matrix(n: int, factor: float) -> np.ndarray:
    """(n, n): the middle of a line of n pixels, enlarged by `factor` >= 1 with linear interpolation, end points on end points.

    The middle is the ceil(n / factor) pixels from (n - that) // 2 on; of what they are enlarged to, the middle n pixels count.
    """
    crop = math.ceil(n / factor)
    first, size = (n - crop) // 2, round(crop * factor)
    position = (np.arange(n) + (size - n) // 2) * ((crop - 1) / max(size - 1, 1))
    low = np.clip(np.floor(position).astype(int), 0, max(crop - 2, 0))
    share = np.clip(position - low, 0.0, 1.0)
    out = np.zeros((n, n))
    np.add.at(out, (np.arange(n), first + low), 1 - share)
    np.add.at(out, (np.arange(n), first + np.minimum(low + 1, crop - 1)), share)
    return out


@lru_cache(maxsize=64)
def box_matrix(n: int, m: int) -> np.ndarray:
    """(m, n): each of m pixels is the mean of those of n whose centres lie within it (of the nearest one where m > n)."""
    scale = n / m
    support = 0.5 * max(scale, 1.0)
    out = np.zeros((m, n))
    for i in range(m):
        centre = (i + 0.5) * scale
        low, high = max(0, int(centre - support + 0.5)), min(n, int(centre + support + 0.5))
        inside = np.arange(low, high)
        distance = (inside - centre + 0.5) / max(scale, 1.0)
        chosen = inside[(distance > -0.5) & (distance <= 0.5)]
        out[i, chosen] = 1.0 / len(chosen)
    return out


@lru_cache(maxsize=16)
def disk_kernel(radius: float, sigma: float) -> np.ndarray:
    """A uniform disk whose edge is smoothed by a 3x3 Gaussian (5x5 for radii above 8)."""
    reach, size = (8, 3) if radius <= 8 else (int(radius), 5)
    axis = np.arange(-reach, reach + 1)
    disk = (axis[:, None] ** 2 + axis**2 <= radius**2).astype(np.float64)
    disk /= disk.sum()
    smooth = np.exp(-0.5 * ((np.arange(size) - size // 2) / sigma) ** 2)
    smooth /= smooth.sum()
    padded = np.pad(disk, size // 2, mode="reflect")
    rows = np.apply_along_axis(np.convolve, 0, padded, smooth, "valid")
    return np.apply_along_axis(np.convolve, 1, rows, smooth, "valid")


def mirrored(x: Tensor, pad: int) -> Tensor:
    """Images with mirrored borders (edge pixel once), also where the border is wider than the image."""
    while pad > 0:
        part = min(pad, min(x.shape[-2:]) - 1)
        x = F.pad(x, (part, part, part, part), mode="reflect")
        pad -= part
    return x


def convolve(x: Tensor, kernel: np.ndarray) -> Tensor:
    """Correlation of images (N, C, H, W) with a square kernel of odd side, mirrored borders.

    Convolutions of single channels are slow in PyTorch: large kernels go through the Fourier transform (within 2e-6 of the
    sum for images in [0, 1] and kernels that add up to 1), small ones are added up entry by entry.
    """
    h, w = x.shape[2:]
    reach = kernel.shape[0] // 2
    wide = mirrored(x, reach)
    if reach <= 1:
        out = torch.zeros_like(x)
        for (i, j), weight in np.ndenumerate(kernel):
            out.add_(wide[..., i : i + h, j : j + w], alpha=float(weight))
        return out
    size = wide.shape[2:]
    turned = torch.from_numpy(kernel[::-1, ::-1].copy()).to(x.device, x.dtype)
    product = torch.fft.rfft2(wide) * torch.fft.rfft2(turned, s=size)
    # What wraps around lands in the first rows and columns alone.
    whole: Tensor = torch.fft.irfft2(product, s=size)
    return whole[..., 2 * reach :, 2 * reach :].contiguous()


def motion_blur(x: Tensor, radius: int, sigma: float, angle: Tensor) -> Tensor:
    """ImageMagick's motion blur: a trail to one side, with weights exp(-i^2 / 2 sigma^2) at i = 0..2 radius pixels.

    Args:
        x: (N, C, H, W); what lies beyond the border repeats it.
        angle: degrees (N,), one direction per image.
    """
    n, _, h, w = x.shape
    width = 2 * radius + 1
    weights = np.exp(-0.5 * (np.arange(width) / sigma) ** 2)
    weights /= weights.sum()
    # In the order of their angles, images of one offset are neighbours: they are moved together, by slices.
    angle, order = angle.sort()
    radians, steps = torch.deg2rad(angle.double()), torch.arange(width, device=x.device)[:, None]
    down = torch.ceil(steps * torch.sin(radians) - 0.5).long().cpu().numpy()
    right = torch.ceil(steps * torch.cos(radians) - 0.5).long().cpu().numpy()
    inside = (np.abs(down) < h) & (np.abs(right) < w)  # a trail that has left the image ends there
    down, right = np.where(inside, down, 0), np.where(inside, right, 0)
    top, left = -int(down.min()), -int(right.min())  # the trail begins at offset 0: none of these is negative
    border = (left, int(right.max()), top, int(down.max()))
    wide, out = F.pad(x[order], border, mode="replicate"), torch.zeros_like(x)
    for weight, dy, dx, here in zip(weights.tolist(), down, right, inside, strict=True):
        turns = np.flatnonzero(np.diff(dy) | np.diff(dx) | np.diff(here)) + 1
        for a, b in itertools.pairwise([0, *turns.tolist(), n]):
            if here[a]:
                i, j = top + int(dy[a]), left + int(dx[a])
                out[a:b].add_(wide[a:b, :, i : i + h, j : j + w], alpha=weight)
    return out[order.argsort()]
