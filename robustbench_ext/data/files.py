"""Data of the user's own: npz archives, folders of images, torchvision's classes on a local copy."""

from __future__ import annotations

import hashlib
import io
import os
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from robustbench_ext.data.base import (
    ArraySplit,
    Dataset,
    Split,
    Subset,
    as_floats,
    as_kept,
    split_dataset,
    stratified_order,
)
from robustbench_ext.data.stored import StoredArray
from robustbench_ext.data.stored import member as stored_member
from robustbench_ext.data.stored import npy as stored_npy
from robustbench_ext.errors import DataError
from robustbench_ext.fingerprint import each_string, hash_strings

if TYPE_CHECKING:
    from PIL import Image

_IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm"}
_LARGE = 1 << 26  # bytes from which images stay in their file
_CHECKED = 1 << 24  # bytes looked at together
_NAMED = 1 << 12  # ids made together
_SPLIT_NAMES = {
    "train": ("train", "training"),
    "calibration": ("calibration", "val", "valid", "validation"),
    "test": ("test", "testing", "eval"),
}


def _as_images(x: StoredArray | np.ndarray, what: str) -> StoredArray | np.ndarray:
    """uint8 or float images in any of the usual layouts, as (N, C, H, W): uint8 as they are, floats in [0, 1].

    What lies in a file stays there.
    """
    if x.ndim == 3:
        x = x.reshape(len(x), 1, *x.shape[1:])
    if x.ndim != 4:
        raise DataError(f"{what}: images have shape {x.shape}, expected (N, H, W), (N, C, H, W) or (N, H, W, C)")
    if x.shape[1] not in (1, 3) and x.shape[3] in (1, 3):
        x = x.transpose(0, 3, 1, 2)
    if x.shape[1] not in (1, 3):
        raise DataError(f"{what}: images have shape {x.shape}, expected one or three channels (drop an alpha channel)")
    if not len(x):
        raise DataError(f"{what}: there are no images")
    if x.dtype == np.uint8:
        return x
    if not np.issubdtype(x.dtype, np.floating):
        raise DataError(f"{what}: images have dtype {x.dtype}, expected uint8 (0..255) or floats in [0, 1]")
    rows = max(1, _CHECKED // max(1, x.nbytes // len(x)))
    spans = np.array([(b.min(), b.max()) for b in (x[start : start + rows] for start in range(0, len(x), rows))])
    low, high = float(spans[:, 0].min()), float(spans[:, 1].max())
    if not (low >= 0.0 and high <= 1.0):
        raise DataError(
            f"{what}: values span [{low:.3g}, {high:.3g}], expected [0, 1]. Store raw images (uint8, or floats divided "
            f"by 255); normalisation with a mean and a standard deviation belongs to the model: give it mean= and std=."
        )
    return x


def _as_labels(y: np.ndarray, what: str) -> np.ndarray:
    y = np.asarray(y)
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.ndim != 1:
        raise DataError(f"{what}: labels have shape {y.shape}, expected (N,). From one-hot rows, use y.argmax(axis=1).")
    if len(y) and y.dtype.kind in "iuf" and y.min() < 0:
        raise DataError(f"{what}: labels start at {y.min()}, expected 0..K-1. Renumber them from 0.")
    if not np.issubdtype(y.dtype, np.integer):
        if np.issubdtype(y.dtype, np.floating) and np.array_equal(y, np.round(y)):
            return y.astype(np.int64)
        raise DataError(f"{what}: labels have dtype {y.dtype}, expected integers 0..K-1")
    return y.astype(np.int64)


def load_npz(path: str) -> Dataset:
    """`npz:PATH`: arrays `x`, `y` (split 60/20/20 for you), or `x_train`, `y_train`, `x_test`, `y_test` and optionally
    `x_calibration`, `y_calibration` (or `x_val`, `y_val`). Without calibration arrays a quarter of train becomes it.
    An array `classes` may name the classes.

    PATH is an archive, or a folder that holds the same arrays as `NAME.npy`. Images of 64 MiB and more stay in the file and
    are read batch by batch; of an archive, if they are not compressed (numpy.savez).
    """
    source = Path(path).expanduser()
    arrays = _Folder(source, path) if source.is_dir() else _Archive(source, path)
    pairs = {}
    for split, aliases in _SPLIT_NAMES.items():
        for alias in aliases:
            if f"x_{alias}" in arrays.names and f"y_{alias}" in arrays.names:
                pairs[split] = (f"x_{alias}", f"y_{alias}")
                break
    if not pairs and not ("x" in arrays.names and "y" in arrays.names):
        raise DataError(
            f"npz:{path}: found arrays {', '.join(sorted(arrays.names)) or 'none'}; expected x and y, or x_train, y_train, "
            f"x_test, y_test (and optionally x_calibration, y_calibration)"
        )

    def both(x_name: str, y_name: str) -> tuple[StoredArray | np.ndarray, np.ndarray]:
        x = _as_images(arrays.images(x_name), f"npz:{path} {x_name}")
        return x, _as_labels(arrays.load(y_name), f"npz:{path} {y_name}")

    stem = source.name if source.is_dir() else source.stem
    if pairs:
        splits: dict[str, Split] = {}
        for split, names in pairs.items():
            x, y = both(*names)
            splits[split] = _Arrays(x, y, f"{stem}:{split}:", 7)
        splits = _complete(splits, f"npz:{path}")
    else:
        x, y = both("x", "y")
        splits = split_dataset(x, y, numbered(f"{stem}:", len(y), 7))
    classes = arrays.load("classes") if "classes" in arrays.names else None
    return _dataset(f"npz:{path}", splits, classes, str(source), tuple(arrays.notes))


class _Archive:
    """The arrays of an `.npz` archive."""

    def __init__(self, file: Path, path: str) -> None:
        self._file, self._path = file, path
        self.notes: list[str] = []
        if not file.is_file():
            raise DataError(f"npz:{path}: there is no such file or folder (looked in {file.resolve().parent})")
        with self._open() as archive:
            self.names = set(archive.files)

    @contextmanager
    def _open(self) -> Iterator[Any]:
        with _plain_arrays(self._path):
            archive = np.load(self._file, allow_pickle=False)
            if isinstance(archive, np.ndarray):
                raise DataError(
                    f"npz:{self._path}: one array without a name, expected an archive of several (numpy.savez)"
                )
            with archive:
                yield archive

    def load(self, name: str) -> np.ndarray:
        """An array, in memory."""
        with self._open() as archive:
            found: np.ndarray = archive[name]
        return found

    def images(self, name: str) -> StoredArray | np.ndarray:
        """In the file where they are large and lie there in one piece."""
        stored = stored_member(self._file, name)
        if stored is not None and stored.nbytes >= _LARGE:
            return stored
        found = self.load(name)
        if found.nbytes >= _LARGE:
            self.notes.append(
                f"npz:{self._path}: {name} takes {found.nbytes >> 20} MiB of memory, because it is compressed. Images that are "
                f"stored as they are (numpy.savez, or a folder with {name}.npy) are read batch by batch."
            )
        return found


class _Folder:
    """The arrays of a folder of `.npy` files."""

    def __init__(self, folder: Path, path: str) -> None:
        self._folder, self._path = folder, path
        self.notes: list[str] = []
        self.names = {file.stem for file in folder.glob("*.npy")}

    def load(self, name: str) -> np.ndarray:
        """An array, in memory."""
        with _plain_arrays(self._path):
            found: np.ndarray = np.load(self._folder / f"{name}.npy", allow_pickle=False)
        return found

    def images(self, name: str) -> StoredArray | np.ndarray:
        """In the file where they are large."""
        stored = stored_npy(self._folder / f"{name}.npy")
        return self.load(name) if stored is None or stored.nbytes < _LARGE else stored


@contextmanager
def _plain_arrays(path: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"npz:{path}: {error}. Arrays of Python objects are not loaded; store plain arrays.") from error


def numbered(prefix: str, n: int, digits: int) -> np.ndarray:
    """The ids `PREFIX0000000`, ... of n samples, str (n,), made block by block: a list of a million strings takes 100 MB.

    >>> numbered("cifar:", 2, 3).tolist()
    ['cifar:000', 'cifar:001']
    """
    names = np.empty(n, dtype=f"U{len(prefix) + max(digits, len(str(max(n - 1, 0))))}")
    for start in range(0, n, _NAMED):
        stop = min(start + _NAMED, n)
        names[start:stop] = [f"{prefix}{i:0{digits}d}" for i in range(start, stop)]
    return names


class _Arrays(Split):
    """Images, in memory or in a file, in an order of which every prefix is stratified; ids are numbers as they lie there.

    It is what `_ordered` makes of an `ArraySplit`, under the same key, but holds one copy of the ids.
    """

    def __init__(self, x: StoredArray | np.ndarray, labels: np.ndarray, prefix: str, digits: int) -> None:
        if len(x) != len(labels):
            raise DataError(f"{prefix} {len(x)} inputs and {len(labels)} labels do not match")
        self._x, self._given, self._name = as_kept(x), labels, (prefix, len(labels), digits)
        ids = numbered(*self._name)
        self._order = stratified_order(labels, ids)
        self.labels, self.ids = labels[self._order], ids[self._order]

    def images(self, index: np.ndarray | slice) -> Tensor:
        return torch.from_numpy(as_floats(self._x[self._order[index]]))

    @cached_property
    def _fingerprint(self) -> str:
        as_given = ArraySplit(self._x, self._given, numbered(*self._name))
        return hash_strings(chain([as_given.fingerprint()], each_string(self.ids)))

    def fingerprint(self) -> str:
        return self._fingerprint


def _ordered(split: Split) -> Split:
    return Subset(split, stratified_order(split.labels, split.ids))


def _complete(splits: dict[str, Split], what: str) -> dict[str, Split]:
    """Cut a missing calibration split out of train (its last quarter, stratified), a missing test split likewise."""
    if "train" not in splits and "test" not in splits:
        raise DataError(f"{what}: neither a train nor a test split was found")
    if "train" not in splits and "calibration" not in splits:
        # Evaluation data only: half of it calibrates, the other half tests.
        test = splits["test"]
        even, odd = np.arange(0, len(test), 2), np.arange(1, len(test), 2)
        return {"calibration": Subset(test, even), "test": Subset(test, odd)}
    for missing in ("test", "calibration"):
        if missing not in splits:
            train = splits["train"]
            cut = len(train) - len(train) // 4
            splits["train"] = Subset(train, np.arange(cut))
            splits[missing] = Subset(train, np.arange(cut, len(train)))
    return {name: splits[name] for name in ("train", "calibration", "test") if name in splits}


def _dataset(name: str, splits: dict[str, Split], classes: Any, source: str, notes: tuple[str, ...] = ()) -> Dataset:
    count = 1 + max(int(split.labels.max()) for split in splits.values() if len(split))
    names = tuple(str(c) for c in classes) if classes is not None else tuple(str(k) for k in range(count))
    shape = tuple(next(iter(splits.values())).images(np.arange(1)).shape[1:])
    return Dataset(name, splits, names, (shape[0], shape[1], shape[2]), source, notes=notes)


class FolderSplit(Split):
    """Image files, read when they are asked for; all must have the size of the first, and be grey or colour as it is.

    Ids are paths in NFC, so that a folder copied from a Mac, which writes an accent as a character of its own, keeps them.
    """

    upright = True  # whether images are turned as their EXIF data says

    def __init__(self, root: Path, files: list[Path], labels: np.ndarray) -> None:
        self._files = files
        self.labels = labels
        self.ids = np.array([_nfc(file.relative_to(root).as_posix()) for file in files], dtype=np.str_)
        if len({*self.ids.tolist()}) < len(files):
            doubled = next(name for name, count in Counter(self.ids.tolist()).items() if count > 1)
            raise DataError(
                f"{root / doubled}: two files whose names are the same text in Unicode. Rename one of them."
            )
        self._shape: tuple[int, ...] | None = None
        self._first = ""

    def images(self, index: np.ndarray | slice) -> Tensor:
        chosen = np.arange(len(self._files))[index]
        return torch.stack([self._read(self._files[i]) for i in chosen]) if len(chosen) else torch.empty(0)

    def _read(self, file: Path) -> Tensor:
        with opened(file, self.upright) as image:
            kind = image.mode
            if kind.startswith("I;16"):
                array = np.asarray(image, dtype=np.float32) / 65535.0
            elif kind in {"I", "F"}:
                raise DataError(f"{file}: mode {kind} has no fixed range; convert it to 8 or 16 bits first")
            else:
                array = np.asarray(image.convert("L" if kind in {"1", "L"} else "RGB"), dtype=np.float32) / 255.0
        array = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
        said = f"{'grey' if len(array) == 1 else 'in colour'} (mode {kind})"
        if self._shape is None:
            self._shape, self._first = array.shape, said
        if array.shape[1:] == self._shape[1:] and array.shape != self._shape:
            raise DataError(
                f"{file}: the image is {said}, the first one is {self._first}. All images of a folder must be grey, or all in "
                f"colour; convert them once, before the evaluation."
            )
        if array.shape != self._shape:
            raise DataError(
                f"{file}: shape (C, H, W) = {array.shape}, but the first image has {self._shape}. "
                f"All images of a folder must have one size; resize them once, before the evaluation."
            )
        return torch.from_numpy(np.ascontiguousarray(array))

    @cached_property
    def _fingerprint(self) -> str:
        digests = [_digest(file, self.upright) for file in self._files]
        return hash_strings([*digests, *self.ids.tolist(), *map(str, self.labels.tolist())])

    def fingerprint(self) -> str:
        return self._fingerprint


_TURN = 0x0112  # the tag of EXIF that says how the camera was held
_EXIF = (b"Exif", b"eXIf", b"EXIF", b"tiff:Orientation")  # in JPEG, PNG, WebP; in XMP


@contextmanager
def opened(file: Path, upright: bool) -> Iterator[Image.Image]:
    """An image file; `upright`: turned as its EXIF data says, as every viewer shows it.

    Raises:
        DataError: it cannot be read, then or inside the block.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as image:
            yield ImageOps.exif_transpose(image) if upright and image.getexif().get(_TURN, 1) != 1 else image
    # Pillow reports what is wrong inside a file in all of these ways.
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise DataError(f"{file}: cannot be read as an image ({error}). Repair or remove the file.") from error


def _digest(file: Path, upright: bool) -> str:
    """A hash of the file's bytes, and of how it is turned where it is: earlier versions read such an image as it lies."""
    from PIL import Image

    raw = file.read_bytes()
    digest = hashlib.sha256(raw).hexdigest()
    if not upright or not (raw[:2] in (b"II", b"MM") or any(mark in raw for mark in _EXIF)):
        return digest
    with suppress(OSError, ValueError, SyntaxError, EOFError), Image.open(io.BytesIO(raw)) as image:
        if (turn := image.getexif().get(_TURN, 1)) in range(2, 9):
            return f"{digest} turned {turn}"
    return digest


def _nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def load_folder(path: str) -> Dataset:
    """`folder:PATH`: sub-folders named by class, each holding images; or `train/`, `test/` (and `calibration/` or
    `val/`) that each hold such sub-folders.

    Images are turned as their EXIF data says. Grey ones (modes 1, L, 16 bits) have one channel, all others three; an alpha
    channel is dropped, as torchvision's ImageFolder does: a model meets the colours that it was trained on, also where they are
    not to be seen. A note says so where the first image has one. Paste such images onto a background to decide otherwise.
    """
    root = Path(path).expanduser()
    if not root.is_dir():
        raise DataError(f"folder:{path}: there is no such folder (looked for {root.resolve()})")
    children = {child.name.lower(): child for child in sorted(root.iterdir()) if child.is_dir()}
    parts = {s: children[a] for s, aliases in _SPLIT_NAMES.items() for a in aliases if a in children}
    bases = parts or {"all": root}
    folders = {name: {_nfc(c.name): c for c in base.iterdir() if c.is_dir()} for name, base in bases.items()}
    classes = sorted({name for named in folders.values() for name in named})
    if not classes:
        raise DataError(
            f"folder:{path}: no class folders found. Expected {root}/CLASS/IMAGE or {root}/test/CLASS/IMAGE"
        )
    splits: dict[str, Split] = {}
    notes: tuple[str, ...] = ()
    for name, base in bases.items():
        files, labels = list[Path](), list[int]()
        for k, label in enumerate(classes):
            inside = folders[name][label].glob("**/*") if label in folders[name] else ()
            found = sorted((f for f in inside if f.suffix.lower() in _IMAGE_SUFFIXES), key=lambda f: Path(_nfc(str(f))))
            files += found
            labels += [k] * len(found)
        if not files:
            raise DataError(f"folder:{path}: {base} holds no images ({', '.join(sorted(_IMAGE_SUFFIXES))})")
        notes = notes or _alpha_note(path, files[0])
        splits[name] = _ordered(FolderSplit(root, files, np.array(labels, dtype=np.int64)))
    if "all" in splits:
        whole, n = splits.pop("all"), 0
        n = len(whole)
        a, b = round(0.6 * n), round(0.8 * n)
        ranges = {"train": (0, a), "calibration": (a, b), "test": (b, n)}
        splits = {name: Subset(whole, np.arange(*bounds)) for name, bounds in ranges.items()}
    return _dataset(f"folder:{path}", _complete(splits, f"folder:{path}"), classes, str(root.resolve()), notes)


def _alpha_note(path: str, file: Path) -> tuple[str, ...]:
    with opened(file, upright=False) as image:
        clear = "A" in image.getbands() or "transparency" in image.info
    said = f"folder:{path}: {file.name} has an alpha channel; those are dropped, colours are taken as they are"
    return (said,) if clear else ()


def load_torchvision(name: str) -> Dataset:
    """`torchvision:NAME`, such as `torchvision:CIFAR10`: read from the folder in $RBX_DATA (default `./data`)."""
    from torchvision import datasets

    root = Path(os.environ.get("RBX_DATA", "data")).expanduser()
    if not hasattr(datasets, name):
        import difflib

        known = [n for n in datasets.__all__ if n[:1].isupper()]
        close = difflib.get_close_matches(name, known, n=1)
        raise DataError(f"torchvision has no dataset '{name}'." + (f" Did you mean '{close[0]}'?" if close else ""))
    factory = getattr(datasets, name)
    splits: dict[str, Split] = {}
    classes: Any = None
    for split, options in {
        "train": ({"train": True}, {"split": "train"}),
        "test": ({"train": False}, {"split": "test"}),
    }.items():
        for option in options:
            try:
                source = factory(root=str(root), download=False, **option)
            except TypeError:
                continue
            except RuntimeError as error:
                raise DataError(
                    f"torchvision:{name}: not found under {root.resolve()} ({error}). Put the files there, or set "
                    f"RBX_DATA to the folder that holds them. To fetch them with torchvision itself: "
                    f"python -c \"from torchvision.datasets import {name}; {name}('{root}', download=True)\""
                ) from error
            x, y = _torchvision_arrays(source, name)
            classes = getattr(source, "classes", classes)
            ids = numbered(f"{name}:{split}:", len(y), 6)
            splits[split] = _ordered(ArraySplit(_as_images(x, f"torchvision:{name}"), y, ids))
            break
    if not splits:
        raise DataError(
            f"torchvision:{name} has neither train= nor split= and cannot be loaded by name; use folder:PATH"
        )
    return _dataset(f"torchvision:{name}", _complete(splits, f"torchvision:{name}"), classes, f"torchvision {name}")


def _torchvision_arrays(source: Any, name: str) -> tuple[np.ndarray, np.ndarray]:
    labels = next((getattr(source, a) for a in ("targets", "labels", "_labels") if hasattr(source, a)), None)
    data = getattr(source, "data", None)
    if data is None or labels is None:
        pairs = [source[i] for i in range(len(source))]
        data = np.stack([np.asarray(image) for image, _ in pairs])
        labels = [label for _, label in pairs]
    return np.asarray(data), _as_labels(np.asarray(labels), f"torchvision:{name}")
