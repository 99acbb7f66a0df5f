"""The exact answer where there is one, as an estimator beside the others.

On `bayes-linear` data its point, intervals and both parts of its variance are those of `Dataset.truth`, if its prior is the
data's; with another prior it is what a wrong model says of itself (a shift of the task, arXiv 2405.15115). On any other table
it is conjugate Bayesian linear regression in raw units.

For classes nothing needs to be fitted: `measure_truth` reads the oracle's rows off `Dataset.class_truth`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from torch import nn

from robustbench_ext.data.bayes_linear import GAMMA, KNOWN, KnownNoise, NormalInverseGamma, Posterior
from robustbench_ext.errors import ConfigError
from robustbench_ext.numbers import parse_number
from uq.regression import LEVELS, Prediction, RegressionEstimator, Samples, from_quantiles


class BayesLinear(RegressionEstimator):
    """The posterior predictive given the training samples; the regressor's own prediction and calibration are not looked at.

    Args:
        kind: "known-noise" (normal) or "normal-inverse-gamma" (Student's t).
        noise: s, of the former; a0, b0: of the latter's prior of s^2.
        prior: tau, the prior standard deviation of each weight (in units of s where s is unknown). There is no intercept.

    The point is the posterior mean, `aleatoric` the standard deviation of the noise and `epistemic` that of x'w, in units of y.

    Raises:
        ConfigError: an unknown kind, or a number that is not above 0.
    """

    name: ClassVar[str] = "bayes-linear"
    reference: ClassVar[str] = "arXiv 2405.15115"

    def __init__(
        self, kind: str = KNOWN, noise: float = 1.0, a0: float = 3.0, b0: float = 2.0, prior: float = 1.0
    ) -> None:
        if kind not in (KNOWN, GAMMA):
            raise ConfigError(f"{self.name}: kind = {kind!r}, expected {KNOWN} or {GAMMA}")
        self.kind = kind
        numbers = {"noise": noise, "a0": a0, "b0": b0, "prior": prior}
        self.numbers = {key: parse_number(value, f"{self.name}: {key}") for key, value in numbers.items()}
        if min(self.numbers.values()) <= 0:
            raise ConfigError(f"{self.name}: {self.numbers}, expected numbers > 0")

    def parameters(self) -> dict[str, Any]:
        used = ("noise", "prior") if self.kind == KNOWN else ("a0", "b0", "prior")
        return {"kind": self.kind, **{key: self.numbers[key] for key in used}}

    def _fit(self, train: Samples, calibration: Samples, model: nn.Module | None, seed: int) -> None:
        assert train.y is not None  # noqa: S101 - checked by fit
        made, numbers = (train.x.astype(np.float64), train.y, self.numbers["prior"]), self.numbers
        self._posterior: Posterior = (
            KnownNoise(*made, numbers["noise"])
            if self.kind == KNOWN
            else NormalInverseGamma(*made, numbers["a0"], numbers["b0"])
        )

    def _predict(self, samples: Samples, model: nn.Module | None, seed: int) -> Prediction:
        x, law = samples.x, self._posterior
        quantiles = np.stack([law.quantile(x, level) for level in LEVELS], axis=1)
        return from_quantiles(quantiles, law.aleatoric(x), law.epistemic(x))

    def summary(self) -> dict[str, float]:
        return {"noise": float(self._posterior.aleatoric(np.zeros((1, 1)))[0])}
