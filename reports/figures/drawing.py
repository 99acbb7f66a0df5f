"""What figures share: axes in percent, short names, one colour and marker per model, legends under the axes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from reports.names import clip, shorten
from reports.spotlight import spotlight
from reports.svg import MUTED, PALETTE, PAPER
from robustbench_ext.axes import model_names
from robustbench_ext.results import Curve, Row, RunResults

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


def percent_axis(ax: Axes, axis: str = "y", low: float = 0.0, high: float = 1.0) -> None:
    """An axis in percent, from `low` to `high` with a little room on both sides."""
    pad = 0.02 * (high - low)
    if axis == "y":
        ax.set_ylim(low - pad, high + pad)
        ax.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    else:
        ax.set_xlim(low - pad, high + pad)
        ax.xaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))


def short_name(text: str, longest: int = LONGEST) -> str:
    """A name for a figure: each of its parts short, on one line, in one direction of writing."""
    return shorten(text, longest)


def short_title(text: str) -> str:
    """A title of one line: names in it are shortened."""
    return clip(text, 54)


def coloured(results: RunResults) -> Iterator[tuple[str, int | None]]:
    """Models with their colours, grey ones (None) first, so that the coloured lie on top."""
    shown = spotlight(results)
    yield from ((name, None) for name in model_names(results) if name not in shown)
    yield from ((name, i) for i, name in enumerate(shown))


def models_legend(ax: Axes, results: RunResults) -> None:
    """Under the axes: the models by name, and how many are grey."""
    shown = spotlight(results)
    others = len(results.models) - len(shown)
    if others:
        ax.plot([], [], label=others_label(others), **OTHERS)
    legend_below(ax, len(shown) + bool(others))


def draw_line(ax: Axes, x: list[float], rows: list[Row], i: int | None, label: str) -> None:
    """Values with their intervals as a band; one colour and one marker per series, or none of both."""
    y = [float("nan") if row.value is None else row.value for row in rows]
    if i is None:
        ax.plot(x, y, **OTHERS)
        return
    colour = PALETTE[i % len(PALETTE)]
    ax.plot(x, y, color=colour, marker=MARKERS[i % len(MARKERS)], markersize=4, label=short_name(label))
    ends = [[float("nan") if end is None else end for end in (row.ci_low, row.ci_high)] for row in rows]
    ax.fill_between(x, [e[0] for e in ends], [e[1] for e in ends], color=colour, alpha=0.18, linewidth=0)


def error_bars(row: Row) -> tuple[float, float]:
    """Lengths of the two error bars of a row that has a value; 0 where it has no interval."""
    value = float(row.value or 0.0)
    low, high = (value if end is None else end for end in (row.ci_low, row.ci_high))
    return max(0.0, value - low), max(0.0, high - value)


def series_style(i: int) -> dict[str, Any]:
    """Colour and marker of the i-th series; beyond the palette lines are dashed and markers hollow: none comes twice."""
    colour, again = PALETTE[i % len(PALETTE)], i >= len(PALETTE)
    return {
        "color": colour,
        "marker": MARKERS[i % len(MARKERS)],
        "markerfacecolor": PAPER if again else colour,
        "linestyle": (0, (3, 2)) if again else "-",
    }


def others_label(count: int) -> str:
    """`1 other`, `5 others`."""
    return "1 other" if count == 1 else f"{count} others"


def best_named(ax: Axes, curves: list[Curve], x: str, y: str) -> None:
    """The first curves in colour with their names, the others in grey with their number."""
    named, others = curves[: NAMED_CURVES + 1], curves[NAMED_CURVES + 1 :]
    for curve in others:
        ax.plot(curve.data[x], curve.data[y], **OTHERS)
    for i, curve in enumerate(named):
        ax.plot(curve.data[x], curve.data[y], color=PALETTE[i % len(PALETTE)], label=short_name(curve.probe))
    if others:
        ax.plot([], [], label=others_label(len(others)), **OTHERS)


def legend_below(ax: Axes, entries: int) -> None:
    """A legend under the axes and their label, where it hides nothing. The distance is in points: figures differ in height."""
    labels = ax.get_legend_handles_labels()[1]
    if not labels:
        return
    longest = max(map(len, labels))
    columns = min(3 if longest <= LEGEND_LABEL else 2, entries)
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, 0), ncols=columns, borderaxespad=4.4, handlelength=1.4)
