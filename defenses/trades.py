"""TRADES (Zhang et al., ICML 2019, arXiv 1901.08573)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from defenses.base import Batch, Defense, Loss
from robustbench_ext.attacks.inner import Objective, Start
from robustbench_ext.errors import ConfigError
from robustbench_ext.numbers import read_numbers


def kl_natural_adversarial(logits: Tensor, logits_adv: Tensor) -> Tensor:
    """KL(p(x) || p(x*)) per sample, (B,), from log-softmax; gradients flow through both arguments."""
    return F.kl_div(
        F.log_softmax(logits_adv, dim=1), F.log_softmax(logits, dim=1), reduction="none", log_target=True
    ).sum(dim=1)


@dataclass(frozen=True, kw_only=True)
class TRADES(Defense):
    """min E [ CE(f(x), y) + beta max_{x'} KL(p(x) || p(x')) ].

    The natural distribution is the first argument of the divergence. The attack maximises the same divergence from a
    Gaussian start (at x' = x its gradient is exactly zero). The published script runs the natural batch through the
    network twice in training mode, which weighs natural data 2:1 in the batch-norm statistics; here it runs once.

    Args:
        beta: weight of the divergence; 6 on CIFAR-10, 1 in the published MNIST script. 0 is standard training.
    """

    beta: float = 6.0

    name: ClassVar[str] = "trades"
    objective: ClassVar[Objective | None] = "kl"
    start: ClassVar[Start] = "gaussian"
    reference: ClassVar[str] = "arXiv 1901.08573"

    def __post_init__(self) -> None:
        read_numbers(self, "trades")
        if self.beta < 0:
            raise ConfigError(f"trades: beta = {self.beta}, expected a number >= 0")

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        logits = model(batch.x)
        if self.beta == 0:
            return Loss(F.cross_entropy(logits, batch.y))
        natural = F.cross_entropy(logits, batch.y)
        divergence = kl_natural_adversarial(logits, model(batch.x_adv)).mean()
        return Loss(natural + self.beta * divergence, {"ce": float(natural.detach()), "kl": float(divergence.detach())})
