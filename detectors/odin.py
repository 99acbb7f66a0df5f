"""ODIN (Liang, Li, Srikant, ICLR 2018, arXiv 1706.02690): temperature, and a step of the input towards confidence.

    x' = x - eps sign(-grad_x log S_T(x)_max),   score = 1 - max_k S_T(x')_k,   S_T = softmax(logits / T).

The step raises the confidence of known inputs more than that of unknown ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from detectors.base import Detector
from detectors.msp import msp_score
from detectors.selection import best, needs_choice, numbers
from detectors.validation import Validation
from robustbench_ext.models.observe import Observations, Taps


class ODIN(Detector):
    """score = 1 - max_k softmax(f(x') / T)_k.

    Args:
        temperature, eps: 1000 and 0.0014 (in units of [0, 1] pixels) by default; a list is a grid to choose from.
        clip: keep moved inputs in [0, 1]; the published code does not.
        validate: what to choose on, see `detectors.validation`.
    Cost: two forward passes and one backward pass (one forward pass with eps = 0).
    """

    name: ClassVar[str] = "odin"
    reads_inputs = True
    differentiable = False
    reference: ClassVar[str] = "arXiv 1706.02690"

    def __init__(
        self,
        temperature: float | Sequence[float] = 1000.0,
        eps: float | Sequence[float] = 0.0014,
        clip: bool = False,
        validate: Mapping[str, Any] | None = None,
    ) -> None:
        self.temperatures = numbers(temperature, "odin: temperature", strict=True)
        self.grid = numbers(eps, "odin: eps")
        self.clip, self.validate = bool(clip), None if validate is None else dict(validate)
        needs_choice(self.name, validate, temperature=self.temperatures, eps=self.grid)
        self.chosen = (self.temperatures[0], self.grid[0])
        self.needs_gradient = any(self.grid)

    def parameters(self) -> dict[str, Any]:
        return {
            "temperature": list(self.temperatures),
            "eps": list(self.grid),
            "clip": self.clip,
            "validate": self.validate,
        }

    def _tune(self, reader: Taps, validation: Validation) -> None:
        pairs = [(t, e) for t in self.temperatures for e in self.grid]

        def score(pair: tuple[float, float], x: Tensor) -> Tensor:
            return torch.cat([self._at(reader, x[i : i + 250], *pair) for i in range(0, len(x), 250)])

        self.chosen, _ = best(pairs, score, validation)
        self._source = validation.source

    def _at(self, reader: Taps, x: Tensor, temperature: float, eps: float) -> Tensor:
        if eps > 0:
            leaf = x.detach().requires_grad_(True)
            with torch.enable_grad():
                logits, _ = reader(leaf)
                confidence = torch.log_softmax(logits / temperature, dim=1).amax(dim=1).sum()
            (gradient,) = torch.autograd.grad(confidence, leaf)
            x = x + eps * gradient.sign()
            x = x.clamp(0, 1) if self.clip else x
        with torch.no_grad():
            logits, _ = reader(x)
        return msp_score(logits.double() / temperature)

    def _score_inputs(self, reader: Taps, x: Tensor) -> Tensor:
        return self._at(reader, x, *self.chosen)

    def _score(self, seen: Observations) -> Tensor:
        raise NotImplementedError

    def warnings(self) -> list[str]:
        return [f"chosen on {self._source}"] if self.validate is not None else []

    def summary(self) -> dict[str, float]:
        return {"temperature": self.chosen[0], "eps": self.chosen[1]} if self.validate is not None else {}
