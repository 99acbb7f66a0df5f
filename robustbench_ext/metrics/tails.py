"""Accuracy of the badly served: the lowest classes of a model, and groups of classes by how often they were trained on.

Everything here is a mean over classes, (1/m) sum_{k in S} p_k, whatever the number of test samples of each class.

**A fixed set of classes** S (many, medium and few shot; head and tail; all) has Wilson's interval with the effective number of
samples, p(1 - p) / V, V the variance of the mean as the classes' counts (with a little prior weight on the overall accuracy)
show it; Korn and Graubard (Survey Methodology 24, 1998) do so with Clopper and Pearson's.

**The tail** is no fixed set: T(p) = the mean of the m lowest p_k. Picking the lowest of noisy measurements biases the plug-in
value downwards, by about one standard error of a class where all classes are equally good. The interval is for T of the
true accuracies, whichever classes are the lowest in truth, and is made of two exact tests against their worst cases:

    lower end   T is the mean of m classes that do not depend on the data, and what was measured is at most their mean. So
                Clopper and Pearson's end for m classes holds, without any allowance for the selection.
    upper end   The largest t for which a tail as low as measured still has probability (1 - level) / 2 where all classes
                that can be in the tail at all have accuracy t, which is where the selection bites hardest.

Which classes can be in the tail is said by simultaneous Wilson limits that take a tenth of the error; so where the tail is
plain to see nothing is paid for the selection. A simulation in the tests holds it to its level.

**The harmonic mean** of all classes is led by the worst one, and 0 where a class is never right. It is concave, so the plug-in
value is biased downwards, and resamples of the samples show nothing of a class without right answers. Its interval is Wilson's
with the effective number of samples that the variances of the reciprocals 1 / p_k give (delta method, from shares with half a
sample of prior weight), and

    upper end   starts from the value without the bias (1 - p_k) / (n_k p_k^2) of every reciprocal;
    both ends   are no nearer than those that any single class allows, its accuracy at the end of its own Wilson interval.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from scipy.stats import binom

from robustbench_ext.errors import DataError
from robustbench_ext.metrics.estimate import LEVEL, Estimate, require
from robustbench_ext.metrics.intervals import clopper_pearson, hash_seed, wilson

TAIL = 0.3
MANY, FEW = 100, 20
IMBALANCED = 2.0
_SCREEN = 0.1  # share of the error that goes to finding out which classes can be in the tail
_DRAWS, _UNIFORMS = 2048, 1 << 19
_HALVINGS = 14


def class_groups(train_counts: np.ndarray, many: int = MANY, few: int = FEW) -> dict[str, np.ndarray]:
    """Groups of classes by their training samples, each an array of class numbers; none where training was balanced.

    "many_shot" (more than `many`), "medium_shot" (`few` to `many`) and "few_shot" (fewer than `few`), as is usual since
    Liu et al. (CVPR 2019, arXiv 1904.05160), without empty ones. Where the counts take just two values (a step profile)
    the thresholds say little, and the groups are "head" (the larger value) and "tail".

    Args:
        train_counts: int (K,), training samples of each class.

    >>> {name: group.tolist() for name, group in class_groups(np.array([300, 120, 100, 20, 19])).items()}
    {'many_shot': [0, 1], 'medium_shot': [2, 3], 'few_shot': [4]}
    """
    if not is_imbalanced(train_counts):
        return {}
    if len(values := np.unique(train_counts)) == 2:
        groups = {"head": train_counts == values[1], "tail": train_counts == values[0]}
    else:
        groups = {
            "many_shot": train_counts > many,
            "medium_shot": (train_counts >= few) & (train_counts <= many),
            "few_shot": train_counts < few,
        }
    return {name: np.flatnonzero(member) for name, member in groups.items() if member.any()}


def is_imbalanced(train_counts: np.ndarray, factor: float = IMBALANCED) -> bool:
    """Whether the largest class has more than `factor` times the training samples of the smallest."""
    require("class groups", train_counts=train_counts)
    return bool(train_counts.max() > factor * train_counts.min())


def shot_definitions(many: int = MANY, few: int = FEW) -> dict[str, str]:
    """What results say of the metrics over these groups, by metric."""
    return {
        "many_shot_accuracy": f"The mean accuracy of the classes with more than {many} training samples.",
        "medium_shot_accuracy": f"The mean accuracy of the classes with {few} to {many} training samples.",
        "few_shot_accuracy": f"The mean accuracy of the classes with fewer than {few} training samples.",
    }


def class_mean_accuracy(correct: np.ndarray, labels: np.ndarray, classes: np.ndarray) -> Estimate:
    """The mean over these classes of each one's accuracy. Classes without test samples are left out; `reason` says so.

    Args:
        correct, labels: (N,), bool and int.
        classes: class numbers.
    """
    k, n, _, reason = _counts(correct, labels, classes)
    if not len(n):
        return Estimate.undefined(0, reason)
    value = float((k / n).mean())
    prior = (k.sum() + 1) / (n.sum() + 2)
    p = (k + 2 * prior) / (n + 2)  # so that a class without a mistake has a variance
    effective = float(p.mean() * (1 - p.mean()) * len(n) ** 2 / (p * (1 - p) / n).sum())
    return Estimate(value, *wilson(value * effective, effective), "Wilson, effective n", int(n.sum()), reason)


def balanced_accuracy(correct: np.ndarray, labels: np.ndarray, num_classes: int) -> Estimate:
    """The mean of all classes' accuracies; equals the accuracy where the classes have equally many test samples."""
    return class_mean_accuracy(correct, labels, np.arange(num_classes))


def harmonic_accuracy(correct: np.ndarray, labels: np.ndarray, num_classes: int) -> Estimate:
    """The harmonic mean of all classes' accuracies, K / sum_k 1 / p_k: at most the mean, 0 where a class is never right.

    Classes without test samples are left out; `reason` says so.

    Args:
        correct, labels: (N,), bool and int.
    """
    k, n, _, reason = _counts(correct, labels, np.arange(num_classes))
    if not len(n):
        return Estimate.undefined(0, reason)
    m, prior = len(n), (k.sum() + 1) / (n.sum() + 2)
    p = (k + prior / 2) / (n + 0.5)
    value = float(m / (n / k).sum()) if k.min() > 0 else 0.0
    total = float((1 / p).sum())
    smooth = m / total
    effective = smooth * (1 - smooth) / float(((smooth**2 / (m * p**2)) ** 2 * p * (1 - p) / n).sum())
    effective = max(1.0, effective)  # a few samples in all, of which some class has none right
    # A class that is never right has no bias to take out: half a sample of prior weight stands for it.
    bias = np.minimum(np.where(k > 0, (1 - p) / (n * p**2), 0.0), 1 / p - 1)
    start = min(1.0, max(value, m / (total - float(bias.sum()))))
    low, high = wilson(value * effective, effective)[0], wilson(start * effective, effective)[1]
    ends = np.array([wilson(int(a), int(b)) for a, b in zip(k, n, strict=True)])
    single = m / (total - 1 / p + 1 / np.maximum(ends.T, 1e-300))  # (2, K)
    low, high = min(low, float(single[0].min())), max(high, float(single[1].max()))
    return Estimate(value, min(low, value), min(1.0, max(high, value)), "Wilson, effective n", int(n.sum()), reason)


def tail_accuracy(
    correct: np.ndarray, labels: np.ndarray, num_classes: int, share: float = TAIL
) -> tuple[Estimate, np.ndarray]:
    """The mean accuracy of the ceil(share K) classes of lowest accuracy, of this very model, and which classes these are.

    The value is the plug-in, biased downwards; the interval covers the mean of the lowest true accuracies. With robust
    verdicts this is RA-Tail-30 of the literature on reweighted adversarial training (arXiv 2308.00311). Classes without test
    samples are left out, K counting the others; `reason` says so.

    Args:
        correct, labels: (N,), bool and int.
        share: of the classes, in (0, 1].
    """
    if not 0 < share <= 1:
        raise DataError(f"tail accuracy: share = {share}, expected a number in (0, 1]")
    k, n, there, reason = _counts(correct, labels, np.arange(num_classes))
    if not len(n):
        return Estimate.undefined(0, reason), there
    m = math.ceil(share * len(n) - 1e-9)
    lowest = np.argsort(k / n, kind="stable")[:m]
    value = float((k / n)[lowest].mean())
    rest = 1 - (1 - _SCREEN) * (1 - LEVEL)
    possible = n[_possible(k, n, m)]
    effective = m**2 / float(np.sort(1 / possible)[-m:].sum())  # of the m classes measured worst
    low = clopper_pearson(value * effective, effective, rest)[0]
    high = _highest(value, possible, m, (1 - rest) / 2)
    method = "exact, selection-adjusted"
    return Estimate(value, low, high, method, int(n[lowest].sum()), reason), np.sort(there[lowest])


def _counts(
    correct: np.ndarray, labels: np.ndarray, classes: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, str]:
    """Of the classes that have test samples: how many are correct, how many there are, and their numbers; then a note."""
    require("class means", correct=correct, labels=labels)
    require("class means", classes=classes)
    length = int(max(labels.max(), classes.max())) + 1
    n = np.bincount(labels, minlength=length)[classes]
    k = np.bincount(labels[correct.astype(bool)], minlength=length)[classes]
    missing = int((n == 0).sum())
    reason = f"{missing} of {len(classes)} classes have no test samples" if missing else ""
    return k[n > 0], n[n > 0], classes[n > 0], reason


def _possible(k: np.ndarray, n: np.ndarray, m: int) -> np.ndarray:
    """Classes that can be among the m of lowest true accuracy: fewer than m others are surely lower, (K,) bool."""
    level = 1 - _SCREEN * (1 - LEVEL) / len(n)
    low, high = np.array([wilson(int(a), int(b), level) for a, b in zip(k, n, strict=True)]).T
    return np.asarray(np.searchsorted(np.sort(high), low, side="left") < m)


def _highest(value: float, n: np.ndarray, m: int, error: float) -> float:
    """The largest common accuracy of classes with n samples at which their m lowest still average `value` or less with
    probability `error`. The same uniform numbers are used at every accuracy, so that the probability falls steadily.
    """
    u = _uniforms(min(_DRAWS, _UNIFORMS // len(n)), len(n))
    low, high = value, 1.0
    for _ in range(_HALVINGS if value < 1 else 0):
        middle = (low + high) / 2
        measured = np.empty_like(u)
        for size in np.unique(n):
            here = n == size
            measured[:, here] = np.searchsorted(binom.cdf(np.arange(size), size, middle), u[:, here]) / size
        tail = np.partition(measured, m - 1, axis=1)[:, :m].mean(axis=1)
        if (tail <= value + 1e-12).mean() >= error:
            low = middle
        else:
            high = middle
    return high


@lru_cache(maxsize=4)
def _uniforms(draws: int, num_classes: int) -> np.ndarray:
    """Uniform numbers (draws, K), always the same."""
    return np.random.Generator(np.random.Philox(hash_seed(0, 0, 254))).random((draws, num_classes))
