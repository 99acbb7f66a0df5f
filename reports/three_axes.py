"""The report's opening figure: spread, unseen inputs and attacks, a row per model."""

from __future__ import annotations

from dataclasses import replace

from matplotlib.axes import Axes

from reports import tables
from reports.names import shorten
from reports.section import Section, figure
from reports.spotlight import MOST, spotlight
from reports.svg import INK, MUTED, PALETTE
from reports.tables import Cell, Table, one
from robustbench_ext.axes import CLASSIFIER, CLEAN, best, model_names
from robustbench_ext.results import RunResults
from robustbench_ext.three_axes import ATTACKS, SPREAD, UNSEEN, Perspective, ahead, perspectives

MARKERS = ("o", "s", "^", "D", "v")
NAMED = 3  # models of a tie that are named
LONGEST = 22  # letters of a model's name in the figure
_TITLES = {SPREAD: "Spread: accuracy by class", UNSEEN: "Unseen inputs: change", ATTACKS: "Attacks: change"}
_TEXT = (
    "Left: the accuracy of each class on clean inputs (dots), their mean (line), and their standard deviation without what "
    "chance adds (points, at the right). The others: how much of the clean accuracy is gained (right of 0) or lost (left of "
    "it), relative to what the model has, each class counting the same. Lines are 95 % intervals over test samples. A model "
    "that is good on one axis may be bad on another."
)


def opening(results: RunResults) -> Section:
    """The three axes at first sight; empty where they were not measured."""
    section = Section("axes", "Three axes of robustness")
    found = perspectives(results)
    if not found:
        return section
    shown = spotlight(results)
    section.text = _TEXT
    if len(results.models) > MOST:
        section.text += f" Drawn are {MOST} of {len(results.models)} models; the table holds all."
    panels = len({p.of for p in found})
    size = (3.1 * panels + 1.2, 1.5 + 0.34 * len(shown))
    alt = (
        f"For each of {len(shown)} models: accuracy by class, and relative changes; the numbers are in the table below."
    )
    section.figures.append(figure("three-axes", alt, lambda ax: paint(results, found, ax), size))
    section.tables.append(table(results))
    return section


def table(results: RunResults) -> Table:
    """A row per model and a column per perspective; the last row says who is ahead, or that it is a tie."""
    found = perspectives(results)
    columns = [
        replace(
            tables.axis_heading(p.question, results), title=f"{p.of}: {tables.axis_heading(p.question, results).title}"
        )
        for p in found
    ]
    made = Table("Spread over classes, and relative changes of accuracy from clean", "model", columns)
    leaders = [best(results, p.question) for p in found]
    for model in model_names(results):
        cells = [tables.number(p.question.row(results, model), results) for p in found]
        marked = [replace(cell, best=leader == model) for cell, leader in zip(cells, leaders, strict=True)]
        made.rows.append((model, marked))
    if len(results.models) > 1 and any(results.compared(p.question.metric, p.question.condition) for p in found):
        made.rows.append(("ahead", [_ahead(results, p) for p in found]))
    return made


def _ahead(results: RunResults, perspective: Perspective) -> Cell:
    names = ahead(results, perspective.question)
    if len(names) == 1:
        return Cell(shorten(names[0]))
    named = ", ".join(shorten(name) for name in names) if len(names) <= NAMED else f"{len(names)} models"
    return Cell(f"tie: {named}" if names else "–", None, "" if names else "no model passed its checks")


def paint(results: RunResults, found: list[Perspective], ax: Axes) -> Axes:
    """Draw it in the place of `ax`; panels share their rows."""
    shown = spotlight(results)
    drawing = ax.get_figure()
    assert drawing is not None  # noqa: S101 - an Axes without a figure cannot be drawn on
    ax.remove()
    axes = [of for of in (SPREAD, UNSEEN, ATTACKS) if any(p.of == of for p in found)]
    panels = drawing.subplots(1, len(axes), sharey=True, squeeze=False)[0]
    for panel, of in zip(panels, axes, strict=True):
        panel.set_title(_TITLES[of], fontsize=9.5)
        panel.grid(axis="y", visible=False)
        panel.xaxis.set_major_formatter(lambda v, _: f"{100 * v:.0f} %")
        if of == SPREAD:
            _classes(results, shown, panel)
        else:
            _changes(results, shown, [p for p in found if p.of == of], panel)
    panels[0].set_yticks(range(len(shown)), [shorten(name, LONGEST) for name in shown])
    panels[0].set_ylim(len(shown) - 0.4, -0.6)
    return panels[0]  # type: ignore[no-any-return]


def _classes(results: RunResults, shown: list[str], panel: Axes) -> None:
    classes = {str(c) for c in results.data["classes"]}
    for i, model in enumerate(shown):
        rows = results.find(model=model, condition=CLEAN, probe=CLASSIFIER, metric="accuracy")
        values = [row.value for row in rows if row.group in classes and row.value is not None]
        if values:
            colour, mean = PALETTE[i % len(PALETTE)], sum(values) / len(values)
            panel.plot(values, [i] * len(values), "o", color=colour, markersize=4, alpha=0.5, markeredgewidth=0)
            panel.plot([mean, mean], [i - 0.28, i + 0.28], color=INK, linewidth=1.4)
        spread = one(results, model=model, condition=CLEAN, probe=CLASSIFIER, metric="class_spread")
        if spread is not None and spread.value is not None:
            text, edge = f"± {100 * spread.value:.1f}", ("axes fraction", "data")
            panel.annotate(text, (1.0, i), xycoords=edge, va="center", color=MUTED, fontsize=8)
    low, high = panel.get_xlim()
    panel.set_xlim(max(-0.02, low), min(1.02, high))


def _changes(results: RunResults, shown: list[str], found: list[Perspective], panel: Axes) -> None:
    panel.axvline(0, color=MUTED, linewidth=0.8)
    step = 0.5 / max(1, len(found))
    for j, perspective in enumerate(found):
        marker = MARKERS[j % len(MARKERS)]
        panel.plot([], [], marker, color=MUTED, markersize=5, label=shorten(perspective.question.title, LONGEST))
        for i, model in enumerate(shown):
            row = perspective.question.row(results, model)
            if row is None or row.value is None:
                continue
            y, colour = i + (j - (len(found) - 1) / 2) * step, PALETTE[i % len(PALETTE)]
            if row.ci_low is not None and row.ci_high is not None:
                panel.plot([row.ci_low, row.ci_high], [y, y], color=colour, linewidth=1.4)
            panel.plot([row.value], [y], marker, color=colour, markersize=5)
    panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncol=1, handletextpad=0.2)
