"""A naive-Bayes classifier on a model's features, in the place of its last layer (Zheng et al., ICML 2023, arXiv 2302.02334).

Class means and one shared diagonal variance, in closed form (`detectors.gaussian_probe`). Its logits stand beside the model's
under every condition: accuracy and calibration of the same features with another last layer, clean, corrupted and attacked. An
attack on the model works against the model's own layer; `{attack: adaptive, against: naive-bayes-probe}` looks for inputs that
the model gets wrong and of which this one is sure.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from detectors.gaussian_probe import EPSILON, naive_bayes
from robustbench_ext.errors import ConfigError
from robustbench_ext.models.observe import PENULTIMATE, Observations
from robustbench_ext.numbers import parse_number
from uq.base import Estimator


class NaiveBayesProbe(Estimator):
    """Logits log pi_k - 1/2 sum_i (f_i - mu_ki)^2 / s_i^2, up to a number that all classes share; fitted on training data.

    Args:
        layer: the tap whose features f are read (see `Taps`).
        epsilon: added to the variances s^2 of features that are scaled to [0, 1].
    Features of a network are correlated, which naive Bayes does not know: its probabilities are far too sure. Predictions are
    its own, not the model's.
    """

    name: ClassVar[str] = "naive-bayes-probe"
    reference: ClassVar[str] = "arXiv 2302.02334"
    fit_on = "train"

    def __init__(self, layer: str = PENULTIMATE, epsilon: float = EPSILON) -> None:
        self.taps = (str(layer),)
        self.epsilon = parse_number(epsilon, f"{self.name}: epsilon")
        if self.epsilon <= 0:
            raise ConfigError(f"{self.name}: epsilon = {epsilon!r}, expected a number > 0")
        self._counts = torch.empty(0, dtype=torch.int64)

    def parameters(self) -> dict[str, Any]:
        return {"layer": self.taps[0], "epsilon": self.epsilon}

    def _fit(self, held_out: Observations, model: nn.Module | None) -> None:
        classes = held_out.logits.shape[1]
        self._counts = torch.bincount(held_out.labels, minlength=classes)
        self._head = naive_bayes(held_out.features[self.taps[0]], held_out.labels, classes, self.epsilon)

    def _calibrate(self, seen: Observations) -> Tensor:
        return self._head(seen.features[self.taps[0]])

    def summary(self) -> dict[str, float]:
        return {"samples of the smallest class": float(self._counts[self._counts > 0].min())}

    def warnings(self) -> list[str]:
        empty = int((self._counts == 0).sum())
        if not empty:
            return []
        return [f"{empty} of {len(self._counts)} classes have no training samples, so they are never predicted"]
