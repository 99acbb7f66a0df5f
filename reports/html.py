"""report.html: one self-contained file. Jinja2 with autoescape, inline SVG, no network, readable without JavaScript."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from reports import figures, tables, uncertainty
from reports.section import Section, figure
from reports.uncertainty import curves_of
from robustbench_ext import axes
from robustbench_ext.results import RunResults

TEMPLATES = Path(__file__).parent / "templates"
GALLERY_SAMPLES = 8
ENERGY_FIGURES = 12  # models; all are in the table
MANY_AXES = 2  # of trade-offs; fewer need no figure
MANY_CORRUPTIONS = 4  # more of them are shown as heat maps


def render_html(results: RunResults, run: dict[str, Any] | None, gallery: list[dict[str, Any]]) -> str:
    """The whole report.

    Args:
        run: the content of run.json (how the run was made), or None.
        gallery: the content of gallery.json.
    """
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    parts = (
        (uncertainty.errors, uncertainty.intervals, uncertainty.regression_uncertainty, _training)
        if axes.is_regression(results)
        else (
            _tradeoffs,
            _robustness,
            _distances,
            _classes,
            _corruptions,
            _domains,
            uncertainty.calibration,
            uncertainty.sets,
            uncertainty.uncertainty,
            _energy,
            _detection,
            _training,
        )
    )
    sections = [section for part in parts if (section := part(results))]
    page = environment.get_template("report.html.j2").render(
        results=results,
        regression=axes.is_regression(results),
        run=run,
        verdict=results.verdict,
        findings=results.suspicions,
        suspected=tables.suspected(results),
        checks=len(results.preflight) + len(results.doubts),
        headline=tables.headline(results),
        sections=sections,
        gallery=_gallery(results, gallery),
        cost=tables.cost(results, run),
        suite_yaml=yaml.safe_dump(run["suite"], sort_keys=False, allow_unicode=True) if run else "",
        metrics=[results.metrics[m] for m in dict.fromkeys(row.metric for row in results.results)],
        css=Markup((TEMPLATES / "report.css").read_text(encoding="utf-8")),
        js=Markup((TEMPLATES / "report.js").read_text(encoding="utf-8")),
    )
    return page + "\n"


def _tradeoffs(results: RunResults) -> Section:
    section = Section(
        "tradeoffs",
        "Trade-offs",
        "Means over all corruptions and domains of the suite, and the worst case over attacks at the largest budget. Where "
        "lines cross, one model is better here and the other there.",
    )
    if len(figures.axes_of(results)) > MANY_AXES and not axes.is_regression(results):
        alt = (
            "Accuracy of every model clean, corrupted, attacked and on other domains; the numbers are in the headline."
        )
        section.figures.append(figure("tradeoffs", alt, lambda ax: figures.tradeoffs(results, ax), (5.6, 3.4)))
    return section


def _robustness(results: RunResults) -> Section:
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
                (5.6, 3.4),
            )
        )
    section.tables.append(tables.robustness(results))
    targeted = tables.targeted(results)
    section.tables += [targeted] if targeted else []
    bounded = [c for c in axes.of_kind(results, "attack") if not c.get("minimum_norm")]
    return section if bounded or targeted else Section("robustness", "")


def _distances(results: RunResults) -> Section:
    section = Section(
        "distances",
        "Distance to the nearest mistake",
        "Minimum-norm attacks without a budget look for the smallest perturbation of each sample. The share of samples "
        "whose distance exceeds a budget is the robust accuracy at that budget, as far as this attack can tell. The bands "
        "hold for all budgets at once, at 95 %.",
    )
    curves = curves_of(results, kind="robust-accuracy")
    norm_of = {c["label"]: c["norm"] for c in axes.of_kind(results, "attack")}
    for norm in sorted({norm_of[c.condition] for c in curves}):
        section.figures.append(
            figure(
                f"distances-{norm}",
                f"Robust accuracy of each model against the {norm} budget, by the smallest perturbations found.",
                lambda ax, norm=norm: figures.distance_curves(
                    [c for c in curves if norm_of[c.condition] == norm], norm, ax
                ),
                (5.6, 3.4),
            )
        )
    table = tables.distances(results)
    section.tables += [table] if table else []
    return section


def _classes(results: RunResults) -> Section:
    section = Section("classes", "Accuracy by class", "Averages hide the worst-served class. Lines are 95 % intervals.")
    table = tables.tails(results)
    section.tables += [table] if table else []
    if len(results.data["classes"]) > 30:
        return section
    shown = ["clean", *(t["label"] for t in axes.main_threats(results))]
    for i, model in enumerate(axes.model_names(results)):
        section.figures.append(
            figure(
                f"classes-{i}",
                f"Accuracy of {model} for each class under {', '.join(shown)}.",
                lambda ax, model=model: figures.per_class(results, model, shown, ax),
                (5.6, 3.2),
            )
        )
    return section


def _corruptions(results: RunResults) -> Section:
    section = Section("corruptions", "Corruptions")
    names = list(dict.fromkeys(c["corruption"] for c in axes.of_kind(results, "corruption")))
    if len(names) > MANY_CORRUPTIONS:
        for i, model in enumerate(axes.model_names(results)):
            section.figures.append(
                figure(
                    f"corruptions-{i}",
                    f"Accuracy of {model} under every corruption and severity; the numbers are in the table below.",
                    lambda ax, model=model: figures.corruption_heatmap(results, model, ax),
                    (4.6, 0.9 + 0.24 * len(names)),
                )
            )
        names = []
    for i, name in enumerate(names):
        section.figures.append(
            figure(
                f"corruption-{i}",
                f"Accuracy of each model against the severity of {name}; the numbers are in the table below.",
                lambda ax, name=name: figures.corruption_curve(results, name, ax),
                (5.6, 3.2),
            )
        )
    table = tables.corruptions(results)
    section.tables += [table] if table else []
    return section


def _domains(results: RunResults) -> Section:
    section = Section(
        "domains",
        "Other domains",
        "The same classes from elsewhere; `clean` is the test split of what the models were trained on.",
    )
    table = tables.domains(results)
    section.tables += [table] if table else []
    return section


def _attacked(results: RunResults) -> list[str]:
    return [a["label"] for t in axes.main_threats(results) if (a := axes.attack_at(results, t))]


def _energy(results: RunResults) -> Section:
    section = Section(
        "energy",
        "Energy",
        "E(x) = -logsumexp f(x) is low where the network takes an input for one like its training data; E(x, y) = -f(x)[y] is "
        "low where it sees the true class in it. The levels of different networks cannot be compared: a constant added to all "
        "logits shifts them and changes no prediction. Differences can be, as far as the scale of the logits is the same. "
        "Attacked inputs are those of attacks that go on to the end (stop: never); others stop at the first misclassified "
        "input, whose energy says little. Samples that are misclassified clean are not attacked and left out.",
        folded=True,
    )
    table = tables.energies(results)
    if table is None:
        return section
    section.tables.append(table)
    if len(results.models) > ENERGY_FIGURES:
        section.text += f" The figures show the first {ENERGY_FIGURES} models, the table all."
    for i, model in enumerate(axes.model_names(results)[:ENERGY_FIGURES]):
        curves = curves_of(results, kind="energies", model=model)
        # Under the attack that calibration is shown under, if it is one of them.
        main = [c for c in curves if c.condition in _attacked(results)] or curves[-1:]
        for curve in main[:1]:
            section.figures.append(
                figure(
                    f"energy-{i}",
                    f"Energies of {model}, natural and under {curve.condition}; their means are in the table below.",
                    lambda ax, c=curve, t=f"{model}: {curve.condition}": figures.energy_histogram(c, t, ax),
                )
            )
    return section


def _detection(results: RunResults) -> Section:
    section = Section(
        "detection",
        "Unknown and attacked inputs",
        "Higher score = more unlike the training data. Of attacked inputs those count that fooled the classifier. "
        "Only attacks named 'against' a detector know of it; the others flatter it. Alarms are at a false-alarm rate of 5 %, "
        "set on clean calibration samples.",
    )
    found = tables.detection(results)
    if not found:
        return section
    outliers = [c["label"] for c in axes.of_kind(results, "outliers")]
    for i, model in enumerate(axes.model_names(results)):
        for j, condition in enumerate([*outliers[:2], *_attacked(results)]):
            curves = curves_of(results, kind="roc", model=model, condition=condition)
            if curves:
                section.figures.append(
                    figure(
                        f"roc-{i}-{j}",
                        f"ROC curves of the detectors on {model}, clean against {condition}.",
                        lambda ax, c=curves, t=f"{model}: {condition}": figures.roc(c, t, ax),
                    )
                )
        for j, detector in enumerate(axes.detectors(results)):
            for condition in outliers[:1]:
                for curve in curves_of(results, kind="scores", model=model, condition=condition, probe=detector):
                    section.figures.append(
                        figure(
                            f"scores-{i}-{j}",
                            f"Distribution of {detector} scores of {model}: clean against {condition}.",
                            lambda ax, c=curve, t=f"{model}: {detector}": figures.score_histogram(c, t, ax),
                        )
                    )
    worth = tables.abstaining(results)
    section.tables += [*found, *([worth] if worth else [])]
    section.folded = True
    return section


def _training(results: RunResults) -> Section:
    section = Section("training", "Training", "Models that this run trained itself, by epoch.")
    for i, model in enumerate(results.models):
        if not model.get("training", {}).get("curve"):
            continue
        if "loss" in model["training"]["curve"][0] and axes.is_regression(results):
            section.figures.append(
                figure(
                    f"training-{i}",
                    f"Loss of {model['name']} on training data and on data held out of it, by epoch.",
                    lambda ax, model=model: figures.training_loss(model, ax),
                )
            )
        elif not axes.is_regression(results):
            section.figures.append(
                figure(
                    f"training-{i}",
                    f"Clean and robust accuracy of {model['name']} on the calibration split by epoch.",
                    lambda ax, model=model: figures.training_curve(model, ax),
                )
            )
            if "delta_energy_train" in model["training"]["curve"][0]:
                section.figures.append(
                    figure(
                        f"energies-{i}",
                        f"Mean energy difference of natural and attacked inputs of {model['name']} by epoch.",
                        lambda ax, model=model: figures.training_energies(model, ax),
                    )
                )
    return section


def _class_name(classes: list[str], index: int) -> str:
    """A class's name; a model may have more outputs than the data has classes."""
    return classes[index] if index < len(classes) else f"#{index}"


def _gallery(results: RunResults, gallery: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each model the samples under the attack that calibration is shown under."""
    shown = _attacked(results)
    classes = [str(c) for c in results.data["classes"]]
    groups = []
    for model in axes.model_names(results):
        for condition in shown:
            items = [g for g in gallery if g["model"] == model and g["condition"] == condition][:GALLERY_SAMPLES]
            # Only images that this project encoded itself are put into the page.
            items = [g for g in items if all(str(i).startswith("data:image/png;base64,") for i in g["images"])]
            named = [{**g, **{k: _class_name(classes, g[k]) for k in ("label", "before", "after")}} for g in items]
            if named:
                groups.append({"model": model, "condition": condition, "items": named})
    return groups
