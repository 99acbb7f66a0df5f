"""Data and unknown inputs of a user's own code: what they may give, how they enter keys, what is said where one is wrong."""

import json

import numpy as np
import pytest
import torch

from robustbench_ext.catalog import OUTLIERS
from robustbench_ext.compare import compare_runs
from robustbench_ext.conditions import parse_conditions
from robustbench_ext.data import load_dataset
from robustbench_ext.engine import run_suite
from robustbench_ext.errors import ConfigError, DataError
from robustbench_ext.measure_truth import known_truth
from robustbench_ext.named_data import names_code, names_dataset

CODE = '''
import numpy as np
import random
import torch
from sizes import SIDE

CALLS = []

def pair(n):
    y = np.arange(n) % 3
    x = 0.25 * (1 + y[:, None, None, None]) * np.ones((n, 1, SIDE, SIDE)) * (0.9 + 0.1 * np.random.rand(n, 1, SIDE, SIDE))
    return x, y

def make(n=60):
    """Draws from the global generators, which are seeded for it."""
    CALLS.append(n)
    return {"train": pair(n), "calibration": pair(30), "test": pair(45)}

tested = pair(30)

def raises():
    raise KeyError("nothing")

def wrong():
    return {"test": (np.ones((3, 1, 8, 8), dtype=np.uint8), np.arange(3))}

def inputs(n, shape):
    """Half torch's noise, half Python's."""
    return 0.5 * torch.rand(n, *shape) + 0.5 * random.random()

def few(n, shape):
    return torch.zeros(3, *shape)

def bytes_(n, shape):
    return np.zeros((n, *shape), dtype=np.uint8)

def large(n, shape):
    return torch.full((n, *shape), 2.0)

def other(n, shape):
    return torch.zeros(n, 3, 2, 2)

def names(n, shape):
    return ["a"] * n

def build():
    from torch import nn
    net = nn.Sequential(nn.AvgPool2d(SIDE), nn.Flatten(), nn.Linear(1, 3))
    with torch.no_grad():  # three shades, read off their mean
        net[2].weight.copy_(torch.tensor([[-40.0], [0.0], [40.0]]))
        net[2].bias.copy_(torch.tensor([14.0, 0.0, -25.0]))
    return net
'''


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(CODE)
    (tmp_path / "sizes.py").write_text("SIDE = 8\n")
    return tmp_path


def suite(**more):
    return {
        "schema": 1,
        "name": "own data",
        "data": "mine.py:make",
        "models": [{"name": "shades", "spec": "mine.py:build"}],
        "conditions": [{"outliers": "mine.py:inputs", "n": 40}, {"attack": "pgd", "eps": 0.05, "steps": 2}],
        "detectors": ["msp", "mahalanobis"],
        **more,
    }


def test_which_names_are_code():
    assert names_code("mine.py:make") and names_code("mine.py:make#n=5") and names_code("pkg.data:make")
    for name in (
        "digits",
        "npz:x.npz",
        "torchvision:SVHN",
        "statsmodels:x",
        "pacs:photo",
        "cifar10",
        "letters",
        "a.py",
        "x:y",
    ):
        assert not names_code(name), name
    assert names_dataset("torchvision:SVHN") and names_dataset("cifar10") and not names_dataset("mine.py:inputs")


def test_a_function_makes_data(here):
    arrays, tensors = np.random.get_state()[1].copy(), torch.random.get_rng_state()  # noqa: NPY002
    data = load_dataset("mine.py:make")
    assert np.array_equal(np.random.get_state()[1], arrays)  # noqa: NPY002 - the generator that users draw from
    assert torch.equal(torch.random.get_rng_state(), tensors)
    assert data.name == "mine.py:make" and data.source == "made by mine.py:make"
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 60, "calibration": 30, "test": 45}
    assert data["test"].ids[0].startswith("make:test:")
    again = load_dataset("mine.py:make#n=90")
    assert len(again["train"]) == 90
    assert len(load_dataset("mine.py:tested")["test"]) == 30  # what stands there already
    cut = load_dataset("mine.py:make@exp:4")
    assert (cut.name, len(cut["test"])) == ("mine.py:make@exp:4", 45)
    assert len(cut["train"]) < 60


def test_an_edited_neighbour_is_seen(here):
    first = load_dataset("mine.py:make")
    (here / "sizes.py").write_text("SIDE = 9\n")
    assert load_dataset("mine.py:make").shape == (1, 9, 9) != first.shape


@pytest.mark.parametrize(
    ("spec", "error", "said"),
    [
        ("mine.py:raises", DataError, r"data 'mine.py:raises' raised KeyError: 'nothing'"),
        ("mine.py:wrong", DataError, r"data 'mine.py:wrong': test: inputs are uint8, expected floats in \[0, 1\]"),
        ("mine.py:maek", ConfigError, "unknown name in mine.py 'maek'. Did you mean 'make'"),
        ("nowhere.py:make", ConfigError, "data 'nowhere.py:make': there is no file"),
        ("mine.py:make#n", ConfigError, r"'#n', expected #key=value"),
        ("mine.py:make#m=3", DataError, r"raised TypeError: make\(\) got an unexpected keyword argument 'm'"),
        ("mine.py:tested#n=3", ConfigError, "it names a tuple, which takes no n"),
        ("mine.py:SIDE", DataError, "got int, expected"),
    ],
)
def test_what_is_said_of_data(here, spec, error, said):
    with pytest.raises(error, match=said):
        load_dataset(spec)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("few", None),
        ("bytes_", "gave uint8 from 0 to 0, expected floats in"),
        ("large", "gave float32 from 2 to 2, expected floats in"),
        ("other", r"gave shape \(20, 3, 2, 2\), expected \(n, C, H, W\) = \(20, 1, 8, 8\)"),
        ("names", "gave a list, expected images as numbers"),
        ("raises", "raised TypeError"),
    ],
)
def test_what_is_said_of_outliers(here, name, said):
    made = OUTLIERS.load(f"mine.py:{name}")
    if said is None:
        assert len(made(20, (1, 8, 8))) == 3
    else:
        with pytest.raises(DataError, match=f"outliers 'mine.py:{name}' {said}"):
            made(20, (1, 8, 8))


def test_outliers_are_known_by_their_name(here):
    conditions = parse_conditions([{"outliers": ["mine.py:inputs", "letters"]}])
    assert [c.label for c in conditions] == ["clean", "outliers inputs", "outliers letters"]
    assert conditions[1].facts() == {"outliers": "inputs", "distance": None, "origin": "mine.py:inputs"}
    split = OUTLIERS.load("mine.py:inputs")(5, (1, 8, 8))
    assert split.ids[0] == "inputs:000000" and (split.labels == -1).all()
    assert split.fingerprint() == OUTLIERS.load("mine.py:inputs")(5, (1, 8, 8)).fingerprint()
    with pytest.raises(ConfigError, match="Did you mean 'inputs'"):
        parse_conditions([{"outliers": "mine.py:input"}])


def test_a_suite_on_own_data(here):
    done = run_suite(suite(), "run")
    assert not done.failures
    (accuracy,) = done.results.find(metric="accuracy", condition="clean", group=None)
    assert (accuracy.value, accuracy.n) == (1.0, 45)
    assert done.results.find(metric="auroc", condition="outliers inputs", probe="mahalanobis")[0].value > 0.5
    again = run_suite(suite(), "run")
    assert again.computed == 0
    (here / "mine.py").write_text(CODE + "# edited, and gives the same\n")
    assert run_suite(suite(), "run").results.results == done.results.results
    (here / "mine.py").write_text(CODE.replace("0.5 * torch.rand", "0.4 * torch.rand"))
    changed = run_suite(suite(), "run")
    assert changed.computed == 1  # other unknown inputs; data and model are what they were


def test_reading_results_runs_no_code(here):
    """A run folder may be somebody else's."""
    two = [{"name": name, "spec": "mine.py:build"} for name in ("one", "two")]
    run_suite(suite(models=two, conditions=[]), "run")
    (here / "mine.py").write_text("raise SystemExit('it ran')\n")
    said = json.loads((here / "run" / "results.json").read_text())["data"]
    assert known_truth(said) is None
    for name in ("mine.py:make@exp:4", f"{here}/me@work/mine.py:make", "mine.py:make#a=b@c"):
        assert known_truth({**said, "name": name}) is None
    assert compare_runs([here / "run"], everything=True).comparisons


@pytest.mark.slow  # starts processes
def test_workers_make_the_same_data(here):
    serial = run_suite(suite(), "serial")
    done = run_suite(suite(), "local", executor="local", workers=2)
    assert not done.failures
    assert done.results == serial.results
