"""The section on long-tailed training data: accuracy by how often classes were trained on, and relative to balanced data."""

from __future__ import annotations

from collections.abc import Callable

from reports.section import Section
from reports.tables import SHOTS, Cell, Column, Table, heading, number, one
from robustbench_ext.axes import CLASSIFIER, CLEAN, main_threats, model_names, threat_name
from robustbench_ext.results import Row, RunResults

RELATIVE, ROBUST_RELATIVE = "relative_accuracy", "robust_relative_accuracy"
_Find = Callable[[str, str, str], Row | None]  # the row of a model, a condition and a metric


def longtail(results: RunResults) -> Section:
    """Who pays for the long tail? Nothing where training data was balanced."""
    section = Section("longtail", "Long tail")
    by_shots, relative = accuracies(results), relatives(results)
    if by_shots is not None:
        section.text = (
            "The training data is long-tailed: groups of classes by their training samples, each class counting the same, "
            "clean and at the main budgets (worst case over attacks). All other conditions are in results.csv. "
        )
    if relative is not None:
        section.text += (
            "Relative accuracy: 100 % is what training on as many balanced samples reaches, by plain training or by the same "
            "method, whichever is better; its intervals allow for that choice."
        )
    section.tables = [t for t in (by_shots, over_seeds(results)) if t is not None]
    section.more = [relative] if relative is not None else []
    return section


def accuracies(results: RunResults) -> Table | None:
    """One row a model: all classes and groups of classes, clean and at the main threats, and relative accuracies."""

    def find(model: str, condition: str, metric: str) -> Row | None:
        query = {"model": model, "condition": condition, "probe": CLASSIFIER, "metric": metric}
        if metric in ("accuracy", "robust_accuracy"):
            return one(results, **query)
        rows = results.find(**query)
        return rows[0] if rows else None

    return _by_model(results, "Accuracy by training samples", model_names(results), find)


def over_seeds(results: RunResults) -> Table | None:
    """The same, as means over training seeds; None where nothing was trained several times."""
    there = {
        (r.model, r.condition, r.metric): r for r in results.replicates if r.probe == CLASSIFIER and r.group is None
    }
    there |= {
        (r.model, r.condition, r.metric): r for r in results.replicates if r.probe == CLASSIFIER and r.metric in SHOTS
    }
    names = list(dict.fromkeys(row.model for row in results.replicates))
    caption = "Accuracy by training samples, means over training seeds"
    return _by_model(results, caption, names, lambda *place: there.get(place))


def _by_model(results: RunResults, caption: str, models: list[str], find: _Find) -> Table | None:
    shots = [m for m in results.metrics if m in SHOTS and results.find(metric=m)]
    if not shots or not models:
        return None
    conditions = {CLEAN: CLEAN} | {threat_name(t): str(t["label"]) for t in main_threats(results)}
    wanted: list[tuple[str, str]] = []
    columns: list[Column] = []
    for title, label in conditions.items():
        plain, relative = ("accuracy", RELATIVE) if label == CLEAN else ("robust_accuracy", ROBUST_RELATIVE)
        metrics = [plain, *shots, "harmonic_accuracy"]
        metrics += [relative] if results.find(metric=relative, condition=label) else []
        for metric in metrics:
            wanted.append((label, metric))
            columns.append(_heading(results, metric, title))
    table = Table(caption, "model", columns)
    for model in models:
        table.rows.append((model, [number(find(model, label, metric), results) for label, metric in wanted]))
    return table


def _heading(results: RunResults, metric: str, condition: str) -> Column:
    """`clean: few shot (4 classes), % ↑`; which classes these are is in the definition."""
    column = heading(metric, results, f"{condition}: ")
    if metric not in SHOTS:
        return column
    size, _, names = str(results.find(metric=metric)[0].group).partition(": ")
    title, comma, unit = column.title.rpartition(",")
    return Column(f"{title} ({size}){comma}{unit}", f"{column.definition} Here: {names}.")


def relatives(results: RunResults) -> Table | None:
    """Every relative accuracy, with the accuracy that it is of and the models that it is relative to."""
    rows = [*results.find(metric=RELATIVE), *results.find(metric=ROBUST_RELATIVE)]
    if not rows:
        return None
    accuracy = Column("accuracy, % ↑", "Of the model itself; robust accuracy under attacks.")
    columns = [heading(RELATIVE, results), accuracy, Column("relative to", "The better of these models.")]
    table = Table("Accuracy relative to training on balanced data", "model · condition", columns)
    place = {name: i for i, name in enumerate(model_names(results))}
    for row in sorted(rows, key=lambda r: place.get(r.model, len(place))):
        metric = "accuracy" if row.metric == RELATIVE else "robust_accuracy"
        own = one(results, model=row.model, condition=row.condition, probe=CLASSIFIER, metric=metric)
        cells = [number(row, results), number(own, results), Cell(row.against or "")]
        table.rows.append((f"{row.model} · {row.condition}", cells))
    return table
