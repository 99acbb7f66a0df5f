"""Inputs that belong to no class, made without a download: letters, symbols, photographs, noise.

Every function takes the number of samples and the shape (C, H, W) and returns a split with labels -1. A sample is a
function of its index alone, so a larger set contains a smaller one.

Letters and symbols are *near* outliers of digit data (strokes on a plain ground), photographs and noise are *far*. Any
dataset can serve as well (`from_dataset`): its test split, resized.
O, I, l, Z, S, B and small b, g, q are left out of the letters: many a reader takes them for digits.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from robustbench_ext.data.base import ArraySplit, Split
from robustbench_ext.data.loading import load_dataset
from robustbench_ext.fingerprint import hash_strings
from robustbench_ext.randomness import SampleRandom

Shape = tuple[int, int, int]
DISTANCE = {"letters": "near", "symbols": "near", "photos": "far", "uniform-noise": "far", "gaussian-noise": "far"}

_LETTERS = "ACDEFGHJKLMNPQRTUVWXYacdefhjkmnprtuvwxy"
_SYMBOLS = "←↑→↓↔↕⇒⇔∀∂∃∅∇∈∉∏∑√∝∞∠∧∩∪∫≈≠≡⊂⊃⊕⊗⊥△▽◇★☆♠♣♥♦♪✓✗§¶#&%@?{}"
FONTS = (
    "DejaVuSans.ttf",
    "DejaVuSans-Bold.ttf",
    "DejaVuSans-Oblique.ttf",
    "DejaVuSerif.ttf",
    "DejaVuSerif-Italic.ttf",
    "DejaVuSansMono.ttf",
    "DejaVuSansMono-Bold.ttf",
)
_GLYPH = 96  # pixels; glyphs are drawn large once and scaled down with anti-aliasing


def _split(name: str, x: Tensor) -> Split:
    return ArraySplit(x.clamp(0, 1), np.full(len(x), -1), [f"{name}:{i:06d}" for i in range(len(x))])


def _random(name: str, n: int) -> SampleRandom:
    return SampleRandom.of(0, [f"{name}:{i:06d}" for i in range(n)], f"outliers/{name}")


@lru_cache(maxsize=1024)
def glyph(character: str, font: str) -> Tensor:
    """One character, white on black, centred, (96, 96)."""
    from matplotlib import get_data_path
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath
    from PIL import Image, ImageDraw

    path = TextPath((0, 0), character, size=_GLYPH, prop=FontProperties(fname=f"{get_data_path()}/fonts/ttf/{font}"))
    polygons = [p for p in map(np.asarray, path.to_polygons()) if len(p) >= 3]
    points = np.concatenate(polygons)
    low, high = points.min(0), points.max(0)
    scale = 0.94 * _GLYPH / float(max(high - low))
    offset = (np.array([_GLYPH, _GLYPH]) - scale * (high - low)) / 2
    canvas = np.zeros((_GLYPH, _GLYPH), dtype=bool)
    for polygon in polygons:
        xy = (polygon - low) * scale + offset
        xy[:, 1] = _GLYPH - xy[:, 1]
        image = Image.new("1", (_GLYPH, _GLYPH))
        ImageDraw.Draw(image).polygon([tuple(map(float, p)) for p in xy], fill=1)
        canvas ^= np.asarray(image)  # even-odd rule: an inner contour cuts a hole
    return torch.from_numpy(canvas.astype(np.float32))


def _rendered(name: str, characters: str, n: int, shape: Shape) -> Split:
    """Random characters in random fonts, rotated, scaled and shifted, at the given size."""
    channels, height, width = shape
    random = _random(name, n)
    pick = random.child("glyph").bits(2)
    glyphs = torch.stack(
        [glyph(characters[int(a) % len(characters)], FONTS[int(b) % len(FONTS)]) for a, b in pick.tolist()]
    )
    pose = random.child("pose").uniform((4,), -1.0, 1.0)
    angle, size = pose[:, 0] * 0.26, 0.78 + 0.12 * pose[:, 1]  # 15 degrees; the glyph fills 66 to 90 % of the frame
    cos, sin = torch.cos(angle) / size, torch.sin(angle) / size
    shift = 0.10 * pose[:, 2:]
    theta = torch.stack([torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)], 1)
    # Supersample four-fold, then average: anti-aliased at any size.
    grid = F.affine_grid(theta, [n, 1, 4 * height, 4 * width], align_corners=False)
    drawn = F.grid_sample(glyphs[:, None], grid, align_corners=False)
    x = F.avg_pool2d(drawn, 4).expand(-1, channels, -1, -1)
    return _split(name, x)


def letters(n: int, shape: Shape) -> Split:
    """Letters that no reader takes for digits, in seven bundled fonts, with random pose."""
    return _rendered("letters", _LETTERS, n, shape)


def symbols(n: int, shape: Shape) -> Split:
    """Arrows, mathematical operators and shapes, with random pose."""
    return _rendered("symbols", _SYMBOLS, n, shape)


def photos(n: int, shape: Shape) -> Split:
    """Random square patches (48 to 160 pixels, flipped at random) of scikit-learn's two sample photographs."""
    from sklearn.datasets import load_sample_images

    channels, height, width = shape
    pictures = [torch.from_numpy(p.astype(np.float32) / 255).permute(2, 0, 1) for p in load_sample_images().images]
    draws = _random("photos", n).uniform((5,)).tolist()
    patches = []
    for which, side, top, left, flip in draws:
        picture = pictures[int(which * len(pictures))]
        edge = 48 + int(side * 113)
        y, x = int(top * (picture.shape[1] - edge + 1)), int(left * (picture.shape[2] - edge + 1))
        patch = picture[:, y : y + edge, x : x + edge]
        patch = patch.flip(2) if flip < 0.5 else patch
        patches.append(F.interpolate(patch[None], (height, width), mode="area")[0])
    stack = torch.stack(patches)
    if channels == 1:
        stack = (stack * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)
    return _split("photos", stack)


def uniform_noise(n: int, shape: Shape) -> Split:
    """Every value independent and uniform in [0, 1]."""
    return _split("uniform-noise", _random("uniform-noise", n).uniform(shape))


def gaussian_noise(n: int, shape: Shape) -> Split:
    """Every value independent, N(0.5, 0.25), clipped to [0, 1]."""
    return _split("gaussian-noise", 0.5 + 0.25 * _random("gaussian-noise", n).normal(shape))


class Foreign(Split):
    """The samples of another dataset as outliers: labels -1, resized with anti-aliasing, grey or coloured as asked for."""

    def __init__(self, parent: Split, shape: Shape, source: str) -> None:
        self._parent, self._shape, self._source = parent, shape, source
        self.labels = np.full(len(parent), -1, dtype=np.int64)
        self.ids = np.asarray([f"{source}:{i}" for i in parent.ids.tolist()], dtype=np.str_)

    def images(self, index: np.ndarray | slice) -> Tensor:
        x = self._parent.images(index)
        channels, height, width = self._shape
        if x.shape[1] == 3 and channels == 1:
            x = (x * x.new_tensor([0.299, 0.587, 0.114])[:, None, None]).sum(dim=1, keepdim=True)
        elif x.shape[1] == 1:
            x = x.expand(-1, channels, -1, -1)
        if x.shape[2:] != (height, width):
            x = F.interpolate(x, (height, width), mode="bilinear", antialias=True, align_corners=False)
        return x.clamp(0, 1).contiguous()

    def fingerprint(self) -> str:
        return hash_strings([self._parent.fingerprint(), *self.ids.tolist(), *map(str, self._shape)])


def from_dataset(spec: str, n: int, shape: Shape) -> Split:
    """The first n test samples of a dataset (all where there are fewer), for `{outliers: "torchvision:SVHN"}`."""
    return Foreign(load_dataset(spec)["test"].take(n), shape, spec)
