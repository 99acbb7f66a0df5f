"""How many samples does a probe need? Naive Bayes against logistic regression on the same frozen features.

After Ng and Jordan (NeurIPS 2001) and Zheng et al. (ICML 2023, arXiv 2302.02334): naive Bayes comes near its final accuracy
with O(log d) samples of d features, logistic regression with O(d), and ends higher. So with few samples the first is ahead,
with many the second; where they cross depends on the features, and on the inputs that both are asked about.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from detectors.gaussian_probe import naive_bayes, range_of, unscaled
from detectors.head import Head
from robustbench_ext.errors import ConfigError, DataError

NAIVE_BAYES, LOGISTIC = "naive Bayes", "logistic regression"
TRIES = 10_000  # draws of a size, until one has every class
Labelled = tuple[Tensor, Tensor]  # features (n, d) and labels (n,)


def logistic_regression(features: Tensor, labels: Tensor, num_classes: int, c: float = 1.0, steps: int = 1000) -> Head:
    """L2-regularised logistic regression as a linear layer, by scikit-learn's L-BFGS, on features scaled to [0, 1].

    Args:
        c: inverse strength of the penalty; 1 is the published baseline.
        steps: at most so many; fewer than it needs to converge are allowed, as in the published baseline.
    A class without samples has the logit -inf.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    low, span = range_of(features)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        fitted = LogisticRegression(C=c, max_iter=steps).fit(((features.double() - low) / span).numpy(), labels.numpy())
    weight = torch.from_numpy(np.asarray(fitted.coef_, dtype=np.float64))
    bias = torch.from_numpy(np.asarray(fitted.intercept_, dtype=np.float64))
    if len(weight) == 1:  # of two classes the second's logit
        weight, bias = torch.cat([torch.zeros_like(weight), weight]), torch.cat([torch.zeros_like(bias), bias])
    there = torch.from_numpy(fitted.classes_)
    every = Head(torch.zeros(num_classes, weight.shape[1]).double(), torch.full((num_classes,), -math.inf).double())
    every.weight[there], every.bias[there] = weight, bias
    return unscaled(every, low, span)


@dataclass(frozen=True)
class ProbeCurves:
    """Accuracies of both probes.

    Attributes:
        sizes: numbers of training samples (S,), rising.
        accuracy: by probe and by inputs, (S, R): a row a size, a column a draw of the training samples.
    """

    sizes: tuple[int, ...]
    accuracy: dict[str, dict[str, np.ndarray]]

    def crossing(self, inputs: str) -> float:
        """The number of training samples from which on logistic regression is ahead, by mean accuracies; see `crossing`."""
        return crossing(self.sizes, self._ahead(inputs).mean(axis=1))

    def crossings(self, inputs: str) -> list[float]:
        """The same of every draw by itself: how far the crossing depends on chance."""
        return [crossing(self.sizes, column) for column in self._ahead(inputs).T]

    def _ahead(self, inputs: str) -> np.ndarray:
        return np.asarray(self.accuracy[NAIVE_BAYES][inputs] - self.accuracy[LOGISTIC][inputs])


def crossing(sizes: Sequence[int], ahead: np.ndarray) -> float:
    """Behind the last size at which naive Bayes is ahead, where the line to the next size crosses 0 on a logarithmic axis.

    Args:
        sizes: rising (S,); ahead: accuracy of naive Bayes minus that of logistic regression (S,).

    Returns:
        0 where naive Bayes is nowhere ahead, infinity where it still is at the largest size.
    """
    if len(sizes) != len(ahead) or not len(sizes):
        raise DataError(f"{len(sizes)} sizes and {len(ahead)} differences; expected as many, and at least one")
    last = np.flatnonzero(np.asarray(ahead) > 0)
    if not len(last):
        return 0.0
    i = int(last[-1])
    if i + 1 == len(sizes):
        return math.inf
    share = ahead[i] / (ahead[i] - ahead[i + 1])
    return float(math.exp(math.log(sizes[i]) + share * (math.log(sizes[i + 1]) - math.log(sizes[i]))))


def probe_curves(
    features: Tensor,
    labels: Tensor,
    tests: Mapping[str, Labelled | Callable[[Head], Labelled]],
    sizes: Sequence[int],
    repeats: int = 5,
    seed: int = 0,
) -> ProbeCurves:
    """Accuracy of both probes against the number of training samples.

    Args:
        features: of training samples (N, d), with labels (N,) in 0..K-1.
        tests: features (n, d) and labels (n,) to test on, by a name such as "clean"; or a function that makes them for the very
            probe that is tested, such as features of inputs that were attacked with it in the place of the last layer. What was
            made for another probe is a transfer attack, which overstates robustness.
        sizes: numbers of training samples, each between K and N.
        repeats: draws of each size, without replacement; one that misses a class is drawn again, as published.

    Raises:
        ConfigError: a size out of range, or one so small that no draw has every class.
    """
    sizes = sorted({int(size) for size in sizes})
    classes = int(labels.max()) + 1
    if not sizes or sizes[0] < classes or sizes[-1] > len(labels) or repeats < 1:
        raise ConfigError(
            f"sizes = {sizes}, repeats = {repeats}: expected sizes from {classes} (the classes) to {len(labels)} (the "
            f"samples), and at least one repeat"
        )
    probes: dict[str, Callable[[Tensor, Tensor, int], Head]] = {NAIVE_BAYES: naive_bayes, LOGISTIC: logistic_regression}
    found = {probe: {name: np.empty((len(sizes), repeats)) for name in tests} for probe in probes}
    for column in range(repeats):
        rng = np.random.Generator(np.random.Philox([seed, column]))
        for row, drawn in enumerate(_draws(rng, labels, sizes, classes)):
            for probe, fit in probes.items():
                head = fit(features[drawn], labels[drawn], classes)
                for name, test in tests.items():
                    x, y = test(head) if callable(test) else test
                    found[probe][name][row, column] = float((head(x).argmax(dim=1) == y).double().mean())
    return ProbeCurves(tuple(sizes), found)


def _draws(rng: np.random.Generator, labels: Tensor, sizes: Sequence[int], classes: int) -> Iterator[Tensor]:
    """Indices of training samples for each size, every class among them."""
    for size in sizes:
        for _ in range(TRIES):
            drawn = torch.from_numpy(rng.choice(len(labels), size, replace=False))
            if len(labels[drawn].unique()) == classes:
                yield drawn
                break
        else:
            raise ConfigError(f"none of {TRIES:,} draws of {size} samples has all {classes} classes; take larger sizes")
