"""A corruption of your own: a function, named in a suite as `examples/own_corruption.py:scanline`."""

from __future__ import annotations

from torch import Tensor

from robustbench_ext.randomness import SampleRandom


def scanline(x: Tensor, severity: int, random: SampleRandom) -> Tensor:
    """Rows of the image that went dark, each with probability severity / 20.

    Args:
        x: float32 (N, C, H, W) in [0, 1]; severity: 1 to 5.
        random: the samples' own stream: what is drawn from it depends on seed and sample, not on the batch.
    """
    dark = random.uniform((1, x.shape[2], 1)) < severity / 20
    return x.masked_fill(dark, 0.0)
