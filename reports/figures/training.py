"""Figures of a training, and of how critical each module is."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from reports.figures.drawing import (
    MARKERS,
    new_axes,
    percent_axis,
    short_name,
)
from reports.svg import INK, MUTED, PALETTE


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
    ax.set_title(f"{short_name(str(model['name']))}: accuracy on the calibration split")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    percent_axis(ax)
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
    ax.set_title(f"{short_name(str(model['name']))}: loss")
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
    ax.set_title(f"{short_name(str(model['name']))}: energy, natural minus adversarial")
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
