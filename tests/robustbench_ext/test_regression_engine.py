"""Suites of regressors: conditions of tables, estimators of intervals, keys, refusals, preflight."""

import shutil

import numpy as np
import pytest
import torch
from torch import nn

from robustbench_ext.attacks.regression import RegressionPGD, TableBudget
from robustbench_ext.data import load_dataset
from robustbench_ext.data.columns import Columns
from robustbench_ext.data.shift import covariate_shift, feature_noise
from robustbench_ext.engine import run_suite
from robustbench_ext.errors import ConfigError, ModelError
from robustbench_ext.evaluate import Cell, Context
from robustbench_ext.plan import plan
from robustbench_ext.preflight import refused
from robustbench_ext.randomness import SampleRandom
from robustbench_ext.regression_preflight import has_gradient, preflight_regressor
from robustbench_ext.suite import validate_suite
from uq.mc_dropout import MCDropoutRegressor
from uq.regression import LEVELS, NOMINAL, Samples
from uq.split_conformal import SplitConformal

FOREST = "sklearn:ensemble.RandomForestRegressor"


def suite_of():
    def network(name, seed, **more):
        train = {"seed": seed, "kwargs": {"hidden": [16], "dropout": 0.1}, "recipe": {"epochs": 15}}
        return {"name": name, "train": train, **more}

    return {
        "schema": 1,
        "name": "tables",
        "data": "diabetes",
        "n": 60,
        "chunk_size": 50,
        "models": [
            network("mlp", 0),
            network("other", 1, evaluate=False),
            {"name": "forest", "train": {"network": FOREST, "kwargs": {"n_estimators": 8}}},
        ],
        "conditions": [
            {"shift": "feature-noise", "size": [0.3, 1]},
            {"shift": "missing-features", "fraction": 0.3},
            {"shift": "covariate-shift", "strength": 2, "along": "bmi"},
            {"attack": "pgd", "eps": [0.1, 0.3], "steps": 4, "only": "mlp"},
            {"attack": "random-search", "eps": 0.3, "queries": 10},
        ],
        "uq": [
            "split-conformal",
            "quantile-regression",
            {"name": "mc-dropout", "passes": 3, "only": ["mlp"]},
            {"name": "deep-ensemble", "members": ["other"]},
        ],
    }


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    folder, suite = tmp_path_factory.mktemp("tables"), suite_of()
    return folder, suite, run_suite(suite, folder)


def context_of(tables, **changes):
    folder, suite, _ = tables
    return Context(validate_suite({**suite, **changes}), folder)


def stored(context, model, condition, label=None, split="test"):
    cells = [c for c in context.cells(model) if (c.condition, c.split) == (condition, split)]
    keys = [context.observation_key(c) if label is None else context.probe_key(c, context.probe(label)) for c in cells]
    found = [context.store.load(key) for key in keys]
    return {name: np.concatenate([f[name] for f in found]) for name in found[0]}


def samples(columns):
    x = columns["input"].astype(np.float64)
    return Samples(x, columns["prediction"], columns["label"], {}, columns["id"])


def test_records_hold_what_was_shown_and_what_was_said(tables):
    context, data = context_of(tables), load_dataset("diabetes")
    assert not tables[2].failures
    test = data["test"].take(60)
    clean = stored(context, "mlp", "clean")
    np.testing.assert_array_equal(clean["input"], test.inputs(slice(None)).numpy())
    np.testing.assert_array_equal(clean["label"], test.labels)
    assert clean["label"].dtype == clean["prediction"].dtype == np.float64 and clean["input"].dtype == np.float32
    for model in ("mlp", "forest"):
        for condition in context.conditions_of(model):
            columns = stored(context, model, condition)
            module = context.model(model).module.eval()
            with torch.no_grad():
                again = module(torch.from_numpy(columns["input"])).reshape(-1).double().numpy()
            # Batches of other sizes, summed in float32.
            np.testing.assert_allclose(columns["prediction"], again, rtol=1e-5)
    assert {name for name in clean if name.startswith("features/")} == set()


def test_conditions_change_what_they_say(tables):
    context, data = context_of(tables), load_dataset("diabetes")
    test, statistics = data["test"].take(60), Columns.of(data)
    x, ids = test.inputs(slice(None)), test.ids
    noisy = stored(context, "mlp", "feature-noise 1")
    random = SampleRandom.of(0, ids, "shift/feature-noise")
    np.testing.assert_array_equal(noisy["input"], feature_noise(x, 1.0, statistics, random).numpy())
    np.testing.assert_array_equal(noisy["input"], stored(context, "forest", "feature-noise 1")["input"])
    shifted = stored(context, "mlp", "covariate-shift 2")
    chosen = covariate_shift(x, SampleRandom.of(0, ids, "shift/covariate-shift"), 2.0, statistics, along="bmi")
    np.testing.assert_array_equal(shifted["id"], ids[chosen.index])
    np.testing.assert_array_equal(shifted["label"], test.labels[chosen.index])
    column = list(statistics.names).index("bmi")
    assert shifted["input"][:, column].mean() > x[:, column].mean()
    # The attack that the engine made is the library's.
    attacked = stored(context, "mlp", "pgd 0.3")
    module, budget = context.model("mlp").module, TableBudget.of(data)
    own = RegressionPGD(eps=0.3, steps=4)(module, x, torch.from_numpy(test.labels), budget, ids=ids)
    np.testing.assert_allclose(attacked["input"], own.x_adv.numpy(), rtol=1e-5, atol=1e-6)
    low, high = budget.bounds(x, 0.3)
    assert (torch.from_numpy(attacked["input"]).double() >= low).all()
    assert (torch.from_numpy(attacked["input"]).double() <= high).all()
    errors = [np.abs(c["prediction"] - c["label"]) for c in (stored(context, "mlp", "clean"), attacked)]
    assert (errors[1] >= errors[0] - 1e-4).all() and errors[1].mean() > errors[0].mean()
    # 2 restarts, 2 directions, 4 steps and a last look; the clean prediction was there.
    assert set(attacked["forwards"]) == {2 * 2 * 5} and set(attacked["backwards"]) == {2 * 2 * 4}


def test_intervals_in_records_equal_those_of_the_library(tables):
    context = context_of(tables)
    train, calibration = (samples(stored(context, "mlp", "clean", split=s)) for s in ("train", "calibration"))
    shown = stored(context, "mlp", "feature-noise 1")
    for label, estimator, model in (
        ("split-conformal", SplitConformal(), None),
        ("mc-dropout", MCDropoutRegressor(passes=3), context.model("mlp").module),
    ):
        fitted = estimator.fit(train, calibration, model=model)
        mine, theirs = stored(context, "mlp", "feature-noise 1", label), fitted.predict(samples(shown), model=model)
        assert mine["low"].shape == (60, len(NOMINAL))
        for name in mine:
            np.testing.assert_allclose(mine[name], getattr(theirs, name), rtol=1e-4, atol=1e-4)
    quantiles = stored(context, "forest", "clean", "quantile-regression")
    assert quantiles["quantiles"].shape == (60, len(LEVELS)) and quantiles["crossed"].shape == (60,)
    assert {"point", "low", "high"} <= set(quantiles)
    ensemble = stored(context, "forest", "clean", "deep-ensemble")
    own, other = (context.model(m).module for m in ("forest", "other"))
    x = torch.from_numpy(stored(context, "forest", "clean")["input"])
    with torch.no_grad():
        mean = (own(x).double() + other.eval()(x).reshape(-1).double()) / 2
    np.testing.assert_allclose(ensemble["point"], mean.numpy(), rtol=1e-5)


def test_models_and_conditions_that_are_not_for_each_other(tables):
    context = context_of(tables)
    assert "pgd 0.1" in context.conditions_of("mlp") and "pgd 0.1" not in context.conditions_of("forest")
    assert [p.label for p in context.probes_of("forest")] == ["split-conformal", "quantile-regression", "deep-ensemble"]
    rows = tables[2].results.results
    assert {r.model for r in rows} == {"mlp", "forest"}
    assert not [r for r in rows if r.model == "forest" and (r.condition.startswith("pgd") or r.probe == "mc-dropout")]
    found = {c["label"]: c for c in tables[2].results.conditions}
    assert (found["pgd 0.3"]["kind"], found["covariate-shift 2"]["kind"]) == ("attack", "shift")
    assert found["covariate-shift 2"]["parameters"] == {"strength": 2.0, "keep": 0.5, "along": "bmi"}
    json_ready = tables[2].results.to_json()
    assert "split-conformal" in json_ready


def test_a_larger_n_reuses_chunks_and_a_choice_of_samples_does_not(tables, tmp_path):
    folder, suite, _ = tables
    shutil.copytree(folder, tmp_path / "copy")
    small, large = context_of(tables, n=50), context_of(tables)
    for label in ("clean", "feature-noise 1", "pgd 0.3"):
        cell = Cell("mlp", label, "test", 0)
        assert small.observation_key(cell) == large.observation_key(cell)
    cell = Cell("mlp", "covariate-shift 2", "test", 0)
    assert small.observation_key(cell) != large.observation_key(cell)
    again = run_suite(suite, tmp_path / "copy")
    assert (again.computed, again.trained) == (0, 0)
    assert (tmp_path / "copy" / "results.json").read_bytes() == (folder / "results.json").read_bytes()


def test_a_key_changes_with_everything_it_names(tables):
    def key(label, probe=None, model="mlp", **changes):
        context = context_of(tables, **changes)
        cell = Cell(model, label, "test", 0)
        return context.observation_key(cell) if probe is None else context.probe_key(cell, context.probe(probe))

    base = key("pgd 0.3")
    assert key("pgd 0.3", batch_size=7) == base
    assert key("pgd 0.3", seed=1) != base
    attack = {"attack": "pgd", "eps": 0.3, "steps": 4, "only": "mlp"}
    assert key("pgd 0.3", conditions=[attack]) == base
    for more in ({"margin": 0}, {"columns": ["bmi"]}, {"steps": 5}, {"objective": "up"}):
        assert key("pgd 0.3", conditions=[{**attack, **more}]) != base
    noise = {"shift": "feature-noise", "size": 1}
    assert key("feature-noise 1", conditions=[noise]) == key("feature-noise 1")
    assert key("feature-noise 1", conditions=[{**noise, "flip": 0.1}]) != key("feature-noise 1")
    assert key("clean", model="forest") != key("clean")
    dropout = {"name": "mc-dropout", "passes": 4, "only": "mlp"}
    assert key("clean", "mc-dropout", uq=[dropout]) != key("clean", "mc-dropout")
    assert key("clean", "deep-ensemble", uq=[{"name": "deep-ensemble", "members": ["forest"]}]) != key(
        "clean", "deep-ensemble"
    )
    # Shifts are measured in training standard deviations: they are part of the key.
    identity = context_of(tables).observation_identity(Cell("mlp", "feature-noise 1", "test", 0))
    assert identity["condition"]["train"]


@pytest.mark.slow
def test_workers_give_the_same_numbers(tables, tmp_path):
    folder, suite, _ = tables
    run_suite(suite, tmp_path, executor="local", workers=2)
    assert (tmp_path / "results.json").read_bytes() == (folder / "results.json").read_bytes()


def test_what_does_not_fit_is_refused_before_anything_runs(tmp_path, tiny_suite):
    def refused_with(message, **changes):
        with pytest.raises((ConfigError, ModelError), match=message):
            run_suite({**suite_of(), **changes}, tmp_path)

    def refused_model(message, **train):
        models = [train if "spec" in train else {"name": "mlp", "train": train}]
        refused_with(message, models=models, conditions=[], uq=[])

    refused_with("'msp': detectors score the outputs of classifiers", detectors=["msp"])
    refused_with("does not fit this data: corruptions change images", conditions=[{"corruption": "gaussian-noise"}])
    refused_with("outlier sets are images", conditions=[{"outliers": "letters"}])
    refused_with("uq 'temperature' is for classifiers", uq=["temperature"])
    refused_with("Did you mean 'missing-features'", conditions=[{"shift": "missing-feature", "fraction": 0.1}])
    refused_with("missing size", conditions=[{"shift": "feature-noise"}])
    refused_with("unknown parameter 'sizes'", conditions=[{"shift": "feature-noise", "sizes": 1}])
    refused_with(r"fraction = 2", conditions=[{"shift": "missing-features", "fraction": 2}])
    refused_with("Did you mean 'bmi'", conditions=[{"shift": "covariate-shift", "strength": 1, "along": "bmj"}])
    refused_with("missing eps", conditions=[{"attack": "random-search"}])
    refused_with("unknown regression attack 'fgsm'", conditions=[{"attack": "fgsm", "eps": 0.1}])
    refused_with("Did you mean 'bmi'", conditions=[{"attack": "random-search", "eps": 0.1, "columns": ["bmu"]}])
    gradient = [{"attack": "pgd", "eps": 0.1}]
    refused_with("which model 'forest' has not. Attack it with random-search. .* only: .mlp.", conditions=gradient)
    refused_with("'mc-dropout' needs a network, which model 'forest' has not", uq=["mc-dropout"])
    refused_with("Did you mean 'forest'", uq=[{"name": "split-conformal", "only": ["forst"]}])
    refused_model("defense 'trades' trains classifiers", defense="trades")
    refused_model("named recipes are for classifiers", recipe="mnist5k-small-cnn")
    refused_model("unknown parameter 'epoch'", recipe={"epoch": 3})
    refused_model("a recipe is for networks", network=FOREST, recipe={"epochs": 3})
    refused_model("mean and std normalise images", name="m", spec=FOREST, mean=[0.5])
    refused_model("RandomForestRegressor", network="sklearn:ensemble.RandomForestRegresor")
    assert not list(tmp_path.iterdir())
    tiny_suite["uq"] = ["split-conformal"]
    with pytest.raises(ConfigError, match="'split-conformal' is for regressors"):
        run_suite(tiny_suite, tmp_path)
    tiny_suite["uq"], tiny_suite["conditions"] = [], [{"shift": "feature-noise", "size": 1}]
    with pytest.raises(ConfigError, match="shifts change tables"):
        run_suite(tiny_suite, tmp_path)
    tiny_suite["conditions"], tiny_suite["models"][0]["train"] = [], {}
    with pytest.raises(ConfigError, match="missing defense"):
        run_suite(tiny_suite, tmp_path)


def test_plan_counts_attacks_and_passes_of_estimators(tables, tmp_path):
    _, suite, _ = tables
    fresh = {(c.model, c.condition): c for c in plan(Context(validate_suite(suite), tmp_path))}
    # One pass for all, three with dropout, one of the other member.
    assert (fresh["mlp", "clean"].forwards, fresh["mlp", "clean"].backwards) == (5, 0)
    assert (fresh["forest", "clean"].forwards, fresh["forest", "covariate-shift 2"].n) == (2, 30)
    assert (fresh["mlp", "pgd 0.1"].forwards, fresh["mlp", "pgd 0.1"].backwards) == (5 + 20, 16)
    assert fresh["forest", "random-search 0.3"].forwards == 2 + 10
    assert ("forest", "pgd 0.1") not in fresh
    assert all(c.there == 0 and c.seconds > 0 for c in fresh.values())
    done = plan(context_of(tables))
    assert all(c.there == c.n and c.seconds == 0 for c in done)


# Preflight -----------------------------------------------------------------------------------------------------------


class Linear(nn.Module):
    """A sound regressor of diabetes: least squares on the training data."""

    def __init__(self):
        super().__init__()
        train = load_dataset("diabetes")["train"]
        x = np.column_stack([train.inputs(slice(None)).numpy().astype(np.float64), np.ones(len(train))])
        solution = np.linalg.lstsq(x, train.labels, rcond=None)[0]
        self.fc = nn.Linear(x.shape[1] - 1, 1)
        with torch.no_grad():
            self.fc.weight.copy_(torch.from_numpy(solution[None, :-1]))
            self.fc.bias.fill_(solution[-1])

    def forward(self, x):
        return self.fc(x)


class Breaking(Linear):
    def __init__(self, how):
        super().__init__()
        self.how = how

    def forward(self, x):
        return self.how(self, x)


def statuses(model):
    return {c.name: c for c in preflight_regressor(model, load_dataset("diabetes"))}


def test_a_sound_regressor_passes():
    model = Linear().train()
    found = statuses(model)
    assert {c.status for c in found.values()} == {"pass"}
    assert "training mode" in found["mode"].message and model.training
    assert has_gradient(model, torch.zeros(2, 10))


@pytest.mark.parametrize(
    ("how", "name", "status", "message", "refuses"),
    [
        (lambda m, x: m.fc(x).expand(-1, 2), "forward pass", "fail", "shape", True),
        (lambda m, x: m.fc(x) / 0, "forward pass", "fail", "NaN or infinity", True),
        (lambda m, x: 1 / 0, "in-place changes", "fail", "ZeroDivisionError", True),
        (lambda m, x: m.fc(x.sub_(1)), "in-place changes", "fail", "in place", True),
        (lambda m, x: nn.functional.dropout(m.fc(x), 0.5), "determinism", "fail", "two passes", False),
        (lambda m, x: m.fc(x) - m.fc(x).mean(), "batch independence", "fail", "with its batch", False),
        (lambda m, x: m.fc(x) * 0 + 3.0, "constant prediction", "fail", "is 3 for every input", False),
        (lambda m, x: m.fc(x) + 1000, "error", "doubt", "no better than a constant", False),
    ],
)
def test_each_defect_is_found(how, name, status, message, refuses):
    found = statuses(Breaking(how))
    assert found[name].status == status and message in found[name].message
    assert refused(list(found.values())) == refuses
    if not refuses and name != "determinism":  # and nothing else is blamed that comes before it
        before = list(found)[: list(found).index(name)]
        assert all(found[other].status == "pass" for other in before)


def test_other_units_are_a_doubt():
    from dataclasses import replace

    from robustbench_ext.data.base import TableSplit

    data = load_dataset("diabetes")
    test = data["test"]
    scaled = TableSplit(test.inputs(slice(None)).numpy() * 1000, test.labels, test.ids)
    checks = {c.name: c for c in preflight_regressor(Linear(), replace(data, splits={**data.splits, "test": scaled}))}
    assert checks["input range"].status == "doubt" and "column" in checks["input range"].message


def test_what_has_no_gradient_is_seen():
    x = torch.zeros(2, 10)
    assert not has_gradient(Breaking(lambda m, x: m.fc(x.detach())), x)
    assert not has_gradient(Breaking(lambda m, x: torch.from_numpy(x.detach().numpy().sum(1))), x)


def test_a_refused_regressor_costs_nothing_else(tmp_path):
    (tmp_path / "nets.py").write_text(
        "import torch\n"
        "class Bad(torch.nn.Module):\n"
        "    def forward(self, x):\n"
        "        return x.mul_(2).sum(1)\n"
        "class Good(torch.nn.Module):\n"
        "    def forward(self, x):\n"
        "        return x.sum(1)\n"
    )
    models = [{"name": n, "spec": f"{tmp_path / 'nets.py'}:{n}"} for n in ("Bad", "Good")]
    summary = run_suite({**suite_of(), "models": models, "conditions": [], "uq": ["split-conformal"]}, tmp_path / "run")
    assert summary.verdict == "fail" and not summary.failures
    assert "Bad was not evaluated: its preflight failed" in summary.results.notes
    assert {row.model for row in summary.results.results} == {"Good"}


def test_an_estimator_that_fails_leaves_a_report(tmp_path):
    """Dropout is missing where a network has none; its other estimators and the other model go on."""
    models = [
        {"name": "bare", "train": {"kwargs": {"hidden": [8]}, "recipe": {"epochs": 1}}},
        {"name": "forest", "spec": FOREST, "kwargs": {"n_estimators": 4}},
    ]
    uq = ["split-conformal", {"name": "mc-dropout", "only": "bare"}]
    summary = run_suite({**suite_of(), "models": models, "conditions": [], "uq": uq}, tmp_path)
    assert summary.failures and all("dropout" in f.error for f in summary.failures)
    assert {row.model for row in summary.results.results} == {"bare", "forest"}
    read = {row.probe for row in summary.results.find(model="bare")}
    assert "split-conformal" in read and "mc-dropout" not in read
