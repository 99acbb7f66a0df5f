"""Tables of results, as plain structures that every renderer understands."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from robustbench_ext.axes import (
    CLASSIFIER,
    CLEAN,
    Axis,
    attack_at,
    axes,
    best,
    detectors,
    estimators,
    is_regression,
    main_threats,
    model_names,
    of_kind,
)
from robustbench_ext.results import Row, RunResults

NOT_MEASURED = "not measured"
SHOTS = ("head_accuracy", "tail_accuracy", "many_shot_accuracy", "medium_shot_accuracy", "few_shot_accuracy")


@dataclass(frozen=True)
class Cell:
    """One cell: what is shown, and the number behind it for sorting."""

    text: str
    value: float | None = None
    note: str = ""
    best: bool = False  # better than every other model's, beyond chance


@dataclass(frozen=True)
class Column:
    """A column's heading, with an arrow for the better direction, and its definition."""

    title: str
    definition: str = ""


@dataclass(frozen=True)
class Table:
    """A table: a heading for the row names, columns, and rows of (name, cells)."""

    caption: str
    corner: str
    columns: list[Column]
    rows: list[tuple[str, list[Cell]]] = field(default_factory=list)


def suspected(results: RunResults) -> str:
    """The checks that did not pass, each with its models, for one line: `gradients (a, b), still climbing (a)`."""
    models: dict[str, dict[str, None]] = {}
    for finding in results.suspicions:
        models.setdefault(finding.name, {})[finding.model] = None
    return ", ".join(f"{name} ({', '.join(names)})" for name, names in models.items())


def number(row: Row | None, results: RunResults, interval: bool = True) -> Cell:
    """An estimate as `93.4 [91.8, 94.7]` (percent where the metric is a proportion), or a dash with its reason."""
    if row is None:
        return Cell("–", None, NOT_MEASURED)
    if row.value is None:
        return Cell("–", None, row.reason)
    percent = results.metrics[row.metric]["percent"]
    scale, digits = (100.0, 1) if percent else (1.0, 3)
    text = f"{scale * row.value:.{digits}f}"
    if interval and row.ci_low is not None and row.ci_high is not None:
        text += f" [{scale * row.ci_low:.{digits}f}, {scale * row.ci_high:.{digits}f}]"
    return Cell(text, row.value, f"n = {row.n}; {row.ci_method}")


def heading(metric: str, results: RunResults, prefix: str = "") -> Column:
    """A metric's heading: title, unit, arrow."""
    about = results.metrics[metric]
    arrow = {True: " ↑", False: " ↓", None: ""}[about["higher_is_better"]]
    unit = ", %" if about["percent"] else ""
    return Column(f"{prefix}{about['title']}{unit}{arrow}", about["definition"])


def one(results: RunResults, **wanted: Any) -> Row | None:
    """The one row with these values (about all samples unless a group is named), or None."""
    wanted.setdefault("group", None)
    rows = results.find(**wanted)
    return rows[0] if rows else None


def headline(results: RunResults) -> Table:
    """Models by axes: clean, robust, worst class, corrupted, calibrated, aware of unknown inputs; of regressors, errors and
    intervals. Marked as best is what is better than every other model's beyond chance (`robustbench_ext.axes.best`).
    """
    if is_regression(results):
        from reports.uncertainty_tables import headline as of_regressors

        return of_regressors(results)
    wanted = axes(results)
    table = Table(
        "One row a model; brackets are 95 % intervals over test samples",
        "model",
        [axis_heading(axis, results) for axis in wanted],
    )
    leaders = [best(results, axis) for axis in wanted]
    for model in model_names(results):
        cells = []
        for axis, leader in zip(wanted, leaders, strict=True):
            row = axis.row(results, model)
            cell = replace(number(row, results), best=leader == model)
            if row is not None and axis.group is ...:
                about = f"class {row.group}" if "class" in row.metric else row.group
                cell = replace(cell, note=f"{about}; {cell.note}")
            cells.append(cell)
        table.rows.append((model, cells))
    return table


def axis_heading(axis: Axis, results: RunResults) -> Column:
    """An axis's title with unit and arrow, and its metric's definition."""
    plain = heading(axis.metric, results)
    unit_and_arrow = plain.title.removeprefix(results.metrics[axis.metric]["title"])
    return Column(f"{axis.title}{unit_and_arrow}", plain.definition)


def robustness(results: RunResults) -> Table:
    """Accuracy of every model under every attack, and worst cases."""
    conditions = [c for c in of_kind(results, "clean", "attack", "worst-case") if not c.get("minimum_norm")]
    table = Table(
        "Accuracy under each attack, and the per-sample worst case over the attacks of a norm up to a budget",
        "condition",
        [Column(name, results.metrics["robust_accuracy"]["definition"]) for name in model_names(results)],
    )
    for condition in conditions:
        metric = "accuracy" if condition["kind"] == "clean" else "robust_accuracy"
        query = {"condition": condition["label"], "probe": CLASSIFIER, "metric": metric}
        cells = [number(one(results, model=m, **query), results) for m in model_names(results)]
        table.rows.append((condition["label"], cells))
    return table


def distances(results: RunResults) -> Table | None:
    """The smallest perturbations that minimum-norm attacks found."""
    found = [c for c in of_kind(results, "attack") if c.get("minimum_norm")]
    if not found:
        return None
    metrics = ("median_norm", "mean_norm")
    table = Table(
        "Smallest perturbations that were found, in units of [0, 1] pixels",
        "model · condition",
        [heading(m, results) for m in metrics],
    )
    for model in model_names(results):
        for condition in found:
            query = {"model": model, "condition": condition["label"], "probe": CLASSIFIER}
            cells = [number(one(results, **query, metric=m), results) for m in metrics]
            table.rows.append((f"{model} · {condition['label']}", cells))
    return table


def targeted(results: RunResults) -> Table | None:
    """How often targeted attacks reached their targets."""
    there = {row.condition for row in results.find(metric="targeted_success")}
    if not there:
        return None
    definition = results.metrics["targeted_success"]["definition"]
    table = Table("Targets reached, %", "condition", [Column(m, definition) for m in model_names(results)])
    for condition in of_kind(results, "attack"):
        if condition["label"] in there:
            query = {"condition": condition["label"], "probe": CLASSIFIER, "metric": "targeted_success"}
            cells = [number(one(results, model=m, **query), results) for m in model_names(results)]
            table.rows.append((condition["label"], cells))
    return table


def tails(results: RunResults) -> Table | None:
    """Means over groups of classes, clean and at the main threats: all, the lowest, by training samples where they differ."""
    if not results.find(metric="tail30_accuracy"):
        return None
    means = ("balanced_accuracy", "tail30_accuracy", "worst_class_accuracy")
    shots = [m for m in results.metrics if m in SHOTS and results.find(metric=m)]
    columns = [heading(m, results) for m in means]
    for metric in shots:
        column = heading(metric, results)
        size, _, names = str(results.find(metric=metric)[0].group).partition(": ")
        title, _, unit = column.title.partition(",")
        columns.append(Column(f"{title} ({size}),{unit}", f"{column.definition} Here: {names}."))
    table = Table("Means over classes, each class counting the same", "model · condition", columns)
    for model in model_names(results):
        for condition in (CLEAN, *(t["label"] for t in main_threats(results))):
            query = {"model": model, "condition": condition, "probe": CLASSIFIER}
            cells = []
            for metric in (*means, *shots):
                rows = results.find(**query, metric=metric)
                cell = number(rows[0] if rows else None, results)
                said = f"{rows[0].group}; {cell.note}" if rows and rows[0].group else cell.note
                cells.append(Cell(cell.text, cell.value, said))
            table.rows.append((f"{model} · {condition}", cells))
    return table


def energies(results: RunResults) -> Table | None:
    """Mean energies of every model, clean and under the attacks that went on to the end."""
    if not results.find(metric="delta_energy"):
        return None
    metrics = ("energy_marginal", "delta_energy", "abs_delta_energy", "energy_joint", "delta_energy_joint")
    goal = Column("goal", "What the attack goes for: any mistake, or a target.")
    columns = [goal, *(heading(m, results) for m in metrics)]
    table = Table("Mean energies; Δ is natural minus attacked, on the same samples", "model · condition", columns)
    for model in model_names(results):
        for condition in of_kind(results, "clean", "attack"):
            label, attacked = condition["label"], condition["kind"] == "attack"
            target = condition.get("parameters", {}).get("target", "none")
            goal_cell = Cell(("any mistake" if target == "none" else f"target: {target}") if attacked else "")
            query = {"model": model, "condition": label, "probe": CLASSIFIER}
            for group in dict.fromkeys(row.group for row in results.find(**query, metric="energy_marginal")):
                rows = [one(results, **query, metric=m, group=group) for m in metrics]
                # Clean inputs have no differences.
                cells = [number(r, results) if attacked or r else Cell("") for r in rows]
                name = f"{model} · {label}" + (f", {group}" if group else "")
                table.rows.append((name, [goal_cell, *cells]))
    return table


def corruptions(results: RunResults) -> Table | None:
    """Accuracy of every model under every corruption."""
    metrics = ("mean_accuracy", "mean_corruption_error", "accuracy_drop", "corruption_mce", "corruption_relative_mce")
    return _accuracies(results, "corruption", "corruptions", "Accuracy under corruptions, %", metrics)


def domains(results: RunResults) -> Table | None:
    """Accuracy of every model on every domain."""
    metrics = ("mean_accuracy", "worst_domain_accuracy")
    return _accuracies(results, "domain", "domains", "Accuracy on other domains, %", metrics)


def _accuracies(results: RunResults, kind: str, over: str, title: str, summaries: tuple[str, ...]) -> Table | None:
    """Clean, under every condition of a kind, and what is taken over all of them."""
    found = of_kind(results, kind)
    if not found:
        return None
    names = model_names(results)
    table = Table(title, "condition", [Column(m, results.metrics["accuracy"]["definition"]) for m in names])
    for label in (CLEAN, *(c["label"] for c in found)):
        query = {"condition": label, "probe": CLASSIFIER, "metric": "accuracy"}
        table.rows.append((label, [number(one(results, model=m, **query), results) for m in names]))
    for summary in of_kind(results, over):
        for metric in summaries:
            query = {"condition": summary["label"], "metric": metric}
            for against in dict.fromkeys(row.against for row in results.find(**query)):
                rows = [results.find(model=m, against=against, **query) for m in names]
                title_ = results.metrics[metric]["title"] + (f" against {against}" if against else "")
                cells = [number(found_[0] if found_ else None, results) for found_ in rows]
                table.rows.append((f"{summary['label']}: {title_}", cells))
    return table


def calibration(results: RunResults) -> Table:
    """ECE, NLL and Brier of every model, as it is and recalibrated, clean and at the main threats."""
    metrics = ("ece", "nll", "brier")
    table = Table("Calibration", "model · condition · probe", [heading(m, results) for m in metrics])
    shown = [CLEAN, *(a["label"] for t in main_threats(results) if (a := attack_at(results, t)))]
    shown += [c["label"] for c in of_kind(results, "corruption")]
    for model in model_names(results):
        for condition in shown:
            for probe in (CLASSIFIER, *estimators(results)):
                rows = [one(results, model=model, condition=condition, probe=probe, metric=m) for m in metrics]
                if probe == CLASSIFIER or any(rows):  # estimators of sets leave probabilities as they are
                    cells = [number(row, results) for row in rows]
                    table.rows.append((f"{model} · {condition} · {probe}", cells))
    return table


def own(results: RunResults) -> Table | None:
    """Metrics of the user's own (`robustbench_ext.own_metrics`), of every model and condition; None where there are none."""
    metrics = [name for name, about in results.metrics.items() if "origin" in about]
    table = Table("Metrics of your own", "model · condition", [heading(m, results) for m in metrics])
    for model in model_names(results):
        for condition in results.conditions:
            rows = [one(results, model=model, condition=condition["label"], metric=m) for m in metrics]
            if any(rows):
                table.rows.append((f"{model} · {condition['label']}", [number(row, results) for row in rows]))
    return table if table.rows else None


def families(results: RunResults) -> dict[str, list[str]]:
    """Labels of the conditions whose inputs detectors should see, kept apart by what they are."""
    found: dict[str, list[str]] = {}
    names = {"near": "near outliers", "far": "far outliers"}
    for condition in of_kind(results, "outliers", "attack", "corruption"):
        kind = {"attack": "attacked inputs", "corruption": "corrupted inputs"}.get(condition["kind"])
        found.setdefault(kind or names.get(str(condition.get("distance")), "outliers"), []).append(condition["label"])
    order = ("near outliers", "far outliers", "outliers", "attacked inputs", "corrupted inputs")
    return {family: found[family] for family in order if family in found}


def detection(results: RunResults) -> list[Table]:
    """AUROC, FPR and the like of every detector: near and far outliers, attacked and corrupted inputs, a table for each."""
    names = detectors(results)
    tables: list[Table] = []
    if not names:
        return tables
    metrics = ["auroc", "auroc_gain", "fpr95", "detection_accuracy", "aupr_out", "aupr_in", "alarms"]
    metrics = [m for m in metrics if any(row.metric == m for row in results.results)]
    unknown = Column("n unknown", "Unknown inputs; of an attack, its successes. Clean inputs: the test samples.")
    for family, labels in families(results).items():
        caption = f"Detection: clean test inputs against {family}"
        table = Table(caption, "model · condition · detector", [*(heading(m, results) for m in metrics), unknown])
        for query in (
            {"model": m, "condition": c, "probe": p} for m in model_names(results) for c in labels for p in names
        ):
            rows = [one(results, **query, metric=m) for m in metrics]
            size = Cell(str(rows[0].n_unknown), rows[0].n_unknown) if rows[0] else Cell("–")
            table.rows.append((" · ".join(query.values()), [*(number(r, results) for r in rows), size]))
        tables.append(table)
    return tables


def abstaining(results: RunResults) -> Table | None:
    """What detectors are worth for selective prediction, and how often they cry wolf."""
    metrics = [m for m in ("aurc", "e_aurc", "false_alarms") if any(row.metric == m for row in results.results)]
    if not detectors(results) or not metrics:
        return None
    caption = "Detectors as a reason to abstain"
    table = Table(caption, "model · condition · detector", [heading(m, results) for m in metrics])
    threats = [a["label"] for t in main_threats(results) if (a := attack_at(results, t))]
    for model in model_names(results):
        for condition in (CLEAN, *threats, *(c["label"] for c in of_kind(results, "corruption"))):
            for probe in detectors(results):
                query = {"model": model, "condition": condition, "probe": probe}
                rows = [one(results, **query, metric=m) for m in metrics]
                if any(rows):
                    table.rows.append((" · ".join(query.values()), [number(r, results) for r in rows]))
    return table


def cost(results: RunResults, run: dict[str, Any] | None) -> Table | None:
    """Passes per sample of every attack, and seconds where run.json has them."""
    if not results.cost:
        return None
    seconds = (run or {}).get("seconds", {}).get("cells", {})
    columns = [
        Column("forward passes per sample", "The clean pass is shared and not counted."),
        Column("backward passes per sample"),
        Column("seconds", "On the machine named below, one thread; with the pass that reads the probes."),
    ]
    table = Table("Cost of the attacks", "model · condition", columns)
    for item in results.cost:
        prefix = f"{item.model} · {item.condition}"
        spent = [s for name, s in seconds.items() if name == prefix or name.startswith(f"{prefix} part ")]
        table.rows.append(
            (
                prefix,
                [
                    Cell(f"{item.forwards / item.n:.1f}", item.forwards / item.n),
                    Cell(f"{item.backwards / item.n:.1f}", item.backwards / item.n),
                    Cell(f"{sum(spent):.1f}", sum(spent)) if spent else Cell("–"),
                ],
            )
        )
    return table
