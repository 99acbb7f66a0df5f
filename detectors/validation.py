"""What a detector may choose its parameters on: known and unknown inputs, never test data.

Two ways (Lee, Lee, Lee, Shin, NeurIPS 2018, arXiv 1807.03888):
    with outliers: some inputs of no class stand for all others. The published headline numbers take them from the very
        set that is tested; here they are whatever the caller gives, and records say what.
    with adversarial inputs only: known inputs are samples that are classified correctly, and the same with Gaussian noise
        as large as the perturbation; unknown inputs are their adversarial versions. No outlier is needed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from robustbench_ext import device as devices
from robustbench_ext.attacks.base import Attack
from robustbench_ext.attacks.threat import flat_norm
from robustbench_ext.errors import DataError
from robustbench_ext.models.contract import frozen_eval
from robustbench_ext.randomness import SampleRandom

FEWEST = 10  # of each group, so that five folds hold two of each
CRITERIA = ("tnr95", "auroc")


@dataclass(frozen=True)
class Validation:
    """Known and unknown inputs.

    Attributes:
        known, unknown: float32 (n, C, H, W) and (m, C, H, W) in [0, 1].
        criterion: what the best parameters maximise: "tnr95" (the paper's for outliers) or "auroc" (for attacks).
        source: what the unknown inputs are, one phrase.
    """

    known: Tensor
    unknown: Tensor
    criterion: str = "tnr95"
    source: str = "outliers"

    def __post_init__(self) -> None:
        if self.criterion not in CRITERIA:
            raise DataError(f"validation: criterion = {self.criterion!r}, expected one of {', '.join(CRITERIA)}")
        if len(self.known) < FEWEST or len(self.unknown) < FEWEST:
            raise DataError(
                f"validation: {len(self.known)} known and {len(self.unknown)} unknown inputs ({self.source}), expected at "
                f"least {FEWEST} of each. Use more samples, or an attack that succeeds more often."
            )

    def halves(self) -> tuple[Validation, Validation]:
        """Every second sample, and the others: one half to fit a regression on, one to choose parameters on.

        All samples twice where a half would have fewer than 10 known or unknown ones: an attack on a robust model fools few.
        """
        if min(len(self.known), len(self.unknown)) < 2 * FEWEST:
            return self, self
        first, second = (Validation(self.known[i::2], self.unknown[i::2], self.criterion, self.source) for i in (0, 1))
        return first, second


def with_outliers(known: Tensor, unknown: Tensor, source: str = "outliers") -> Validation:
    """Validation with inputs of no class."""
    return Validation(known, unknown, "tnr95", source)


def with_attack(
    model: nn.Module,
    x: Tensor,
    labels: Tensor,
    attack: Attack,
    ids: np.ndarray,
    seed: int = 0,
    noise: bool = True,
    batch_size: int = 250,
) -> Validation:
    """Validation with adversarial inputs of a model.

    A sample counts if it is classified correctly as it is and (where `noise`) with Gaussian noise of its perturbation's
    L2 norm, clipped to [0, 1], and wrongly under the attack.

    Args:
        ids: str (N,), what the noise of a sample depends on, with the seed.
    """
    result = attack(model, x, labels, ids=ids, seed=seed, batch_size=batch_size)
    x_adv = result.x_adv
    moved = flat_norm(x_adv - x, "L2").view(-1, 1, 1, 1)
    draw = SampleRandom.of(seed, ids.tolist(), "detectors/validation").normal(tuple(x.shape[1:])).to(x)
    noisy = (x + draw * (moved / flat_norm(draw, "L2").view(-1, 1, 1, 1))).clamp(0, 1)
    kept = result.broken & (moved.flatten() > 0)
    if noise:
        with torch.no_grad(), frozen_eval(model), devices.float32():
            parts = [devices.call(model, noisy[i : i + batch_size]).argmax(1) for i in range(0, len(x), batch_size)]
        kept &= torch.cat(parts) == labels
    chosen = kept.nonzero()[:, 0]
    chosen = chosen[
        : len(chosen) // 2 * 2
    ]  # an even number, so that a sample and its noisy copy fall into the same half
    known = torch.cat([x[chosen], noisy[chosen]]) if noise else x[chosen]
    return Validation(known, x_adv[chosen], "auroc", f"{attack.name} {attack.threat()}")
