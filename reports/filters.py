"""The section on weights: how varied the 3x3 filters of every model are, layer by layer (`robustbench_ext.filters`)."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from reports.figures import new_axes
from reports.names import shorten
from reports.section import Section, figure
from reports.spotlight import one_by_one, spotlight
from reports.tables import Cell, Column, Table
from robustbench_ext.results import RunResults

MANY_LAYERS = 4  # of one model; fewer need no figure
LEGIBLE = 24  # layers up to which a strip has room for numbers
NORMALISED = Column(
    "normalised",
    "Variance entropy over that of as many random filters: near 0 the filters of a layer are copies of a few, about 0.9 is "
    "usual, 1 and more cannot be told from random numbers. For layers of at least eight filters.",
)
SPARSITY = Column("sparse, %", "Share of filters whose weights are all below 1 % of the layer's largest.")
_ENTROPY = Column(
    "variance entropy", "-sum v log10 v of the filters' shares of variance in nine directions; at most 0.954."
)
_CLEAN = Column("without sparse ones", "Variance entropy of the filters that are not sparse.")
_ORTHOGONAL = Column(
    "orthogonality", "1 where the filters of output channels are at right angles, lower where they are alike."
)
TEXT = (
    "Of the weights alone, without data. A layer near 0 holds copies of a few filters; one at 1 or above cannot be told from "
    "random numbers, as after too little training. Low values go with poor robustness in a large collection of networks "
    "(Gavrikov and Keuper 2022); of one network they prove nothing."
)


def filters(results: RunResults) -> Section:
    """Weights of the 3x3 convolutions."""
    section = Section("filters", "Filters", TEXT)
    drawn = spotlight(results)
    shown = [model for model in results.models if model.get("filters") and model["name"] in drawn]
    section.tables = [summary(results)]
    section.more = [layers(model) for model in shown]
    if any(len(model["filters"]) > MANY_LAYERS for model in shown):
        longest = max(len(model["filters"]) for model in shown)
        alt = "Normalised variance entropy of every 3x3 layer of each model; the numbers are in the tables below."
        size = (min(11.0, 2.6 + 0.34 * longest), 1.3 + 0.3 * len(shown))
        section.figures.append(figure("filters", alt, lambda ax: strips(shown, ax), size))
    section.text += one_by_one(results)
    return section


def summary(results: RunResults) -> Table:
    """A line a model: its layers from the least varied to the most."""
    columns = [Column("3x3 layers")]
    columns += [Column(f"{which} {NORMALISED.title}", NORMALISED.definition) for which in ("least", "median")]
    columns += [Column("its layer", "The layer of the least normalised variance entropy."), SPARSITY]
    table = Table("Variance of the filters of 3x3 convolutions", "model", columns)
    for model in results.models:
        found: list[dict[str, Any]] = model.get("filters") or []
        told = [(layer["normalised"], layer["layer"]) for layer in found if layer["normalised"] is not None]
        if not told:
            continue
        least, where = min(told)
        # Of all filters of the network, each counting the same.
        counts, sparse = ([float(layer[k] or 0) for layer in found] for k in ("n", "sparsity"))
        share = sum(n * s for n, s in zip(counts, sparse, strict=True)) / sum(counts)
        median = float(np.median([value for value, _ in told]))
        cells = [Cell(str(len(found)), len(found)), _number(least), _number(median), Cell(where), _percent(share)]
        table.rows.append((str(model["name"]), cells))
    return table


def layers(model: dict[str, Any]) -> Table:
    """Every 3x3 layer of one model, in the order in which they are defined."""
    columns = [Column("filters"), NORMALISED, _ENTROPY, _CLEAN, SPARSITY, _ORTHOGONAL]
    table = Table(f"{shorten(str(model['name']))}: layers", "layer", columns)
    for layer in model["filters"]:
        numbers = [_number(layer[k]) for k in ("normalised", "entropy", "clean_entropy")]
        cells = [
            Cell(str(layer["n"]), layer["n"]),
            *numbers,
            _percent(layer["sparsity"]),
            _number(layer["orthogonality"]),
        ]
        table.rows.append((str(layer["layer"]), cells))
    return table


def strips(models: list[dict[str, Any]], ax: Axes | None = None) -> Axes:
    """A strip a model: the normalised variance entropy of its layers, first to last, in hundredths."""
    ax = ax or new_axes()
    grid = np.full((len(models), max(len(model["filters"]) for model in models)), np.nan)
    for row, model in enumerate(models):
        values = [layer["normalised"] for layer in model["filters"]]
        grid[row, : len(values)] = [np.nan if value is None else value for value in values]
    ax.imshow(
        grid, cmap="cividis", vmin=0, vmax=1, aspect="auto", extent=(0.5, grid.shape[1] + 0.5, len(models) - 0.5, -0.5)
    )
    if grid.shape[1] <= LEGIBLE:
        for i, j in zip(*np.nonzero(np.isfinite(grid)), strict=True):
            colour = "white" if grid[i, j] < 0.5 else "black"
            ax.text(j + 1, i, f"{100 * grid[i, j]:.0f}", ha="center", va="center", color=colour, fontsize=8)
    ax.set_yticks(range(len(models)), [shorten(str(model["name"]), 26) for model in models])
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("3x3 layer, first to last")
    ax.set_title("Variance of filters, 100 = as random ones")
    ax.grid(visible=False)
    ax.tick_params(length=0)
    return ax


def _number(value: float | None) -> Cell:
    return Cell("–", None, "not defined for this layer") if value is None else Cell(f"{value:.3f}", value)


def _percent(share: float | None) -> Cell:
    return Cell("–", None, "weights are not finite") if share is None else Cell(f"{100 * share:.1f}", share)
