"""The examples of methods and data of one's own: they run as their files say, and keep what every method must."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from reports import write_reports
from robustbench_ext.cli.main import app
from robustbench_ext.data import load_dataset
from robustbench_ext.engine import run_suite
from robustbench_ext.suite import load_suite

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working directory with a copy of the examples, and the data that one of them writes."""
    here = tmp_path_factory.mktemp("own")
    (here / "examples").mkdir()
    for file in EXAMPLES.glob("own_*"):
        shutil.copy(file, here / "examples")
    command = [sys.executable, "examples/own_data.py", "runs/own-data"]
    done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=True)
    assert done.stdout == "1797 images in runs/own-data: give them as folder:runs/own-data\n"
    return here


def test_the_folder_holds_the_digits(folder):
    files = sorted((folder / "runs" / "own-data").rglob("*.png"))
    assert len(files) == 1797
    assert {file.parent.name for file in files} == set("0123456789")
    data, bundled = load_dataset(f"folder:{folder / 'runs' / 'own-data'}"), load_dataset("digits")
    assert data.shape == bundled.shape == (1, 8, 8)
    assert sum(len(split) for split in data.splits.values()) == 1797
    assert Image.open(files[0]).size == (8, 8)


def test_the_suite_runs(folder, monkeypatch):
    monkeypatch.chdir(folder)
    suite = load_suite("examples/own_suite.yaml", settings=["n=60", "models.0.train.recipe.epochs=3"])
    done = run_suite(suite, "runs/own")
    assert not done.failures
    measured = {row.condition for row in done.results.results}
    assert {
        "lion Linf 0.05",
        "lion Linf 0.1",
        "pgd Linf 0.1",
        "scanline 1",
        "scanline 5",
        "outliers letters",
    } <= measured
    assert done.results.find(probe="logit-prototype", metric="auroc", condition="outliers letters")

    def accuracy(condition, metric):
        return done.results.find(condition=condition, metric=metric, probe="classifier", group=None)[0].value

    # More budget, and more dark rows, are not easier.
    assert accuracy("lion Linf 0.1", "robust_accuracy") < accuracy("clean", "accuracy")
    assert accuracy("scanline 5", "accuracy") < accuracy("scanline 1", "accuracy")
    assert accuracy("clean", "top_2") >= accuracy("clean", "accuracy")
    text = write_reports(done.folder)["markdown"].read_text()
    assert "Metrics of your own" in text


def test_the_methods_keep_what_they_must(folder, monkeypatch):
    """By the very commands that stand in the files."""
    monkeypatch.chdir(folder)
    lines = [line.strip(" #") for file in folder.glob("examples/own_*") for line in file.read_text().splitlines()]
    commands = [line.partition("#")[0].split()[1:] for line in lines if line.startswith("rbx check")]
    assert len(commands) == 2
    for command in commands:
        done = CliRunner().invoke(app, [*command, "--json"])
        said = json.loads(done.output)
        assert (done.exit_code, said["verdict"]) == (0, "pass")
        assert len(said["checks"]) == (6 if "--attack" in command else 3)
