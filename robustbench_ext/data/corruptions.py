"""Corruptions: batched, on the device of the batch, seeded per sample; severities 1 to 5."""

from __future__ import annotations

from torch import Tensor

from robustbench_ext.randomness import SampleRandom

# Standard deviations of ImageNet-C (Hendrycks and Dietterich, ICLR 2019), for images in [0, 1].
_GAUSSIAN_STD = (0.08, 0.12, 0.18, 0.26, 0.38)


def gaussian_noise(x: Tensor, severity: int, random: SampleRandom) -> Tensor:
    """Add N(0, s) noise with s = 0.08, 0.12, 0.18, 0.26, 0.38 at severities 1 to 5, then clip to [0, 1].

    Args:
        x: float32 (N, C, H, W) in [0, 1].
        severity: 1 (mild) to 5.
        random: the samples' random stream.
    """
    return (x + _GAUSSIAN_STD[severity - 1] * random.normal(x.shape[1:])).clamp(0.0, 1.0)
