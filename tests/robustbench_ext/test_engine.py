"""Whole runs on a tiny suite: resume, keys, engines, faults. The same numbers whatever happens on the way."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from robustbench_ext.engine import Progress, run_suite
from robustbench_ext.evaluate import Cell, Context
from robustbench_ext.metrics import METRICS
from robustbench_ext.results import RunResults
from robustbench_ext.suite import validate_suite


def values(folder):
    return (folder / "results.json").read_bytes(), (folder / "results.csv").read_bytes()


def test_a_run_gives_every_kind_of_result(finished):
    folder, summary = finished
    assert summary.trained == 2
    assert not summary.failures
    assert summary.verdict in ("pass", "doubt")
    results = RunResults.read(folder / "results.json")
    assert results == summary.results
    metrics = {row.metric for row in results.results}
    elsewhere = {"broken_by"} | {"audited_accuracy", "screen_accuracy", "audited_share"}  # of ensembles and audits only
    elsewhere |= {"median_norm", "targeted_success"}  # of minimum-norm and of targeted attacks only
    elsewhere |= {m for m in METRICS if "difficulty" in m}  # where a suite asks for difficulty
    shots = {"many_shot", "medium_shot", "few_shot", "head", "tail"}  # of long-tailed training data only
    elsewhere |= {f"{name}_accuracy" for name in shots}
    elsewhere |= {"relative_accuracy", "robust_relative_accuracy"}  # where a suite says relative to what
    sets = {m for m in METRICS if m.startswith("set_")}  # of prediction sets only
    intervals = {
        "coverage",
        "coverage_above",
        "coverage_below",
        "crossing_rate",
        "crps",
        "error_rise",
        "error_spearman",
    }
    intervals |= {
        "interval_ece",
        "interval_score",
        "mae",
        "pinball",
        "quantile_ece",
        "r2",
        "rmse",
        "sharpness",
        "side_error",
    }
    intervals |= {"width", "width_normalised", "width_stratified_coverage", "wis_mean", "wis_sum", "ause"}
    intervals |= {"worst_group_coverage", "worst_slab_coverage"}  # of regressors only
    sets |= {
        "worst_domain_accuracy",
        "accuracy_drop",
        "mean_corruption_error",
        "corruption_mce",
        "corruption_relative_mce",
    }  # of whole benchmarks
    truth = {
        "coverage_gap",
        "coverage_shortfall",
        "epistemic_spearman",
        "excess_nll",
        "kl_normal",
        "kl_p",
        "ks_error",
        "log_variance_error",
        "mse_mean",
        "mse_p",
        "noise_spearman",
        "true_coverage",
        "truth_error_spearman",
    }  # of data that knows it
    in_python = {"ace", "tace", "augrc"}  # for those who ask for them
    assert metrics == set(METRICS) - elsewhere - sets - intervals - truth - in_python
    assert set(results.metrics) == set(METRICS)
    for row in results.results:
        if row.value is not None and row.ci_low is not None:
            assert row.ci_low <= row.value + 1e-12, row
            assert row.value <= row.ci_high + 1e-12, row
        assert row.n > 0 or row.reason
    labels = [c["label"] for c in results.conditions]
    assert labels[0] == "clean"
    assert "worst case Linf 0.1" in labels
    header, *lines = (folder / "results.csv").read_text().splitlines()
    assert header.startswith("model,condition,probe,metric,value,ci_low,ci_high")
    assert len(lines) == len(results.results)


def test_worst_case_is_the_per_sample_and_over_smaller_budgets_too(finished, tiny_suite):
    folder, summary = finished
    context = Context(validate_suite(tiny_suite), folder)
    results = summary.results
    for model in ("standard", "trades"):
        verdicts = []
        for label in ("clean", "pgd Linf 0.05", "pgd Linf 0.1", "apgd-ce Linf 0.1"):
            cells = [Cell(model, label, "test", c) for c in range(2)]
            tables = [context.store.load(context.observation_key(c)) for c in cells]
            verdicts.append(
                np.concatenate([~t["broken"] if "broken" in t else t["logits"].argmax(1) == t["label"] for t in tables])
            )
        expected = np.logical_and.reduce(verdicts).mean()
        found = results.find(model=model, condition="worst case Linf 0.1", metric="robust_accuracy", group=None)
        assert found[0].value == pytest.approx(expected, abs=1e-12)
        entry = next(c for c in results.conditions if c["label"] == "worst case Linf 0.1")
        assert entry["over"] == ["pgd Linf 0.05", "pgd Linf 0.1", "apgd-ce Linf 0.1"]


def test_detection_counts_only_inputs_that_fooled_the_classifier(finished):
    _, summary = finished
    for model in ("standard", "trades"):
        robust = summary.results.find(model=model, condition="apgd-ce Linf 0.1", metric="robust_accuracy", group=None)[
            0
        ]
        clean = summary.results.find(model=model, condition="clean", metric="accuracy", group=None, probe="classifier")[
            0
        ]
        auroc = summary.results.find(model=model, condition="apgd-ce Linf 0.1", metric="auroc", probe="msp")[0]
        assert auroc.n == 120 + round(120 * (clean.value - robust.value)) or auroc.value is None


def test_temperature_changes_calibration_and_no_prediction(finished):
    _, summary = finished
    for model in summary.results.models:
        assert model["fitted"]["temperature"]["temperature"] > 0
    rows = summary.results.find(condition="clean", metric="nll", group=None)
    by = {(r.model, r.probe): r.value for r in rows}
    assert by["standard", "temperature"] != by["standard", "classifier"]


def test_running_again_computes_nothing(finished, tiny_suite):
    folder, first = finished
    before = values(folder)
    lines = []
    again = run_suite(tiny_suite, folder, progress=Progress(line=lambda *a: lines.append(a)))
    assert (again.computed, again.trained) == (0, 0)
    assert again.reused == first.computed
    assert lines == []
    assert values(folder) == before


def test_the_engine_does_not_change_a_number(finished, tmp_path, tiny_suite):
    folder, _ = finished
    run_suite(tiny_suite, tmp_path / "local", executor="local", workers=2)
    assert values(tmp_path / "local") == values(folder)


def test_a_damaged_or_deleted_record_is_computed_again(finished, tmp_path, tiny_suite):
    import shutil

    folder, _ = finished
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    records = sorted((copy / "records").glob("*.npz"))
    records[0].write_bytes(b"nonsense")
    records[-1].unlink()
    again = run_suite(tiny_suite, copy)
    assert 1 <= again.computed <= 2
    assert values(copy) == values(folder)


def test_more_samples_and_another_detector_reuse_what_is_there(finished, tmp_path, tiny_suite):
    import shutil

    folder, first = finished
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    more = {
        **tiny_suite,
        "detectors": ["msp", "energy", "mahalanobis", {"name": "energy", "temperature": 2, "label": "warm"}],
    }
    keys = {p.name for p in (copy / "records").glob("*.npz")}
    again = run_suite(more, copy)
    new = {p.name for p in (copy / "records").glob("*.npz")} - keys
    tests = [
        c
        for name in ("standard", "trades")
        for c in Context(validate_suite(more), copy).cells(name)
        if c.split != "train"
    ]
    assert len(new) == len(tests)  # one record of the new detector per cell, and no attack again
    assert again.trained == 0
    assert {r.probe for r in again.results.results} >= {"warm"}
    assert first.results.find(probe="msp") == again.results.find(probe="msp")


def test_a_key_changes_with_everything_it_names(finished, tiny_suite):
    folder, _ = finished
    cell = Cell("standard", "pgd Linf 0.1", "test", 0)

    def key(**changes):
        return Context(validate_suite({**tiny_suite, **changes}), folder).observation_key(cell)

    base = key()
    assert key() == base
    assert key(seed=1) != base
    assert key(chunk_size=50) != base
    assert key(batch_size=16) == base
    assert key(n=100) == base  # the same first 60 samples
    assert key(conditions=[{"attack": "pgd", "eps": 0.1, "steps": 6, "stop": "never"}]) != base
    assert key(detectors=["msp"]) != base  # no penultimate features are read then
    context = Context(validate_suite(tiny_suite), folder)
    assert context.observation_key(Cell("trades", "pgd Linf 0.1", "test", 0)) != base
    assert context.observation_key(Cell("standard", "pgd Linf 0.1", "test", 1)) != base


BROKEN = """
import torch
class Fine(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = torch.nn.Linear(64, 16), torch.nn.Linear(16, 10)
    def forward(self, x):
        return self.b(torch.relu(self.a(x.flatten(1))))
class Fragile(Fine):
    def forward(self, x):
        z = super().forward(x)
        if torch.is_grad_enabled() and x.requires_grad:
            raise RuntimeError("no gradients here")
        return z
class Probabilities(Fine):
    def forward(self, x):
        return super().forward(x).softmax(1)
"""


def test_what_fails_is_kept_apart_and_the_rest_goes_on(tmp_path, tiny_suite):
    (tmp_path / "nets.py").write_text(BROKEN)
    spec = f"{tmp_path / 'nets.py'}"
    suite = {
        **tiny_suite,
        "n": 60,
        "models": [
            {"name": "fine", "spec": f"{spec}:Fine"},
            {"name": "fragile", "spec": f"{spec}:Fragile"},
            {"name": "probabilities", "spec": f"{spec}:Probabilities"},
            {"name": "missing", "spec": f"{spec}:Nothing"},
        ],
    }
    summary = run_suite(suite, tmp_path / "run")
    failed = {f.what: f.error for f in summary.failures}
    line = 1 + BROKEN[: BROKEN.index("raise")].count("\n")  # the user's own, not where PGD called the model
    assert failed["fragile · pgd Linf 0.1"] == f"RuntimeError: no gradients here (nets.py, line {line})"
    # A contract is broken: the preflight says so, and nothing of the model is evaluated.
    assert not any(what.startswith("probabilities") for what in failed)
    assert any(f.model == "probabilities" and f.status == "fail" for f in summary.results.preflight)
    assert "probabilities was not evaluated: its preflight failed" in summary.results.notes
    assert "Nothing" in failed["missing"]
    assert not any(what.startswith("fine") for what in failed)
    assert summary.verdict == "fail"
    names = {row.model for row in summary.results.results}
    assert names == {"fine", "fragile"}
    assert summary.results.find(model="fragile", condition="gaussian-noise 1", metric="accuracy")
    assert not summary.results.find(model="fragile", condition="pgd Linf 0.1")
    # A worst case over the attacks that happened to work would look better than it is.
    (worst,) = summary.results.find(model="fragile", condition="worst case Linf 0.1", metric="robust_accuracy")
    assert worst.value is None
    assert "pgd Linf 0.1" in worst.reason
    assert "RuntimeError: no gradients here" in (tmp_path / "run" / "failures.log").read_text()
    json.loads((tmp_path / "run" / "results.json").read_text())


def test_a_failed_training_stops_its_model_only(tmp_path, tiny_suite):
    suite = tiny_suite
    suite["models"][1]["train"]["recipe"]["lr"] = 1e30
    summary = run_suite(suite, tmp_path / "run")
    assert [f.what for f in summary.failures] == ["trades · training"]
    assert {row.model for row in summary.results.results} == {"standard"}


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
@pytest.mark.parametrize("executor", ["serial", "local"])
def test_killed_and_run_again_gives_the_same_results(finished, tmp_path, executor, tiny_suite):
    folder, _ = finished
    file, out = tmp_path / "tiny.yaml", tmp_path / "run"
    file.write_text(yaml.safe_dump(tiny_suite))
    command = [
        sys.executable,
        "-m",
        "robustbench_ext.cli.main",
        "run",
        str(file),
        "--out",
        str(out),
        "--executor",
        executor,
    ]
    for wanted in (3, 9):
        process = subprocess.Popen(
            command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True
        )
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if len(list(out.glob("records/*.json"))) >= wanted:
                break
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr
    assert values(out) == values(folder)


def test_a_model_that_is_never_the_same_twice_is_a_failure_not_an_empty_report(tmp_path, tiny_suite):
    code = "import os, torch\ndef build():\n    torch.manual_seed(int.from_bytes(os.urandom(4), 'big'))\n"
    (tmp_path / "nets.py").write_text(
        code + "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))\n"
    )
    suite = {**tiny_suite, "models": [{"name": "random", "spec": f"{tmp_path / 'nets.py'}:build"}]}
    summary = run_suite(suite, tmp_path / "run", executor="local", workers=2)
    assert summary.failures
    assert any("differs each time" in f.error for f in summary.failures)


def test_exceptions_that_do_not_survive_pickling_are_failures_like_any_other(tmp_path, tiny_suite):
    code = """
import torch
class Odd(Exception):
    def __init__(self, a, b):
        super().__init__(f"{a}-{b}")
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(64, 10)
    def forward(self, x):
        if x.requires_grad:
            raise Odd(1, 2)
        return self.fc(x.flatten(1))
class Exits(Net):
    def forward(self, x):
        if x.requires_grad:
            raise SystemExit(0)
        return self.fc(x.flatten(1))
"""
    (tmp_path / "nets.py").write_text(code)
    models = [{"name": n, "spec": f"{tmp_path / 'nets.py'}:{n}"} for n in ("Net", "Exits")]
    suite = {**tiny_suite, "models": models, "detectors": [], "uq": []}
    for executor in ("local", "serial"):
        summary = run_suite(suite, tmp_path / executor, executor=executor, workers=2)
        failed = {f.what: f.error for f in summary.failures}
        assert "Odd: 1-2" in failed["Net · pgd Linf 0.1"]
        assert "SystemExit" in failed["Exits · pgd Linf 0.1"]
        assert summary.results.find(model="Net", condition="gaussian-noise 1", metric="accuracy")


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="looks for processes in /proc")
def test_workers_end_with_the_run_that_started_them(tmp_path, tiny_suite):
    tiny_suite["models"][0]["train"]["recipe"]["epochs"] = 400  # long enough to be killed in the middle
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny_suite))
    command = [
        sys.executable,
        "-m",
        "robustbench_ext.cli.main",
        "run",
        "tiny.yaml",
        "--executor",
        "local",
        "--workers",
        "2",
    ]
    process = subprocess.Popen(
        command, cwd=tmp_path, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True
    )

    def session():
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and os.getsid(int(entry.name)) == process.pid:
                    state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                    if state != "Z":
                        found.append(int(entry.name))
            except OSError:
                continue
        return found

    def wait_for(condition, seconds):
        deadline = time.monotonic() + seconds
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.2)
        return condition()

    try:
        assert wait_for(lambda: list(tmp_path.rglob("progress.json")), 180), "training did not start"
        assert len(session()) >= 3
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert wait_for(lambda: not session(), 20), "workers outlived their run"
    finally:
        for pid in session():
            os.kill(pid, signal.SIGKILL)
