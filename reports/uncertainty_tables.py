"""Tables of uncertainty: calibration in detail, prediction sets, what uncertainties are worth, intervals of regressors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from reports.tables import NOT_MEASURED, Cell, Column, Table, heading, number
from robustbench_ext.axes import (
    CLASSIFIER,
    CLEAN,
    REGRESSOR,
    SHIFTS,
    SHOWN,
    attack_at,
    axes,
    best,
    estimators,
    is_regression,
    main_threats,
    model_names,
    of_kind,
)
from robustbench_ext.results import Row, RunResults

PARTS = ("msp", "aleatoric", "epistemic", "width")
WIDEST = 7  # conditions beside each other in one table


def labelled(results: RunResults) -> list[str]:
    """Conditions whose samples have labels, clean first."""
    found = of_kind(results, "clean", "attack", *SHIFTS)
    return [str(c["label"]) for c in found if not c.get("minimum_norm")]


def strongest(results: RunResults) -> list[str]:
    """The conditions to show first: attacks at the main threats; of every corruption, shift, attack on regressors the last."""
    attacks = [str(a["label"]) for t in main_threats(results) if (a := attack_at(results, t))]
    last: dict[str, str] = {}
    for condition in of_kind(results, *SHIFTS, *(["attack"] if is_regression(results) else [])):
        name = condition.get("corruption") or condition.get("shift") or condition.get("attack")
        last[str(name)] = str(condition["label"])
    return [*attacks, *last.values()]


def scores(results: RunResults) -> list[str]:
    """Uncertainties that have rows of their own, such as `mc-dropout · epistemic`, in the suite's order."""
    measured = {row.probe for row in results.results}
    names = [f"{probe} · {part}" for probe in (CLASSIFIER, *estimators(results)) for part in PARTS]
    return [name for name in names if name in measured]


def long_table(
    results: RunResults,
    caption: str,
    conditions: Sequence[str],
    probes: Sequence[str],
    columns: Sequence[tuple[str, str | None]],
    corner: str = "estimator",
    lead: tuple[Column, dict[str, Cell]] | None = None,
) -> Table:
    """A row per model, condition and probe, as far as any column is measured.

    Args:
        columns: (metric, group); metrics that are measured of none of these are left out. A group named `...` takes the row of
            whatever group and notes which.
        lead: a column before them, and its cell for every probe.
    """
    shown = set(conditions), set(probes)
    there = {row.metric for row in results.results if row.condition in shown[0] and row.probe in shown[1]}
    find = _finder(results)
    kept = [(metric, group) for metric, group in columns if metric in there]
    single = len(conditions) == 1
    heads = [*([lead[0]] if lead else []), *(_heading(metric, group, results) for metric, group in kept)]
    table = Table(caption, f"model · {corner}" if single else f"model · condition · {corner}", heads)
    for model in model_names(results):
        for condition in conditions:
            for probe in probes:
                rows = [find(model, condition, probe, metric, group) for metric, group in kept]
                if any(rows):
                    name = " · ".join((model, probe) if single else (model, condition, probe))
                    cells = [_cell(row, results, group) for row, (_, group) in zip(rows, kept, strict=True)]
                    table.rows.append((name, [*([lead[1][probe]] if lead else []), *cells]))
    return table


def by_condition(
    results: RunResults,
    caption: str,
    conditions: Sequence[str],
    probes: Sequence[str],
    metric: str,
    group: str | None = None,
    corner: str = "estimator",
) -> Table:
    """One metric, a row per model and probe, a column per condition."""
    definition = results.metrics[metric]["definition"]
    table, find = Table(caption, f"model · {corner}", [Column(c, definition) for c in conditions]), _finder(results)
    for model in model_names(results):
        for probe in probes:
            rows = [find(model, condition, probe, metric, group) for condition in conditions]
            if any(rows):
                table.rows.append((f"{model} · {probe}", [number(row, results) for row in rows]))
    return table


def _heading(metric: str, group: str | None, results: RunResults, prefix: str = "") -> Column:
    """As `tables.heading`, with the nominal coverage that the column is about."""
    title = results.metrics[metric]["title"]
    column = heading(metric, results)
    at = "" if group in (None, "...") else f" at {group}"
    return Column(f"{prefix}{title}{at}{column.title.removeprefix(title)}", column.definition)


def _finder(results: RunResults) -> Callable[[str, str, str, str, str | None], Row | None]:
    """Rows by model, condition, probe, metric and group; `...` finds the first of any group. One pass for a whole table."""
    exact: dict[tuple[str | None, ...], Row] = {}
    for row in results.results:
        key = (row.model, row.condition, row.probe, row.metric)
        exact.setdefault((*key, row.group), row)
        exact.setdefault((*key, "..."), row)
    return lambda *key: exact.get(key)


def _cell(row: Row | None, results: RunResults, group: str | None) -> Cell:
    cell = number(row, results)
    if group == "..." and row is not None and row.group:
        return Cell(cell.text, cell.value, f"{row.group}; {cell.note}")
    return cell


# Classification ------------------------------------------------------------------------------------------------------


def calibration_clean(results: RunResults) -> Table:
    """The classifier and every estimator on clean inputs: accuracy, calibration, proper scores."""
    metrics = ("accuracy", "ece", "classwise_ece", "nll", "brier", "aurc")
    probes = [CLASSIFIER, *estimators(results)]
    return long_table(results, "Calibration on clean inputs", [CLEAN], probes, [(m, None) for m in metrics])


def calibration_details(results: RunResults) -> list[Table]:
    """Other calibration errors, and the parts of the Brier score, under every condition."""
    probes, conditions = [CLASSIFIER, *estimators(results)], labelled(results)
    errors = ("ece", "ece_equal_mass", "rmsce_debiased", "mce", "classwise_ece")
    parts = ("brier", "brier_reliability", "brier_resolution", "brier_uncertainty", "brier_within")
    found = [
        long_table(results, "Other calibration errors", conditions, probes, [(m, None) for m in errors]),
        long_table(results, "The parts of the Brier score", conditions, probes, [(m, None) for m in parts]),
    ]
    return [table for table in found if table.rows]


def sets(results: RunResults, conditions: Sequence[str]) -> Table:
    """Coverage and size of prediction sets, with the coverage that was promised."""
    metrics = (
        "set_coverage",
        "set_size",
        "set_class_coverage",
        "set_size_stratified_coverage",
        "set_single",
        "set_empty",
    )
    promised = {row.probe: row.group for row in results.results if row.metric == "set_coverage"}
    first = {probe: Cell(group or "–", float(group[:-2]) if group else None) for probe, group in promised.items()}
    lead = Column("promised", "1 - alpha of the estimator."), first
    return long_table(results, "Prediction sets", conditions, list(promised), [(m, "...") for m in metrics], lead=lead)


def mistakes(results: RunResults, conditions: Sequence[str]) -> Table:
    """What confidences and uncertainties are worth for finding mistakes and for abstaining."""
    probes = [name for p in (CLASSIFIER, *estimators(results)) for name in (p, *(f"{p} · {part}" for part in PARTS))]
    probes = [p for p in probes if results.find(probe=p, metric="error_auroc")]
    caption = "Finding mistakes, and abstaining"
    metrics = ("error_auroc", "aurc", "e_aurc")
    return long_table(results, caption, conditions, probes, [(m, None) for m in metrics], "score")


def telling_apart(results: RunResults) -> tuple[Table, Table]:
    """How well uncertainties tell inputs of other conditions from clean ones: AUROC by condition, and all the rest."""
    names = scores(results)
    conditions = [str(c["label"]) for c in of_kind(results, "outliers")]
    conditions = [c for c in (*conditions, *strongest(results)) if results.find(condition=c, metric="auroc")]
    main = by_condition(
        results, "AUROC, %: clean test inputs against", conditions[:WIDEST], names, "auroc", corner="score"
    )
    every = [str(c["label"]) for c in results.conditions if c["label"] != CLEAN]
    metrics = ("auroc", "auroc_gain", "fpr95", "detection_accuracy", "aupr_out", "aupr_in")
    caption = "Uncertainties under every condition, clean test inputs against it"
    return main, long_table(results, caption, every, names, [(m, None) for m in metrics], "score")


# Regression ----------------------------------------------------------------------------------------------------------


def headline(results: RunResults) -> Table:
    """Models by axes: error, coverage and score of intervals, the same under the last shift and the last attack.

    The first estimator of each model stands for all of its: choosing the best one after the fact would flatter it.
    """
    wanted = axes(results)
    names = sorted({p for axis in wanted for p in axis.probes.values()} - {""})
    whose = names[0] if len(names) == 1 else "each model's first estimator"
    intervals_of = f"; coverage and WIS are those of {whose}" if names else ""
    caption = f"One row a model{_target(results)}{intervals_of}; brackets are 95 % intervals over test samples"
    heads = [_heading(axis.metric, axis.group, results, f"{axis.condition} ") for axis in wanted]
    table = Table(caption, "model", heads)
    leaders = [best(results, axis) for axis in wanted]
    for model in model_names(results):
        cells = []
        for axis, leader in zip(wanted, leaders, strict=True):
            probe = axis.probe_of(model)
            cell = replace(number(axis.row(results, model), results), best=leader == model)
            cells.append(replace(cell, note=f"{probe}; {cell.note}") if axis.probes and probe else cell)
        table.rows.append((model, cells))
    return table


def errors(results: RunResults) -> Table:
    """Errors of every regressor's own prediction under every condition."""
    columns = [(m, None) for m in ("rmse", "mae", "r2", "error_rise")]
    caption = f"Errors of the regressors' own predictions{_target(results)}"
    table = long_table(results, caption, labelled(results), [REGRESSOR], columns)
    # Clean errors have not risen from anything: their cell is empty.
    rows = [
        (name.removesuffix(f" · {REGRESSOR}"), [Cell("") if c.note == NOT_MEASURED else c for c in cells])
        for name, cells in table.rows
    ]
    return Table(caption, "model · condition" if len(labelled(results)) > 1 else "model", table.columns, rows)


def intervals(results: RunResults) -> Table:
    """Every estimator on clean inputs."""
    at = SHOWN
    columns = [
        ("coverage", at),
        ("width", at),
        ("interval_score", at),
        ("wis_mean", None),
        ("crps", None),
        ("rmse", None),
    ]
    caption = f"Intervals on clean test samples{_target(results)}; coverage should be {at}, everything else small"
    return long_table(results, caption, [CLEAN], estimators(results), columns)


def intervals_shifted(results: RunResults) -> list[Table]:
    """Coverage and weighted interval score under shifts and attacks beside clean."""
    conditions = strongest(results)[: WIDEST - 1]
    if not conditions:
        return []
    at, conditions = SHOWN, [CLEAN, *conditions]
    found = [
        by_condition(results, f"Coverage of {at} intervals, %", conditions, estimators(results), "coverage", at),
        by_condition(results, "Weighted interval score ↓", conditions, estimators(results), "wis_mean"),
    ]
    return [table for table in found if table.rows]


def interval_details(results: RunResults) -> list[Table]:
    """Every condition and every level; where coverage is worst; quantiles."""
    names, conditions, at = estimators(results), labelled(results), SHOWN
    groups = list(dict.fromkeys(row.group for row in results.results if row.metric == "coverage" and row.group))
    levels = [group for group in groups if group.endswith(" %")]
    per_level = [(m, level) for m in ("coverage", "width") for level in levels]
    where = [
        ("coverage_below", at),
        ("coverage_above", at),
        ("side_error", at),
        ("worst_group_coverage", "..."),
        ("width_stratified_coverage", "..."),
        ("worst_slab_coverage", "..."),
        *(("coverage", group) for group in groups if group.endswith(" training inputs")),
    ]
    more = [(m, None) for m in ("wis_mean", "crps", "pinball", "crossing_rate", "quantile_ece", "interval_ece", "rmse")]
    found = [
        long_table(results, "Coverage and width at every level", conditions, names, per_level),
        long_table(results, f"Where the coverage of {at} intervals is worst", conditions, names, where),
        long_table(
            results, "Scores and quantiles under every condition", conditions, names, [("interval_score", at), *more]
        ),
    ]
    return [table for table in found if table.rows]


def rankings(results: RunResults, conditions: Sequence[str]) -> Table:
    """What uncertainties of regressors say of their errors."""
    columns = [("error_spearman", None), ("ause", None)]
    return long_table(
        results, "Do uncertain samples have large errors?", conditions, scores(results), columns, "uncertainty"
    )


def _target(results: RunResults) -> str:
    target = results.data.get("target")
    return f", in units of {target}" if target else ""
