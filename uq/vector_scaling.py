"""Vector scaling (Guo, Pleiss, Sun, Weinberger, ICML 2017, arXiv 1706.04599): one slope and one offset a class.

    logits' = w * logits + b,  w and b (K,), at the minimum of the NLL on held-out data,

which is convex in (w, b). w constant and b = 0 is temperature scaling; the search starts there, so the fit is never worse than
temperature scaling on the samples it is fitted on. On others it may be: 2 K numbers are learned, not one. Unlike a temperature
it changes predictions, and so accuracy.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robustbench_ext.errors import ConfigError
from robustbench_ext.models.observe import Observations
from robustbench_ext.numbers import parse_number
from uq.base import Estimator
from uq.temperature import optimal_temperature

_LIMIT = 1e3  # of |w| and |b|: where classes can be separated, or one is missing, the NLL falls for ever
_STEPS = 2000


def optimal_scaling(
    logits: Tensor, labels: Tensor, *, bias_only: bool = False, l2: float = 0.0
) -> tuple[Tensor, Tensor]:
    """w, b (K,), float64, that minimise  mean NLL + l2 / (2 K) (|w - w0|^2 + |b|^2)  with |w|, |b| <= 1000.

    Args:
        logits: (N, K); labels: int64 (N,).
        bias_only: keep w = 1 and fit b alone (a correction of the class frequencies).
        l2: pulls towards temperature scaling (w0 = 1/T), or towards the logits as they are where `bias_only`.

    The gradient is two sums over samples and no K x K matrix is formed, so many classes are no obstacle. b has mean zero, as
    its gradient has; a constant in it would change no probability.
    """
    from scipy.optimize import minimize

    z = logits.double()
    n, k = z.shape
    start = 1.0 if bias_only else 1 / optimal_temperature(z, labels)
    hit = F.one_hot(labels, k).double()

    def objective(theta: np.ndarray) -> tuple[float, np.ndarray]:
        w, b = torch.from_numpy(theta).view(2, k)
        out = w * z + b
        residual = (out.softmax(dim=1) - hit) / n
        shift = w - start
        value = F.cross_entropy(out, labels) + l2 / (2 * k) * (shift.square().sum() + b.square().sum())
        slope_w = (residual * z).sum(dim=0) + l2 / k * shift
        slope_b = residual.sum(dim=0) + l2 / k * b
        return float(value), torch.cat([slope_w, slope_b]).numpy()

    free = (start, start) if bias_only else (-_LIMIT, _LIMIT)
    found = minimize(
        objective,
        np.concatenate([np.full(k, start), np.zeros(k)]),
        jac=True,
        method="L-BFGS-B",
        bounds=[free] * k + [(-_LIMIT, _LIMIT)] * k,
        options={
            "maxiter": _STEPS,
            "maxfun": 10 * _STEPS,
            "ftol": 0.0,
            "gtol": 1e-9,
            "maxcor": 2 * k if k < 50 else 50,
        },
    )
    w, b = torch.from_numpy(found.x.copy()).view(2, k)
    return w, b


class VectorScaling(Estimator):
    """w * logits + b, fitted on the calibration split by NLL.

    Args:
        bias_only: fit the offsets b alone.
        l2: weight of the pull towards temperature scaling, see `optimal_scaling`; 0 is the method as published.
    """

    name: ClassVar[str] = "vector-scaling"
    reference: ClassVar[str] = "arXiv 1706.04599"

    def __init__(self, bias_only: bool = False, l2: float = 0.0) -> None:
        if not isinstance(bias_only, bool):
            raise ConfigError(f"vector-scaling: bias_only = {bias_only!r}, expected true or false")
        self.bias_only, self.l2 = bias_only, parse_number(l2, "vector-scaling: l2")
        if self.l2 < 0:
            raise ConfigError(f"vector-scaling: l2 = {l2!r}, expected a number >= 0")

    def parameters(self) -> dict[str, Any]:
        return {"bias_only": self.bias_only, "l2": self.l2}

    def _fit(self, held_out: Observations, model: nn.Module | None) -> None:
        z, labels = held_out.logits, held_out.labels
        self.scale, self.bias = optimal_scaling(z, labels, bias_only=self.bias_only, l2=self.l2)
        self._loss = float(F.cross_entropy(self._calibrate(held_out), labels))
        self._missing = z.shape[1] - len(labels.unique())

    def _calibrate(self, seen: Observations) -> Tensor:
        return self.scale * seen.logits.double() + self.bias

    def warnings(self) -> list[str]:
        if self.l2 > 0:
            return []
        found = []
        if self._missing:
            found.append(
                f"classes without a calibration sample: {self._missing}. Without l2 their offsets fall until they are never "
                f"predicted"
            )
        if self._loss < 1e-6:
            found.append(
                "the calibration samples can be classified without an error, so the NLL has no minimum and the scaling means "
                "nothing: give more of them, or l2"
            )
        return found

    def summary(self) -> dict[str, float]:
        return {
            "smallest scale": float(self.scale.min()),
            "largest scale": float(self.scale.max()),
            "largest offset": float(self.bias.abs().max()),
        }
