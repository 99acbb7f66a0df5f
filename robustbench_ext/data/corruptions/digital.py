"""Brightness and contrast, colour, compression, resolution, elastic deformation."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from robustbench_ext.data.corruptions import filters
from robustbench_ext.data.corruptions.base import corruption
from robustbench_ext.randomness import SampleRandom


@corruption("brightness")
def brightness(x: Tensor, added: float, random: SampleRandom) -> Tensor:
    """Add to the value of HSV: the largest channel grows by `added`, hue and saturation stay."""
    value = x.amax(dim=1, keepdim=True)
    brighter = (value + added).clamp_max(1.0)
    # A black pixel has no hue and becomes grey.
    return torch.where(value > 0, x * (brighter / value.clamp_min(1e-12)), brighter)


@corruption("contrast")
def contrast(x: Tensor, factor: float, random: SampleRandom) -> Tensor:
    """Shrink the differences from each channel's mean."""
    mean = x.mean(dim=(2, 3), keepdim=True)
    return (x - mean) * factor + mean


@corruption("saturate")
def saturate(x: Tensor, parameters: tuple[float, float], random: SampleRandom) -> Tensor:
    """Scale and shift the saturation of HSV. Images of one channel have none, and stay as they are.

    Grey pixels count as red (hue 0), as in the libraries that the benchmark was made with: a shift tints them.
    """
    if x.shape[1] == 1:
        return x.clone()
    factor, addend = parameters
    value, least = x.amax(dim=1, keepdim=True), x.amin(dim=1, keepdim=True)
    chroma = value - least
    saturation = (chroma / value.clamp_min(1e-12) * factor + addend).clamp(0, 1)
    # rgb = V (1 - S k), where k says how far each channel is below the largest, in units of the chroma.
    red = torch.tensor([0.0, 1.0, 1.0], device=x.device).reshape(1, 3, 1, 1)
    k = torch.where(chroma > 0, (value - x) / chroma.clamp_min(1e-12), red)
    return value * (1 - saturation * k)


@corruption("jpeg-compression")
def jpeg_compression(x: Tensor, quality: int, random: SampleRandom) -> Tensor:
    """Through an 8-bit JPEG file of that quality."""
    pixels = (x * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    images = []
    for image in pixels:
        file = BytesIO()
        Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image).save(file, "JPEG", quality=quality)
        images.append(np.asarray(Image.open(file)).reshape(image.shape))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).to(x.device, torch.float32) / 255


@corruption("pixelate")
def pixelate(x: Tensor, share: float, random: SampleRandom) -> Tensor:
    """Reduce to that share of the side by box means, and enlarge again by repetition."""
    h, w = x.shape[2:]
    small = [max(1, int(side * share)) for side in (h, w)]
    rows, columns = (filters.box_matrix(m, n) @ filters.box_matrix(n, m) for n, m in zip((h, w), small, strict=True))
    return filters.separable(x, rows, columns)


@corruption("elastic-transform")
def elastic_transform(x: Tensor, parameters: tuple[float, float, float], random: SampleRandom) -> Tensor:
    """A random affine map (three points are shifted), then a smooth random displacement; bilinear, borders mirrored."""
    h, w = x.shape[2:]
    side = max(h, w)
    strength, sigma, corner = (side * p for p in parameters)
    x = _sample(x, *_affine(h, w, corner, random))
    if strength == 0:
        return x
    noise = random.uniform((2, h, w), -1.0, 1.0, step=1)
    shift = strength * filters.gaussian_blur(noise, sigma, "reflect", 3.0)
    rows = torch.arange(h, device=x.device)[:, None] + shift[:, 1]
    columns = torch.arange(w, device=x.device) + shift[:, 0]
    return _sample(x, rows, columns)


def _affine(h: int, w: int, corner: float, random: SampleRandom) -> tuple[Tensor, Tensor]:
    """Source rows and columns (N, H, W) of the affine map that takes three points to themselves plus uniform shifts."""
    cx, cy, size = w // 2, h // 2, min(h, w) // 3
    points = torch.tensor(
        [[cx + size, cy + size], [cx + size, cy - size], [cx - size, cy - size]],
        dtype=torch.float64,
        device=random.keys.device,
    )
    moved = points + random.uniform((3, 2), -corner, corner).double()
    ones = torch.ones(len(moved), 3, 1, dtype=torch.float64, device=moved.device)
    # The map back: from where a pixel ends up to where it comes from. Three points on a line have none; ridge by lstsq.
    back = torch.linalg.lstsq(torch.cat([moved, ones], dim=2), points.expand(len(moved), 3, 2)).solution
    rows, columns = torch.meshgrid(
        torch.arange(h, device=moved.device, dtype=torch.float64),
        torch.arange(w, device=moved.device, dtype=torch.float64),
        indexing="ij",
    )
    grid = torch.stack([columns, rows, torch.ones_like(rows)], dim=2)
    source = torch.einsum("hwk,nkc->nchw", grid, back).float()
    return source[:, 1], source[:, 0]


def _sample(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Images at fractional positions (N, H, W), bilinear, mirrored beyond the border (edge pixel once)."""
    h, w = x.shape[2:]
    grid = torch.stack([2 * columns / (w - 1) - 1, 2 * rows / (h - 1) - 1], dim=3)
    return F.grid_sample(x, grid.to(x.dtype), mode="bilinear", padding_mode="reflection", align_corners=True)
