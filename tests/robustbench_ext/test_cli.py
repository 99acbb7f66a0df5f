"""The command line, as a user types it: exit codes, messages, machine-readable output."""

import json
import subprocess
import sys

import pytest
import yaml
from typer.testing import CliRunner

from robustbench_ext.cli.main import app
from robustbench_ext.cli.main import run as entry_point

NETS = """
import torch
def build():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 16), torch.nn.ReLU(), torch.nn.Linear(16, 10))
class Fragile(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = build()
    def forward(self, x):
        if x.requires_grad:
            raise RuntimeError("no gradients")
        return self.inner(x)
def probabilities():
    return torch.nn.Sequential(build(), torch.nn.Softmax(1))
"""


def rbx(*arguments):
    """In process: fast, and errors come back as exceptions that the entry point would turn into exit codes."""
    return CliRunner().invoke(app, [str(a) for a in arguments])


def shell(*arguments, cwd):
    return subprocess.run(
        [sys.executable, "-m", "robustbench_ext.cli.main", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
    )


@pytest.mark.parametrize("kind", ["attacks", "defenses", "detectors", "uq", "datasets", "outliers", "models", "suites"])
def test_list_json(kind):
    items = json.loads(rbx("list", kind, "--json").output)
    assert items
    assert all({"name", "summary"} <= set(item) for item in items)


def test_list_fits_80_columns():
    out = rbx("list").output
    assert max(map(len, out.splitlines())) <= 80
    assert "quickstart" in out


def test_help_and_version():
    assert "quickstart" in rbx("--help").output
    assert rbx("--version").output.startswith("robustbench-ext ")
    for command in ("run", "train", "check", "list", "report", "doctor"):
        assert rbx(command, "--help").exit_code == 0


def test_help_can_be_read_at_80_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    overview, options = rbx("--help").output, rbx("check", "--help").output
    assert max(map(len, (overview + options).splitlines())) <= 80
    assert "that costs no robustness (RiFT, arXiv 2308.02533)" in " ".join(
        overview.split()
    )  # the whole first paragraph
    assert "Example:" not in overview  # and no more than that
    assert "…" not in overview + options
    lines = options.splitlines()
    assert any(line.split() == ["--allow-unsafe-load", "As", "in", "`rbx", "run`."] for line in lines)


def test_run_report_and_resume_from_the_shell(tmp_path, tiny_suite):
    (tmp_path / "nets.py").write_text(NETS)
    tiny_suite.update(n=60, models=[{"name": "x", "spec": "y"}])
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(tiny_suite))
    command = (
        "run",
        "mine.yaml",
        "--out",
        "out",
        "--model",
        "mine=nets.py:build",
        "--set",
        "seed=3",
        "--executor",
        "serial",
    )
    first = shell(*command, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert first.stdout.strip().endswith("report: out/report.html")
    assert "mine · apgd-ce Linf 0.1" in first.stderr
    assert max(len(line) for line in (first.stdout + first.stderr).splitlines()) <= 80
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["schema_version"] == 1
    assert results["suite"]["seed"] == 3
    html = (tmp_path / "out" / "report.html").read_bytes()
    assert (tmp_path / "out" / "report.md").is_file()
    second = shell(*command, cwd=tmp_path)
    assert "nothing to compute" in second.stderr
    (tmp_path / "out" / "report.html").unlink()
    third = shell("report", "out", cwd=tmp_path)
    assert third.returncode == 0
    assert len((tmp_path / "out" / "report.html").read_bytes()) == pytest.approx(len(html), rel=0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "quikstart"), "Did you mean 'quickstart'"),
        (("run", "quickstart", "--set", "m=3"), "unknown key 'm'"),
        (("run", "quickstart", "--data", "mnist5"), "Did you mean 'mnist5k'"),
        (("run", "quickstart", "--executor", "locale"), "Did you mean 'local'"),
        (("check", "--model", "small-cnm", "--data", "digits"), "Did you mean 'small-cnn'"),
        (("report", "."), "no results.json"),
        (("list", "attack"), "Did you mean 'attacks'"),
        (("train", "tradse", "--data", "digits", "--out", "o"), "Did you mean 'trades'"),
        (("train", "trades", "--data", "digits", "--out", "o", "--set", "epoch=3"), "Did you mean 'epochs'"),
        (("run",), "Missing argument"),
    ],
)
def test_usage_errors_are_one_sentence_and_exit_code_2(arguments, message, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["rbx", *arguments])
    with pytest.raises(SystemExit) as end:
        entry_point()
    said = capfd.readouterr().err
    assert end.value.code == 2, said
    assert message in " ".join(said.replace("│", " ").split())
    assert "Traceback" not in said


def test_a_usage_error_in_the_shell(tmp_path):
    done = shell("run", "quikstart", cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "Did you mean 'quickstart'" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_check(tmp_path, monkeypatch):
    (tmp_path / "nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    good = rbx("check", "--model", "nets.py:build", "--data", "digits", "--json")
    report = json.loads(good.output)
    assert report["verdict"] in ("pass", "doubt")
    assert good.exit_code == 0
    assert {"name", "status", "message", "hint"} <= set(report["checks"][0])
    bad = rbx("check", "--model", "nets.py:probabilities", "--data", "digits")
    assert bad.exit_code == 1
    assert "FAIL" in bad.output
    assert "Remove the last softmax" in " ".join(bad.output.split())


def test_a_run_whose_preflight_fails_or_whose_cells_fail_says_so(tmp_path, tiny_suite):
    (tmp_path / "nets.py").write_text(NETS)
    tiny_suite.update(n=60, conditions=[{"corruption": "gaussian-noise", "severity": 1}])
    tiny_suite["models"] = [{"name": "p", "spec": "nets.py:probabilities"}]
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(tiny_suite))
    checked = shell("run", "a.yaml", "--out", "a", cwd=tmp_path)
    assert checked.returncode == 1
    assert "nothing to compute" not in checked.stderr
    assert "Not to be trusted" in (tmp_path / "a" / "report.html").read_text()
    tiny_suite["conditions"].append({"attack": "fgsm", "eps": 0.1})
    tiny_suite["models"] = [{"name": "f", "spec": "nets.py:Fragile"}]
    (tmp_path / "b.yaml").write_text(yaml.safe_dump(tiny_suite))
    partial = shell("run", "b.yaml", "--out", "b", cwd=tmp_path)
    assert partial.returncode == 4
    assert "could not be computed" in (tmp_path / "b" / "report.html").read_text()


def test_train(tmp_path):
    command = (
        "train",
        "trades",
        "--data",
        "digits",
        "--out",
        "m",
        "--set",
        "epochs=2",
        "--set",
        "beta=3",
        "--set",
        "net.width=4",
    )
    done = shell(*command, "--set", "attack_steps=2", "--set", "eps=8/255", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    described = json.loads((tmp_path / "m" / "model.json").read_text())
    assert described["defense"]["beta"] == 3.0
    assert described["recipe"]["eps"] == 8 / 255
    assert described["architecture"]["kwargs"] == {"width": 4}
    assert "epoch   2/2" in done.stderr
    checked = shell("check", "--model", "m", "--data", "digits", cwd=tmp_path)
    assert checked.returncode == 0, checked.stdout


def test_doctor():
    done = rbx("doctor")
    assert done.exit_code == 0
    assert "torch" in done.output


def test_check_fails_on_a_layer_that_rounds(tmp_path, monkeypatch, digits_model):
    """Its gradients are zero: every gradient attack would call it robust."""
    import torch

    torch.save(digits_model.state_dict(), tmp_path / "weights.pt")
    (tmp_path / "rounds.py").write_text(
        "import torch\n"
        "from robustbench_ext.models.networks import SmallCNN\n"
        "class Rounds(SmallCNN):\n"
        "    def forward(self, x):\n"
        "        return super().forward(torch.round(x * 8) / 8)\n"
        "def build():\n"
        "    model = Rounds(1, 10, 8)\n"
        "    model.load_state_dict(torch.load('weights.pt'))\n"
        "    return model\n"
    )
    monkeypatch.chdir(tmp_path)
    done = rbx("check", "--model", "rounds.py:build", "--data", "digits")
    assert done.exit_code == 1
    said = " ".join(done.output.split())
    assert "FAIL gradients: the input gradient is exactly zero" in said
    assert "DOUBT huge budget" in said
    assert "verdict: fail" in said
