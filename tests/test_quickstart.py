"""The quickstart's promises, on its real run (about a minute and a half on two cores)."""

import pytest

from robustbench_ext.engine import run_suite


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    return run_suite("quickstart", tmp_path_factory.mktemp("quickstart"), executor="auto")


def value(summary, model, condition, metric, probe="classifier"):
    (row,) = summary.results.find(model=model, condition=condition, metric=metric, probe=probe, group=None)
    return row.value


def test_accuracies_are_what_real_training_gives(quickstart):
    assert not quickstart.failures
    assert quickstart.verdict == "pass"
    assert value(quickstart, "standard", "clean", "accuracy") >= 0.95
    assert value(quickstart, "standard", "apgd-ce Linf 0.2", "robust_accuracy") <= 0.05
    assert value(quickstart, "trades", "clean", "accuracy") >= 0.93
    assert value(quickstart, "trades", "apgd-ce Linf 0.2", "robust_accuracy") >= 0.7


def test_robust_accuracy_falls_with_the_budget(quickstart):
    for model in ("standard", "trades"):
        budgets = ("0.05", "0.1", "0.15", "0.2", "0.3")
        curve = [value(quickstart, model, f"worst case Linf {eps}", "robust_accuracy") for eps in budgets]
        assert curve == sorted(curve, reverse=True)
        assert curve[0] <= value(quickstart, model, "clean", "accuracy")


def test_far_outliers_are_detected_and_unknown_inputs_have_n(quickstart):
    for model in ("standard", "trades"):
        assert value(quickstart, model, "outliers uniform-noise", "auroc", "energy") > 0.9
    rows = quickstart.results.find(condition="outliers letters", metric="auroc")
    assert all(row.n == 1500 for row in rows)
