"""Mahalanobis distance to the nearest class mean (Lee, Lee, Lee, Shin, NeurIPS 2018, arXiv 1807.03888).

Class-conditional Gaussians with one tied covariance on the penultimate features:

    mu_c = mean of f(x_i) over class c,   Sigma = 1/N sum_i (f_i - mu_{y_i})(f_i - mu_{y_i})^T,
    d_c(x) = (f - mu_c)^T Sigma^{-1} (f - mu_c),   score = min_c d_c(x).

The published confidence is -d (its code multiplies by another 1/2); rankings are the same.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from detectors.base import Detector
from robustbench_ext.errors import ConfigError, DataError
from robustbench_ext.models.observe import PENULTIMATE, Observations
from robustbench_ext.numbers import parse_number

INVERSES = ("pseudo", "shrinkage")


class TiedGaussian:
    """Class means and their shared covariance, from one pass over features in any number of batches.

    Sums are kept in float64 about the first batch's mean, which takes the cancellation out of sum ff^T - N mu mu^T.
    """

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self._shift: Tensor | None = None

    def update(self, features: Tensor, labels: Tensor) -> None:
        """Add features (n, d) with labels (n,)."""
        features = features.double()
        if self._shift is None:
            d = features.shape[1]
            self._shift = features.mean(dim=0)
            self._counts = torch.zeros(self.num_classes, dtype=torch.float64)
            self._sums = torch.zeros(self.num_classes, d, dtype=torch.float64)
            self._outer = torch.zeros(d, d, dtype=torch.float64)
        centred = features - self._shift
        self._counts.index_add_(0, labels, torch.ones(len(labels), dtype=torch.float64))
        self._sums.index_add_(0, labels, centred)
        self._outer.addmm_(centred.T, centred)

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """Counts (K,), means (K, d; zero rows where a class is empty) and the tied covariance (d, d), divisor N."""
        if self._shift is None:
            raise DataError("mahalanobis: no features were given")
        means = self._sums / self._counts.clamp_min(1)[:, None]
        scatter = self._outer - self._sums.T @ means
        covariance = scatter / self._counts.sum()
        return self._counts, means + self._shift, (covariance + covariance.T) / 2


class Mahalanobis(Detector):
    """score = min_c d_c(x) on the penultimate features.

    A singular covariance is the normal case (dead units, fewer samples than dimensions), and the two remedies differ
    in what they say of directions that the training data never use:

    Args:
        inverse: "pseudo" (default, the published way): directions with eigenvalues below `tolerance` times the largest
            are ignored. "shrinkage": (1 - s) Sigma + s tr(Sigma)/d I, which punishes movement there heavily.
        shrinkage: s, for inverse="shrinkage".
        tolerance: for inverse="pseudo".
    After fitting, `rank` is the number of directions in use.
    """

    name: ClassVar[str] = "mahalanobis"
    taps: ClassVar[tuple[str, ...]] = (PENULTIMATE,)
    needs_fit: ClassVar[bool] = True
    reference: ClassVar[str] = "arXiv 1807.03888"

    def __init__(self, inverse: str = "pseudo", shrinkage: float = 1e-3, tolerance: float = 1e-10) -> None:
        if inverse not in INVERSES:
            raise ConfigError(f"mahalanobis: inverse = {inverse!r}, expected one of {', '.join(INVERSES)}")
        self.inverse = inverse
        self.shrinkage = parse_number(shrinkage, "mahalanobis: shrinkage")
        self.tolerance = parse_number(tolerance, "mahalanobis: tolerance")
        if not 0 < self.shrinkage <= 1 or not 0 < self.tolerance < 1:
            raise ConfigError(
                f"mahalanobis: shrinkage = {self.shrinkage}, tolerance = {self.tolerance}; expected numbers between 0 and 1"
            )
        self.rank = 0

    def parameters(self) -> dict[str, Any]:
        used = {"shrinkage": self.shrinkage} if self.inverse == "shrinkage" else {"tolerance": self.tolerance}
        return {"inverse": self.inverse, **used}

    def _fit(self, train: Observations) -> None:
        num_classes = train.logits.shape[1]
        features, labels = train.features[PENULTIMATE], train.labels
        if len(labels) < 2 or int(labels.min()) < 0 or int(labels.max()) >= num_classes:
            raise DataError(
                f"mahalanobis: fitting needs at least two labelled samples of the classes 0..{num_classes - 1}, "
                f"got {len(labels)}"
            )
        gaussian = TiedGaussian(num_classes)
        for start in range(0, len(features), 4096):
            gaussian.update(features[start : start + 4096], labels[start : start + 4096])
        counts, means, covariance = gaussian.finish()
        values, vectors = torch.linalg.eigh(covariance)
        if self.inverse == "shrinkage":
            values = (1 - self.shrinkage) * values.clamp_min(0) + self.shrinkage * values.mean()
        keep = values > self.tolerance * values[-1] if self.inverse == "pseudo" else values > 0
        # What float64 sums of squares of this size lose to rounding is no variation of the features.
        noise = 1e-13 * float(means.square().sum(dim=1).max())
        if not bool(keep.any()) or float(values[-1]) <= noise:
            raise DataError(
                "mahalanobis: all training features of a class are equal, so there is no covariance to measure with. "
                "Check that the model is trained and that the tap is not a constant layer."
            )
        self.rank = int(keep.sum())
        # Whitening W with W W^T = Sigma^{-1} (or its pseudo-inverse): distances become Euclidean, and scoring costs
        # n d^2 + n d K without any (n, K, d) array. Features are centred first, for the expanded square's sake.
        self._whiten = vectors[:, keep] / values[keep].sqrt()
        self._centre = means[counts > 0].mean(dim=0)
        self._means = (means[counts > 0] - self._centre) @ self._whiten

    def distances(self, features: Tensor) -> Tensor:
        """d_c(x) to every class that has training samples, (N, K'), float64, >= 0."""
        white = (features.double() - self._centre) @ self._whiten
        squares = white.square().sum(dim=1)[:, None] + self._means.square().sum(dim=1)[None]
        distances: Tensor = squares - 2 * white @ self._means.T
        return distances.clamp_min(0.0)

    def _score(self, seen: Observations) -> Tensor:
        return self.distances(seen.features[PENULTIMATE]).amin(dim=1)
