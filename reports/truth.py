"""The section of a report on predictions against the true law, where the data knows it."""

from __future__ import annotations

from reports import uncertainty_tables as made
from reports.section import Section
from reports.tables import Table
from robustbench_ext import axes
from robustbench_ext.results import RunResults

ORACLE = "oracle"
_CLASSES = (("mse_p", None), ("kl_p", None), ("excess_nll", None), ("ks_error", None), ("brier", None), ("ece", None))
_NUMBERS = (("kl_normal", None), ("excess_nll", None), ("mse_mean", None), ("log_variance_error", None))
_COVERAGES = ("true_coverage", "coverage_gap", "coverage_shortfall")
_RANKS = ("noise_spearman", "truth_error_spearman", "epistemic_spearman")


def truth(results: RunResults) -> Section:
    """How far from the truth is it? Nothing where the truth is not known."""
    section = Section(
        "truth",
        "Against the truth",
        "This data knows the law of its outcomes, so that predictions are held against it and not against single outcomes. "
        "The oracle is an estimator that knows the law: what it scores on these outcomes nobody can be asked to beat. Coverage "
        "at each input is what a reader of one interval wants, and coverage on average does not give it. Under a corruption or "
        "an attack the truth is that of the sample as it was.",
    )
    section.tables = [t for t in (laws(results, [axes.CLEAN]), ranks(results, [axes.CLEAN])) if t.rows]
    every = made.labelled(results)
    section.tables[1:1] = [t for t in [coverages(results, [axes.CLEAN])] if t.rows]
    if len(every) > 1:
        section.more = [t for t in (laws(results, every), coverages(results, every), ranks(results, every)) if t.rows]
    return section


def laws(results: RunResults, conditions: list[str]) -> Table:
    """Distances of probabilities, or of means and variances, from the truth."""
    numbers = axes.is_regression(results)
    columns = _NUMBERS if numbers else _CLASSES
    probes = (axes.REGRESSOR if numbers else axes.CLASSIFIER, *axes.estimators(results), ORACLE)
    there = {row.probe for metric, _ in columns[:3] for row in results.find(metric=metric)}
    return made.long_table(
        results, "Distance from the true law", conditions, [p for p in probes if p in there], columns
    )


def coverages(results: RunResults, conditions: list[str]) -> Table:
    """True coverage of sets and intervals, on average and at each input."""
    group = axes.SHOWN if axes.is_regression(results) else "..."
    columns = [(metric, group) for metric in _COVERAGES]
    probes = [*axes.estimators(results), ORACLE]
    return made.long_table(results, "True coverage", conditions, probes, columns)


def ranks(results: RunResults, conditions: list[str]) -> Table:
    """What uncertainties say of the true noise, of the distance from the truth, of where data is missing."""
    columns = [(metric, None) for metric in _RANKS]
    return made.long_table(
        results,
        "Uncertainties against the truth (rank correlations)",
        conditions,
        made.scores(results),
        columns,
        "uncertainty",
    )
