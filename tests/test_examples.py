"""The example project of the pytest plugin: passes, fails when it should and says what a reader needs, and only then."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

EXAMPLE = Path(__file__).parent.parent / "examples" / "ci"


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy of the example, with a cache that its runs share."""
    folder = tmp_path_factory.mktemp("example") / "ci"
    shutil.copytree(EXAMPLE, folder, ignore=shutil.ignore_patterns("__pycache__", ".pytest_cache"))
    return folder


def run(project, *options):
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--robust-cache=.cache", *options]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout + done.stderr


def spoil(project, size):
    torch.manual_seed(0)
    weights = load_file(str(EXAMPLE / "weights.safetensors"))
    noisy = {name: w + size * w.std() * torch.randn_like(w) for name, w in weights.items()}
    save_file(noisy, str(project / "weights.safetensors"))


def test_the_project_passes(project):
    code, said = run(project)
    assert code == 0, said
    assert "9 pass" in said


def test_a_significant_drop_fails_and_says_what_is_needed(project):
    spoil(project, 0.3)
    code, said = run(project, "tests/test_robustness.py::test_robust_to_attacks")
    assert code == 1, said
    (failure,) = re.findall(r"^E +(robust_accuracy .*(?:\n.*)+?)\n\n|AssertionError: (.*(?:\n.*)+?)\n\n", said, re.M)
    text = "".join(failure)
    assert ">= 0.75" in text  # threshold
    assert "95 % interval" in text
    assert "n = 500" in text
    assert re.search(r"Lost: given:test:\d{6}", text)  # the samples that changed
    assert "python -m pytest tests/test_robustness.py::test_robust_to_attacks" in text  # how to reproduce it


def test_an_insignificant_change_passes(project):
    spoil(project, 0.003)
    code, said = run(project, "tests/test_robustness.py")
    assert code == 0, said
    assert "fail" not in said


def test_the_baseline_is_small_and_of_this_project():
    files = sorted((EXAMPLE / ".robustness").glob("*.json"))
    assert len(files) == 2
    assert all(file.stat().st_size < 4000 for file in files)


def test_ci_files_are_yaml():
    import yaml

    for name in ("github-actions.yml", "gitlab-ci.yml"):
        assert "pytest" in str(yaml.safe_load((EXAMPLE / name).read_text()))
