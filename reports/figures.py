"""Figures of results: each function draws on a matplotlib Axes and returns it, in a notebook as well as in the report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter
from scipy.integrate import trapezoid  # numpy's has this name since 2.0 only

from reports import comparison
from reports.names import clip, shorten
from reports.spotlight import spotlight
from reports.svg import INK, MUTED, PALETTE, PAPER
from reports.tables import axis_heading, one
from robustbench_ext.axes import CLASSIFIER, CLEAN, Axis, axes, model_names, of_kind
from robustbench_ext.errors import DataError
from robustbench_ext.results import Compared, Curve, Row, RunResults

MARKERS = ("o", "s", "^", "D", "v", "P")
NAMED_CURVES = 5  # beside the first
LEGEND_LABEL = 13  # letters; three columns of longer labels do not fit under a figure
LONGEST = 26  # letters of a name in a figure
OTHERS: dict[str, Any] = {"color": MUTED, "linewidth": 0.7, "alpha": 0.5}  # series that are not told apart


def new_axes() -> Axes:
    """An Axes in the report's style, for use without a report."""
    import matplotlib.pyplot as plt

    from reports.svg import style

    with style():
        axes: Axes = plt.figure().add_subplot()
    return axes


def _percent(ax: Axes, axis: str = "y", low: float = 0.0, high: float = 1.0) -> None:
    pad = 0.02 * (high - low)
    if axis == "y":
        ax.set_ylim(low - pad, high + pad)
        ax.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    else:
        ax.set_xlim(low - pad, high + pad)
        ax.xaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))


def _named(text: str, longest: int = LONGEST) -> str:
    """A name for a figure: each of its parts short, on one line, in one direction of writing."""
    return shorten(text, longest)


def _title(text: str) -> str:
    """A title of one line: names in it are shortened."""
    return clip(text, 54)


def _looks(results: RunResults) -> Iterator[tuple[str, int | None]]:
    """Models with their colours, grey ones (None) first, so that the coloured lie on top."""
    shown = spotlight(results)
    yield from ((name, None) for name in model_names(results) if name not in shown)
    yield from ((name, i) for i, name in enumerate(shown))


def _models_legend(ax: Axes, results: RunResults) -> None:
    """Under the axes: the models by name, and how many are grey."""
    shown = spotlight(results)
    others = len(results.models) - len(shown)
    if others:
        ax.plot([], [], label=_others(others), **OTHERS)
    _legend_below(ax, len(shown) + bool(others))


def _line(ax: Axes, x: list[float], rows: list[Row], i: int | None, label: str) -> None:
    """Values with their intervals as a band; one colour and one marker per series, or none of both."""
    y = [float("nan") if row.value is None else row.value for row in rows]
    if i is None:
        ax.plot(x, y, **OTHERS)
        return
    colour = PALETTE[i % len(PALETTE)]
    ax.plot(x, y, color=colour, marker=MARKERS[i % len(MARKERS)], markersize=4, label=_named(label))
    ends = [[float("nan") if end is None else end for end in (row.ci_low, row.ci_high)] for row in rows]
    ax.fill_between(x, [e[0] for e in ends], [e[1] for e in ends], color=colour, alpha=0.18, linewidth=0)


def robust_accuracy_curve(results: RunResults, norm: str, ax: Axes | None = None) -> Axes:
    """Worst-case robust accuracy against the budget, from the clean accuracy at 0, with 95 % bands."""
    ax = ax or new_axes()
    found = [c for c in of_kind(results, "worst-case") if c["norm"] == norm]
    for model, i in _looks(results):
        clean = one(results, model=model, condition=CLEAN, probe=CLASSIFIER, metric="accuracy")
        rows, x = ([clean], [0.0]) if clean else ([], [])
        for condition in found:
            query = {"condition": condition["label"], "probe": CLASSIFIER, "metric": "robust_accuracy"}
            row = one(results, model=model, **query)
            if row is not None:
                rows.append(row)
                x.append(float(condition["eps"]))
        _line(ax, x, rows, i, model)
    ax.set_xlabel(f"budget, {norm}")
    ax.set_title("Robust accuracy against the budget")
    ax.set_xlim(left=0)
    _percent(ax)
    _models_legend(ax, results)
    return ax


def distance_curves(curves: list[Curve], norm: str, ax: Axes | None = None) -> Axes:
    """Robust accuracy at every budget, from the distances that minimum-norm attacks found, with simultaneous bands."""
    ax = ax or new_axes()
    several = len({curve.condition for curve in curves}) > 1
    for i, curve in enumerate(curves):
        colour = PALETTE[i % len(PALETTE)]
        eps, value = curve.data["eps"], curve.data["value"]
        label = f"{_named(curve.model)}: {_named(curve.condition)}" if several else _named(curve.model)
        style = {**_style(i), "marker": ""}
        ax.plot(eps, value, label=label, **style)
        ax.fill_between(eps, curve.data["low"], curve.data["high"], color=colour, alpha=0.18, linewidth=0)
    ax.set_xlabel(f"budget, {norm}")
    ax.set_title("Robust accuracy at every budget")
    ax.set_xlim(left=0)
    _percent(ax)
    _legend_below(ax, len(curves))
    return ax


def corruption_curve(results: RunResults, name: str, ax: Axes | None = None) -> Axes:
    """Accuracy against severity, clean at 0, with 95 % bands."""
    ax = ax or new_axes()
    found = [c for c in of_kind(results, "corruption") if c["corruption"] == name]
    for model, i in _looks(results):
        pairs = [(0, CLEAN), *((c["severity"], c["label"]) for c in found)]
        measured = [
            (float(s), row)
            for s, label in pairs
            if (row := one(results, model=model, condition=label, probe=CLASSIFIER, metric="accuracy"))
        ]
        _line(ax, [s for s, _ in measured], [row for _, row in measured], i, model)
    ax.set_xlabel("severity")
    ax.set_title(f"Accuracy under {_named(name)}")
    ax.set_xticks(range(6))
    _percent(ax)
    _models_legend(ax, results)
    return ax


def tradeoffs(results: RunResults, ax: Axes | None = None) -> Axes:
    """Accuracy of every model clean, corrupted (mean), attacked (worst case at the largest budget of each norm), on other
    domains (mean): one line a model. Lines that cross are trade-offs.
    """
    ax = ax or new_axes()
    found = axes_of(results)
    shown = spotlight(results)
    for model, i in _looks(results):
        queried = [results.find(model=model, probe=CLASSIFIER, **query) for _, query in found]
        rows = [next((r for r in rows if r.group is None or r.metric == "mean_accuracy"), None) for rows in queried]
        at = [(x, r) for x, r in enumerate(rows) if r is not None and r.value is not None]
        values = np.array([r.value for _, r in at])
        if i is None:
            ax.plot([x for x, _ in at], values, **OTHERS)
            continue
        x = np.array([x for x, _ in at]) + 0.04 * (i - (len(shown) - 1) / 2)  # bars side by side
        errors = np.array([_errors(r) for _, r in at]).T
        ax.errorbar(x, values, errors, label=_named(model), linewidth=1.4, capsize=2, **_style(i))
    ax.set_xticks(range(len(found)), [_named(name, 14) for name, _ in found])
    ax.set_ylabel("accuracy")
    ax.set_title("Clean, corrupted, attacked, elsewhere")
    _percent(ax)
    _models_legend(ax, results)
    return ax


def _errors(row: Row) -> tuple[float, float]:
    """Lengths of the two error bars of a row that has a value; 0 where it has no interval."""
    value = float(row.value or 0.0)
    low, high = (value if end is None else end for end in (row.ci_low, row.ci_high))
    return max(0.0, value - low), max(0.0, high - value)


def against(results: RunResults, across: Axis, up: Axis, ax: Axes | None = None) -> Axes:
    """Models as points on two axes of the headline, with the 95 % intervals of both."""
    ax = ax or new_axes()
    for model, i in _looks(results):
        x, y = across.row(results, model), up.row(results, model)
        if x is None or y is None or x.value is None or y.value is None:
            continue
        bars: dict[str, Any] = {"xerr": np.array([_errors(x)]).T, "yerr": np.array([_errors(y)]).T, "elinewidth": 1}
        if i is None:
            ax.errorbar(x.value, y.value, fmt="o", markersize=3, **bars, **OTHERS)
        else:
            style = _style(i) | {"linestyle": "none"}
            ax.errorbar(x.value, y.value, label=_named(model), markersize=6, **bars, **style)
    for axis, of, label in ((across, ax.xaxis, ax.set_xlabel), (up, ax.yaxis, ax.set_ylabel)):
        label(axis_heading(axis, results).title.replace(", %", ""))
        if results.metrics[axis.metric]["percent"]:
            of.set_major_formatter(PercentFormatter(1, symbol=" %"))
    ax.margins(0.08)
    ax.set_title(f"{across.title} and {up.title}")
    _models_legend(ax, results)
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
        labels.append(_named(comparison.title(c, results.metrics) if one_pair else " − ".join(map(_named, parts)), 44))
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
    ax.set_title(f"{_named(model)}: accuracy, %")
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
    _heat(ax, _grid(results, queries), [_named(m) for m in model_names(results)], list(worst), upright=False)
    ax.set_title("Accuracy under each corruption at its most severe, %")
    return ax


def class_matrix(results: RunResults, condition: str, ax: Axes | None = None) -> Axes:
    """Accuracy of every model (rows) for each class (columns) under one condition, in percent."""
    ax = ax or new_axes()
    metric = "accuracy" if condition == CLEAN else "robust_accuracy"
    classes = [str(c) for c in results.data["classes"]]
    queries = [{"condition": condition, "metric": metric, "group": c} for c in classes]
    _heat(ax, _grid(results, queries), [_named(m) for m in model_names(results)], classes, upright=False)
    ax.set_title(f"{_named(condition)}: accuracy by class, %")
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
    ax.set_xticks(range(len(columns)), [_named(c, 20) for c in columns], **turned)
    ax.set_yticks(range(len(rows)), [_named(r) for r in rows])
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
        ax.bar(x, y, width * 0.92, color=colour, alpha=0.85, label=_named(condition))
        ax.errorbar(x, y, [y - low, high - y], fmt="none", ecolor=INK, elinewidth=0.8, capsize=0)
    long = max(map(len, classes), default=0) * len(classes) > 60
    turned: dict[str, Any] = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if long else {}
    ax.set_xticks(range(len(classes)), [_named(c, 14) for c in classes], **turned)
    ax.grid(axis="x", visible=False)
    ax.set_title(f"{_named(model)}: accuracy by class")
    _percent(ax)
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14 - 0.2 * long), ncols=2, borderaxespad=0, handlelength=1)
    return ax


def reliability_diagram(curves: list[Curve], title: str, ax: Axes | None = None) -> Axes:
    """Accuracy against confidence per bin, with Wilson intervals, bin by bin; a perfectly calibrated model is on the diagonal.

    The grey band is where all bins of the first curve lie at once, for 95 % of calibrated models with these confidences.
    """
    ax = ax or new_axes()
    ax.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    if curves and "calibrated_low" in curves[0].data:
        first = curves[0].data
        ax.fill_between(
            first["confidence"], first["calibrated_low"], first["calibrated_high"], color=MUTED, alpha=0.15, linewidth=0
        )
    for i, curve in enumerate(curves):
        data = {name: np.array(values) for name, values in curve.data.items()}
        colour = PALETTE[i % len(PALETTE)]
        errors = [data["accuracy"] - data["low"], data["high"] - data["accuracy"]]
        ax.errorbar(data["confidence"], data["accuracy"], errors, fmt="none", ecolor=colour, elinewidth=1, alpha=0.45)
        # A bin's area shows its share of the samples, so that a bin of three does not look like one of a thousand.
        size = 12 + 160 * data["n"] / data["n"].sum()
        marker = MARKERS[i % len(MARKERS)]
        at = (data["confidence"], data["accuracy"])
        ax.scatter(*at, size, color=colour, marker=marker, alpha=0.85, linewidth=0, clip_on=False, zorder=3)
        ax.plot([], [], color=colour, marker=marker, linestyle="none", label=_named(curve.probe))
    ax.set_xlabel("confidence")
    ax.set_ylabel("accuracy")
    ax.set_title(_title(title))
    _percent(ax)
    _percent(ax, "x")
    _legend_below(ax, len(curves))
    return ax


def _style(i: int) -> dict[str, Any]:
    """Colour and marker of the i-th series; beyond the palette lines are dashed and markers hollow: none comes twice."""
    colour, again = PALETTE[i % len(PALETTE)], i >= len(PALETTE)
    return {
        "color": colour,
        "marker": MARKERS[i % len(MARKERS)],
        "markerfacecolor": PAPER if again else colour,
        "linestyle": (0, (3, 2)) if again else "-",
    }


def risk_coverage(curves: list[Curve], title: str, ax: Axes | None = None) -> Axes:
    """Error rate among the samples that are answered, least suspicious first, against their share.

    Of more than six, the first (which the others are compared with) and the five of the lowest errors are named.
    """
    ax = ax or new_axes()
    by_area = sorted(curves[1:], key=lambda c: float(trapezoid(c.data["risk"], c.data["coverage"])))
    _best_named(ax, curves[:1] + by_area, "coverage", "risk")
    ax.set_xlabel("samples answered")
    ax.set_ylabel("of these, wrong")
    ax.set_title(_title(title))
    _percent(ax, "x")
    ax.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    ax.set_ylim(bottom=0)
    _legend_below(ax, min(len(curves), NAMED_CURVES + 2))
    return ax


def _best_named(ax: Axes, curves: list[Curve], x: str, y: str) -> None:
    """The first curves in colour with their names, the others in grey with their number."""
    named, others = curves[: NAMED_CURVES + 1], curves[NAMED_CURVES + 1 :]
    for curve in others:
        ax.plot(curve.data[x], curve.data[y], **OTHERS)
    for i, curve in enumerate(named):
        ax.plot(curve.data[x], curve.data[y], color=PALETTE[i % len(PALETTE)], label=_named(curve.probe))
    if others:
        ax.plot([], [], label=_others(len(others)), **OTHERS)


def _others(count: int) -> str:
    return "1 other" if count == 1 else f"{count} others"


def coverage_gap(curves: list[Curve], title: str, ax: Axes | None = None) -> Axes:
    """Coverage minus nominal coverage of intervals, level by level; 0 is as promised.

    The bars hold for all levels of an estimator at once, at 95 %. Levels are drawn at equal distances and the series beside
    each other: on a diagonal of coverage against nominal coverage, what matters (88 or 91 of 90 %) could not be seen.
    """
    ax = ax or new_axes()
    ax.axhline(0, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    levels = curves[0].data["nominal"]
    step = 0.7 / max(1, len(curves))
    for i, curve in enumerate(curves):
        data = {name: np.array(values) for name, values in curve.data.items()}
        gap = data["observed"] - data["nominal"]
        x = np.arange(len(gap)) + (i - (len(curves) - 1) / 2) * step
        bounds = [data["observed"] - data["low"], data["high"] - data["observed"]]
        style = _style(i) | {"linestyle": "none", "markersize": 4.5}
        ax.errorbar(x, gap, bounds, elinewidth=1, label=_named(curve.probe), **style)
    ax.set_xticks(range(len(levels)), [f"{100 * level:g} %" for level in levels])
    ax.grid(axis="x", visible=False)
    ax.set_xlabel("nominal coverage")
    ax.set_ylabel("coverage minus nominal")
    ax.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    ax.set_title(_title(title))
    _legend_below(ax, len(curves))
    return ax


def intervals(curve: Curve, title: str, ax: Axes | None = None) -> Axes:
    """Intervals of some samples: against the input where it is one number, with the truth where it is known; otherwise in the
    order of their width, about their point predictions.
    """
    ax = ax or new_axes()
    data = {name: np.array(values) for name, values in curve.data.items()}
    against_input = "x" in data
    order = np.argsort(data["x"] if against_input else data["high"] - data["low"], kind="stable")
    data = {name: values[order] for name, values in data.items()}
    origin = 0.0 if against_input else data["point"]
    x = data["x"] if against_input else np.arange(len(order)) / max(1, len(order) - 1)
    low, high, y = data["low"] - origin, data["high"] - origin, data["y"] - origin
    ax.fill_between(x, low, high, color=PALETTE[0], alpha=0.22, linewidth=0, label="interval")
    ax.plot(x, data["point"] - origin, color=PALETTE[0], linewidth=1.4, label="prediction")
    if "truth_low" in data:
        for i, name in enumerate(("truth_low", "truth_high")):
            label = "true quantiles" if i == 0 else None
            ax.plot(x, data[name] - origin, color=INK, linewidth=1, linestyle=(0, (3, 2)), label=label)
    inside = (low <= y) & (y <= high)
    for mask, colour, marker, label in (
        (inside, PALETTE[2], "o", "inside"),
        (~inside, PALETTE[1], "x", f"outside ({np.mean(~inside):.0%})"),
    ):
        if mask.any():
            ax.scatter(x[mask], y[mask], 9, color=colour, marker=marker, linewidth=0.9, alpha=0.8, label=label)
    # Far misses may leave the picture, the intervals may not; where these are infinite the targets decide.
    both = np.concatenate([low, high, y])
    ends = np.quantile(both[np.isfinite(both)], [0.005, 0.995])
    pad = 0.1 * (ends[1] - ends[0]) or 1.0
    ax.set_ylim(ends[0] - pad, ends[1] + pad)
    ax.set_xlabel("x" if against_input else "samples, narrowest interval first")
    ax.set_ylabel("y" if against_input else "distance from the prediction")
    if not against_input:
        ax.xaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    ax.set_title(_title(title))
    _legend_below(ax, 5)
    return ax


def sharpness(curves: list[Curve], title: str, ax: Axes | None = None) -> Axes:
    """Widths of intervals, each estimator's sorted: low is sharp, flat is the same width everywhere."""
    ax = ax or new_axes()
    for i, curve in enumerate(curves):
        width = np.sort(np.array(curve.data["high"]) - np.array(curve.data["low"]))
        share = (np.arange(len(width)) + 0.5) / len(width)
        ax.plot(share, width, label=_named(curve.probe), **{**_style(i), "marker": ""})
    ax.set_xlabel("samples, narrowest interval first")
    ax.set_ylabel("width, in units of y")
    ax.set_ylim(bottom=0)
    ax.xaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    ax.set_title(_title(title))
    _legend_below(ax, len(curves))
    return ax


def _legend_below(ax: Axes, entries: int) -> None:
    """A legend under the axes and their label, where it hides nothing. The distance is in points: figures differ in height."""
    labels = ax.get_legend_handles_labels()[1]
    if not labels:
        return
    longest = max(map(len, labels))
    columns = min(3 if longest <= LEGEND_LABEL else 2, entries)
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, 0), ncols=columns, borderaxespad=4.4, handlelength=1.4)


def score_histogram(curve: Curve, title: str, ax: Axes | None = None) -> Axes:
    """Scores of clean and of unknown (or attacked) inputs."""
    ax = ax or new_axes()
    edges = np.array(curve.data["edges"])
    for i, (name, label) in enumerate(
        (("clean", "clean"), ("unknown", _named(curve.condition.removeprefix("outliers "))))
    ):
        shares = np.array(curve.data[name][:-1])
        ax.stairs(shares, edges, fill=True, color=PALETTE[i], alpha=0.3)
        ax.stairs(shares, edges, color=PALETTE[i], linewidth=1.4, label=label)
    ax.set_xlabel(f"{_named(curve.probe)} score (right: unlike the training data)")
    ax.set_ylabel("share of samples")
    ax.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    ax.set_title(_title(title))
    ax.legend()
    return ax


def energy_histogram(curve: Curve, title: str, ax: Axes | None = None) -> Axes:
    """Energies of natural and of attacked inputs: marginal (filled) and joint, of the true class (dashed)."""
    ax = ax or new_axes()
    edges = np.array(curve.data["edges"])
    for i, name in enumerate(("natural", "attacked")):
        marginal, joint = (np.array(curve.data[key][:-1]) for key in (name, f"{name}_joint"))
        ax.stairs(marginal, edges, fill=True, color=PALETTE[i], alpha=0.3)
        ax.stairs(marginal, edges, color=PALETTE[i], linewidth=1.4, label=f"{name}, E(x)")
        ax.stairs(joint, edges, color=PALETTE[i], linewidth=1.2, linestyle=(0, (3, 2)), label=f"{name}, E(x, y)")
    ax.set_xlabel("energy (right: unlike the training data)")
    ax.set_ylabel("share of samples")
    ax.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    ax.set_title(_title(title))
    ax.legend()
    return ax


def roc(curves: list[Curve], title: str, ax: Axes | None = None) -> Axes:
    """ROC curves of several detectors on the same inputs; unknown inputs are the positives.

    Of more than six, the first (which the others are compared with) and the five of the largest area are named.
    """
    ax = ax or new_axes()
    ax.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    by_area = sorted(curves[1:], key=lambda c: -float(trapezoid(c.data["tpr"], c.data["fpr"])))
    _best_named(ax, curves[:1] + by_area, "fpr", "tpr")
    ax.set_xlabel("clean inputs flagged")
    ax.set_ylabel("unknown inputs flagged")
    ax.set_title(_title(title))
    _percent(ax)
    _percent(ax, "x")
    ax.legend(loc="lower right")
    return ax


def training_curve(model: dict[str, Any], ax: Axes | None = None) -> Axes:
    """Clean and robust accuracy on the calibration split by epoch, and the epoch that was kept."""
    ax = ax or new_axes()
    curve = model["training"]["curve"]
    epochs = [row["epoch"] for row in curve]
    for i, name in enumerate(("clean_accuracy", "robust_accuracy")):
        label = name.partition("_")[0]
        ax.plot(epochs, [row[name] for row in curve], color=PALETTE[i], marker=MARKERS[i], markersize=3, label=label)
    kept = model["training"]["selected"]["epoch"]
    ax.axvline(kept, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), label=f"kept: epoch {kept}")
    ax.set_xlabel("epoch")
    ax.set_title(f"{_named(str(model['name']))}: accuracy on the calibration split")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    _percent(ax)
    ax.legend()
    return ax


def training_loss(model: dict[str, Any], ax: Axes | None = None) -> Axes:
    """A regressor's loss by epoch, on training data and on what was held out of it, and the epoch that was kept."""
    ax = ax or new_axes()
    curve = model["training"]["curve"]
    epochs = [row["epoch"] for row in curve]
    for i, name in enumerate(("loss", "held_out")):
        label = {"loss": "training", "held_out": "held out"}[name]
        ax.plot(epochs, [row[name] for row in curve], color=PALETTE[i], label=label)
    kept = model["training"]["selected"]["epoch"]
    ax.axvline(kept, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), label=f"kept: epoch {kept}")
    ax.set_xlabel("epoch")
    ax.set_ylabel("squared error, standardised y")
    ax.set_title(f"{_named(str(model['name']))}: loss")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_ylim(bottom=0)
    ax.legend()
    return ax


def training_energies(model: dict[str, Any], ax: Axes | None = None) -> Axes:
    """Mean E(x) - E(x*) by epoch on training and on calibration data, with two standard errors; the alarm, if any.

    A steep fall on training data is where robust overfitting begins.
    """
    ax = ax or new_axes()
    curve = model["training"]["curve"]
    epochs = [row["epoch"] for row in curve]
    for i, name in enumerate(("train", "calibration")):
        value = np.array([row[f"delta_energy_{name}"] for row in curve])
        error = np.array([row[f"delta_energy_se_{name}"] for row in curve])
        ax.plot(epochs, value, color=PALETTE[i], marker=MARKERS[i], markersize=3, label=name)
        ax.fill_between(epochs, value - 2 * error, value + 2 * error, color=PALETTE[i], alpha=0.18, linewidth=0)
    if model["training"].get("alarm"):
        at = model["training"]["alarm"]
        ax.axvline(at, color=PALETTE[1], linewidth=1, linestyle=(0, (1, 2)), label=f"alarm: epoch {at}")
    ax.set_xlabel("epoch")
    ax.set_title(f"{_named(str(model['name']))}: energy, natural minus adversarial")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend()
    return ax


def module_criticality(found: dict[str, Any], ax: Axes | None = None) -> Axes:
    """Module robust criticality in the network's order, input first, with the module that was tuned marked.

    Args:
        found: the content of a rift.json.
    """
    ax = ax or new_axes()
    modules = found["criticality"]["modules"]
    rows, tuned = np.arange(len(modules)), [m["name"] == found.get("module") for m in modules]
    colours = [PALETTE[int(mark)] for mark in tuned]
    ax.barh(rows, [m["mrc"] for m in modules], 0.7, color=colours, alpha=0.85)
    # Values span orders of magnitude: beside a bar that is too short to be seen stands its number.
    for k, (module, mark) in enumerate(zip(modules, tuned, strict=True)):
        text = f"{module['mrc']:.3g}" + (" (tuned)" if mark else "")
        colour, weight = (PALETTE[1], "bold") if mark else (INK, "normal")
        at = (max(module["mrc"], 0.0), k)
        ax.annotate(
            text, at, (3, 0), textcoords="offset points", va="center", fontsize=7.5, color=colour, weight=weight
        )
    ax.set_yticks(rows, [m["name"].removesuffix(".weight") for m in modules])
    ax.set_ylim(len(modules) - 0.5, -0.5)
    ax.grid(axis="y", visible=False)
    ax.margins(x=0.18)
    ax.set_xlabel(f"rise of the robust loss (nats), weight moved by up to {100 * found['eps_w']:g} %")
    ax.set_title("Module robust criticality")
    return ax


__all__ = [
    "against",
    "class_matrix",
    "clean_against_robust",
    "corruption_curve",
    "corruption_heatmap",
    "corruption_matrix",
    "coverage_gap",
    "distance_curves",
    "energy_histogram",
    "forest",
    "intervals",
    "module_criticality",
    "per_class",
    "reliability_diagram",
    "risk_coverage",
    "robust_accuracy_curve",
    "robust_against_calibration",
    "roc",
    "score_histogram",
    "sharpness",
    "tradeoffs",
    "training_curve",
    "training_energies",
    "training_loss",
]
