"""Figures of accuracy: against budgets, distances and severities, across axes, model against model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter

from reports import comparison
from reports.figures.drawing import (
    OTHERS,
    coloured,
    draw_line,
    error_bars,
    legend_below,
    models_legend,
    new_axes,
    percent_axis,
    series_style,
    short_name,
)
from reports.names import clip
from reports.spotlight import spotlight
from reports.svg import MUTED, PALETTE, PAPER
from reports.tables import axis_heading, one
from robustbench_ext.axes import CLASSIFIER, CLEAN, Axis, axes, of_kind
from robustbench_ext.errors import DataError
from robustbench_ext.results import Compared, Curve, RunResults


def robust_accuracy_curve(results: RunResults, norm: str, ax: Axes | None = None) -> Axes:
    """Worst-case robust accuracy against the budget, from the clean accuracy at 0, with 95 % bands."""
    ax = ax or new_axes()
    found = [c for c in of_kind(results, "worst-case") if c["norm"] == norm]
    for model, i in coloured(results):
        clean = one(results, model=model, condition=CLEAN, probe=CLASSIFIER, metric="accuracy")
        rows, x = ([clean], [0.0]) if clean else ([], [])
        for condition in found:
            query = {"condition": condition["label"], "probe": CLASSIFIER, "metric": "robust_accuracy"}
            row = one(results, model=model, **query)
            if row is not None:
                rows.append(row)
                x.append(float(condition["eps"]))
        draw_line(ax, x, rows, i, model)
    ax.set_xlabel(f"budget, {norm}")
    ax.set_title("Robust accuracy against the budget")
    ax.set_xlim(left=0)
    percent_axis(ax)
    models_legend(ax, results)
    return ax


def distance_curves(curves: list[Curve], norm: str, ax: Axes | None = None) -> Axes:
    """Robust accuracy at every budget, from the distances that minimum-norm attacks found, with simultaneous bands."""
    ax = ax or new_axes()
    several = len({curve.condition for curve in curves}) > 1
    for i, curve in enumerate(curves):
        colour = PALETTE[i % len(PALETTE)]
        eps, value = curve.data["eps"], curve.data["value"]
        label = f"{short_name(curve.model)}: {short_name(curve.condition)}" if several else short_name(curve.model)
        style = {**series_style(i), "marker": ""}
        ax.plot(eps, value, label=label, **style)
        ax.fill_between(eps, curve.data["low"], curve.data["high"], color=colour, alpha=0.18, linewidth=0)
    ax.set_xlabel(f"budget, {norm}")
    ax.set_title("Robust accuracy at every budget")
    ax.set_xlim(left=0)
    percent_axis(ax)
    legend_below(ax, len(curves))
    return ax


def corruption_curve(results: RunResults, name: str, ax: Axes | None = None) -> Axes:
    """Accuracy against severity, clean at 0, with 95 % bands."""
    ax = ax or new_axes()
    found = [c for c in of_kind(results, "corruption") if c["corruption"] == name]
    for model, i in coloured(results):
        pairs = [(0, CLEAN), *((c["severity"], c["label"]) for c in found)]
        measured = [
            (float(s), row)
            for s, label in pairs
            if (row := one(results, model=model, condition=label, probe=CLASSIFIER, metric="accuracy"))
        ]
        draw_line(ax, [s for s, _ in measured], [row for _, row in measured], i, model)
    ax.set_xlabel("severity")
    ax.set_title(f"Accuracy under {short_name(name)}")
    ax.set_xticks(range(6))
    percent_axis(ax)
    models_legend(ax, results)
    return ax


def tradeoffs(results: RunResults, ax: Axes | None = None) -> Axes:
    """Accuracy of every model clean, corrupted (mean), attacked (worst case at the largest budget of each norm), on other
    domains (mean): one line a model. Lines that cross are trade-offs.
    """
    ax = ax or new_axes()
    found = axes_of(results)
    shown = spotlight(results)
    for model, i in coloured(results):
        queried = [results.find(model=model, probe=CLASSIFIER, **query) for _, query in found]
        rows = [next((r for r in rows if r.group is None or r.metric == "mean_accuracy"), None) for rows in queried]
        at = [(x, r) for x, r in enumerate(rows) if r is not None and r.value is not None]
        values = np.array([r.value for _, r in at])
        if i is None:
            ax.plot([x for x, _ in at], values, **OTHERS)
            continue
        x = np.array([x for x, _ in at]) + 0.04 * (i - (len(shown) - 1) / 2)  # bars side by side
        errors = np.array([error_bars(r) for _, r in at]).T
        ax.errorbar(x, values, errors, label=short_name(model), linewidth=1.4, capsize=2, **series_style(i))
    ax.set_xticks(range(len(found)), [short_name(name, 14) for name, _ in found])
    ax.set_ylabel("accuracy")
    ax.set_title("Clean, corrupted, attacked, elsewhere")
    percent_axis(ax)
    models_legend(ax, results)
    return ax


def against(results: RunResults, across: Axis, up: Axis, ax: Axes | None = None) -> Axes:
    """Models as points on two axes of the headline, with the 95 % intervals of both."""
    ax = ax or new_axes()
    for model, i in coloured(results):
        x, y = across.row(results, model), up.row(results, model)
        if x is None or y is None or x.value is None or y.value is None:
            continue
        bars: dict[str, Any] = {
            "xerr": np.array([error_bars(x)]).T,
            "yerr": np.array([error_bars(y)]).T,
            "elinewidth": 1,
        }
        if i is None:
            ax.errorbar(x.value, y.value, fmt="o", markersize=3, **bars, **OTHERS)
        else:
            style = series_style(i) | {"linestyle": "none"}
            ax.errorbar(x.value, y.value, label=short_name(model), markersize=6, **bars, **style)
    for axis, of, label in ((across, ax.xaxis, ax.set_xlabel), (up, ax.yaxis, ax.set_ylabel)):
        label(axis_heading(axis, results).title.replace(", %", ""))
        if results.metrics[axis.metric]["percent"]:
            of.set_major_formatter(PercentFormatter(1, symbol=" %"))
    ax.margins(0.08)
    ax.set_title(f"{across.title} and {up.title}")
    models_legend(ax, results)
    return ax


def clean_against_robust(results: RunResults, ax: Axes | None = None) -> Axes:
    """What robustness costs: accuracy clean against that under the first main threat. Good is the upper right."""
    return against(results, _axis(results, "robust_accuracy"), _axis(results, "accuracy"), ax)


def robust_against_calibration(results: RunResults, ax: Axes | None = None) -> Axes:
    """Whether robust models know what they know: calibration error clean against robust accuracy. Good is the lower right."""
    return against(results, _axis(results, "robust_accuracy"), _axis(results, "ece"), ax)


def _axis(results: RunResults, metric: str) -> Axis:
    """The first axis of the headline with that metric."""
    found = next((axis for axis in axes(results) if axis.metric == metric), None)
    if found is None:
        raise DataError(f"these results have no axis of {metric}; axes: {', '.join(a.title for a in axes(results))}")
    return found


def forest(results: RunResults, compared: Sequence[Compared], title: str, ax: Axes | None = None) -> Axes:
    """Differences between models with their 95 % intervals: a row each, in the order given, the first on top.

    A row is named by what differs between rows: the axis, the model, or both models. All should have the same unit. Filled
    marks are decided (corrected for the number of comparisons): triangles up are better, down worse; hollow ones are undecided.
    """
    ax = ax or new_axes()
    ax.axvline(0, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    looks: dict[str, dict[str, Any]] = {
        "better": {"color": PALETTE[0], "marker": "^"},
        "worse": {"color": PALETTE[1], "marker": "v"},
        "inconclusive": {"color": MUTED, "marker": "o", "markerfacecolor": PAPER},
    }
    one_pair = len(comparison.pairs(compared)) == 1
    one_rival = len({c.against for c in compared}) == 1
    named, labels = set(), []
    for k, c in enumerate(compared):
        parts = [c.model] if one_rival else [c.model, c.against]
        labels.append(
            short_name(comparison.title(c, results.metrics) if one_pair else " − ".join(map(short_name, parts)), 44)
        )
        if c.value is None:
            continue
        low, high = (c.value if end is None else end for end in (c.ci_low, c.ci_high))
        errors = [[max(0.0, c.value - low)], [max(0.0, high - c.value)]]
        label = None if c.outcome in named else {"inconclusive": "undecided"}.get(c.outcome, c.outcome)
        named.add(c.outcome)
        style: dict[str, Any] = {"linestyle": "none", "markersize": 5, "elinewidth": 1.2, **looks[c.outcome]}
        ax.errorbar([c.value], [k], xerr=errors, label=label, **style)
    ax.set_yticks(range(len(labels)), labels)
    ax.set_ylim(len(labels) - 0.5, -0.5)
    ax.grid(axis="y", visible=False)
    if compared and results.metrics[compared[0].metric]["percent"]:
        ax.xaxis.set_major_formatter(PercentFormatter(1, symbol=""))
        ax.set_xlabel("difference, points")
    else:
        ax.set_xlabel("difference")
    ax.xaxis.set_major_locator(MaxNLocator(6))
    ax.set_title(clip(title, 44))
    if named:
        # Under the label of the axis, whatever the height of the figure.
        ax.legend(loc="upper left", bbox_to_anchor=(0, 0), borderaxespad=3.8, ncols=3, handlelength=1)
    return ax


def axes_of(results: RunResults) -> list[tuple[str, dict[str, str]]]:
    """The axes of `tradeoffs` that the run has: a name, and what finds the accuracy."""
    axes = [("clean", {"condition": CLEAN, "metric": "accuracy"})]
    for kind, name in (("corruptions", "corrupted"), ("domains", "domains")):
        for summary in of_kind(results, kind):
            axes.append((name, {"condition": summary["label"], "metric": "mean_accuracy"}))
    for norm in sorted({c["norm"] for c in of_kind(results, "worst-case")}):
        worst = max((c for c in of_kind(results, "worst-case") if c["norm"] == norm), key=lambda c: float(c["eps"]))
        axes.append(
            (worst["label"].removeprefix("worst case "), {"condition": worst["label"], "metric": "robust_accuracy"})
        )
    return axes
