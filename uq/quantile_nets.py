"""Networks as quantile models: all levels at once, one level as an input, a Gaussian with its own spread.

Every network standardises inputs and targets, keeps a fifth of its samples (drawn by the seed) for early stopping on the
pinball loss summed over the levels, and is small enough for a CPU. Settings are those of Fakoor et al. (JMLR 2023, arXiv
2103.00083) where they give any.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robustbench_ext.errors import ConfigError
from uq.fitting import Fit, Scaling, folds, minimise, mlp
from uq.pinball import crossing_penalty, pinball
from uq.quantile_models import QuantileModel


class NetModel(QuantileModel):
    """What the networks share.

    Args:
        width, layers, dropout: of the perceptron with ELU.
        lr, weight_decay, steps, batch: of Adam (see `uq.fitting.Fit`).
    """

    def __init__(
        self,
        width: int = 64,
        layers: int = 2,
        dropout: float = 0.0,
        lr: float = 1e-3,
        weight_decay: float = 1e-5,
        steps: int = 3000,
        batch: int | None = None,
    ) -> None:
        self.body: dict[str, Any] = {"width": width, "layers": layers, "dropout": dropout}
        self.how = Fit(lr, weight_decay, steps, batch)

    def _fit(self, x: np.ndarray, y: np.ndarray, seed: int) -> None:
        self._x, self._y = Scaling(x), Scaling(y)
        self._levels = torch.as_tensor(self.levels, dtype=torch.float32)
        z, t = self._tensor(self._x.to(x)), self._tensor(self._y.to(y))
        held = torch.from_numpy(folds(len(y), 5, seed, purpose="net-validation") == 0)
        zt, tt, zv, tv = z[~held], t[~held], z[held], t[held]
        self._net, self.best_step, _ = minimise(
            lambda: self._build(z.shape[1]),
            lambda net, rows: self._loss(net, zt[rows], tt[rows]),
            len(tt),
            self.how,
            seed,
            lambda net: pinball(tv, self._quantiles(net, zv), self._levels).sum(1).mean(),
        )
        self._net = self._net.double()

    def quantiles(self, x: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return self._y.back(self._quantiles(self._net, torch.as_tensor(self._x.to(x))).numpy())

    @staticmethod
    def _tensor(values: np.ndarray) -> Tensor:
        return torch.as_tensor(values, dtype=torch.float32)

    @abstractmethod
    def _build(self, inputs: int) -> nn.Module: ...

    @abstractmethod
    def _loss(self, net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """A scalar for a batch of standardised x (B, d), y (B,)."""

    @abstractmethod
    def _quantiles(self, net: nn.Module, x: Tensor) -> Tensor:
        """(B, m) in standard units, in the dtype of x."""


class MultiQuantileNet(NetModel):
    """All levels from one network: summed pinball loss + margin_weight times the penalty on crossing (DQR).

    Args:
        margin_weight, margin: of the penalty (see `uq.pinball.crossing_penalty`), in standard deviations of y.
        huber: half-width of the smoothed kink of the pinball loss.
        options: of `NetModel`.
    """

    def __init__(self, margin_weight: float = 1.0, margin: float = 0.0, huber: float = 0.0, **options: Any) -> None:
        super().__init__(**options)
        self.margin_weight, self.margin, self.huber = margin_weight, margin, huber

    def _build(self, inputs: int) -> nn.Module:
        return mlp(inputs, len(self.levels), **self.body)

    def _loss(self, net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        q = net(x)
        penalty = self.margin_weight * crossing_penalty(q, self.margin) if self.margin_weight else 0.0
        return pinball(y, q, self._levels, self.huber).sum(1).mean() + penalty

    def _quantiles(self, net: nn.Module, x: Tensor) -> Tensor:
        q: Tensor = net(x)
        return q


class SingleQuantileNet(NetModel):
    """One output; tau - 1/2 is a further input. In training a level is drawn uniformly from (0, 1) for every sample."""

    def _build(self, inputs: int) -> nn.Module:
        return mlp(inputs + 1, 1, **self.body)

    def _loss(self, net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        level = torch.rand(len(x), 1)
        return pinball(y, net(torch.cat([x, level - 0.5], 1)), level).mean()

    def _quantiles(self, net: nn.Module, x: Tensor) -> Tensor:
        levels = torch.as_tensor(self.levels, dtype=x.dtype)
        columns = [net(torch.cat([x, (level - 0.5).expand(len(x), 1)], 1)) for level in levels]
        return torch.cat(columns, 1)


class GaussianNet(NetModel):
    """Mean and standard deviation by the Gaussian likelihood; quantiles are mu + sigma Phi^-1(tau).

    Args:
        beta: weight sigma^(2 beta), held constant, on each sample's likelihood (beta-NLL: Seitzer, Tavakoli, Antic, Martius,
            ICLR 2022, arXiv 2203.09168). 0 is the likelihood itself; 1 weighs errors as least squares does.
        options: of `NetModel`.

    Raises:
        ConfigError: beta is outside [0, 1].
    """

    FLOOR = 1e-3  # of the standard deviation of y; keeps the likelihood bounded

    def __init__(self, beta: float = 0.0, **options: Any) -> None:
        super().__init__(**options)
        if not 0 <= beta <= 1:
            raise ConfigError(f"beta must lie in [0, 1], got {beta}")
        self.beta = beta

    def _build(self, inputs: int) -> nn.Module:
        return mlp(inputs, 2, **self.body)

    def _moments(self, net: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        out: Tensor = net(x)
        return out[:, 0], self.FLOOR + nn.functional.softplus(out[:, 1])

    def _loss(self, net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        mean, sigma = self._moments(net, x)
        likelihood = 0.5 * ((y - mean) / sigma) ** 2 + sigma.log()
        loss: Tensor = (sigma.detach() ** (2 * self.beta) * likelihood).mean()
        return loss

    def _quantiles(self, net: nn.Module, x: Tensor) -> Tensor:
        mean, sigma = self._moments(net, x)
        at = torch.special.ndtri(torch.as_tensor(self.levels, dtype=torch.float64)).to(x.dtype)
        q: Tensor = mean[:, None] + sigma[:, None] * at
        return q

    def moments(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation (N,) in units of y."""
        with torch.no_grad():
            mean, sigma = self._moments(self._net, torch.as_tensor(self._x.to(x)))
        return self._y.back(mean.numpy()), np.asarray(sigma.numpy() * self._y.scale)
