"""Base models that predict quantiles, with one interface: fit(x, y, levels, seed), then quantiles(x).

    linear           linear quantile regression, exact (Koenker and Bassett 1978)
    boosting         histogram gradient boosting, one model per level (scikit-learn)
    forest           quantile random forest (Meinshausen, JMLR 2006); extra-trees: the same on extremely randomised trees
    knn              empirical quantiles of the nearest neighbours' targets
    multi-quantile   one network for all levels, with a penalty on crossing (DQR)
    single-quantile  one network whose input includes the level
    gaussian         a network that gives a mean and a standard deviation
    lightgbm         gradient boosting of the lightgbm package, one model per level; needs that package

x is (n, d), y (n,), levels (m,) increasing in (0, 1); quantiles are (N, m) float64 in units of y and may cross. Inputs are
standardised inside where it matters. Nothing here looks at anything but the arrays and the seed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any, TypeVar

import numpy as np

from robustbench_ext.errors import ConfigError, DataError, MissingExtraError, unknown_name
from uq.fitting import Scaling
from uq.linear_quantiles import linear_quantiles

Self = TypeVar("Self", bound="QuantileModel")
_CELLS = 1 << 24  # numbers per block of predictions


class QuantileModel(ABC):
    """A model with its options; `fit` returns itself."""

    levels: np.ndarray

    def fit(self: Self, x: np.ndarray, y: np.ndarray, levels: Sequence[float] | np.ndarray, seed: int = 0) -> Self:
        """Fit to x (n, d) and y (n,) at increasing levels (m,) in (0, 1)."""
        self.levels = np.asarray(levels, dtype=np.float64)
        if not (self.levels > 0).all() or not (self.levels < 1).all() or not (np.diff(self.levels) > 0).all():
            raise ConfigError(f"levels must increase within (0, 1), got {self.levels.tolist()}")
        if x.ndim != 2 or len(x) != len(y) or len(y) < 2:
            raise DataError(f"x {x.shape} and y {y.shape}: expected (n, d) and (n,) with n >= 2")
        self._fit(x, y, seed)
        return self

    @abstractmethod
    def _fit(self, x: np.ndarray, y: np.ndarray, seed: int) -> None: ...

    @abstractmethod
    def quantiles(self, x: np.ndarray) -> np.ndarray:
        """Quantiles (N, m) at the levels of `fit`."""


class Linear(QuantileModel):
    """Linear quantile regression with an intercept."""

    def _fit(self, x: np.ndarray, y: np.ndarray, seed: int) -> None:
        self._x, self._y = Scaling(x), Scaling(y)
        self._coefficients = linear_quantiles(self._design(x), self._y.to(y), self.levels)

    def _design(self, x: np.ndarray) -> np.ndarray:
        return np.column_stack([np.ones(len(x)), self._x.to(x)])

    def quantiles(self, x: np.ndarray) -> np.ndarray:
        return self._y.back(self._design(x) @ self._coefficients.T)


class Boosting(QuantileModel):
    """Gradient boosting on histograms, one model per level.

    Args:
        rounds, rate, leaves, min_leaf: trees, learning rate, leaves per tree, samples per leaf.
    """

    def __init__(self, rounds: int = 60, rate: float = 0.1, leaves: int = 8, min_leaf: int = 20) -> None:
        self.options = {
            "max_iter": rounds,
            "learning_rate": rate,
            "max_leaf_nodes": leaves,
            "min_samples_leaf": min_leaf,
        }

    def _fit(self, x: np.ndarray, y: np.ndarray, seed: int) -> None:
        from sklearn.ensemble import HistGradientBoostingRegressor

        self._models = [
            HistGradientBoostingRegressor(
                loss="quantile", quantile=float(level), early_stopping=False, random_state=seed, **self.options
            ).fit(x, y)
            for level in self.levels
        ]

    def quantiles(self, x: np.ndarray) -> np.ndarray:
        return np.column_stack([model.predict(x) for model in self._models]).astype(np.float64)


class LightGBM(QuantileModel):
    """The same with the lightgbm package, with Fakoor et al.'s 50 rounds.

    Args:
        rounds, rate, leaves, min_leaf: as of `Boosting`.
    """

    def __init__(self, rounds: int = 50, rate: float = 0.1, leaves: int = 31, min_leaf: int = 20) -> None:
        try:
            self._package = import_module("lightgbm")
        except ImportError:
            raise MissingExtraError("the base model 'lightgbm' needs its package: pip install lightgbm") from None
        self.options = {
            "n_estimators": rounds,
            "learning_rate": rate,
            "num_leaves": leaves,
            "min_child_samples": min_leaf,
        }

    def _fit(self, x: np.ndarray, y: np.ndarray, seed: int) -> None:
        fixed = {"objective": "quantile", "random_state": seed, "n_jobs": 1, "deterministic": True, "verbose": -1}
        self._models = [
            self._package.LGBMRegressor(alpha=float(level), **fixed, **self.options).fit(x, y) for level in self.levels
        ]

    def quantiles(self, x: np.ndarray) -> np.ndarray:
        return np.column_stack([m.booster_.predict(x, num_threads=1) for m in self._models]).astype(np.float64)


class Forest(QuantileModel):
    """A forest whose prediction is the weighted empirical distribution of the training targets.

    Training sample i has for a new x the weight mean over trees of 1[same leaf] / (training samples in that leaf), all
    training samples counting, drawn or not (Meinshausen 2006). The quantile is the smallest target at which the cumulated
    weight reaches the level, so quantiles never cross.

    Args:
        trees, min_leaf: as of scikit-learn's forests. Fakoor et al. take 50 trees and leaves of 8, 16 or 64.
        extra: extremely randomised trees (random cuts, no bootstrap).
    """

    def __init__(self, trees: int = 100, min_leaf: int = 8, extra: bool = False) -> None:
        self.trees, self.min_leaf, self.extra = trees, min_leaf, extra

    def _fit(self, x: np.ndarray, y: np.ndarray, seed: int) -> None:
        from sklearn.ensemble import ExtraTreesRegressor, RandomForestRegressor

        kind = ExtraTreesRegressor if self.extra else RandomForestRegressor
        options = {} if self.extra else {"max_features": 1 / 3}
        order = np.argsort(y, kind="stable")
        self._y = y[order]
        self._forest = kind(self.trees, min_samples_leaf=self.min_leaf, random_state=seed, n_jobs=1, **options).fit(
            x, y
        )
        self._offsets = np.cumsum([0, *(tree.tree_.node_count for tree in self._forest.estimators_)])
        inside = self._leaves(x[order])  # (n, nodes)
        size = np.asarray(inside.sum(axis=0)).ravel()
        self._inside = inside.multiply(1 / np.maximum(size, 1.0)).T.tocsr()  # (nodes, n)

    def _leaves(self, x: np.ndarray) -> Any:
        """Which leaf of every tree each sample falls into: sparse (N, nodes of all trees), a 1 per tree."""
        from scipy.sparse import csr_matrix

        at = self._forest.apply(x) + self._offsets[:-1]
        rows = np.arange(0, at.size + 1, self.trees)
        return csr_matrix((np.ones(at.size), at.ravel(), rows), shape=(len(x), int(self._offsets[-1])))

    def quantiles(self, x: np.ndarray) -> np.ndarray:
        out = np.empty((len(x), len(self.levels)))
        rows = max(1, _CELLS // len(self._y))
        for start in range(0, len(x), rows):
            part = slice(start, start + rows)
            cumulated = np.cumsum((self._leaves(x[part]) @ self._inside).toarray(), axis=1) / self.trees
            for k, level in enumerate(self.levels):  # the tolerance is far below any weight, 1 / (trees n)
                out[part, k] = self._y[np.minimum((cumulated < level - 1e-10).sum(axis=1), len(self._y) - 1)]
        return out


class ExtraTrees(Forest):
    """`Forest(extra=True)`."""

    def __init__(self, trees: int = 100, min_leaf: int = 8) -> None:
        super().__init__(trees, min_leaf, extra=True)


class Neighbours(QuantileModel):
    """Quantiles of the k nearest neighbours' targets (Euclidean, standardised inputs), interpolated linearly.

    Args:
        k: neighbours; levels nearer than about 1 / k to 0 or 1 are hardly told apart.
    """

    def __init__(self, k: int = 50) -> None:
        self.k = k

    def _fit(self, x: np.ndarray, y: np.ndarray, seed: int) -> None:
        from sklearn.neighbors import NearestNeighbors

        self._x, self._y = Scaling(x), y
        self._index = NearestNeighbors(n_neighbors=min(self.k, len(y)), n_jobs=1).fit(self._x.to(x))

    def quantiles(self, x: np.ndarray) -> np.ndarray:
        found = self._y[self._index.kneighbors(self._x.to(x), return_distance=False)]
        return np.asarray(np.quantile(found, self.levels, axis=1).T)


_HERE = "uq.quantile_models"
MODELS = {
    "linear": (_HERE, "Linear"),
    "boosting": (_HERE, "Boosting"),
    "forest": (_HERE, "Forest"),
    "extra-trees": (_HERE, "ExtraTrees"),
    "knn": (_HERE, "Neighbours"),
    "multi-quantile": ("uq.quantile_nets", "MultiQuantileNet"),
    "single-quantile": ("uq.quantile_nets", "SingleQuantileNet"),
    "gaussian": ("uq.quantile_nets", "GaussianNet"),
    "lightgbm": (_HERE, "LightGBM"),
}


def make_model(spec: str | Mapping[str, Any]) -> QuantileModel:
    """A fresh model of a name in `MODELS`, or of a mapping {"name": ..., further options}.

    Raises:
        ConfigError: the name is unknown or an option is not one of that model's.
    """
    options = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = str(options.pop("name", ""))
    if name not in MODELS:
        raise ConfigError(unknown_name("quantile model", name, MODELS))
    module, attribute = MODELS[name]
    try:
        made: QuantileModel = getattr(import_module(module), attribute)(**options)
    except TypeError as error:
        raise ConfigError(f"quantile model '{name}': {error}") from error
    return made
