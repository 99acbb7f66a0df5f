"""CIFAR-10 and CIFAR-100 (Krizhevsky: *Learning multiple layers of features from tiny images*, 2009).

From the python version (unpacked or as the archive), the binary version, or folders of images. In the first two the
images are in
the published order: ids, keys and published corruptions (CIFAR-10-C) are those of `torchvision:CIFAR10`.
"""

from __future__ import annotations

import io
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np

from robustbench_ext.data.base import Dataset, Split
from robustbench_ext.data.files import _Arrays, _complete, _dataset
from robustbench_ext.data.named.checking import refuse_mistaken, verify
from robustbench_ext.data.named.folders import check_count, from_folders
from robustbench_ext.data.named.imaging import Preparation
from robustbench_ext.data.named.options import Options
from robustbench_ext.errors import DataError
from robustbench_ext.named_data import NAMED, Found, find

SIDE = 32
_PIXELS = 3 * SIDE * SIDE
# All that arrays need; whatever else a pickle names is refused.
_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}
Arrays = dict[str, tuple[np.ndarray, np.ndarray]]  # by split: uint8 (N, 3, 32, 32) and labels


def cifar10(rest: str = "") -> Dataset:
    """`cifar10`: 50,000 training and 10,000 test images of ten classes, 3x32x32; a quarter of train calibrates."""
    return _cifar("cifar10", rest, {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]})


def cifar100(rest: str = "") -> Dataset:
    """`cifar100`: 50,000 training and 10,000 test images of a hundred fine classes, 3x32x32; a quarter of train
    calibrates.
    """
    return _cifar("cifar100", rest, {"train": ["train"], "test": ["test"]})


def _cifar(name: str, rest: str, files: dict[str, list[str]]) -> Dataset:
    from torchvision import datasets

    named, options = NAMED[name], Options(name, rest)
    found = find(named, options.root)
    official = getattr(datasets, name.upper())
    if found.layout.reader == "images":
        return from_folders(named, options.name, found, Preparation(SIDE), [str(k) for k in range(10)])
    read = {"python": _python, "archive": _archive, "binary": _binary}[found.layout.reader]
    arrays, classes, how = read(found, files, official)
    splits: dict[str, Split] = {}
    for part, (x, y) in arrays.items():
        check_count(len(x), named.images[part], f"{named.title}'s {part} part", found.folder)
        splits[part] = _Arrays(x, y, f"{name.upper()}:{part}:", 6)
    return _dataset(options.name, _complete(splits, name), classes, f"{named.title}, {how}")


# The python version ---------------------------------------------------------------------------------------------------


def _python(found: Found, files: dict[str, list[str]], official: Any) -> tuple[Arrays, list[str], str]:
    sums = dict((*official.train_list, *official.test_list, (official.meta["filename"], official.meta["md5"])))
    for name, path in found.paths.items():
        verify(path, sums[name], official.__name__)
    return *_batches(lambda name: found[name].open("rb"), files, official), "python version, MD5 as published"


def _archive(found: Found, files: dict[str, list[str]], official: Any) -> tuple[Arrays, list[str], str]:
    archive = found["archive"]
    verify(archive, official.tgz_md5, official.__name__)
    with tarfile.open(archive) as tar:
        # One pass: to go back in a compressed archive is to read it again.
        wanted = {*files["train"], *files["test"], official.meta["filename"]}
        contents = {}
        for member in tar:
            name = member.name.rpartition("/")[2]
            if member.isfile() and name in wanted and (stream := tar.extractfile(member)) is not None:
                contents[name] = stream.read()
    if missing := sorted(wanted - set(contents)):
        raise DataError(f"{archive}: it holds no {', '.join(missing)}")
    return *_batches(lambda name: io.BytesIO(contents[name]), files, official), "python version, MD5 as published"


def _batches(
    opened: Callable[[str], IO[bytes]], files: dict[str, list[str]], official: Any
) -> tuple[Arrays, list[str]]:
    arrays: Arrays = {}
    for part, names in files.items():
        entries = [_unpickled(opened, name) for name in names]
        x = np.concatenate([np.asarray(entry["data"], dtype=np.uint8).reshape(-1, 3, SIDE, SIDE) for entry in entries])
        y = np.concatenate([np.asarray(entry.get("labels", entry.get("fine_labels"))) for entry in entries])
        arrays[part] = (x, y.astype(np.int64))
    return arrays, list(_unpickled(opened, official.meta["filename"])[official.meta["key"]])


class _Plain(pickle.Unpickler):
    """Arrays, lists, numbers and texts; no code. The checksum has been compared before, this is a second door."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)


def _unpickled(opened: Callable[[str], IO[bytes]], name: str) -> dict[str, Any]:
    with opened(name) as stream:
        try:
            entry = _Plain(stream, encoding="latin1").load()
        except (pickle.UnpicklingError, EOFError, ValueError, AttributeError, ImportError, IndexError) as error:
            raise DataError(f"CIFAR, {name}: cannot be read as the published python version ({error})") from error
    if not isinstance(entry, dict):
        raise DataError(f"CIFAR, {name}: {type(entry).__name__} in place of a dictionary")
    return entry


# The binary version ---------------------------------------------------------------------------------------------------


def _binary(found: Found, files: dict[str, list[str]], official: Any) -> tuple[Arrays, list[str], str]:
    """Records of one label (CIFAR-100: coarse, fine) and 3,072 pixels. Checksums of single files are not published."""
    labels = 1 if official.__name__ == "CIFAR10" else 2
    arrays: Arrays = {}
    for part, names in files.items():
        records = np.concatenate([_records(found[f"{name}.bin"], labels) for name in names])
        x = np.ascontiguousarray(records[:, labels:]).reshape(-1, 3, SIDE, SIDE)
        arrays[part] = (x, records[:, labels - 1].astype(np.int64))
    words = next(path for name, path in found.paths.items() if name.endswith(".txt"))
    classes = [line.strip() for line in words.read_text(encoding="utf-8").splitlines() if line.strip()]
    expected = NAMED[official.__name__.lower()].classes
    if len(classes) != expected:
        raise DataError(f"{words}: {len(classes)} names of classes, expected {expected}")
    for part, (_, y) in arrays.items():
        if len(set(np.bincount(y, minlength=expected).tolist())) > 1 or y.max() >= expected:
            raise DataError(f"{found.folder}: classes of the {part} part differ in size; the published ones do not")
    return arrays, classes, "binary version, checked by sizes and classes (no checksums of its files are published)"


def _records(file: Path, labels: int) -> np.ndarray:
    refuse_mistaken(file, "The binary version of CIFAR")
    size = file.stat().st_size
    if size % (labels + _PIXELS):
        raise DataError(
            f"{file}: {size:,} bytes are no whole number of records of {labels + _PIXELS}. Is the file complete?"
        )
    return np.fromfile(file, dtype=np.uint8).reshape(-1, labels + _PIXELS)
