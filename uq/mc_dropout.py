"""MC dropout: the mean over passes with dropout on (Gal and Ghahramani, ICML 2016, arXiv 1506.02142).

Aleatoric uncertainty is the expected entropy, epistemic the mutual information of prediction and mask; of a regressor, the
residual variance and the variance over passes (`uq.monte_carlo`, `uq.monte_carlo_regression`).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from robustbench_ext.errors import ConfigError
from robustbench_ext.models.observe import Observations
from robustbench_ext.randomness import SampleRandom
from uq.base import Estimator, Reading
from uq.monte_carlo import DropoutPasses, checked_passes, read_passes, sample_logits
from uq.monte_carlo_regression import Mixture, MonteCarloRegressor, sample_predictions
from uq.regression import Samples


class MCDropout(Estimator):
    """The mean probabilities of `passes` passes with dropout. Needs a network that has dropout layers.

    Args:
        passes: S. What the mean of S passes lacks of infinitely many falls as 1 / S in mean square.
        correct: take the leading bias of few passes off the epistemic part (see `uq.monte_carlo.read_passes`).
    Cost: S forward passes.
    """

    name: ClassVar[str] = "mc-dropout"
    reference: ClassVar[str] = "arXiv 1506.02142"
    needs_fit = False
    reads_inputs = True
    differentiable = False

    def __init__(self, passes: int = 20, correct: bool = False) -> None:
        if not isinstance(correct, bool):
            raise ConfigError(f"{self.name}: correct = {correct!r}, expected true or false")
        self.passes, self.correct = checked_passes(passes, self.name, 2 if correct else 1), correct

    def parameters(self) -> dict[str, Any]:
        return {"passes": self.passes, "correct": self.correct}

    def _fit(self, held_out: Observations, model: nn.Module | None) -> None:
        pass

    def _read_inputs(
        self, model: nn.Module, x: Tensor, seen: Observations, random: SampleRandom, batch_size: int
    ) -> Reading:
        return read_passes(sample_logits(DropoutPasses(), model, x, random, self.passes, batch_size), self.correct)


class MCDropoutRegressor(MonteCarloRegressor):
    """The mean of `passes` passes with dropout, their variance, and intervals (see `MonteCarloRegressor`).

    Args:
        passes: S, at least 2.
        intervals: "conformal" or "gaussian".
    Cost: S forward passes, on the calibration samples and on those predicted.
    """

    name: ClassVar[str] = "mc-dropout"
    reference: ClassVar[str] = "arXiv 1506.02142"

    def __init__(self, passes: int = 20, intervals: str = "conformal") -> None:
        super().__init__(intervals)
        self.passes = checked_passes(passes, self.name, 2)

    def parameters(self) -> dict[str, Any]:
        return {"passes": self.passes, "intervals": self.intervals}

    def _passes(self, samples: Samples, model: nn.Module, seed: int) -> Mixture:
        found = sample_predictions(DropoutPasses(), model, samples, seed, self.name, self.passes)
        return Mixture(found, torch.from_numpy(samples.prediction).double())
