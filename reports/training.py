"""The section on how models were trained."""

from __future__ import annotations

from typing import Any

from reports import figures
from reports.section import Figure, Section, figure
from reports.spotlight import one_by_one, spotlight
from robustbench_ext import axes
from robustbench_ext.results import RunResults


def training(results: RunResults) -> Section:
    """Models that the run trained itself, by epoch."""
    section = Section("training", "Training", "Models that this run trained itself, by epoch.")
    shown = spotlight(results)
    for i, model in enumerate(results.models):
        if model["name"] in shown and model.get("training", {}).get("curve"):
            section.figures += _curves(i, model, axes.is_regression(results))
    section.text += one_by_one(results)
    return section


def _curves(i: int, model: dict[str, Any], regression: bool) -> list[Figure]:
    name, first = str(model["name"]), model["training"]["curve"][0]
    if regression:
        alt = f"Loss of {name} on training data and on data held out of it, by epoch."
        paint = lambda ax: figures.training_loss(model, ax)  # noqa: E731
        return [figure(f"training-{i}", alt, paint, model=name)] if "loss" in first else []
    alt = f"Clean and robust accuracy of {name} on the calibration split by epoch."
    made = [figure(f"training-{i}", alt, lambda ax: figures.training_curve(model, ax), model=name)]
    if "delta_energy_train" in first:
        alt = f"Mean energy difference of natural and attacked inputs of {name} by epoch."
        made.append(figure(f"energies-{i}", alt, lambda ax: figures.training_energies(model, ax), model=name))
    return made
