"""Square: random search with square-shaped updates; needs only scores (Andriushchenko et al., ECCV 2020, arXiv 1912.00049)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from robustbench_ext.attacks.base import Attack, Passes
from robustbench_ext.attacks.losses import margin
from robustbench_ext.attacks.search import Search
from robustbench_ext.attacks.threat import flat_norm, per_sample
from robustbench_ext.errors import ConfigError
from robustbench_ext.randomness import SampleRandom

_BLOCK = 64  # queries whose random draws are made at once
_FUSE = 500  # queries from which on a fused copy of the model pays
# Shares of p_init after 10, 50, 200, ... of 10,000 queries (the paper's schedule, stretched to the number of queries).
_SCHEDULE = ((10, 2), (50, 4), (200, 8), (500, 16), (1000, 32), (2000, 64), (4000, 128), (6000, 256), (8000, 512))


def square_share(query: int, queries: int, p_init: float) -> float:
    """The share of pixels that a square covers at a query: p_init, halved at the schedule's marks.

    >>> square_share(0, 5000, 0.8), square_share(4999, 5000, 0.8)
    (0.8, 0.0015625)
    """
    at = int(query / queries * 10_000)
    return p_init / max((divisor for mark, divisor in _SCHEDULE if at > mark), default=1)


@dataclass(frozen=True, kw_only=True)
class Square(Attack):
    """Square attack on the margin loss.

    Linf: start with vertical stripes of +-eps; each query sets one square, in each channel, to +eps or -eps of the clean
    image. L2: start with a grid of bumps; each query moves the energy of one window into another. A change is kept if
    the margin grew. Every sample has its own square.

    Args:
        queries: forward passes a sample may cost (5,000 in the standard ensemble).
        p_init: share of pixels that the first squares cover.
        restarts: runs, each on the samples that still stand.
    Cost: `queries` forward passes, no backward pass.
    """

    queries: int = 5000
    p_init: float = 0.8
    restarts: int = 1

    name: ClassVar[str] = "square"
    access: ClassVar[str] = "score"
    stochastic: ClassVar[bool] = True
    reference: ClassVar[str] = "arXiv 1912.00049"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.queries < 1 or self.restarts < 1:
            raise ConfigError(
                f"square: queries = {self.queries}, restarts = {self.restarts}; expected at least 1 of each"
            )
        if not 0 < self.p_init <= 1:
            raise ConfigError(f"square: p_init = {self.p_init}, expected a number in (0, 1]")

    def cost(self, num_classes: int) -> Passes:
        return Passes(self.restarts * self.queries, 0)

    def _run(self, search: Search) -> None:
        for restart in range(self.restarts):
            search.restart()
            if search.done:
                return
            # The stream of the samples that stand now; those of them that still stand later are found by their position.
            random, positions = search.random.child(f"restart {restart}"), search.index
            if self.norm == "Linf":
                self._linf(search, random, positions)
            else:
                self._l2(search, random, positions)

    def _linf(self, search: Search, random: SampleRandom, positions: Tensor) -> None:
        n, channels, height, width = search.x.shape
        pixels = channels * height * width
        stripes = _signs(random.child("stripes").bits(channels * width)).view(n, channels, 1, width)
        current = search.threat.project(search.x + self.eps * stripes, search.x)
        best, current = self._begin(search, current)
        # What a square is set to: the two faces of the ball inside the box, side by side, (n, 2 C H W).
        low, high = (search.x - self.eps).clamp_min(0.0), (search.x + self.eps).clamp_max(1.0)
        faces = torch.cat([low.flatten(1), high.flatten(1)], dim=1)
        planes = torch.arange(channels, device=faces.device)
        found = search.best_logits[search.index]  # of the first candidate that broke a sample, where there was one
        for block in range(0, 0 if search.done else self.queries - 2, _BLOCK):
            rows = _lookup(positions, search.index)
            draws = random.select(rows).bits(3 * _BLOCK, step=block // _BLOCK).view(-1, _BLOCK, 3)
            # Which face a channel of a square goes to, as a shift into `faces`: (n, block, C).
            signs = ((draws[:, :, 2, None] >> planes) & 1) * pixels
            for query in range(block, min(block + _BLOCK, self.queries - 2)):
                side = _side(square_share(query, self.queries, self.p_init) * height * width, height, width)
                index = _window(draws[:, query - block], side, search.x.shape)
                shift = signs[:, query - block, :, None].expand(-1, -1, side * side).reshape(len(index), -1)
                flat = current.view(len(current), -1)
                old, new = flat.gather(1, index), faces.gather(1, index + shift)
                flat.scatter_(1, index, new)
                logits = search.scores(current)
                value = margin(logits, search.y)
                hits = (value > 0) & (best <= 0)
                if search.gathers:
                    found, value = _gathered(hits, logits, found, best, value)
                elif bool(hits.any()):
                    logits, best, index, old, new, current, draws, signs, faces = search.confirm(
                        hits, current, logits, logits, best, index, old, new, current, draws, signs, faces
                    )
                    if search.done:
                        return
                    value, flat = margin(logits, search.y), current.view(len(current), -1)
                better = value > best
                # Undo in place what did not help: a few pixels instead of a copy of every image.
                flat.scatter_(1, index, torch.where(better[:, None], new, old))
                best = torch.maximum(best, value)
                if search.gathers and (search.due() or query == self.queries - 3):
                    best, current, draws, signs, faces, found = search.confirm(
                        best > 0, current, found, best, current, draws, signs, faces, found, look=True
                    )
                    if search.done:
                        return
        self._end(search, current)

    def _l2(self, search: Search, random: SampleRandom, positions: Tensor) -> None:
        height, width = search.x.shape[2:]
        current = self._onto_sphere(search, _bumps(search.x, random.child("bumps")))
        best, current = self._begin(search, current)
        found = search.best_logits[search.index]
        for block in range(0, 0 if search.done else self.queries - 2, _BLOCK):
            rows = _lookup(positions, search.index)
            draws = random.select(rows).bits(6 * _BLOCK, step=block // _BLOCK).view(-1, _BLOCK, 6)
            for query in range(block, min(block + _BLOCK, self.queries - 2)):
                draw = draws[:, query - block]
                side = _side(square_share(query, self.queries, self.p_init) * height * width, height, width)
                side = min(max(side, 3) | 1, (min(height, width) - 1) | 1)
                proposal = self._onto_sphere(search, self._moved(search, current, draw, side))
                logits = search.scores(proposal)
                value = margin(logits, search.y)
                hits = (value > 0) & (best <= 0)
                if search.gathers:
                    found, value = _gathered(hits, logits, found, best, value)
                elif bool(hits.any()):
                    logits, best, proposal, current, draws = search.confirm(
                        hits, proposal, logits, logits, best, proposal, current, draws
                    )
                    if search.done:
                        return
                    value = margin(logits, search.y)
                better = value > best
                current = torch.where(per_sample(better, current), proposal, current)
                best = torch.where(better, value, best)
                if search.gathers and (search.due() or query == self.queries - 3):
                    best, current, draws, found = search.confirm(
                        best > 0, current, found, best, current, draws, found, look=True
                    )
                    if search.done:
                        return
        self._end(search, current)

    def _begin(self, search: Search, current: Tensor) -> tuple[Tensor, Tensor]:
        """The first query: margins and candidates of the samples that still stand."""
        logits = search.logits(current)
        best, current = search.submit(current, logits, margin(logits, search.y), current)
        if self.queries >= _FUSE:
            search.search_fused()
        return best, current.contiguous()

    def _end(self, search: Search, current: Tensor) -> None:
        """The last query: what the model itself says of the best candidates."""
        if self.queries > 1 and not search.done:
            search.submit(current, search.logits(current))

    def _onto_sphere(self, search: Search, delta: Tensor) -> Tensor:
        length = flat_norm(delta, "L2").clamp_min(1e-12)
        return search.threat.project(search.x + delta * per_sample(self.eps / length, delta), search.x)

    def _moved(self, search: Search, current: Tensor, draw: Tensor, side: int) -> Tensor:
        """The perturbation with the energy of a second window, and what is left to the budget, moved into the first."""
        shape = current.shape
        channels, area = shape[1], side * side
        delta = (current - search.x).reshape(len(current), -1)
        first, second = _window(draw[:, :2], side, shape), _window(draw[:, 2:4], side, shape)
        here = delta.gather(1, first).view(-1, channels, area)
        union = delta.clone().scatter_(1, first, 0.0).scatter_(1, second, 0.0)
        energy = delta.square().sum(dim=1) - union.square().sum(dim=1)
        spare = (self.eps**2 - delta.square().sum(dim=1)).clamp_min(0.0)
        bump = _bump_on(side, current.device)
        tall = (draw[:, 5] & 1).bool()
        shape_of = torch.where(tall[:, None], bump.T.reshape(1, -1), bump.reshape(1, -1))
        sign = ((draw[:, 4, None] >> torch.arange(channels, device=draw.device)) & 1) * 2.0 - 1.0
        fresh = shape_of[:, None] * sign[:, :, None] + here / here.norm(dim=(1, 2), keepdim=True).clamp_min(1e-12)
        fresh = fresh / fresh.norm(dim=2, keepdim=True).clamp_min(1e-12)
        fresh = fresh * ((energy + spare).clamp_min(0.0) / channels).sqrt()[:, None, None]
        return union.scatter_(1, first, fresh.reshape(len(current), -1)).view(shape)


def _gathered(hits: Tensor, logits: Tensor, found: Tensor, best: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """The logits that broke each sample first, (n, K), and margins (n,) that are minus infinity once a sample is broken.

    So a broken sample keeps the candidate that broke it, until it is submitted.
    """
    return torch.where(hits[:, None], logits, found), torch.where(best > 0, -torch.inf, value)


def _signs(bits: Tensor) -> Tensor:
    return (bits & 1).to(torch.float32) * 2.0 - 1.0


def _side(pixels: float, height: int, width: int) -> int:
    return int(min(max(round(pixels**0.5), 1), min(height, width) - 1))


def _lookup(positions: Tensor, index: Tensor) -> Tensor:
    """Where the standing samples `index` are among `positions` (both increasing)."""
    return torch.searchsorted(positions, index)


def _window(draw: Tensor, side: int, shape: torch.Size) -> Tensor:
    """Flat pixel indices of one random square per sample, all channels: (n, C * side * side)."""
    _, channels, height, width = shape
    top, left = draw[:, 0] % (height - side + 1), draw[:, 1] % (width - side + 1)
    return (top * width + left)[:, None] + _offsets(side, channels, height, width, draw.device)


@lru_cache(maxsize=128)
def _offsets(side: int, channels: int, height: int, width: int, device: torch.device) -> Tensor:
    """Flat pixel indices of a square in the corner, all channels: (C * side * side,)."""
    along = torch.arange(side, device=device)
    square = (along[:, None] * width + along[None]).reshape(-1)
    return (torch.arange(channels, device=device)[:, None] * (height * width) + square[None]).reshape(-1)


def _cone(height: int, width: int, like: Tensor) -> Tensor:
    """Concentric rectangles of weight 1, 1/4, 1/9, ... summed inwards, of unit length."""
    rows = torch.minimum(torch.arange(height), torch.arange(height - 1, -1, -1)).to(like)
    columns = torch.minimum(torch.arange(width), torch.arange(width - 1, -1, -1)).to(like)
    middle = max(height, width) // 2 + 1
    depth = torch.minimum(rows[:, None] + middle - (height + 1) // 2, columns[None] + middle - (width + 1) // 2)
    ring = (middle - depth).clamp_min(1.0)  # 1 in the middle, growing outwards
    steps = torch.arange(1, int(ring.max()) + 1, device=like.device, dtype=like.dtype)
    cone: Tensor = (steps[None, None] >= ring[:, :, None]).to(like).mul(1.0 / steps.square()).sum(dim=2)
    unit: Tensor = cone / cone.norm()
    return unit


def _bump(side: int, like: Tensor) -> Tensor:
    """A positive and a negative cone side by side, (side, side), of unit length."""
    half = side // 2
    both = torch.cat([_cone(half, side, like), -_cone(side - half, side, like)]) if half else _cone(side, side, like)
    unit: Tensor = both / both.norm()
    return unit


@lru_cache(maxsize=128)
def _bump_on(side: int, device: torch.device) -> Tensor:
    """`_bump`, made on the CPU once: it is the same on every device."""
    return _bump(side, torch.zeros(1)).to(device)


def _bumps(x: Tensor, random: SampleRandom) -> Tensor:
    """A five-by-five grid of bumps with random signs per sample, channel and tile: L2's first perturbation."""
    n, channels, height, width = x.shape
    side = max(1, min(height, width) // 5)
    delta = torch.zeros_like(x)
    rows, columns = height // side, width // side
    signs = _signs(random.bits(rows * columns * channels)).view(n, channels, rows, columns)
    bump = _bump_on(side, x.device)
    top, left = (height - rows * side) // 2, (width - columns * side) // 2
    tiled = torch.einsum("ncij,ab->nciajb", signs, bump).reshape(n, channels, rows * side, columns * side)
    delta[:, :, top : top + rows * side, left : left + columns * side] = tiled
    return delta
