"""May this result be trusted? Checks of a finished run, from its per-sample records alone: no model is touched.

What a sound evaluation cannot show: a black-box attack that beats the white-box ones, accuracy that rises with the
budget or the effort, an attack that was still climbing when it stopped (Carlini et al. 2019, arXiv 1902.06705).

Every check is a function of plain arrays, so it also runs on verdicts saved elsewhere. Each gives a `Check`, or None
where there is nothing to compare.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from scipy.special import bdtrc

from robustbench_ext.checks import Check
from robustbench_ext.gradient_checks import above_chance
from robustbench_ext.metrics.intervals import clopper_pearson
from robustbench_ext.numbers import format_number

DOUBTS_VERSION = 1

BLACK_SHARE = 0.01  # of the samples that white-box attacks leave; fewer may be chance, which square alone finds
RARE = 0.01  # level of the one-sided tests, for all pairs of one check together
CLIMB = 0.05  # a linear climb gains 0.1 in its last tenth, a converged one next to nothing
FEWEST = 10  # samples that a look at late gains needs, and steps that a tenth of an attack needs
HUGE = 0.5  # Linf: any image can be made grey
EFFORT = ("steps", "restarts", "queries", "tries")  # parameters of which more should never break less

_BLACK = ("score", "decision", "transfer")
_TORCHATTACKS_BLACK = ("GN", "OnePixel", "Pixle", "SPSA", "Square")  # the adapter's own access is "various"


@dataclass(frozen=True)
class Attacked:
    """What an attack did to N samples, as the records say it.

    Attributes:
        label, attack, norm, eps, parameters, members: as in results.json; `eps` None: no budget, any size counts.
        access: "white", "score", "decision" or "transfer", one for each member.
        broken, broken_by, norms: (N,), as in `attacks.base.AttackResult`.
        late_gain: (N,), NaN where the attack does not say.
        partial: not every sample has a verdict of its own (an audit), so it cannot be held against others.
    """

    label: str
    attack: str
    norm: str
    eps: float | None
    access: tuple[str, ...]
    broken: np.ndarray
    norms: np.ndarray
    broken_by: np.ndarray
    late_gain: np.ndarray
    members: tuple[str, ...] = ()
    parameters: dict[str, Any] = field(default_factory=dict)
    partial: bool = False

    def within(self, eps: float) -> np.ndarray:
        """Samples that are broken by a perturbation of at most that size, bool (N,)."""
        return self.broken & (self.norms <= eps * (1 + 1e-6) + 1e-6)


def access_of(attack: Any) -> tuple[str, ...]:
    """What each member of an attack knows of the model: "white", "score", "decision" or "transfer"."""
    members = getattr(attack, "attacks", None)
    if members is not None:
        return tuple(access for member in members for access in access_of(member))
    if attack.access != "various":
        return (str(attack.access),)
    return ("score" if attack.attack in _TORCHATTACKS_BLACK else "white",)


def doubts(
    right: np.ndarray, labels: np.ndarray, classes: int, attacks: Sequence[Attacked], randomised: bool
) -> list[Check]:
    """All checks of one model that have something to compare.

    Args:
        right: bool (N,), correct clean; labels: int (N,); classes: K.
        attacks: one a condition, all on the same N samples.
        randomised: the preflight found that two passes over the same inputs differ.
    """
    whole = [attack for attack in attacks if not attack.partial]
    found = (
        black_beats_white(right, whole),
        accuracy_against_budget(whole),
        effort_against_success(whole),
        still_climbing(whole),
        huge_budget(right, labels, classes, whole),
        randomised_without_draws(attacks, randomised),
    )
    return [check for check in found if check is not None]


def black_beats_white(right: np.ndarray, attacks: Sequence[Attacked]) -> Check | None:
    """Samples that a black-box attack breaks and no white-box attack of that norm with at most that budget.

    With gradients to follow, a white-box attack sees all that a black-box one sees and more. Members of an ensemble
    count by themselves; a black-box member only after all white-box ones.
    """
    evidence, compared = [], []
    for black in attacks:
        if black.eps is None:
            continue
        whites = [
            a for a in attacks if a.norm == black.norm and (a.eps is None or a.eps <= black.eps) and "white" in a.access
        ]
        if not whites:
            continue
        white = np.logical_or.reduce([a.within(black.eps) & _by(a, "white") for a in whites])
        standing = right & ~white
        for number, access in enumerate(black.access):
            if access not in _BLACK or "white" in black.access[number:]:
                continue
            hit = standing & black.broken & ((black.broken_by == number) | (len(black.access) == 1))
            k, m = int(hit.sum()), int(standing.sum())
            name = black.label if len(black.access) == 1 else f"{black.members[number]} in {black.label}"
            compared.append(f"{name} broke {k} of {m} samples that stand")
            if m and clopper_pearson(k, m)[0] > BLACK_SHARE:
                evidence.append(
                    f"{name} broke {_share(k, m)} of the samples that {_some([a.label for a in whites])} left standing"
                )
    return _judged(
        "black box against white box",
        evidence,
        compared,
        "White-box attacks see more, so their gradients are masked or they are too weak. Add standard (or apgd-dlr, apgd-t "
        "with more steps), and believe the worst case only.",
    )


def accuracy_against_budget(attacks: Sequence[Attacked]) -> Check | None:
    """The same attack at several eps: a larger ball holds the smaller one, so accuracy must not rise with it."""
    families: dict[str, list[Attacked]] = {}
    for attack in attacks:
        if attack.eps is not None:
            families.setdefault(_key(attack, ()), []).append(attack)
    pairs = [pair for family in families.values() for pair in pairwise(sorted(family, key=lambda a: a.eps or 0.0))]
    return _never_fewer(
        "accuracy against budget",
        [(small, large) for small, large in pairs if small.eps != large.eps],
        "Steps of a larger budget overshoot, or gradients are masked. Use more steps or apgd-ce, and believe the worst case.",
    )


def effort_against_success(attacks: Sequence[Attacked]) -> Check | None:
    """The same attack and budget with more steps, restarts, queries or tries: it must not break fewer."""
    families: dict[str, list[Attacked]] = {}
    for attack in attacks:
        families.setdefault(_key(attack, EFFORT) + f" {attack.eps}", []).append(attack)
    pairs = [
        (less, more)
        for family in families.values()
        for less in family
        for more in family
        if less is not more and all(less.parameters[k] <= more.parameters[k] for k in EFFORT if k in less.parameters)
    ]
    return _never_fewer(
        "larger budget not better",
        pairs,
        "More work should find more. Look for masked gradients or random layers, and try other step sizes and losses.",
    )


def still_climbing(attacks: Sequence[Attacked]) -> Check | None:
    """Among the samples that an attack does not break: whether for most the loss was still rising in the last tenth.

    Most, and not on average: on undefended networks a few survivors jump late in any attack and carry the mean.

    Attacks of fewer than ten steps are left out: their last step is more than a tenth. So is MI-FGSM with its published
    step size, eps / steps: it reaches the edge of the ball with its last step, however many there are.
    """
    evidence, compared = [], []
    for attack in attacks:
        gain = attack.late_gain[~attack.broken]
        gain = gain[np.isfinite(gain)].astype(np.float64)
        to_the_edge = attack.attack == "mi-fgsm" and attack.parameters.get("step_size") is None
        if len(gain) < FEWEST or attack.parameters.get("steps", FEWEST) < FEWEST or to_the_edge:
            continue
        k, n = int((gain > CLIMB).sum()), len(gain)
        compared.append(f"{k} of {n} ({attack.label})")
        if clopper_pearson(k, n)[0] > 0.5:
            evidence.append(
                f"{attack.label} gained more than {CLIMB:.0%} of its loss in the last tenth, for {_share(k, n)} of the samples "
                f"that it did not break; the median is {np.median(gain):.0%}"
            )
    return _judged(
        "still climbing",
        evidence,
        [f"unbroken samples with a late gain in loss: {_some(compared)}"] if compared else [],
        "More steps may break more. Raise steps, or the step size, until the loss settles.",
    )


def huge_budget(right: np.ndarray, labels: np.ndarray, classes: int, attacks: Sequence[Attacked]) -> Check | None:
    """Where the suite attacks with Linf budgets that make any image grey: accuracy must fall to chance.

    Of the attacks with at least that budget some must follow gradients for ten steps or more; one step may fail.
    """
    huge = [a for a in attacks if a.norm == "Linf" and a.eps is not None and a.eps >= HUGE]
    strong = [a for a in huge if "white" in a.access and a.parameters.get("steps", 0) >= FEWEST]
    if not strong:
        return None
    left = int((right & ~np.logical_or.reduce([a.broken for a in huge])).sum())
    text = f"accuracy stays at {left} of {len(right)} under {_some([a.label for a in huge])}"
    return _judged(
        "huge budget in the suite",
        [f"{text}, although such a budget makes any image grey: gradients are masked"]
        if above_chance(left, labels, classes)
        else [],
        [text],
        "What cannot break a model without a bound says nothing at a small one. Look for layers that round, saturate or "
        "detach, and add black-box attacks (square).",
    )


def randomised_without_draws(attacks: Sequence[Attacked], randomised: bool) -> Check | None:
    """A randomised model under attacks that look once: they follow one draw and are judged by another."""
    plain = [a.label for a in attacks if a.parameters.get("draws", 1) == 1]
    if not randomised or not attacks:
        return None
    if not plain:
        return Check(
            "randomised model", "pass", f"all attacks take means over draws: {_some([a.label for a in attacks])}"
        )
    return Check(
        "randomised model",
        "fail",
        f"the model is randomised, but {len(plain)} of {len(attacks)} attacks look at one draw only: {_some(plain)}",
        "They follow one draw and are judged by another. Use the attack `rand` (expectation over transformations), or draws: "
        "20.",
    )


def mcnemar(small: np.ndarray, large: np.ndarray) -> tuple[int, int, float]:
    """Broken by `small` only, broken by `large` only, and the one-sided exact p that `large` breaks fewer by chance.

    >>> mcnemar(np.array([True, True, False]), np.array([True, False, False]))
    (1, 0, 0.5)
    """
    lost, gained = int((small & ~large).sum()), int((large & ~small).sum())
    p = float(bdtrc(lost - 1, lost + gained, 0.5)) if lost else 1.0
    return lost, gained, p


def _never_fewer(name: str, pairs: Sequence[tuple[Attacked, Attacked]], hint: str) -> Check | None:
    """A doubt if the second of a pair breaks fewer samples than the first, at a level that allows for all pairs."""
    evidence, compared = [], []
    for small, large in pairs:
        lost, gained, p = mcnemar(small.broken, large.broken)
        compared.append(f"{large.label} breaks {gained} that {small.label} does not, and misses {lost}")
        if p < RARE / len(pairs):
            evidence.append(
                f"{large.label} misses {lost} samples that {small.label} breaks, and breaks {gained} others "
                f"(n = {len(small.broken)}, p = {p:.1g})"
            )
    return _judged(name, evidence, compared, hint)


def _judged(name: str, evidence: Sequence[str], compared: Sequence[str], hint: str) -> Check | None:
    if evidence:
        return Check(name, "doubt", _some(evidence, "; "), hint)
    return Check(name, "pass", _some(compared, "; ")) if compared else None


def _by(attack: Attacked, access: str) -> np.ndarray:
    """Samples that members of that access broke, bool (N,)."""
    if len(attack.access) == 1:
        return np.full(len(attack.broken), attack.access[0] == access)
    return np.isin(attack.broken_by, [i for i, known in enumerate(attack.access) if known == access])


def _key(attack: Attacked, without: Iterable[str]) -> str:
    rest = {k: v for k, v in attack.parameters.items() if k not in without}
    return json.dumps([attack.attack, attack.norm, rest], sort_keys=True, default=str)


def _share(k: int, n: int) -> str:
    low, high = clopper_pearson(k, n)
    return f"{k} of {n} (95 % interval {format_number(round(100 * low, 1))} to {format_number(round(100 * high, 1))} %)"


def _some(texts: Sequence[str], separator: str = ", ", most: int = 3) -> str:
    """The first few, and how many more."""
    more = f" and {len(texts) - most} more" if len(texts) > most else ""
    return separator.join(texts[:most]) + more
