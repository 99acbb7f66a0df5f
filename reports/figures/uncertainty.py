"""Figures of calibration, selective prediction and intervals."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter
from scipy.integrate import trapezoid  # numpy's has this name since 2.0 only

from reports.figures.drawing import (
    MARKERS,
    NAMED_CURVES,
    best_named,
    legend_below,
    new_axes,
    percent_axis,
    series_style,
    short_name,
    short_title,
)
from reports.svg import INK, MUTED, PALETTE
from robustbench_ext.results import Curve


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
        ax.plot([], [], color=colour, marker=marker, linestyle="none", label=short_name(curve.probe))
    ax.set_xlabel("confidence")
    ax.set_ylabel("accuracy")
    ax.set_title(short_title(title))
    percent_axis(ax)
    percent_axis(ax, "x")
    legend_below(ax, len(curves))
    return ax


def risk_coverage(curves: list[Curve], title: str, ax: Axes | None = None) -> Axes:
    """Error rate among the samples that are answered, least suspicious first, against their share.

    Of more than six, the first (which the others are compared with) and the five of the lowest errors are named.
    """
    ax = ax or new_axes()
    by_area = sorted(curves[1:], key=lambda c: float(trapezoid(c.data["risk"], c.data["coverage"])))
    best_named(ax, curves[:1] + by_area, "coverage", "risk")
    ax.set_xlabel("samples answered")
    ax.set_ylabel("of these, wrong")
    ax.set_title(short_title(title))
    percent_axis(ax, "x")
    ax.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    ax.set_ylim(bottom=0)
    legend_below(ax, min(len(curves), NAMED_CURVES + 2))
    return ax


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
        style = series_style(i) | {"linestyle": "none", "markersize": 4.5}
        ax.errorbar(x, gap, bounds, elinewidth=1, label=short_name(curve.probe), **style)
    ax.set_xticks(range(len(levels)), [f"{100 * level:g} %" for level in levels])
    ax.grid(axis="x", visible=False)
    ax.set_xlabel("nominal coverage")
    ax.set_ylabel("coverage minus nominal")
    ax.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    ax.set_title(short_title(title))
    legend_below(ax, len(curves))
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
    ax.set_title(short_title(title))
    legend_below(ax, 5)
    return ax


def sharpness(curves: list[Curve], title: str, ax: Axes | None = None) -> Axes:
    """Widths of intervals, each estimator's sorted: low is sharp, flat is the same width everywhere."""
    ax = ax or new_axes()
    for i, curve in enumerate(curves):
        width = np.sort(np.array(curve.data["high"]) - np.array(curve.data["low"]))
        share = (np.arange(len(width)) + 0.5) / len(width)
        ax.plot(share, width, label=short_name(curve.probe), **{**series_style(i), "marker": ""})
    ax.set_xlabel("samples, narrowest interval first")
    ax.set_ylabel("width, in units of y")
    ax.set_ylim(bottom=0)
    ax.xaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    ax.set_title(short_title(title))
    legend_below(ax, len(curves))
    return ax
