"""Normalisation inside the model, so that data and budgets always live in [0, 1]."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from robustbench_ext.errors import ModelError


class Normalized(nn.Module):
    """`inner((x - mean) / std)`.

    Args:
        inner: the network as it was trained, (N, C, H, W) in, (N, K) logits out.
        mean, std: one value per channel, or a single value, in units of [0, 1] pixels.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, inner: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std):
            raise ModelError(f"mean has {len(mean)} values and std {len(std)}; expected one each per channel")
        if min(std) <= 0:
            raise ModelError(f"std = {list(std)}: every value must be positive")
        if max(mean) > 1.0 or max(std) > 1.0:
            raise ModelError(
                f"mean = {list(mean)}, std = {list(std)} look like 0..255 units; divide by 255: inputs are in [0, 1]"
            )
        self.inner = inner
        self.training = inner.training
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.inner((x - self.mean) / self.std)
        return logits


def wrap(model: nn.Module, mean: Sequence[float] | None = None, std: Sequence[float] | None = None) -> nn.Module:
    """Declare how `model` wants its inputs normalised; the result takes raw images in [0, 1].

    With neither mean nor std the model is returned as it is: its inputs are raw already.

    >>> wrap(resnet, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))  # doctest: +SKIP
    """
    if mean is None and std is None:
        return model
    if isinstance(model, Normalized):
        raise ModelError("the model is normalised already; a second normalisation would be applied on top of the first")
    channels = len(mean if mean is not None else std or ())
    return Normalized(
        model, mean if mean is not None else [0.0] * channels, std if std is not None else [1.0] * channels
    )
