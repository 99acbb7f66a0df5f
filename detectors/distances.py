"""Mahalanobis distances to class means, by whitening.

    d_c(f) = (f - mu_c)^T Sigma^{-1} (f - mu_c) = |W^T (f - mu_c)|^2   where   W W^T = Sigma^{-1}.

Nothing of shape (n, C, d) or (n, n) is ever made: n features cost n d^2 + n d C and O(d^2 + C d + batch (d + C)) memory.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from detectors.gaussian import Whitening
from robustbench_ext.errors import DataError

PRECISIONS = ("auto", "float32", "float64")
BATCH = 1 << 19  # numbers in a block of features that is scored at a time: what stays in the cache
RELATIVE_ERROR = 1e-5  # of float32 scores, against float64
SEPARATED = 4.0  # mean |m|^2 per direction, in units of the variance within a class
CANCELLED = 0.1  # |z - m|^2 below this share of |z|^2 is computed from the difference itself


class Distances(Protocol):
    """Distances of features (n, d) to the classes that were fitted."""

    def nearest(self, features: Tensor) -> Tensor:
        """min_c d_c (n,), differentiable."""

    def all(self, features: Tensor) -> Tensor:
        """d_c to every class, (n, C), float64, >= 0."""


class ClassDistances:
    """d_c(f) to class means under one whitening.

    Args:
        means: (C, d), float64.
        precision: of `nearest`: "auto" takes float32 where rounding costs less than 1e-5 of a distance (judged by the
            condition of the covariance and the spread of the means), else float64.
    """

    def __init__(self, means: Tensor, whitening: Whitening, precision: str = "auto") -> None:
        self.whitening = whitening
        # Everything is relative to a centre, for the expanded square's sake: a value that float32 holds exactly. Where the
        # origin is as near as the samples of a class are to each other, it will do, and saves a pass.
        centre = means.mean(dim=0).float().double()
        self._origin = float((centre @ whitening.matrix).square().sum()) <= whitening.rank
        self._centre = torch.zeros_like(centre) if self._origin else centre
        self._means = (means - self._centre) @ whitening.matrix
        scale = whitening.shortest * max(1, whitening.rank) ** 0.5
        amplified = max(whitening.condition**0.5, float((means - self._centre).norm(dim=1).max()) / scale)
        single = torch.finfo(torch.float32).eps * amplified <= RELATIVE_ERROR
        self.dtype = torch.float32 if precision == "float32" or (precision == "auto" and single) else torch.float64
        # Centring after the product saves a pass over the features; where they are far from zero it would cost digits.
        eps = torch.finfo(self.dtype).eps
        self._late = eps * max(amplified, float(means.norm(dim=1).max()) / scale) <= RELATIVE_ERROR
        # Means far from their centre, beside the spread of a class: the expanded square would lose digits nearly everywhere.
        self._separated = float(self._means.square().sum(dim=1).mean()) > SEPARATED * whitening.rank
        self._matrix, self._ms = whitening.matrix.to(self.dtype), self._means.to(self.dtype)
        self._offset = (self._centre @ whitening.matrix if self._late else self._centre).to(self.dtype)
        self._cross, self._squares = -2 * self._ms, self._means.square().sum(dim=1).to(self.dtype)[:, None]

    def _checked(self, features: Tensor) -> Tensor:
        if features.ndim != 2 or features.shape[1] != len(self._centre):
            raise DataError(
                f"features have shape {tuple(features.shape)}, but the fit was on (n, {len(self._centre)}): the model or its "
                f"input size is another"
            )
        return features

    def all(self, features: Tensor) -> Tensor:
        """d_c to every class, (n, C), float64, >= 0."""
        white = (self._checked(features).double() - self._centre) @ self.whitening.matrix
        squares = white.square().sum(dim=1)[:, None] + self._means.square().sum(dim=1)[None]
        distances: Tensor = squares - 2 * white @ self._means.T
        return distances.clamp_min(0.0)

    def _white(self, features: Tensor, out: Tensor | None = None) -> Tensor:
        """Whitened differences from the centre; into `out` where it is given (then without gradient)."""
        features = features.to(self.dtype)
        if self._late or self._origin:
            white = torch.mm(features, self._matrix, out=out)
            return white if self._origin else white.sub_(self._offset)
        return torch.mm(features - self._offset, self._matrix, out=out)

    def nearest(self, features: Tensor) -> Tensor:
        """min_c d_c (n,) in the precision of this fit; differentiable."""
        if self._checked(features).requires_grad or self._separated:
            return self._directly(features)
        n, rows = len(features), batch_rows(features.shape[1])
        low, own = self._matrix.new_empty(n), self._matrix.new_empty(n)
        buffer = self._matrix.new_empty(min(n, rows), self._matrix.shape[1])
        for i in range(0, n, rows):
            white = self._white(features[i : i + rows], buffer[: n - i])
            # |z - m|^2 = |z|^2 + (|m|^2 - 2 z m): one minimum over classes, one norm, nothing of size (n, C, d).
            torch.amin(self._excess(white), dim=0, out=low[i : i + rows])
            torch.linalg.vector_norm(white, dim=1, out=own[i : i + rows])
        distances = own.square_().add(low)
        # Where the result is small beside its terms, digits were lost: there the difference itself is taken.
        if n and float(torch.add(distances, own, alpha=-CANCELLED).min()) < 0:
            lost = distances < CANCELLED * own
            distances[lost] = self._directly(features[lost])
        return distances

    def _excess(self, white: Tensor) -> Tensor:
        """|m|^2 - 2 z m, (C, n): what tells the classes' distances apart."""
        return (self._cross @ white.T).add_(self._squares)

    def _directly(self, features: Tensor) -> Tensor:
        """The same from the difference to the nearest mean, which costs a few passes over the features more."""
        rows = batch_rows(features.shape[1])
        parts = []
        for i in range(0, len(features), rows):
            white = self._white(features[i : i + rows])
            index = self._excess(white.detach()).min(dim=0).indices  # argmin is several times slower
            apart = white - self._ms.index_select(0, index)
            parts.append(apart.square().sum(dim=1) if apart.requires_grad else _squared_norm(apart))
        return torch.cat(parts) if parts else self._matrix.new_zeros(0)


def batch_rows(d: int) -> int:
    """Rows of d features that are scored at a time, 1,024 to 4,096."""
    return min(4096, max(1024, BATCH // d))


def _squared_norm(x: Tensor) -> Tensor:
    """|x|^2 of rows in one pass (whose gradient at 0 is not defined)."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=1)
    return norm.square_()
