"""Sections on accuracy: trade-offs, under attack, by distance, by class, under corruptions, on other domains."""

from __future__ import annotations

from reports import figures, tables
from reports.section import Section, figure
from reports.spotlight import MOST, one_by_one, spotlight
from reports.uncertainty import curves_of
from robustbench_ext import axes
from robustbench_ext.results import RunResults

MANY_AXES = 2  # of trade-offs; fewer need no figure
MANY_CORRUPTIONS = 4  # more of them are shown as heat maps
MANY_CLASSES = 30  # more bars than anybody reads
WIDE = (5.6, 3.4)


def tradeoffs(results: RunResults) -> Section:
    """What is paid for what?"""
    section = Section("tradeoffs", "Trade-offs", "Bars are 95 % intervals.")
    if len(results.models) > MOST:
        section.text += (
            f" Coloured are {MOST} models: those with the best value on an axis, then the first of the suite."
        )
    if len(figures.axes_of(results)) > MANY_AXES:
        alt = (
            "Accuracy of every model clean, corrupted, attacked and on other domains; the numbers are in the headline."
        )
        section.text += (
            " Lines: means over all corruptions and domains of the suite, and the worst case over attacks at the largest "
            "budget; where they cross, one model is better here and the other there."
        )
        section.figures.append(figure("tradeoffs", alt, lambda ax: figures.tradeoffs(results, ax), WIDE))
    there = {axis.metric for axis in axes.axes(results)}
    if len(results.models) > 1 and "robust_accuracy" in there:
        section.text += " Points: what robustness costs in clean accuracy, and whether robust models are calibrated."
        for name, metric, paint in (
            ("clean-robust", "accuracy", figures.clean_against_robust),
            ("robust-calibration", "ece", figures.robust_against_calibration),
        ):
            if metric in there:
                alt = f"Every model's robust accuracy and clean {results.metrics[metric]['title']}, with intervals."
                section.figures.append(figure(name, alt, lambda ax, paint=paint: paint(results, ax), WIDE))
    return section


def robustness(results: RunResults) -> Section:
    """Accuracy under attack."""
    norms = sorted({c["norm"] for c in axes.of_kind(results, "worst-case")})
    section = Section(
        "robustness",
        "Robustness to attacks",
        "A sample counts as robust only if it is classified correctly clean and at every input that any attack "
        "submitted. Bands and brackets are 95 % intervals.",
    )
    for norm in norms:
        section.figures.append(
            figure(
                f"eps-{norm}",
                f"Worst-case robust accuracy of each model against the {norm} budget; the numbers are in the table below.",
                lambda ax, norm=norm: figures.robust_accuracy_curve(results, norm, ax),
                WIDE,
            )
        )
    section.tables.append(tables.robustness(results))
    targeted = tables.targeted(results)
    section.tables += [targeted] if targeted else []
    bounded = [c for c in axes.of_kind(results, "attack") if not c.get("minimum_norm")]
    return section if bounded or targeted else Section("robustness", "")


def distances(results: RunResults) -> Section:
    """Accuracy at every budget, from the smallest perturbations."""
    section = Section(
        "distances",
        "Distance to the nearest mistake",
        "Minimum-norm attacks without a budget look for the smallest perturbation of each sample. The share of samples "
        "whose distance exceeds a budget is the robust accuracy at that budget, as far as this attack can tell. The bands "
        "hold for all budgets at once, at 95 %.",
    )
    shown = spotlight(results)
    curves = [c for c in curves_of(results, kind="robust-accuracy") if c.model in shown]
    norm_of = {c["label"]: c["norm"] for c in axes.of_kind(results, "attack")}
    for norm in sorted({norm_of[c.condition] for c in curves}):
        section.figures.append(
            figure(
                f"distances-{norm}",
                f"Robust accuracy of each model against the {norm} budget, by the smallest perturbations found.",
                lambda ax, norm=norm: figures.distance_curves(
                    [c for c in curves if norm_of[c.condition] == norm], norm, ax
                ),
                WIDE,
            )
        )
    section.text += one_by_one(results) if curves else ""
    table = tables.distances(results)
    section.tables += [table] if table else []
    return section


def classes(results: RunResults) -> Section:
    """Whom do averages hide?"""
    section = Section("classes", "Accuracy by class", "Averages hide the worst-served class. Lines are 95 % intervals.")
    table = tables.tails(results)
    section.tables += [table] if table else []
    count = len(results.data["classes"])
    if count > MANY_CLASSES:
        return section
    shown = ["clean", *(t["label"] for t in axes.main_threats(results))]
    if len(results.models) > MOST:
        section.text = "Averages hide the worst-served class. Intervals of single classes are in results.csv."
        for i, condition in enumerate(shown):
            section.figures.append(
                figure(
                    f"class-matrix-{i}",
                    f"Accuracy of every model for each class, {condition}; the numbers are in the figure.",
                    lambda ax, condition=condition: figures.class_matrix(results, condition, ax),
                    (2.2 + 0.32 * count, 1.4 + 0.22 * len(results.models)),
                )
            )
        return section
    for i, model in enumerate(axes.model_names(results)):
        section.figures.append(
            figure(
                f"classes-{i}",
                f"Accuracy of {model} for each class under {', '.join(shown)}.",
                lambda ax, model=model: figures.per_class(results, model, shown, ax),
                (5.6, 3.2),
                model,
            )
        )
    return section


def corruptions(results: RunResults) -> Section:
    """Accuracy under corruptions."""
    section = Section("corruptions", "Corruptions")
    names = list(dict.fromkeys(c["corruption"] for c in axes.of_kind(results, "corruption")))
    if len(names) <= MANY_CORRUPTIONS:
        section.text = "Bands and brackets are 95 % intervals."
        for i, name in enumerate(names):
            section.figures.append(
                figure(
                    f"corruption-{i}",
                    f"Accuracy of each model against the severity of {name}; the numbers are in the table below.",
                    lambda ax, name=name: figures.corruption_curve(results, name, ax),
                    (5.6, 3.4),
                )
            )
    else:
        _heat_maps(section, results, names)
    table = tables.corruptions(results)
    section.tables += [table] if table else []
    return section


def _heat_maps(section: Section, results: RunResults, names: list[str]) -> None:
    section.text = "Numbers are accuracies in percent, darker is worse; intervals are in the table." + one_by_one(
        results
    )
    if len(results.models) > MOST:
        section.figures.append(
            figure(
                "corruption-matrix",
                "Accuracy of every model under the most severe form of every corruption; the numbers are in the figure.",
                lambda ax: figures.corruption_matrix(results, ax),
                (2.4 + 0.3 * len(names), 1.7 + 0.22 * len(results.models)),
            )
        )
    maps = [
        figure(
            f"corruptions-{i}",
            f"Accuracy of {model} under every corruption and severity; the numbers are in the table below.",
            lambda ax, model=model: figures.corruption_heatmap(results, model, ax),
            (4.6, 0.9 + 0.24 * len(names)),
            model,
        )
        for i, model in enumerate(spotlight(results))
    ]
    if len(results.models) > MOST:
        section.drawn.append(("Every severity, model by model", maps))
    else:
        section.figures += maps


def domains(results: RunResults) -> Section:
    """Accuracy elsewhere."""
    section = Section(
        "domains",
        "Other domains",
        "The same classes from elsewhere; `clean` is the test split of what the models were trained on.",
    )
    table = tables.domains(results)
    section.tables += [table] if table else []
    return section
