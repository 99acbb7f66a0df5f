"""Figures of detectors' scores and of energies."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter
from scipy.integrate import trapezoid  # numpy's has this name since 2.0 only

from reports.figures.drawing import (
    best_named,
    new_axes,
    percent_axis,
    short_name,
    short_title,
)
from reports.svg import MUTED, PALETTE
from robustbench_ext.results import Curve


def score_histogram(curve: Curve, title: str, ax: Axes | None = None) -> Axes:
    """Scores of clean and of unknown (or attacked) inputs."""
    ax = ax or new_axes()
    edges = np.array(curve.data["edges"])
    for i, (name, label) in enumerate(
        (("clean", "clean"), ("unknown", short_name(curve.condition.removeprefix("outliers "))))
    ):
        shares = np.array(curve.data[name][:-1])
        ax.stairs(shares, edges, fill=True, color=PALETTE[i], alpha=0.3)
        ax.stairs(shares, edges, color=PALETTE[i], linewidth=1.4, label=label)
    ax.set_xlabel(f"{short_name(curve.probe)} score (right: unlike the training data)")
    ax.set_ylabel("share of samples")
    ax.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    ax.set_title(short_title(title))
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
    ax.set_title(short_title(title))
    ax.legend()
    return ax


def roc(curves: list[Curve], title: str, ax: Axes | None = None) -> Axes:
    """ROC curves of several detectors on the same inputs; unknown inputs are the positives.

    Of more than six, the first (which the others are compared with) and the five of the largest area are named.
    """
    ax = ax or new_axes()
    ax.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    by_area = sorted(curves[1:], key=lambda c: -float(trapezoid(c.data["tpr"], c.data["fpr"])))
    best_named(ax, curves[:1] + by_area, "fpr", "tpr")
    ax.set_xlabel("clean inputs flagged")
    ax.set_ylabel("unknown inputs flagged")
    ax.set_title(short_title(title))
    percent_axis(ax)
    percent_axis(ax, "x")
    ax.legend(loc="lower right")
    return ax
