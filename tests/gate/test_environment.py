"""The plugin in projects of all sorts: switched off, unused, without torch, beside modules of our packages' names, pytest 8."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from robustbench_ext.gate.baseline import file_name
from robustbench_ext.gate.summary import WIDTH, _cut, table

TEST = """
def test_model(robustness, model, test_data):
    r = robustness(model, test_data, attack="pgd", eps=0.05, steps=3, n=100)
    r.robust_accuracy.at_least(0.1)
"""


def test_switched_off(project):
    project.write("test_model.py", TEST + "\ndef test_other():\n    pass\n")
    result = project.run("-p", "no:robustness")
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["*fixture 'robustness' not found*"])
    assert "= robustness =" not in result.stdout.str()


def test_the_marker_is_known_and_the_options_are_one_family(project):
    result = project.run("--markers")
    result.stdout.fnmatch_lines(["@pytest.mark.robustness(attack=..., eps=..., *"])
    text = project.run("--help").stdout.str()
    names = ("strict", "update", "n", "cache", "seed", "report", "budget", "model", "suite", "data", "no-baseline")
    assert all(f"--robust-{name}" in text for name in names)
    assert all(f"robust_{name} (" in text for name in ("strict", "n", "cache", "seed", "budget", "baseline_dir"))


def test_ini_options(project):
    project.write(
        "pyproject.toml",
        '[tool.pytest.ini_options]\nrobust_strict = true\nrobust_seed = "3"\nrobust_baseline_dir = "kept/here"\n',
    )
    (project.path / "pytest.ini").unlink()
    project.write(
        "test_model.py",
        """
def test_model(robustness, model, test_data):
    r = robustness(model, test_data, n=100)
    assert robustness.strict and r.results.suite["seed"] == 3
    r.not_worse_than_baseline("accuracy")
""",
    )
    project.run("--robust-update").assert_outcomes(passed=1)
    assert len(list((project.path / "kept" / "here").glob("*.json"))) == 1


def test_loading_it_imports_nothing_heavy(pytester):
    pytester.makepyfile(
        test_light="""
import sys

def test_nothing():
    heavy = {"torch", "numpy", "scipy", "pydantic", "yaml", "robustbench_ext.gate", "robustbench_ext.errors", "uq", "detectors"}
    assert "robustbench_ext.pytest_plugin" in sys.modules
    assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""
    )
    pytester.runpytest_subprocess("-p", "no:anyio").assert_outcomes(passed=1)


def test_without_torch_tests_are_skipped_with_the_reason(project):
    project.write(
        "hidden.py",
        """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)

sys.meta_path.insert(0, Hidden())
""",
    )
    project.write("conftest.py", "")
    project.write("model.rbx.yaml", "model: tiny:make\ndata: digits\nexpect: [accuracy >= 0.5]\n")
    project.write("test_model.py", "def test_model(robustness):\n    1 / 0\n\ndef test_other():\n    pass\n")
    result = project.pytester.run(
        sys.executable,
        "-c",
        "import hidden, pytest, sys; sys.exit(pytest.main())",
        "-rs",
        "--robust-model=tiny:make",
        "--robust-suite=standard",
    )
    result.assert_outcomes(passed=1, skipped=3)
    result.stdout.fnmatch_lines(
        ["SKIPPED*robustness tests need torch, which cannot be imported here*pip install torch"]
    )


@pytest.mark.parametrize("mode", ["prepend", pytest.param("importlib", marks=pytest.mark.slow)])
def test_modules_of_our_packages_names_beside_the_tests(project, mode):
    """Theirs stay theirs for the tests, ours are ours for the measurements."""
    project.write("uq.py", "MINE = 'uq'\n")
    project.write("reports.py", "MINE = 'reports'\n")
    project.write("defenses/__init__.py", "")
    project.write("defenses/nets.py", "import tiny\n\nclass Net(tiny.Net):\n    pass\n")
    project.write("detectors/data.txt", "a folder without Python\n")
    project.write(
        "test_model.py",
        """
import sys
import pytest
import uq, reports
from defenses.nets import Net

def test_model(robustness, test_data):
    r = robustness(Net().eval(), {"test": test_data, "train": test_data, "calibration": test_data}, attack="pgd", eps=0.05,
                   steps=3, n=100, outliers="uniform-noise", outliers_n=50, detector=["msp", "mahalanobis"], uq="temperature")
    r.robust_accuracy.at_least(0.1)
    r["auroc", "outliers uniform-noise", "mahalanobis"].at_least(0.1)
    r["ece", "clean", "temperature"].at_most(0.9)
    r.not_worse_than_baseline("ece")
    assert (uq.MINE, reports.MINE) == ("uq", "reports")
    assert sys.modules["uq"] is uq and sys.modules["reports"] is reports
    import defenses.nets
    assert defenses.nets.Net is Net and "detectors" not in sys.modules

def test_again(robustness, test_data):
    import uq
    assert uq.MINE == "uq"
    robustness(Net().eval(), test_data, n=100).accuracy.at_least(0.1)
""",
    )
    env = {"PYTHONPATH": str(project.path)} if mode == "importlib" else {}
    project._monkeypatch.setenv("PYTHONPATH", env.get("PYTHONPATH", ""))
    project.start(f"--import-mode={mode}", "--robust-update").assert_outcomes(passed=2)


@pytest.mark.slow
def test_pytest_8(project, tmp_path_factory):
    """The oldest pytest that is supported beside the newest: another one, into a folder of its own."""
    target = tmp_path_factory.mktemp("pytest8")
    found = subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--target", str(target), "pytest==8.0.2"],
        capture_output=True,
        text=True,
    )
    if found.returncode:
        pytest.skip(f"pytest 8 cannot be installed here: {found.stderr[-300:]}")
    project.write("test_model.py", TEST + "    r.not_worse_than_baseline('robust_accuracy')\n")
    project.save_data()
    project.write("model.rbx.yaml", "model: tiny:make\ndata: npz:data.npz\nn: 20\nexpect: [accuracy >= 1.0]\nseed: 0\n")
    env = {**os.environ, "PYTHONPATH": str(target)}

    def run(*args):
        command = [sys.executable, "-m", "pytest", "-p", "no:xdist", "-p", "no:anyio", *args]
        return subprocess.run(command, cwd=project.path, env=env, capture_output=True, text=True).stdout

    text = run("test_model.py", "--robust-update")
    assert "pytest-8.0.2" in text and "1 passed" in text, text
    assert "1 passed" in run("test_model.py", "--robust-strict")
    text = run("model.rbx.yaml")
    assert "accuracy does not decide >= 1" in text and "1 passed, 1 warning" in text, text


def test_a_project_that_is_not_ours_is_collected_as_before(project):
    project.write("conftest.py", "")
    project.write("test_a.py", "def test_a():\n    pass\n")
    project.write("data.yaml", "a: 1\n")
    result = project.run("--collect-only", "-q")
    assert [line for line in result.stdout.lines if "::" in line] == ["test_a.py::test_a"]


def test_the_repository_holds_nothing_to_collect_by_accident():
    root = Path(__file__).resolve().parents[2]
    found = [p for folder in ("tests", "robustbench_ext", "docs") for p in (root / folder).rglob("*.rbx.yaml")]
    assert not found


# Values of options --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--robust-n=many", "--robust-n=many: expected a whole number from 1 on, such as 500"),
        ("--robust-n=0", "--robust-n=0: expected a whole number from 1 on"),
        ("--robust-n=1.5", "--robust-n=1.5: expected a whole number"),
        ("--robust-seed=-1", "--robust-seed=-1: expected a whole number from 0 on"),
        ("--robust-budget=soon", "--robust-budget=soon: expected a time such as 60s, 10m or 1h"),
        ("--robust-budget=-5s", "--robust-budget=-5s: expected a time"),
        ("--robust-confidence=95", "--robust-confidence=95: expected a level from 0.5 to 1"),
        ("--robust-baseline-dir=tiny.py", "--robust-baseline-dir=tiny.py: expected a folder"),
        ("--robust-cache=tiny.py", "--robust-cache=tiny.py: expected a folder"),
        ("--robust-report=.", "--robust-report=.: expected an HTML file to write"),
        ("--robust-data=", "--robust-data=: expected data"),
    ],
)
def test_a_wrong_value_is_said_before_any_test_runs(project, option, said):
    project.write("test_model.py", "def test_other():\n    pass\n")
    result = project.run(option)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: {said.replace('[', '[[]')}*"])


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('robust_n = "many"', "robust_n = many in *pyproject.toml: expected a whole number"),
        ('robust_strict = "maybe"', "robust_strict in *pyproject.toml: *maybe*, expected true or false"),
    ],
)
def test_a_wrong_value_in_the_ini_file_is_said_too(project, line, said):
    project.write("pyproject.toml", f"[tool.pytest.ini_options]\n{line}\n")
    (project.path / "pytest.ini").unlink()
    project.write("test_model.py", "def test_other():\n    pass\n")
    result = project.run()
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: {said}*"])


def test_good_values_pass(project):
    project.write("test_model.py", "def test_other():\n    pass\n")
    given = (
        "--robust-n=1e2",
        "--robust-seed=0",
        "--robust-budget=1.5m",
        "--robust-confidence=0.995",
        "--robust-cache=new",
    )
    project.run(*given).assert_outcomes(passed=1)
    assert not (project.path / "new").exists()


def test_long_names_stay_apart():
    """Cut in the middle on the terminal; baselines' files have more of their hash."""
    names = [f"tests/{'deep/' * 20}test_model.py::test_{'long_' * 30}[{i}]" for i in range(2000)]
    assert len({_cut(name, WIDTH) for name in names}) == len(names)
    assert all(len(_cut(name, WIDTH)) == WIDTH for name in names)
    assert _cut("short", WIDTH) == "short"
    files = {file_name(name) for name in names}
    assert len(files) == len(names)
    assert max(map(len, files)) <= 140
    assert file_name("tests/test_model.py::test_linf") == "test_model.test_linf-6875.json"


def test_expectations_under_two_attacks_can_be_told_apart():
    attacks = ("pgd Linf 0.05", "fgsm Linf 0.05")
    row = {
        "test": "t",
        "outcome": "pass",
        "value": "0.889",
        "low": "0.838",
        "high": "0.926",
        "wanted": "baseline - 0.02",
        "n": 199,
    }
    lines = table([{**row, "name": f"robust_accuracy ({attack})"} for attack in attacks])
    assert all(len(line) <= WIDTH for line in lines)
    assert all(any(f"robust_accuracy ({attack})" in line for line in lines) for attack in attacks)
    assert sum("0.889 [0.838, 0.926] baseline - 0.02  n=199" in line for line in lines) == 2
    (_, short, _) = table([{**row, "name": "ece"}])
    assert "ece" in short and "n=199" in short
