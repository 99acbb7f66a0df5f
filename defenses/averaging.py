"""Averages of the weights along a training: exponential (EMA), or equal over the ends of epochs (SWA, Izmailov et al. 2018)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Average:
    """A running average of a model's weights and batch-norm statistics; integer buffers are copied.

    The statistics are averaged like the weights, which costs no pass over the data. (Recomputing them for the averaged
    weights would need the inputs that each method trains on, attacks included.)
    """

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}
        self.count = 0

    def update(self, model: nn.Module, decay: float | None) -> None:
        """Add the model as it is: with weight 1 - decay, or with equal weight among all so far for None.

        The decay of a young exponential average is lower, min(decay, (1 + n) / (10 + n)), so that it forgets the start.
        """
        self.count += 1
        share = 1 / self.count if decay is None else 1 - min(decay, self.count / (9 + self.count))
        with torch.no_grad():
            for name, value in model.state_dict().items():
                if name not in self.values:
                    self.values[name] = value.detach().clone()
                elif value.is_floating_point():
                    self.values[name].lerp_(value, share)
                else:
                    self.values[name].copy_(value)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """The model with the averaged values inside, with its own again afterwards; unchanged before the first update."""
        if not self.count:
            yield
            return
        own = {name: value.detach().clone() for name, value in model.state_dict().items()}
        model.load_state_dict(self.values)
        try:
            yield
        finally:
            model.load_state_dict(own)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"values": self.values, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.values, self.count = dict(state["values"]), int(state["count"])
