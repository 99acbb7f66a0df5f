"""Data handed over in Python: arrays, tensors, or anything that yields (inputs, labels), as a dataset with stable ids."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from robustbench_ext.data.base import SPLITS, ArraySplit, Dataset, Split, stratified_order
from robustbench_ext.errors import DataError

NAME = "given"


def given_dataset(data: Any, name: str = NAME, classes: Sequence[str] | None = None) -> Dataset:
    """A dataset of images from what a caller has at hand.

    Args:
        data: a `Dataset`, which is returned as it is; a pair (x, y) for the test split; anything that yields such pairs, one by
            one or in batches (a torch `Dataset` or `DataLoader`, read into memory); or a mapping from `test`, `calibration` and
            `train` to these. x: float (N, C, H, W) in [0, 1]; y: whole numbers (N,).
        classes: names; by default the numbers up to the largest label.

    Ids are positions in what was given, so they stay the same as long as its order does. The samples are then put into an order
    of which every prefix is class-balanced, as in every dataset.

    Raises:
        DataError: what was given cannot be read as such, or has no test samples.
    """
    if isinstance(data, Dataset):
        return data
    parts = dict(data) if isinstance(data, Mapping) else {"test": data}
    unknown = [key for key in parts if key not in SPLITS]
    if unknown or "test" not in parts:
        raise DataError(f"data: splits {', '.join(map(str, parts))}, expected test and perhaps calibration and train")
    arrays = {split: _arrays(part, split) for split, part in parts.items()}
    shapes = {tuple(x.shape[1:]) for x, _ in arrays.values()}
    if len(shapes) > 1:
        raise DataError(f"data: splits of different shapes {sorted(shapes)}, expected one (C, H, W)")
    count = max(int(y.max()) for _, y in arrays.values()) + 1
    names = tuple(classes) if classes is not None else tuple(str(k) for k in range(count))
    splits: dict[str, Split] = {}
    for split, (x, y) in arrays.items():
        ids = np.array([f"{name}:{split}:{i:06d}" for i in range(len(y))])
        order = stratified_order(y, ids)
        splits[split] = ArraySplit(x[torch.from_numpy(order)], y[order], ids[order])
    return Dataset(name, splits, names, shapes.pop(), source="given in Python")


def _arrays(part: Any, split: str) -> tuple[torch.Tensor, np.ndarray]:
    pairs: Any = part
    if not (
        isinstance(part, (tuple, list)) and len(part) == 2 and hasattr(part[0], "shape") and len(part[0].shape) == 4
    ):
        pairs = _collected(part, split)
    x = torch.as_tensor(np.asarray(pairs[0]) if not isinstance(pairs[0], torch.Tensor) else pairs[0]).detach().cpu()
    y = torch.as_tensor(np.asarray(pairs[1]) if not isinstance(pairs[1], torch.Tensor) else pairs[1]).detach().cpu()
    if x.ndim != 4 or not len(x) or y.ndim != 1 or len(x) != len(y):
        raise DataError(
            f"data, {split}: inputs {tuple(x.shape)} and labels {tuple(y.shape)}, expected (N, C, H, W) and (N,) with N >= 1"
        )
    if x.dtype == torch.uint8:
        raise DataError(f"data, {split}: inputs are uint8, expected floats in [0, 1]. Divide them by 255.")
    if y.is_floating_point() and not bool((y == y.round()).all()):
        raise DataError(f"data, {split}: labels are fractions, expected whole numbers from 0 on")
    return x.float(), y.numpy().astype(np.int64)


def _collected(part: Any, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """All pairs that something yields, one sample or one batch at a time."""
    if not isinstance(part, Iterable) and not hasattr(part, "__getitem__"):
        raise DataError(
            f"data, {split}: got {type(part).__name__}, expected (x, y) or something that yields such pairs"
        )
    xs, ys = [], []
    items = part if isinstance(part, Iterable) else (part[i] for i in range(len(part)))
    for item in items:
        try:
            x, y = item
            x, y = torch.as_tensor(np.asarray(x)), torch.as_tensor(np.asarray(y))
        except (TypeError, ValueError) as error:
            raise DataError(f"data, {split}: an item is not a pair of inputs and labels as numbers ({error})") from None
        xs.append(x if x.ndim == 4 else x[None])
        ys.append(y.reshape(-1))
    if not xs:
        raise DataError(f"data, {split}: there are no samples")
    try:
        return torch.cat(xs), torch.cat(ys)
    except (RuntimeError, IndexError) as error:
        raise DataError(f"data, {split}: samples of different shapes ({error})") from None
