"""What a training knows of itself after each epoch: accuracies on the calibration split, energies, and an alarm.

Robust overfitting shows in the energies (arXiv 2407.06315): on training data the mean of E(x) - E(x*) fluctuates, then
hardly moves, then falls steeply, and that fall begins where the robust accuracy on other data begins to fall.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from defenses.recipe import Recipe
from robustbench_ext.attacks.inner import InnerAttack
from robustbench_ext.attacks.pgd import PGD
from robustbench_ext.data.base import Split
from robustbench_ext.models.contract import frozen_eval
from robustbench_ext.models.energy import marginal_energy
from robustbench_ext.randomness import SampleRandom


@dataclass(frozen=True)
class Validation:
    """Accuracy on the calibration split."""

    clean: float
    robust: float


def validate(
    model: nn.Module,
    split: Split,
    recipe: Recipe,
    seed: int,
    batch_size: int = 500,
    device: torch.device | str = "cpu",
) -> Validation:
    """Clean accuracy of the whole split and PGD accuracy of its first samples; draws are the same in every epoch."""
    attacked = split.take(recipe.validation_n)
    logits, labels = [], torch.from_numpy(split.labels).to(device)
    with torch.no_grad(), frozen_eval(model):
        for start in range(0, len(split), batch_size):
            logits.append(model(split.images(slice(start, start + batch_size)).to(device)))
    scores = torch.cat(logits)
    attack = PGD(eps=recipe.eps, norm=recipe.norm, steps=recipe.validation_steps)
    n = len(attacked)
    result = attack(
        model,
        attacked.images(slice(0, n)).to(device),
        labels[:n],
        ids=attacked.ids,
        seed=seed,
        clean_logits=scores[:n],
    )
    clean = float((scores.argmax(1) == labels).float().mean())
    return Validation(clean, float((~result.broken).float().mean()))


def measure_energies(
    model: nn.Module, split: Split, recipe: Recipe, seed: int, device: torch.device | str = "cpu"
) -> dict[str, float]:
    """Mean E(x), E(x*) and E(x) - E(x*) of the first `energy_n` samples, with the standard error of the last.

    x* is where a cross-entropy PGD of `validation_steps` ends, whether it breaks the sample or not.
    """
    part = split.take(recipe.energy_n)
    x, y = part.images(slice(None)).to(device), torch.from_numpy(part.labels).to(device)
    attack = InnerAttack(recipe.threat(), recipe.validation_steps)
    x_adv = attack(model, x, y, SampleRandom.of(seed, part.ids, "energies", device))
    with torch.no_grad(), frozen_eval(model):
        natural, adversarial = marginal_energy(model(x).double()), marginal_energy(model(x_adv).double())
    delta = natural - adversarial
    error = float(delta.std() / len(delta) ** 0.5) if len(delta) > 1 else float("inf")
    return {
        "energy": float(natural.mean()),
        "energy_adv": float(adversarial.mean()),
        "delta_energy": float(delta.mean()),
        "delta_energy_se": error,
    }


@dataclass(frozen=True)
class Alarm:
    """When the alarm of robust overfitting sounds. The rule is ours: the paper describes the phases, not a test.

    Attributes:
        window: epochs of the plateau to compare with, and epochs without a better robust accuracy.
        drop: how far E(x) - E(x*) must fall below the plateau's median, in units of its absolute value (at least 0.1).
        errors: and in standard errors of the current mean (its differences to other epochs, on the same samples, have less).
    """

    window: int = 5
    drop: float = 0.5
    errors: float = 4.0

    def epoch(self, curve: Sequence[dict[str, Any]]) -> int | None:
        """The first epoch (counted from 1) at which the alarm sounds, or None.

        It sounds where, on training data, the mean of E(x) - E(x*) lies below the median of the `window` epochs before
        the last `window` by more than `drop` and by more than noise, while the robust accuracy has had no better epoch for
        `window` epochs.
        """
        w = self.window
        for t in range(2 * w, len(curve)):
            rows = curve[: t + 1]
            if "delta_energy_train" not in rows[-1]:
                return None
            values = np.array([row["delta_energy_train"] for row in rows])
            plateau = float(np.median(values[t - 2 * w + 1 : t - w + 1]))
            fall = plateau - values[t]
            noise = self.errors * rows[-1]["delta_energy_se_train"]
            robust = [row["robust_accuracy"] for row in rows]
            stale = t - int(np.argmax(robust)) >= w
            if stale and fall > max(self.drop * max(abs(plateau), 0.1), noise):
                return t + 1
        return None
