"""The fixture: verdicts and what they say, names, options, reports."""

import xml.etree.ElementTree as ElementTree

import pytest

MEASURE = """
def measure(robustness, model, test_data, **more):
    return robustness(model, test_data, **{"attack": "pgd", "eps": 0.1, "steps": 3, "n": 200, **more})
"""


def written(body):
    return MEASURE + body


def test_three_verdicts_and_what_they_say(project):
    project.write(
        "test_model.py",
        written("""
def test_pass(robustness, model, test_data):
    r = measure(robustness, model, test_data)
    assert r.accuracy.at_least(0.5).outcome == "pass"
    assert r.robust_accuracy.at_least(0.1).outcome == "pass"
    assert r.ece.at_most(0.9).outcome == "pass"
    assert r.robust_accuracy.between(0.05, 0.99).outcome == "pass"

def test_fail(robustness, model, test_data):
    measure(robustness, model, test_data).robust_accuracy.at_least(0.99)

def test_undecided(robustness, model, test_data):
    r = measure(robustness, model, test_data)
    assert r.robust_accuracy.at_least(r.robust_accuracy.value - 0.005).outcome == "inconclusive"
"""),
    )
    result = project.run("-p", "no:randomly")
    result.assert_outcomes(passed=2, failed=1, warnings=1)
    text = result.stdout.str()
    result.stdout.fnmatch_lines(
        [
            "*AssertionError: robust_accuracy (pgd Linf 0.1) misses >= 0.99: 0.*, 95 % interval 0.* to 0.* (Wilson, n = 200)",
            "*right as they are and wrong here: *, such as given:test:*",
            "*reproduce: python -m pytest test_model.py::test_fail",
            "*RobustnessInconclusive: robust_accuracy*does not decide >= 0.*",
            "*about * samples would decide it, in four cases of five (n = 200)",
        ]
    )
    assert "test_model.py" in text and "gate/session.py" not in text  # the traceback ends in the test
    table = text.partition("robustness ===")[2].partition("short test summary")[0].splitlines()[1:-1]
    assert "1 fail, 1 inconclusive, 4 pass" in table
    assert max(len(line) for line in table) <= 80
    strict = project.run("--robust-strict", "-k", "undecided")
    strict.assert_outcomes(failed=1, deselected=2)
    strict.stdout.fnmatch_lines(["*inconclusive, which --robust-strict does not let pass*"])


def test_a_warning_can_be_made_an_error_by_its_name(project):
    project.write(
        "test_model.py",
        written("""
def test_undecided(robustness, model, test_data):
    r = measure(robustness, model, test_data)
    r.robust_accuracy.at_least(r.robust_accuracy.value - 0.005)
"""),
    )
    result = project.run("-W", "error::robustbench_ext.pytest_plugin.RobustnessInconclusive")
    result.assert_outcomes(failed=1)


def test_every_number_has_a_name(project):
    project.write(
        "test_model.py",
        written("""
import pytest
from robustbench_ext.errors import ConfigError

def test_names(robustness, model, test_data):
    x, y = test_data
    r = measure(robustness, model, {"test": test_data, "calibration": (x[:90], y[:90]), "train": test_data},
                corruption=["contrast", "gaussian-noise"], severity=2, outliers="uniform-noise", outliers_n=50,
                detector=["msp", "energy"], uq=["temperature", {"name": "aps", "alpha": 0.1}])
    assert r.accuracy.condition == r.ece.condition == r.nll.condition == r.worst_class_accuracy.condition == "clean"
    assert r.robust_accuracy.condition == r.robust_ece.condition == "pgd Linf 0.1"
    assert r.robust_worst_class_accuracy.value <= r.robust_accuracy.value <= r.accuracy.value
    assert (r.corrupted_accuracy.metric, r.corrupted_accuracy.condition) == ("mean_accuracy", "all corruptions")
    assert r["accuracy", "contrast 2"].condition == "contrast 2"
    assert r["auroc", "outliers uniform-noise", "energy"].probe == "energy"
    assert r.metric("fpr95", probe="msp").condition == "outliers uniform-noise"
    assert r["ece", "clean", "temperature"].probe == "temperature"
    assert r.set_coverage.group == "90 %"
    assert "robust_accuracy" in dir(r)

    def refused(call, *words):
        with pytest.raises((ConfigError, AttributeError)) as caught:
            call()
        for word in words:
            assert word in str(caught.value), caught.value

    refused(lambda: r.robust_acuracy, "Did you mean 'robust_accuracy'")
    refused(lambda: r.auroc, "of which probe", "msp, energy")
    refused(lambda: r["accuracy", "contrast 3"], "Did you mean 'contrast 2'")
    refused(lambda: r.coverage, "was not measured", "uq=")
    refused(lambda: r.corrupted_ece, "of which condition", "contrast 2, gaussian-noise 2")
    refused(lambda: r.domain_accuracy, "domain=")
    refused(lambda: r.accuracy.at_least(45), "proportion")
    refused(lambda: r.accuracy.between(0.9, 0.1), "lower bound first")
    refused(lambda: measure(robustness, model, test_data, stepz=3), "stepz")
    refused(lambda: robustness(model, test_data, n=10, sed=3), "Did you mean 'seed'")
    refused(lambda: robustness(model, test_data, attack="pdg", eps=0.1), "Did you mean 'pgd'")
    refused(lambda: robustness(model, n=10), "no data")
    refused(lambda: robustness(3, test_data), "int")
    refused(lambda: robustness(model, test_data, severity=3), "corruption=")
    for bare in (bool, lambda e: e >= 0.4, lambda e: e < 0.4, lambda e: e != 0.4, float):
        with pytest.raises(TypeError, match="at_least"):
            bare(r.accuracy)

def test_worst_case_of_several_attacks(robustness, model, test_data):
    two = [{"attack": "pgd", "eps": 0.1, "steps": 3}, {"attack": "fgsm", "eps": 0.1}]
    r = robustness(model, test_data, conditions=two, n=100)
    assert r.robust_accuracy.condition == "worst case Linf 0.1"
    s = robustness(model, test_data, conditions=[{"attack": "pgd", "eps": [0.05, 0.1], "steps": 3}], n=100)
    with pytest.raises(AttributeError, match="of which condition.*worst case Linf 0.05"):
        s.robust_accuracy
    t = robustness(model, test_data, attack=["fgsm", "random-noise"], eps="1/10", n=100)
    assert t.robust_accuracy.value <= t["robust_accuracy", "random-noise Linf 0.1"].value
"""),
    )
    project.run().assert_outcomes(passed=2)


def test_regressors(project):
    project.write(
        "test_regressor.py",
        """
from torch import nn
import torch

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(10, 1)
        with torch.no_grad():
            self.body.bias.fill_(150.0)
    def forward(self, x):
        return self.body(x / 100).squeeze(1)

def test_coverage(robustness):
    r = robustness(Net().eval(), "diabetes", uq="split-conformal", n=88, attack="pgd", eps=0.1, steps=3)
    assert r.coverage.group == "90 %" and r.coverage.probe == "split-conformal"
    r.coverage.between(0.6, 1.0)
    r.metric("coverage", group="50 %").at_least(0.2)
    r.rmse.at_most(1000)
    assert r.attacked_rmse.value >= r.rmse.value
    r.not_worse_than_baseline("rmse")
    r.not_worse_than_baseline("mae")
    r.not_worse_than_baseline("r2")
    r.not_worse_than_baseline("coverage", higher_is_better=True)
    r.not_worse_than_baseline("wis_mean")
""",
    )
    project.run("--robust-update", "-W", "ignore").assert_outcomes(passed=1)
    result = project.run("-W", "ignore")
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["8 pass"])


def test_options_marker_and_fixtures_of_wider_scope(project):
    project.write(
        "test_model.py",
        """
import pytest

@pytest.fixture(scope="module")
def measured(robustness, model, test_data):
    return robustness(model, test_data, attack="fgsm", eps=0.1)

def test_shared(measured):
    assert measured.results.suite["n"] == EXPECTED
    measured.robust_accuracy.at_least(0.01)

@pytest.mark.robustness(attack="fgsm", eps="1/10", n=60, seed=4)
class TestMarked:
    @pytest.mark.robustness(n=90)
    def test_marker(self, robustness, model, test_data):
        r = robustness(model, test_data)
        assert "fgsm Linf 0.1" in r.conditions
        assert r.results.suite["seed"] == 4
        assert r.results.suite["n"] == (EXPECTED if EXPECTED != 120 else 90)
        assert robustness(model, test_data, n=70).results.suite["n"] == (EXPECTED if EXPECTED != 120 else 70)
""".replace("EXPECTED", "int(__import__('os').environ['N'])"),
    )
    project.write("pytest.ini", "[pytest]\naddopts = --strict-markers -p no:cacheprovider\nrobust_n = 120\n")
    project._monkeypatch.setenv("N", "120")
    project.run().assert_outcomes(passed=2)
    project._monkeypatch.setenv("N", "30")
    project.run("--robust-n=30").assert_outcomes(passed=2)  # the command line is the last word
    result = project.run("--robust-n=few")
    assert "--robust-n=few: expected a whole number" in result.stderr.str()


def test_confidence_widens_the_interval(project):
    project.write(
        "test_model.py",
        written("""
def test_level(robustness, model, test_data):
    r = measure(robustness, model, test_data)
    low = r.robust_accuracy.interval[0]
    assert r.robust_accuracy.at_least(low - 0.001).outcome == "pass"
    assert r.robust_accuracy.at_least(low - 0.001, confidence=0.999).outcome == "inconclusive"
"""),
    )
    project.run("-W", "ignore").assert_outcomes(passed=1)


def test_reports(project, monkeypatch):
    project.write(
        "test_model.py",
        written("""
def test_ok(robustness, model, test_data):
    measure(robustness, model, test_data).robust_accuracy.at_least(0.1)

def test_bad(robustness, model, test_data):
    measure(robustness, model, test_data).robust_accuracy.at_least(0.99)
"""),
    )
    summary = project.path / "summary.md"
    summary.write_text("before\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    project.run("--junitxml=out.xml", "--robust-report=out.html").assert_outcomes(passed=1, failed=1)
    properties = {
        (case.get("name"), p.get("name")): p.get("value")
        for case in ElementTree.parse(project.path / "out.xml").iter("testcase")
        for p in case.iter("property")
    }
    assert properties["test_ok", "robust_accuracy (pgd Linf 0.1) >= 0.1"] == "pass"
    assert properties["test_bad", "robust_accuracy (pgd Linf 0.1) >= 0.99"] == "fail"
    assert 0 < float(properties["test_ok", "robust_accuracy (pgd Linf 0.1)"]) < 1
    text = summary.read_text()
    assert text.startswith("before\n### Robustness: 1 fail, 1 pass")
    assert "| fail | test_model.py::test_bad | robust_accuracy (pgd Linf 0.1) |" in text
    assert "misses &gt;= 0.99" in (project.path / "out.html").read_text()


def test_the_summary_for_github_is_capped(tmp_path):
    from robustbench_ext.gate.summary import append_capped

    file = tmp_path / "summary.md"
    append_capped(file, "x" * 50 + "\n" + "y" * 500 + "\n", largest=120)
    assert file.read_text() == "x" * 50 + "\n\n(cut: GitHub takes no more)\n"
    append_capped(file, "z\n" * 100, largest=120)
    assert len(file.read_bytes()) <= 120


# Before anything is measured -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "data", "said"),
    [
        (
            "tiny.Net()",
            "test_data",
            "*mode: the model was handed over in training mode (the model itself)*Call model.eval()*",
        ),
        ("nn.Sequential(tiny.make(), nn.Dropout())", "test_data", "*training mode*"),
        ("nn.Sequential(tiny.make(), nn.Softmax(1)).eval()", "test_data", "*logits: the model returns probabilities*"),
        (
            "nn.Sequential(Normalize(), Normalize(), Undo(tiny.make())).eval()",
            "test_data",
            "*normalisation: normalised twice*",
        ),
        (
            "nn.Sequential(Undo(tiny.make())).eval()",
            "test_data",
            "*normalisation: with the normalisation *own mean and std*not *",
        ),
        (
            "tiny.make()",
            "((test_data[0] - 0.5) / 0.5, test_data[1])",
            "*input range: inputs span*They look normalised*",
        ),
        ("tiny.make()", "(test_data[0] * 255, test_data[1])", "*look like bytes: divide by 255*"),
        ("Noisy().eval()", "test_data", "*determinism: two passes*"),
    ],
)
def test_a_model_whose_checks_fail_fails_with_that_reason(project, model, data, said):
    project.write(
        "test_model.py",
        f"""
import tiny, torch
from torch import nn

class Normalize(nn.Module):
    def forward(self, x):
        return (x - 0.5) / 0.5

class Undo(nn.Module):
    # A network that was trained on normalised inputs.
    def __init__(self, inner):
        super().__init__()
        self.inner = inner
    def forward(self, z):
        return self.inner(z * 0.5 + 0.5)

class Noisy(tiny.Net):
    def forward(self, x):
        return super().forward(x) + torch.randn(len(x), 3)

def test_model(robustness, test_data):
    robustness({model}, {data}, attack="pgd", eps=0.1, steps=3, n=100).robust_accuracy.at_least(0.0)
""",
    )
    result = project.run()
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines([said.replace("[", "[[]"), "*Nothing was measured*"])


def test_a_correct_normalisation_passes_and_failures_can_be_accepted(project):
    project.write(
        "test_model.py",
        """
import tiny, torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
import pytest
from robustbench_ext.errors import ConfigError

class Normalize(nn.Module):
    mean, std = torch.tensor(0.5), torch.tensor(0.5)
    def forward(self, x):
        return (x - self.mean) / self.std

class Undo(tiny.Net):
    def forward(self, z):
        return super().forward(z * 0.5 + 0.5)

def test_once(robustness, test_data):
    model = nn.Sequential(Normalize(), Undo()).eval()
    model.add_module("tail", nn.Identity())  # in training mode, and harmless
    robustness(model, test_data, n=100).accuracy.at_least(0.5)

def test_accepted(robustness, test_data):
    with pytest.warns(UserWarning, match="training mode"):
        robustness(tiny.Net(), test_data, n=100, accept=["mode"]).accuracy.at_least(0.5)

def test_loaders(robustness, model, test_data):
    data = TensorDataset(*test_data)
    a = robustness(model, DataLoader(data, batch_size=7), n=100)
    assert a.accuracy.value == robustness(model, test_data, n=100).accuracy.value
    with pytest.raises(ConfigError, match="shuffles"):
        robustness(model, DataLoader(data, shuffle=True), n=100)

def test_wrapped(robustness, test_data):
    robustness(Undo().eval(), test_data, mean=[0.5], std=[0.5], n=100).accuracy.at_least(0.5)
""",
    )
    project.run().assert_outcomes(passed=4)


def test_fewer_samples_than_asked_for_are_said(project):
    project.write(
        "test_model.py",
        written("""
def test_asked(robustness, model, test_data):
    measure(robustness, model, test_data, n=100_000).accuracy.at_least(0.1)

def test_not_asked(robustness, model, test_data):
    robustness(model, test_data, attack="fgsm", eps=0.1).accuracy.at_least(0.1)
"""),
    )
    result = project.run()
    result.assert_outcomes(passed=2, warnings=1)
    result.stdout.fnmatch_lines(["*RobustnessDoubt: *n = 100000 test samples were asked for, and the test split has *"])
