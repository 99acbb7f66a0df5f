"""Conditional coverage: a method that covers 90 % of all samples may cover 50 % of those that matter.

**By groups.** The lowest of several measured coverages is biased downwards, and a small group hides a bad one. So the
intervals of all groups hold at once (Wilson at level 1 - 0.05 / G), and the worst group's runs from the lowest lower to the
lowest upper limit.

**By slabs** {x : a <= v.x <= b} that hold at least a share delta of the inputs: the lowest coverage over all v, a and b
(Cauchois, Gupta, Duchi 2021, arXiv 2004.10181). A search over random directions finds a bad slab on one part of the samples
even where coverage is the same everywhere; so the slab that was found is measured on the others (Romano, Sesia, Candes 2020,
arXiv 2006.02544). That value is an honest coverage of one slab, and no less than the lowest coverage of any on average.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from robustbench_ext.errors import DataError
from robustbench_ext.metrics.binned import equal_mass_index
from robustbench_ext.metrics.estimate import LEVEL, Estimate, require
from robustbench_ext.metrics.intervals import hash_seed, proportion
from robustbench_ext.metrics.regression import check_intervals

STRATA = 5
DELTA, DIRECTIONS = 0.1, 1000
_SEARCHED = 10_000  # samples at most that a slab is chosen on
_BLOCK = 1 << 21


def coverage_by_group(covered: np.ndarray, groups: np.ndarray) -> dict[int | str, Estimate]:
    """Coverage of each group of samples, with simultaneous intervals.

    Args:
        covered: bool (N,); groups: (N,), a number or a name for each sample.
    """
    require("coverage by group", covered=covered, groups=groups)
    names, index = np.unique(groups, return_inverse=True)
    level = 1 - (1 - LEVEL) / len(names)
    order = np.argsort(index, kind="stable")
    parts = np.split(covered[order], np.cumsum(np.bincount(index))[:-1])
    return {
        name.item(): replace(proportion(part, level), ci_method="Wilson, Bonferroni", level=LEVEL)
        for name, part in zip(names, parts, strict=True)
    }


def worst_group_coverage(covered: np.ndarray, groups: np.ndarray) -> tuple[Estimate, int | str]:
    """The lowest coverage of any group, and that group (the first of equals)."""
    found = coverage_by_group(covered, groups)
    worst = min(found, key=lambda name: found[name].value)
    low, high = min(e.ci_low for e in found.values()), min(e.ci_high for e in found.values())
    return replace(found[worst], ci_low=low, ci_high=high), worst


def width_stratified_coverage(
    covered: np.ndarray, low: np.ndarray, high: np.ndarray, strata: int = STRATA
) -> tuple[Estimate, int]:
    """The lowest coverage of `strata` groups of equal counts by the width of the intervals, and that group, 0 the narrowest.

    Equal widths share a group, so that intervals of constant width make one. The analogue of size-stratified coverage
    (Angelopoulos et al. 2021, arXiv 2009.14193).
    """
    check_intervals("width-stratified coverage", low, high)
    require("width-stratified coverage", covered=covered, low=low)
    found, worst = worst_group_coverage(covered, equal_mass_index(high.astype(np.float64) - low, strata))
    return found, int(worst)


@dataclass(frozen=True)
class Slab:
    """{x : low <= direction.(x - centre) / scale <= high}, ends infinite where the slab is a half-space.

    Attributes:
        direction: (d,), of length 1, 0 for inputs that do not vary; centre, scale: (d,).
        mass: share of the samples that it was measured on which lie inside.
    """

    direction: np.ndarray
    centre: np.ndarray
    scale: np.ndarray
    low: float
    high: float
    mass: float

    def holds(self, x: np.ndarray) -> np.ndarray:
        """Whether inputs (N, d) lie inside, bool (N,)."""
        along = (x - self.centre) / self.scale @ self.direction
        return np.asarray((self.low <= along) & (along <= self.high))


def worst_slab_coverage(
    x: np.ndarray,
    covered: np.ndarray,
    delta: float = DELTA,
    directions: int = DIRECTIONS,
    seed: int = 0,
) -> tuple[Estimate, Slab | None]:
    """Coverage within the slab of lowest coverage, chosen on one half of the samples and measured on the other.

    The halves are random but for the inputs alone: they do not depend on the order of samples, nor on the method (where no
    two inputs are equal). Inputs are standardised, so that no unit decides the directions. At most 10,000 samples choose.

    Args:
        x: inputs (N, d), finite; covered: bool (N,).
        delta: the least share of the choosing samples that a slab holds, in (0, 1].
        directions: how many random v are tried; with one input that varies there is only one.

    Returns:
        The coverage with Wilson's interval, n being the measured samples inside; the slab, None where undefined.
    """
    require("worst slab", x=x, covered=covered)
    if x.ndim != 2 or not np.isfinite(x).all() or not 0 < delta <= 1 or directions < 1:
        raise DataError(
            f"worst slab: x {x.shape}, delta = {delta}, directions = {directions}; expected (N, d), finite, a share in (0, 1], "
            f"at least 1"
        )
    n, x = len(x), x.astype(np.float64)
    if n < 2:
        return Estimate.undefined(n, "one sample cannot both choose a slab and measure it"), None
    rng = np.random.Generator(np.random.Philox(hash_seed(seed, 0, 250)))
    order = np.lexsort((covered, *x.T))[rng.permutation(n)]
    choose, judge = np.split(order, [min(n // 2, _SEARCHED)])
    centre, scale = x[choose].mean(axis=0), x[choose].std(axis=0)
    varies = scale > 1e-12 * np.abs(centre)
    if not varies.any():
        return Estimate.undefined(n, "the inputs do not vary"), None
    scale = np.where(varies, scale, 1.0)
    v = rng.normal(size=(directions if varies.sum() > 1 else 1, x.shape[1])) * varies
    v /= np.linalg.norm(v, axis=1, keepdims=True)
    best, low, high = _lowest(
        (x[choose] - centre) / scale, covered[choose], v, max(1, math.ceil(delta * len(choose) - 1e-9))
    )
    slab = Slab(v[best], centre, scale, low, high, 0.0)
    inside = slab.holds(x[judge])
    if not inside.any():
        return Estimate.undefined(len(judge), "none of the measured samples lies in the slab"), None
    found = replace(proportion(covered[judge][inside]), ci_method="Wilson, held-out half")
    return found, replace(slab, mass=float(inside.mean()))


def _lowest(x: np.ndarray, covered: np.ndarray, v: np.ndarray, least: int) -> tuple[int, float, float]:
    """The direction and the ends of the slab of at least `least` samples with the lowest coverage, exactly.

    Along a direction, with S_j the number of covered samples among the first j, a run (i, j] has a lower coverage than t where
    (S_j - t j) - (S_i - t i) < 0. So the lowest difference shows whether t can be beaten, and by which run; t becomes its
    coverage until nothing beats it (Dinkelbach 1967). A running maximum of S_i - t i makes that linear in the samples.
    """
    n = len(x)
    t, best = float(covered.mean()), (0, -math.inf, math.inf)
    steps, rows = np.arange(n + 1), max(1, _BLOCK // n)
    for start in range(0, len(v), rows):
        along = x @ v[start : start + rows].T
        order = np.argsort(along, axis=0, kind="stable").T
        sums = np.concatenate([np.zeros((len(order), 1)), np.cumsum(covered[order], axis=1)], axis=1)
        alive = np.arange(len(order))
        while len(alive):
            slope = sums[alive] - t * steps
            drop = slope[:, least:] - np.maximum.accumulate(slope[:, : n + 1 - least], axis=1)
            depth = drop.min(axis=1)
            if depth.min() > -1e-9:
                break
            row = int(depth.argmin())
            end = int(drop[row].argmin()) + least
            begin = int(slope[row, : end - least + 1].argmax())
            d = alive[row]
            t = float(sums[d, end] - sums[d, begin]) / (end - begin)
            low = -math.inf if begin == 0 else float(along[order[d, begin], d])
            high = math.inf if end == n else float(along[order[d, end - 1], d])
            best = (start + int(d), low, high)
            alive = alive[depth < -1e-9]
    return best
