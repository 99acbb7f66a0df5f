"""Rotations and translations (Engstrom et al., ICML 2019, arXiv 1712.02779)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from robustbench_ext.attacks.base import Attack, Passes
from robustbench_ext.attacks.search import Search
from robustbench_ext.errors import ConfigError

METHODS = ("random", "grid")
PADDINGS = ("zeros", "border")


@dataclass(frozen=True, kw_only=True)
class Spatial(Attack):
    """x' is x turned about its centre by an angle, then shifted: bilinear interpolation, the size of x.

    Not a ball of a norm: the threat model is every angle up to `degrees` with every shift up to `pixels`, so `eps` must be
    left out. Norms are reported as the L2 size of the change. Needs decisions alone.

    Args:
        degrees, pixels: the largest angle, and the largest shift in each direction (30 and 3 in the paper).
        method: "random": `tries` random angles and shifts ("worst of k"). "grid": every combination of `angles` and, in
            both directions, `shifts` values that are evenly spaced from end to end; an odd number includes 0.
        tries: random points a sample may cost (10 in the paper).
        angles, shifts: of the grid, 31 x 5 x 5 in the paper.
        padding: "zeros": what comes in from outside is black, as in the paper. "border": the nearest pixel.
    Cost: `tries`, or the size of the grid, forward passes, beside the shared clean pass.
    """

    eps: float = math.inf
    norm: str = "spatial"
    degrees: float = 30.0
    pixels: float = 3.0
    method: str = "random"
    tries: int = 10
    angles: int = 31
    shifts: int = 5
    padding: str = "zeros"

    name: ClassVar[str] = "spatial"
    norms: ClassVar[tuple[str, ...]] = ("spatial",)
    access: ClassVar[str] = "decision"
    stochastic: ClassVar[bool] = True
    reference: ClassVar[str] = "arXiv 1712.02779"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.degrees <= 180 or self.pixels < 0:
            raise ConfigError(
                f"spatial: degrees = {self.degrees}, pixels = {self.pixels}; expected degrees in [0, 180] and pixels >= 0"
            )
        if self.method not in METHODS or self.padding not in PADDINGS:
            raise ConfigError(
                f"spatial: method = {self.method!r}, padding = {self.padding!r}; expected a method of "
                f"{', '.join(METHODS)} and a padding of {', '.join(PADDINGS)}"
            )
        if min(self.tries, self.angles, self.shifts) < 1:
            raise ConfigError(
                f"spatial: tries = {self.tries}, angles = {self.angles}, shifts = {self.shifts}; expected at least 1 of each"
            )

    def cost(self, num_classes: int) -> Passes:
        tries = self.tries if self.method == "random" else self.angles * self.shifts**2
        # Apparent breaks of a randomised model, or at lower precision, are looked at again.
        looks = 1 if self.draws == 1 and self.precision == "float32" else 2
        return Passes(looks * self.draws * tries, 0)

    def _run(self, search: Search) -> None:
        for angle, across, down in self._points(search):
            x = moved(search.x, angle, across, down, self.padding)
            search.submit(x, search.logits(x))
            if search.done:
                return

    def _points(self, search: Search) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Angles and shifts, each (n,), of the samples that stand when they are asked for."""
        if self.method == "random":
            for attempt in range(self.tries):
                draw = search.random.uniform((3,), -1.0, 1.0, step=attempt)
                yield self.degrees * draw[:, 0], self.pixels * draw[:, 1], self.pixels * draw[:, 2]
            return
        shifts = _spaced(self.pixels, self.shifts)
        for point in itertools.product(_spaced(self.degrees, self.angles), shifts, shifts):
            angle, across, down = (torch.full((len(search.x),), value, device=search.x.device) for value in point)
            yield angle, across, down


def _spaced(end: float, count: int) -> list[float]:
    """`count` values evenly spaced over [-end, end]; the middle, 0, where it is one."""
    return [0.0] if count == 1 else [end * (2 * i - (count - 1)) / (count - 1) for i in range(count)]


def moved(x: Tensor, degrees: Tensor, across: Tensor, down: Tensor, padding: str = "zeros") -> Tensor:
    """Images x (n, C, H, W) turned counter-clockwise by `degrees` about their centres, then shifted, each (n,).

    Args:
        across, down: shifts to the right and downwards, in pixels.
        padding: "zeros" or "border": what comes in from outside.
    """
    height, width = x.shape[2:]
    angle = torch.deg2rad(degrees)
    cosine, sine = torch.cos(angle), torch.sin(angle)
    # Where each pixel of the result comes from, in the image's own coordinates from -1 to 1 (pixels are W / 2 and H / 2 to
    # the unit): shift back, then turn back. The y axis points down.
    left, up = -2.0 * across / width, -2.0 * down / height
    rows = (
        (cosine, -sine * height / width, cosine * left - sine * up * height / width),
        (sine * width / height, cosine, sine * width / height * left + cosine * up),
    )
    matrix = torch.stack([torch.stack(row, dim=1) for row in rows], dim=1)
    grid = F.affine_grid(matrix, list(x.shape), align_corners=False)
    found = F.grid_sample(x, grid, mode="bilinear", padding_mode=padding, align_corners=False).clamp(0.0, 1.0)
    # Interpolation at the pixels themselves is exact up to rounding only; no motion is no change.
    still = (degrees == 0) & (across == 0) & (down == 0)
    return torch.where(still.view(-1, 1, 1, 1), x, found)
