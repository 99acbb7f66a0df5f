"""From records to rows of uncertainty: what each row is about, that it is the right number, what is left out and why."""

from types import SimpleNamespace

import numpy as np
import pytest
from scipy.special import ndtr, softmax

from robustbench_ext import measure_regression, measure_uncertainty
from robustbench_ext.data import Truth
from robustbench_ext.measure import measure
from robustbench_ext.measured import Measured, Tables
from robustbench_ext.metrics import METRICS
from uq.regression import LEVELS, NOMINAL, from_quantiles

Z = {0.5: 0.674489750196, 0.8: 1.281551565545, 0.9: 1.644853626951, 0.95: 1.959963984540}


BOTH = ("sharper", "classifier")


class Records:
    """Records in memory, in as much of the form of an evaluation context as measuring looks at.

    Args:
        observations: columns by condition; probes: columns by (condition, label).
    """

    thresholds = False
    metrics = ()
    suite = SimpleNamespace(shots=None, difficulty=None, relative=())
    scoring = None

    def __init__(self, observations, probes, conditions, data, specs):
        self._columns = {(c, None): columns for c, columns in observations.items()} | probes
        self.data, self.store, self.specs = data, self, specs
        self.conditions = {c.label: c for c in conditions}

    def probes_read(self, model):
        return [self.probe(label) for label in self.specs]

    def probe(self, label):
        return SimpleNamespace(label=label, name=label, kind="estimator", spec=lambda: self.specs[label])

    def conditions_of(self, model):
        return self.conditions

    conditions_for = conditions_of

    def chunks(self, condition, split):
        return 2  # records come in parts

    def samples(self, condition, split):
        return SimpleNamespace(ids=self._columns[condition.label, None]["id"])

    def is_done(self, cell):
        return (cell.condition, None) in self._columns

    def observation_key(self, cell):
        return cell.condition, None, cell.chunk

    def probe_key(self, cell, probe):
        return cell.condition, probe.label, cell.chunk

    def load(self, key, names=None):
        condition, label, chunk = key
        columns = self._columns[condition, label]
        return {name: np.array_split(columns[name], 2)[chunk] for name in names or columns}

    def preflight_key(self, model):
        return "preflight"

    def has(self, key):
        return False


def condition(label, kind, **facts):
    return SimpleNamespace(label=label, kind=kind, whole=False, facts=lambda: facts)


def one(found, **wanted):
    (row,) = [r for r in found.rows if all(getattr(r, k) == v for k, v in wanted.items())]
    return row


# Classification ------------------------------------------------------------------------------------------------------


def classified(n=400, k=3, seed=0):
    """A classifier, the same at half its temperature, its sets, and an uncertainty that knows mistakes and outliers."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(n, k)) * 2
    y = np.array([rng.choice(k, p=p) for p in softmax(logits, axis=1)])
    wrong = logits.argmax(axis=1) != y
    p = softmax(logits, axis=1)
    sets = p >= 0.15
    ids = np.array([f"s{i}" for i in range(n)])
    outliers = {"id": ids, "label": np.full(n, -1), "logits": logits}
    data = SimpleNamespace(task="classification", classes=("a", "b", "c")[:k], splits={}, class_truth=None)
    return Records(
        {"clean": {"id": ids, "label": y, "logits": logits}, "outliers far": outliers},
        {
            ("clean", "sharper"): {"logits": 2 * logits},
            ("clean", "sets"): {"logits": logits, "sets": sets},
            ("clean", "seer"): {"logits": logits[:, ::-1], "aleatoric": np.zeros(n), "epistemic": 1.0 * wrong[::-1]},
            ("outliers far", "sharper"): {"logits": 2 * logits},
            ("outliers far", "sets"): {"logits": logits, "sets": sets},
            ("outliers far", "seer"): {"logits": logits, "aleatoric": np.zeros(n), "epistemic": np.full(n, 2.0)},
        },
        [condition("clean", "clean"), condition("outliers far", "outliers", outliers="far")],
        data,
        {"sharper": {}, "sets": {"alpha": 0.1}, "seer": {}},
    )


@pytest.fixture(scope="module")
def measured_classifier():
    records = classified()
    return records, measure(records, ["net"])


class TestClassifier:
    def test_every_row_is_a_known_metric_and_is_there_once(self, measured_classifier):
        _, found = measured_classifier
        assert {row.metric for row in found.rows} <= set(METRICS)
        keys = [(r.condition, r.probe, r.metric, r.group, r.against) for r in found.rows]
        assert len(keys) == len(set(keys))

    def test_estimators_stand_beside_the_classifier(self, measured_classifier):
        _, found = measured_classifier

        def metrics(probe):
            return {r.metric for r in found.rows if r.probe == probe and r.condition == "clean" and r.group is None}

        compared = {"ece", "nll", "brier", "ece_equal_mass", "rmsce_debiased", "classwise_ece", "brier_reliability"}
        compared |= {"aurc", "e_aurc", "error_auroc", "accuracy"}
        assert compared <= metrics("classifier") & metrics("sharper")
        # A temperature changes no prediction, and makes an honest classifier worse.
        accuracy = [one(found, probe=p, condition="clean", metric="accuracy", group=None).value for p in BOTH]
        assert accuracy[0] == accuracy[1]
        sharper, base = (one(found, probe=p, condition="clean", metric="nll").value for p in BOTH)
        assert sharper > base

    def test_brier_parts_add_up_in_the_rows(self, measured_classifier):
        _, found = measured_classifier
        for probe in ("classifier", "sharper"):
            parts = [m for m in METRICS if m.startswith("brier") and not m.endswith("_by_difficulty")]
            value = {m: one(found, probe=probe, condition="clean", metric=m).value for m in parts}
            total = (
                value["brier_reliability"]
                - value["brier_resolution"]
                + value["brier_uncertainty"]
                + value["brier_within"]
            )
            assert value["brier"] == pytest.approx(total, abs=1e-12)

    def test_an_estimator_that_only_adds_sets_has_rows_of_sets_alone(self, measured_classifier):
        records, found = measured_classifier
        rows = {r.metric: r for r in found.rows if r.probe == "sets"}
        assert all(metric.startswith("set_") for metric in rows)
        columns = records._columns["clean", "sets"]
        y, sets = records._columns["clean", None]["label"], columns["sets"]
        inside = sets[np.arange(len(y)), y]
        assert rows["set_coverage"].value == pytest.approx(inside.mean())
        assert rows["set_coverage"].group == "90 %"
        assert rows["set_size"].value == pytest.approx(sets.sum(axis=1).mean())
        by_class = {name: inside[y == k].mean() for k, name in enumerate("abc")}
        assert rows["set_class_coverage"].group == min(by_class, key=by_class.get)
        assert rows["set_class_coverage"].value == pytest.approx(min(by_class.values()))
        assert not [c for c in found.curves if c.probe == "sets"]

    def test_errors_are_those_of_the_estimators_own_prediction(self, measured_classifier):
        records, found = measured_classifier
        y, read = records._columns["clean", None]["label"], records._columns["clean", "seer"]
        right = read["logits"].argmax(axis=1) == y
        assert one(found, probe="seer", condition="clean", metric="accuracy").value == pytest.approx(right.mean())
        score = read["epistemic"]
        above = (score[~right][:, None] > score[right]).mean() + (score[~right][:, None] == score[right]).mean() / 2
        assert one(found, probe="seer · epistemic", condition="clean", metric="error_auroc").value == pytest.approx(
            above
        )

    def test_uncertainties_are_scores_that_tell_inputs_apart(self, measured_classifier):
        _, found = measured_classifier
        there = {"condition": "outliers far", "metric": "auroc", "against": "clean"}
        assert one(found, probe="seer · epistemic", **there).value == 1.0
        assert one(found, probe="seer · aleatoric", **there).value == 0.5
        # The same logits as clean: the classifier's own confidence sees nothing, and is what the gain is counted from.
        assert one(found, probe=measure_uncertainty.BASELINE, **there).value == 0.5
        gain = one(found, probe="seer · epistemic", condition="outliers far", metric="auroc_gain")
        assert (gain.value, gain.against) == (0.5, measure_uncertainty.BASELINE)
        assert not [r for r in found.rows if r.probe == "sharper" and r.condition == "outliers far"]

    def test_curves_are_whole(self, measured_classifier):
        _, found = measured_classifier
        kinds = {(c.kind, c.probe) for c in found.curves if c.condition == "clean"}
        assert {
            ("reliability", "sharper"),
            ("risk-coverage", "classifier"),
            ("risk-coverage", "seer · epistemic"),
        } <= kinds
        for curve in found.curves:
            assert len({len(values) for values in curve.data.values()}) == 1
        reliability = next(c for c in found.curves if c.kind == "reliability").data
        low, high, mean = (np.array(reliability[n]) for n in ("calibrated_low", "calibrated_high", "confidence"))
        assert (low <= mean + 1e-6).all() and (mean <= high + 1e-6).all()

    def test_without_estimators_nothing_is_added(self):
        records = classified()
        records.specs = {}
        found = measure(records, ["net"])
        metrics = {r.metric for r in found.rows}
        assert not metrics & {"ece_equal_mass", "aurc", "error_auroc", "set_coverage", "auroc"}
        assert {"ece", "nll", "brier"} <= metrics

    def test_no_mistakes_is_undefined_with_its_reason(self):
        records = classified()
        seen = records._columns["clean", None]
        seen["label"] = seen["logits"].argmax(axis=1)
        found = Measured.nothing()
        measure_uncertainty.estimators(found, records, Tables(records), "net", "clean")
        row = one(found, probe="classifier", metric="error_auroc")
        assert row.value is None and "correct" in row.reason

    def test_lack_of_confidence_keeps_its_order_where_probabilities_round_to_one(self):
        logits = np.array([[50.0, 0.0], [60.0, 0.0], [0.1, 0.0]])
        assert measure_uncertainty.lack_of_confidence(logits) == pytest.approx([-50.0, -60.0, -0.1])
        assert 1 - softmax(logits, axis=1).max(axis=1)[0] == 0.0  # what it is for


# Regression ----------------------------------------------------------------------------------------------------------


class _Normal(Truth):
    def mean(self, x):
        return np.zeros(len(x))

    def std(self, x):
        return np.ones(len(x))

    def quantile(self, x, level):
        return np.full(len(x), Z.get(round(abs(2 * level - 1), 6), 0.0) * np.sign(level - 0.5))

    def cdf(self, x, y):
        return ndtr(y)

    def inside(self, x):
        return np.abs(x[:, 0]) < 1


def regressed(n=500, seed=0, infinite=0):
    """y ~ N(0, s^2), s = 1 or 3 by the sign of x, predicted as 0: an estimator that knows s, and one of constant width."""
    rng = np.random.default_rng(seed)
    x = rng.uniform(-2, 2, size=(n, 1)).astype(np.float32)
    scale = np.where(x[:, 0] > 0, 3.0, 1.0)
    y = scale * rng.normal(size=n)
    ids = np.array([f"s{i}" for i in range(n)])
    quantiles = np.stack([scale * (Z.get(round(abs(2 * t - 1), 6), 0.0) * np.sign(t - 0.5)) for t in LEVELS], axis=1)
    knows = vars(from_quantiles(quantiles, aleatoric=scale))
    knows = {name: values for name, values in knows.items() if values is not None}
    half = np.array([2 * Z[c] for c in NOMINAL])
    constant = {"point": np.zeros(n), "low": np.tile(-half, (n, 1)), "high": np.tile(half, (n, 1))}
    constant["high"][:infinite, -1] = np.inf
    clean = {"id": ids, "label": y, "prediction": np.zeros(n), "input": x}
    moved = {**clean, "prediction": np.full(n, 5.0), "input": x + 1}
    order = rng.permutation(n)[: n // 2]
    chosen = {name: values[order] for name, values in clean.items()}
    counts = {"forwards": np.full(n, 7), "backwards": np.full(n, 6)}
    conditions = [condition("clean", "clean"), condition("noise 1", "shift"), condition("chosen", "shift")]
    conditions.append(condition("pgd 0.3", "attack"))
    probes = {}
    for name in ("clean", "noise 1", "pgd 0.3"):
        factor = 1.0 if name == "clean" else 10.0
        probes[name, "knows"] = {**knows, "aleatoric": factor * knows["aleatoric"]}
        probes[name, "constant"] = constant
    for label in ("knows", "constant"):
        probes["chosen", label] = {name: values[order] for name, values in probes["clean", label].items()}
    data = SimpleNamespace(task="regression", classes=(), truth=_Normal())
    observations = {"clean": clean, "noise 1": moved, "chosen": chosen, "pgd 0.3": {**moved, **counts}}
    return Records(observations, probes, conditions, data, {"knows": {}, "constant": {}})


@pytest.fixture(scope="module")
def measured_regressor():
    records = regressed()
    return records, measure(records, ["net"])


class TestRegressor:
    def test_every_row_is_a_known_metric_and_is_there_once(self, measured_regressor):
        _, found = measured_regressor
        assert {row.metric for row in found.rows} <= set(METRICS)
        keys = [(r.condition, r.probe, r.metric, r.group) for r in found.rows]
        assert len(keys) == len(set(keys))

    def test_errors_before_and_after(self, measured_regressor):
        records, found = measured_regressor
        y = records._columns["clean", None]["label"]
        here = {"probe": measure_regression.REGRESSOR}
        assert one(found, condition="clean", metric="rmse", **here).value == pytest.approx(np.sqrt((y**2).mean()))
        attacked = one(found, condition="pgd 0.3", metric="rmse", **here).value
        assert attacked == pytest.approx(np.sqrt(((y - 5) ** 2).mean()))
        rise = one(found, condition="pgd 0.3", metric="error_rise", **here)
        assert rise.value == pytest.approx((np.abs(y - 5) - np.abs(y)).mean())
        (cost,) = found.cost
        assert (cost.condition, cost.forwards, cost.backwards) == ("pgd 0.3", 7 * len(y), 6 * len(y))

    def test_the_rise_is_paired_by_id(self, measured_regressor):
        records, _ = measured_regressor
        clean, moved = records._columns["clean", None], records._columns["noise 1", None]
        order = np.random.default_rng(1).permutation(len(clean["id"]))[:100]
        some = {name: values[order] for name, values in moved.items()}
        y = clean["label"][order]
        found = measure_regression._rise(clean, some)
        assert found.value == pytest.approx((np.abs(y - 5) - np.abs(y)).mean())
        strangers = {**some, "id": np.array([f"other{i}" for i in range(100)])}
        assert "none of the samples" in measure_regression._rise(clean, strangers).reason

    def test_a_choice_among_the_samples_has_no_rise(self, measured_regressor):
        _, found = measured_regressor
        row = one(found, condition="chosen", metric="error_rise")
        assert row.value is None and "changes none" in row.reason

    @pytest.mark.parametrize("nominal", NOMINAL)
    def test_coverage_width_and_score_at_every_level(self, measured_regressor, nominal):
        records, found = measured_regressor
        y, read = records._columns["clean", None]["label"], records._columns["clean", "knows"]
        i = NOMINAL.index(nominal)
        low, high = read["low"][:, i], read["high"][:, i]
        inside = (low <= y) & (y <= high)
        query = {"condition": "clean", "probe": "knows", "group": f"{100 * nominal:g} %"}
        row = one(found, metric="coverage", **query)
        assert row.value == pytest.approx(inside.mean())
        # Wilson's 95 % interval of 500 samples holds the truth unless the draw is unlucky; these are not.
        assert row.ci_low <= nominal <= row.ci_high
        assert one(found, metric="width", **query).value == pytest.approx((high - low).mean())
        missed = np.maximum(low - y, 0) + np.maximum(y - high, 0)
        expected = ((high - low) + 2 / (1 - nominal) * missed).mean()
        assert one(found, metric="interval_score", **query).value == pytest.approx(expected)

    def test_scores_of_all_levels_agree_with_the_quantiles(self, measured_regressor):
        records, found = measured_regressor
        y, q = records._columns["clean", None]["label"], records._columns["clean", "knows"]["quantiles"]
        off = y[:, None] - q
        pinball = np.maximum(np.array(LEVELS) * off, (np.array(LEVELS) - 1) * off).mean()
        here = {"condition": "clean", "probe": "knows"}
        assert one(found, metric="pinball", **here).value == pytest.approx(pinball)
        assert one(found, metric="wis_mean", **here).value == pytest.approx(2 * pinball)
        assert one(found, metric="crossing_rate", **here).value == 0.0
        assert one(found, metric="crps", **here).value > 0
        none = one(found, condition="clean", probe="constant", metric="crps")
        assert none.value is None and "no quantiles" in none.reason

    def test_knowing_the_noise_is_worth_something(self, measured_regressor):
        _, found = measured_regressor
        clean = {"condition": "clean"}
        assert (
            one(found, probe="knows", metric="wis_mean", **clean).value
            < one(found, probe="constant", metric="wis_mean", **clean).value
        )
        # |error| of two scales that differ threefold: their rank correlation with the scale is about 0.5 (0.04 its error).
        assert one(found, probe="knows · aleatoric", metric="error_spearman", **clean).value > 0.3
        constant = one(found, probe="constant · width", metric="error_spearman", **clean)
        assert constant.value is None and "equal" in constant.reason
        assert one(found, probe="knows · aleatoric", metric="auroc", condition="noise 1").value == 1.0
        assert one(found, probe="constant · width", metric="auroc", condition="noise 1").value == 0.5

    def test_where_coverage_is_worst(self, measured_regressor):
        _, found = measured_regressor
        slab = one(found, condition="clean", probe="constant", metric="worst_slab_coverage")
        # Of +-3.3 for N(0, 3^2): 73 %; for N(0, 1): 99.9 %. A slab of the half x > 0 is found, and measured on others.
        assert (
            slab.value < 0.85 < one(found, condition="clean", probe="knows", metric="worst_slab_coverage").value + 0.05
        )
        groups = {
            r.group for r in found.rows if r.condition == "clean" and r.probe == "knows" and r.metric == "coverage"
        }
        assert {"90 %, within the training inputs", "90 %, beyond the training inputs"} <= groups

    def test_groups_of_predictions_are_those_of_clean_predictions(self):
        reference = np.arange(9.0)
        assert measure_regression._thirds(reference, np.array([-5.0, 4.0, 100.0])).tolist() == [0, 1, 2]
        assert np.bincount(measure_regression._thirds(reference, reference)).tolist() == [3, 3, 3]

    def test_infinite_intervals_are_undefined_where_a_mean_says_nothing(self):
        found = measure(regressed(infinite=3), ["net"])
        here = {"condition": "clean", "probe": "constant"}
        for metric in ("width", "interval_score"):
            row = one(found, metric=metric, group="95 %", **here)
            assert row.value is None and "3 of 500" in row.reason
            assert one(found, metric=metric, group="90 %", **here).value is not None
        assert one(found, metric="wis_mean", **here).value is None
        assert one(found, metric="coverage", group="95 %", **here).value is not None
        for curve in found.curves:
            assert all(np.isfinite(values).all() for values in curve.data.values())

    def test_curves_hold_what_figures_need(self, measured_regressor):
        _, found = measured_regressor
        coverage = next(c for c in found.curves if c.kind == "coverage" and c.probe == "knows").data
        assert coverage["nominal"] == list(NOMINAL)
        low, observed, high = (np.array(coverage[n]) for n in ("low", "observed", "high"))
        assert (low < observed).all() and (observed < high).all()
        drawn = next(c for c in found.curves if c.kind == "intervals" and c.probe == "knows").data
        assert set(drawn) == {"x", "y", "point", "low", "high", "truth_low", "truth_high"}
        assert {len(v) for v in drawn.values()} == {measure_regression.PLOTTED}
        assert drawn["truth_high"][0] == pytest.approx(Z[0.9], abs=1e-5)

    def test_conditions_with_missing_records_are_left_out(self):
        records = regressed()
        del records._columns["noise 1", None]
        found = measure(records, ["net"])
        assert {r.condition for r in found.rows} == {"clean", "chosen", "pgd 0.3"}
