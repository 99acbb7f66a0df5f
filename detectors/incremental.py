"""Classes added one by one to a generative classifier (Lee et al. 2018, arXiv 1807.03888, algorithm 2).

A frozen network's features, class means and one tied covariance classify by argmin_c d_c(x). A new class of n samples adds
its mean, and its covariance S to the tied one; no network is trained and no old sample is kept:

    paper:     Sigma <- C/(C+1) Sigma + 1/(C+1) S          every class alike
    weighted:  Sigma <- (N Sigma + n S) / (N + n)           every sample alike: equals the fit on all data, always

The two agree where classes are of equal size and the start is their average.
"""

from __future__ import annotations

import torch
from torch import Tensor

from detectors.distances import ClassDistances
from detectors.gaussian import TiedGaussian, whiten
from robustbench_ext.errors import ConfigError, DataError, NotFittedError

UPDATES = ("paper", "weighted")


class IncrementalGaussian:
    """Class means and a tied covariance that grow by one class at a time.

    Args:
        update: "paper" (default) or "weighted", see above.
        inverse, shrinkage, tolerance: see `gaussian.whiten`. The published algorithm takes the pseudo-inverse; with few
            samples a little shrinkage classifies better.
    """

    def __init__(
        self, update: str = "paper", inverse: str = "pseudo", shrinkage: float = 1e-3, tolerance: float = 1e-10
    ) -> None:
        if update not in UPDATES:
            raise ConfigError(f"incremental: update = {update!r}, expected one of {', '.join(UPDATES)}")
        self.update = update
        self._options = (inverse, shrinkage, tolerance)
        self.labels: list[int] = []
        self._means: list[Tensor] = []
        self._covariance = torch.empty(0, 0, dtype=torch.float64)
        self._seen, self._noise = 0, 0.0
        self._distances: ClassDistances | None = None

    @property
    def covariance(self) -> Tensor:
        """The tied covariance, (d, d), float64."""
        if not self.labels:
            raise NotFittedError("incremental: no class was added yet")
        return self._covariance

    def add_class(self, label: int, features: Tensor) -> IncrementalGaussian:
        """Add a class from its samples' features (n, d) alone."""
        if label in self.labels:
            raise DataError(f"incremental: class {label} is there already; a class is added once, with all its samples")
        if features.ndim != 2 or not len(features) or not bool(torch.isfinite(features).all()):
            raise DataError(f"incremental: class {label}: expected finite features (n, d), got {tuple(features.shape)}")
        if self.labels and features.shape[1] != len(self._means[0]):
            raise DataError(
                f"incremental: class {label} has {features.shape[1]} features, those before have {len(self._means[0])}"
            )
        gaussian = TiedGaussian(1)
        gaussian.update(features, torch.zeros(len(features), dtype=torch.int64))
        moments = gaussian.finish()
        old, new = (len(self.labels), 1) if self.update == "paper" else (self._seen, len(features))
        if self.labels:
            self._covariance = (old * self._covariance + new * moments.covariance) / (old + new)
        else:
            self._covariance = moments.covariance
        self.labels.append(int(label))
        self._means.append(moments.means[0])
        self._seen, self._noise = self._seen + len(features), max(self._noise, moments.noise)
        self._distances = None
        return self

    def distances(self, features: Tensor) -> Tensor:
        """d_c (N, C), float64, columns in the order in which classes were added."""
        if self._distances is None:
            whitening = whiten(self.covariance, self._noise, *self._options)
            self._distances = ClassDistances(torch.stack(self._means), whitening, "float64")
        return self._distances.all(features)

    def predict(self, features: Tensor) -> Tensor:
        """Labels (N,) of the nearest class means."""
        return torch.tensor(self.labels)[self.distances(features).argmin(dim=1)]
