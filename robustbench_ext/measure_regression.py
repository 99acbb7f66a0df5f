"""From a regression run's records to results: errors, intervals, quantiles and uncertainties, under every condition.

The rows of a nominal coverage have it as their group (`90 %`). Uncertainties are scores of their own, `ESTIMATOR · epistemic`,
`· aleatoric` and `· width` (of the 90 % interval): do they rank the errors of the estimator's point prediction, and do they
rise where a condition shifts the inputs?
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from robustbench_ext import measure_truth
from robustbench_ext.conditions import Condition
from robustbench_ext.evaluate import CLEAN, Context
from robustbench_ext.measured import Columns, Measured, Place, Tables, nominal_group, rounded
from robustbench_ext.metrics import (
    Estimate,
    conditional,
    coverage_curves,
    crps,
    quantiles,
    ranking,
    selective,
)
from robustbench_ext.metrics import detection as det
from robustbench_ext.metrics import regression as reg
from robustbench_ext.metrics.resampling import sample_mean
from robustbench_ext.results import Cost
from uq.regression import LEVELS, NOMINAL

REGRESSOR = "regressor"
PARTS = ("aleatoric", "epistemic")
SHOWN = 0.9  # the nominal coverage that stands for all where one has to
THIRDS = ("lowest", "middle", "highest")
PLOTTED = 300  # samples in a figure of intervals


def measure(context: Context, models: Sequence[str]) -> Measured:
    """All results of these models' complete records; conditions with missing records are left out."""
    tables, out = Tables(context), Measured.nothing()
    for model in models:
        if not tables.complete(model, CLEAN):
            continue
        for label, condition in context.conditions_of(model).items():
            if tables.complete(model, label):
                _condition(out, context, tables, model, condition)
    return out


def _condition(out: Measured, context: Context, tables: Tables, model: str, condition: Condition) -> None:
    label = condition.label
    seen, clean = tables.observations(model, label), tables.observations(model, CLEAN)
    place = Place(out, model, label, REGRESSOR)
    _errors(place, seen["label"], seen["prediction"])
    if label != CLEAN:
        place.row("error_rise", _rise(clean, seen), against=CLEAN)
    if condition.kind == "attack":
        passes = {name: int(seen[name].sum()) for name in ("forwards", "backwards")}
        out.cost.append(Cost(model=model, condition=label, n=len(seen["label"]), **passes))
    thirds = _thirds(clean["prediction"], seen["prediction"])
    for probe in context.probes_read(model):
        if probe.kind == "estimator":
            read = tables.probe(model, label, probe.label)
            here = Place(out, model, label, probe.label)
            _errors(here, seen["label"], read["point"])
            _intervals(here, seen, read)
            _where(here, context, seen, read, thirds)
            if "quantiles" in read:
                _quantiles(here, seen["label"], read)
            else:
                here.row("crps", Estimate.undefined(len(seen["label"]), "it gives no quantiles"))
            here.curve("intervals", _plotted(context, seen, read))
            _uncertainties(here, seen["label"], read, tables.probe(model, CLEAN, probe.label))
    measure_truth.regressor(out, context, tables, model, condition)


# Point predictions ---------------------------------------------------------------------------------------------------


def _errors(place: Place, y: np.ndarray, point: np.ndarray) -> None:
    place.row("rmse", reg.rmse(y, point))
    place.row("mae", reg.mae(y, point))
    place.row("r2", reg.r2(y, point))


def _rise(clean: Columns, seen: Columns) -> Estimate:
    """Mean of |error| here minus |error| clean, on the samples that both have."""
    position = {name: i for i, name in enumerate(clean["id"].tolist())}
    both = [(i, position[name]) for i, name in enumerate(seen["id"].tolist()) if name in position]
    if not both:
        return Estimate.undefined(0, "none of the samples is among the clean ones")
    here, there = np.array(both).T
    if np.array_equal(seen["input"][here], clean["input"][there]):
        return Estimate.undefined(len(both), "the condition chooses among the samples and changes none of them")
    after, before = (np.abs(c["label"] - c["prediction"]) for c in (seen, clean))
    return sample_mean(after[here] - before[there])


# Intervals -----------------------------------------------------------------------------------------------------------


def _intervals(place: Place, seen: Columns, read: Columns) -> None:
    """Coverage, width and score at every nominal level, and of all levels together."""
    y, low, high = seen["label"], read["low"], read["high"]
    for i, nominal in enumerate(NOMINAL):
        ends, group = (low[:, i], high[:, i]), nominal_group(nominal)
        place.row("coverage", reg.coverage(y, *ends), group=group)
        place.row("width", _finite(reg.width(*ends), *ends), group=group)
        place.row("interval_score", _finite(reg.interval_score(y, *ends, nominal), *ends), group=group)
    # Quantile methods say themselves what their median is; of the others the point prediction stands in its place.
    median = read["quantiles"][:, LEVELS.index(0.5)] if "quantiles" in read else read["point"]
    wis = quantiles.wis_from_intervals(y, median, low, high, NOMINAL)
    place.row("wis_mean", _finite(wis["wis_mean"], low, high))
    place.row("interval_ece", coverage_curves.interval_ece(y, low, high, NOMINAL))
    curve = coverage_curves.interval_curve(y, low, high, NOMINAL)
    place.curve("coverage", {n: rounded(getattr(curve, n)) for n in ("nominal", "observed", "low", "high")})


def _where(place: Place, context: Context, seen: Columns, read: Columns, thirds: np.ndarray) -> None:
    """Where the coverage of one nominal level is worst: on a side, for some predictions, for some widths, for some inputs;
    where it is known which inputs no model could have learnt of, there too.
    """
    y, (low, high), group = seen["label"], shown(read), nominal_group(SHOWN)
    for metric, estimate in reg.side_coverage(y, read["point"], low, high).items():
        place.row(metric, estimate, group=group)
    place.row("side_error", reg.side_error(y, read["point"], low, high, SHOWN), group=group)
    inside = reg.covered(y, low, high)
    names = np.array([f"{group}, {name} third of predictions" for name in THIRDS])[thirds]
    groupings = [names]
    if context.data.truth is not None:
        known = context.data.truth.inside(seen["input"].astype(np.float64))
        groupings.append(
            np.where(known, f"{group}, within the training inputs", f"{group}, beyond the training inputs")
        )
    for grouping in groupings:
        for name, estimate in conditional.coverage_by_group(inside, grouping).items():
            place.row("coverage", estimate, group=str(name))
    worst, where = conditional.worst_group_coverage(inside, names)
    place.row("worst_group_coverage", worst, group=str(where))
    worst, stratum = conditional.width_stratified_coverage(inside, low, high)
    place.row("width_stratified_coverage", worst, group=f"{group}, width group {stratum + 1} of {conditional.STRATA}")
    worst, _ = conditional.worst_slab_coverage(seen["input"], inside)
    place.row("worst_slab_coverage", worst, group=group)


def shown(read: Columns) -> tuple[np.ndarray, np.ndarray]:
    """Both ends (N,) of the intervals that stand for all where one level has to."""
    i = NOMINAL.index(SHOWN)
    return read["low"][:, i], read["high"][:, i]


def _finite(estimate: Estimate, *ends: np.ndarray) -> Estimate:
    """Undefined, with the reason, where intervals are infinite: a mean of those says nothing."""
    bad = [~np.isfinite(end).reshape(len(end), -1).all(axis=1) for end in ends]
    infinite, n = int(np.any(bad, axis=0).sum()), len(ends[0])
    return Estimate.undefined(n, f"{infinite} of {n} samples have infinite intervals") if infinite else estimate


def _thirds(reference: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """0, 1 or 2 (N,): the third of the clean predictions that each prediction falls into. Known before the outcome is."""
    return np.searchsorted(np.quantile(reference, [1 / 3, 2 / 3]), prediction, side="right")


def _plotted(context: Context, seen: Columns, read: Columns) -> dict[str, list[float]]:
    """Intervals of the first samples; against the input where it is one number, with the truth where it is known.

    Infinite ends are put far outside all else: JSON has no infinity.
    """
    some = slice(0, PLOTTED)
    y, point = seen["label"][some], read["point"][some]
    low, high = (end[some] for end in shown(read))
    both = np.concatenate([y, point])
    far = 10 * (float(np.ptp(both)) or 1.0)
    low, high = np.maximum(low, both.min() - far), np.minimum(high, both.max() + far)
    data = {"y": y, "point": point, "low": low, "high": high}
    x = seen["input"][some].astype(np.float64)
    if x.shape[1] == 1:
        data["x"] = x[:, 0]
        if context.data.truth is not None:
            data["truth_low"], data["truth_high"] = (
                context.data.truth.quantile(x, (1 + sign * SHOWN) / 2) for sign in (-1, 1)
            )
    return {name: rounded(values) for name, values in data.items()}


# Quantiles -----------------------------------------------------------------------------------------------------------


def _quantiles(place: Place, y: np.ndarray, read: Columns) -> None:
    """Pinball loss, CRPS and calibration of quantiles at `uq.regression.LEVELS`; how many had to be sorted."""
    q = read["quantiles"]
    if "crossed" in read:
        place.row("crossing_rate", quantiles.crossing_rate(read["crossed"], len(LEVELS) - 1))
    place.row("quantile_ece", coverage_curves.quantile_ece(y, q, LEVELS))
    infinite = int((~np.isfinite(q)).any(axis=1).sum())
    none = Estimate.undefined(len(y), f"{infinite} of {len(y)} samples have infinite quantiles")
    place.row("pinball", none if infinite else quantiles.pinball(y, q, LEVELS))
    place.row("crps", none if infinite else crps.crps_quantiles(y, q, LEVELS))


# Uncertainties -------------------------------------------------------------------------------------------------------


def _uncertainties(place: Place, y: np.ndarray, read: Columns, clean: Columns) -> None:
    """What the estimator's uncertainties say of its errors, and of the inputs being other than clean ones."""
    error, before = np.abs(y - read["point"]), _scores(clean)
    for part, score in _scores(read).items():
        here = Place(place.out, place.model, place.condition, f"{place.probe} · {part}")
        here.row("error_spearman", ranking.error_spearman(score, error))
        here.row("ause", selective.ause(score, error))
        if place.condition != CLEAN:
            here.row("auroc", det.auroc(before[part], score), against=CLEAN, n_unknown=len(score))


def _scores(read: Columns) -> dict[str, np.ndarray]:
    """Uncertainties (N,), higher = less certain."""
    low, high = shown(read)
    return {part: read[part] for part in PARTS if part in read} | {"width": high - low}
