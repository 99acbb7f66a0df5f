"""What a reader who knows nothing is told first: which model, and how sure that is."""

from __future__ import annotations

from dataclasses import dataclass, field

from robustbench_ext.axes import Axis, axes
from robustbench_ext.results import Compared, RunResults


@dataclass(frozen=True)
class Summary:
    """The answer that comparisons allow. A model that was trained several times counts as one, under its common name.

    Attributes:
        choice: the models that no other one beats; to choose between these is a matter of taste.
        beaten: models that another one beats: better on at least one axis and worse on none, beyond chance.
        failed: models that failed a check; they are neither chosen nor do they beat others.
        leads: axes on which one model is better than every other, and that model; without those that a failed one leads.
        open: axes on which no model is.
        compared: whether there are comparisons at all; without them nothing is said.
    """

    choice: list[str]
    beaten: list[str]
    failed: list[str]
    leads: list[tuple[str, str]] = field(default_factory=list)
    open: list[str] = field(default_factory=list)
    compared: bool = True


def summary(results: RunResults) -> Summary | None:
    """Read off the comparisons, which are corrected for their number; None of a run of one model."""
    entries = {str(m["name"]): str(m.get("replicate_of") or m["name"]) for m in results.models}
    names = list(dict.fromkeys(entries.values()))
    if len(names) < 2:
        return None
    asked = {(axis.metric, axis.condition) for axis in axes(results)}
    pairs = [c for c in results.comparisons if {c.model, c.against} <= set(names)]
    compared = [c for c in pairs if (c.metric, c.condition) in asked]
    failing = {entries.get(f.model, f.model) for f in results.suspicions if f.status == "fail"}
    sound = [name for name in names if name not in failing]
    wins = _wins(compared)
    beaten = [b for b in sound if any((a, b) in wins and (b, a) not in wins for a in sound)]
    leads, unsettled = [], []
    for axis in axes(results):
        leader = _leader(axis, names, compared)
        if leader in sound:
            leads.append((axis.title, leader))
        elif leader is None and results.metrics[axis.metric]["higher_is_better"] is not None:
            unsettled.append(axis.title)
    choice = [name for name in sound if name not in beaten]
    return Summary(choice, beaten, [n for n in names if n in failing], leads, unsettled, compared=bool(compared))


def _wins(compared: list[Compared]) -> set[tuple[str, str]]:
    """(winner, loser) of every decided comparison."""
    decided = (c for c in compared if c.outcome != "inconclusive")
    return {(c.model, c.against) if c.outcome == "better" else (c.against, c.model) for c in decided}


def _leader(axis: Axis, names: list[str], compared: list[Compared]) -> str | None:
    """The model that is better than every other on an axis."""
    place = (axis.metric, axis.condition)
    mine = [c for c in compared if (c.metric, c.condition) == place and (axis.group is ... or c.group == axis.group)]
    there = {name for c in mine for name in (c.model, c.against)}
    wins = _wins(mine)
    return next((a for a in names if a in there and all((a, b) in wins for b in there - {a})), None)
