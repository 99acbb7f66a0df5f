"""Mixing a noisy and a biased estimator with the least mean squared error (BVPO: Zhu et al. 2025, arXiv 2510.05095).

Two estimators of one target mu: t (noisy, say) and e (biased, say), biases b_t and b_e, covariances S_t, S_e and S_te. The
mix g = alpha t + (1 - alpha) e has

    MSE(alpha) = |alpha b_t + (1 - alpha) b_e|^2 + alpha^2 tr S_t + (1 - alpha)^2 tr S_e + 2 alpha (1 - alpha) tr S_te,

a parabola with its minimum at

    alpha* = E<e - mu, e - t> / E|t - e|^2
           = (|b_e|^2 - <b_t, b_e> + tr S_e - tr S_te) / (|b_t - b_e|^2 + tr S_t + tr S_e - 2 tr S_te).

Neither estimator tells its own bias, so alpha* can be estimated in three cases only: t is unbiased (`Replicates`), an
independent unbiased estimate of mu is at hand, or mu itself is (`against`). MSE(alpha*) <= min(MSE(0), MSE(1)) is a statement
about a fixed alpha: one that was estimated from the numbers it then mixes may be worse than either. `james_stein` is the one
estimated weight here with a guarantee.

Numerators and denominators are sums over coordinates. They are kept apart in a `Ratio` until the end, so that they can be
pooled over groups of coordinates, inputs or steps: the mean of ratios is not the ratio of means, and is far noisier. Sums are
taken in float64: in a gradient of a million coordinates |t - e|^2 and its noise cancel nearly.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from robustbench_ext.errors import ConfigError, DataError

EITHER = 0.5  # where t and e do not differ every weight is as good


def mix(t: Tensor, e: Tensor, alpha: float | Tensor) -> Tensor:
    """alpha t + (1 - alpha) e; where alpha is 1 or 0, the bits of t or of e."""
    weight = torch.as_tensor(alpha, dtype=t.dtype, device=t.device)
    return torch.where(weight == 1, t, torch.where(weight == 0, e, weight * t + (1 - weight) * e))


@dataclass(frozen=True)
class Ratio:
    """A weight before its division: numerator and denominator, float64 of one shape, one entry a coordinate or a group."""

    numerator: Tensor
    denominator: Tensor

    def __add__(self, other: Ratio) -> Ratio:
        return Ratio(self.numerator + other.numerator, self.denominator + other.denominator)

    def pooled(self, groups: Tensor | None = None) -> Ratio:
        """Sums over everything, or over groups.

        Args:
            groups: int64 of the ratio's shape, 0..G-1, the group of each entry; the result has shape (G,).
        """
        return Ratio(pooled(self.numerator, groups), pooled(self.denominator, groups))

    def towards(self, new: Ratio, rate: float) -> Ratio:
        """A step of an exponential moving average, of numerator and denominator each."""
        return Ratio(
            torch.lerp(self.numerator, new.numerator, rate), torch.lerp(self.denominator, new.denominator, rate)
        )

    def weight(self, prior: float = EITHER, mass: float | Tensor = 0.0, clamp: bool = True) -> Tensor:
        """alpha, (numerator + mass prior) / (denominator + mass), clamped to [0, 1] at the very end.

        An alpha outside [0, 1] is the optimum where t and e are strongly correlated; it extrapolates, and is fragile.

        Args:
            prior: the weight that little evidence is shrunk to, and the answer where there is none (denominator 0).
            mass: how much of the denominator the prior is worth.
        """
        top, bottom = self.numerator + mass * prior, self.denominator + mass
        there = bottom > torch.finfo(bottom.dtype).tiny
        alpha = torch.where(there, top / torch.where(there, bottom, 1.0), prior)
        return alpha.clamp(0.0, 1.0) if clamp else alpha


def pooled(values: Tensor, groups: Tensor | None = None) -> Tensor:
    """The sum of all values, shape (); or of each group, (G,)."""
    if groups is None:
        return values.sum()
    if groups.shape != values.shape or groups.dtype != torch.int64:
        raise DataError(
            f"groups: {groups.dtype} of shape {tuple(groups.shape)}, expected int64 {tuple(values.shape)}: a group for "
            f"each entry"
        )
    count = int(groups.max()) + 1 if groups.numel() else 0
    return values.new_zeros(count).index_add(0, groups.flatten(), values.flatten())


# What is known -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Moments:
    """The six numbers that decide: float64 tensors of one shape, () or one entry a coordinate or group.

    Attributes:
        bias_t, bias_e, bias_te: |b_t|^2, |b_e|^2, <b_t, b_e>.
        var_t, var_e, cov: tr S_t, tr S_e, tr S_te.
    """

    bias_t: Tensor
    bias_e: Tensor
    bias_te: Tensor
    var_t: Tensor
    var_e: Tensor
    cov: Tensor

    @classmethod
    def of(cls, b_t: Tensor, b_e: Tensor, s_t: Tensor, s_e: Tensor, s_te: Tensor | None = None) -> Moments:
        """From biases (d,) and covariances (d, d); without `s_te` the two are uncorrelated."""
        b_t, b_e = b_t.double(), b_e.double()
        traces = [torch.zeros(()).double() if s is None else s.double().diagonal().sum() for s in (s_t, s_e, s_te)]
        return cls(b_t @ b_t, b_e @ b_e, b_t @ b_e, *traces)

    def mse(self, alpha: float | Tensor) -> Tensor:
        """E|alpha t + (1 - alpha) e - mu|^2."""
        a = torch.as_tensor(alpha, dtype=torch.float64)
        rest = 1 - a
        squares = a**2 * (self.bias_t + self.var_t) + rest**2 * (self.bias_e + self.var_e)
        return squares + 2 * a * rest * (self.bias_te + self.cov)

    def ratio(self, step: float = 1.0) -> Ratio:
        """alpha* as a ratio.

        Args:
            step: eta L, step size times smoothness of a descent, in (0, 1]. One step's error is bounded by
                |bias|^2 + eta L variance, so smaller steps weigh bias more; 1 minimises the mean squared error.
        """
        if not 0 < step <= 1:
            raise ConfigError(f"step = {step}, expected eta L in (0, 1]")
        return Ratio(
            self.bias_e - self.bias_te + step * (self.var_e - self.cov),
            self.bias_t + self.bias_e - 2 * self.bias_te + step * (self.var_t + self.var_e - 2 * self.cov),
        )


# What replicates tell ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Replicates:
    """What K independent draws of t and e tell, per coordinate; float64 of one shape. All of it may be pooled.

    Attributes:
        squared: (mean t - mean e)^2.
        var_t, var_e, cov: sample variances and covariance of one draw (divisor K - 1).
        k_t, k_e: how many draws.
    """

    squared: Tensor
    var_t: Tensor
    var_e: Tensor
    cov: Tensor
    k_t: int
    k_e: int

    @classmethod
    def of(cls, t: Tensor, e: Tensor, paired: bool = False) -> Replicates:
        """From draws t (K_t, ...) and e (K_e, ...).

        Args:
            e: a single draw (K_e = 1) is taken for a constant.
            paired: draws of the same index share their randomness (K_t = K_e); otherwise t and e are independent.

        Raises:
            DataError: the shapes do not fit, or one draw of t, which shows no variance.
        """
        if len(t) < 2 or len(e) < 1 or t.shape[1:] != e.shape[1:] or (paired and len(t) != len(e)):
            raise DataError(
                f"replicates of shape {tuple(t.shape)} and {tuple(e.shape)}{' in pairs' if paired else ''}: expected "
                f"(K, ...) with the same coordinates, K >= 2 for t (1 shows no variance), equal K for pairs"
            )
        t, e = t.double(), e.double()
        mean_t, mean_e = t.mean(dim=0), e.mean(dim=0)
        zero = torch.zeros_like(mean_t)
        var_e = e.var(dim=0, correction=1) if len(e) > 1 else zero
        cov = ((t - mean_t) * (e - mean_e)).sum(dim=0) / (len(t) - 1) if paired else zero
        return cls((mean_t - mean_e).square(), t.var(dim=0, correction=1), var_e, cov, len(t), len(e))

    def pooled(self, groups: Tensor | None = None) -> Replicates:
        """Sums over everything, or over groups (see `Ratio.pooled`)."""
        squared, var_t, var_e, cov = (pooled(v, groups) for v in (self.squared, self.var_t, self.var_e, self.cov))
        return Replicates(squared, var_t, var_e, cov, self.k_t, self.k_e)

    def bias_distance(self) -> Tensor:
        """The unbiased estimate of |b_t - b_e|^2: |mean t - mean e|^2 less its noise. May be negative."""
        return self.squared - self._noise(self.k_t, self.k_e)

    def ratio(self, draws: int | None = None) -> Ratio:
        """alpha* where t is unbiased; pool first, since the positive part of the bias distance is taken here.

        Args:
            draws: of how many draws the mixed means consist; None: of those that were seen. Then, with a constant e, alpha is
                the plug-in form of James and Stein, (1 - tr S_t / (K |mean t - e|^2))_+.
        """
        k_t, k_e = (self.k_t, self.k_e) if draws is None else (draws, draws)
        bias = self.bias_distance().clamp_min(0.0)
        return Ratio(bias + (self.var_e - self.cov) / k_e, bias + self._noise(k_t, k_e))

    def _noise(self, k_t: int, k_e: int) -> Tensor:
        """tr Var(mean t - mean e)."""
        return self.var_t / k_t + self.var_e / k_e - 2 * self.cov / k_t


def against(target: Tensor, t: Tensor, e: Tensor) -> Ratio:
    """alpha* per coordinate from the target, or from an unbiased estimate of it that is independent of both t and e.

    Pooled over the coordinates of labelled samples, with one-hot labels for the target and probabilities for t and e, this is
    least squares: the mix that minimises the Brier score of these samples.
    """
    m, t, e = target.double(), t.double(), e.double()
    return Ratio((e - m) * (e - t), (t - e).square())


def james_stein(squared: float, variance: float, d: int, draws: int, freedom: float) -> float:
    """The weight of the mean of t against a constant e that is guaranteed to help: James and Stein's positive part.

        alpha = (1 - (d - 2) s^2 v / (v + 2) / (K |mean t - e|^2))_+

    For d >= 3 independent normal coordinates of equal variance, s^2 estimated on v degrees of freedom, the mix has a smaller
    mean squared error than the mean of t, wherever e lies. (The plug-in form, with d for d - 2, is worse than the mean of t
    where d is small and e far.)

    Args:
        squared: |mean t - e|^2.
        variance: s^2, of one draw of one coordinate.
        d, draws, freedom: coordinates, K, v; from K draws of all coordinates v = d (K - 1); infinite where s^2 is known.

    Raises:
        ConfigError: d < 3, where nothing dominates the mean of t. Pool over inputs first.
    """
    if d < 3:
        raise ConfigError(
            f"james_stein: d = {d}, expected at least 3 coordinates; pool over inputs, or take Replicates.ratio"
        )
    if draws < 1 or not freedom > 0 or variance < 0:
        raise ConfigError(
            f"james_stein: draws = {draws}, freedom = {freedom}, variance = {variance}; expected >= 1, > 0, >= 0"
        )
    shrinkage = (d - 2) * variance / (1 + 2 / freedom) / draws
    return 0.0 if squared <= shrinkage else 1.0 - shrinkage / squared


# More than two -------------------------------------------------------------------------------------------------------


def second_moments(estimates: Tensor, target: Tensor) -> Tensor:
    """A_ij = mean over samples of <g_i - mu, g_j - mu>, (m, m), for estimates (m, N, d) of a target (N, d).

    With a target that is itself an estimate, its noise adds a constant to all entries, which changes no weight.
    """
    errors = (estimates.double() - target.double()).flatten(2)
    return torch.einsum("ind,jnd->ij", errors, errors) / errors.shape[1]


def simplex_weights(moments: Tensor) -> Tensor:
    """The w (m,) >= 0 with sum 1 that minimises w' A w, for A (m, m) from `second_moments`.

    A quadratic programme, solved exactly as non-negative least squares: with A = L' L, the minimiser u >= 0 of
    |L u|^2 + (1'u - 1)^2 is a multiple of w. Clipping the negative entries of A^-1 1 would not be optimal.

    Raises:
        DataError: A is not symmetric and positive semi-definite.
    """
    from scipy.optimize import nnls

    a = moments.double().cpu().numpy()
    if a.ndim != 2 or a.shape[0] != a.shape[1] or not np.isfinite(a).all() or not np.allclose(a, a.T):
        raise DataError(f"second moments of shape {a.shape}: expected a finite symmetric (m, m) matrix")
    values, vectors = np.linalg.eigh((a + a.T) / 2)
    top = float(values[-1])
    if values[0] < -1e-10 * max(top, 0.0) or top < 0:
        raise DataError(
            f"second moments with the eigenvalue {values[0]:.3g}: expected none below 0. Estimates with their noise taken off "
            f"are not positive semi-definite: give second_moments(...) as they are."
        )
    m = len(a)
    if top == 0:  # all estimates are perfect
        return torch.full((m,), 1 / m, dtype=torch.float64)
    root = np.sqrt(np.clip(values, 0.0, None) / top)[:, None] * vectors.T
    u, _ = nnls(np.vstack([root, np.ones((1, m))]), np.append(np.zeros(m), 1.0))
    return torch.from_numpy(u / u.sum())


# Any number, in closed form ------------------------------------------------------------------------------------------


def inverse_variance_weights(variances: Tensor) -> Tensor:
    """w_i = (1/v_i) / sum_j 1/v_j (m,), float64: the mix of least variance, 1 / sum_j 1/v_j, of unbiased independent estimates.

    A variance is what an estimate would do if it were made again: over passes, resamples or held-out samples. The entropy of
    a single prediction, which some methods put in its place, is none: a network can be sure and wrong, or unsure and right.

    Args:
        variances: v_i >= 0 (m,), in any unit; estimates with v_i = 0 share all the weight.

    Raises:
        DataError: no variances, or some that are negative or not finite.
    """
    v = variances.double()
    if v.ndim != 1 or not len(v) or not bool(torch.isfinite(v).all()) or float(v.min()) < 0:
        raise DataError(f"variances {v.tolist()}: expected finite numbers >= 0, (m,), m >= 1")
    exact = v == 0
    weights = exact.double() if bool(exact.any()) else float(v.min()) / v  # in units of the least: nothing overflows
    return weights / weights.sum()


def error_moments(biases: Tensor, covariance: Tensor) -> Tensor:
    """A = V + b b' (m, m): what `affine_weights` and `simplex_weights` take, from what is known instead of from samples.

    Args:
        biases: b (m,), or of estimates of d coordinates (m, d), whose inner products are taken.
        covariance: V (m, m); of d coordinates, its traces.
    """
    b, v = biases.double(), covariance.double()
    b = b[:, None] if b.ndim == 1 else b
    if b.ndim != 2 or v.shape != (len(b), len(b)):
        raise DataError(
            f"biases {tuple(biases.shape)} and covariance {tuple(v.shape)}; expected (m,) or (m, d), and (m, m)"
        )
    return v + b @ b.T


def affine_weights(moments: Tensor) -> Tensor:
    """A^-1 1, scaled to the sum 1 (m,): the mix of least mean squared error w' A w whose weights may be negative.

    A negative weight extrapolates away from a bad estimate towards what it and a good one have in common; estimated from few
    samples it is fragile, where `simplex_weights` are not. Of two independent estimates a and b this is
    w_a = (v_b + b_b (b_b - b_a)) / (v_a + v_b + (b_a - b_b)^2), the alpha of `Moments`.

    Args:
        moments: A (m, m), symmetric and positive semi-definite: `second_moments`, or `error_moments`. Where it is singular, a
            mix without error among the estimates is taken, or the shortest weights of those that are equally good.

    Raises:
        DataError: A is no such matrix.
    """
    a = moments.double().cpu().numpy()
    if a.ndim != 2 or a.shape[0] != a.shape[1] or not a.size or not np.isfinite(a).all() or not np.allclose(a, a.T):
        raise DataError(f"second moments of shape {a.shape}: expected a finite symmetric (m, m) matrix")
    m, top = len(a), float(np.abs(a).max())
    if top == 0:  # all estimates are perfect
        return torch.full((m,), 1 / m, dtype=torch.float64)
    values = np.linalg.eigvalsh(a / top)
    if values[0] < -1e-10 * m:
        raise DataError(f"second moments with the eigenvalue {top * values[0]:.3g}: expected none below 0")
    # The minimum of w' A w on 1'w = 1: A w = lambda 1. Least squares does for a singular A too.
    system = np.zeros((m + 1, m + 1))
    system[:m, :m], system[:m, m], system[m, :m] = a / top, 1.0, 1.0
    w = np.linalg.lstsq(system, np.append(np.zeros(m), 1.0), rcond=None)[0][:m]
    return torch.from_numpy(w / w.sum())
