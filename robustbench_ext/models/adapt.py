"""Data of another size or colour than a network takes: said, never done in silence."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from robustbench_ext.errors import ConfigError
from robustbench_ext.models.options import whole


class Adapted(nn.Module):
    """`inner` behind a resize and a repetition of the grey channel; both are differentiable, so attacks see through them.

    Resizing is bilinear with antialiasing: a weighted mean of pixels, so images stay in [0, 1] and normalisation commutes with
    it. Budgets stay in the data's own pixels.

    Args:
        inner: the network, (N, channels, height, width) in.
        size: (height, width) that it is given; None leaves the size alone.
        channels: that it is given; images must have as many, or one. None leaves them alone.
    """

    def __init__(self, inner: nn.Module, size: tuple[int, int] | None, channels: int | None) -> None:
        super().__init__()
        self.inner, self.size, self.channels = inner, size, channels
        self.training = inner.training

    def extra_repr(self) -> str:
        return f"size={self.size}, channels={self.channels}"

    def forward(self, x: Tensor) -> Tensor:
        if self.size is not None and tuple(x.shape[2:]) != self.size:
            x = F.interpolate(x, self.size, mode="bilinear", antialias=True, align_corners=False)
        if self.channels is not None and x.shape[1] != self.channels:
            x = x.expand(-1, self.channels, -1, -1)
        logits: Tensor = self.inner(x)
        return logits


def adapted_shape(resize: Any, channels: Any, shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """The (C, H, W) that a network is given.

    Args:
        resize: a side in pixels, or [height, width]; channels: a number, for grey images. None for neither.
        shape: (C, H, W) of the data.

    Raises:
        ConfigError: no such size, or channels that cannot be made of the data's.
    """
    height, width = shape[1:]
    if resize is not None:
        sides = resize if isinstance(resize, (list, tuple)) else [resize, resize]
        if len(sides) != 2:
            raise ConfigError(f"resize = {resize!r}, expected a side in pixels, or [height, width]")
        height, width = (whole(side, 1, "resize") for side in sides)
    count = shape[0] if channels is None else whole(channels, 1, "channels")
    if shape[0] not in (1, count):
        raise ConfigError(f"channels = {count}: the data has {shape[0]}; only one grey channel can be repeated")
    return count, height, width


def adapt(module: nn.Module, shape: tuple[int, int, int], given: tuple[int, int, int]) -> tuple[nn.Module, list[str]]:
    """The module behind what turns images of `shape` into images of the shape that it is `given`, and notes that say so."""
    if given == shape:
        return module, []
    notes = []
    if given[1:] != shape[1:]:
        notes.append(f"inputs are resized from {_size(shape[1:])} to {_size(given[1:])} inside the model")
    if given[0] != shape[0]:
        notes.append(f"the grey channel is repeated {given[0]} times inside the model")
    size, channels = (
        None if mine == theirs else theirs for mine, theirs in ((shape[1:], given[1:]), (shape[0], given[0]))
    )
    return Adapted(module, size, channels), notes  # type: ignore[arg-type]


def advice(made_for: tuple[int, int, int] | None, given: tuple[int, int, int]) -> list[str]:
    """A note where a model was made for other inputs than it is given."""
    if made_for is None or given == made_for:
        return []
    side = str(made_for[1]) if made_for[1] == made_for[2] else str(list(made_for[1:]))
    options = [f"resize={side}"] * (given[1:] != made_for[1:]) + [f"channels={made_for[0]}"] * (given[0] != made_for[0])
    return [
        f"the model was made for inputs {_size(made_for)} and is given {_size(given)} as they are: it may be less accurate, or "
        f"refuse them. #{'#'.join(options)} behind its name (or kwargs in a suite) adapts them inside the model"
    ]


def _size(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
