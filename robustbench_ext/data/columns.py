"""What the training inputs of a table look like, column by column: what shifts, attacks and models measure in."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from robustbench_ext.data.base import Dataset
from robustbench_ext.errors import DataError


@dataclass(frozen=True)
class Columns:
    """Statistics of the train split of tabular data, float64 (d,) each.

    Attributes:
        names: the columns.
        mean, std: of the training inputs (divided by N).
        low, high: their range.
        typical: what an imputer puts in: the mean of a number, the most frequent category as its indicators.
        numeric: bool (d,), False for indicators.
        parts: the columns of each original feature: one of a number, all indicators of a category.
        axis: unit vector, the first principal component of the standardised numbers (of all columns where none is a number);
            its largest entry is positive. 0 for columns that it leaves out.
        spread: the standard deviation of the training inputs along it.
    """

    names: tuple[str, ...]
    mean: np.ndarray
    std: np.ndarray
    low: np.ndarray
    high: np.ndarray
    typical: np.ndarray
    numeric: np.ndarray
    parts: tuple[tuple[int, ...], ...]
    axis: np.ndarray
    spread: float

    @classmethod
    def of(cls, dataset: Dataset) -> Columns:
        """Of the train split of a dataset.

        Raises:
            DataError: the data is no table, or has no train split.
        """
        if not dataset.features:
            raise DataError(f"dataset '{dataset.name}' is no table: its samples have shape {tuple(dataset.shape)}")
        x = dataset["train"].inputs(slice(None)).numpy().astype(np.float64)
        numeric = np.array([feature.group is None for feature in dataset.features])
        parts: dict[str, list[int]] = {}
        for j, feature in enumerate(dataset.features):
            key = f"number {feature.name}" if feature.group is None else f"category {feature.group}"
            parts.setdefault(key, []).append(j)
        return cls(
            tuple(feature.name for feature in dataset.features),
            x.mean(axis=0),
            x.std(axis=0),
            x.min(axis=0),
            x.max(axis=0),
            _typical(x, numeric, parts),
            numeric,
            tuple(tuple(part) for part in parts.values()),
            *_axis(x, numeric),
        )

    @property
    def scale(self) -> np.ndarray:
        """What a column is divided by to have unit variance: its standard deviation, 1 for indicators and constants."""
        return np.asarray(np.where(self.numeric & (self.std > 0), self.std, 1.0))


def _typical(x: np.ndarray, numeric: np.ndarray, parts: dict[str, list[int]]) -> np.ndarray:
    typical: np.ndarray = x.mean(axis=0)
    for part in parts.values():
        if not numeric[part[0]]:
            rows, counts = np.unique(x[:, part], axis=0, return_counts=True)
            typical[part] = rows[counts.argmax()]
    return typical


def _axis(x: np.ndarray, numeric: np.ndarray) -> tuple[np.ndarray, float]:
    used = (numeric if numeric.any() else np.ones_like(numeric)) & (x.std(axis=0) > 0)
    axis = np.zeros(x.shape[1])
    if not used.any():
        return axis, 0.0
    z = (x[:, used] - x[:, used].mean(axis=0)) / x[:, used].std(axis=0)
    values, vectors = np.linalg.eigh(z.T @ z / len(z))
    axis[used] = vectors[:, -1] * np.sign(vectors[np.abs(vectors[:, -1]).argmax(), -1])
    return axis, float(np.sqrt(values[-1]))
