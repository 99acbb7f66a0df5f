"""Accuracy: overall, per class, worst class, worst case over attacks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from robustbench_ext.fingerprint import Rows
from robustbench_ext.metrics.blocks import each
from robustbench_ext.metrics.estimate import LEVEL, Estimate, require
from robustbench_ext.metrics.intervals import proportion, wilson


def predicted(logits: Rows, labels: np.ndarray) -> np.ndarray:
    """Whether each sample's largest logit is its label's, bool (N,): logits (N, K), the first of equals counts."""
    return each(lambda z, y: (z.argmax(axis=1) == y,), logits, labels)[0]


def accuracy(correct: np.ndarray) -> Estimate:
    """The share of correct samples, (N,) bool, with Wilson's interval."""
    require("accuracy", correct=correct)
    return proportion(correct)


def per_class_accuracy(correct: np.ndarray, labels: np.ndarray, num_classes: int) -> list[Estimate]:
    """Accuracy of each class; undefined for a class without samples."""
    require("per-class accuracy", correct=correct, labels=labels)
    groups = [correct[labels == k] for k in range(num_classes)]
    return [proportion(g) if len(g) else Estimate.undefined(0, "no samples of this class") for g in groups]


def worst_class_accuracy(correct: np.ndarray, labels: np.ndarray, num_classes: int) -> tuple[Estimate, int]:
    """The lowest class accuracy and its class (the first of equals).

    The interval is [min_k low_k, min_k high_k] over the classes' Wilson intervals at level 1 - (1 - level) / K: it holds
    for the lowest true accuracy, whichever class that is, also where a small class hides it.
    """
    classes = per_class_accuracy(correct, labels, num_classes)
    there = [k for k in range(num_classes) if classes[k].n]
    worst = min(there, key=lambda k: classes[k].value)
    level = 1 - (1 - LEVEL) / num_classes
    ends = [wilson(round(classes[k].value * classes[k].n), classes[k].n, level) for k in there]
    low, high = min(e[0] for e in ends), min(e[1] for e in ends)
    return replace(classes[worst], ci_low=low, ci_high=high, ci_method="Wilson, Bonferroni"), worst


def worst_case(correct: Sequence[np.ndarray]) -> np.ndarray:
    """Correct under all attacks, (N,) bool: the per-sample AND. Its mean is at most the least of the means."""
    require("worst case", **{str(i): c for i, c in enumerate(correct)})
    return np.asarray(np.logical_and.reduce(np.stack(correct)))
