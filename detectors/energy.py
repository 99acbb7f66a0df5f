"""Energies of a classifier as scores (Liu, Wang, Owens, Li, NeurIPS 2020, arXiv 2010.03759).

    marginal    E_T(x) = -T logsumexp(f(x) / T)      high = unlike the training data
    joint       E(x, y) = -f_y(x), y the predicted class (the same as max-logit)
    delta       E(x) - E(x*), x* the input after a few steps away from its own prediction

Adversarial inputs need not have high energy: an attack that goes far beyond the boundary lowers E(x), one that stops at it
raises it (Beadini and Masi 2023, arXiv 2304.04033; Mirza et al., ECCV 2024, arXiv 2407.06315). So `suspect` says which end is
suspicious, and an attacker who knows of the test evades it: report it together with the attack `adaptive`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from detectors.base import Detector
from detectors.selection import best, needs_choice, numbers
from detectors.validation import Validation
from robustbench_ext.attacks.threat import Threat
from robustbench_ext.errors import ConfigError
from robustbench_ext.models.energy import joint_energy, marginal_energy
from robustbench_ext.models.observe import Observations, Taps
from robustbench_ext.numbers import parse_number

READINGS = ("marginal", "joint", "delta")
SUSPECT = ("high", "low")


class Energy(Detector):
    """score = the reading of the energy, or minus it.

    Args:
        temperature: T > 0; 1 is the paper's recommendation. Large T approach the mean logit and lose the peak. A list is a
            grid to choose from; the energy test for adversarial inputs takes 0.1, 0.2, 0.5, 1, 2, 10, 20 and suspect="low".
        reading: "marginal" (default), "joint" or "delta".
        suspect: "high" (default) or "low" energies.
        validate: what to choose the temperature on, see `detectors.validation`.
        eps, steps: of "delta": so many signed gradient steps of 2.5 eps / steps in the Linf ball, from the input itself.
    "delta" reads inputs (steps + 1 forward passes and steps backward passes) and cannot be attacked by gradient.
    """

    name: ClassVar[str] = "energy"
    version: ClassVar[int] = 2
    reference: ClassVar[str] = "arXiv 2010.03759"

    def __init__(
        self,
        temperature: float | Sequence[float] = 1.0,
        reading: str = "marginal",
        suspect: str = "high",
        validate: Mapping[str, Any] | None = None,
        eps: float = 0.1,
        steps: int = 10,
    ) -> None:
        self.temperatures = numbers(temperature, "energy: temperature", strict=True)
        self.temperature = self.temperatures[0]
        for what, value, known in (("reading", reading, READINGS), ("suspect", suspect, SUSPECT)):
            if value not in known:
                raise ConfigError(f"energy: {what} = {value!r}, expected one of {', '.join(known)}")
        self.reading, self.suspect = reading, suspect
        self.validate = None if validate is None else dict(validate)
        needs_choice(self.name, validate, temperature=self.temperatures)
        self.eps, number = parse_number(eps, "energy: eps"), parse_number(steps, "energy: steps")
        if self.eps <= 0 or number != int(number) or number < 1:
            raise ConfigError(
                f"energy: eps = {eps!r}, steps = {steps!r}; expected eps > 0 and a whole number of steps >= 1"
            )
        self.steps = int(number)
        self.reads_inputs = reading == "delta"
        self.differentiable = not self.reads_inputs
        self.needs_gradient = self.reads_inputs

    def parameters(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "temperature": list(self.temperatures),
            "reading": self.reading,
            "suspect": self.suspect,
        }
        if self.reads_inputs:
            found |= {"eps": self.eps, "steps": self.steps}
        return {**found, "validate": self.validate}

    def _sign(self, energy: Tensor) -> Tensor:
        return energy if self.suspect == "high" else -energy

    def _read(self, logits: Tensor, temperature: float) -> Tensor:
        logits = logits.double()
        if self.reading == "joint":
            return self._sign(joint_energy(logits, logits.argmax(dim=1)))
        return self._sign(marginal_energy(logits, temperature))

    def _score(self, seen: Observations) -> Tensor:
        return self._read(seen.logits, self.temperature)

    def _score_inputs(self, reader: Taps, x: Tensor) -> Tensor:
        return self._delta(reader, x, self.temperature)

    def _delta(self, reader: Taps, x: Tensor, temperature: float) -> Tensor:
        with torch.no_grad():
            before, _ = reader(x)
        away, predicted, threat = x, before.argmax(dim=1), Threat("Linf", self.eps)
        for _ in range(self.steps):
            leaf = away.detach().requires_grad_(True)
            with torch.enable_grad():
                loss = F.cross_entropy(reader(leaf)[0], predicted, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, leaf)
            away = threat.project(away + 2.5 * self.eps / self.steps * gradient.sign(), x)
        with torch.no_grad():
            after, _ = reader(away)
        return self._sign(marginal_energy(before.double(), temperature) - marginal_energy(after.double(), temperature))

    def _tune(self, reader: Taps, validation: Validation) -> None:
        def score(temperature: float, x: Tensor) -> Tensor:
            parts = []
            for i in range(0, len(x), 250):
                batch = x[i : i + 250]
                if self.reads_inputs:
                    parts.append(self._delta(reader, batch, temperature))
                else:
                    with torch.no_grad():
                        parts.append(self._read(reader(batch)[0], temperature))
            return torch.cat(parts)

        self.temperature, _ = best(self.temperatures, score, validation)
        self._source = validation.source

    def warnings(self) -> list[str]:
        return [f"temperature chosen on {self._source}"] if self.validate is not None else []

    def summary(self) -> dict[str, float]:
        return {"temperature": self.temperature} if self.validate is not None else {}
