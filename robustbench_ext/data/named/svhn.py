"""SVHN: house numbers from street views, format 2 (cropped digits).

Netzer, Wang, Coates, Bissacco, Wu, Ng: *Reading digits in natural images with unsupervised feature learning*, NIPS
workshop 2011.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from robustbench_ext.data.base import Dataset, Split
from robustbench_ext.data.files import _Arrays, _complete, _dataset
from robustbench_ext.data.named.checking import verify
from robustbench_ext.data.named.folders import check_count, from_folders
from robustbench_ext.data.named.imaging import Preparation
from robustbench_ext.data.named.options import Options
from robustbench_ext.errors import DataError
from robustbench_ext.named_data import NAMED, find

SIDE = 32


def svhn(rest: str = "") -> Dataset:
    """`svhn`: 73,257 training and 26,032 test digits, 3x32x32; a quarter of train calibrates. The extra set is not
    read.

    The digit 0, label 10 in the files, is class 0, as in torchvision.
    """
    from torchvision import datasets

    named, options = NAMED["svhn"], Options("svhn", rest)
    found = find(named, options.root)
    digits = [str(k) for k in range(10)]
    if found.layout.reader == "images":
        return from_folders(named, options.name, found, Preparation(SIDE), digits)
    splits: dict[str, Split] = {}
    for part in ("train", "test"):
        file = found[f"{part}_32x32.mat"]
        verify(file, datasets.SVHN.split_list[part][2], named.title)
        x, y = _arrays(file)
        check_count(len(x), named.images[part], f"{named.title}'s {part} part", file)
        splits[part] = _Arrays(x, y, f"SVHN:{part}:", 6)
    return _dataset(options.name, _complete(splits, "svhn"), digits, f"{named.title}, format 2, MD5 as published")


def _arrays(file: Path) -> tuple[np.ndarray, np.ndarray]:
    from scipy.io import loadmat

    try:
        content = loadmat(file)
        x, y = content["X"], content["y"]
    except (ValueError, KeyError, NotImplementedError, TypeError) as error:
        raise DataError(f"{file}: cannot be read as SVHN's format 2, with X and y ({error})") from error
    # (32, 32, 3, N), the samples last, but a sample's bytes lie together: a view will do.
    return x.transpose(3, 2, 0, 1), y.astype(np.int64).reshape(-1) % 10
