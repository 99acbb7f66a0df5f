"""One Gaussian with a diagonal covariance per class, all alike: a classifier of frozen features and a detector from one fit.

Zheng, Wu, Bao, Cao, Li, Zhu: *Revisiting Discriminative vs. Generative Classifiers: Theory and Implications*, ICML 2023,
arXiv 2302.02334. From counts, means mu_k and variances of the classes (`gaussian.DiagonalMoments`), s^2 = sum_k pi_k s_k^2:

    classifier   argmax_k  log pi_k - 1/2 sum_i (f_i - mu_ki)^2 / s_i^2      naive Bayes with shared variances
    detector     min_k     sum_i (f_i - mu_ki)^2 / s_i^2                     Mahalanobis distance, diagonal covariance

Since the variances are shared, the squares of f are the same for all classes and drop out: the classifier is linear, a last
layer in closed form. It needs fewer samples than logistic regression to come near the accuracy that it has in the end, and that
accuracy is lower where features are correlated (`detectors.probe_curve` measures where the two cross).

Scikit-learn's `GaussianNB` is another model: it keeps the variances of every class, so that its boundaries are quadratic, and
adds a share of the largest variance to all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from detectors.distances import Distances
from detectors.gaussian import DiagonalMoments
from detectors.head import Head
from detectors.mahalanobis import Mahalanobis
from robustbench_ext.errors import DataError
from robustbench_ext.models.observe import PENULTIMATE, Observations

EPSILON = 1e-9  # of the published code, added to variances of features that span [0, 1]


# The classifier ------------------------------------------------------------------------------------------------------


def linear_rule(moments: DiagonalMoments, epsilon: float = EPSILON) -> Head:
    """Naive Bayes as a linear layer: weights mu_k / s^2, bias log pi_k - 1/2 sum_i mu_ki^2 / s_i^2.

    Its logits are the log-posteriors up to a number that all classes of a sample share, so their softmax are the posteriors. A
    class without samples has the prior 0, the logit -inf.
    """
    variances = moments.pooled() + epsilon
    weight = moments.means / variances
    return Head(weight, moments.priors.log() - 0.5 * (weight * moments.means).sum(dim=1))


def naive_bayes(features: Tensor, labels: Tensor, num_classes: int, epsilon: float = EPSILON) -> Head:
    """The classifier, fitted to features (n, d) with labels (n,).

    Features are scaled to [0, 1] by these samples' range, which decides nothing but how much `epsilon` is; the layer takes
    features as they come.
    """
    low, span = range_of(features)
    moments = DiagonalMoments.of((features.double() - low) / span, labels, num_classes)
    return unscaled(linear_rule(moments, epsilon), low, span)


def range_of(features: Tensor) -> tuple[Tensor, Tensor]:
    """The least value (d,) of every feature and its range, 1 where it is constant; float64."""
    if features.ndim != 2 or not len(features):
        raise DataError(f"features of shape {tuple(features.shape)}, expected (n, d) with n >= 1")
    low, high = features.double().aminmax(dim=0)
    return low, torch.where(high > low, high - low, 1.0)


def unscaled(head: Head, low: Tensor, span: Tensor) -> Head:
    """The layer that does to f what `head` does to (f - low) / span."""
    weight = head.weight / span
    return Head(weight, head.bias - weight @ low)


# The detector --------------------------------------------------------------------------------------------------------


class DiagonalDistances:
    """d_c(f) = sum_i (f_i - mu_ci)^2 scale_i^2; n features cost n d C and need no matrix of size d x d.

    Args:
        means: (C, d), float64.
        scale: (d,), one over the standard deviations; 0 for features that are not looked at.
    """

    def __init__(self, means: Tensor, scale: Tensor) -> None:
        # Everything is relative to a centre, for the expanded square's sake.
        self._centre, self._scale = means.mean(dim=0), scale
        self._means = (means - self._centre) * scale
        self._squares = self._means.square().sum(dim=1)

    def _white(self, features: Tensor) -> Tensor:
        if features.ndim != 2 or features.shape[1] != len(self._centre):
            raise DataError(
                f"features have shape {tuple(features.shape)}, but the fit was on (n, {len(self._centre)}): the model or its "
                f"input size is another"
            )
        return (features.double() - self._centre) * self._scale

    def all(self, features: Tensor) -> Tensor:
        """d_c to every class, (n, C), float64, >= 0."""
        white = self._white(features)
        distances: Tensor = white.square().sum(dim=1)[:, None] + self._squares - 2 * white @ self._means.T
        return distances.clamp_min(0.0)

    def nearest(self, features: Tensor) -> Tensor:
        """min_c d_c (n,), float64, from the difference to the nearest mean itself; differentiable."""
        white = self._white(features)
        index = (self._squares - 2 * white.detach() @ self._means.T).min(dim=1).indices
        return (white - self._means.index_select(0, index)).square().sum(dim=1)


class DiagonalMahalanobis(Mahalanobis):
    """score = min_c sum_i (f_i - mu_ci)^2 / s_i^2: the Mahalanobis distance with correlations between features ignored.

    Args:
        layers, eps, clip, weights, validate: as of `Mahalanobis`.
        inverse: "pseudo" ignores features whose variance is below `tolerance` times the largest one, "shrinkage" takes
            (1 - s) s_i^2 + s mean(s^2) for s_i^2, "cholesky" refuses features without variance.
    Its fit is that of the naive-Bayes classifier (`linear_rule`), its cost n d where `Mahalanobis` needs n d^2.
    """

    name: ClassVar[str] = "diagonal-mahalanobis"
    version: ClassVar[int] = 1
    reference: ClassVar[str] = "arXiv 2302.02334"

    def __init__(
        self,
        layers: str | Sequence[str] = PENULTIMATE,
        inverse: str = "pseudo",
        shrinkage: float = 1e-3,
        tolerance: float = 1e-10,
        eps: float | Sequence[float] = 0.0,
        clip: bool = False,
        weights: Sequence[float] | None = None,
        validate: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(layers, inverse, shrinkage, tolerance, "float64", eps, clip, weights, validate)

    def parameters(self) -> dict[str, Any]:
        return {name: value for name, value in super().parameters().items() if name != "precision"}

    def _layer(self, tap: str, train: Observations) -> tuple[Distances, ...]:
        moments = DiagonalMoments.of(train.features[tap], train.labels, train.logits.shape[1])
        scale = self._scale(moments.pooled(), moments.noise)
        self._note(tap, int((scale > 0).sum()), len(scale))
        return (DiagonalDistances(moments.present(), scale),)

    def _scale(self, variances: Tensor, noise: float) -> Tensor:
        """One over the standard deviations (d,), or what stands for it where there is no variance."""
        largest = float(variances.max())
        if not bool(torch.isfinite(variances).all()) or largest <= noise:
            raise DataError(
                "all training features of a class are equal, so there is no variance to measure with. Check that the model is "
                "trained and that the tap is not a constant layer."
            )
        if self.inverse == "shrinkage":
            return ((1 - self.shrinkage) * variances + self.shrinkage * variances.mean()).rsqrt()
        used = variances > max(noise, self.tolerance * largest)
        if self.inverse == "cholesky" and not bool(used.all()):
            raise DataError(
                f"{int((~used).sum())} of {len(used)} features do not vary within a class. Take inverse='pseudo', which "
                f"ignores them, or 'shrinkage', which punishes movement along them."
            )
        return torch.where(used, torch.where(used, variances, 1.0).rsqrt(), 0.0)
