"""CS-IB: a regressor that keeps of its inputs what the target needs, by Cauchy-Schwarz divergences of kernel density estimates.

Yu, Yu, Lokse, Jenssen, Principe: *Cauchy-Schwarz Divergence Information Bottleneck for Regression*, ICLR 2024, arXiv
2404.17951.

    loss = D_CS(p(y|x); q(f(x)|x)) + beta I_CS(x; t)          t: what the network's last linear layer reads

With Gaussian kernels exp(-|a - b|^2 / (2 sigma^2)), K of x, Q of t, L1 of y, L2 of f(x), L21 between f(x) and y:

    T(A)  = sum_j sum_i K_ji A_ji / sum_i K_ji^2
    D_CS  = log T(L1) + log T(L2) - 2 log T(L21)
    I_CS  = log(tr(K Q) / N^2) + log(1'K1 1'Q1 / N^4) - 2 log(1'KQ1 / N^3)

Logarithms are natural; the authors' are of base 2, so that their beta is ours and their values are ours over log 2. Both terms
take O(N^2) time and memory in a batch of N. They are computed as sums of exponentials of logarithms: predictions far from all
targets have a gradient still, where products of kernels are 0. I_CS >= 0; the estimate D_CS is 0 at f(x) = y, may be slightly
negative near there, and is not symmetric.

Targets are columns. The authors' kernel of (N,) targets broadcasts: with it D_CS is the sum of squared errors, in disguise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from robustbench_ext.errors import ConfigError, DataError
from robustbench_ext.models.mlp import Standardized
from robustbench_ext.models.objective import Objective
from robustbench_ext.numbers import read_numbers

FEW = 4  # columns


def divergence(
    x: Tensor, y: Tensor, predicted: Tensor, *, sigma_x: float, sigma_y: float, density: bool = False
) -> Tensor:
    """D_CS(p(y|x); q(predicted|x)), a scalar, natural logarithm.

    Args:
        x: (N, d), N >= 2.
        y, predicted: (N, k); a single target is (N, 1).
        sigma_x, sigma_y: bandwidths of the inputs' and of the targets' kernels. The authors take 1 on standardised data.
        density: weigh by 1 / (sum_i K_ji)^2, as p(y|x) = p(x, y) / p(x) gives it, instead of the published 1 / sum_i K_ji^2.

    Raises:
        DataError: not two dimensions, shapes that do not fit, a batch of one.
    """
    _check(x=x, y=y, predicted=predicted)
    if y.shape != predicted.shape:
        raise DataError(
            f"cs-ib: targets {tuple(y.shape)} and predictions {tuple(predicted.shape)}, expected equal shapes"
        )
    k = _log_kernel(x, x, sigma_x)
    weights = -2 * k.logsumexp(dim=1) if density else -(2 * k).logsumexp(dim=1)

    def log_t(a: Tensor, b: Tensor) -> Tensor:
        return ((k + _log_kernel(a, b, sigma_y)).logsumexp(dim=1) + weights).logsumexp(dim=0)

    return log_t(y, y) + log_t(predicted, predicted) - 2 * log_t(predicted, y)


def information(x: Tensor, t: Tensor, *, sigma_x: float, sigma_t: float) -> Tensor:
    """I_CS(x; t) >= 0, a scalar, natural logarithm: 0 where t is constant.

    Args:
        x, t: (N, d) and (N, k), N >= 2.
        sigma_x, sigma_t: bandwidths.

    Raises:
        DataError: as of `divergence`.
    """
    _check(x=x, t=t)
    k, q = _log_kernel(x, x, sigma_x), _log_kernel(t, t, sigma_t)
    cross = (k.logsumexp(dim=1) + q.logsumexp(dim=1)).logsumexp(dim=0)
    # The powers of N cancel.
    return _log_sum(k + q) + _log_sum(k) + _log_sum(q) - 2 * cross


def normalised_information(x: Tensor, t: Tensor, *, sigma_x: float, sigma_t: float) -> Tensor:
    """I_CS(x; t) / sqrt(I_CS(x; x) I_CS(t; t)), a scalar: 1 for t = x.

    Raises:
        DataError: as of `information`, or x or t is constant: then it is 0 / 0.
    """
    _check(x=x, t=t)
    for name, values in (("x", x), ("t", t)):
        if bool((values == values[0]).all()):
            raise DataError(f"cs-ib: {name} is constant, and normalised information 0 / 0. Take information(x, t)")
    own = information(x, x, sigma_x=sigma_x, sigma_t=sigma_x) * information(t, t, sigma_x=sigma_t, sigma_t=sigma_t)
    return information(x, t, sigma_x=sigma_x, sigma_t=sigma_t) / own.sqrt()


def _log_kernel(a: Tensor, b: Tensor, sigma: float) -> Tensor:
    """(N, M)."""
    return -_squared_distances(a, b) / (2 * sigma**2)


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """(N, M): of few columns by differences, which are exactly 0 where a and b are equal; of many by a product, which is faster
    by as many times as there are columns. Moving both by the mean changes no distance, and leaves less to rounding.
    """
    if a.shape[1] <= FEW:
        return (a[:, None] - b[None]).square().sum(dim=2)
    centre = b.detach().mean(dim=0)
    a, b = a - centre, b - centre
    squares = a.square().sum(dim=1)[:, None] + b.square().sum(dim=1)[None]
    return (squares - 2 * a @ b.T).clamp_min(0)


def _log_sum(values: Tensor) -> Tensor:
    return values.flatten().logsumexp(dim=0)


def _check(**given: Tensor) -> None:
    n = len(next(iter(given.values())))
    for name, values in given.items():
        if values.ndim != 2:
            raise DataError(
                f"cs-ib: {name} has shape {tuple(values.shape)}, expected two dimensions. A single target is (N, 1): "
                f"{name}[:, None]. With (N,) the kernels would broadcast to something else."
            )
        if len(values) != n or n < 2:
            raise DataError(f"cs-ib: {name} has {len(values)} rows of {n}, expected equal numbers, at least 2")


@dataclass(frozen=True, kw_only=True)
class CSIB(Objective):
    """D_CS(p(y|x); q(f(x)|x)) + beta I_CS(x; t) on standardised inputs and targets.

    The authors' networks have four hidden layers of 128, batches of 128 and 200 epochs of Adam at 1e-4; beta was chosen among
    0 and 1e-4 to 1. The epoch is chosen by squared error on held-out training data, as for all regressors here; the authors'
    script takes the one of least error on the test data.

    Args:
        beta: the weight of the bottleneck, >= 0.
        sigma_x, sigma_y, sigma_t: bandwidths on standardised inputs, standardised targets and t. Published: 1 for all. Of d
            inputs distances grow as sqrt(d), and with a small sigma_x no sample has neighbours: then D_CS compares every
            prediction with its own target alone.
        density: see `divergence`.
    """

    name: ClassVar[str] = "cs-ib"
    reference: ClassVar[str] = "arXiv 2404.17951"

    beta: float = 0.01
    sigma_x: float = 1.0
    sigma_y: float = 1.0
    sigma_t: float = 1.0
    density: bool = False

    def __post_init__(self) -> None:
        read_numbers(self, self.name)
        if not 0 <= self.beta < math.inf:
            raise ConfigError(f"{self.name}: beta = {self.beta}, expected a number >= 0")
        for name in ("sigma_x", "sigma_y", "sigma_t"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{self.name}: {name} = {getattr(self, name)}, expected a number > 0")
        if not isinstance(self.density, bool):
            raise ConfigError(f"{self.name}: density = {self.density!r}, expected true or false")

    def check(self, network: Standardized) -> None:
        _last_linear(network)

    def loss(self, network: Standardized, x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        read: list[Tensor] = []
        handle = _last_linear(network).register_forward_pre_hook(lambda _, given: read.append(given[0]))
        try:
            predicted = network.scaled(x)
        finally:
            handle.remove()
        inputs = (x - network.input_mean) / network.input_std
        d = divergence(
            inputs, y[:, None], predicted[:, None], sigma_x=self.sigma_x, sigma_y=self.sigma_y, density=self.density
        )
        i = information(inputs, read[-1].flatten(1), sigma_x=self.sigma_x, sigma_t=self.sigma_t)
        loss = d + self.beta * i if self.beta > 0 else d
        return loss, {"squared_error": (predicted - y).square().mean(), "objective": loss, "d_cs": d, "i_cs": i}


def _last_linear(network: nn.Module) -> nn.Linear:
    layers = [module for module in network.modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise ConfigError("cs-ib: the network has no linear layer, and t is what the last one reads")
    return layers[-1]
