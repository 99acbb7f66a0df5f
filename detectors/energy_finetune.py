"""Energy-bounded fine-tuning (Liu, Wang, Owens, Li, NeurIPS 2020, arXiv 2010.03759): known inputs low, outliers high.

    L = mean CE(f(x), y) + lambda [ mean (E(x) - m_in)_+^2 + mean (m_out - E(x_out))_+^2 ],   m_in < m_out < 0.

Each group is divided by its own size; no loss outside the band. Energies of different networks are not comparable (a constant
on all logits shifts them), so the published margins (-23, -5 for CIFAR-10, lambda 0.1) hold for the published network only:
`margins` reads them off the network at hand.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robustbench_ext.errors import ConfigError, DataError
from robustbench_ext.models.contract import check_logits
from robustbench_ext.models.energy import marginal_energy
from robustbench_ext.numbers import read_numbers

Batch = tuple[Tensor, Tensor, Tensor]


def energy_bound(inside: Tensor, outside: Tensor, m_in: float, m_out: float) -> Tensor:
    """mean (E_in - m_in)_+^2 + mean (m_out - E_out)_+^2 of energies (n,) and (m,); an empty group counts 0."""
    known = torch.relu(inside - m_in).square().sum() / max(1, len(inside))
    unknown = torch.relu(m_out - outside).square().sum() / max(1, len(outside))
    return known + unknown


def energy_bounded_loss(
    logits: Tensor, labels: Tensor, outlier_logits: Tensor, m_in: float, m_out: float, weight: float = 0.1
) -> Tensor:
    """Cross-entropy on known inputs plus `weight` times the energy bound, a scalar.

    Args:
        logits: (n, K) of known inputs with labels (n,); outlier_logits: (m, K), m may be 0.
    """
    bound = energy_bound(marginal_energy(logits), marginal_energy(outlier_logits), m_in, m_out)
    return F.cross_entropy(logits, labels) + weight * bound


def margins(logits: Tensor, outlier_logits: Tensor, slack: float = 1.0) -> tuple[float, float]:
    """m_in = mean known energy - slack, m_out = mean outlier energy + slack: most samples of both groups have a gradient.

    Raises:
        DataError: the margins are in the wrong order, since outliers have less energy than known inputs already.
    """
    m_in = float(marginal_energy(logits).mean()) - slack
    m_out = float(marginal_energy(outlier_logits).mean()) + slack
    if m_in >= m_out:
        raise DataError(
            f"energy margins: m_in = {m_in:.4g} is not below m_out = {m_out:.4g}: outliers have far less energy than known "
            f"inputs. Raise slack, or give margins of your own."
        )
    return m_in, m_out


@dataclass(frozen=True)
class FineTuning:
    """How to fine-tune; the defaults are the paper's but for the margins, which belong to a network.

    Attributes:
        m_in, m_out: energy margins, m_in < m_out.
        weight: lambda.
        lr, momentum, weight_decay: of SGD with Nesterov momentum; lr falls to `last_lr` along a cosine, step by step.
    """

    m_in: float
    m_out: float
    weight: float = 0.1
    lr: float = 1e-3
    last_lr: float = 1e-6
    momentum: float = 0.9
    weight_decay: float = 5e-4

    def __post_init__(self) -> None:
        read_numbers(self, "energy fine-tuning")
        if self.m_in >= self.m_out or self.weight < 0 or not 0 < self.last_lr <= self.lr:
            raise ConfigError(
                f"energy fine-tuning: m_in = {self.m_in}, m_out = {self.m_out}, weight = {self.weight}, lr = {self.lr}, "
                f"last_lr = {self.last_lr}; expected m_in < m_out, weight >= 0, 0 < last_lr <= lr"
            )


def fine_tune(model: nn.Module, batches: Iterable[Batch], how: FineTuning, steps: int) -> list[float]:
    """Fine-tune a classifier in place; returns the loss of every step.

    Known inputs and outliers go through in one pass in training mode, so batch statistics mix both, as published.

    Args:
        batches: (x, labels, outliers) for each step: float32 (n, C, H, W), int64 (n,), float32 (m, C, H, W) in [0, 1].
        steps: how many batches to take; the cosine needs to know.

    Raises:
        DataError: there are fewer batches than steps.
    """
    optimizer = torch.optim.SGD(
        model.parameters(), how.lr, how.momentum, weight_decay=how.weight_decay, nesterov=how.momentum > 0
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps), how.last_lr)
    modes = [(module, module.training) for module in model.modules()]
    losses: list[float] = []
    model.train()
    try:
        for x, labels, outliers in _first(batches, steps):
            logits = check_logits(model(torch.cat([x, outliers])), len(x) + len(outliers))
            loss = energy_bounded_loss(logits[: len(x)], labels, logits[len(x) :], how.m_in, how.m_out, how.weight)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(float(loss.detach()))
    finally:
        for module, mode in modes:
            module.training = mode
    return losses


def _first(batches: Iterable[Batch], steps: int) -> Iterator[Batch]:
    found = iter(batches)
    for step in range(steps):
        batch = next(found, None)
        if batch is None:
            raise DataError(f"energy fine-tuning: the batches ended after {step} of {steps} steps")
        yield batch
