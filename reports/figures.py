"""Figures of results: each function draws on a matplotlib Axes and returns it, in a notebook as well as in the report."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter

from reports.svg import INK, MUTED, PALETTE, PAPER
from reports.tables import one
from robustbench_ext.axes import CLASSIFIER, CLEAN, model_names, of_kind
from robustbench_ext.results import Curve, Row, RunResults

MARKERS = ("o", "s", "^", "D", "v", "P")
NAMED_CURVES = 5  # beside the first
LEGEND_LABEL = 13  # letters; three columns of longer labels do not fit under a figure


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


def _line(ax: Axes, x: list[float], rows: list[Row], i: int, label: str) -> None:
    """Values with their intervals as a band; one colour and one marker per series."""
    colour = PALETTE[i % len(PALETTE)]
    y = [float("nan") if row.value is None else row.value for row in rows]
    ax.plot(x, y, color=colour, marker=MARKERS[i % len(MARKERS)], markersize=4, label=label)
    bounds = [(row.ci_low, row.ci_high) for row in rows]
    ax.fill_between(
        x, [b[0] or 0.0 for b in bounds], [b[1] or 0.0 for b in bounds], color=colour, alpha=0.18, linewidth=0
    )


def robust_accuracy_curve(results: RunResults, norm: str, ax: Axes | None = None) -> Axes:
    """Worst-case robust accuracy against the budget, from the clean accuracy at 0, with 95 % bands."""
    ax = ax or new_axes()
    found = [c for c in of_kind(results, "worst-case") if c["norm"] == norm]
    for i, model in enumerate(model_names(results)):
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
    ax.legend()
    return ax


def distance_curves(curves: list[Curve], norm: str, ax: Axes | None = None) -> Axes:
    """Robust accuracy at every budget, from the distances that minimum-norm attacks found, with simultaneous bands."""
    ax = ax or new_axes()
    for i, curve in enumerate(curves):
        colour = PALETTE[i % len(PALETTE)]
        eps, value = curve.data["eps"], curve.data["value"]
        ax.plot(eps, value, color=colour, label=f"{curve.model}: {curve.condition}")
        ax.fill_between(eps, curve.data["low"], curve.data["high"], color=colour, alpha=0.18, linewidth=0)
    ax.set_xlabel(f"budget, {norm}")
    ax.set_title("Robust accuracy at every budget")
    ax.set_xlim(left=0)
    _percent(ax)
    ax.legend()
    return ax


def corruption_curve(results: RunResults, name: str, ax: Axes | None = None) -> Axes:
    """Accuracy against severity, clean at 0, with 95 % bands."""
    ax = ax or new_axes()
    found = [c for c in of_kind(results, "corruption") if c["corruption"] == name]
    for i, model in enumerate(model_names(results)):
        pairs = [(0, CLEAN), *((c["severity"], c["label"]) for c in found)]
        measured = [
            (float(s), row)
            for s, label in pairs
            if (row := one(results, model=model, condition=label, probe=CLASSIFIER, metric="accuracy"))
        ]
        _line(ax, [s for s, _ in measured], [row for _, row in measured], i, model)
    ax.set_xlabel("severity")
    ax.set_title(f"Accuracy under {name}")
    ax.set_xticks(range(6))
    _percent(ax)
    ax.legend()
    return ax


def tradeoffs(results: RunResults, ax: Axes | None = None) -> Axes:
    """Accuracy of every model clean, corrupted (mean), attacked (worst case at the largest budget of each norm), on other
    domains (mean): one line a model. Lines that cross are trade-offs.
    """
    ax = ax or new_axes()
    axes = axes_of(results)
    models = model_names(results)
    for i, model in enumerate(models):
        found = [results.find(model=model, probe=CLASSIFIER, **query) for _, query in axes]
        rows = [next((r for r in rows if r.group is None or r.metric == "mean_accuracy"), None) for rows in found]
        at = [(x, r) for x, r in enumerate(rows) if r is not None and r.value is not None]
        x = np.array([x for x, _ in at]) + 0.04 * (i - (len(models) - 1) / 2)  # bars side by side
        values = np.array([r.value for _, r in at])
        low, high = (
            np.array([v.value if end is None else end for v, end in ends])
            for ends in (
                [(r, r.ci_low) for _, r in at],
                [(r, r.ci_high) for _, r in at],
            )
        )
        ax.errorbar(x, values, yerr=[values - low, high - values], label=model, linewidth=1.4, capsize=2, **_style(i))
    ax.set_xticks(range(len(axes)), [name for name, _ in axes])
    ax.set_ylabel("accuracy")
    ax.set_title("Clean, corrupted, attacked, elsewhere")
    _percent(ax)
    _legend_below(ax, len(models))
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
    ax.imshow(grid, cmap="cividis", vmin=0, vmax=100, aspect="auto")
    for i, j in zip(*np.nonzero(np.isfinite(grid)), strict=True):
        ax.text(
            j,
            i,
            f"{grid[i, j]:.0f}",
            ha="center",
            va="center",
            color="white" if grid[i, j] < 55 else "black",
            fontsize=8,
        )
    ax.set_xticks(range(len(severities)), [str(s) for s in severities])
    ax.set_yticks(range(len(names)), names)
    ax.set_xlabel("severity")
    ax.set_title(f"{model}: accuracy, %")
    ax.grid(visible=False)
    return ax


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
        ax.bar(x, y, width * 0.92, color=colour, alpha=0.85, label=condition)
        ax.errorbar(x, y, [y - low, high - y], fmt="none", ecolor=INK, elinewidth=0.8, capsize=0)
    ax.set_xticks(range(len(classes)), classes)
    ax.grid(axis="x", visible=False)
    ax.set_xlabel("class")
    ax.set_title(model)
    _percent(ax)
    ax.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, borderaxespad=0.2, handlelength=1)
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
        ax.errorbar(data["confidence"], data["accuracy"], errors, fmt="none", ecolor=colour, elinewidth=1, alpha=0.6)
        # A bin's area shows its share of the samples, so that a bin of three does not look like one of a thousand.
        size = 12 + 160 * data["n"] / data["n"].sum()
        marker = MARKERS[i % len(MARKERS)]
        ax.scatter(
            data["confidence"], data["accuracy"], size, color=colour, marker=marker, alpha=0.85, label=curve.probe
        )
    ax.set_xlabel("confidence")
    ax.set_ylabel("accuracy")
    ax.set_title(title)
    _percent(ax)
    _percent(ax, "x")
    ax.legend(loc="upper left", scatterpoints=1, markerscale=0.6)
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
    """Error rate among the samples that are answered, least suspicious first, against their share."""
    ax = ax or new_axes()
    for i, curve in enumerate(curves):
        style = {**_style(i), "marker": ""}
        ax.plot(curve.data["coverage"], curve.data["risk"], label=curve.probe, **style)
    ax.set_xlabel("samples answered")
    ax.set_ylabel("of these, wrong")
    ax.set_title(title)
    _percent(ax, "x")
    ax.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    ax.set_ylim(bottom=0)
    ax.legend(loc="upper left")
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
        style = _style(i) | {"linestyle": "none", "markersize": 4.5}
        ax.errorbar(x, gap, bounds, elinewidth=1, label=curve.probe, **style)
    ax.set_xticks(range(len(levels)), [f"{100 * level:g} %" for level in levels])
    ax.grid(axis="x", visible=False)
    ax.set_xlabel("nominal coverage")
    ax.set_ylabel("coverage minus nominal")
    ax.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    ax.set_title(title)
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
    ax.set_title(title)
    _legend_below(ax, 5)
    return ax


def sharpness(curves: list[Curve], title: str, ax: Axes | None = None) -> Axes:
    """Widths of intervals, each estimator's sorted: low is sharp, flat is the same width everywhere."""
    ax = ax or new_axes()
    for i, curve in enumerate(curves):
        width = np.sort(np.array(curve.data["high"]) - np.array(curve.data["low"]))
        share = (np.arange(len(width)) + 0.5) / len(width)
        ax.plot(share, width, label=curve.probe, **{**_style(i), "marker": ""})
    ax.set_xlabel("samples, narrowest interval first")
    ax.set_ylabel("width, in units of y")
    ax.set_ylim(bottom=0)
    ax.xaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    ax.set_title(title)
    _legend_below(ax, len(curves))
    return ax


def _legend_below(ax: Axes, entries: int) -> None:
    """A legend under the axes, where it hides nothing."""
    longest = max((len(text) for text in ax.get_legend_handles_labels()[1]), default=0)
    columns = min(3 if longest <= LEGEND_LABEL else 2, entries)
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=columns, borderaxespad=0, handlelength=1.4)


def score_histogram(curve: Curve, title: str, ax: Axes | None = None) -> Axes:
    """Scores of clean and of unknown (or attacked) inputs."""
    ax = ax or new_axes()
    edges = np.array(curve.data["edges"])
    for i, (name, label) in enumerate((("clean", "clean"), ("unknown", curve.condition.removeprefix("outliers ")))):
        shares = np.array(curve.data[name][:-1])
        ax.stairs(shares, edges, fill=True, color=PALETTE[i], alpha=0.3)
        ax.stairs(shares, edges, color=PALETTE[i], linewidth=1.4, label=label)
    ax.set_xlabel(f"{curve.probe} score (right: unlike the training data)")
    ax.set_ylabel("share of samples")
    ax.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    ax.set_title(title)
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
    ax.set_title(title)
    ax.legend()
    return ax


def roc(curves: list[Curve], title: str, ax: Axes | None = None) -> Axes:
    """ROC curves of several detectors on the same inputs; unknown inputs are the positives.

    Of more than six, the first (which the others are compared with) and the five of the largest area are named.
    """
    ax = ax or new_axes()
    ax.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    by_area = sorted(curves[1:], key=lambda c: -float(np.trapezoid(c.data["tpr"], c.data["fpr"])))
    named = curves[:1] + by_area[:NAMED_CURVES]
    for curve in by_area[NAMED_CURVES:]:
        ax.plot(curve.data["fpr"], curve.data["tpr"], color=MUTED, linewidth=0.7, alpha=0.6)
    for i, curve in enumerate(named):
        ax.plot(curve.data["fpr"], curve.data["tpr"], color=PALETTE[i % len(PALETTE)], label=curve.probe)
    if len(named) < len(curves):
        ax.plot([], [], color=MUTED, linewidth=0.7, alpha=0.6, label=f"{len(curves) - len(named)} others")
    ax.set_xlabel("clean inputs flagged")
    ax.set_ylabel("unknown inputs flagged")
    ax.set_title(title)
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
    ax.set_title(f"{model['name']}: accuracy on the calibration split")
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
    ax.set_title(f"{model['name']}: loss")
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
    ax.set_title(f"{model['name']}: energy, natural minus adversarial")
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
    "corruption_curve",
    "corruption_heatmap",
    "coverage_gap",
    "distance_curves",
    "energy_histogram",
    "intervals",
    "module_criticality",
    "per_class",
    "reliability_diagram",
    "risk_coverage",
    "robust_accuracy_curve",
    "roc",
    "score_histogram",
    "sharpness",
    "tradeoffs",
    "training_curve",
    "training_energies",
    "training_loss",
]
