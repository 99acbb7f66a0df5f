"""The section that compares models: every pair of few, each model with the leader of many, all outcomes behind a heading."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from reports import comparison, contents, figures
from reports.section import Figure, Section, figure
from reports.spotlight import ahead
from reports.tables import Cell, Column, Table, axis_heading
from robustbench_ext.axes import Axis, axes, is_regression, model_names
from robustbench_ext.results import Compared, RunResults

FEW = 3  # pairs: a table each
SOME = 15  # pairs: one table of all
MATRIX = 30  # models; larger matrices nobody reads
_MARKS = {"better": "▲", "worse": "▼", "inconclusive": "·"}


@dataclass(frozen=True)
class _Led:
    """An axis with the comparisons on it, and the model whose value is best: others are compared with that one."""

    axis: Axis
    title: str
    compared: list[Compared]
    leader: str

    def behind(self, model: str) -> Compared | None:
        """The comparison of a model with the leader."""
        pair = {model, self.leader}
        return next((seen_from(c, model) for c in self.compared if {c.model, c.against} == pair), None)


def comparisons(results: RunResults) -> Section:
    """Which differences are more than chance?"""
    section = Section(
        "comparisons",
        "Comparisons",
        "Differences between models on the same samples, with 95 % intervals that stand for one comparison each. Better and "
        "worse are said only where the p-value is below 0.05 after Holm's correction for all comparisons on the axis; what is "
        "undecided is not the same, but not told apart by so many samples.",
    )
    names = set(model_names(results))
    within = [c for c in results.comparisons if {c.model, c.against} <= names]
    between = [c for c in results.comparisons if not {c.model, c.against} <= names]
    count = len(comparison.pairs(within))
    if count > FEW:
        _many(section, results, within)
    elif within:
        section.tables += _each_pair(results, within)
        section.figures += _forests_of_pairs(results, within, "pair")
    if between:
        section.text += (
            " Entries that were trained several times are compared between their seeds: whether one would be better whatever "
            "the seed. With few seeds only large differences show."
        )
        section.tables += _each_pair(results, between)[:FEW]
        section.more += _each_pair(results, between)[FEW:]
    return section


def _each_pair(results: RunResults, compared: Sequence[Compared]) -> list[Table]:
    return [comparison.table(a, b, compared, results.metrics) for a, b in comparison.pairs(compared)]


def _forests_of_pairs(results: RunResults, compared: Sequence[Compared], name: str) -> list[Figure]:
    """A figure for each pair: all axes in percent, which have one unit."""
    made = []
    for i, (a, b) in enumerate(comparison.pairs(compared)):
        rows = [c for c in compared if (c.model, c.against) == (a, b) and results.metrics[c.metric]["percent"]]
        if rows:
            made.append(
                figure(
                    f"forest-{name}-{i}",
                    f"Differences of {a} and {b} with their intervals; the numbers are in the table below.",
                    lambda ax, rows=rows, t=f"{a} minus {b}": figures.forest(results, rows, t, ax),
                    (5.6, 1.1 + 0.3 * len(rows)),
                )
            )
    return made


def _many(section: Section, results: RunResults, compared: Sequence[Compared]) -> None:
    led = _leaders(results, compared)
    section.text += (
        " Each axis has a leader, the model with the best value there; the table and the figures show how far the others are "
        "behind, and whether that is decided."
    )
    section.tables.append(_behind(results, led))
    names = model_names(results)
    drawn = []
    for i, item in enumerate(led):
        rows = [c for name in names if (c := item.behind(name)) is not None]
        drawn.append(
            figure(
                f"forest-{i}",
                f"{item.title}: every model minus {item.leader}; the numbers are in the tables of this section.",
                lambda ax, rows=rows, t=f"{item.title}, minus {item.leader}": figures.forest(results, rows, t, ax),
                (4.4, 1.1 + 0.2 * len(rows)),
            )
        )
    section.drawn.append(("Differences from the leader of each axis, drawn", drawn))
    if len(comparison.pairs(compared)) <= SOME:
        section.more.append(_rows("All pairs of models", led, results, None))
        return
    section.more.append(
        _rows("Every model and the leader: differences, p-values, samples that would decide", led, results, names)
    )
    if len(names) <= MATRIX:
        section.more += [_matrix(item, names, results) for item in led]
        section.text += " The matrices hold all outcomes; intervals and p-values are in results.json under comparisons."
    else:
        section.text += " Pairs without a leader are in results.json under comparisons."


def _leaders(results: RunResults, compared: Sequence[Compared]) -> list[_Led]:
    """Axes with a better direction that models were compared on."""
    found = []
    for axis in axes(results):
        mine = [
            c
            for c in compared
            if (c.metric, c.condition) == (axis.metric, axis.condition)
            and c.probe == axis.probe_of(c.model)
            and (axis.group is ... or c.group == axis.group)
        ]
        leader = ahead(results, axis)
        if mine and leader is not None:
            found.append(_Led(axis, _title(axis, results), mine, leader))
    return found


def _title(axis: Axis, results: RunResults) -> str:
    if is_regression(results):
        return axis.title
    return axis_heading(axis, results).title


def seen_from(compared: Compared, model: str) -> Compared:
    """The same comparison with that model first."""
    if compared.model == model:
        return compared
    turned = {"better": "worse", "worse": "better"}.get(compared.outcome, compared.outcome)
    value, low, high = (None if v is None else -v for v in (compared.value, compared.ci_high, compared.ci_low))
    update = {"model": compared.against, "against": compared.model, "outcome": turned}
    return compared.model_copy(update=update | {"value": value, "ci_low": low, "ci_high": high})


def _behind(results: RunResults, led: Sequence[_Led]) -> Table:
    table = Table(
        "Behind the leader of each axis: difference with its 95 % interval",
        "model",
        [Column(item.title, f"Leader: {item.leader}.") for item in led],
    )
    for name in model_names(results):
        cells = []
        for item in led:
            c = item.behind(name)
            if name == item.leader:
                cells.append(Cell("leader", 0.0))
            elif c is None:
                cells.append(Cell("–", None, "not compared"))
            else:
                shown = comparison.difference(c, results.metrics)
                mark = " undecided" if c.outcome == "inconclusive" else ""
                p = comparison.p_value(c).text
                cells.append(Cell(shown.text + mark, shown.value, f"p = {p}; {shown.note}"))
        table.rows.append((name, cells))
    return table


def _rows(caption: str, led: Sequence[_Led], results: RunResults, models: Sequence[str] | None) -> Table:
    """A row for each comparison: of these models with the leader, or all."""
    columns = [comparison.DIFFERENCE, comparison.P_VALUE, comparison.OUTCOME]
    table = Table(caption, "model · against · axis", columns)
    for item in led:
        chosen = item.compared if models is None else [c for m in models if (c := item.behind(m)) is not None]
        for c in chosen:
            cells = [comparison.difference(c, results.metrics), comparison.p_value(c), comparison.outcome(c)]
            table.rows.append((f"{c.model} · {c.against} · {item.title}", cells))
    return table


def _matrix(item: _Led, names: Sequence[str], results: RunResults) -> Table:
    """Row against column: ▲ better, ▼ worse, · undecided, with the difference."""
    scale, digits = (100, 1) if results.metrics[item.axis.metric]["percent"] else (1, 3)
    by_pair = {(side.model, side.against): side for c in item.compared for side in (c, seen_from(c, c.against))}
    caption = f"All pairs, {item.title}: row minus column, ▲ better, ▼ worse, · undecided"
    table = Table(caption, "model", [Column(name) for name in names])
    for row in names:
        cells = []
        for column in names:
            c = by_pair.get((row, column))
            if c is None or c.value is None:
                cells.append(Cell(""))
            else:
                cells.append(Cell(f"{_MARKS[c.outcome]} {scale * c.value:+.{digits}f}", round(c.value, 6)))
        table.rows.append((row, cells))
    return table


def seeds(results: RunResults) -> Section:
    """What would another training give?"""
    section = Section(
        "seeds",
        "Training seeds",
        "Means over several trainings of the same recipe. Their brackets are 95 % intervals for another training on these "
        "samples; the headline's are for other samples and these weights.",
    )
    table = contents.replicates(results)
    section.tables += [table] if table else []
    return section
