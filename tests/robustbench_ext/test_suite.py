"""Suites: numbers as people write them, errors that name the nearest key, conditions and probes."""

import pytest

from robustbench_ext.conditions import parse_conditions
from robustbench_ext.data import load_dataset
from robustbench_ext.errors import ConfigError
from robustbench_ext.numbers import format_number, parse_number
from robustbench_ext.probes import IntervalProbe, parse_probes
from robustbench_ext.regression_conditions import parse_regression_conditions
from robustbench_ext.suite import bundled_suites, load_suite, validate_suite


@pytest.mark.parametrize(
    ("text", "value"), [("8/255", 8 / 255), ("1e-3", 0.001), (" 3 / 4", 0.75), ("0.3", 0.3), (2, 2.0), (0.5, 0.5)]
)
def test_numbers(text, value):
    assert parse_number(text) == value


@pytest.mark.parametrize("text", ["8/0", "a", "", None, True, [1], "1/2/3", "nan", "inf", "1e999"])
def test_not_numbers(text):
    with pytest.raises(ConfigError, match="eps: got .* expected"):
        parse_number(text, "eps")


def test_numbers_are_shown_as_people_write_them():
    assert [format_number(v) for v in (8 / 255, 0.2, 1 / 255, 0.05, 0.0, 0.3, 1.0, 1e-4)] == [
        "8/255",
        "0.2",
        "1/255",
        "0.05",
        "0",
        "0.3",
        "1",
        "0.0001",
    ]


@pytest.mark.parametrize("name", bundled_suites())
def test_bundled_suites_are_valid(name):
    suite = load_suite(name)
    assert suite.name == name
    assert suite.description
    if name in ("uncertainty-regression", "oracle-regression"):
        parse_regression_conditions(suite.conditions, load_dataset(suite.data))
        assert parse_probes(suite.detectors, suite.uq, IntervalProbe)
        return
    parse_conditions(suite.conditions)
    parse_probes(suite.detectors, suite.uq)


def minimal(**more):
    return {"name": "s", "data": "digits", "models": [{"name": "m", "spec": "small-cnn"}], **more}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (minimal(conditons=[]), "unknown key 'conditons'. Did you mean 'conditions'"),
        (minimal(models=[{"name": "m", "spc": "x"}]), "unknown key 'spc'. Did you mean 'spec'"),
        (minimal(models=[{"name": "m", "train": {"defence": "trades"}}]), "Did you mean 'defense'|defense"),
        (minimal(models=[{"name": "m"}]), "expected one of 'spec', 'train' and 'make'"),
        (minimal(models=[{"name": "m", "spec": "a"}, {"name": "m", "spec": "b"}]), "names must differ"),
        (minimal(models=[]), "models"),
        (minimal(n=0), "at n: .*got 0"),
        (minimal(schema=2), "schema"),
        ({"name": "s"}, "at data"),
    ],
)
def test_wrong_suites_are_explained(content, message):
    with pytest.raises(ConfigError, match=message):
        validate_suite(content)


def test_conditions_expand_and_get_labels():
    conditions = parse_conditions(
        [
            {"attack": "pgd", "eps": ["8/255", "1e-1"]},
            {"attack": "pgd", "eps": 0.1, "steps": 50},
            {"attack": "fgsm", "eps": 1, "norm": "L2", "label": "quick"},
            {"corruption": "gaussian-noise", "severity": 2},
            {"outliers": ["letters", "photos"], "n": 20},
        ]
    )
    assert [c.label for c in conditions] == [
        "clean",
        "pgd Linf 8/255",
        "pgd Linf 0.1",
        "pgd Linf 0.1 (steps=50)",
        "quick",
        "gaussian-noise 2",
        "outliers letters",
        "outliers photos",
    ]
    assert conditions[1].facts()["eps"] == 8 / 255
    # The label is no part of what a result depends on.
    assert parse_conditions([{"attack": "fgsm", "eps": 1, "norm": "L2"}])[1].spec() == conditions[4].spec()


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"attack": "pdg", "eps": 0.1}, "Did you mean 'pgd'"),
        ({"attack": "pgd", "eps": 0.1, "stepz": 3}, "Did you mean 'steps'"),
        ({"attack": "pgd"}, "missing eps"),
        ({"attack": "pgd", "eps": 0.1, "corruption": "x"}, "exactly one"),
        ({"eps": 0.1}, "exactly one"),
        ("noise", "expected 'clean' or a mapping"),
        ({"corruption": "gaussian-noise", "severity": 6}, "expected 1, 2, 3, 4 or 5"),
        ({"corruption": "gausian-noise"}, "Did you mean 'gaussian-noise'"),
        ({"outliers": "leters"}, "Did you mean 'letters'"),
        ({"outliers": "letters", "m": 3}, "unknown parameter 'm'"),
        ({"outliers": []}, "list is empty"),
        ({"attack": "pgd", "eps": []}, "list is empty"),
        ({"corruption": "gaussian-noise", "severity": True}, "expected 1, 2, 3, 4 or 5"),
        ({"attack": "fgsm", "eps": 0.1, "label": "worst case Linf 0.1"}, "choose another"),
        ({"attack": "pgd", "eps": 8}, "did you mean 8/255"),
    ],
)
def test_wrong_conditions_are_explained(entry, message):
    with pytest.raises(ConfigError, match=message):
        parse_conditions([entry])


def test_the_same_condition_twice_is_an_error():
    with pytest.raises(ConfigError, match="listed twice"):
        parse_conditions([{"attack": "fgsm", "eps": 0.1}, {"attack": "fgsm", "eps": "1/10"}])


@pytest.mark.parametrize(
    ("detectors", "message"),
    [
        (["energi"], "Did you mean 'energy'"),
        ([{"name": "energy", "temprature": 2}], "Did you mean 'temperature'"),
        (["msp", "msp"], "listed twice"),
        ([{"name": "msp", "label": "classifier"}], "another label"),
        ([{"name": "msp", "label": "regressor"}], "another label"),
        ([{"name": "msp", "label": "a · epistemic"}], "another label"),
        ([{"temperature": 2}], "expected a name"),
    ],
)
def test_wrong_probes_are_explained(detectors, message):
    with pytest.raises(ConfigError, match=message):
        parse_probes(detectors, [])


def test_overrides(tmp_path):
    suite = load_suite(
        "quickstart",
        models=["mine=net.py:build", "torchvision:resnet18", "runs/x/models/abc"],
        data="digits",
        mean=[0.5],
        std=[0.25],
        settings=["n=50", "conditions.1.eps=[0.1]", "description=short"],
    )
    assert [m.name for m in suite.models] == ["mine", "torchvision:resnet18", "abc"]
    assert suite.models[0].spec == "net.py:build"
    assert suite.models[0].mean == (0.5,)
    assert (suite.data, suite.n, suite.description) == ("digits", 50, "short")
    assert suite.title == "Quickstart, on digits"
    assert suite.conditions[1]["eps"] == [0.1]
    for setting, message in {
        "n": "key=value",
        "conditions.99.eps=1": "there is no",
        "nn=3": "Did you mean 'n'|unknown key",
    }.items():
        with pytest.raises(ConfigError, match=message):
            load_suite("quickstart", settings=[setting])
    with pytest.raises(ConfigError, match="Did you mean 'quickstart'"):
        load_suite("quikstart")
    (tmp_path / "broken.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_suite(tmp_path / "broken.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(ConfigError, match="expected a mapping"):
        load_suite(tmp_path / "list.yaml")
