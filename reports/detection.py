"""Sections on inputs that the model should not trust: energies, unknown and attacked inputs."""

from __future__ import annotations

from reports import figures, tables
from reports.section import Section, figure
from reports.spotlight import one_by_one, spotlight
from reports.uncertainty import curves_of, shown_attacks
from robustbench_ext import axes
from robustbench_ext.results import RunResults

MOST_HISTOGRAMS = 24


def energy(results: RunResults) -> Section:
    """Does the network take an input for one like its training data?"""
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
    section.text += one_by_one(results)
    attacks = shown_attacks(results)
    for i, model in enumerate(spotlight(results)):
        curves = curves_of(results, kind="energies", model=model)
        # Under the attack that calibration is shown under, if it is one of them.
        main = [c for c in curves if c.condition in attacks] or curves[-1:]
        for curve in main[:1]:
            section.figures.append(
                figure(
                    f"energy-{i}",
                    f"Energies of {model}, natural and under {curve.condition}; their means are in the table below.",
                    lambda ax, c=curve, t=f"{model}: {curve.condition}": figures.energy_histogram(c, t, ax),
                    model=model,
                )
            )
    return section


def detection(results: RunResults) -> Section:
    """Are inputs that do not belong here told apart?"""
    section = Section(
        "detection",
        "Unknown and attacked inputs",
        "Higher score = more unlike the training data. Of attacked inputs those count that fooled the classifier. "
        "Only attacks named 'against' a detector know of it; the others flatter it. Alarms are at a false-alarm rate of 5 %, "
        "set on clean calibration samples.",
        folded=True,
    )
    found = tables.detection(results)
    if not found:
        return section
    outliers = [str(c["label"]) for c in axes.of_kind(results, "outliers")]
    shown, detectors = spotlight(results), axes.detectors(results)
    for i, model in enumerate(shown):
        for j, condition in enumerate([*outliers[:2], *shown_attacks(results)]):
            curves = [
                c for c in curves_of(results, kind="roc", model=model, condition=condition) if c.probe in detectors
            ]
            if curves:
                section.figures.append(
                    figure(
                        f"roc-{i}-{j}",
                        f"ROC curves of the detectors on {model}, clean against {condition}.",
                        lambda ax, c=curves, t=f"{model}: {condition}": figures.roc(c, t, ax),
                        model=model,
                    )
                )
    curves = [
        curve
        for condition in outliers[:1]
        for model in shown
        for detector in detectors
        for curve in curves_of(results, kind="scores", model=model, condition=condition, probe=detector)
    ]
    histograms = [
        figure(
            f"scores-{i}",
            f"Distribution of {curve.probe} scores of {curve.model}: clean against {curve.condition}.",
            lambda ax, c=curve: figures.score_histogram(c, f"{c.model}: {c.probe}", ax),
            model=curve.model,
        )
        for i, curve in enumerate(curves[:MOST_HISTOGRAMS])
    ]
    if histograms:
        rest = len(curves) - len(histograms)
        more = f"; {rest} more are in results.json" if rest else ""
        section.drawn.append((f"Score histograms against {outliers[0]} ({len(histograms)} figures{more})", histograms))
    section.text += one_by_one(results)
    worth = tables.abstaining(results)
    section.tables += [*found, *([worth] if worth else [])]
    return section
