"""Random views of training images: corruptions, shifted crops, mirror images, Cutout (DeVries, Taylor, 2017, arXiv 1708.04552)
and CutMix (Yun et al., ICCV 2019, arXiv 1905.04899).

    CutMix:  x~_i = x_i outside a box, x_j inside it;  y~_i = lambda_i y_i + (1 - lambda_i) y_j,
             lambda ~ Beta(alpha, alpha); the box has sides sqrt(1 - lambda) H and sqrt(1 - lambda) W, its centre is a
             uniform pixel, the border clips it, and lambda_i then becomes the share of pixels that x_i has kept.

Every draw is a function of (seed, sample id, step), so a sample's view does not depend on its batch. Only CutMix's
partner j does, which is another image of the batch: the samples are put into a circle by random words of their own, and
each takes from its successor. So nobody is its own partner and everybody is a partner once, in whatever order the batch
comes. (The published code draws one box and one lambda for a whole batch and permutes it, fixed points allowed.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from scipy import special
from torch import Tensor
from torch.nn import functional as F

from defenses.base import at_least, one_of, read_booleans, share
from robustbench_ext.catalog import CORRUPTIONS
from robustbench_ext.errors import ConfigError
from robustbench_ext.numbers import read_numbers
from robustbench_ext.randomness import SampleRandom


@dataclass(frozen=True)
class Augmentation:
    """What is done to training images before they are attacked; by default nothing.

    Args:
        crop: pixels added to every side before a random crop back to the size; 4 is usual for 32x32.
        crop_mode: what is added: "zero" (black) or "reflect" (the image mirrored at its border pixels).
        flip: mirror left and right with probability 1/2.
        cutout: side of a square around a random pixel that becomes black, clipped at the border; 0 for none. (The
            published code erases after normalisation, that is to the data set's mean colour.)
        cutmix: alpha of CutMix's Beta(alpha, alpha), 1 in the paper; 0 for none.
        cutmix_prob: probability that a sample is mixed at all; published: 0.5 on CIFAR, 1 on ImageNet.
        corruptions: names of corruptions (`rbx list corruptions`), one of which each image gets, chosen anew in every epoch;
            before everything else.
        severity: of the corruptions, 1 to 5.
        corruption_prob: probability that an image is corrupted at all.
    """

    crop: int = 0
    crop_mode: Literal["zero", "reflect"] = "zero"
    flip: bool = False
    cutout: int = 0
    cutmix: float = 0.0
    cutmix_prob: float = 1.0
    corruptions: tuple[str, ...] = ()
    severity: int = 5
    corruption_prob: float = 1.0

    def __post_init__(self) -> None:
        read_numbers(self, "augmentation")
        one_of(self.crop_mode, ("zero", "reflect"), "augmentation: crop_mode")
        read_booleans(self, "augmentation")
        for name in ("crop", "cutout", "cutmix"):
            at_least(getattr(self, name), 0, f"augmentation: {name}")
        for name in ("cutmix_prob", "corruption_prob"):
            share(getattr(self, name), f"augmentation: {name}")
        names = (self.corruptions,) if isinstance(self.corruptions, str) else tuple(map(str, self.corruptions))
        object.__setattr__(self, "corruptions", names)
        for name in names:
            CORRUPTIONS.get(name)
        if names and self.severity not in (1, 2, 3, 4, 5):
            raise ConfigError(f"augmentation: severity = {self.severity}, expected 1, 2, 3, 4 or 5")

    def augment(self, x: Tensor, random: SampleRandom, step: int) -> Tensor:
        """Corrupt, crop, flip, then Cutout.

        Args:
            x: (B, C, H, W) in [0, 1]; not changed. Returned as it is where all of them are off.
            random: of these B samples, on the device of x.
            step: the epoch; another step gives another view.

        Returns:
            (B, C, H, W): pixels of the image (corrupted or not), and zeros.

        Raises:
            ConfigError: a crop or square too large for the image, or random numbers of other samples.
        """
        _check(x, random)
        side = min(x.shape[2:])
        if self.crop >= side:
            raise ConfigError(
                f"augmentation: crop = {self.crop} for images of {x.shape[2]}x{x.shape[3]}, expected less than {side}"
            )
        if self.cutout > side:
            raise ConfigError(
                f"augmentation: cutout = {self.cutout} for images of {x.shape[2]}x{x.shape[3]}, expected at most {side}"
            )
        if self.corruptions:
            x = self._corrupt(x, random, step)
        if self.crop:
            offsets = _integers(random.child("crop"), (2 * self.crop + 1, 2 * self.crop + 1), step)
            x = windows(x, self.crop, self.crop_mode, offsets)
        if self.flip:
            mirrored = _integers(random.child("flip"), (2,), step).bool()
            x = torch.where(mirrored[:, :, None, None], x.flip(3), x)
        if self.cutout:
            centres = _integers(random.child("cutout"), x.shape[2:], step)
            sides = torch.full_like(centres, self.cutout)
            x = torch.where(boxes(centres, sides, x.shape[2], x.shape[3])[:, None], 0.0, x)
        return x

    def _corrupt(self, x: Tensor, random: SampleRandom, step: int) -> Tensor:
        x = x.clone()
        chosen = _integers(random.child("corruption"), (len(self.corruptions),), step)[:, 0]
        touched = torch.from_numpy(_unit(random.child("corruption/prob"), step) < self.corruption_prob).to(x.device)
        for i, name in enumerate(self.corruptions):
            rows = ((chosen == i) & touched).nonzero()[:, 0]
            if len(rows):
                # A corruption draws from the stream's first words: another epoch needs a stream of its own.
                own = random.select(rows).child(f"corruption/{name}/{step}")
                x[rows] = CORRUPTIONS.load(name)(x[rows], self.severity, own)
        return x

    def mix(self, x: Tensor, y: Tensor, num_classes: int, random: SampleRandom, step: int) -> tuple[Tensor, Tensor]:
        """CutMix.

        Args:
            x, y: images (B, C, H, W), not changed, and labels (B,).
            random: of these B samples, on the device of x.
            step: the epoch; another step gives another mix.

        Returns:
            Mixed images (B, C, H, W) and target probabilities, float32 (B, num_classes), whose rows sum to 1. Where CutMix is
            off, x as it is and one-hot labels; a single image has no partner and stays as it is.

        Raises:
            ConfigError: random numbers of other samples.
        """
        _check(x, random)
        targets = F.one_hot(y, num_classes).float()
        if self.cutmix == 0 or len(x) < 2:
            return x, targets
        height, width = x.shape[2:]
        partner = _successors(random.child("cutmix/partner"), step)
        # The inverse of Beta's distribution function at 52-bit uniforms: exact, one draw per sample, no rejection. It is
        # computed by SciPy in float64 on the CPU, so that boxes are the same on every device.
        uniform = _unit(random.child("cutmix/lambda"), step)
        root = np.sqrt(1.0 - special.betaincinv(self.cutmix, self.cutmix, uniform))
        sides = torch.from_numpy(np.rint(np.stack([root * height, root * width], axis=1)).astype(np.int64))
        mixed = _unit(random.child("cutmix/prob"), step) < self.cutmix_prob
        sides = (sides * torch.from_numpy(mixed)[:, None]).to(x.device)
        inside = boxes(_integers(random.child("cutmix/centre"), (height, width), step), sides, height, width)
        kept = 1.0 - inside.sum(dim=(1, 2), dtype=torch.float32)[:, None] / (height * width)
        return torch.where(inside[:, None], x[partner], x), kept * targets + (1.0 - kept) * targets[partner]


def windows(x: Tensor, pad: int, mode: str, offsets: Tensor) -> Tensor:
    """Of every image, padded on all sides, one window of the image's own size.

    Args:
        x: (B, C, H, W).
        pad: pixels, fewer than the sides have.
        mode: what is added, "zero" or "reflect" (mirrored, without repeating the border pixel).
        offsets: int64 (B, 2), rows and columns of the windows' corners in the padded images, 0 to 2 pad.
    """
    padded = F.pad(x, (pad,) * 4, mode="reflect" if mode == "reflect" else "constant")
    views = padded.unfold(2, x.shape[2], 1).unfold(3, x.shape[3], 1)  # (B, C, 2 pad + 1, 2 pad + 1, H, W), no copy
    return views[torch.arange(len(x), device=x.device), :, offsets[:, 0], offsets[:, 1]]


def boxes(centres: Tensor, sides: Tensor, height: int, width: int) -> Tensor:
    """Masks (B, height, width), true inside a box of `sides` pixels round a centre pixel, clipped at the border.

    Args:
        centres, sides: int64 (B, 2), rows then columns. Of an even side, one pixel more lies before the centre.
    """
    first = centres - sides // 2
    inside = []
    for axis, size in enumerate((height, width)):
        pixel = torch.arange(size, device=centres.device)
        start = first[:, axis, None]
        inside.append((pixel >= start) & (pixel < start + sides[:, axis, None]))
    return inside[0][:, :, None] & inside[1][:, None, :]


def _check(x: Tensor, random: SampleRandom) -> None:
    if x.ndim != 4 or len(x) != len(random.keys):
        raise ConfigError(
            f"augmentation: images of shape {tuple(x.shape)} with random numbers of {len(random.keys)} samples, expected "
            f"(B, C, H, W) and a SampleRandom of the same B ids"
        )


def _integers(random: SampleRandom, below: tuple[int, ...] | torch.Size, step: int) -> Tensor:
    """Uniform integers in [0, n) for each n of `below`, int64 (B, len(below)), equally likely up to a share of n / 2^32."""
    bounds = torch.tensor(below, device=random.keys.device)
    return (random.bits(len(below), step) * bounds) >> 32


def _unit(random: SampleRandom, step: int) -> np.ndarray:
    """Uniform float64 in (0, 1), (B,), with 52 random bits each (with the half, all that float64 holds), on the CPU."""
    words = random.bits(2, step).cpu().numpy()
    return np.asarray(((words[:, 0] >> 6) * 2.0**26 + (words[:, 1] >> 6) + 0.5) * 2.0**-52)


def _successors(random: SampleRandom, step: int) -> Tensor:
    """For each sample the next one of a random circle through all of them, int64 (B,)."""
    words = random.bits(2, step)
    order = torch.argsort((words[:, 0] << 30) | (words[:, 1] >> 2))  # 62 bits: equal ones do not happen
    successors = torch.empty_like(order)
    successors[order] = order.roll(-1)
    return successors
