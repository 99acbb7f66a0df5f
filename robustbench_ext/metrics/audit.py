"""Two-phase sampling: a cheap screen on all samples, the full protocol on a random audit of those that it left standing.

Let N samples be screened and S of them survive. The survivors of smallest margin are all audited (they hold most of what
the full protocol still breaks); of the other R, r are drawn at random without replacement and b of them are broken. Then

    robust accuracy of the full protocol here = (S - broken in the first part - R b / r) / N  on average,

and, the number of breaks among the r being hypergeometric, an exact interval for the number among the R gives an exact
interval for this value (Neyman 1938 for two-phase sampling; Buonaccorsi 1987 for the hypergeometric interval). The
interval for the population from which the N samples come adds the two errors, which are uncorrelated, by the method of
variance estimates recovery (Zou and Donner 2008): each end is the root of the sum of the squares of both distances.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from scipy.special import gammaln

from robustbench_ext.errors import DataError
from robustbench_ext.metrics.estimate import LEVEL, Estimate, require
from robustbench_ext.metrics.intervals import wilson

# What happened to a sample: its verdict stands without an audit (clean error, or broken by the screen); it survived the
# screen and was audited because of its small margin, or because it was drawn; it survived and was not audited.
DECIDED, TAKEN, DRAWN, LEFT = 0, 1, 2, 3


def hypergeometric_interval(broken: int, drawn: int, population: int, level: float = LEVEL) -> tuple[int, int]:
    """Exact interval for how many of `population` are broken, if `broken` of `drawn` are (without replacement).

    >>> hypergeometric_interval(0, 10, 10), hypergeometric_interval(0, 0, 7)
    ((0, 0), (0, 7))
    """
    if not 0 <= broken <= drawn <= population:
        raise DataError(
            f"{broken} broken of {drawn} drawn of {population}: expected 0 <= broken <= drawn <= population"
        )
    tail = (1 - level) / 2
    least, most = broken, population - (drawn - broken)
    # Both tails are monotone in how many are broken, so each end is found by halving.
    low = _first(least, most, lambda k: 1 - _at_most(broken - 1, drawn, k, population) > tail)
    high = _first(low, most + 1, lambda k: k > most or _at_most(broken, drawn, k, population) <= tail) - 1
    return low, max(low, high)


def _first(low: int, high: int, holds: Callable[[int], bool]) -> int:
    """The least number of low..high at which a condition holds that stays true from there on; high if none before."""
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low


def _at_most(broken: int, drawn: int, total: int, population: int) -> float:
    """Probability that at most `broken` of `drawn` are broken, if `total` of `population` are (hypergeometric)."""
    k = np.arange(max(0, drawn - (population - total)), min(broken, drawn, total) + 1)
    terms = _log_choose(total, k) + _log_choose(population - total, drawn - k) - _log_choose(population, drawn)
    return float(np.exp(terms).sum())


def _log_choose(n: int, k: np.ndarray | int) -> Any:
    return gammaln(n + 1) - gammaln(np.add(k, 1)) - gammaln(n - np.asarray(k) + 1)


@dataclass(frozen=True)
class Audit:
    """Counts of a two-phase evaluation.

    Attributes:
        n: samples; survivors: correct clean and not broken by the screen.
        taken, taken_broken: survivors audited for their small margin, and how many of them the full protocol broke.
        rest: the other survivors; drawn, drawn_broken: how many of them were drawn, and how many of these broke.
        level: of the audit's own interval; above the nominal one where several looks share the error.
    """

    n: int
    survivors: int
    taken: int
    taken_broken: int
    drawn: int
    drawn_broken: int
    level: float = LEVEL

    @property
    def rest(self) -> int:
        """Survivors that were audited by chance only."""
        return self.survivors - self.taken

    def value(self) -> float:
        """The estimate; with nobody drawn from a rest that is not empty, the share that is left standing."""
        breaks = self.taken_broken + (self.rest * self.drawn_broken / self.drawn if self.drawn else 0.0)
        return (self.survivors - breaks) / self.n

    def here(self) -> Estimate:
        """The full protocol's robust accuracy on these very samples, with an exact interval."""
        low, high = hypergeometric_interval(self.drawn_broken, self.drawn, self.rest, self.level)
        standing = self.survivors - self.taken_broken
        value = self.value()
        return Estimate(value, (standing - high) / self.n, (standing - low) / self.n, "audit (exact)", self.n)

    def population(self, level: float = LEVEL) -> Estimate:
        """The full protocol's robust accuracy, with an interval for the sampling of test samples and for the audit."""
        here = self.here()
        low, high = wilson_share(here.value, self.n, level)
        low = here.value - math.hypot(here.value - low, here.value - here.ci_low)
        high = here.value + math.hypot(high - here.value, here.ci_high - here.value)
        return Estimate(here.value, max(0.0, low), min(1.0, high), "audit + Wilson", self.n, level=level)


def wilson_share(share: float, n: int, level: float = LEVEL) -> tuple[float, float]:
    """Wilson's interval for a share that is not a whole number of n; between those of the counts on either side."""
    k = share * n
    below, above = math.floor(k), math.ceil(k)
    (low, high), (low_up, high_up) = wilson(below, n, level), wilson(above, n, level)
    return low + (k - below) * (low_up - low), high + (k - below) * (high_up - high)


def count(audit: np.ndarray, broken: np.ndarray, level: float = LEVEL) -> Audit:
    """The counts of some samples.

    Args:
        audit: (N,) what happened to each: DECIDED, TAKEN, DRAWN or LEFT.
        broken: (N,) bool, clean errors included.
    """
    require("audit", audit=audit, broken=broken)
    return Audit(
        n=len(audit),
        survivors=int((audit != DECIDED).sum()),
        taken=int((audit == TAKEN).sum()),
        taken_broken=int(((audit == TAKEN) & broken).sum()),
        drawn=int((audit == DRAWN).sum()),
        drawn_broken=int(((audit == DRAWN) & broken).sum()),
        level=level,
    )


def look_level(look: int, looks: int, level: float = LEVEL) -> float:
    """The level of the interval at one of several looks, so that all of them together cover.

    Half of the error goes to the first look, a quarter to the second, ...; the last takes what is left. A single look
    takes all of it.

    >>> [round(look_level(j, 3), 4) for j in range(3)]
    [0.975, 0.9875, 0.9875]
    """
    share = 0.5 ** min(look + 1, looks - 1)
    return 1 - (1 - level) * share


def plan_looks(survivors: int, first: int) -> list[int]:
    """How many survivors have been audited after each look: doubling from `first`, the last look being all of them.

    >>> plan_looks(1000, 100)
    [100, 200, 400, 800, 1000]
    """
    sizes, size = [], max(1, first)
    while size < survivors:
        sizes.append(size)
        size *= 2
    return [*sizes, survivors]


@dataclass(frozen=True)
class Budget:
    """How much to audit; exactly one is given.

    Attributes:
        size: survivors to be audited.
        width: audit until the interval of the robust accuracy is at most this wide.
        widening: audit until it is at most this many times as wide as if all survivors had been audited.
    """

    size: int | None = None
    width: float | None = None
    widening: float | None = None

    def enough(self, counts: Audit) -> bool:
        """Whether the interval is narrow enough; with a size it always is."""
        if self.size is not None:
            return True
        if counts.drawn == 0 < counts.rest:
            return False
        found = counts.population()
        low, high = wilson_share(found.value, counts.n)
        wanted = self.width if self.width is not None else (self.widening or 1.0) * (high - low)
        return found.ci_high - found.ci_low <= wanted

    def looks(self, n: int, survivors: int, certain: float) -> list[int]:
        """How many survivors have been audited after each look."""
        if self.size is not None:
            return [min(survivors, self.size)]
        return list(_looks(self, n, survivors, certain))


@lru_cache(maxsize=16)
def _looks(budget: Budget, n: int, survivors: int, certain: float) -> tuple[int, ...]:
    size = 1
    while size < survivors:  # the smallest audit that can be enough: nothing that is drawn breaks
        taken = round(certain * size)
        if budget.enough(Audit(n, survivors, taken, 0, size - taken, 0, look_level(0, 2))):
            break
        size = max(size + 1, int(size * 1.1))
    return tuple(plan_looks(survivors, min(size, survivors)))


def conduct(
    standing: np.ndarray,
    margins: np.ndarray,
    lots: np.ndarray,
    judge: Callable[[np.ndarray], np.ndarray],
    budget: Budget,
    certain: float,
) -> tuple[np.ndarray, np.ndarray, float]:
    """Audit survivors of a screen.

    Args:
        standing: (N,) bool, survived the screen.
        margins: (N,), larger is nearer to a mistake; of survivors only.
        lots: (N,), random numbers that decide the order of drawing; a sample's own, whatever the batch.
        judge: takes positions, increasing, and says which of them the full protocol breaks, bool.
        certain: share of the audit that goes to the survivors of smallest margin.

    Returns:
        What happened to each sample (N,) int8, what the protocol broke (N,) bool, and the level of the audit's interval.
    """
    survivors = np.flatnonzero(standing)
    ranking = survivors[np.argsort(-margins[survivors], kind="stable")]
    broken, judged = np.zeros(len(standing), dtype=bool), np.zeros(len(standing), dtype=bool)
    code = np.where(standing, LEFT, DECIDED).astype(np.int8)
    sizes, level = budget.looks(len(standing), len(survivors), certain), LEVEL
    for look, size in enumerate(sizes):
        taken, others = np.split(ranking, [round(certain * size)])
        # In a fixed order of lots: whoever was drawn stays drawn, or is now taken for the margin.
        drawn = others[np.argsort(lots[others], kind="stable")][: size - len(taken)]
        code[survivors], code[taken], code[drawn] = LEFT, TAKEN, DRAWN
        fresh = np.sort(np.concatenate([taken, drawn]))
        fresh = fresh[~judged[fresh]]
        if len(fresh):
            broken[fresh] = judge(fresh)
            judged[fresh] = True
        level = look_level(look, len(sizes))
        if budget.enough(count(code, broken, level)):
            break
    return code, broken, level


def describe(counts: Audit) -> str:
    """What was audited, in a sentence."""
    return (
        f"{counts.survivors:,} of {counts.n:,} samples survived the screen. Of these the full protocol met the "
        f"{counts.taken:,} of smallest margin (and broke {counts.taken_broken:,}), and {counts.drawn:,} drawn at "
        f"random from the other {counts.rest:,} (and broke {counts.drawn_broken:,})."
    )
