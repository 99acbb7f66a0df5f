"""Verdicts: which side of the threshold, how often they are wrong, how many samples would decide."""

import math

import numpy as np
import pytest

from robustbench_ext.gate.expectation import at_level, judge_difference, judge_range
from robustbench_ext.metrics.classification import accuracy
from robustbench_ext.metrics.estimate import Estimate
from robustbench_ext.metrics.intervals import wilson
from robustbench_ext.metrics.paired import compare_means, compare_proportions


def estimate(value, low, high, n=100):
    return Estimate(value, low, high, "t", n)


@pytest.mark.parametrize(
    ("low", "high", "outcome"),
    [
        (0.3, math.inf, "pass"),
        (0.4, math.inf, "pass"),
        (0.41, math.inf, "inconclusive"),
        (0.6, math.inf, "inconclusive"),
        (0.61, math.inf, "fail"),
        (-math.inf, 0.39, "fail"),
        (-math.inf, 0.55, "inconclusive"),
        (-math.inf, 0.6, "pass"),
        (0.4, 0.6, "pass"),
        (0.3, 0.55, "inconclusive"),
        (0.45, 0.55, "inconclusive"),
        (0.7, 0.8, "fail"),
        (0.1, 0.2, "fail"),
    ],
)
def test_the_interval_decides(low, high, outcome):
    found, needed = judge_range(estimate(0.5, 0.4, 0.6), low, high)
    assert found == outcome
    assert (needed is not None) == (outcome == "inconclusive")
    assert needed is None or needed > 100


def test_what_is_undefined_never_passes():
    nothing = Estimate.undefined(0, "none")
    assert judge_range(nothing, 0.0, math.inf) == ("inconclusive", None)
    assert judge_range(nothing, 0.0, 1.0) == ("inconclusive", None)
    undecided = compare_means(np.array([np.inf, 1.0]), np.array([1.0, 1.0]))
    assert judge_difference(undecided, False) == ("inconclusive", None)


def test_levels():
    e = accuracy(np.arange(200) < 130)
    assert at_level(e, 0.95) is e
    wide = at_level(e, 0.99)
    assert (wide.ci_low, wide.ci_high) == wilson(130, 200, 0.99)
    other = at_level(estimate(0.5, 0.4, 0.7), 0.99)
    assert other.ci_low == pytest.approx(0.5 - 0.1 * 2.5758 / 1.9600, abs=1e-4)
    assert other.ci_high == pytest.approx(0.5 + 0.2 * 2.5758 / 1.9600, abs=1e-4)


def test_false_alarms_keep_to_the_nominal_share():
    """A true accuracy at the threshold itself is the worst case of a model that is as it should be."""
    rng = np.random.default_rng(0)
    runs, fails, wrong_passes = 4000, 0, 0
    for k in rng.binomial(500, 0.45, size=runs):
        low, high = wilson(int(k), 500)
        e = Estimate(k / 500, low, high, "Wilson", 500)
        fails += judge_range(e, 0.45, math.inf)[0] == "fail"
        wrong_passes += judge_range(e, 0.45 + 1e-9, math.inf)[0] == "pass"
    # 2.5 % on either side; Wilson's one-sided share at n = 500 lies within half a point of it, and chance adds 3 sigma = 0.75.
    assert fails / runs < 0.025 + 0.0125
    assert wrong_passes / runs < 0.025 + 0.0125
    assert fails / runs > 0.01


def paired(rng, n, lost, gained):
    """Verdicts of two models of which each sample is lost or gained with these probabilities."""
    u, before = rng.random(n), np.ones(n, dtype=bool)
    before[: n // 2] = False
    now = before.copy()
    now[before & (u < 2 * lost)] = False
    now[~before & (u < 2 * gained)] = True
    return now, before


@pytest.mark.parametrize("margin", [0.0, 0.02])
def test_an_unchanged_model_fails_no_more_often_than_said_and_a_drop_is_found(margin):
    rng = np.random.default_rng(1)
    runs, alarms, found = 600, 0, 0
    for _ in range(runs):
        outcome, _ = judge_difference(compare_proportions(*paired(rng, 500, 0.04 + margin, 0.04)), True, margin)
        alarms += outcome == "fail"
        outcome, _ = judge_difference(compare_proportions(*paired(rng, 500, 0.11 + margin, 0.04)), True, margin)
        found += outcome == "fail"
    # At the edge of what is allowed, 2.5 % fail (exact McNemar: fewer); 3 sigma of 600 runs are 1.9 points.
    assert alarms / runs <= 0.025 + 0.019
    assert found / runs > 0.8


def test_rounding_is_no_change():
    a = np.random.default_rng(0).random(500)
    b = a + 1e-7
    comparison = compare_means(b, a)
    assert comparison.p_value < 0.05 or math.isnan(comparison.p_value)
    assert judge_difference(comparison, False, scale=0.5)[0] == "pass"
    assert judge_difference(compare_means(a + 1e-3 * (1 + a), a), False, scale=0.5)[0] == "fail"
