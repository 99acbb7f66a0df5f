"""What a metric is made of, sample by sample: the form in which two models can be compared on the same samples.

A metric is a share of right answers, a mean of one number per sample, an area under the ROC curve, or some other statistic that
is resampled. `statistic` gives that form for a row of the results from the records behind it; two such forms over the same
samples can be compared (`compare.py`), and a single one can be kept as a baseline.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from scipy.special import softmax

from robustbench_ext import measure_axes, measure_truth
from robustbench_ext.axes import CLASSIFIER, CLEAN, REGRESSOR
from robustbench_ext.data.base import ClassTruth, Truth
from robustbench_ext.data.corruptions.levels import FIFTEEN
from robustbench_ext.fingerprint import Rows
from robustbench_ext.index import Recorded
from robustbench_ext.measure_regression import shown
from robustbench_ext.measure_uncertainty import BASELINE, PARTS, lack_of_confidence
from robustbench_ext.measured import correct, rows
from robustbench_ext.metrics import calibration, quantiles, regression
from robustbench_ext.metrics.blocks import each
from robustbench_ext.metrics.classification import predicted, worst_class_accuracy
from robustbench_ext.metrics.resampling import resampled_bin_sums, resampled_sums
from robustbench_ext.metrics.spread import change_values, group_values, resampled_spread
from robustbench_ext.probes import ORACLE
from robustbench_ext.results import RunResults
from uq.regression import LEVELS, NOMINAL


@dataclass(frozen=True)
class Share:
    """A proportion: `right` (N,) bool."""

    ids: np.ndarray
    right: np.ndarray


@dataclass(frozen=True)
class Mean:
    """A mean: `values` (N,) float64."""

    ids: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class Resampled:
    """Any statistic of N samples: its value, and its values on bootstrap resamples (R,).

    The resamples depend on N alone, so two of these over the same samples are resampled jointly. `ends` is the statistic's own
    interval where resamples cannot show how uncertain it is: a class without right answers has none in any resample.
    """

    ids: np.ndarray
    value: float
    drawn: np.ndarray
    ends: tuple[float, float] | None = None


@dataclass(frozen=True)
class Area:
    """An AUROC: scores of clean and of unknown inputs, higher = more unknown."""

    ids: np.ndarray
    clean: np.ndarray
    unknown_ids: np.ndarray
    unknown: np.ndarray


Statistic = Share | Mean | Resampled | Area


@dataclass(frozen=True)
class Place:
    """A row's place in a run: whose records, under which condition, read by which probe."""

    records: Recorded
    results: RunResults
    model: str
    condition: str
    probe: str
    group: str | None

    def facts(self, condition: str | None = None) -> dict[str, Any]:
        """What the results say of a condition."""
        label = condition or self.condition
        found = [c for c in self.results.conditions if c["label"] == label]
        # Models that meet other attacks have other worst cases under one label.
        mine = [c for c in found if all(self.results.find(model=self.model, condition=o) for o in c.get("over", []))]
        return max(mine or found, key=lambda c: len(c.get("over", [])))

    def seen(self, condition: str | None = None) -> Mapping[str, np.ndarray]:
        """Observations under a condition."""
        return self.records.observations(self.model, condition or self.condition)

    def read(self) -> Mapping[str, np.ndarray]:
        """What the probe read."""
        return self.records.probe(self.model, self.condition, self.probe)

    def logits(self) -> Rows:
        """The classifier's logits, or an estimator's, to be read block by block."""
        return rows(self.seen() if self.probe == CLASSIFIER else self.read(), "logits")


def statistic(
    records: Recorded,
    results: RunResults,
    model: str,
    condition: str,
    probe: str,
    metric: str,
    group: str | None = None,
) -> Statistic | None:
    """The sample-by-sample form of a metric; None where it has none: metrics of few samples, and of audits.

    Args:
        group: of the row, such as a class or a nominal coverage; None for all samples.
    """
    place = Place(records, results, model, condition, probe, group)
    make = partial(_own, metric) if "origin" in results.metrics.get(metric, {}) else _KINDS.get(metric)
    if make is None or place.facts().get("minimum_norm"):
        return None
    if any("audit" in place.seen(label) for label in _members(place)):
        return None  # most samples have no verdict of their own
    return make(place)


def _members(place: Place) -> list[str]:
    """The conditions that a condition is taken over, itself where it is a single one."""
    return list(place.facts().get("over", [place.condition]))


# Classification ------------------------------------------------------------------------------------------------------


def _verdicts(place: Place) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ids, labels and right answers (N,): of worst cases under all attacks and clean."""
    if place.probe != CLASSIFIER:
        seen = place.seen()
        return seen["id"], seen["label"], predicted(place.logits(), seen["label"])
    labels = _members(place)
    if place.facts()["kind"] == "worst-case":
        labels = [CLEAN, *labels]
    seen = place.seen(labels[0])
    return seen["id"], seen["label"], np.logical_and.reduce([correct(place.seen(label)) for label in labels])


def _accuracy(place: Place) -> Statistic:
    ids, y, right = _verdicts(place)
    if place.group is None:
        return Share(ids, right)
    mine = y == [str(c) for c in place.results.data["classes"]].index(place.group)
    return Share(ids[mine], right[mine])


def _balanced(place: Place) -> Statistic:
    ids, y, right = _verdicts(place)
    return Mean(ids, group_values(right, y))


def _worst_class(place: Place) -> Statistic:
    ids, y, right = _verdicts(place)
    return _lowest(ids, y, right)


def _lowest(ids: np.ndarray, groups: np.ndarray, right: np.ndarray) -> Statistic:
    """The lowest accuracy of any group. A group that a resample misses does not count in it."""
    _, index = np.unique(groups, return_inverse=True)
    bins = int(index.max()) + 1
    hits, sizes = resampled_bin_sums(index, right.astype(np.float64), np.ones(len(index)), bins=bins)
    shares = np.where(sizes > 0, hits / np.maximum(sizes, 1), np.inf)
    lowest, _ = worst_class_accuracy(right, index, bins)
    return Resampled(ids, lowest.value, shares.min(axis=1), (lowest.ci_low, lowest.ci_high))


def _several(place: Place, labels: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ids, number of the condition and right answers, of several conditions one after the other."""
    parts = [place.seen(label) for label in labels]
    which = np.repeat(np.arange(len(parts)), [len(part["label"]) for part in parts])
    ids = np.concatenate([part["id"] for part in parts])
    return ids, which, np.concatenate([correct(part) for part in parts])


def _mean_accuracy(place: Place) -> Statistic:
    labels = _members(place)
    if place.facts()["kind"] == "domains":
        ids, which, right = _several(place, labels)
        return Mean(ids, group_values(right, which))
    # The same samples under each corruption: a sample's mean over corruptions is what is independent.
    return Mean(place.seen(labels[0])["id"], np.mean([correct(place.seen(c)) for c in labels], axis=0))


def _worst_domain(place: Place) -> Statistic:
    return _lowest(*_several(place, _members(place)))


def _class_spread(place: Place) -> Statistic:
    ids, y, right = _verdicts(place)
    return Resampled(ids, *resampled_spread(right, y))


def _relative_change(place: Place) -> Statistic | None:
    found = measure_axes.changed(place.seen, place.facts()["kind"], _members(place))
    if not found.clean[0].any():
        return None
    return Mean(found.ids, change_values(found.clean, found.changed, found.paired))


def _corruption_error(place: Place) -> Statistic:
    labels = [label for label in _members(place) if place.facts(label)["corruption"] in FIFTEEN]
    return Mean(place.seen(labels[0])["id"], 1 - np.mean([correct(place.seen(c)) for c in labels], axis=0))


def _ece(place: Place) -> Statistic:
    seen = place.seen()
    confidence, right = calibration.confidence_and_correctness(place.logits(), seen["label"])
    index, bins = calibration.bin_index(confidence), calibration.BINS
    gaps = right - confidence
    drawn = np.abs(resampled_bin_sums(index, gaps, bins=bins)[0]).sum(axis=1) / len(gaps)
    return Resampled(seen["id"], float(np.abs(np.bincount(index, gaps, bins)).sum() / len(gaps)), drawn)


def _nll(place: Place) -> Statistic:
    seen = place.seen()
    return Mean(seen["id"], calibration.nll_terms(place.logits(), seen["label"]))


def _brier(place: Place) -> Statistic:
    seen = place.seen()

    def squares(z: np.ndarray, y: np.ndarray) -> tuple[np.ndarray]:
        p = softmax(z.astype(np.float64), axis=1)
        p[np.arange(len(p)), y] -= 1
        return ((p**2).sum(axis=1),)

    return Mean(seen["id"], each(squares, place.logits(), seen["label"])[0])


def _set_coverage(place: Place) -> Statistic:
    seen, read = place.seen(), place.read()
    return Share(seen["id"], read["sets"][np.arange(len(seen["label"])), seen["label"]])


def _set_size(place: Place) -> Statistic:
    return Mean(place.seen()["id"], place.read()["sets"].sum(axis=1).astype(np.float64))


def _own(metric: str, place: Place) -> Statistic | None:
    """A metric of the user's own: what it gave was kept."""
    values = place.records.own(place.model, place.condition, metric)
    if values is None:
        return None
    ids = place.seen()["id"]
    return Share(ids, values) if values.dtype == np.bool_ else Mean(ids, values)


# Detection -----------------------------------------------------------------------------------------------------------


def _scores(place: Place, condition: str) -> np.ndarray | None:
    """A detector's scores, or an uncertainty's (`ESTIMATOR · epistemic`)."""
    if place.probe == BASELINE:
        return lack_of_confidence(rows(place.seen(condition), "logits"))
    label, _, part = place.probe.rpartition(" · ")
    if part in PARTS:
        return place.records.probe(place.model, condition, label)[part]
    if part == "width":
        low, high = shown(dict(place.records.probe(place.model, condition, label)))
        return np.asarray(high - low)
    return place.records.probe(place.model, condition, place.probe).get("score")


def _auroc(place: Place) -> Statistic | None:
    before, after = _scores(place, CLEAN), _scores(place, place.condition)
    if before is None or after is None:
        return None
    clean, seen = place.seen(CLEAN), place.seen()
    chosen = np.ones(len(seen["id"]), dtype=bool)
    if place.facts()["kind"] == "attack":
        # Its successes; they are other samples for other models.
        chosen = seen["broken"] & correct(clean)
    return Area(clean["id"], before, seen["id"][chosen], after[chosen])


# Regression ----------------------------------------------------------------------------------------------------------


def _errors(place: Place) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ids, targets and errors of the point prediction (N,), float64."""
    seen = place.seen()
    point = seen["prediction"] if place.probe == REGRESSOR else place.read()["point"]
    y = seen["label"].astype(np.float64)
    return seen["id"], y, y - point


def _rmse(place: Place) -> Statistic:
    """Values whose mean is the RMSE and which vary as it does, to first order: (e^2 / RMSE + RMSE) / 2."""
    ids, _, error = _errors(place)
    rmse = float(np.sqrt(np.mean(error**2)))
    return Mean(ids, (error**2 / rmse + rmse) / 2 if rmse else np.zeros(len(error)))


def _r2(place: Place) -> Statistic | None:
    ids, y, error = _errors(place)
    off = y - y.mean()
    if not (off**2).sum():
        return None
    sums = resampled_sums(np.stack([np.ones(len(y)), off, off**2, error**2], axis=1))
    spread = sums[:, 2] - sums[:, 1] ** 2 / sums[:, 0]
    with np.errstate(divide="ignore", invalid="ignore"):
        drawn = 1 - sums[:, 3] / spread
    return Resampled(ids, float(1 - (error**2).sum() / (off**2).sum()), drawn)


def _mae(place: Place) -> Statistic:
    ids, _, error = _errors(place)
    return Mean(ids, np.abs(error))


def _nominal(group: str) -> float:
    """The nominal coverage that a group of rows is about."""
    return float(group.removesuffix(" %")) / 100


def _ends(place: Place) -> tuple[np.ndarray, np.ndarray, float]:
    """Both ends (N,) of the intervals of the group's nominal coverage, and the latter."""
    nominal = _nominal(str(place.group))
    i = int(np.argmin(np.abs(np.array(NOMINAL) - nominal)))
    read = place.read()
    return read["low"][:, i], read["high"][:, i], NOMINAL[i]


def _coverage(place: Place) -> Statistic | None:
    if place.group is None or "," in place.group:
        return None  # of some samples only, which are others for every model
    low, high, _ = _ends(place)
    seen = place.seen()
    return Share(seen["id"], regression.covered(seen["label"], low, high))


def _width(place: Place) -> Statistic:
    low, high, _ = _ends(place)
    return Mean(place.seen()["id"], high.astype(np.float64) - low)


def _interval_score(place: Place) -> Statistic:
    low, high, nominal = _ends(place)
    seen = place.seen()
    return Mean(seen["id"], regression.interval_scores(seen["label"], low, high, nominal))


def _wis(place: Place) -> Statistic:
    seen, read = place.seen(), place.read()
    y = seen["label"].astype(np.float64)
    median = read["quantiles"][:, LEVELS.index(0.5)] if "quantiles" in read else read["point"]
    total = np.abs(y - median)
    for i, nominal in enumerate(NOMINAL):
        scores = regression.interval_scores(y, read["low"][:, i], read["high"][:, i], nominal)
        total = total + (1 - nominal) * scores
    return Mean(seen["id"], total / (2 * len(NOMINAL) + 1))


def _pinball(place: Place) -> Statistic | None:
    seen, read = place.seen(), place.read()
    if "quantiles" not in read:
        return None
    return Mean(seen["id"], quantiles.pinball_losses(seen["label"], read["quantiles"], LEVELS).mean(axis=1))


# Truth ---------------------------------------------------------------------------------------------------------------


def _of_truth(metric: str) -> Callable[[Place], Statistic | None]:
    """A metric of predictions against the true law, where the data can be had again."""

    def make(place: Place) -> Statistic | None:
        known, seen = measure_truth.known_truth(place.results.data), place.seen()
        if known is None or place.probe == ORACLE:
            return None
        terms = _class_terms(place, known, seen) if isinstance(known, ClassTruth) else _number_terms(place, known, seen)
        found = terms.get((metric, place.group))
        return None if found is None or not np.isfinite(found).all() else Mean(seen["id"], found)

    return make


def _class_terms(place: Place, known: ClassTruth, seen: Mapping[str, np.ndarray]) -> measure_truth.Terms:
    p = known.probabilities(seen["id"])
    if place.group is None:
        return measure_truth.class_terms(p, place.logits(), seen["label"])
    return measure_truth.set_terms(p, place.read()["sets"], _nominal(place.group))


def _number_terms(place: Place, known: Truth, seen: Mapping[str, np.ndarray]) -> measure_truth.Terms:
    x = measure_truth.as_they_were(place.seen(CLEAN), seen)
    if place.probe == REGRESSOR:
        return {("mse_mean", None): (seen["prediction"].astype(np.float64) - known.mean(x)) ** 2}
    return measure_truth.number_terms(known, x, seen["label"], place.read())


_KINDS: dict[str, Callable[[Place], Statistic | None]] = {
    "accuracy": _accuracy,
    "robust_accuracy": _accuracy,
    "balanced_accuracy": _balanced,
    "worst_class_accuracy": _worst_class,
    "mean_accuracy": _mean_accuracy,
    "class_spread": _class_spread,
    "relative_change": _relative_change,
    "worst_domain_accuracy": _worst_domain,
    "mean_corruption_error": _corruption_error,
    "ece": _ece,
    "nll": _nll,
    "brier": _brier,
    "set_coverage": _set_coverage,
    "set_size": _set_size,
    "auroc": _auroc,
    "rmse": _rmse,
    "r2": _r2,
    "mae": _mae,
    "coverage": _coverage,
    "width": _width,
    "interval_score": _interval_score,
    "wis_mean": _wis,
    "pinball": _pinball,
    **{metric: _of_truth(metric) for metric in measure_truth.OF_TRUTH},
}
