"""Losses that attacks maximise: (logits (N, K), labels (N,)) -> (N,), larger is nearer to a mistake."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from robustbench_ext.errors import ConfigError, unknown_name

Loss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """-log p_y, natural logarithm."""
    return F.cross_entropy(logits, labels, reduction="none")


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """The best wrong logit minus the true one: positive where the sample is misclassified."""
    true = logits.gather(1, labels[:, None])[:, 0]
    wrong = logits.scatter(1, labels[:, None], -torch.inf).amax(dim=1)
    return wrong - true


LOSSES: dict[str, Loss] = {"ce": cross_entropy, "margin": margin}


def get_loss(name: str) -> Loss:
    """The loss of that name."""
    if name not in LOSSES:
        raise ConfigError(unknown_name("attack loss", name, LOSSES))
    return LOSSES[name]
