"""The inner maximisation of adversarial training: a fixed number of sign or normalised steps, nothing else.

Training needs no verdicts, so this has none of `Search`'s bookkeeping: one forward and one backward pass a step, no
sample leaves. It works on the bare module (never through a distributed wrapper) and takes gradients of the input only.
"""

from __future__ import annotations

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


@dataclass(frozen=True)
class InnerAttack:
    """How a training batch is attacked.

    Attributes:
        objective: "ce", or "kl": KL(p(x) || p(x')), whose gradient at x' = x is zero and needs a Gaussian start.
        start: "uniform" in the threat model, or "gaussian": x + 0.001 N(0, 1), not projected before the first step.
        steps, step_size: gradient steps and their size; 2.5 eps / steps by default.
        mode: "eval" (running batch-norm statistics, the published way of all methods here) or "train".
    """

    threat: Threat
    steps: int
    step_size: float | None = None
    objective: Objective = "ce"
    start: Start = "uniform"
    mode: Literal["eval", "train"] = "eval"

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, random: SampleRandom, step: int = 0) -> Tensor:
        """Adversarial inputs for one batch, detached, inside the threat model.

        Args:
            random: the samples' stream; `step` tells the draws of different epochs apart.
        """
        if self.threat.eps == 0 or self.steps == 0:
            return x.clone()
        size = self.step_size if self.step_size is not None else 2.5 * self.threat.eps / self.steps
        if self.start == "uniform":
            candidates = self.threat.random_point(x, random, step=step)
        else:
            candidates = x + 0.001 * random.normal(x.shape[1:], step=step)
        with frozen_eval(model), InputGradients():
            model.train(self.mode == "train")
            target = None
            if self.objective == "kl":
                with torch.no_grad():
                    target = F.log_softmax(model(x), dim=1)
            for _ in range(self.steps):
                candidates = candidates.detach().requires_grad_(True)
                logits = model(candidates)
                if target is None:
                    loss = F.cross_entropy(logits, y, reduction="sum")
                else:
                    loss = F.kl_div(F.log_softmax(logits, dim=1), target, reduction="sum", log_target=True)
                (gradient,) = torch.autograd.grad(loss, candidates)
                with torch.no_grad():
                    candidates = self.threat.project(candidates + size * self.threat.steepest(gradient), x)
        return candidates.detach()
