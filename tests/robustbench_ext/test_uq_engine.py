"""Estimators in suites: what a reading leaves in the records, members of ensembles, estimators that read inputs."""

import shutil

import numpy as np
import pytest
import torch

from robustbench_ext.data import load_dataset
from robustbench_ext.engine import run_suite
from robustbench_ext.errors import ConfigError, DataError
from robustbench_ext.evaluate import Cell, Context
from robustbench_ext.models import observe
from robustbench_ext.probes import scorer
from robustbench_ext.suite import load_suite, validate_suite
from uq.aps import APS
from uq.bias_variance_mix import BiasVarianceMix
from uq.deep_ensemble import DeepEnsemble
from uq.mc_dropout import MCDropout

NETS = """
import torch
def build(width=24):
    return torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(64, width), torch.nn.ReLU(), torch.nn.Dropout(0.3), torch.nn.Linear(width, 10)
    )
"""
MIX = {"name": "bias-variance-mix", "passes": 4}
ENSEMBLE = {"name": "deep-ensemble", "members": ["first", "second"]}


def suite_of(nets):
    def entry(name, seed, **more):
        recipe = {"epochs": 3, "eps": 0.1, "validation_n": 50, "validation_steps": 1}
        train = {"defense": "standard", "network": f"{nets}:build", "seed": seed, "recipe": recipe}
        return {"name": name, "train": train, **more}

    return {
        "schema": 1,
        "name": "uncertain",
        "data": "digits",
        "n": 120,
        "chunk_size": 60,
        "models": [entry("first", 0), entry("second", 1, evaluate=False)],
        "conditions": [
            {"attack": "pgd", "eps": 0.1, "steps": 3, "stop": "never"},
            {"outliers": "letters", "n": 40},
        ],
        "detectors": ["msp"],
        "uq": ["temperature", "aps", {"name": "mc-dropout", "passes": 5}, ENSEMBLE, MIX],
    }


@pytest.fixture(scope="module")
def uncertain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uncertain")
    (folder / "nets.py").write_text(NETS)
    suite = suite_of(folder / "nets.py")
    return folder / "run", suite, run_suite(suite, folder / "run")


def stored(context, label, condition="clean", model="first"):
    cells = [c for c in context.cells(model) if (c.condition, c.split) == (condition, "test")]
    found = [context.store.load(context.probe_key(cell, context.probe(label))) for cell in cells]
    return {name: np.concatenate([f[name] for f in found]) for name in found[0]}


def test_readings_in_records_equal_those_of_the_library(uncertain):
    folder, suite, summary = uncertain
    assert not summary.failures
    context, data = Context(validate_suite(suite), folder), load_dataset("digits")
    model, member = (context.model(name).module for name in ("first", "second"))
    x, ids = data["test"].images(slice(0, 120)), data["test"].ids[:120]
    held_out, y = data["calibration"].images(slice(None)), torch.from_numpy(data["calibration"].labels)

    def compare(label, reading, x_equal=True):
        columns = stored(context, label)
        # Batches of other sizes: rounding of float32 sums, magnified by the logarithms of small probabilities.
        np.testing.assert_allclose(columns["logits"], reading.logits.numpy(), rtol=1e-4, atol=1e-4)
        for part in ("aleatoric", "epistemic", "sets"):
            assert (part in columns) == (getattr(reading, part) is not None)
            if part in columns:
                np.testing.assert_allclose(columns[part], getattr(reading, part).numpy(), rtol=1e-3, atol=1e-5)
        return columns

    dropout = MCDropout(passes=5).fit(model, held_out, y)
    assert compare("mc-dropout", dropout.predict(x, ids=ids))["epistemic"].min() > 0
    compare("deep-ensemble", DeepEnsemble(["second"]).with_members([member]).fit(model, held_out, y).predict(x))
    sets = compare("aps", APS().fit(model, held_out, y).predict(x))["sets"]
    assert sets.dtype == bool and sets.shape == (120, 10)
    mix = BiasVarianceMix(passes=4).with_inputs(held_out, data["calibration"].ids)
    compare("bias-variance-mix", mix.fit(model, held_out, y).predict(x, ids=ids))
    assert summary.results.models[0]["fitted"]["bias-variance-mix"]["alpha"] == pytest.approx(mix.alpha, abs=1e-6)
    # Under attack it is the attacked inputs that were read, though they are stored nowhere.
    attacked = stored(context, "mc-dropout", "pgd Linf 0.1")
    inputs = torch.cat([context._inputs(Cell("first", "pgd Linf 0.1", "test", c), 250).x for c in range(2)])
    np.testing.assert_allclose(
        attacked["logits"], dropout.predict(inputs, ids=ids).logits.numpy(), rtol=1e-4, atol=1e-4
    )
    assert np.abs(attacked["logits"] - stored(context, "mc-dropout")["logits"]).max() > 0.1


def test_what_draws_does_not_depend_on_chunks_or_batches(uncertain, tmp_path):
    folder, suite, _ = uncertain
    shutil.copytree(folder / "models", tmp_path / "models")
    other = {**suite, "chunk_size": 50, "batch_size": 17, "conditions": []}
    run_suite(other, tmp_path)
    mine, theirs = (Context(validate_suite(s), f) for s, f in ((suite, folder), (other, tmp_path)))
    for label in ("mc-dropout", "bias-variance-mix"):
        for name, column in stored(mine, label).items():
            np.testing.assert_allclose(stored(theirs, label)[name], column, rtol=1e-3, atol=1e-4)
    seeded = Context(validate_suite({**suite, "seed": 1}), folder)
    cell = Cell("first", "clean", "test", 0)
    assert seeded.probe_key(cell, seeded.probe("mc-dropout")) != mine.probe_key(cell, mine.probe("mc-dropout"))


def test_an_estimator_that_reads_inputs_can_be_added_later(uncertain, tmp_path):
    folder, suite, first = uncertain
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    keys = {p.name for p in (copy / "records").glob("*.npz")}
    more = {**suite, "uq": [*suite["uq"], {"name": "mc-dropout", "passes": 2, "label": "two passes"}]}
    again = run_suite(more, copy)
    tests = [c for c in Context(validate_suite(more), copy).cells("first") if c.split == "test"]
    assert len({p.name for p in (copy / "records").glob("*.npz")} - keys) == len(tests)  # its readings and nothing else
    assert (again.trained, again.failures) == (0, [])
    assert first.results.find(probe="mc-dropout") == again.results.find(probe="mc-dropout")
    assert run_suite(more, copy).computed == 0


@pytest.mark.slow
def test_workers_give_the_same_numbers(uncertain, tmp_path):
    folder, suite, _ = uncertain
    run_suite(suite, tmp_path, executor="local", workers=2)
    assert (tmp_path / "results.json").read_bytes() == (folder / "results.json").read_bytes()


def test_models_that_only_serve_as_members(uncertain):
    _, suite, summary = uncertain
    assert summary.trained == 2
    assert [m["name"] for m in summary.results.models] == ["first"]
    assert {row.model for row in summary.results.results} == {"first"}
    with pytest.raises(ConfigError, match="nothing to do"):
        validate_suite({**suite, "models": [{**m, "evaluate": False} for m in suite["models"]]})
    assert load_suite(suite, settings=["models.1.evaluate=true"]).models[1].evaluate


def test_keys_name_the_members(uncertain):
    folder, suite, _ = uncertain
    cell = Cell("first", "clean", "test", 0)

    def identity(members, **changes):
        ensemble = {"name": "deep-ensemble", "members": members}
        context = Context(validate_suite({**suite, **changes, "uq": [ensemble]}), folder)
        return context.probe_identity(cell, context.probes[-1])

    context = Context(validate_suite(suite), folder)
    base = identity(["second"])
    assert base["members"] == [context.model("second").fingerprint]
    # The model that is read counts once, whether it is listed or not.
    assert identity(["first", "second"]) == base
    # A checkpoint's folder will do; its weights are what counts.
    checkpoint = str(context.training["second"].folder)
    assert identity([checkpoint])["members"] == base["members"]
    # Other weights, another key.
    first = str(context.training["first"].folder)
    assert identity([first])["members"] != base["members"]


def test_a_lost_member_costs_its_estimator_and_nothing_else(uncertain, tmp_path):
    _, suite, whole = uncertain
    models = [suite["models"][0], {**suite["models"][1]}]
    models[1]["train"] = {**models[1]["train"], "recipe": {**models[1]["train"]["recipe"], "lr": 1e30}}
    summary = run_suite({**suite, "models": models}, tmp_path)
    failed = {f.what: f.error for f in summary.failures}
    assert set(failed) == {"second · training", "estimator deep-ensemble"}
    assert "its member second could not be trained" in failed["estimator deep-ensemble"]
    assert "deep-ensemble" not in {r.probe for r in summary.results.results}
    assert summary.results.find(probe="aps") == whole.results.find(probe="aps")


def test_faults_of_estimators_are_found_before_the_run(uncertain, tmp_path):
    _, suite, _ = uncertain

    def refused(message, uq, **changes):
        with pytest.raises(ConfigError, match=message):
            run_suite({**suite, **changes, "uq": uq}, tmp_path)

    refused("member 'thrid'.*none of the suite's models", [{"name": "deep-ensemble", "members": ["thrid"]}])
    refused("'first' is its only member", [{"name": "deep-ensemble", "members": ["first"]}])
    refused("missing members", ["deep-ensemble"])
    attacked = [{"attack": "adaptive", "eps": 0.1, "against": "mc-dropout"}]
    refused("'mc-dropout' has no gradient", ["mc-dropout"], conditions=attacked)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match="no gradient"):
        scorer(MCDropout())


def test_an_adaptive_attack_follows_a_differentiable_estimator(uncertain, tmp_path):
    folder, suite, _ = uncertain
    shutil.copytree(folder / "models", tmp_path / "models")
    attack = {"attack": "adaptive", "eps": 0.1, "steps": 4, "against": ["temperature", "classifier"]}
    suite = {**suite, "n": 60, "conditions": [attack], "uq": ["temperature"]}
    summary = run_suite(suite, tmp_path)
    assert not summary.failures
    context = Context(validate_suite(suite), tmp_path)
    cell = Cell("first", "adaptive Linf 0.1 against temperature", "test", 0)
    assert "against" in context.observation_identity(cell)
    x = context._inputs(cell, 250).x
    seen = observe(context.model("first").module, x, torch.zeros(60, dtype=torch.long))
    np.testing.assert_allclose(context.store.load(context.observation_key(cell))["logits"], seen.logits.numpy())


def test_estimators_of_some_models_only(uncertain, tmp_path):
    folder, suite, _ = uncertain
    shutil.copytree(folder / "models", tmp_path / "models")
    models = [suite["models"][0], {**suite["models"][1], "evaluate": True}]
    attack = {"attack": "pgd", "eps": 0.1, "steps": 2, "only": ["second"]}
    few = {**suite, "models": models, "n": 60, "conditions": [attack], "detectors": []}
    few["uq"] = [
        "temperature",
        {"name": "mc-dropout", "passes": 2, "only": ["first"]},
        {"name": "laplace", "only": "second"},
    ]
    summary = run_suite(few, tmp_path)
    assert not summary.failures and summary.trained == 0
    found = {(r.model, r.probe) for r in summary.results.results}
    assert ("first", "mc-dropout") in found and ("second", "mc-dropout") not in found
    assert ("second", "laplace") in found and ("first", "laplace") not in found
    context = Context(validate_suite(few), tmp_path)
    # Features are read where a probe of that model reads them.
    assert (context.taps("first"), context.taps("second")) == ([], ["penultimate"])
    assert {r.model for r in summary.results.find(condition="pgd Linf 0.1")} == {"second"}
    assert run_suite(few, tmp_path).computed == 0
    few["uq"] = [{"name": "laplace", "only": ["third"]}]
    with pytest.raises(ConfigError, match="only: unknown model 'third'"):
        run_suite(few, tmp_path)
    few["uq"] = [{"name": "temperature", "only": "first"}]
    few["conditions"] = [{"attack": "adaptive", "eps": 0.1, "against": "temperature"}]
    with pytest.raises(ConfigError, match="'temperature' is not read off that model"):
        run_suite(few, tmp_path)


def test_more_outliers_than_chunks_of_test_samples(uncertain, tmp_path):
    folder, suite, _ = uncertain
    shutil.copytree(folder / "models", tmp_path / "models")
    few = {**suite, "n": 60, "chunk_size": 60, "conditions": [{"outliers": "letters", "n": 90}], "uq": ["temperature"]}
    summary = run_suite(few, tmp_path)
    assert not summary.failures and summary.results.find(condition="outliers letters", metric="auroc")


def test_what_fitted_estimators_say_is_kept_in_their_records(uncertain, tmp_path, monkeypatch):
    folder, suite, summary = uncertain
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "results.json").unlink()

    def fit(self, model, probe):
        raise AssertionError(f"{probe.label} was fitted again, only to ask what it says of itself")

    monkeypatch.setattr(Context, "_fit", fit)
    again = run_suite(suite, tmp_path / "copy")
    assert again.results.models == summary.results.models and again.results.notes == summary.results.notes
    assert set(again.results.models[0]["fitted"]) == {"temperature", "aps", "bias-variance-mix"}


def test_a_probe_that_cannot_be_fitted_costs_nothing_else(uncertain, tmp_path, monkeypatch):
    from detectors import MSP
    from uq import TemperatureScaling

    folder, suite, _ = uncertain
    shutil.copytree(folder / "models", tmp_path / "models")
    few = {**suite, "n": 60, "conditions": [{"outliers": "letters", "n": 40}], "uq": ["temperature", "aps"]}

    def refuse(self, held_out, model):
        raise DataError("temperature: no luck today")

    with monkeypatch.context() as patch:
        patch.setattr(TemperatureScaling, "_fit", refuse)
        summary = run_suite(few, tmp_path)
        assert [(f.what, f.error) for f in summary.failures] == [("first · temperature", "temperature: no luck today")]
        found = {row.probe for row in summary.results.results}
        assert "aps" in found and MSP.name in found and "temperature" not in found
        assert summary.results.find(probe="msp", condition="outliers letters", metric="auroc")
    again = run_suite(few, tmp_path)  # it is tried again, not remembered for ever
    assert not again.failures and again.results.find(probe="temperature")
    assert run_suite(few, tmp_path).computed == 0
