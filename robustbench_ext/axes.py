"""The axes that models are judged on at first sight: what stands in the report's headline, and what is compared in pairs.

An axis is a question that has one row per model: accuracy clean, the worst case over attacks at the main budget of each norm,
the mean over corruptions, the worst domain, calibration, detection of unknown inputs; of regressors the errors and intervals.
Which axes there are depends on what was measured. All of it is read off the results alone.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from robustbench_ext.numbers import format_number
from robustbench_ext.results import Row, RunResults

CLASSIFIER, REGRESSOR, CLEAN = "classifier", "regressor", "clean"
SHOWN = "90 %"  # the nominal coverage of intervals that stands for all
SHIFTS = ("corruption", "shift")  # kinds of conditions that change clean inputs without asking the model


@dataclass(frozen=True)
class Axis:
    """One question.

    Attributes:
        title: short, without unit and direction.
        metric, condition: of the row that answers it.
        probe: of the row, the same for all models; empty where each model has its own in `probes`.
        group: of the row; `...` takes the row of whatever group, such as that of the worst class.
    """

    title: str
    metric: str
    condition: str
    probe: str = CLASSIFIER
    group: Any = None
    probes: dict[str, str] = field(default_factory=dict)

    def probe_of(self, model: str) -> str:
        """The probe of that model's row."""
        return self.probe or self.probes.get(model, "")

    def row(self, results: RunResults, model: str) -> Row | None:
        """That model's row, if it was measured."""
        query = {"model": model, "condition": self.condition, "probe": self.probe_of(model), "metric": self.metric}
        rows = results.find(**query) if self.group is ... else results.find(**query, group=self.group)
        return rows[0] if rows else None


def axes(results: RunResults) -> list[Axis]:
    """The axes of a run, in the order of its headline."""
    return _regression(results) if is_regression(results) else _classification(results)


def own_axes(results: RunResults) -> list[Axis]:
    """The user's own metrics on clean inputs: no part of the headline, but compared like it."""
    names = [name for name, about in results.metrics.items() if "origin" in about]
    return [Axis(str(results.metrics[name]["title"]), name, CLEAN) for name in names]


def best(results: RunResults, axis: Axis) -> str | None:
    """The model that is better than every other on an axis, by comparisons that are corrected for their number; None where
    chance could be behind its lead, where there is nothing to compare, and where no direction is better. Models of which a
    check failed are left out: their numbers lead nobody and beat nobody.
    """
    failed = {f.model for f in results.suspicions if f.status == "fail"}
    names = [n for n in model_names(results) if n not in failed and axis.row(results, n) is not None]
    beaten: dict[str, set[str]] = {}
    for c in results.compared(axis.metric, axis.condition):
        if c.probe == axis.probe_of(c.model) and (axis.group is ... or c.group == axis.group):
            winner, loser = (c.model, c.against) if c.outcome == "better" else (c.against, c.model)
            if c.outcome != "inconclusive" and not {winner, loser} & failed:
                beaten.setdefault(winner, set()).add(loser)
    return next((name for name, others in beaten.items() if len(others) == len(names) - 1), None)


def _classification(results: RunResults) -> list[Axis]:
    found = [Axis("clean accuracy", "accuracy", CLEAN)]
    for threat in main_threats(results):
        name, label = threat_name(threat), threat["label"]
        found.append(Axis(f"robust {name}", "robust_accuracy", label))
        found.append(Axis(f"worst class {name}", "worst_class_accuracy", label, group=...))
    corruptions, domains = of_kind(results, "corruption"), of_kind(results, "domain")
    if summary := of_kind(results, "corruptions"):
        found.append(Axis(f"{len(corruptions)} corruptions", "mean_accuracy", summary[0]["label"], group=...))
    elif corruptions:
        found.append(Axis(corruptions[-1]["label"], "accuracy", corruptions[-1]["label"]))
    if summary := of_kind(results, "domains"):
        label = summary[0]["label"]
        found.append(Axis(f"{len(domains)} domains", "mean_accuracy", label, group=...))
        found.append(Axis("worst domain", "worst_domain_accuracy", label, group=...))
    elif domains:
        found.append(Axis(domains[0]["label"], "accuracy", domains[0]["label"]))
    found.append(Axis("clean ECE", "ece", CLEAN))
    outliers, names = of_kind(results, "outliers"), detectors(results)
    if outliers and names:
        detector = "energy" if "energy" in names else names[0]
        title = f"AUROC {outliers[0]['outliers']} ({detector})"
        found.append(Axis(title, "auroc", outliers[0]["label"], detector))
    return found


def _regression(results: RunResults) -> list[Axis]:
    """The first estimator of each model stands for all of its: choosing the best one after the fact would flatter it."""
    firsts = {model: next(iter(interval_estimators(results, model)), "") for model in model_names(results)}
    some = any(firsts.values())

    def error(condition: str, metric: str = "rmse") -> Axis:
        return Axis(f"{condition} {results.metrics[metric]['title']}", metric, condition, REGRESSOR)

    def of_estimator(condition: str, metric: str, group: str | None = None) -> Axis:
        title = f"{condition} {results.metrics[metric]['title']}" + (f" at {group}" if group else "")
        return Axis(title, metric, condition, "", group, firsts)

    found = [error(CLEAN), error(CLEAN, "r2")]
    found += [of_estimator(CLEAN, "coverage", SHOWN), of_estimator(CLEAN, "wis_mean")] if some else []
    last = [[str(c["label"]) for c in of_kind(results, *kinds)][-1:] for kinds in (SHIFTS, ("attack",))]
    for condition in (label for labels in last for label in labels):
        found += [error(condition), *([of_estimator(condition, "coverage", SHOWN)] if some else [])]
    return found


# What a run holds ----------------------------------------------------------------------------------------------------


def is_regression(results: RunResults) -> bool:
    """Whether the run is of regressors."""
    return results.data.get("task") == "regression"


def model_names(results: RunResults) -> list[str]:
    """Models in the suite's order."""
    return [str(model["name"]) for model in results.models]


def of_kind(results: RunResults, *kinds: str) -> list[dict[str, Any]]:
    """Conditions of these kinds, in the suite's order, that some model has results for."""
    return [c for c in results.conditions if c["kind"] in kinds and results.find(condition=c["label"])]


def detectors(results: RunResults) -> list[str]:
    """Detector labels."""
    return [str(p["label"]) for p in results.probes if p["kind"] == "detector"]


def estimators(results: RunResults) -> list[str]:
    """Estimator labels."""
    return [str(p["label"]) for p in results.probes if p["kind"] == "estimator"]


def interval_estimators(results: RunResults, model: str) -> list[str]:
    """A regressor's estimators with intervals, in the suite's order."""
    there = {row.probe for row in results.find(model=model, metric="coverage")}
    return [name for name in estimators(results) if name in there]


def main_threats(results: RunResults) -> list[dict[str, Any]]:
    """The worst-case condition that stands for each norm: the budget that most attacks were run at; of several such the middle
    one, of two the larger.
    """
    attacks = Counter((c["norm"], c["eps"]) for c in of_kind(results, "attack") if c.get("eps") is not None)
    chosen = []
    for norm in sorted({c["norm"] for c in of_kind(results, "worst-case")}):
        found = [c for c in of_kind(results, "worst-case") if c["norm"] == norm]
        most = max(attacks[norm, c["eps"]] for c in found)
        tied = [c for c in found if attacks[norm, c["eps"]] == most]
        chosen.append(tied[len(tied) // 2])
    return chosen


def attack_at(results: RunResults, threat: dict[str, Any]) -> dict[str, Any] | None:
    """The attack to show calibration and detection under at a threat: full-strength where there is one."""
    found = [c for c in of_kind(results, "attack") if (c["norm"], c["eps"]) == (threat["norm"], threat["eps"])]
    strong = [c for c in found if c.get("parameters", {}).get("stop") == "never"]
    return next(iter(strong or found), None)


def threat_name(condition: dict[str, Any]) -> str:
    """`Linf 0.2`."""
    return f"{condition['norm']} {format_number(condition['eps'])}"
