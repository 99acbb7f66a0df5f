"""Rows against the truth, where the data knows it: of the model itself, of every estimator, and of the truth as an oracle.

The truth belongs to the sample. Under a corruption or an attack a classifier's probabilities are held against those that the
label was drawn with, and a regressor's intervals against the law of the target at the input as it was.

The oracle has the rows that an estimator has which knows the truth: it shows how low a score can be on these very outcomes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from scipy.special import expit

from robustbench_ext.conditions import Condition
from robustbench_ext.data.base import ClassTruth, Truth
from robustbench_ext.evaluate import CLEAN, Context
from robustbench_ext.fingerprint import Rows
from robustbench_ext.measure_uncertainty import BASELINE, PARTS, lack_of_confidence
from robustbench_ext.measured import Columns, Measured, Place, Tables, nominal_group, rows
from robustbench_ext.metrics import Estimate, quantiles, ranking, truth
from robustbench_ext.metrics import calibration as cal
from robustbench_ext.metrics import classification as cls
from robustbench_ext.metrics import regression as reg
from robustbench_ext.metrics.blocks import each
from robustbench_ext.metrics.resampling import sample_mean
from robustbench_ext.probes import CLASSIFIER, ORACLE
from uq.regression import LEVELS, NOMINAL, from_quantiles

COVERAGES = ("true_coverage", "coverage_gap", "coverage_shortfall")
OF_CLASSES = ("mse_p", "kl_p", "excess_nll")
OF_NUMBERS = ("kl_normal", "excess_nll", "mse_mean", "log_variance_error")
Terms = dict[tuple[str, str | None], np.ndarray]  # by metric and group, (N,) each: the metric is their mean

# Classification ------------------------------------------------------------------------------------------------------


def classifier(out: Measured, context: Context, tables: Tables, model: str, condition: Condition) -> None:
    """All rows of a model under a condition whose samples are the data's own; none where the truth is not known."""
    known, seen = context.data.class_truth, tables.observations(model, condition.label)
    if known is None or condition.kind in ("outliers", "domain") or "audit" in seen:
        return
    p, y = known.probabilities(seen["id"]), seen["label"]
    if rows(seen, "logits").shape[1] != p.shape[1]:
        return  # a model of more classes than the data has: its other outputs have no true probability

    def place(probe: str) -> Place:
        return Place(out, model, condition.label, probe)

    _probabilities(place(CLASSIFIER), p, rows(seen, "logits"), y)
    estimators = [probe for probe in context.probes_read(model) if probe.kind == "estimator"]
    _ranks(place(BASELINE), lack_of_confidence(rows(seen, "logits")), p, rows(seen, "logits"))
    for probe in estimators:
        read = tables.probe(model, condition.label, probe.label)
        if "sets" in read:
            alpha = probe.spec().get("alpha")
            _means(place(probe.label), set_terms(p, read["sets"], None if alpha is None else 1 - float(alpha)))
        else:
            _probabilities(place(probe.label), p, rows(read, "logits"), y)
        for part in PARTS:
            if part in read:
                _ranks(place(f"{probe.label} · {part}"), read[part], p, rows(read, "logits"))
    oracle = place(ORACLE)
    with np.errstate(divide="ignore"):
        logits = np.log(p)
    oracle.row("accuracy", cls.accuracy(cls.predicted(logits, y)))
    oracle.row("ece", cal.ece(*cal.confidence_and_correctness(logits, y)))
    oracle.row("nll", cal.nll(logits, y))
    oracle.row("brier", cal.brier(logits, y))
    _probabilities(oracle, p, logits, y)


def class_terms(p: np.ndarray, logits: Rows, y: np.ndarray) -> Terms:
    """What `OF_CLASSES` are means of."""
    found = (truth.probability_errors(p, logits), truth.divergences(p, logits), truth.excess_nll_terms(p, logits, y))
    return dict(zip([(metric, None) for metric in OF_CLASSES], found, strict=True))


def set_terms(p: np.ndarray, sets: np.ndarray, nominal: float | None) -> Terms:
    """What `COVERAGES` of prediction sets are means of; without a promise the first of them alone."""
    return _coverage_terms(truth.set_probabilities(p, sets), nominal)


def _coverage_terms(inside: np.ndarray, nominal: float | None) -> Terms:
    if nominal is None:
        return {(COVERAGES[0], None): inside}
    found = (inside, np.abs(inside - nominal), np.maximum(nominal - inside, 0.0))
    return {(metric, nominal_group(nominal)): terms for metric, terms in zip(COVERAGES, found, strict=True)}


def _probabilities(place: Place, p: np.ndarray, logits: Rows, y: np.ndarray) -> None:
    _means(place, class_terms(p, logits, y))
    if p.shape[1] == 2:
        (q,) = each(lambda z: (expit(z[:, 1].astype(np.float64) - z[:, 0]),), logits)
        place.row("ks_error", truth.ks_error(q, (y == 1).astype(np.float64)))
    else:
        place.row("ks_error", Estimate.undefined(len(y), f"it is of two classes, and there are {p.shape[1]}"))


def _ranks(place: Place, score: np.ndarray, p: np.ndarray, logits: Rows) -> None:
    """Whether an uncertainty (N,) is high where the outcome is uncertain, and where the probabilities are wrong."""
    place.row("noise_spearman", ranking.error_spearman(score, truth.entropies(p)))
    place.row("truth_error_spearman", ranking.error_spearman(score, np.sqrt(truth.probability_errors(p, logits))))


def _means(place: Place, terms: Terms) -> None:
    for (metric, group), values in terms.items():
        place.row(metric, mean_of(values), group=group)


def mean_of(values: np.ndarray) -> Estimate:
    """The mean with its bootstrap interval; undefined, with the reason, where terms are infinite or not numbers."""
    bad = int((~np.isfinite(values)).sum())
    if bad:
        return Estimate.undefined(len(values), f"it is not finite for {bad} of {len(values)} samples")
    return sample_mean(values)


# Regression ----------------------------------------------------------------------------------------------------------


def regressor(out: Measured, context: Context, tables: Tables, model: str, condition: Condition) -> None:
    """All rows of a regressor's estimators under a condition; none where the truth is not known."""
    known = context.data.truth
    if known is None:
        return
    seen = tables.observations(model, condition.label)
    x, y = as_they_were(tables.observations(model, CLEAN), seen), seen["label"]

    def place(probe: str) -> Place:
        return Place(out, model, condition.label, probe)

    place("regressor").row("mse_mean", mean_of((seen["prediction"].astype(np.float64) - known.mean(x)) ** 2))
    for probe in context.probes_read(model):
        if probe.kind == "estimator":
            read = tables.probe(model, condition.label, probe.label)
            _means(place(probe.label), number_terms(known, x, y, read))
            for part, score in _scores(read):
                _number_ranks(place(f"{probe.label} · {part}"), score, known, x, read["point"])
    ideal = oracle_reading(known, x)
    oracle = place(ORACLE)
    _means(oracle, number_terms(known, x, y, ideal))
    oracle.row("rmse", reg.rmse(y, ideal["point"]))
    oracle.row(
        "wis_mean", quantiles.wis_from_intervals(y, ideal["median"], ideal["low"], ideal["high"], NOMINAL)["wis_mean"]
    )
    for i, nominal in enumerate(NOMINAL):
        ends = ideal["low"][:, i], ideal["high"][:, i]
        oracle.row("coverage", reg.coverage(y, *ends), group=nominal_group(nominal))
        oracle.row("width", reg.width(*ends), group=nominal_group(nominal))
        oracle.row("interval_score", reg.interval_score(y, *ends, nominal), group=nominal_group(nominal))


def as_they_were(clean: Columns, seen: Columns) -> np.ndarray:
    """The inputs (N, d) of the samples before the condition changed them, float64.

    Samples that are not among the clean ones were chosen by the condition, and are what they were.
    """
    position = {name: i for i, name in enumerate(clean["id"].tolist())}
    at = np.array([position.get(name, -1) for name in seen["id"].tolist()])
    x = seen["input"].astype(np.float64)
    x[at >= 0] = clean["input"][at[at >= 0]]
    return x


def oracle_reading(known: Truth, x: np.ndarray) -> dict[str, np.ndarray]:
    """What an estimator says that knows the truth: its point is the mean, which need not be the median."""
    made = from_quantiles(np.stack([known.quantile(x, level) for level in LEVELS], axis=1))
    return {"point": known.mean(x), "median": made.point, "low": made.low, "high": made.high}


def number_terms(known: Truth, x: np.ndarray, y: np.ndarray, read: Mapping[str, np.ndarray]) -> Terms:
    """What `OF_NUMBERS` and `COVERAGES` at every nominal coverage are means of; infinite where intervals are."""
    point, low, high = (read[name].astype(np.float64) for name in ("point", "low", "high"))
    true = oracle_reading(known, x)
    mean, std = true["point"], truth.implied_std(true["low"], true["high"], NOMINAL)
    spread = truth.implied_std(low, high, NOMINAL)
    with np.errstate(divide="ignore", invalid="ignore"):  # a width of 0 or infinity: the rows say so
        found: Terms = {
            ("kl_normal", None): truth.normal_divergences(mean, std, point, spread),
            ("excess_nll", None): truth.gaussian_nll(y, point, spread) - truth.gaussian_nll(y, mean, std),
            ("mse_mean", None): (point - mean) ** 2,
            ("log_variance_error", None): truth.log_variance_errors(std, spread),
        }
    for i, nominal in enumerate(NOMINAL):
        found |= _coverage_terms(known.cdf(x, high[:, i]) - known.cdf(x, low[:, i]), nominal)
    return found


def _scores(read: Mapping[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """Uncertainties (N,), higher = less certain, as `measure_regression` names them."""
    i = NOMINAL.index(0.9)
    yield from ((part, read[part]) for part in PARTS if part in read)
    yield "width", read["high"][:, i] - read["low"][:, i]


def _number_ranks(place: Place, score: np.ndarray, known: Truth, x: np.ndarray, point: np.ndarray) -> None:
    place.row("noise_spearman", _spearman(score, known.aleatoric(x), "the noise is the same everywhere"))
    place.row("truth_error_spearman", ranking.error_spearman(score, point - known.mean(x)))
    epistemic = known.epistemic(x)
    if epistemic is not None:
        place.row("epistemic_spearman", ranking.error_spearman(score, epistemic))


def _spearman(score: np.ndarray, other: np.ndarray, why: str) -> Estimate:
    if other.min() == other.max():
        return Estimate.undefined(len(score), why)
    return ranking.error_spearman(score, other)


# For comparisons -----------------------------------------------------------------------------------------------------

OF_TRUTH = (*OF_CLASSES, *OF_NUMBERS, *COVERAGES)  # metrics that are means over samples


def known_truth(data: Mapping[str, Any]) -> ClassTruth | Truth | None:
    """The truth of the dataset that results are of, made again from its name; None where it is another one by now.

    Args:
        data: as in results.json.
    """
    from robustbench_ext.data import load_dataset
    from robustbench_ext.errors import RobustBenchExtError
    from robustbench_ext.named_data import names_code

    # The results may be somebody else's: their names load data, and run no code.
    name = str(data["name"])
    if names_code(name) or names_code(name.rpartition("@")[0]):
        return None
    try:
        found = load_dataset(name)
    except RobustBenchExtError:
        return None  # handed over in Python, say
    said = data["splits"]["test"]["fingerprint"]
    if found["test"].fingerprint() != said:
        return None
    return found.truth or found.class_truth
