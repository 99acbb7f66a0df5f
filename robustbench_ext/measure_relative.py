"""Relative accuracies of a run: models of long-tailed data against models of balanced data, on the same samples."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from robustbench_ext.conditions import Condition
from robustbench_ext.evaluate import CLEAN, Context
from robustbench_ext.measured import Measured, Tables, correct, row
from robustbench_ext.metrics import Estimate, tails
from robustbench_ext.metrics.relative import relative_accuracy
from robustbench_ext.probes import CLASSIFIER
from robustbench_ext.suite import Relative

EQUAL = 1.1  # factor between classes up to which data counts as balanced
SIMILAR = 1.25  # factor between training sizes up to which they count as similar


def relative(out: Measured, context: Context, tables: Tables, models: Sequence[str]) -> None:
    """Rows for every entry of the suite's `relative`: clean, under every attack with a budget, for every worst case.

    Undefined, with the reason, where one of the three models lacks the condition.
    """
    for entry in context.suite.relative:
        refused, notes = _trained(context, entry)
        out.notes += notes
        mine = context.conditions_for(entry.model)
        single = {k: [k] for k, c in mine.items() if _has_verdicts(c)}
        cases = [w for w in out.worst_cases if w["kind"] == "worst-case" and set(w["over"]) <= set(mine)]
        worst = {str(w["label"]): [CLEAN, *w["over"]] for w in cases}
        for label, members in (single | worst).items():
            metric = "relative_accuracy" if label == CLEAN else "robust_relative_accuracy"
            estimate = Estimate.undefined(0, refused)
            if not refused:
                estimate = _estimate(context, tables, models, entry, members)
            against = " and ".join(dict.fromkeys((entry.plain, entry.same)))
            out.rows.append(row(entry.model, label, CLASSIFIER, metric, estimate, against=against))


def _has_verdicts(condition: Condition) -> bool:
    """Whether each sample has a verdict of its own there: none at an unlimited budget, and few in an audit."""
    attacked = condition.kind == "attack" and not condition.facts().get("minimum_norm") and not condition.whole
    return condition.kind == CLEAN or attacked


def _estimate(
    context: Context, tables: Tables, models: Sequence[str], entry: Relative, members: Sequence[str]
) -> Estimate:
    verdicts = []
    for name in (entry.model, entry.plain, entry.same):
        if name not in models:
            return Estimate.undefined(0, f"could not be computed: {name}")
        met = context.conditions_of(name)
        if missing := [label for label in members if label not in met or not tables.complete(name, label)]:
            return Estimate.undefined(0, f"could not be computed: {name} under {', '.join(missing)}")
        verdicts.append(np.logical_and.reduce([correct(tables.observations(name, label)) for label in members]))
    return relative_accuracy(*verdicts)


def _trained(context: Context, entry: Relative) -> tuple[str, list[str]]:
    """Why there is no relative accuracy, if the bases were not trained on balanced data; and what else a reader should know.

    Of a model that the run did not train it is not known what it was trained on.
    """
    what, sizes = f"relative accuracy of {entry.model}", {}
    for name in dict.fromkeys((entry.model, entry.plain, entry.same)):
        training = context.training.get(name)
        if training is None or training.data is None:
            return "", [f"{what}: what {name} was trained on is not known"]
        counts = np.bincount(training.data["train"].labels, minlength=len(context.data.classes))
        if name != entry.model and tails.is_imbalanced(counts, EQUAL):
            return f"{name} was trained on {counts.min()} to {counts.max()} samples a class, not on balanced data", []
        sizes[name] = int(counts.sum())
    if max(sizes.values()) > SIMILAR * min(sizes.values()):
        told = ", ".join(f"{name} on {n}" for name, n in sizes.items())
        return "", [f"{what}: the models were trained on different numbers of samples: {told}"]
    return "", []
