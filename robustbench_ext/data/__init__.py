"""Datasets with fixed train / calibration / test splits, outliers that need no download, and corruptions."""

from robustbench_ext.data.base import (
    ArraySplit,
    ClassTruth,
    Dataset,
    Feature,
    Split,
    Subset,
    TableSplit,
    Truth,
    split_dataset,
)
from robustbench_ext.data.loading import load_dataset
from robustbench_ext.data.longtail import imbalanced

__all__ = [
    "ArraySplit",
    "ClassTruth",
    "Dataset",
    "Feature",
    "Split",
    "Subset",
    "TableSplit",
    "Truth",
    "imbalanced",
    "load_dataset",
    "split_dataset",
]
