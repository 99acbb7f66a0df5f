"""The published corrupted images: CIFAR-10-C, CIFAR-100-C and ImageNet-C, from copies on disk. Never downloaded.

Hendrycks, Dietterich: *Benchmarking neural network robustness to common corruptions and perturbations*, ICLR 2019,
arXiv 1903.12261. Folders as published, in $RBX_DATA (default `./data`) or given:

    CIFAR-10-C/NAME.npy       uint8 (50000, 32, 32, 3): severity s is rows 10000 (s - 1) to 10000 s, ordered as the test set
    CIFAR-10-C/labels.npy     uint8 (50000,): the test set's labels, five times
    ImageNet-C/NAME/SEVERITY/WNID/*.JPEG      224x224, RGB; or ImageNet-C/ARCHIVE/NAME/..., such as noise/gaussian_noise

This is what the authors' scripts write (github.com/hendrycks/robustness, ImageNet-C/create_c: make_cifar_c.py,
make_imagenet_c.py). ImageNet-C's labels are the places of the 1,000 WordNet ids in their sorted order, as in torchvision.
Published names have underscores (gaussian_noise), the package's have hyphens; either is taken.
"""

from __future__ import annotations

import hashlib
import os
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from robustbench_ext.data.base import Split, Subset
from robustbench_ext.data.corruptions.levels import TABLE
from robustbench_ext.data.domains import RGBFolder
from robustbench_ext.data.files import _IMAGE_SUFFIXES, _ordered
from robustbench_ext.errors import ConfigError, DataError, unknown_name
from robustbench_ext.fingerprint import hash_strings

SEVERITIES = (1, 2, 3, 4, 5)
CIFAR_TEST = 10_000  # images in the test set of either CIFAR
# torchvision's name: the folder's, and where the authors published it.
_CIFAR = {
    "CIFAR10": ("CIFAR-10-C", "doi.org/10.5281/zenodo.2535967"),
    "CIFAR100": ("CIFAR-100-C", "doi.org/10.5281/zenodo.3555552"),
}
IMAGENET_CLASSES, IMAGENET_SIDE = 1000, 224
_IMAGENET = ("ImageNet-C", "doi.org/10.5281/zenodo.2235448")


def published_name(corruption: str) -> str:
    """The file's name of a corruption: `gaussian_noise` for `gaussian-noise` (or itself).

    Raises:
        ConfigError: no such corruption.
    """
    name = corruption.replace("_", "-")
    if name not in TABLE:
        raise ConfigError(unknown_name("corruption", corruption, TABLE))
    return name.replace("-", "_")


def cifar_c(split: Split, corruption: str, severity: int, root: str | Path | None = None) -> Split:
    """The published corrupted versions of samples of CIFAR's test split, in their order, with their ids and labels.

    Args:
        split: samples of `cifar10` or `cifar100` (or `torchvision:CIFAR10`, `torchvision:CIFAR100`), all of the test split:
            their ids say which images of the test set they are.
        severity: 1 to 5.
        root: the folder that holds NAME.npy and labels.npy; by default $RBX_DATA/CIFAR-10-C (or CIFAR-100-C).

    Returns:
        float32 images (N, 3, 32, 32), read from a memory-mapped file when they are asked for.

    Raises:
        ConfigError: no such corruption or severity.
        DataError: ids that name no image of the test set; a file that is missing or not as published; labels that differ.
    """
    name = published_name(corruption)
    _check_severity(severity)
    source, index = _test_rows(split.ids)
    folder = _folder(root, *_CIFAR[source], "NAME.npy (such as gaussian_noise.npy) and labels.npy")
    images, labels = _array(folder / f"{name}.npy", (32, 32, 3)), _array(folder / "labels.npy", ())
    if images.dtype != np.uint8:
        raise DataError(f"{folder / name}.npy: dtype {images.dtype}, expected uint8 as published")
    rows = (severity - 1) * CIFAR_TEST + index
    if not np.issubdtype(labels.dtype, np.integer):
        raise DataError(f"{folder / 'labels.npy'}: dtype {labels.dtype}, expected integers as published")
    wrong = np.flatnonzero(np.asarray(labels[rows]) != split.labels)
    if wrong.size:
        first = int(wrong[0])
        raise DataError(
            f"{folder}: {wrong.size} of {len(rows)} labels differ from the samples', the first at {split.ids[first]}: "
            f"{labels[rows[first]]}, expected {split.labels[first]}. Is it the folder of another data set, or in another order?"
        )
    return CifarC(images, rows, split)


class CifarC(Split):
    """Rows of a memory-mapped array of uint8 (n, 32, 32, 3), under the ids and labels of the samples they were made of."""

    def __init__(self, images: np.ndarray, rows: np.ndarray, clean: Split) -> None:
        self._images, self._rows = images, rows
        self.labels, self.ids = clean.labels, clean.ids

    def images(self, index: np.ndarray | slice) -> Tensor:
        pixels = np.asarray(self._images[self._rows[index]], dtype=np.float32) / np.float32(255)
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256()
        for start in range(0, len(self._rows), 1000):
            digest.update(np.ascontiguousarray(self._images[self._rows[start : start + 1000]]).tobytes())
        return hash_strings([digest.hexdigest(), *self.ids.tolist(), *map(str, self.labels.tolist())])

    def fingerprint(self) -> str:
        return self._fingerprint


class ImageNetC(RGBFolder):
    """Images as the authors read them: RGB, and of the published size (errors relative to AlexNet's hold for no other)."""

    def _read(self, file: Path) -> Tensor:
        self._shape = None  # not as the first image is, but as all are published
        image = super()._read(file)
        if image.shape[1:] != (IMAGENET_SIDE, IMAGENET_SIDE):
            raise DataError(
                f"{file}: {image.shape[2]} x {image.shape[1]} pixels, expected {IMAGENET_SIDE} x {IMAGENET_SIDE} as in "
                f"ImageNet-C. Is it Tiny ImageNet-C, or the version for Inception?"
            )
        return image


def imagenet_c(
    corruption: str,
    severity: int,
    root: str | Path | None = None,
    classes: tuple[str, ...] | None = None,
    clean: Split | None = None,
) -> Split:
    """ImageNet-C under one corruption at one severity, every prefix balanced between classes.

    An id is WNID/FILE, the same under every corruption, and so is the order: verdicts can be paired.

    Args:
        root: the folder that holds the corruptions' folders, or those of the archives; by default $RBX_DATA/ImageNet-C.
        classes: the WordNet ids in the order of the model's logits; by default all 1,000, sorted, which is torchvision's order.
        clean: samples of the test split. Where they have ids of this kind (those of `imagenet` do), the same images are
            returned in the same order: those that calibrate are left out, and verdicts can be paired with the clean ones too.

    Returns:
        float32 images (N, 3, 224, 224), read when they are asked for.

    Raises:
        ConfigError: no such corruption or severity.
        DataError: a folder is missing, empty, or not among the classes; and, when it is read, an image of another size.
    """
    name = published_name(corruption)
    _check_severity(severity)
    home = _folder(root, *_IMAGENET, "CORRUPTION/SEVERITY/WNID/*.JPEG")
    base = _place(home, name, severity)
    found = sorted(child.name for child in base.iterdir() if child.is_dir())
    if classes is None and len(found) != IMAGENET_CLASSES:
        raise DataError(
            f"{base}: {len(found)} folders of classes, expected {IMAGENET_CLASSES}: their numbers would be others than the "
            f"model's. Unpack the whole archive, or give the classes of the model"
        )
    known = found if classes is None else list(classes)
    if foreign := sorted(set(found) - set(known)):
        raise DataError(
            f"{base}: folders {', '.join(foreign[:5])} are not among the {len(known)} classes given ({', '.join(known[:3])}, "
            f"...). Classes go by their WordNet ids, such as n01440764: take imagenet as data, or folder:PATH of its "
            f"validation images, PATH/test/WNID/*.JPEG"
        )
    if missing := [wnid for wnid in known if wnid not in set(found)]:
        raise DataError(
            f"{base}: there is no folder for {len(missing)} of {len(known)} classes, {', '.join(missing[:5])} for one. "
            f"Is the archive unpacked to its end?"
        )
    files, labels = [], []
    number = {wnid: k for k, wnid in enumerate(known)}
    for wnid in found:
        images = sorted(f for f in (base / wnid).iterdir() if f.suffix.lower() in _IMAGE_SUFFIXES)
        if not images:
            raise DataError(f"{base / wnid}: there are no images; expected {base / wnid}/*.JPEG")
        files += images
        labels += [number[wnid]] * len(images)
    found_all = ImageNetC(base, files, np.array(labels, dtype=np.int64), side=None)
    row = {name: k for k, name in enumerate(found_all.ids.tolist())}
    if clean is not None and all(name in row for name in clean.ids.tolist()):
        return Subset(found_all, np.array([row[name] for name in clean.ids.tolist()]))
    return _ordered(found_all)


def _place(home: Path, name: str, severity: int) -> Path:
    """HOME/NAME/SEVERITY, or HOME/ARCHIVE/NAME/SEVERITY where the archives were unpacked into folders of their own."""
    places = [p for p in (home / name / str(severity), *sorted(home.glob(f"*/{name}/{severity}"))) if p.is_dir()]
    if not places:
        raise DataError(
            f"{home / name / str(severity)}: there is no such folder. Unpack the published archives there ({_IMAGENET[1]})"
        )
    if len(places) > 1:
        raise DataError(
            f"{home}: {name} at severity {severity} is there twice, {places[0]} and {places[1]}; remove one"
        )
    return places[0]


def _check_severity(severity: int) -> None:
    if isinstance(severity, bool) or severity not in SEVERITIES:
        raise ConfigError(f"severity = {severity!r}, expected 1, 2, 3, 4 or 5")


def _test_rows(ids: np.ndarray) -> tuple[str, np.ndarray]:
    """The data set that ids like `CIFAR10:test:000123` are of, and each sample's place in its test set."""
    rows, source = [], ids[0].partition(":")[0] if len(ids) else ""
    for name in ids.tolist():
        prefix, _, number = name.rpartition(":")
        if source not in _CIFAR or prefix != f"{source}:test" or not number.isdecimal() or int(number) >= CIFAR_TEST:
            raise DataError(
                f"published corruptions: a sample '{name}'; expected the test split of cifar10 or cifar100 in the published "
                f"order (from the python or the binary version), with ids such as CIFAR10:test:000123. Corrupt other data "
                f"with robustbench_ext.data.corruptions"
            )
        rows.append(int(number))
    if not rows:
        raise DataError("published corruptions: there are no samples")
    return source, np.array(rows)


def _folder(root: str | Path | None, name: str, where: str, contents: str) -> Path:
    data = Path(os.environ.get("RBX_DATA", "data"))
    folder = (data / name if root is None else Path(root)).expanduser()
    if not folder.is_dir():
        raise DataError(
            f"{folder.resolve()}: there is no such folder. Put {name} there ({where}): {contents}. Or set RBX_DATA to the "
            f"folder that holds {name}, or name the folder itself."
        )
    return folder


def _array(file: Path, shape: tuple[int, ...]) -> np.ndarray:
    if not file.is_file():
        raise DataError(
            f"{file}: there is no such file; the published folder has one for every corruption and labels.npy"
        )
    try:
        array: np.ndarray = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise DataError(f"{file}: cannot be read as an array ({error}). Is the download complete?") from error
    if not isinstance(array, np.ndarray):  # np.load opens archives of several arrays by the same name
        raise DataError(f"{file}: an archive of arrays, expected one array as published")
    expected = (len(SEVERITIES) * CIFAR_TEST, *shape)
    if array.shape != expected:
        raise DataError(
            f"{file}: shape {array.shape}, expected {expected}: five severities of the test set, as published"
        )
    return array
