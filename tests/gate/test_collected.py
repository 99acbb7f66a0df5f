"""Tests without Python: `*.rbx.yaml` files, and a suite for `--robust-model`."""

import pytest

from robustbench_ext.gate.collect import read_expectations

MODEL = """
model: tiny:make
data: npz:data.npz
n: 200
attack: pgd
eps: 1/20
steps: 3
expect:
  - accuracy >= 0.5
  - robust_accuracy >= 0.99
  - ece[pgd Linf 0.05] <= 0.9
  - {metric: robust_accuracy, between: [0.1, 0.99], not_worse_than_baseline: {margin: 0.05}}
  - nll: {at_most: 9, confidence: 0.99}
"""


def test_one_test_for_each_expectation(project):
    project.save_data()
    project.write("checks/model.rbx.yaml", MODEL.replace("npz:data.npz", "npz:../data.npz"))
    collected = project.run("--collect-only", "-q")
    names = [line.partition("::")[2] for line in collected.stdout.lines if "rbx.yaml::" in line]
    assert names == [
        "accuracy >= 0.5",
        "robust_accuracy >= 0.99",
        "ece[pgd Linf 0.05] <= 0.9",
        "robust_accuracy between 0.1 0.99",
        "robust_accuracy not_worse_than_baseline margin=0.05",
        "nll <= 9 confidence=0.99",
    ]
    result = project.run()
    result.assert_outcomes(passed=4, failed=2)
    text = result.stdout.str()
    assert "robust_accuracy (pgd Linf 0.05) misses >= 0.99" in text
    assert "no baseline .robustness/model.rbx.yaml-" in text or "no baseline .robustness/checks-model.rbx.yaml-" in text
    assert "Traceback" not in text and "collect.py" not in text
    assert "python -m pytest 'checks/model.rbx.yaml::robust_accuracy >= 0.99'" in text
    project.run("--robust-update").assert_outcomes(passed=5, failed=1)
    project.run("--robust-strict", "-k", "baseline").assert_outcomes(passed=1, deselected=5)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("expect: 3", "expect: expected a list"),
        ("- 3", "expected a mapping"),
        ("model: a\nexpect: [accuracy]", "metric >= number"),
        ("model: a\nexpect: [{metric: ece, at_mst: 0.1}]", "Did you mean 'at_most'"),
        ("model: a\nexpect: [{metric: ece}]", "nothing is expected of it"),
        ("model: a\nexpect: [{ece: {between: 3}}]", "expected [[]low, high]"),
        ("model: [a", "while parsing"),
    ],
)
def test_a_wrong_file_is_an_error_of_collecting_it(project, text, said):
    project.write("model.rbx.yaml", text)
    result = project.run()
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines([f"*{said}*"])


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("tiny:make", "tiny:mak", "Did you mean 'make'"),
        ("npz:data.npz", "npz:dat.npz", "dat.npz"),
        ("steps:", "stepz:", "stepz"),
        ("  - accuracy", "  - acuracy", "Did you mean 'accuracy'"),
    ],
)
def test_a_wrong_name_fails_with_a_sentence(project, old, new, said):
    project.save_data()
    project.write("model.rbx.yaml", MODEL.replace(old, new))
    result = project.run("-k", "0.5")
    result.assert_outcomes(failed=1, deselected=5)
    assert said in result.stdout.str() and "Traceback" not in result.stdout.str()


def test_expectations_are_read():
    first, second, *both = read_expectations(
        [
            "ece <= 0.05",
            "accuracy[fog 3]>=1/2",
            {"metric": "auroc", "probe": "energy", "at_least": 0.8, "between": [0.7, 1]},
        ]
    )
    assert (first.metric, first.statement, first.values) == ("ece", "at_most", ("0.05",))
    assert (second.metric, second.place, second.values) == ("accuracy", {"condition": "fog 3"}, ("1/2",))
    assert [s.statement for s in both] == ["at_least", "between"]
    assert both[0].place == {"probe": "energy"}


def test_a_model_and_a_suite_without_test_files(project):
    project.save_data()
    project.write("conftest.py", "")
    project.write(
        "quick.yaml",
        """
        schema: 1
        name: quick
        data: digits
        n: 150
        models: [{name: none, spec: small-cnn}]
        conditions:
          - {attack: pgd, eps: 0.05, steps: 3}
          - {corruption: [fog, contrast], severity: 2}
          - {outliers: uniform-noise, n: 40}
        detectors: [msp, energy]
        """,
    )
    asked = ("--robust-model=tiny:make", "--robust-suite=quick.yaml", "--robust-data=npz:data.npz", "-rs")
    first = project.run(*asked)
    first.assert_outcomes(passed=1, skipped=6)
    first.stdout.fnmatch_lines(
        [
            "6 skipped",
            "SKIPPED [[]6]*.robustness/suite-quick.yaml-of-tiny-make-*.json is not there yet, --robust-update writes it",
        ]
    )
    strict = project.run(
        *asked, "--robust-strict"
    )  # a run that compares nothing must not look like one that found nothing
    strict.assert_outcomes(passed=1, failed=6)
    strict.stdout.fnmatch_lines(["*measured, and compared with nothing:*--robust-update writes it*"])
    project.run(*asked, "--robust-strict", "--robust-no-baseline").assert_outcomes(passed=7)
    project.run(*asked, "--robust-update").assert_outcomes(passed=7)
    assert len(list((project.path / ".robustness").iterdir())) == 1
    project.run(*asked, "--robust-strict").assert_outcomes(passed=7)
    project.write("tiny.py", (project.path / "tiny.py").read_text().replace("noise=0.0", "noise=4.00"))
    worse = project.run(*asked)
    assert worse.ret == 1
    worse.stdout.fnmatch_lines(
        ["*robust_accuracy (pgd Linf 0.05) is worse than the baseline*", "*--robust-suite=quick.yaml*"]
    )
    chosen = project.run(*asked, "-k", "energy")
    chosen.assert_outcomes(failed=1, deselected=6)
    chosen.stdout.fnmatch_lines(["*is worse than the baseline*", "*reproduce: * -k *energy*--robust-model=tiny:make*"])
    wrong = project.run("--robust-model=tiny:make", "--robust-suite=qick")
    assert wrong.ret == pytest.ExitCode.USAGE_ERROR
    assert "unknown suite 'qick'" in wrong.stderr.str()


def test_a_model_beside_tests_serves_them(project):
    project.write("test_model.py", "def test_model(robustness):\n    robustness(n=50).accuracy.at_least(0.5)\n")
    project.save_data()
    project.run("--robust-model=tiny:make", "--robust-data=npz:data.npz").assert_outcomes(passed=1)
