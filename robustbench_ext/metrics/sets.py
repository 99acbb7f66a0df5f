"""Prediction sets of a classifier: do they hold the label, and how many classes does that take?

Coverage means little without the size: the set of all classes covers everything. Coverage on average means little where it
is bought by large sets on easy samples, so the coverage among sets of equal size is here too (Angelopoulos et al. 2021, arXiv
2009.14193), and that of each class.
"""

from __future__ import annotations

import numpy as np

from robustbench_ext.errors import DataError
from robustbench_ext.metrics.conditional import worst_group_coverage
from robustbench_ext.metrics.estimate import Estimate, require
from robustbench_ext.metrics.intervals import proportion
from robustbench_ext.metrics.resampling import sample_mean


def in_set(sets: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Whether each sample's label is in its set, bool (N,).

    Args:
        sets: bool (N, K), the classes of each prediction set; labels: int (N,).

    Raises:
        DataError: empty, other shapes or types, labels out of range.
    """
    require("prediction sets", sets=sets, labels=labels)
    if sets.ndim != 2 or sets.dtype != np.bool_ or labels.ndim != 1:
        raise DataError(
            f"prediction sets: {sets.dtype} {sets.shape} and labels {labels.shape}, expected bool (N, K) and (N,)"
        )
    if labels.min() < 0 or labels.max() >= sets.shape[1]:
        raise DataError(
            f"prediction sets: labels from {labels.min()} to {labels.max()}, expected 0 to {sets.shape[1] - 1}"
        )
    return np.asarray(sets[np.arange(len(labels)), labels])


def set_coverage(sets: np.ndarray, labels: np.ndarray) -> Estimate:
    """Share of samples whose label is in the set, with Wilson's interval."""
    return proportion(in_set(sets, labels))


def set_size(sets: np.ndarray, labels: np.ndarray) -> Estimate:
    """Mean number of classes in a set, in [0, K]; percentile bootstrap."""
    in_set(sets, labels)
    return sample_mean(sets.sum(axis=1))


def size_stratified_coverage(sets: np.ndarray, labels: np.ndarray) -> tuple[Estimate, int]:
    """The lowest coverage among sets of equal size, and that size.

    Empty sets count with those of one class, as in the source: by themselves they cover nothing, and one of them would decide.
    """
    found, size = worst_group_coverage(in_set(sets, labels), np.maximum(sets.sum(axis=1), 1))
    return found, int(size)


def class_coverage(sets: np.ndarray, labels: np.ndarray) -> tuple[Estimate, int]:
    """The lowest coverage of any class's samples, and that class; classes without samples are left out."""
    found, worst = worst_group_coverage(in_set(sets, labels), labels)
    return found, int(worst)


def set_metrics(sets: np.ndarray, labels: np.ndarray) -> dict[str, Estimate]:
    """All of the above by name, with `set_empty` and `set_single`, the shares of sets without and with exactly one class."""
    sizes = sets.sum(axis=1)
    return {
        "set_coverage": set_coverage(sets, labels),
        "set_size": set_size(sets, labels),
        "set_empty": proportion(sizes == 0),
        "set_single": proportion(sizes == 1),
        "set_size_stratified_coverage": size_stratified_coverage(sets, labels)[0],
        "set_class_coverage": class_coverage(sets, labels)[0],
    }
