"""Entropy of the predicted distribution (used for unknown inputs by Macedo et al. 2019, arXiv 1908.05569, among others)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from detectors.base import Detector
from robustbench_ext.models.observe import Observations


def entropy(logits: Tensor) -> Tensor:
    """-sum_k p_k log p_k in nats, in [0, log K], shape (N,), in float64."""
    log_p = torch.log_softmax(logits.double(), dim=1)
    return -(log_p.exp() * log_p).sum(dim=1)


class Entropy(Detector):
    """score = entropy of softmax(logits)."""

    name: ClassVar[str] = "entropy"
    reference: ClassVar[str] = "arXiv 1908.05569"

    def _score(self, seen: Observations) -> Tensor:
        return entropy(seen.logits)
