"""From records to rows against the truth, the same sample by sample, and runs of several suites that end in one answer."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from robustbench_ext import measure_truth, per_sample
from robustbench_ext.compare import Run
from robustbench_ext.data import load_dataset
from robustbench_ext.engine import run_suite
from robustbench_ext.errors import ConfigError
from robustbench_ext.metrics import METRICS
from robustbench_ext.parts import JointResults, Parts, read_parts, run_parts
from robustbench_ext.probes import ORACLE
from robustbench_ext.suite import bundled_parts, load_suite
from robustbench_ext.trust import (
    AVERAGE,
    EACH,
    LAW,
    NOISE,
    SHIFTED,
    Versus,
    _rules,
    judge,
)

TINY = "n=60,calibration=40,test=60"
OUTCOMES = {
    "schema": 1,
    "name": "tiny",
    "data": f"outcomes:linear#side=8,{TINY}",
    "models": [{"name": "net", "spec": "small-cnn", "kwargs": {"width": 2}}],
    "conditions": [
        {"corruption": "gaussian-noise", "severity": [5]},
        {"attack": "pgd", "eps": 0.1, "steps": 2, "stop": "never"},
        {"outliers": ["uniform-noise"], "n": 20},
    ],
    "uq": ["temperature", "lac"],
}
NUMBERS = {
    "schema": 1,
    "name": "tiny",
    "data": f"bayes-linear:known-noise#d=3,{TINY}",
    "models": [
        {"name": "ridge", "train": {"network": "sklearn:linear_model.Ridge", "kwargs": {"fit_intercept": False}}}
    ],
    "conditions": [{"shift": "feature-noise", "size": [1.0]}, {"shift": "covariate-shift", "strength": [2]}],
    "uq": ["split-conformal", "bayes-linear"],
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Both tiny suites as a run of two parts: the folder, and what it said."""
    folder = tmp_path_factory.mktemp("parts")
    both = {"name": "both", "parts": [{"name": "classes", "suite": OUTCOMES}, {"name": "numbers", "suite": NUMBERS}]}
    return folder, both, run_parts(both, folder)


@pytest.fixture(scope="module")
def classes(finished):
    return Run.read(finished[0] / "classes")


@pytest.fixture(scope="module")
def numbers(finished):
    return Run.read(finished[0] / "numbers")


def one(run, **wanted):
    (row,) = run.results.find(**wanted)
    return row


class TestClasses:
    def test_probabilities_are_held_against_those_that_labels_were_drawn_with(self, classes):
        data = load_dataset(OUTCOMES["data"])
        seen = classes.records.observations("net", "clean")
        p = data.class_truth.probabilities(seen["id"])[:, 1]
        q = 1 / (1 + np.exp(np.diff(seen["logits"].astype(np.float64), axis=1)[:, 0] * -1))
        assert one(classes, condition="clean", probe="classifier", metric="mse_p").value == pytest.approx(
            ((p - q) ** 2).mean()
        )
        assert one(classes, condition="clean", probe="temperature", metric="kl_p").value >= 0

    def test_the_oracle_is_at_no_distance_and_the_same_under_every_condition(self, classes):
        for condition in ("clean", "gaussian-noise 5", "pgd Linf 0.1"):
            about = {"condition": condition, "probe": ORACLE}
            for metric in ("mse_p", "kl_p", "excess_nll"):
                assert one(classes, **about, metric=metric).value == pytest.approx(0, abs=1e-12)
            clean = one(classes, condition="clean", probe=ORACLE, metric="brier")
            assert one(classes, **about, metric="brier").value == clean.value

    def test_under_corruption_the_truth_stays_and_the_prediction_moves(self, classes):
        p = load_dataset(OUTCOMES["data"]).class_truth.probabilities(load_dataset(OUTCOMES["data"])["test"].ids)
        seen = classes.records.observations("net", "gaussian-noise 5")
        found = one(classes, condition="gaussian-noise 5", probe="classifier", metric="kl_p").value
        terms = measure_truth.class_terms(p, seen["logits"], seen["label"])
        assert found == pytest.approx(terms["kl_p", None].mean())
        assert found != one(classes, condition="clean", probe="classifier", metric="kl_p").value

    def test_unknown_inputs_have_no_truth(self, classes):
        assert not classes.results.find(condition="uniform-noise", metric="mse_p")

    def test_sets_are_read_for_their_true_coverage_alone(self, classes):
        about = {"condition": "clean", "probe": "lac"}
        assert not classes.results.find(**about, metric="mse_p")
        sets = classes.records.probe("net", "clean", "lac")["sets"]
        seen = classes.records.observations("net", "clean")
        p = load_dataset(OUTCOMES["data"]).class_truth.probabilities(seen["id"])
        held = (p * sets).sum(axis=1)
        assert one(classes, **about, metric="true_coverage", group="90 %").value == pytest.approx(held.mean())
        shortfall = one(classes, **about, metric="coverage_shortfall", group="90 %").value
        assert shortfall == pytest.approx(np.maximum(0.9 - held, 0).mean())

    def test_a_model_of_more_classes_has_no_rows_against_the_truth(self):
        data = load_dataset(OUTCOMES["data"])
        ids = data["test"].ids[:4]
        seen = {"id": ids, "label": data["test"].labels[:4], "logits": np.zeros((4, 3))}
        tables = SimpleNamespace(observations=lambda model, label: seen)
        out = SimpleNamespace(rows=[])
        condition = SimpleNamespace(label="clean", kind="clean")
        measure_truth.classifier(out, SimpleNamespace(data=data), tables, "net", condition)
        assert out.rows == []

    def test_audits_are_left_out(self):
        data = load_dataset(OUTCOMES["data"])
        tables = SimpleNamespace(observations=lambda model, label: {"audit": np.zeros(4), "id": data["test"].ids[:4]})
        out = SimpleNamespace(rows=[])
        condition = SimpleNamespace(label="audited", kind="attack")
        measure_truth.classifier(out, SimpleNamespace(data=data), tables, "net", condition)
        assert out.rows == []


class TestNumbers:
    def test_the_exact_posterior_is_the_oracle(self, numbers):
        for metric in ("kl_normal", "mse_mean", "log_variance_error", "excess_nll"):
            assert one(numbers, condition="clean", probe="bayes-linear", metric=metric).value == pytest.approx(
                0, abs=1e-9
            )
        for nominal in ("50 %", "90 %"):
            about = {"condition": "clean", "probe": "bayes-linear", "group": nominal}
            assert one(numbers, **about, metric="true_coverage").value == pytest.approx(float(nominal[:2]) / 100)
            assert one(numbers, **about, metric="coverage_gap").value == pytest.approx(0, abs=1e-9)
        assert one(numbers, condition="clean", probe="bayes-linear · epistemic", metric="epistemic_spearman").value == (
            pytest.approx(1)
        )
        assert (
            "the same everywhere"
            in one(numbers, condition="clean", probe="bayes-linear · epistemic", metric="noise_spearman").reason
        )

    def test_ridge_has_the_posterior_mean(self, numbers):
        # alpha = s^2 / tau^2 = 1, and no intercept; inputs are float32.
        assert one(numbers, condition="clean", probe="regressor", metric="mse_mean").value < 1e-9

    def test_under_noise_the_truth_is_that_of_the_inputs_as_they_were(self, numbers):
        seen = numbers.records.observations("ridge", "feature-noise 1")
        clean = numbers.records.observations("ridge", "clean")
        known = load_dataset(NUMBERS["data"]).truth
        error = (seen["prediction"] - known.mean(clean["input"].astype(np.float64))) ** 2
        found = one(numbers, condition="feature-noise 1", probe="regressor", metric="mse_mean").value
        assert found == pytest.approx(error.mean())
        assert found > 0.1  # noise of one standard deviation on every column

    def test_samples_that_a_condition_chose_are_what_they_were(self, numbers):
        assert one(numbers, condition="covariate-shift 2", probe="regressor", metric="mse_mean").value < 1e-9
        chosen = {"id": np.array(["b", "z"]), "input": np.array([[5.0], [7.0]], dtype=np.float32)}
        clean = {"id": np.array(["a", "b"]), "input": np.array([[1.0], [2.0]], dtype=np.float32)}
        assert measure_truth.as_they_were(clean, chosen).tolist() == [[2.0], [7.0]]

    def test_infinite_intervals_are_undefined_and_cover(self):
        known = load_dataset(NUMBERS["data"]).truth
        x, y = np.zeros((3, 3)), np.zeros(3)
        read = {"point": y, "low": np.full((3, 4), -np.inf), "high": np.full((3, 4), np.inf)}
        terms = measure_truth.number_terms(known, x, y, read)
        assert (terms["true_coverage", "90 %"] == 1).all()
        found = measure_truth.mean_of(terms["kl_normal", None])
        assert np.isnan(found.value) and "not finite for 3 of 3" in found.reason


class TestSampleBySample:
    def test_every_row_that_is_a_mean_has_its_terms(self, classes, numbers):
        seen = 0
        for run in (classes, numbers):
            model = run.results.models[0]["name"]
            for row in run.results.results:
                if row.metric in measure_truth.OF_TRUTH and row.probe != ORACLE:
                    place = (model, row.condition, row.probe, row.metric, row.group)
                    found = per_sample.statistic(run.records, run.results, *place)
                    assert found is not None and found.values.mean() == pytest.approx(row.value, abs=1e-12), place
                    seen += 1
        assert seen > 60

    def test_other_data_by_the_same_name_is_no_truth(self, classes):
        said = json.loads(json.dumps(classes.results.data))
        assert measure_truth.known_truth(said) is not None
        said["splits"]["test"]["fingerprint"] = "other"
        assert measure_truth.known_truth(said) is None
        assert measure_truth.known_truth({**said, "name": "given"}) is None

    def test_rows_are_known_metrics_and_there_once(self, classes, numbers):
        for run in (classes, numbers):
            keys = [(r.model, r.condition, r.probe, r.metric, r.group, r.against) for r in run.results.results]
            assert len(keys) == len({*keys})
            assert {r.metric for r in run.results.results} <= set(METRICS)


class TestParts:
    def test_every_part_is_a_run_like_any_other_and_is_resumed(self, finished):
        folder, both, summary = finished
        assert not summary.failures and list(summary.parts) == ["classes", "numbers"]
        before = {file: file.read_bytes() for file in (folder / "parts.json", folder / "results.csv")}
        again = run_parts(both, folder)
        assert sum(part.computed + part.trained for part in again.parts.values()) == 0
        assert all(file.read_bytes() == content for file, content in before.items())
        assert JointResults.read(folder) == again.results
        alone = run_suite(OUTCOMES, folder / "classes")
        assert alone.computed == 0

    def test_one_table_has_every_estimator(self, finished):
        trust = {(one.model, one.probe): one for one in finished[2].results.trust}
        assert set(trust) == {
            ("net", "classifier"),
            ("net", "temperature"),
            ("net", "lac"),
            ("ridge", "split-conformal"),
            ("ridge", "bayes-linear"),
        }
        exact = trust["ridge", "bayes-linear"]
        assert AVERAGE in exact.good and EACH in exact.good and exact.kl.high == pytest.approx(0, abs=1e-9)
        assert SHIFTED in exact.bad  # noise of one standard deviation, of which it is not told
        assert trust["net", "temperature"].versus.n == 1 and trust["net", "temperature"].versus_shifted.n == 2
        questions = [answer.question for answer in finished[2].results.answers]
        assert "Is the target in the interval as often as was promised?" in questions
        assert len(questions) == len({(a.task, a.question) for a in finished[2].results.answers})

    def test_a_part_whose_test_inputs_are_elsewhere_counts_as_shifted(self, numbers):
        def of(found):
            return next(one for one in found[0] if one.probe == "split-conformal")

        plain, moved = of(judge([numbers])), of(judge([numbers], {numbers.name}))
        assert plain.coverage.n == 1 and plain.coverage_shifted.n == 2
        assert moved.coverage is None and moved.coverage_shifted.n == 3

    def test_reports(self, finished):
        from reports import write_reports
        from reports.parts import write_joint_report

        folder, _, _ = finished
        text = write_joint_report(folder)["markdown"].read_text(encoding="utf-8")
        assert "ridge · bayes-linear" in text and "**Which values are how likely?**" in text
        page = (folder / "report.html").read_text(encoding="utf-8")
        assert 'href="numbers/report.html"' in page
        single = write_reports(folder / "numbers")
        assert "Against the truth" in single["html"].read_text(encoding="utf-8")
        assert "## Distance from the truth" in single["markdown"].read_text(encoding="utf-8")

    def test_a_part_that_cannot_be_run_leaves_the_others(self, tmp_path):
        lost = {**NUMBERS, "data": "npz:" + str(tmp_path / "lost.npz")}
        summary = run_parts(
            {"name": "p", "parts": [{"name": "lost", "suite": lost}, {"name": "there", "suite": NUMBERS}]}, tmp_path
        )
        assert [f.what for f in summary.failures] == ["part lost"] and list(summary.parts) == ["there"]

    def test_settings_reach_every_part_and_its_own_come_first(self):
        parts = Parts.model_validate(
            {"name": "p", "parts": [{"name": "a", "suite": NUMBERS, "set": {"n": 7, "seed": 3}}]}
        )
        suite = parts.parts[0].load(["n=9"])
        assert (suite.n, suite.seed) == (9, 3)

    @pytest.mark.parametrize(
        ("parts", "message"),
        [
            ([], "at least 1 item"),
            ([{"name": "a", "suite": "x"}, {"name": "A", "suite": "x"}], "must differ"),
            ([{"name": "../a", "suite": "x"}], "parts.0.name"),
            ([{"name": "a", "suit": "x"}], "parts.0"),
        ],
    )
    def test_a_wrong_file_is_told(self, parts, message):
        with pytest.raises(ConfigError, match=message):
            read_parts({"name": "p", "parts": parts})

    def test_what_is_no_run_in_parts_is_left_to_others(self):
        assert read_parts("quickstart") is None and read_parts(OUTCOMES) is None

    @pytest.mark.parametrize("name", bundled_parts())
    def test_bundled_ones_name_suites_and_data_that_exist(self, name):
        parts = read_parts(name)
        assert parts.name == name and parts.description
        for part in parts.parts:
            suite = part.load()
            assert load_dataset(suite.data).name == part.data
        with pytest.raises(ConfigError, match=f"rbx run {name}"):
            load_suite(name)

    def test_models_and_data_belong_to_a_single_suite(self, tmp_path):
        from typer.testing import CliRunner

        from robustbench_ext.cli.main import app

        found = CliRunner().invoke(app, ["run", "oracle", "--data", "digits", "--out", str(tmp_path)])
        assert isinstance(found.exception, ConfigError) and "belong to one suite" in str(found.exception)


class TestRules:
    def row(self, low, high):
        return SimpleNamespace(value=(low + high) / 2, ci_low=low, ci_high=high)

    def judged(
        self, task="regression", versus=None, coverage=((0.9, 0.9),), shifted=(), gaps=((0.01, 0.02),), noise=()
    ):
        rows = {False: [self.row(*c) for c in coverage], True: [self.row(*c) for c in shifted]}
        gap, rank = [self.row(*g) for g in gaps], [self.row(*r) for r in noise]
        return _rules(task, {False: versus, True: None}, "90 %", rows, gap, rank, [], [])

    def test_the_law(self):
        def of(closer, farther):
            return self.judged(versus=Versus(against="x", closer=closer, farther=farther, n=5))

        assert LAW in of(1, 0)[0] and LAW in of(0, 1)[1]
        assert not any(LAW in side for side in (*of(0, 0), *of(2, 2), *of(2, 1)))

    def test_coverage_has_to_be_right_in_every_part(self):
        assert AVERAGE in self.judged(coverage=((0.87, 0.89), (0.91, 0.93)))[0]
        assert AVERAGE in self.judged(coverage=((0.9, 0.9), (0.8, 0.87)))[1]
        assert AVERAGE in self.judged(coverage=((0.93, 0.95),))[1]
        assert AVERAGE in self.judged("classification", coverage=((0.93, 0.95),))[0]  # sets of few classes

    def test_chance_decides_nothing(self):
        assert EACH in self.judged(gaps=((0.03, 0.05),))[0] and EACH in self.judged(gaps=((0.051, 0.06),))[1]
        assert not any(EACH in side for side in self.judged(gaps=((0.04, 0.06),)))
        assert NOISE in self.judged(noise=((0.7, 0.9), (0.8, 0.9)))[0] and NOISE in self.judged(noise=((0.1, 0.69),))[1]
        assert not any(NOISE in side for side in self.judged(noise=((0.6, 0.8),)))

    def test_under_shift_one_broken_promise_is_enough(self):
        assert SHIFTED in self.judged(shifted=((0.95, 0.97), (0.86, 0.88)))[0]
        assert SHIFTED in self.judged(shifted=((0.95, 0.97), (0.86, 0.87)))[1]
