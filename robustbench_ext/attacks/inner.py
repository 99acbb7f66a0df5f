"""The inner maximisation of adversarial training: a fixed number of sign or normalised steps, nothing else.

Training needs no verdicts, so this has none of `Search`'s bookkeeping: one forward and one backward pass a step, no
sample leaves. It works on the bare module (never through a distributed wrapper) and takes gradients of the input only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robustbench_ext.attacks.threat import Threat
from robustbench_ext.models.contract import frozen_eval
from robustbench_ext.models.gradients import InputGradients
from robustbench_ext.randomness import SampleRandom

Objective = Literal["ce", "kl"]
Start = Literal["uniform", "gaussian"]
Mode = Literal["eval", "train"]


@dataclass(frozen=True)
class Crafted:
    """What an inner attack made of a batch.

    Attributes:
        x_adv: (B, C, H, W), detached, inside the threat model.
        steps_correct: int64 (B,), how many of the iterates x^0 ... x^(n-1) were classified correctly, looked at before
            each step; None where it was not asked for.
    """

    x_adv: Tensor
    steps_correct: Tensor | None = None


@dataclass(frozen=True)
class InnerAttack:
    """How a training batch is attacked.

    Attributes:
        objective: "ce", or "kl": KL(p(x) || p(x')), whose gradient at x' = x is zero and needs a Gaussian start.
        start: "uniform" in the threat model, or "gaussian": x + 0.001 N(0, 1), not projected before the first step.
        steps, step_size: gradient steps and their size; 2.5 eps / steps by default.
        mode: "eval" (running batch-norm statistics) or "train" (the batch's own). In training mode the running
            statistics are updated by every pass of the attack as well, as in the public scripts that do so.
        count: count the iterates that are still classified correctly; costs no pass.
    """

    threat: Threat
    steps: int
    step_size: float | None = None
    objective: Objective = "ce"
    start: Start = "uniform"
    mode: Mode = "eval"
    count: bool = False

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, random: SampleRandom, step: int = 0) -> Tensor:
        """Adversarial inputs for one batch, detached, inside the threat model.

        Args:
            random: the samples' stream; `step` tells the draws of different epochs apart.
        """
        return self.craft(model, x, y, random, step).x_adv

    def craft(
        self, model: nn.Module, x: Tensor, y: Tensor, random: SampleRandom, step: int = 0, targets: Tensor | None = None
    ) -> Crafted:
        """Adversarial inputs and what was seen on the way.

        Args:
            targets: (B, K) probabilities that replace the labels in the cross-entropy (mixed labels).
        """
        counts = torch.zeros_like(y) if self.count else None
        if self.threat.eps == 0 or self.steps == 0:
            if counts is not None and self.steps:  # the input itself is every iterate
                with torch.no_grad(), attacked_in(model, self.mode):
                    counts += self.steps * (model(x).argmax(dim=1) == y)
            return Crafted(x.clone(), counts)
        size = self.step_size if self.step_size is not None else 2.5 * self.threat.eps / self.steps
        if self.start == "uniform":
            candidates = self.threat.random_point(x, random, step=step)
        else:
            candidates = x + 0.001 * random.normal(x.shape[1:], step=step)
        with attacked_in(model, self.mode):
            natural = None
            if self.objective == "kl":
                with torch.no_grad():
                    natural = F.log_softmax(model(x).float(), dim=1)
            for _ in range(self.steps):
                candidates = candidates.detach().requires_grad_(True)
                logits = model(candidates).float()
                if counts is not None:
                    counts += logits.detach().argmax(dim=1) == y
                if natural is None:
                    loss = F.cross_entropy(logits, y if targets is None else targets, reduction="sum")
                else:
                    loss = F.kl_div(F.log_softmax(logits, dim=1), natural, reduction="sum", log_target=True)
                (gradient,) = torch.autograd.grad(loss, candidates)
                with torch.no_grad():
                    candidates = self.threat.project(candidates + size * self.threat.steepest(gradient), x)
        return Crafted(candidates.detach(), counts)


@contextmanager
def attacked_in(model: nn.Module, mode: Mode) -> Iterator[None]:
    """The model with frozen parameters in that mode; every module's own mode and flags come back afterwards."""
    with frozen_eval(model), InputGradients():
        model.train(mode == "train")
        yield
