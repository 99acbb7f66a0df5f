"""Class-conditional Gaussians with one tied covariance, whole or diagonal, fitted in one pass, and their whitening.

    mu_c = mean of f_i over class c,   Sigma = 1/N sum_i (f_i - mu_{y_i})(f_i - mu_{y_i})^T,   W W^T = Sigma^{-1}.

Distances to the classes are in `detectors.distances`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robustbench_ext.errors import DataError

INVERSES = ("pseudo", "shrinkage", "cholesky")
ROWS = 512  # rows whose outer products are added at a time
BLOCK = 8192  # rows whose variances are taken at a time


@dataclass(frozen=True)
class Moments:
    """Counts (K,), means (K, d; zero rows where a class is empty), tied covariance (d, d) with divisor N; all float64.

    Attributes:
        noise: what float64 loses of a variance to rounding; a covariance below it is none.
    """

    counts: Tensor
    means: Tensor
    covariance: Tensor
    noise: float

    def background(self) -> tuple[Tensor, Tensor]:
        """Mean (d,) and covariance (d, d) of all features whatever their label: Sigma + sum_c N_c/N (mu_c - mu_0)(...)^T."""
        shares = self.counts / self.counts.sum()
        mean = shares @ self.means
        spread = (self.means - mean) * shares.sqrt()[:, None]
        return mean, self.covariance + spread.T @ spread

    def present(self) -> Tensor:
        """Means of the classes that have samples, (K', d)."""
        return self.means[self.counts > 0]


@dataclass(frozen=True)
class DiagonalMoments:
    """Counts (K,), means and variances (K, d; zero rows where a class is empty; divisor N_c); all float64.

    What a Gaussian whose features are independent within a class needs: n d operations instead of n d^2. Moments of parts
    of the data are merged into those of the whole, in any order:

        m = (c m + c' m') / (c + c'),   v = (c v + c' v' + c c' / (c + c') (m - m')^2) / (c + c').
    """

    counts: Tensor
    means: Tensor
    variances: Tensor

    @classmethod
    def of(cls, features: Tensor, labels: Tensor, num_classes: int) -> DiagonalMoments:
        """Of features (n, d), n >= 1, with labels (n,) in 0..K-1; block by block, so that float64 copies stay small."""
        _check_labelled(features, labels, num_classes)
        if not len(labels):
            raise DataError("there are no features to fit to")
        found = cls._of_block(features[:BLOCK], labels[:BLOCK], num_classes)
        for i in range(BLOCK, len(labels), BLOCK):
            found = found.merged(cls._of_block(features[i : i + BLOCK], labels[i : i + BLOCK], num_classes))
        return found

    @classmethod
    def _of_block(cls, features: Tensor, labels: Tensor, num_classes: int) -> DiagonalMoments:
        x = features.double()
        counts = torch.bincount(labels, minlength=num_classes).double()
        sums = x.new_zeros(num_classes, x.shape[1])
        each = counts.clamp_min(1)[:, None]
        means = sums.index_add(0, labels, x) / each
        # About the class's own mean: nothing cancels, however far from 0 the features lie.
        return cls(counts, means, sums.index_add(0, labels, (x - means[labels]).square()) / each)

    def merged(self, other: DiagonalMoments) -> DiagonalMoments:
        """The moments of both parts together.

        Raises:
            DataError: they are of other classes or features.
        """
        if self.means.shape != other.means.shape:
            raise DataError(
                f"moments of {tuple(self.means.shape)} and {tuple(other.means.shape)} (classes, features) cannot be merged"
            )
        total = (self.counts + other.counts).clamp_min(1)[:, None]
        mine, theirs = self.counts[:, None], other.counts[:, None]
        gap = other.means - self.means
        means = self.means + theirs / total * gap
        variances = (mine * self.variances + theirs * other.variances + mine * theirs / total * gap.square()) / total
        return DiagonalMoments(self.counts + other.counts, means, variances)

    @property
    def priors(self) -> Tensor:
        """Shares of the classes (K,)."""
        return self.counts / self.counts.sum()

    @property
    def noise(self) -> float:
        """What float64 loses of a variance to rounding; a variance below it is none."""
        return 1e-28 * float(self.means.square().max())

    def pooled(self) -> Tensor:
        """sum_k pi_k v_k (d,): the diagonal of the tied covariance."""
        return self.priors @ self.variances

    def present(self) -> Tensor:
        """Means of the classes that have samples, (K', d)."""
        return self.means[self.counts > 0]


def _check_labelled(features: Tensor, labels: Tensor, num_classes: int) -> None:
    """Raise DataError unless features are (n, d) and labels (n,) in 0..K-1."""
    if features.ndim != 2 or len(features) != len(labels):
        raise DataError(f"features {tuple(features.shape)} and labels {tuple(labels.shape)} do not match (n, d), (n,)")
    if len(labels) and (int(labels.min()) < 0 or int(labels.max()) >= num_classes):
        raise DataError(
            f"labels span {int(labels.min())}..{int(labels.max())}, expected 0..{num_classes - 1}: inputs of no class cannot "
            f"be fitted to"
        )


class TiedGaussian:
    """The moments, from one pass over features in any number of batches.

    Sums are kept in float64 about the first batch's mean, which takes the cancellation out of sum ff^T - N mu mu^T. Of the
    symmetric sum of outer products only blocks on and above the diagonal are computed.
    """

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self._shift: Tensor | None = None

    def update(self, features: Tensor, labels: Tensor) -> None:
        """Add features (n, d) with labels (n,) in 0..K-1."""
        _check_labelled(features, labels, self.num_classes)
        if not len(labels):
            return
        if self._shift is None:
            d = features.shape[1]
            self._shift = features.double().mean(dim=0)
            self._counts = features.new_zeros(self.num_classes, dtype=torch.float64)
            self._sums = features.new_zeros(self.num_classes, d, dtype=torch.float64)
            self._outer = features.new_zeros(d, d, dtype=torch.float64)
        if features.shape[1] != len(self._shift):
            raise DataError(f"features have {features.shape[1]} dimensions, those before had {len(self._shift)}")
        self._counts.index_add_(0, labels, torch.ones_like(labels, dtype=torch.float64))
        rows = ROWS if len(labels) > ROWS else len(labels)
        buffer = features.new_empty(rows, len(self._shift), dtype=torch.float64)
        for i in range(0, len(labels), rows):  # small enough to stay in the cache
            part = features[i : i + rows]
            centred = buffer[: len(part)].copy_(part).sub_(self._shift)
            self._sums.index_add_(0, labels[i : i + rows], centred)
            _add_outer(self._outer, centred, 1.0)

    def finish(self) -> Moments:
        """The moments of all that was added."""
        if self._shift is None:
            raise DataError("there are no features to fit to")
        n = float(self._counts.sum())
        offsets = self._sums / self._counts.clamp_min(1)[:, None]
        upper = self._outer.clone()
        _add_outer(upper, offsets * self._counts.sqrt()[:, None], -1.0)
        upper = upper.triu_().div_(n)
        covariance = upper + upper.triu(1).T
        covariance.diagonal().clamp_min_(0.0)
        noise = 1e-13 * float(offsets.square().sum(dim=1).max()) + 1e-28 * float(self._shift.square().sum())
        means = torch.where(self._counts[:, None] > 0, offsets + self._shift, 0.0)
        return Moments(self._counts.clone(), means, covariance, noise)


def _add_outer(total: Tensor, x: Tensor, sign: float) -> None:
    """total += sign x^T x, on and above the diagonal (and in the blocks on it)."""
    d = x.shape[1]
    step = max(32, -(-d // 8))
    for start in range(0, d, step):
        total[start : start + step, start:].addmm_(x[:, start : start + step].T, x[:, start:], alpha=sign)


@dataclass(frozen=True)
class Whitening:
    """W (d, r), float64, with W W^T = Sigma^{-1} or what stands for it.

    Attributes:
        method: "Cholesky" or "pseudo-inverse".
        condition: the largest eigenvalue in use over the smallest, estimated.
        shortest: the smallest standard deviation in use, estimated.
    """

    matrix: Tensor
    method: str
    condition: float
    shortest: float

    @property
    def rank(self) -> int:
        """Directions in use."""
        return self.matrix.shape[1]


def whiten(
    covariance: Tensor, noise: float = 0.0, inverse: str = "pseudo", shrinkage: float = 1e-3, tolerance: float = 1e-10
) -> Whitening:
    """Factor the inverse of a covariance, which is singular more often than not (dead units, few samples).

    Args:
        inverse: "pseudo" ignores directions with eigenvalues below `tolerance` times the largest. "shrinkage" takes
            (1 - s) Sigma + s tr(Sigma)/d I, which punishes movement there heavily. "cholesky" takes the plain inverse.
            Where the plain inverse exists, the first and the last agree, and both come from a Cholesky factor.

    Raises:
        DataError: there is no variance at all, or "cholesky" met a singular covariance.
    """
    d = len(covariance)
    if not d or not bool(torch.isfinite(covariance).all()) or float(covariance.diagonal().max()) <= noise:
        raise DataError(
            "all training features of a class are equal, so there is no covariance to measure with. Check that the model is "
            "trained and that the tap is not a constant layer."
        )
    if inverse == "shrinkage":
        mean = covariance.diagonal().mean()
        covariance = (1 - shrinkage) * covariance
        covariance.diagonal().add_(shrinkage * mean)
    factor, info = torch.linalg.cholesky_ex(covariance)
    if int(info) == 0:
        root = torch.linalg.solve_triangular(
            factor, torch.eye(d, dtype=factor.dtype, device=factor.device), upper=False
        )
        largest, smallest = _largest(covariance), 1.0 / _largest(root.T, root)
        if smallest > (0.0 if inverse == "shrinkage" else tolerance * largest):
            return Whitening(root.T.contiguous(), "Cholesky", largest / smallest, smallest**0.5)
    if inverse == "cholesky":
        raise DataError(
            "the covariance is singular (dead units, copies, or fewer samples than dimensions), so it has no inverse. Take "
            "inverse='pseudo', which ignores such directions, or 'shrinkage', which punishes movement along them."
        )
    values, vectors = torch.linalg.eigh(covariance)
    keep = values > tolerance * values[-1]
    used = values[keep]
    matrix = (vectors[:, keep] / used.sqrt()).contiguous()
    return Whitening(matrix, "pseudo-inverse", float(used[-1] / used[0]), float(used[0]) ** 0.5)


def _largest(a: Tensor, b: Tensor | None = None, steps: int = 6) -> float:
    """The largest eigenvalue of a (or a b), symmetric, by power iteration; a little too small where two are close."""
    v = torch.cos(torch.arange(len(a), dtype=a.dtype, device=a.device) ** 2)
    size = 1.0
    for _ in range(steps):
        v = v / v.norm()
        v = a @ (b @ v) if b is not None else a @ v
        size = float(v.norm())
    return size
