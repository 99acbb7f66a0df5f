"""Figures of many numbers at once: heat maps over corruptions and classes, accuracy by class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from reports.figures.drawing import (
    new_axes,
    percent_axis,
    short_name,
)
from reports.svg import INK, PALETTE
from reports.tables import one
from robustbench_ext.axes import CLASSIFIER, CLEAN, model_names, of_kind
from robustbench_ext.results import RunResults


def corruption_heatmap(results: RunResults, model: str, ax: Axes | None = None) -> Axes:
    """Accuracy of one model under every corruption (rows) and severity (columns), in percent."""
    ax = ax or new_axes()
    found = of_kind(results, "corruption")
    names = list(dict.fromkeys(c["corruption"] for c in found))
    severities = sorted({c["severity"] for c in found})
    grid = np.full((len(names), len(severities)), np.nan)
    for condition in found:
        row = one(results, model=model, condition=condition["label"], probe=CLASSIFIER, metric="accuracy")
        if row is not None and row.value is not None:
            grid[names.index(condition["corruption"]), severities.index(condition["severity"])] = 100 * row.value
    _heat(ax, grid, names, [str(s) for s in severities])
    ax.set_xlabel("severity")
    ax.set_title(f"{short_name(model)}: accuracy, %")
    return ax


def corruption_matrix(results: RunResults, ax: Axes | None = None) -> Axes:
    """Accuracy of every model (rows) under the most severe form of every corruption (columns), in percent."""
    ax = ax or new_axes()
    worst: dict[str, dict[str, Any]] = {}
    for condition in of_kind(results, "corruption"):
        name = str(condition["corruption"])
        if name not in worst or worst[name]["severity"] <= condition["severity"]:
            worst[name] = condition
    queries = [{"condition": c["label"], "metric": "accuracy"} for c in worst.values()]
    _heat(ax, _grid(results, queries), [short_name(m) for m in model_names(results)], list(worst), upright=False)
    ax.set_title("Accuracy under each corruption at its most severe, %")
    return ax


def class_matrix(results: RunResults, condition: str, ax: Axes | None = None) -> Axes:
    """Accuracy of every model (rows) for each class (columns) under one condition, in percent."""
    ax = ax or new_axes()
    metric = "accuracy" if condition == CLEAN else "robust_accuracy"
    classes = [str(c) for c in results.data["classes"]]
    queries = [{"condition": condition, "metric": metric, "group": c} for c in classes]
    _heat(ax, _grid(results, queries), [short_name(m) for m in model_names(results)], classes, upright=False)
    ax.set_title(f"{short_name(condition)}: accuracy by class, %")
    return ax


def _grid(results: RunResults, queries: Sequence[dict[str, Any]]) -> np.ndarray:
    """Values in percent: a row a model, a column a query, NaN where nothing was measured."""
    rows = [[one(results, model=m, probe=CLASSIFIER, **query) for query in queries] for m in model_names(results)]
    values = [[np.nan if r is None or r.value is None else 100 * r.value for r in line] for line in rows]
    return np.array(values, dtype=np.float64)


def _heat(ax: Axes, grid: np.ndarray, rows: list[str], columns: list[str], upright: bool = True) -> None:
    """Percentages as colours and as numbers."""
    ax.imshow(grid, cmap="cividis", vmin=0, vmax=100, aspect="auto")
    for i, j in zip(*np.nonzero(np.isfinite(grid)), strict=True):
        ax.text(
            j,
            i,
            f"{grid[i, j]:.0f}",
            ha="center",
            va="center",
            color="white" if grid[i, j] < 50 else "black",
            fontsize=8,
        )
    turned: dict[str, Any] = {} if upright else {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
    ax.set_xticks(range(len(columns)), [short_name(c, 20) for c in columns], **turned)
    ax.set_yticks(range(len(rows)), [short_name(r) for r in rows])
    ax.grid(visible=False)
    ax.tick_params(length=0)


def per_class(results: RunResults, model: str, conditions: list[str], ax: Axes | None = None) -> Axes:
    """Accuracy of each class under a few conditions, with 95 % intervals."""
    ax = ax or new_axes()
    classes = [str(c) for c in results.data["classes"]]
    width = 0.8 / max(1, len(conditions))
    for i, condition in enumerate(conditions):
        metric = "accuracy" if condition == CLEAN else "robust_accuracy"
        query = {"model": model, "condition": condition, "probe": CLASSIFIER, "metric": metric}
        rows = [one(results, **query, group=c) for c in classes]
        keep = [(k, r) for k, r in enumerate(rows) if r is not None and r.value is not None]
        x = np.array([k for k, _ in keep]) + (i - (len(conditions) - 1) / 2) * width
        y = np.array([r.value for _, r in keep])
        low, high = np.array([r.ci_low for _, r in keep]), np.array([r.ci_high for _, r in keep])
        colour = PALETTE[i % len(PALETTE)]
        ax.bar(x, y, width * 0.92, color=colour, alpha=0.85, label=short_name(condition))
        ax.errorbar(x, y, [y - low, high - y], fmt="none", ecolor=INK, elinewidth=0.8, capsize=0)
    long = max(map(len, classes), default=0) * len(classes) > 60
    turned: dict[str, Any] = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if long else {}
    ax.set_xticks(range(len(classes)), [short_name(c, 14) for c in classes], **turned)
    ax.grid(axis="x", visible=False)
    ax.set_title(f"{short_name(model)}: accuracy by class")
    percent_axis(ax)
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14 - 0.2 * long), ncols=2, borderaxespad=0, handlelength=1)
    return ax
