"""Baselines: written, read, compared on the same samples, refused where something else was measured."""

import json

import numpy as np
import pytest

from robustbench_ext.errors import DataError
from robustbench_ext.gate.baseline import file_name
from robustbench_ext.gate.kept import decode, encode

TEST = """
def test_model(robustness, model, test_data):
    r = robustness(model, test_data, attack="pgd", eps=0.05, steps=3, n=300)
    r.not_worse_than_baseline("robust_accuracy", margin=MARGIN)
"""
CHANGED = 0.4  # noise of the weights that leaves accuracy as it is
WORSE = 4.0  # and that does not


def baseline(project):
    (file,) = (project.path / ".robustness").glob("*.json")
    return file, json.loads(file.read_text())


def test_from_missing_to_worse(project):
    project.write("test_model.py", TEST.replace("MARGIN", "0"))
    missing = project.run()
    missing.assert_outcomes(failed=1)
    missing.stdout.fnmatch_lines(["*there is no baseline .robustness/test_model.test_model-*.json*--robust-update*"])
    written = project.run("--robust-update")
    written.assert_outcomes(passed=1)
    written.stdout.fnmatch_lines(["baseline .robustness/test_model.test_model-*.json: robust_accuracy (pgd*"])
    file, content = baseline(project)
    assert content["metrics"][0]["metric"] == "robust_accuracy"
    assert content["common"]["samples"]["n"] == 300

    same = project.run("--robust-strict")
    same.assert_outcomes(passed=1)
    assert file.read_text() == json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    changed = project.run("--robust-strict", noise=CHANGED)
    changed.assert_outcomes(passed=1)

    worse = project.run(noise=WORSE)
    worse.assert_outcomes(failed=1)
    worse.stdout.fnmatch_lines(
        [
            "*AssertionError: robust_accuracy (pgd Linf 0.05) is worse than the baseline: 0.* then, 0.* now (n = 300)",
            "*difference -0.*, 95 % interval -0.* to -0.* (Newcombe, paired), p = * (exact McNemar)",
            "*right in the baseline and wrong now: *, wrong then and right now: *. Lost: given:test:*",
            "*reproduce: python -m pytest test_model.py::test_model",
        ]
    )
    ids = {w.strip(",") for w in worse.stdout.str().split("Lost: ")[1].splitlines()[0].split()}
    assert len([i for i in ids if i.startswith("given:test:")]) == 5
    skipped = project.run("--robust-no-baseline", noise=WORSE)
    skipped.assert_outcomes(passed=1)
    skipped.stdout.fnmatch_lines(["1 skipped"])
    updated = project.run("--robust-update", noise=WORSE)
    updated.assert_outcomes(passed=1)
    assert " samples lost, " in " ".join(updated.stdout.str().split())
    project.run("--robust-strict", noise=WORSE).assert_outcomes(passed=1)


def test_a_margin_has_to_be_excluded(project):
    project.write("test_model.py", TEST.replace("MARGIN", "0.002"))
    project.run("--robust-update").assert_outcomes(passed=1)
    # The model itself has nothing to prove.
    project.run("--robust-strict").assert_outcomes(passed=1)
    result = project.run(noise=CHANGED)
    result.assert_outcomes(passed=1, warnings=1)
    result.stdout.fnmatch_lines(["*may be worse than the baseline by more than 0.002*", "*1 inconclusive"])
    project.run("--robust-strict", noise=CHANGED).assert_outcomes(failed=1)
    project.write("test_model.py", TEST.replace("MARGIN", "0.2"))
    project.run("--robust-strict", noise=CHANGED).assert_outcomes(passed=1)
    project.run(noise=WORSE).assert_outcomes(failed=1)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("eps=0.05", "eps=0.06", "eps 0.05 / 0.06"),
        ("steps=3", "steps=4", "steps 3 / 4"),
        ("n=300", "n=200", "samples n: 300 / 200"),
        ("n=300", "n=300, seed=1", "seed: 0 / 1"),
        ('attack="pgd"', 'attack="mi-fgsm"', "attack: pgd / mi-fgsm"),
        ("test_data,", "(test_data[0].flip(0), test_data[1].flip(0)),", "test samples: other"),
        ("test_data,", "((test_data[0] * 0.99), test_data[1]),", "test samples: other content"),
        ('"robust_accuracy"', '"accuracy"', "it holds no accuracy, only robust_accuracy"),
    ],
)
def test_something_else_is_refused(project, old, new, said):
    test = TEST.replace("MARGIN", "0")
    project.write("test_model.py", test)
    project.run("--robust-update").assert_outcomes(passed=1)
    assert old in test
    project.write("test_model.py", test.replace(old, new))
    result = project.run()
    result.assert_outcomes(failed=1)
    text = " ".join(result.stdout.str().split())
    assert "measured something else (then / now)" in text and "--robust-update" in text
    words = said.replace(": ", " ").split()
    start = text.index("(then / now)")
    assert all(word in text[start : start + 600] for word in words), text[start : start + 600]
    if "steps" in said:
        project.run("--robust-update").assert_outcomes(passed=1)
        project.run("--robust-strict").assert_outcomes(passed=1)


def test_another_version_of_the_attack_is_refused(project):
    project.write("test_model.py", TEST.replace("MARGIN", "0"))
    project.run("--robust-update")
    file, content = baseline(project)
    content["conditions"]["pgd Linf 0.05"]["spec"]["version"] = 0
    file.write_text(json.dumps(content))
    project.run().stdout.fnmatch_lines(["*measured something else (then / now): pgd Linf 0.05 version: 0 / *"])


@pytest.mark.parametrize("damage", ["{", "[]", '{"schema": 2}', None])
def test_a_damaged_baseline_is_said(project, damage):
    project.write("test_model.py", TEST.replace("MARGIN", "0"))
    project.run("--robust-update")
    file, content = baseline(project)
    if damage is None:
        content["metrics"][0]["kept"]["right"][0] = content["metrics"][0]["kept"]["right"][0][:-2]
        damage = json.dumps(content)
    file.write_text(damage)
    result = project.run(noise=CHANGED)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*ConfigError: baseline *--robust-update*"])
    project.run("--robust-update").assert_outcomes(passed=1)
    project.run().assert_outcomes(passed=1)


EVERY = """
def measure(robustness, model, test_data):
    x, y = test_data
    return robustness(model, {"test": test_data, "train": test_data, "calibration": (x[:90], y[:90])},
                      attack=["pgd", "fgsm"], eps=0.05, outliers="uniform-noise", outliers_n=80,
                      uq=[{"name": "aps", "alpha": 0.2}], corruption=["contrast", "fog"], severity=3, conditions=[])

METRICS = [
    ("accuracy",), ("robust_accuracy",), ("ece",), ("nll",), ("brier",), ("worst_class_accuracy",), ("balanced_accuracy",),
    ("robust_worst_class_accuracy",), ("robust_accuracy", "pgd Linf 0.05"), ("ece", "pgd Linf 0.05"), ("auroc",),
    ("auroc", "pgd Linf 0.05", "energy"), ("corrupted_accuracy",), ("set_size",),
]

def test_all(robustness, model, test_data):
    r = measure(robustness, model, test_data)
    for metric in METRICS:
        r.metric(*metric).not_worse_than_baseline()
    r.set_coverage.not_worse_than_baseline(higher_is_better=True)

def test_restored(robustness, model, test_data):
    import numpy as np
    r = measure(robustness, model, test_data)
    for metric in METRICS:
        found = r.metric(*metric)
        quantity = r._quantity(found)
        kept, stat = quantity.keep(), quantity.statistic()
        back = quantity.restore(kept)
        assert type(back) is type(stat) and np.array_equal(back.ids, stat.ids)
        for name in ("right", "values", "value", "drawn", "unknown_ids"):
            if hasattr(stat, name):
                a, b = getattr(stat, name), getattr(back, name)
                # Five digits are kept: a confidence may cross the edge of a bin, and one sample is 1 / 300.
                assert (a == b).all() if name == "unknown_ids" else np.allclose(a, b, rtol=1e-4, atol=1e-4), (metric, name)
        if hasattr(stat, "unknown"):
            from robustbench_ext.metrics.detection import auroc
            assert auroc(back.clean, back.unknown).value == auroc(stat.clean, stat.unknown).value
            assert abs(auroc(back.clean, back.unknown).value - found.value) < 1e-12

def test_refused(robustness, model, test_data):
    import pytest
    from robustbench_ext.errors import ConfigError
    r = measure(robustness, model, test_data)
    with pytest.raises(ConfigError, match="sample-by-sample"):
        r.not_worse_than_baseline("fpr95")
    with pytest.raises(ConfigError, match="neither direction"):
        r.not_worse_than_baseline("set_coverage")
    with pytest.raises(ConfigError, match="margin"):
        r.not_worse_than_baseline("accuracy", margin=-1)
"""


def test_all_kinds_of_metrics_keep_their_samples(project):
    project.write("test_model.py", EVERY.replace("eps=0.05", "eps=0.05, n=300"))
    project.run("--robust-update").assert_outcomes(passed=3)
    _, content = baseline(project)
    assert len(content["metrics"]) == 15
    sizes = {(e["metric"], e["condition"]): len(json.dumps(e)) for e in content["metrics"]}
    assert max(sizes.values()) < 4000, sizes
    # Weights that are moved a little: all comparisons are made, and none finds anything.
    result = project.run("-W", "ignore", "-k", "all", noise=0.02)
    result.assert_outcomes(passed=1, deselected=2)
    result.stdout.fnmatch_lines(["15 pass"])


@pytest.mark.parametrize("metric", ["ece", "nll", "auroc", "robust_worst_class_accuracy"])
def test_each_kind_finds_a_drop(project, metric):
    data = "outliers='uniform-noise', outliers_n=80, attack='fgsm', eps=0.05, n=300"
    project.write(
        "test_model.py",
        f"""
import torch
from torch import nn

class Blunt(nn.Module):
    def __init__(self, inner, flat):
        super().__init__()
        self.inner, self.flat = inner, flat
    def forward(self, x):
        z = self.inner(x)
        return z * 0.02 * torch.tensor([1.0, 1.0, -1.0]) if self.flat else z

def test_model(robustness, model, test_data):
    import os
    r = robustness(Blunt(model, os.environ["NOISE"] != "0.0").eval(), test_data, {data}, accept=["logits", "normalisation"])
    r.not_worse_than_baseline("{metric}")
""",
    )
    project.run("--robust-update", "-W", "ignore").assert_outcomes(passed=1)
    result = project.run("-W", "ignore", noise=0.1)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines([f"*AssertionError: {metric.removeprefix('robust_')}*is worse than the baseline*"])
    text = result.stdout.str()
    assert "Lost: " in text or "changed most for the worse: " in text


def test_several_measurements_in_a_test_have_files_of_their_own(project):
    project.write(
        "test_model.py",
        """
def test_model(robustness, model, test_data):
    a = robustness(model, test_data, n=60)
    b = robustness(model, test_data, n=90)
    a.not_worse_than_baseline("accuracy")
    b.not_worse_than_baseline("accuracy")
    robustness(model, test_data, n=60).not_worse_than_baseline("ece")
    robustness(model, test_data, n=120, name="mine").not_worse_than_baseline("accuracy")
""",
    )
    project.run("--robust-update").assert_outcomes(passed=1)
    files = {json.loads(f.read_text())["test"]: f for f in (project.path / ".robustness").glob("*.json")}
    assert sorted(files) == ["mine", "test_model.py::test_model", "test_model.py::test_model 2"]
    metrics = json.loads(files["test_model.py::test_model"].read_text())["metrics"]
    assert [m["metric"] for m in metrics] == ["accuracy", "ece"]
    project.run().assert_outcomes(passed=1)


def test_file_names_are_readable_and_different():
    assert file_name("tests/test_a.py::TestX::test_b[8/255-Linf]").startswith("test_a.TestX.test_b-8-255-Linf-")
    names = [
        file_name(n)
        for n in ("a/test_a.py::test_b", "b/test_a.py::test_b", "test_a.py::test_b[a/b]", "test_a.py::test_b[a b]")
    ]
    assert len(set(names)) == 4


def test_kept_samples_survive_the_file():
    rng = np.random.default_rng(0)
    for n in (1, 7, 8, 9, 255, 256, 257, 500):
        kept = {"right": rng.random(n) < 0.5, "confidence": np.array([float(f"{v:.5g}") for v in rng.random(n)])}
        text = encode(kept)
        assert max(len(line) for lines in text.values() for line in lines) <= 100
        back = decode(json.loads(json.dumps(text)), {"right": n, "confidence": n})
        for name, column in kept.items():
            np.testing.assert_array_equal(back[name], column)
        with pytest.raises(DataError):
            decode(text, {"right": n + 8, "confidence": n})
    extremes = {"values": np.array([0.0, np.inf, 1e-300, -3.0])}
    np.testing.assert_array_equal(decode(encode(extremes), {"values": 4})["values"], extremes["values"])
    assert len(json.dumps(encode({"right": np.ones(500, dtype=bool)}))) < 160
