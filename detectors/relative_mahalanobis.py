"""Relative Mahalanobis distance (Ren, Fort, Liu, Roy, Padhy, Lakshminarayanan 2021, arXiv 2106.09022), and the marginal.

One more Gaussian is fitted to all training features whatever their label, with the same divisor:

    d_0(x) = (f - mu_0)^T Sigma_0^{-1} (f - mu_0),   relative: score = min_c d_c(x) - d_0(x),   marginal: score = d_0(x).

What is unusual for all classes alike, such as directions that no class uses, cancels in the difference: better on near
outliers, worse on far ones. The relative score may be negative, needs no unknown data, and changes no predicted class.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from detectors.distances import ClassDistances, Distances
from detectors.gaussian import TiedGaussian, whiten
from detectors.mahalanobis import Mahalanobis


class RelativeMahalanobis(Mahalanobis):
    """score = min_c d_c(x) - d_0(x); parameters as for `Mahalanobis`."""

    name: ClassVar[str] = "relative-mahalanobis"
    version: ClassVar[int] = 1
    reference: ClassVar[str] = "arXiv 2106.09022"

    def _gaussians(self, gaussian: TiedGaussian, tap: str) -> tuple[Distances, ...]:
        return (*super()._gaussians(gaussian, tap), self._background(gaussian))

    def _background(self, gaussian: TiedGaussian) -> ClassDistances:
        moments = gaussian.finish()
        mean, covariance = moments.background()
        whitening = whiten(covariance, moments.noise, self.inverse, self.shrinkage, self.tolerance)
        return ClassDistances(mean[None], whitening, self.precision)

    def _distance(self, tap: str, features: Tensor) -> Tensor:
        own, background = self._layers[tap]
        return own.nearest(features).double() - background.nearest(features).double()


class MarginalMahalanobis(RelativeMahalanobis):
    """score = d_0(x): unlike all training data together, whatever the class; parameters as for `Mahalanobis`."""

    name: ClassVar[str] = "marginal-mahalanobis"

    def _gaussians(self, gaussian: TiedGaussian, tap: str) -> tuple[ClassDistances, ...]:
        background = self._background(gaussian)
        self._note(tap, background.whitening.rank, background.whitening.matrix.shape[0])
        return (background,)

    def _distance(self, tap: str, features: Tensor) -> Tensor:
        return self._layers[tap][0].nearest(features)
