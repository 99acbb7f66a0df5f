"""MNIST and Fashion-MNIST in the IDX files of their authors, compressed or not, or as folders of images.

LeCun, Cortes, Burges: *The MNIST database of handwritten digits*, 1998. Xiao, Rasul, Vollgraf: *Fashion-MNIST: a
novel image dataset for benchmarking machine learning algorithms*, 2017, arXiv 1708.07747.

Checksums are those of the uncompressed files: distributions of the archives (Debian's, for one) are compressed anew,
and differ in the bytes of the .gz while what is in them is the same.
"""

from __future__ import annotations

import gzip
import hashlib
import zlib
from pathlib import Path

import numpy as np

from robustbench_ext.data.base import Dataset, Split
from robustbench_ext.data.files import _Arrays, _complete, _dataset
from robustbench_ext.data.named.checking import mismatch, mistaken, recall, remember, stamp, verify
from robustbench_ext.data.named.folders import check_count, from_folders
from robustbench_ext.data.named.imaging import Preparation
from robustbench_ext.data.named.options import Options
from robustbench_ext.data.stored import StoredArray
from robustbench_ext.errors import DataError
from robustbench_ext.named_data import NAMED, find

SIDE = 28
_PARTS = {"train": "train", "test": "t10k"}
MD5 = {  # of the uncompressed files
    "mnist": {
        "train-images": "6bbc9ace898e44ae57da46a324031adb",
        "train-labels": "a25bea736e30d166cdddb491f175f624",
        "t10k-images": "2646ac647ad5339dbf082846283269ea",
        "t10k-labels": "27ae3e4e09519cfbb04c329615203637",
    },
    "fashion-mnist": {
        "train-images": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
        "train-labels": "9018921c3c673c538a1fc5bad174d6f9",
        "t10k-images": "8181f5470baa50b63fa0f6fddb340f0a",
        "t10k-labels": "15d484375f8d13e6eb1aabb0c3f46965",
    },
}


def mnist(rest: str = "") -> Dataset:
    """`mnist`: 60,000 training and 10,000 test digits, 1x28x28; a quarter of train calibrates."""
    return _idx("mnist", "MNIST", rest)


def fashion_mnist(rest: str = "") -> Dataset:
    """`fashion-mnist`: 60,000 training and 10,000 test images of clothes, 1x28x28; a quarter of train calibrates."""
    return _idx("fashion-mnist", "FashionMNIST", rest)


def _idx(name: str, official: str, rest: str) -> Dataset:
    from torchvision import datasets

    named, options = NAMED[name], Options(name, rest)
    found = find(named, options.root)
    classes = getattr(datasets, official).classes
    if found.layout.reader == "images":
        return from_folders(
            named, options.name, found, Preparation(SIDE, mode="L"), [str(k) for k in range(10)], classes
        )
    splits: dict[str, Split] = {}
    for part, stem in _PARTS.items():
        images, labels = (
            _array(found[f"{stem}-{kind}"], MD5[name][f"{stem}-{kind}"], axes, named.title)
            for kind, axes in (("images", 3), ("labels", 1))
        )
        if images.shape[1:] != (SIDE, SIDE):
            raise DataError(f"{found[f'{stem}-images']}: images of {images.shape[1:]}, expected {SIDE} x {SIDE}")
        check_count(len(images), named.images[part], f"{named.title}'s {part} part", found.folder)
        # Ids as torchvision's: keys and records fit both names.
        splits[part] = _Arrays(
            images.reshape(len(images), 1, SIDE, SIDE), labels[:].astype(np.int64), f"{official}:{part}:", 6
        )
    return _dataset(options.name, _complete(splits, name), classes, f"{named.title}, IDX files, MD5 as published")


def _array(file: Path, md5: str, axes: int, what: str) -> StoredArray | np.ndarray:
    """uint8 of an IDX file: two zeros, the type, the number of axes, their lengths as big-endian 32-bit numbers, the
    values.
    """
    if file.suffix == ".gz":
        content = _unzipped(file, md5, what)
    else:
        verify(file, md5, what)
        with file.open("rb") as stream:
            content = stream.read(4 + 4 * axes)
    if content[:4] != bytes((0, 0, 8, axes)):
        raise DataError(f"{file}: it starts with {content[:4]!r}, expected an IDX file of bytes with {axes} axes")
    shape = tuple(np.frombuffer(content[4 : 4 + 4 * axes], dtype=">u4").tolist())
    if file.suffix != ".gz":
        return StoredArray(file, np.dtype(np.uint8), shape, 4 + 4 * axes)
    return np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * axes).reshape(shape)


def _unzipped(file: Path, md5: str, what: str) -> bytes:
    try:
        content = gzip.decompress(file.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        kind = mistaken(file)
        raise DataError(
            f"{file}: cannot be unpacked ({f'it is {kind}' if kind else error}). Delete it and get it again from its source."
        ) from error
    key = f"md5 of what is in|{stamp(file)}"
    found = recall(key)
    if found != md5:
        found = hashlib.md5(content, usedforsecurity=False).hexdigest()
        remember(key, found)
    if found != md5:
        raise DataError(mismatch(file, md5, found, f"what is in this file of {what}"))
    return content
