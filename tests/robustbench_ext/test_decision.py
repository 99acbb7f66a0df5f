"""Decisions: they follow intervals and p-values, margins, and the number of samples that would decide."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from robustbench_ext.errors import DataError
from robustbench_ext.metrics import Estimate, decision, paired
from robustbench_ext.metrics.intervals import proportion, wilson
from robustbench_ext.metrics.paired import Comparison

Z = 1.959963984540054


def normal(value, se=1.0, n=100):
    """A comparison whose estimate is normal."""
    return Comparison(
        Estimate(value, value - Z * se, value + Z * se, "normal", n), 2 * stats.norm.sf(abs(value) / se), "normal"
    )


def test_outcomes_follow_the_test_and_the_direction():
    for value, said in [(2.0, "better"), (-2.0, "worse"), (1.9, "inconclusive"), (0.0, "inconclusive")]:
        assert decision.outcome(normal(value), True) == said
        mirrored = {"better": "worse", "worse": "better"}.get(said, said)
        assert decision.outcome(normal(value), False) == mirrored
        assert decision.outcome(normal(-value), True) == mirrored
    # A corrected p-value decides, not the uncorrected interval.
    assert decision.outcome(replace(normal(2.5), p_value=0.06), True) == "inconclusive"
    assert decision.outcome(normal(2.0), True, alpha=0.01) == "inconclusive"
    assert decision.outcome(replace(normal(2.0), p_value=math.nan), True) == "inconclusive"


def test_a_margin_moves_the_border():
    # "Not worse by more than 1" where higher is better: the whole interval above -1.
    for value, said in [(0.97, "better"), (0.95, "inconclusive"), (-2.9, "inconclusive"), (-2.97, "worse")]:
        assert decision.outcome(normal(value), True, margin=1.0) == said
        assert decision.outcome(normal(-value), False, margin=1.0) == said
    # A margin of nearly nothing is no margin, whatever alpha.
    for alpha in (0.05, 0.01, 0.2):
        for value in np.linspace(-3, 3, 41):
            found = normal(value)
            assert decision.outcome(found, True, alpha, 1e-9) == decision.outcome(found, True, alpha)
    none = Comparison(Estimate.undefined(0, "nothing"), math.nan, "none")
    assert decision.outcome(none, True, margin=1.0) == "inconclusive"


def test_outcomes_of_real_comparisons_are_those_of_their_intervals():
    rng = np.random.default_rng(0)
    said = set()
    for _ in range(200):
        a, b = rng.random(60) < rng.uniform(0.5, 0.9), rng.random(60) < 0.7
        found = paired.compare_proportions(a, b)
        low, high = found.difference.ci_low, found.difference.ci_high
        expected = "better" if low > 0 else "worse" if high < 0 else "inconclusive"
        assert decision.outcome(found, True) == expected
        said.add(expected)
    assert said == {"better", "worse", "inconclusive"}


def test_samples_to_decide_by_hand():
    # z = 1.96 + 0.8416 = 2.8016; n = 100 (2.8016 x 0.5)^2 = 196.2
    assert decision.samples_to_decide(normal(2.0)) == 197
    assert decision.samples_to_decide(normal(-2.0)) == 197
    assert decision.samples_to_decide(normal(2.0), power=0.5) == math.ceil(100 * (Z / 2) ** 2)
    assert decision.samples_to_decide(normal(2.0), alpha=0.05 / 10) > 197
    # With a power of a half, what is just significant is just enough.
    assert decision.samples_to_decide(normal(Z), power=0.5) in (100, 101)
    # Against a margin: the difference is measured from there.
    assert decision.samples_to_decide(normal(1.0), margin=-1.0) == 197
    assert decision.samples_to_decide(normal(0.0)) is None
    assert decision.samples_to_decide(normal(-1.0), margin=-1.0) is None
    same = paired.compare_means(np.arange(5.0), np.arange(5.0))
    assert decision.samples_to_decide(same) is None
    assert decision.samples_to_decide(Comparison(Estimate.undefined(3, "few"), math.nan, "none")) is None


def test_gates():
    inside = Estimate(0.8, 0.75, 0.84, "Wilson", 300)
    assert [decision.at_least(inside, t) for t in (0.75, 0.8, 0.84, 0.85)] == ["pass", *["inconclusive"] * 2, "fail"]
    assert [decision.at_most(inside, t) for t in (0.74, 0.75, 0.8, 0.84)] == ["fail", *["inconclusive"] * 2, "pass"]
    for gate in (decision.at_least, decision.at_most):
        assert gate(Estimate.undefined(0, "nothing"), 0.5) == "inconclusive"
        assert gate(Estimate(0.9, math.nan, math.nan, "none", 1, "one sample"), 0.5) == "inconclusive"


def test_samples_for_a_threshold():
    found = proportion(np.arange(200) < 170)  # 85 % of 200
    n = decision.samples_to_decide_threshold(found, 0.8)
    # The power of "Wilson's lower end is at least 0.8" at n, by the binomial distribution: 80 % within its steps.
    power = {m: sum(stats.binom.pmf(k, m, 0.85) for k in range(m + 1) if wilson(k, m)[0] >= 0.8) for m in (n // 2, n)}
    assert power[n] == pytest.approx(0.8, abs=0.03)
    assert power[n // 2] < 0.6
    # Without any mistake the interval shrinks as 1 / n; it is the threshold's own variance that counts.
    perfect = decision.samples_to_decide_threshold(proportion(np.ones(50, dtype=bool)), 0.99)
    assert wilson(perfect, perfect)[0] >= 0.99 > wilson(perfect - 10, perfect - 10)[0]
    # Any other interval: the side towards the threshold counts.
    lopsided = Estimate(5.0, 4.0, 8.0, "bootstrap (1000)", 100)
    below, above = (decision.samples_to_decide_threshold(lopsided, t) for t in (4.5, 5.5))
    assert below == math.ceil(100 * ((Z + 0.8416212) / Z * 2) ** 2)
    assert above == math.ceil(100 * ((Z + 0.8416212) / Z * 6) ** 2)
    assert decision.samples_to_decide_threshold(lopsided, 5.0) is None
    assert decision.samples_to_decide_threshold(Estimate.undefined(0, "nothing"), 0.5) is None


def test_faults():
    for bad in ({"alpha": 0.0}, {"alpha": 1.5}, {"margin": -0.1}, {"margin": math.inf}):
        with pytest.raises(DataError, match="decision"):
            decision.outcome(normal(1.0), True, **bad)
    with pytest.raises(DataError, match="power"):
        decision.samples_to_decide(normal(1.0), power=1.0)
    with pytest.raises(DataError, match="power"):
        decision.samples_to_decide_threshold(proportion(np.arange(10) < 4), 0.5, power=0.2)
