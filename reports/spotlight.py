"""Which models are drawn where there are more than a figure can tell apart: named and coloured, or one by one."""

from __future__ import annotations

from reports.svg import PALETTE
from robustbench_ext.axes import Axis, axes, model_names
from robustbench_ext.results import RunResults

MOST = len(PALETTE)  # more colours nobody can tell apart


def spotlight(results: RunResults, most: int = MOST) -> list[str]:
    """The models to draw by name, in the suite's order: all, or those with the best value on an axis, then the first."""
    names = model_names(results)
    if len(names) <= most:
        return names
    leaders = [leader for axis in axes(results) if (leader := ahead(results, axis)) is not None]
    chosen = set(list(dict.fromkeys([*leaders, *names]))[:most])
    return [name for name in names if name in chosen]


def ahead(results: RunResults, axis: Axis) -> str | None:
    """The model with the best value on an axis, by chance or not; None where no direction is better."""
    higher = results.metrics[axis.metric]["higher_is_better"]
    rows = [(name, axis.row(results, name)) for name in model_names(results)]
    values = {name: row.value for name, row in rows if row is not None and row.value is not None}
    return (max if higher else min)(values, key=lambda name: values[name]) if values and higher is not None else None


def one_by_one(results: RunResults) -> str:
    """A sentence where figures of single models do not show all models; empty where they do."""
    count = len(results.models)
    if count <= MOST:
        return ""
    return (
        f" Figures of single models are drawn for {MOST} of {count}: those with the best value on an axis, then the "
        "first of the suite. The tables hold all models; the curves of all are in results.json."
    )
