"""A train split from elsewhere: what a model may be trained on in a suite whose data it is judged on."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from robustbench_ext.data.base import REGRESSION, Dataset
from robustbench_ext.errors import ConfigError


def with_train_of(dataset: Dataset, other: Dataset) -> Dataset:
    """The dataset with another one's train split in the place of its own; calibration and test stay.

    Raises:
        ConfigError: the other one has no train split, other classes or shapes, or trains on samples that `dataset` holds in its
            calibration or test split. Samples are told apart by their ids: copies under other ids are not found.
    """
    if REGRESSION in (dataset.task, other.task):
        raise ConfigError(f"data '{other.name}': only classifiers can be trained on other data than the suite's")
    if "train" not in other.splits:
        raise ConfigError(f"data '{other.name}': it has no train split to train on")
    if other.classes != dataset.classes or tuple(other.shape) != tuple(dataset.shape):
        raise ConfigError(
            f"data '{other.name}': {len(other.classes)} classes ({_few(other.classes)}) of shape {tuple(other.shape)}, "
            f"expected those of {dataset.name}, {len(dataset.classes)} classes ({_few(dataset.classes)}) of shape "
            f"{tuple(dataset.shape)}"
        )
    train = other["train"]
    for name in ("calibration", "test"):
        if name in dataset.splits:
            shared = np.intersect1d(train.ids, dataset[name].ids)
            if len(shared):
                raise ConfigError(
                    f"data '{other.name}': {len(shared)} of its training samples are in the {name} split of {dataset.name}, "
                    f"such as '{shared[0]}'; a model must not be trained on what it is judged on"
                )
    return replace(
        dataset,
        name=f"{dataset.name}, trained on {other.name}",
        splits={**dataset.splits, "train": train},
        source=f"{dataset.source}; trained on {other.name}: {other.source}",
    )


def _few(classes: tuple[str, ...]) -> str:
    return ", ".join(classes[:3]) + (", ..." if len(classes) > 3 else "")
