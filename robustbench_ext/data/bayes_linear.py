"""Linear regression whose exact answer is known: the posterior predictive given the train split (arXiv 2405.15115, section 3).

With inputs X (n, d), targets y, prior w ~ N(0, tau^2 I):

    known noise s                    S = (I / tau^2 + X'X / s^2)^-1,   m = S X'y / s^2
                                     Y | x ~ N(x'm, x'S x + s^2)
    s^2 ~ IG(a0, b0),                L = I / tau^2 + X'X,   m = L^-1 X'y,   a = a0 + n/2,
    w | s^2 ~ N(0, s^2 tau^2 I)      b = b0 + (|y - X m|^2 + |m|^2 / tau^2) / 2     (= b0 + (y'y - m'L m) / 2)
                                     Y | x ~ x'm + sqrt(b/a (1 + x'L^-1 x)) t(2a),   variance b/(a-1) (1 + x'L^-1 x)

The variance has two parts, which estimators often report one of: the noise's s^2 (or its posterior mean b/(a-1)) and the
parameters' x'S x (or b/(a-1) x'L^-1 x). With n = 0 the posterior is the prior. The variance of the second law needs a > 1.

This is what can be known from the train split, if the prior is right; not the law that the targets were drawn from, which
knows w. Whoever learns from the calibration split too may know a little more.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
from scipy.linalg import cho_factor, cho_solve, solve_triangular
from scipy.special import gammaincinv, ndtr, ndtri, stdtr, stdtrit

from robustbench_ext.data.base import Dataset, Feature, Split, Truth
from robustbench_ext.data.dials import Dial, read_dials
from robustbench_ext.data.tabular import _regression, _unit, ordered_table
from robustbench_ext.errors import ConfigError, DataError, unknown_name

KNOWN, GAMMA = "known-noise", "normal-inverse-gamma"
_DIALS: dict[str, Dial] = {
    "d": 8,
    "n": 100,  # training samples
    "calibration": 500,
    "test": 2000,
    "noise": 1.0,  # s, of known-noise
    "a0": 3.0,  # of normal-inverse-gamma
    "b0": 2.0,
    "prior": 1.0,  # tau
    "scale": 1.0,  # standard deviation of the test inputs, in those of the training inputs
    "seed": 0,  # another task: other weights, noise and samples
}


@dataclass(frozen=True)
class Posterior(Truth):
    """What n samples say of a linear law. Order of the samples is irrelevant, and so is a rotation of X and x together.

    Args:
        x: (n, d), n >= 0; y: (n,).
        prior: tau.
    """

    x: np.ndarray
    y: np.ndarray
    prior: float = 1.0

    def __post_init__(self) -> None:
        if self.x.ndim != 2 or self.y.shape != (len(self.x),):
            raise DataError(f"linear posterior: x {self.x.shape} and y {self.y.shape}, expected (n, d) and (n,)")
        if not self.prior > 0:
            raise DataError(f"linear posterior: prior = {self.prior}, expected a standard deviation > 0")

    @property
    @abstractmethod
    def _unit_noise(self) -> float:
        """The s^2 that X'X is divided by."""

    @cached_property
    def _factor(self) -> tuple[np.ndarray, bool]:
        precision = np.eye(self.x.shape[1]) / self.prior**2 + self.x.T @ self.x / self._unit_noise
        factor: tuple[np.ndarray, bool] = cho_factor(precision, lower=True)
        return factor

    @cached_property
    def weights(self) -> np.ndarray:
        """m, (d,)."""
        return np.asarray(cho_solve(self._factor, self.x.T @ self.y / self._unit_noise))

    @cached_property
    def _farthest(self) -> float:
        return float((self.x**2).sum(axis=1).max(initial=0.0))

    def leverage(self, x: np.ndarray) -> np.ndarray:
        """x'S x (known noise) or x'L^-1 x, (N,)."""
        half = solve_triangular(self._factor[0], _table(x, self.x.shape[1]).T, lower=True)
        return np.asarray((half**2).sum(axis=0))

    def mean(self, x: np.ndarray) -> np.ndarray:
        return np.asarray(_table(x, len(self.weights)) @ self.weights)

    def std(self, x: np.ndarray) -> np.ndarray:
        """Of the whole predictive law: both parts."""
        return np.asarray(np.hypot(self.aleatoric(x), self.epistemic(x)))

    @abstractmethod
    def epistemic(self, x: np.ndarray) -> np.ndarray:
        """Standard deviation of x'w."""

    @abstractmethod
    def _law(self, x: np.ndarray) -> tuple[np.ndarray, float]:
        """The scale (N,) of the standardised law, and its degrees of freedom."""

    def quantile(self, x: np.ndarray, level: float) -> np.ndarray:
        if not 0 < level < 1:
            raise DataError(f"quantile level = {level}, expected a number between 0 and 1")
        scale, df = self._law(x)
        return np.asarray(self.mean(x) + scale * (ndtri(level) if math.isinf(df) else stdtrit(df, level)))

    def cdf(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        scale, df = self._law(x)
        z = (np.asarray(y, dtype=np.float64) - self.mean(x)) / scale
        if math.isinf(df):
            return np.asarray(ndtr(z))
        return np.asarray(np.where(np.isinf(z), z > 0, stdtr(df, np.where(np.isinf(z), 0.0, z))))

    def inside(self, x: np.ndarray) -> np.ndarray:
        """Whether x is no longer than the longest training input: inputs are normal, so that nothing is impossible."""
        return np.asarray((np.asarray(x, dtype=np.float64) ** 2).sum(axis=1) <= self._farthest)


@dataclass(frozen=True)
class KnownNoise(Posterior):
    """Noise of a known standard deviation s: adding a sample never raises the variance, which never falls below s^2."""

    noise: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.noise > 0:
            raise DataError(f"linear posterior: noise = {self.noise}, expected a standard deviation > 0")

    @property
    def _unit_noise(self) -> float:
        return self.noise**2

    def aleatoric(self, x: np.ndarray) -> np.ndarray:
        return np.full(len(x), self.noise)

    def epistemic(self, x: np.ndarray) -> np.ndarray:
        return np.asarray(np.sqrt(self.leverage(x)))

    def _law(self, x: np.ndarray) -> tuple[np.ndarray, float]:
        return self.std(x), math.inf


@dataclass(frozen=True)
class NormalInverseGamma(Posterior):
    """Noise of unknown size, s^2 ~ IG(a0, b0): Student's law with 2a degrees of freedom."""

    a0: float = 3.0
    b0: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.b0 > 0 or not self.a0 > 0 or not self.a > 1:
            raise DataError(
                f"linear posterior: a0 = {self.a0}, b0 = {self.b0}, n = {len(self.x)}; expected both > 0, and a0 + n/2 > 1, "
                f"without which there is no variance"
            )

    @property
    def _unit_noise(self) -> float:
        return 1.0

    @property
    def a(self) -> float:
        """a0 + n/2."""
        return self.a0 + len(self.x) / 2

    @cached_property
    def b(self) -> float:
        """The sum of squares, in the form that cancels nothing."""
        residuals = self.y - self.x @ self.weights
        return self.b0 + float(residuals @ residuals + self.weights @ self.weights / self.prior**2) / 2

    def aleatoric(self, x: np.ndarray) -> np.ndarray:
        return np.full(len(x), math.sqrt(self.b / (self.a - 1)))

    def epistemic(self, x: np.ndarray) -> np.ndarray:
        return np.asarray(self.aleatoric(x) * np.sqrt(self.leverage(x)))

    def _law(self, x: np.ndarray) -> tuple[np.ndarray, float]:
        return math.sqrt(self.b / self.a) * np.sqrt(1 + self.leverage(x)), 2 * self.a


def _table(x: np.ndarray, d: int) -> np.ndarray:
    x = np.asarray(x, dtype=np.float64)
    if x.ndim != 2 or x.shape[1] != d:
        raise DataError(f"linear posterior: inputs {x.shape}, expected (N, {d})")
    return x


@dataclass(frozen=True)
class _Task:
    """The weights (d,) and the noise's size that a dataset is drawn with."""

    weights: np.ndarray
    noise: float
    names: ClassVar[tuple[str, ...]] = (KNOWN, GAMMA)


def _task(kind: str, dials: dict[str, Dial], seed: int, d: int) -> _Task:
    draws = _unit([f"bayes-linear:{seed}:task"], d + 1, kind)[0]
    noise, prior = float(dials["noise"]), float(dials["prior"])
    if kind == GAMMA:
        # 1 / s^2 is Gamma(a0) / b0.
        noise = math.sqrt(float(dials["b0"]) / float(gammaincinv(float(dials["a0"]), draws[d])))
    return _Task(ndtri(draws[:d]) * prior * (noise if kind == GAMMA else 1.0), noise)


def bayes_linear(argument: str = KNOWN) -> Dataset:
    """`bayes-linear:known-noise#d=8,n=100` or `bayes-linear:normal-inverse-gamma#...`; `truth` is the posterior given train.

    y = x'w + s E with x ~ N(0, I), E ~ N(0, 1); w, and s of the second kind, are drawn once from the prior.

    Options: d (columns, 8), n (training samples, 100), calibration (500), test (2000), noise (s of known-noise, 1), a0 and b0
    (of normal-inverse-gamma, 3 and 2), prior (tau, 1), scale (of the test inputs, 1: more is a shift of the inputs to where
    less is known), seed (0: another one is another task).

    Raises:
        ConfigError: an unknown kind or option, or a value out of range.
    """
    kind, dials = read_dials("bayes-linear", argument, _DIALS)
    what = f"data 'bayes-linear:{argument}'"
    if kind not in _Task.names:
        raise ConfigError(f"{what}: {unknown_name('kind', kind, _Task.names)}")
    of_other = {KNOWN: ("a0", "b0"), GAMMA: ("noise",)}[kind]
    if named := [key for key in of_other if dials[key] != _DIALS[key]]:
        raise ConfigError(f"{what}: {named[0]} is no option of {kind}")
    d, seed, sizes = int(dials["d"]), int(dials["seed"]), {s: int(dials[s]) for s in ("calibration", "test")}
    sizes = {"train": int(dials["n"]), **sizes}
    positive = ("noise", "a0", "b0", "prior", "scale")
    if d < 1 or min(sizes.values()) < 5 or min(float(dials[key]) for key in positive) <= 0:
        raise ConfigError(f"{what}: expected d >= 1, 5 samples or more in each split, {', '.join(positive)} above 0")
    task = _task(kind, dials, seed, d)
    splits: dict[str, Split] = {}
    for split, size in sizes.items():
        ids = [f"bayes-linear:{seed}:{split}:{i:05d}" for i in range(size)]
        x = ndtri(_unit(ids, d, "inputs")) * (float(dials["scale"]) if split == "test" else 1.0)
        x = x.astype(np.float32)  # as models see it
        y = x.astype(np.float64) @ task.weights + task.noise * ndtri(_unit(ids, 1, "noise")[:, 0])
        splits[split] = ordered_table(x, np.round(y, 9), ids)
    given = splits["train"].inputs(slice(None)).numpy().astype(np.float64), splits["train"].labels
    prior = float(dials["prior"])
    truth: Posterior = KnownNoise(*given, prior, float(dials["noise"]))
    if kind == GAMMA:
        truth = NormalInverseGamma(*given, prior, float(dials["a0"]), float(dials["b0"]))
    features = [Feature(f"x{j + 1}") for j in range(d)]
    source = f"synthetic: a linear law with a normal prior ({kind}), whose posterior predictive is known"
    return _regression(f"bayes-linear:{argument}", splits, features, "y", source, truth)
