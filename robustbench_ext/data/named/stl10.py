"""STL-10 (Coates, Lee, Ng: *An analysis of single-layer networks in unsupervised feature learning*, AISTATS 2011)."""

from __future__ import annotations

import numpy as np

from robustbench_ext.data.base import Dataset, Split
from robustbench_ext.data.files import _Arrays, _complete, _dataset
from robustbench_ext.data.named.checking import verify
from robustbench_ext.data.named.folders import from_folders
from robustbench_ext.data.named.imaging import Preparation
from robustbench_ext.data.named.options import Options
from robustbench_ext.data.stored import StoredArray
from robustbench_ext.named_data import NAMED, find

SIDE = 96
CLASSES = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")


def stl10(rest: str = "") -> Dataset:
    """`stl10`: 5,000 training and 8,000 test images of ten classes, 3x96x96; a quarter of train calibrates. Images
    stay in their files; the unlabelled ones are not read.
    """
    from torchvision import datasets

    named, options = NAMED["stl10"], Options("stl10", rest)
    found = find(named, options.root)
    if found.layout.reader == "images":
        return from_folders(named, options.name, found, Preparation(SIDE), [str(k) for k in range(10)], list(CLASSES))
    sums = dict((*datasets.STL10.train_list, *datasets.STL10.test_list))
    for name, path in found.paths.items():
        verify(path, sums[name], named.title)
    splits: dict[str, Split] = {}
    for part in ("train", "test"):
        n = named.images[part]
        # Columns are stored before rows.
        x = StoredArray(found[f"{part}_X.bin"], np.dtype(np.uint8), (n, 3, SIDE, SIDE), axes=(0, 1, 3, 2))
        y = np.fromfile(found[f"{part}_y.bin"], dtype=np.uint8).astype(np.int64) - 1
        splits[part] = _Arrays(x, y, f"STL10:{part}:", 6)
    return _dataset(
        options.name, _complete(splits, "stl10"), CLASSES, f"{named.title}, binary version, MD5 as published"
    )
