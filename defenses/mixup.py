"""mixup: inputs and labels of two samples mixed (Zhang, Cisse, Dauphin, Lopez-Paz, ICLR 2018, arXiv 1710.09412).

x' = l x + (1 - l) x_pi,   y' = l y + (1 - l) y_pi,      l ~ Beta(alpha, alpha), one for the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from defenses.base import Batch, Defense, Loss, at_least, cross_entropy
from robustbench_ext.numbers import read_numbers


@dataclass(frozen=True, kw_only=True)
class Mixup(Defense):
    """Cross-entropy on mixed samples.

    Args:
        alpha: of the Beta distribution; the paper has 0.1 to 0.4 on ImageNet and 1 on CIFAR.
    """

    alpha: float = 0.2

    name: ClassVar[str] = "mixup"
    select_by: ClassVar[str] = "clean"
    soft_targets: ClassVar[bool] = True
    reference: ClassVar[str] = "arXiv 1710.09412"

    def __post_init__(self) -> None:
        read_numbers(self, "mixup")
        at_least(self.alpha, 1e-3, "mixup: alpha")

    def loss(self, model: nn.Module, batch: Batch, state: nn.Module | None = None) -> Loss:
        kept = torch.distributions.Beta(self.alpha, self.alpha).sample().to(batch.x)
        other = torch.randperm(len(batch.x)).to(batch.x.device)
        logits = model(kept * batch.x + (1 - kept) * batch.x[other])
        targets = batch.targets
        if targets is None:
            targets = F.one_hot(batch.y, logits.shape[1]).to(logits.dtype)
        mixed = Batch(batch.x, batch.y, batch.x, targets=kept * targets + (1 - kept) * targets[other])
        return Loss(cross_entropy(logits, mixed).mean())
