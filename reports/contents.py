"""What the reports in text (Markdown, LaTeX) hold: tables under headings, what matters most first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from reports import comparison, difficulty, ensembles, filters, landscape, longtail, tables, three_axes, truth
from reports import uncertainty_tables as made
from reports.tables import Cell, Column, Table
from robustbench_ext import axes
from robustbench_ext.axes import Axis
from robustbench_ext.results import Compared, Row, RunResults
from robustbench_ext.three_axes import perspectives

FEW_PAIRS = 3  # pairs of models up to which one table says everything
ESTIMATES, EVERYTHING = "results.csv", "results.json"  # where all rows are


@dataclass(frozen=True)
class Section:
    """A table under a heading.

    Attributes:
        title: the heading; it is made of the project's own words and of no name.
        table: what stands under it.
        weight: 4 for what a reader has come for, 2 for the main results, 1 for details; where space is short, a section gets
            space in proportion.
        note: a sentence that says how to read the table.
        first: names of rows that matter more than the others.
        file: the run's file that holds all of it.
    """

    title: str
    table: Table
    weight: int = 1
    note: str = ""
    first: frozenset[str] = field(default_factory=frozenset)
    file: str = ESTIMATES


def sections(results: RunResults) -> list[Section]:
    """The sections of a run that have anything to show."""
    every = [*_head(results), *(_regression(results) if axes.is_regression(results) else _classification(results))]
    return [section for section in every if section.table.rows]


def _head(results: RunResults) -> list[Section]:
    headline = tables.headline(results)
    found = [Section("Headline", headline, 4)]
    found += [Section("Three axes of robustness", three_axes.table(results), 4)] if perspectives(results) else []
    found += comparisons(results)
    seeds = replicates(results)
    if seeds is not None:
        note = (
            "Means over training seeds; brackets are 95 % intervals for another training on these samples, those above for "
            "other samples and these weights."
        )
        found.append(Section("Training seeds", seeds, 4, note, file=EVERYTHING))
    return found


def _classification(results: RunResults) -> list[Section]:
    """Long tables of uncertainty under every condition are in the HTML report alone."""
    shown = [axes.CLEAN, *made.strongest(results)]
    worst = frozenset([axes.CLEAN, *(str(c["label"]) for c in axes.of_kind(results, "worst-case"))])
    estimators = bool(axes.estimators(results))
    return _there(
        ("Robustness", tables.robustness(results), 2, worst),
        ("Distances", tables.distances(results), 2),
        ("Targeted attacks", tables.targeted(results), 1),
        ("Classes", tables.tails(results), 2),
        ("Long tail", longtail.accuracies(results), 2),
        ("Long tail, training seeds", longtail.over_seeds(results), 2),
        ("Relative accuracy", longtail.relatives(results), 2),
        ("Corruptions", tables.corruptions(results), 2, _summaries(results, "corruptions")),
        ("Domains", tables.domains(results), 2, _summaries(results, "domains")),
        ("Calibration, clean", made.calibration_clean(results) if estimators else None, 2),
        ("Calibration", tables.calibration(results), 1),
        ("Metrics of your own", tables.own(results), 1),
        ("Prediction sets", made.sets(results, shown), 1),
        ("Uncertainty: mistakes, clean", made.mistakes(results, [axes.CLEAN]), 1),
        ("Uncertainty: other inputs", made.telling_apart(results)[0], 1),
        *_truth(results, shown),
        ("Energy", tables.energies(results), 1),
        *((t.caption.replace(": clean test inputs against", ":"), t, 1) for t in tables.detection(results)),
        ("Abstaining", tables.abstaining(results), 1),
        *((t.caption.removesuffix(", %"), t, 1) for t in difficulty.accuracies(results)),
        ("Difficulty of mistakes", difficulty.ranks(results), 1),
        ("Hardest samples", difficulty.hardest(results), 1),
        ("Loss landscape: networks", landscape.networks(results), 1),
        ("Loss landscape: pairs", landscape.pairs(results), 1),
        ("Ensembles", ensembles.table(results), 1),
        ("Filters", filters.summary(results), 1),
    )


def _regression(results: RunResults) -> list[Section]:
    return _there(
        ("Errors", made.errors(results), 2),
        ("Prediction intervals, clean", made.intervals(results), 2),
        *((f"Prediction intervals: {t.caption}", t, 2) for t in made.intervals_shifted(results)),
        ("Uncertainty: errors, clean", made.rankings(results, [axes.CLEAN]), 1),
        ("Uncertainty: other inputs", made.telling_apart(results)[0], 1),
        *_truth(results, [axes.CLEAN, *made.strongest(results)]),
    )


def _truth(results: RunResults, shown: list[str]) -> list[tuple[str, Table | None, int]]:
    """Where the data knows the law of its outcomes; no rows elsewhere, and so no sections."""
    return [
        ("Distance from the truth", truth.laws(results, shown), 2),
        ("True coverage", truth.coverages(results, shown), 2),
        ("Uncertainties against the truth", truth.ranks(results, [axes.CLEAN]), 1),
    ]


def _there(*found: tuple[str, Table | None, int] | tuple[str, Table | None, int, frozenset[str]]) -> list[Section]:
    return [Section(f[0], f[1], f[2], first=f[3] if len(f) > 3 else frozenset()) for f in found if f[1] is not None]


def _summaries(results: RunResults, kind: str) -> frozenset[str]:
    """Names of the rows over all corruptions or domains, as the tables make them, and clean."""
    metrics = [about["title"] for about in results.metrics.values()]
    labels = [c["label"] for c in axes.of_kind(results, kind)]
    return frozenset([axes.CLEAN, *(f"{label}: {metric}" for label in labels for metric in metrics)])


# Comparisons ---------------------------------------------------------------------------------------------------------


def comparisons(results: RunResults) -> list[Section]:
    """Who is better than whom: every pair on every axis, and for many pairs a count of them first."""
    found = results.comparisons
    if not found:
        return []
    note = (
        "The first model's value minus the second's on the same samples, in points where the axis is in percent, with its "
        "95 % interval; p is corrected for the number of comparisons on the axis (Holm)."
    )
    pairs = Table("Models compared in pairs", "model · against · axis", [comparison.DIFFERENCE, comparison.P_VALUE])
    pairs.columns.append(comparison.OUTCOME)
    for c in found:
        cells = [comparison.difference(c, results.metrics), comparison.p_value(c), comparison.outcome(c)]
        pairs.rows.append((f"{c.model} · {c.against} · {_axis(c, results)}", cells))
    if len(comparison.pairs(found)) <= FEW_PAIRS:
        return [Section("Comparisons", pairs, 4, note, file=EVERYTHING)]
    counted = "Numbers of other models that a model is better than, worse than, and not told apart from."
    return [
        Section("Comparisons", _counts(results), 4, counted, file=EVERYTHING),
        Section("Comparisons in pairs", pairs, 1, note, file=EVERYTHING),
    ]


def _counts(results: RunResults) -> Table:
    there = dict.fromkeys(name for c in results.comparisons for name in (c.against, c.model))
    names = [name for name in dict.fromkeys([*axes.model_names(results), *there]) if name in there]
    axes_ = list(dict.fromkeys(_axis(c, results) for c in results.comparisons))
    tally = {(name, axis): [0, 0, 0] for name in names for axis in axes_}
    for c in results.comparisons:
        mine = ("better", "worse", "inconclusive").index(c.outcome)
        tally[c.model, _axis(c, results)][mine] += 1
        tally[c.against, _axis(c, results)][(1, 0, 2)[mine]] += 1
    made_ = Table("Models compared in pairs: better than, worse than, undecided", "model", [Column(a) for a in axes_])
    for name in names:
        cells = [Cell("{} / {} / {}".format(*tally[name, axis])) for axis in axes_]
        made_.rows.append((name, cells))
    return made_


def _axis(compared: Compared, results: RunResults) -> str:
    about = results.metrics[compared.metric]
    arrow = {True: " ↑", False: " ↓", None: ""}[about["higher_is_better"]]
    return f"{comparison.title(compared, results.metrics)}{', %' if about['percent'] else ''}{arrow}"


# Seeds ---------------------------------------------------------------------------------------------------------------


def replicates(results: RunResults) -> Table | None:
    """The axes of the headline as means over training seeds; None where nothing was trained several times."""
    if not results.replicates:
        return None
    wanted = axes.axes(results)
    names = list(dict.fromkeys(row.model for row in results.replicates))
    columns = [
        Column(a.title + tables.heading(a.metric, results).title.removeprefix(results.metrics[a.metric]["title"]))
        for a in wanted
    ]
    table = Table("Means over training seeds", "model", [Column("seeds"), *columns])
    for name in names:
        members = [str(m["name"]) for m in results.models if m.get("replicate_of") == name]
        rows = [_of_seeds(results, name, axis, members) for axis in wanted]
        seeds = max((row.n for row in rows if row is not None), default=len(members))
        table.rows.append((name, [Cell(str(seeds), seeds), *(tables.number(row, results) for row in rows)]))
    return table


def _of_seeds(results: RunResults, name: str, axis: Axis, members: Sequence[str]) -> Row | None:
    probe = axis.probe_of(members[0]) if members else axis.probe
    wanted = (name, axis.condition, probe, axis.metric)
    rows = [r for r in results.replicates if (r.model, r.condition, r.probe, r.metric) == wanted]
    return next((r for r in rows if axis.group is ... or r.group == axis.group), None)
