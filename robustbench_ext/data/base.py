"""What a dataset is: three disjoint splits of samples that have stable ids and a content fingerprint.

The order of a split is fixed and class-balanced: any prefix of it is stratified, and a shorter prefix is contained in
a longer one. So "the first n samples" is a fair sample at every n, and results at a small n are reused at a larger.
Regression data is tabular, and is stratified by the deciles of its target instead of classes.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robustbench_ext.data.stored import SomeRows, StoredArray
from robustbench_ext.errors import DataError
from robustbench_ext.fingerprint import Rows, each_string, hash_arrays, hash_strings

CLASSIFICATION, REGRESSION = "classification", "regression"
SPLITS = ("train", "calibration", "test")
FRACTIONS = {"train": 0.6, "calibration": 0.2, "test": 0.2}


class Split(ABC):
    """Samples in a fixed order.

    Attributes:
        labels: int64 (N,); -1 where a sample belongs to no class (outliers). Regression: the targets, float64 (N,).
        ids: str (N,), unique, stable across versions and machines.
    """

    labels: np.ndarray
    ids: np.ndarray

    @abstractmethod
    def images(self, index: np.ndarray | slice) -> Tensor:
        """The chosen samples, float32 (n, C, H, W) in [0, 1]."""

    def inputs(self, index: np.ndarray | slice) -> Tensor:
        """What a model is given: the images, or float32 (n, d) in raw units where the data is tabular."""
        return self.images(index)

    @abstractmethod
    def fingerprint(self) -> str:
        """A key of all bytes, labels and ids."""

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, n: int | None) -> Split:
        """The first n samples (a stratified sample); all of them for None."""
        if n is None or n >= len(self):
            return self
        if n < 1:
            raise DataError(f"n={n}: at least one sample is needed")
        return Subset(self, np.arange(n))


class ArraySplit(Split):
    """Samples in memory, or in a file that is read batch by batch (`robustbench_ext.data.stored`).

    Args:
        x: (N, C, H, W), floats in [0, 1] or uint8 from 0 to 255. The latter are kept as they are, a quarter of the memory, and
            divided by 255 when they are read; either way the images and the fingerprint are the same.
        labels: int (N,); ids: one string per sample.
    """

    def __init__(self, x: Rows | Tensor, labels: np.ndarray, ids: Sequence[str] | np.ndarray) -> None:
        self._x = as_kept(x)
        self.labels = np.asarray(labels, dtype=np.int64)
        self.ids = np.asarray(ids, dtype=np.str_)
        if not len(self._x) == len(self.labels) == len(self.ids):
            raise DataError(f"{len(self._x)} inputs, {len(self.labels)} labels and {len(self.ids)} ids do not match")

    def images(self, index: np.ndarray | slice) -> Tensor:
        return torch.from_numpy(as_floats(self._x[index]))

    @cached_property
    def _fingerprint(self) -> str:
        return hash_arrays({"x": _Floats(self._x), "labels": self.labels, "ids": self.ids})

    def fingerprint(self) -> str:
        return self._fingerprint


def as_kept(x: Rows | Tensor) -> Rows:
    """Images as they are kept: what lies in a file stays there, what is in memory is uint8 or float32."""
    if isinstance(x, Tensor):
        x = x.detach().cpu().numpy()
    if not isinstance(x, (StoredArray, SomeRows)):
        x = np.asarray(x)
        x = x if x.dtype == np.uint8 else np.asarray(x, dtype=np.float32)
    return x


def as_floats(x: np.ndarray) -> np.ndarray:
    """Images as float32 in C order, a copy always: a model that works in place must not change the data for the next one."""
    if x.dtype == np.uint8:
        return np.asarray(np.divide(x, np.float32(255), dtype=np.float32, order="C"))
    return np.array(x, dtype=np.float32, order="C")


class _Floats:
    """The rows of an array as the float32 that they are read as."""

    dtype = np.dtype(np.float32)

    def __init__(self, of: Rows) -> None:
        self._of, self.shape = of, of.shape

    def __len__(self) -> int:
        return len(self._of)

    def __getitem__(self, index: slice | np.ndarray) -> np.ndarray:
        return as_floats(self._of[index])


class TableSplit(Split):
    """Rows of a table held in memory, with their targets.

    Args:
        x: float32 (N, d), finite, raw units.
        targets: float64 (N,), finite.
        ids: one string per row.
    """

    def __init__(self, x: np.ndarray, targets: np.ndarray, ids: Sequence[str] | np.ndarray) -> None:
        self._x = np.ascontiguousarray(x, dtype=np.float32)
        self.labels = np.asarray(targets, dtype=np.float64)
        self.ids = np.asarray(ids, dtype=np.str_)
        if self._x.ndim != 2 or not len(self._x) == len(self.labels) == len(self.ids):
            raise DataError(
                f"inputs {self._x.shape}, targets {self.labels.shape} and {len(self.ids)} ids do not match: expected (N, d), "
                f"(N,) and N"
            )
        if not np.isfinite(self._x).all():
            raise DataError("inputs hold NaN, infinity or a number beyond float32; repair or rescale the table")

    def images(self, index: np.ndarray | slice) -> Tensor:
        raise DataError("these samples are rows of a table, not images: read them with inputs(index)")

    def inputs(self, index: np.ndarray | slice) -> Tensor:
        return torch.from_numpy(self._x[index].copy())  # a copy, as in ArraySplit

    @cached_property
    def _fingerprint(self) -> str:
        return hash_arrays({"x": self._x, "labels": self.labels, "ids": self.ids})

    def fingerprint(self) -> str:
        return self._fingerprint


class Subset(Split):
    """Some of the samples of another split, in the given order."""

    def __init__(self, parent: Split, index: np.ndarray) -> None:
        self._parent, self._index = parent, index
        self.labels = parent.labels[index]
        self.ids = parent.ids[index]

    def images(self, index: np.ndarray | slice) -> Tensor:
        return self._parent.images(self._index[index])

    def inputs(self, index: np.ndarray | slice) -> Tensor:
        return self._parent.inputs(self._index[index])

    @cached_property
    def _fingerprint(self) -> str:
        # The parent's bytes and the chosen ids say it all; hashing the bytes again would be work done twice.
        return hash_strings(chain([self._parent.fingerprint()], each_string(self.ids)))

    def fingerprint(self) -> str:
        return self._fingerprint


@dataclass(frozen=True)
class Feature:
    """A column of the inputs of tabular data.

    Attributes:
        name: unique; `origin=2` for the indicator of a category.
        group: the categorical column that this 0/1 indicator belongs to; None where the column is a number. A group of one
            column is a category of two values; in a larger group each row has exactly one 1.
    """

    name: str
    group: str | None = None


class Truth(ABC):
    """What is known of Y given x where the data is synthetic. All take x (N, d) and return float64 (N,)."""

    @abstractmethod
    def mean(self, x: np.ndarray) -> np.ndarray:
        """E[Y | x]."""

    @abstractmethod
    def std(self, x: np.ndarray) -> np.ndarray:
        """Standard deviation of Y given x: the noise that no model can remove, and `epistemic` where there is any."""

    @abstractmethod
    def quantile(self, x: np.ndarray, level: float) -> np.ndarray:
        """The value that Y stays below with probability `level`, 0 < level < 1."""

    @abstractmethod
    def cdf(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """P(Y <= y | x) of one y (N,) for each x; y may be infinite."""

    @abstractmethod
    def inside(self, x: np.ndarray) -> np.ndarray:
        """bool (N,): whether x lies in the support of the training inputs, so that a model could have learnt of it."""

    def aleatoric(self, x: np.ndarray) -> np.ndarray:
        """Standard deviation of the noise alone."""
        return self.std(x)

    def epistemic(self, x: np.ndarray) -> np.ndarray | None:
        """Standard deviation of E[Y | x] for want of data, where the truth is what can be known from the train split; None
        where it is the law that the data was drawn from.
        """
        return None


class ClassTruth(ABC):
    """What is known of the classes where the labels of images are drawn. It belongs to the sample and not to its pixels, so it
    is the same under corruptions and attacks.
    """

    @abstractmethod
    def probabilities(self, ids: np.ndarray) -> np.ndarray:
        """The probability of each class, float64 (N, K), of the samples with these ids.

        Raises:
            DataError: an id is none of this data's samples.
        """


@dataclass(frozen=True)
class Dataset:
    """A named dataset.

    Attributes:
        name: as in a suite.
        splits: `train`, `calibration` and `test`; `train` may be missing where only evaluation is meant.
        classes: class names; their number is K. None for regression.
        shape: (C, H, W) of images, (d,) of tabular data.
        source: where the data comes from, one line for reports.
        task: "classification" or "regression".
        features: of tabular data, the d columns in their order.
        target: of regression data, what is predicted, with its unit: "mpg (miles per US gallon)".
        truth: of synthetic regression data, the conditional distribution of the target.
        class_truth: of synthetic classification data, the probabilities that the labels were drawn with.
        notes: what whoever runs a suite on it should know, such as memory that could be saved; no result depends on it.
    """

    name: str
    splits: Mapping[str, Split]
    classes: tuple[str, ...]
    shape: Any
    source: str = ""
    task: str = field(default=CLASSIFICATION)
    features: tuple[Feature, ...] = ()
    target: str = ""
    truth: Truth | None = None
    notes: tuple[str, ...] = ()
    class_truth: ClassTruth | None = None

    def __post_init__(self) -> None:
        if self.task not in (CLASSIFICATION, REGRESSION):
            raise DataError(f"{self.name}: task '{self.task}', expected '{CLASSIFICATION}' or '{REGRESSION}'")
        for name, split in self.splits.items():
            if not len(split):
                least = "a class needs at least 3" if self.task == CLASSIFICATION else "5 rows are the least"
                raise DataError(
                    f"{self.name}: the {name} split is empty. Give more samples ({least} for three splits), or name the "
                    f"splits yourself."
                )
        if self.task == REGRESSION:
            self._check_regression()
        else:
            self._check_classification()

    def _check_classification(self) -> None:
        if len(set(self.classes)) < len(self.classes):
            raise DataError(f"{self.name}: class names must differ, got {', '.join(self.classes)}")
        for name, split in self.splits.items():
            labels = split.labels
            if len(labels) and (labels.min() < 0 or labels.max() >= len(self.classes)):
                raise DataError(
                    f"{self.name}/{name}: labels span {labels.min()}..{labels.max()}, expected 0..{len(self.classes) - 1} "
                    f"for {len(self.classes)} classes. Renumber the labels from 0, or give the right number of classes."
                )

    def _check_regression(self) -> None:
        names = [feature.name for feature in self.features]
        if self.classes or self.shape != (len(names),) or len(set(names)) < len(names):
            raise DataError(
                f"{self.name}: {len(self.classes)} classes, shape {self.shape} and features {', '.join(names)}; expected no "
                f"classes, shape (d,) and d features of different names"
            )
        for name, split in self.splits.items():
            if split.labels.dtype != np.float64 or not np.isfinite(split.labels).all():
                raise DataError(f"{self.name}/{name}: targets must be finite float64, got {split.labels.dtype}")

    def __getitem__(self, split: str) -> Split:
        if split not in self.splits:
            raise DataError(f"dataset '{self.name}' has no split '{split}'; it has {', '.join(self.splits)}")
        return self.splits[split]

    def describe(self) -> dict[str, object]:
        """What reports and keys say of the dataset."""
        said: dict[str, object] = {
            "name": self.name,
            "source": self.source,
            "shape": list(self.shape),
            "classes": list(self.classes),
            "splits": {name: {"n": len(s), "fingerprint": s.fingerprint()} for name, s in self.splits.items()},
        }
        if self.task == REGRESSION:
            said |= {
                "task": self.task,
                "target": self.target,
                "features": [{"name": f.name, "group": f.group} for f in self.features],
            }
        return said


def rank_of(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _ranks(texts: Iterable[str], n: int) -> np.ndarray:
    return np.fromiter(map(rank_of, texts), dtype=np.uint64, count=n)


def stratified_order(labels: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """An order in which every prefix is class-balanced, decided by the ids alone.

    Within a class, samples are ordered by a hash of their id; the k-th of n samples of a class is then placed at the
    relative position (k + 1/2) / n, which interleaves the classes in proportion to their sizes.
    """
    ranks = _ranks(each_string(ids), len(ids))
    by_class = np.lexsort((ranks, labels))
    _, first, sizes = np.unique(labels[by_class], return_index=True, return_counts=True)
    position = np.empty(len(labels))
    position[by_class] = (np.arange(len(labels)) - np.repeat(first, sizes) + 0.5) / np.repeat(sizes, sizes)
    return np.lexsort((ranks, position))


def split_dataset(x: Rows | Tensor, labels: np.ndarray, ids: Sequence[str] | np.ndarray) -> dict[str, Split]:
    """Cut one array into train (60 %), calibration (20 %) and test (20 %): disjoint, stratified, fixed by the ids.

    Args:
        x, labels, ids: as for `ArraySplit`.
    """
    labels, names = np.asarray(labels, dtype=np.int64), np.asarray(ids, dtype=np.str_)
    if not len(x) == len(labels) == len(names):
        raise DataError(f"{len(x)} inputs, {len(labels)} labels and {len(names)} ids do not match")
    kept = as_kept(x)
    ranks = _ranks((f"split|{name}" for name in each_string(names)), len(names))
    part_of = np.empty(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        members = members[np.argsort(ranks[members], kind="stable")]
        first = round(FRACTIONS["train"] * len(members))
        second = first + round(FRACTIONS["calibration"] * len(members))
        for number, part in enumerate(np.split(members, [first, second])):
            part_of[part] = number
    splits: dict[str, Split] = {}
    for number, name in enumerate(SPLITS):
        part = np.flatnonzero(part_of == number)
        part = part[stratified_order(labels[part], names[part])]
        chosen = kept[part] if isinstance(kept, np.ndarray) else SomeRows(kept, part)
        splits[name] = ArraySplit(chosen, labels[part], names[part])
    return splits
