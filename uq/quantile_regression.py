"""Quantile regression by one model (Koenker and Bassett, Econometrica 1978); the quantile forest (Meinshausen, JMLR 2006)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from uq.quantile_models import make_model
from uq.regression import LEVELS, Prediction, RegressionEstimator, Samples, from_quantiles


class QuantileRegression(RegressionEstimator):
    """The quantiles of one model of the training split, sorted where they cross. The regressor's prediction is not used.

    Args:
        model: a name of `uq.quantile_models.MODELS`, or a mapping {"name": ..., options}.

    Raises:
        ConfigError: the model is unknown.
    """

    name: ClassVar[str] = "quantile-regression"
    reference: ClassVar[str] = "Koenker and Bassett, Econometrica 1978"

    def __init__(self, model: str | Mapping[str, Any] = "linear") -> None:
        self.model: str | dict[str, Any] = model if isinstance(model, str) else dict(model)
        make_model(self.model)

    def parameters(self) -> dict[str, Any]:
        return {"model": self.model}

    def _fit(self, train: Samples, calibration: Samples, model: nn.Module | None, seed: int) -> None:
        assert train.y is not None  # noqa: S101 - checked by fit
        self._model = make_model(self.model).fit(train.x, train.y, LEVELS, seed)

    def _predict(self, samples: Samples, model: nn.Module | None, seed: int) -> Prediction:
        return from_quantiles(self._model.quantiles(samples.x))


class QuantileForest(QuantileRegression):
    """`quantile-regression` by a forest, whose quantiles cannot cross.

    Args:
        trees, min_leaf, extra: see `uq.quantile_models.Forest`.
    """

    name: ClassVar[str] = "quantile-forest"
    reference: ClassVar[str] = "Meinshausen, JMLR 2006"

    def __init__(self, trees: int = 100, min_leaf: int = 8, extra: bool = False) -> None:
        super().__init__({"name": "forest", "trees": trees, "min_leaf": min_leaf, "extra": extra})
        self._parameters = {"trees": trees, "min_leaf": min_leaf, "extra": extra}

    def parameters(self) -> dict[str, Any]:
        return dict(self._parameters)
