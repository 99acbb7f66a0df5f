"""Robustness is not one number: spread over classes, inputs of unseen kinds, attacks, side by side for every model.

The three axes, and the two perspectives on each of the latter two, are those of Wu et al. (TOIS 2022, arXiv 2108.05018):
unseen types of inputs (here corruptions) and unseen domains; attacks that follow a gradient (here the worst case within the
main budget of each norm) and edits that keep the content (here rotations and translations). What was not measured is left out.
Read off the results alone, as `axes` is.
"""

from __future__ import annotations

from dataclasses import dataclass

from robustbench_ext.axes import CLEAN, Axis, is_regression, main_threats, model_names, of_kind, threat_name
from robustbench_ext.results import RunResults

SPREAD, UNSEEN, ATTACKS = "spread", "unseen inputs", "attacks"


@dataclass(frozen=True)
class Perspective:
    """One look at one of the three axes.

    Attributes:
        of: "spread", "unseen inputs" or "attacks".
        question: what answers it: `class_spread`, or a `relative_change`.
    """

    of: str
    question: Axis


def perspectives(results: RunResults) -> list[Perspective]:
    """Those that were measured, in the order of the axes; none of regressors, and none where nothing but clean was."""
    if is_regression(results):
        return []
    found = []
    for kind, title in (("corruption", "corruptions"), ("domain", "domains")):
        labels = [str(c["label"]) for c in of_kind(results, f"{kind}s") or of_kind(results, kind)[-1:]]
        found += [(UNSEEN, title if len(of_kind(results, kind)) > 1 else label, label) for label in labels]
    found += [(ATTACKS, threat_name(threat), str(threat["label"])) for threat in main_threats(results)]
    moved = [str(c["label"]) for c in of_kind(results, "attack") if c.get("norm") == "spatial"]
    found += [(ATTACKS, "rotations, translations" if len(moved) == 1 else label, label) for label in moved]
    changes = [
        Perspective(of, Axis(title, "relative_change", label))
        for of, title, label in found
        if results.find(metric="relative_change", condition=label)
    ]
    return [Perspective(SPREAD, Axis("over classes", "class_spread", CLEAN)), *changes] if changes else []


def ahead(results: RunResults, axis: Axis) -> list[str]:
    """The one model that is better than every other beyond chance, or all that no other is better than: a tie.

    A model that was trained several times counts as one, under its common name. Models of which a check failed are left out.
    """
    entries = {str(m["name"]): str(m.get("replicate_of") or m["name"]) for m in results.models}
    failed = {entries.get(f.model, f.model) for f in results.suspicions if f.status == "fail"}
    measured = (n for n in model_names(results) if (row := axis.row(results, n)) is not None and row.value is not None)
    names = [name for name in dict.fromkeys(entries[n] for n in measured) if name not in failed]
    compared = [c for c in results.compared(axis.metric, axis.condition) if {c.model, c.against} <= set(names)]
    wins = {(c.model, c.against) for c in compared if c.outcome == "better"}
    wins |= {(c.against, c.model) for c in compared if c.outcome == "worse"}
    leader = [a for a in names if len(names) > 1 and all((a, b) in wins for b in names if b != a)]
    return leader or [b for b in names if not any((a, b) in wins for a in names)]
