"""Sections of the report on uncertainty: calibration, prediction sets, uncertainties; errors and intervals of regressors."""

from __future__ import annotations

from reports import figures, tables
from reports import uncertainty_tables as made
from reports.section import Section, figure
from reports.spotlight import one_by_one, spotlight
from reports.svg import PALETTE
from robustbench_ext import axes
from robustbench_ext.results import Curve, RunResults

MOST_CURVES = 2 * len(PALETTE)  # in one figure: each has a look of its own
MOST_RELIABLE = 3  # in a reliability diagram, where each has a point and a bar in every bin


def curves_of(results: RunResults, **wanted: str) -> list[Curve]:
    """Curves with these field values."""
    found = results.curves
    for name, value in wanted.items():
        found = [c for c in found if getattr(c, name) == value]
    return found


def shown_attacks(results: RunResults) -> list[str]:
    """The attacks that stand for all where there is room for one: at the main threats."""
    return [str(a["label"]) for t in axes.main_threats(results) if (a := axes.attack_at(results, t))]


def calibration(results: RunResults) -> Section:
    """Does 90 % confidence mean 90 % correct?"""
    section = Section(
        "calibration",
        "Calibration, clean and shifted",
        "Does 90 % confidence mean 90 % correct? Points below the diagonal are over-confident; bars are 95 % intervals, bin by "
        "bin. The grey band is where 95 % of perfectly calibrated classifiers would have all their bins at once. Estimators "
        "such as temperature scaling are fitted on the clean calibration split, never on test data. Under attack, samples "
        "that are misclassified clean are shown as they are: an attack has nothing to add to them.",
    )
    corrupted = [str(c["label"]) for c in axes.of_kind(results, *axes.SHIFTS)][-1:]
    for i, model in enumerate(spotlight(results)):
        for j, condition in enumerate([axes.CLEAN, *corrupted, *shown_attacks(results)]):
            curves = curves_of(results, kind="reliability", model=model, condition=condition)[:MOST_RELIABLE]
            if curves:
                section.figures.append(
                    figure(
                        f"reliability-{i}-{j}",
                        f"Reliability diagram of {model}, {condition}: accuracy against confidence per bin.",
                        lambda ax, c=curves, t=f"{model}: {condition}": figures.reliability_diagram(c, t, ax),
                        (4.4, 3.5),
                        model=model,
                    )
                )
    section.text += one_by_one(results)
    if len(axes.estimators(results)) >= MOST_RELIABLE:
        section.text += (
            f" The diagrams show the classifier and the first {MOST_RELIABLE - 1} estimators, the tables all."
        )
    everywhere = tables.calibration(results)
    if axes.estimators(results):
        section.tables = [made.calibration_clean(results)]
        section.more = [everywhere, *made.calibration_details(results)]
    else:
        section.tables, section.folded = [everywhere], True
    return section


def sets(results: RunResults) -> Section:
    """Classes that the label is promised to be among."""
    everywhere = made.sets(results, made.labelled(results))
    shown = made.sets(results, [axes.CLEAN, *made.strongest(results)])
    return Section(
        "sets",
        "Prediction sets",
        "A set holds the classes that the label may be, so that it is among them as often as was promised: on average over "
        "inputs like the calibration samples. Nothing is promised for single classes, or under attack. Sets that always "
        "hold all classes cover everything, so coverage is to be read beside the size.",
        tables=[shown],
        more=[everywhere] if len(everywhere.rows) > len(shown.rows) else [],
    )


def uncertainty(results: RunResults) -> Section:
    """What uncertainties are worth, of classifiers."""
    section = Section(
        "uncertainty",
        "Uncertainty",
        "What is an uncertainty good for? It should be high where the prediction is wrong (AUROC of mistakes, and errors among "
        "the samples that are answered first), and where the input is none that the model knows. 'classifier · msp', one "
        "minus the largest probability, costs nothing: an estimator has to beat it. Errors are those of the estimator's own "
        "prediction.",
    )
    names = made.scores(results)
    if not names:
        return section
    section.text += one_by_one(results)
    for i, model in enumerate(spotlight(results)):
        outliers = [str(c["label"]) for c in axes.of_kind(results, "outliers")]
        for condition in [*outliers, *made.strongest(results)][:1]:
            curves = [c for c in curves_of(results, kind="roc", model=model, condition=condition) if c.probe in names]
            if curves:
                section.figures.append(
                    figure(
                        f"uncertainty-roc-{i}",
                        f"ROC curves of the uncertainties of {model}, clean against {condition}.",
                        lambda ax, c=curves, t=f"{model}: {condition}": figures.roc(c, t, ax),
                        model=model,
                    )
                )
    main, every = made.telling_apart(results)
    shown = made.mistakes(results, [axes.CLEAN])
    everywhere = made.mistakes(results, made.labelled(results))
    section.tables = [t for t in (shown, main) if t.rows]
    section.more = [t for t in (everywhere, every) if t.rows]
    return section


def abstaining(results: RunResults) -> Section:
    """What is gained by not answering?"""
    section = Section(
        "abstaining",
        "Risk and coverage",
        "The error rate among the samples that are answered, most confident first, against their share. At 100 % it is the "
        "error rate; a useful confidence keeps it low far to the right." + one_by_one(results),
    )
    names = (axes.CLASSIFIER, *axes.estimators(results), *made.scores(results))
    for i, model in enumerate(spotlight(results)):
        clean = curves_of(results, kind="risk-coverage", model=model, condition=axes.CLEAN)
        clean = [c for c in clean if c.probe in names]
        if clean:
            section.figures.append(
                figure(
                    f"risk-{i}",
                    f"Error rate of {model} against the share of clean samples that are answered, by score.",
                    lambda ax, c=clean, t=f"{model}: errors among the answered": figures.risk_coverage(c, t, ax),
                    (4.4, 3.6),
                    model=model,
                )
            )
    return section


# Regression ----------------------------------------------------------------------------------------------------------


def errors(results: RunResults) -> Section:
    """Point predictions, clean, shifted and attacked."""
    return Section(
        "errors",
        "Errors",
        "Of the regressors' own predictions. The rise is the mean of |error| minus |error| of the same samples as they were; "
        "samples that a condition draws anew are compared as far as they are among the clean ones.",
        tables=[made.errors(results)],
    )


def intervals(results: RunResults) -> Section:
    """Coverage, width and scores of prediction intervals."""
    at = axes.SHOWN
    section = Section(
        "intervals",
        "Prediction intervals",
        f"Intervals of {at} should hold {at} of the targets, and be narrow. Infinite ones hold all, so coverage is read beside "
        f"the width; the interval score and the weighted interval score (WIS, over all levels) weigh both. Calibrated methods "
        f"promise their coverage for samples like the calibration samples; under a shift or an attack nobody does. Attacks are "
        f"on the regressor: estimators with a model of their own meet them as they come, not at their worst. In the figures "
        f"the bars of an estimator hold for all of its levels at once, at 95 %.",
    )
    shown = made.intervals(results)
    if not shown.rows:
        return section
    one_number = results.data.get("shape") == [1]
    section.text += one_by_one(results)
    for i, model in enumerate(spotlight(results)):
        clean = {"model": model, "condition": axes.CLEAN}
        curves = curves_of(results, kind="coverage", **clean)[:MOST_CURVES]
        drawn = curves_of(results, kind="intervals", **clean)
        if curves:
            section.figures.append(
                figure(
                    f"coverage-{i}",
                    f"Coverage of the intervals of {model} minus their nominal coverage; the numbers are in the tables below.",
                    lambda ax, c=curves, t=f"{model}: coverage, clean": figures.coverage_gap(c, t, ax),
                    (4.4, 2.8 + 0.09 * min(len(drawn or curves), MOST_CURVES)),
                    model,
                )
            )
        if drawn and one_number:
            section.figures.append(
                figure(
                    f"intervals-{i}",
                    f"{at} intervals of {model} by {drawn[0].probe} against the input.",
                    lambda ax, c=drawn[0], t=f"{model}: {at} intervals, {drawn[0].probe}": figures.intervals(c, t, ax),
                    (4.4, 2.8 + 0.09 * min(len(drawn or curves), MOST_CURVES)),
                    model,
                )
            )
        elif drawn:
            section.figures.append(
                figure(
                    f"widths-{i}",
                    f"Widths of the {at} intervals of {model}, each estimator's sorted.",
                    lambda ax, c=drawn[:MOST_CURVES], t=f"{model}: width of {at} intervals": figures.sharpness(
                        c, t, ax
                    ),
                    (4.4, 2.8 + 0.09 * min(len(drawn or curves), MOST_CURVES)),
                    model,
                )
            )
    section.tables = [shown, *made.intervals_shifted(results)]
    section.more = made.interval_details(results)
    return section


def regression_uncertainty(results: RunResults) -> Section:
    """What uncertainties are worth, of regressors."""
    section = Section(
        "uncertainty",
        "Uncertainty",
        "An uncertainty should be high where the error is large (rank correlation; AUSE, 0 is a perfect order), and where a "
        "condition has moved the inputs away from what the model knows (AUROC, 50 % is chance). 'width' is that of the "
        f"{axes.SHOWN} interval; a constant width ranks nothing.",
    )
    main, _ = made.telling_apart(results)
    shown = made.rankings(results, [axes.CLEAN])
    everywhere = made.rankings(results, made.labelled(results))
    section.tables = [t for t in (shown, main) if t.rows]
    section.more = [everywhere] if len(everywhere.rows) > len(shown.rows) else []
    return section
