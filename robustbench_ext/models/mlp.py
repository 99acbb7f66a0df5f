"""Networks for tables: a multilayer perceptron, and the scaling that lives inside a regressor."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from robustbench_ext.data.columns import Columns
from robustbench_ext.errors import ConfigError, unknown_name

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"relu": nn.ReLU, "silu": nn.SiLU, "tanh": nn.Tanh, "gelu": nn.GELU}


def mlp(
    columns: int, hidden: Sequence[int] = (64, 64), activation: str = "relu", dropout: float = 0.0
) -> nn.Sequential:
    """A multilayer perceptron, (N, columns) to (N, 1): linear, activation and, if asked for, dropout for each hidden layer.

    Args:
        columns: d.
        hidden: widths of the hidden layers.
        activation: relu, silu, tanh or gelu.
        dropout: probability, in [0, 1).
    """
    if isinstance(hidden, int):
        hidden = (hidden,)
    if activation not in ACTIVATIONS:
        raise ConfigError("mlp: " + unknown_name("activation", activation, ACTIVATIONS))
    if not 0 <= dropout < 1 or not hidden or min(hidden) < 1:
        raise ConfigError(
            f"mlp: hidden = {list(hidden)}, dropout = {dropout}; expected widths >= 1 and 0 <= dropout < 1"
        )
    layers: list[nn.Module] = []
    for before, width in zip([columns, *hidden], hidden, strict=False):
        layers += [nn.Linear(before, width), ACTIVATIONS[activation]()]
        layers += [nn.Dropout(dropout)] if dropout else []
    return nn.Sequential(*layers, nn.Linear(hidden[-1], 1))


class Standardized(nn.Module):
    """`target_mean + target_std inner((x - input_mean) / input_std)`: raw units outside, unit variance inside.

    Args:
        inner: (N, d) to (N,) or (N, 1).
        columns: the number of inputs d. The buffers are the identity until `learn`.
    """

    input_mean: Tensor
    input_std: Tensor
    target_mean: Tensor
    target_std: Tensor

    def __init__(self, inner: nn.Module, columns: int) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("input_mean", torch.zeros(columns))
        self.register_buffer("input_std", torch.ones(columns))
        self.register_buffer("target_mean", torch.zeros(()))
        self.register_buffer("target_std", torch.ones(()))

    def learn(self, columns: Columns, targets: np.ndarray) -> Standardized:
        """Take means and standard deviations from the training data; indicators stay 0 and 1."""
        self.input_mean.copy_(torch.from_numpy(np.where(columns.numeric, columns.mean, 0.0)))
        self.input_std.copy_(torch.from_numpy(columns.scale))
        self.target_mean.fill_(float(targets.mean()))
        self.target_std.fill_(float(targets.std()) or 1.0)
        return self

    def scaled(self, x: Tensor) -> Tensor:
        """What training fits: the output before it is scaled back, (N,)."""
        out: Tensor = self.inner((x - self.input_mean) / self.input_std)
        return out.reshape(len(x)) if out.numel() == len(x) else out

    def forward(self, x: Tensor) -> Tensor:
        return self.target_mean + self.target_std * self.scaled(x)
