"""Models and data handed over in Python: the same numbers as by name, told apart by content, kept in this process."""

import copy

import numpy as np
import pytest
import torch
from sklearn.datasets import load_diabetes
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from robustbench_ext.data import load_dataset
from robustbench_ext.data.given import given_dataset
from robustbench_ext.engine import run_suite
from robustbench_ext.errors import ConfigError, DataError
from robustbench_ext.suite import load_suite

SUITE = {
    "schema": 1,
    "name": "given",
    "n": 60,
    "conditions": [{"attack": "fgsm", "eps": 0.1}, {"corruption": "contrast", "severity": 2}],
    "detectors": ["msp"],
}


def values(summary):
    return {(r.condition, r.probe, r.metric, r.group): r.value for r in summary.results.results}


def test_the_same_numbers_as_by_name(digits_model, digits, tmp_path):
    given = run_suite(SUITE, tmp_path / "a", models={"net": digits_model}, data=digits)
    assert not given.failures and given.computed
    again = run_suite(SUITE, tmp_path / "a", models={"net": digits_model}, data=digits)
    assert again.computed == 0
    assert again.results.to_json() == given.results.to_json()
    named = run_suite({**SUITE, "data": "digits"}, tmp_path / "b", models={"net": digits_model})
    assert values(named) == values(given)


def test_a_changed_model_is_another_one(digits_model, digits, tmp_path):
    first = run_suite(SUITE, tmp_path, models={"net": digits_model}, data=digits)
    changed = copy.deepcopy(digits_model)
    with torch.no_grad():
        next(changed.parameters()).mul_(0.5)
    second = run_suite(SUITE, tmp_path, models={"net": changed}, data=digits)
    assert second.computed == first.computed
    assert second.results.models[0]["fingerprint"] != first.results.models[0]["fingerprint"]


def test_bundled_suites_take_them_and_need_no_training_data(digits_model, digits_test, tmp_path):
    x, y, _ = digits_test
    suite = load_suite("corruptions", settings=["n=20", "conditions=[{corruption: fog, severity: 1}]"])
    assert suite.detectors
    done = run_suite(suite, tmp_path, models={"net": digits_model}, data={"test": (x, y)})
    assert done.results.find(condition="fog 1", metric="accuracy")
    assert done.results.find(condition="fog 1", metric="auroc")
    assert done.results.models[0]["spec"] == "given"
    assert done.results.suite["title"] == "corruptions"  # its own title is about its own models


def test_they_stay_in_this_process(digits_model, digits, tmp_path):
    with pytest.raises(ConfigError, match="serial executor"):
        run_suite(SUITE, tmp_path, models={"net": digits_model}, data=digits, executor="local")
    with pytest.raises(ConfigError, match="handed over"):
        run_suite({**SUITE, "data": "given", "models": [{"name": "a", "spec": "small-cnn"}]}, tmp_path)
    lost = run_suite({**SUITE, "data": "digits", "models": [{"name": "a", "spec": "given"}]}, tmp_path)
    assert "handed over" in lost.failures[0].error


def test_regressors_too(tmp_path):
    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            table = load_diabetes(scaled=False)
            design = np.column_stack([table.data, np.ones(len(table.data))])
            weights = np.linalg.lstsq(design, table.target, rcond=None)[0]
            self.register_buffer("weights", torch.tensor(weights, dtype=torch.float32))

        def forward(self, x):
            return x @ self.weights[:-1] + self.weights[-1]

    suite = {**SUITE, "data": "diabetes", "conditions": [], "detectors": [], "uq": ["split-conformal"]}
    done = run_suite(suite, tmp_path, models={"linear": Linear()})
    (row,) = done.results.find(condition="clean", probe="regressor", metric="r2")
    assert row.value > 0.3


# Data ----------------------------------------------------------------------------------------------------------------


def pairs(n=12):
    rng = np.random.default_rng(0)
    return rng.random((n, 1, 4, 4)).astype(np.float32), np.arange(n) % 3


@pytest.mark.parametrize(
    "make",
    [
        lambda x, y: (x, y),
        lambda x, y: (torch.from_numpy(x), torch.from_numpy(y)),
        lambda x, y: TensorDataset(torch.from_numpy(x), torch.from_numpy(y)),
        lambda x, y: DataLoader(TensorDataset(torch.from_numpy(x), torch.from_numpy(y)), batch_size=5),
        lambda x, y: list(zip(x, y, strict=True)),
        lambda x, y: {"test": (x, y), "train": (x[:6], y[:6])},
    ],
)
def test_what_is_understood(make):
    x, y = pairs()
    data = given_dataset(make(x, y))
    test = data["test"]
    place = [int(name.rpartition(":")[2]) for name in test.ids]
    np.testing.assert_array_equal(test.images(slice(None)).numpy(), x[place])
    np.testing.assert_array_equal(test.labels, y[place])
    assert data.classes == ("0", "1", "2")
    # Every prefix is class-balanced.
    for n in range(3, 13, 3):
        assert np.bincount(test.labels[:n]).tolist() == [n // 3] * 3


def test_a_dataset_is_taken_as_it_is():
    digits = load_dataset("digits")
    assert given_dataset(digits) is digits


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (3, "expected"),
        ((np.zeros((2, 4, 4)), np.zeros(2)), "different shapes"),
        ((np.zeros((2, 1, 4, 4), np.uint8), np.zeros(2)), "255"),
        ((np.zeros((2, 1, 4, 4)), np.array([0.5, 1])), "fractions"),
        ((np.zeros((2, 1, 4, 4)), np.zeros(3)), "N >= 1"),
        ({"train": pairs()}, "expected test"),
        ([], "no samples"),
        ([(np.zeros((1, 4, 4)), 0), (np.zeros((1, 5, 5)), 1)], "shapes"),
        ((np.zeros((2, 1, 4, 4)), np.array([-1, 0])), "labels span"),
    ],
)
def test_what_is_refused(data, said):
    with pytest.raises(DataError, match=said):
        given_dataset(data)
