"""A network that predicts a mean and a standard deviation (Nix and Weigend, ICNN 1994), by default by the Gaussian likelihood.

The likelihood divides each sample's pull on the mean by its predicted variance, so what is fitted badly at first may be
declared noise and stay so; beta-NLL (Seitzer et al., ICLR 2022, arXiv 2203.09168) multiplies each sample's loss by
sigma^(2 beta), held constant.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from torch import nn

from uq.quantile_nets import GaussianNet
from uq.regression import LEVELS, Prediction, RegressionEstimator, Samples, from_quantiles


class Heteroscedastic(RegressionEstimator):
    """Gaussian quantiles mu(x) + sigma(x) Phi^-1(tau). `aleatoric` is sigma, in units of y; the point is mu.

    Args:
        beta: 0 for the likelihood, up to 1; 0.5 is what the authors of beta-NLL advise.
        width, layers, dropout, lr, weight_decay, steps: see `uq.quantile_nets.NetModel`.

    Raises:
        ConfigError: beta is outside [0, 1].
    """

    name: ClassVar[str] = "heteroscedastic"
    reference: ClassVar[str] = "Nix and Weigend, ICNN 1994; arXiv 2203.09168"

    def __init__(
        self,
        beta: float = 0.0,
        width: int = 64,
        layers: int = 2,
        dropout: float = 0.0,
        lr: float = 1e-3,
        weight_decay: float = 1e-5,
        steps: int = 3000,
    ) -> None:
        self.options = {
            "beta": beta,
            "width": width,
            "layers": layers,
            "dropout": dropout,
            "lr": lr,
            "weight_decay": weight_decay,
            "steps": steps,
        }
        self._new()

    def _new(self) -> GaussianNet:
        return GaussianNet(**self.options)  # type: ignore[arg-type]

    def parameters(self) -> dict[str, Any]:
        return dict(self.options)

    def _fit(self, train: Samples, calibration: Samples, model: nn.Module | None, seed: int) -> None:
        assert train.y is not None  # noqa: S101 - checked by fit
        self._net = self._new().fit(train.x, train.y, LEVELS, seed)

    def _predict(self, samples: Samples, model: nn.Module | None, seed: int) -> Prediction:
        _, sigma = self._net.moments(samples.x)
        return replace(from_quantiles(self._net.quantiles(samples.x)), aleatoric=sigma)

    def summary(self) -> dict[str, float]:
        return {"steps": float(self._net.best_step)}
