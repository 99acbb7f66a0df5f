"""Rows of the three axes: the spread over classes, and how much of the clean accuracy every condition takes away."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from robustbench_ext.axes import CLASSIFIER, CLEAN
from robustbench_ext.evaluate import Context
from robustbench_ext.measured import Columns, Measured, Tables, correct, row
from robustbench_ext.metrics import spread

SHIFTS = ("corruption", "corruptions", "domain", "domains")


@dataclass(frozen=True)
class Changed:
    """Verdicts on clean inputs, and under a condition or under each of those that it is taken over.

    Attributes:
        ids: of the samples, the clean ones first where they are not the condition's own.
        paired: whether all are of the same samples.
    """

    ids: np.ndarray
    clean: spread.Verdicts
    changed: list[spread.Verdicts]
    paired: bool


def changed(seen: Callable[[str], Columns], kind: str, labels: Sequence[str]) -> Changed:
    """What a relative change is made of.

    Args:
        seen: gives a condition's observations.
        kind: of the condition; labels: itself, or what it is taken over. A worst case is the AND of its attacks.
    """
    plain = seen(CLEAN)
    before = correct(plain), plain["label"]
    if kind == "worst-case":
        right = np.logical_and.reduce([before[0], *(correct(seen(label)) for label in labels)])
        return Changed(plain["id"], before, [(right, plain["label"])], True)
    parts = [seen(label) for label in labels]
    paired = all(np.array_equal(part["id"], plain["id"]) for part in parts)
    ids = plain["id"] if paired else np.concatenate([plain["id"], *(part["id"] for part in parts)])
    return Changed(ids, before, [(correct(part), part["label"]) for part in parts], paired)


def three_axes(out: Measured, context: Context, tables: Tables, model: str, done: set[str]) -> None:
    """Add them for a model: of every condition in which each sample has a verdict of its own."""

    def seen(label: str) -> Columns:
        return tables.observations(model, label)

    plain = seen(CLEAN)
    estimate = spread.class_spread(correct(plain), plain["label"])
    out.rows.append(row(model, CLEAN, CLASSIFIER, "class_spread", estimate))
    over: dict[str, tuple[str, list[str]]] = {
        label: (condition.kind, [label])
        for label, condition in context.conditions_of(model).items()
        if label in done and condition.kind in ("attack", *SHIFTS) and not condition.facts().get("minimum_norm")
    }
    over |= {str(entry["label"]): (str(entry["kind"]), list(entry["over"])) for entry in out.worst_cases}
    for label, (kind, labels) in over.items():
        if not all(member in done and _own_verdicts(seen(member)) for member in labels):
            continue
        found = changed(seen, kind, labels)
        estimate = spread.accuracy_change(found.clean, found.changed, found.paired)
        out.rows.append(row(model, label, CLASSIFIER, "relative_change", estimate, against=CLEAN))


def _own_verdicts(columns: Mapping[str, np.ndarray]) -> bool:
    """An audit leaves most samples without one."""
    return "audit" not in columns
