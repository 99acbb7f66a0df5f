"""Spread over classes and relative changes: the specification's invariants, and intervals that cover."""

import numpy as np
import pytest
from scipy.stats import binom

from robustbench_ext.errors import DataError
from robustbench_ext.metrics import spread


def scores(seed=0, n=12):
    return np.random.default_rng(seed).random(n)


def test_the_tail_lies_between_the_worst_and_the_mean():
    m = scores()
    tails = [spread.lower_tail_mean(m, q) for q in (1 / 12, 0.1, 0.3, 0.5, 1.0)]
    assert tails[0] == m.min()
    assert tails[1] == np.sort(m)[:2].mean()  # ceil(0.1 x 12)
    assert tails == sorted(tails)
    assert tails[-1] == pytest.approx(m.mean(), rel=1e-15)
    assert spread.lower_tail_mean(np.arange(10.0), 0.3) == 1.0  # 0.3 x 10 is 3, whatever floats say


def test_variance_is_that_of_the_population():
    m = scores()
    assert spread.variance(m) == pytest.approx(np.mean((m - m.mean()) ** 2), rel=1e-12)
    assert spread.variance(np.full(5, 0.3)) == pytest.approx(0, abs=1e-30)
    assert spread.variance(m + 0.2) == pytest.approx(spread.variance(m), rel=1e-12)
    assert spread.variance(3 * m) == pytest.approx(9 * spread.variance(m), rel=1e-12)
    assert spread.variance(m[::-1]) == pytest.approx(spread.variance(m), rel=1e-12)
    assert spread.variance(np.array([0.0, 1.0])) == 0.25  # the largest there is in [0, 1]
    assert all(spread.variance(scores(s)) <= 0.25 for s in range(20))


def test_relative_change():
    assert spread.relative_change(0.6, 0.8) == pytest.approx(-0.25)
    assert spread.relative_change(0.8, 0.8) == 0
    assert spread.relative_change(3 * 0.6, 3 * 0.8) == pytest.approx(-0.25)
    for plain in (0.0, -0.1, float("nan")):
        with pytest.raises(DataError, match="above 0"):
            spread.relative_change(0.5, plain)


@pytest.mark.parametrize("bad", [0, -0.1, 1.1])
def test_a_share_outside_is_refused(bad):
    with pytest.raises(DataError, match="share"):
        spread.lower_tail_mean(scores(), bad)


# The spread's interval -----------------------------------------------------------------------------------------------


def draw(p, n, rng):
    """Verdicts and labels of classes of accuracies p with n samples each."""
    labels = np.repeat(np.arange(len(p)), n)
    return rng.random(len(labels)) < np.asarray(p)[labels], labels


@pytest.mark.parametrize(
    "p",
    [
        np.full(10, 0.9),  # no spread at all: the plug-in is never 0
        np.linspace(0.8, 0.98, 10),
        np.array([0.2, *[0.95] * 9]),
        np.linspace(0.02, 0.6, 10),
        np.array([0.5, 0.9]),
        np.full(40, 0.99),
    ],
    ids=["equal", "even", "one bad", "attacked", "two", "forty good"],
)
def test_the_interval_of_the_spread_covers_the_true_one(p):
    rng, true, repeats = np.random.default_rng(1), float(np.std(p)), 300
    found = [spread.class_spread(*draw(p, 50, rng)) for _ in range(repeats)]
    assert all(e.ci_low <= e.value <= e.ci_high for e in found)
    covered = sum(e.ci_low - 1e-12 <= true <= e.ci_high + 1e-12 for e in found)
    # 95 % coverage is refused where fewer are covered than 99.9 % of experiments with that coverage have.
    assert covered >= binom.ppf(0.001, repeats, 0.95)
    if true > 0.1:  # and it says something: shorter than the spread itself
        assert np.median([e.ci_high - e.ci_low for e in found]) < true


def test_the_spread_is_not_the_plug_in():
    rng = np.random.default_rng(2)
    found = [spread.class_spread(*draw(np.full(10, 0.8), 30, rng)) for _ in range(200)]
    plug_in = np.sqrt(0.8 * 0.2 / 30 * 9 / 10)
    squares = np.mean([e.value**2 for e in found])
    # What is left of the noise is from cutting off at 0: less than a half of it, where the plug-in has all.
    assert squares < 0.5 * plug_in**2
    assert np.mean([e.ci_low == 0 for e in found]) > 0.9


def test_perfect_and_hopeless_models_are_not_certain():
    labels = np.repeat(np.arange(10), 50)
    for right in (np.ones(500, dtype=bool), np.zeros(500, dtype=bool)):
        e = spread.class_spread(right, labels)
        assert (e.value, e.ci_low) == (0, 0)
        assert 0.005 < e.ci_high < 0.05
    alone = spread.class_spread(np.ones(5, dtype=bool), np.zeros(5, dtype=int))
    assert np.isnan(alone.value) and "one class" in alone.reason


def test_resampled_spread_scatters_as_the_spread_does():
    p, rng = np.linspace(0.5, 0.95, 10), np.random.default_rng(3)
    found = [spread.resampled_spread(*draw(p, 100, rng)) for _ in range(60)]
    scatter = np.std([value for value, _ in found], ddof=1)
    drawn = np.mean([values.std() for _, values in found])
    # The standard deviation of 60 values is known to 1 / sqrt(2 x 59) = 9 %; three of these, and a tenth for the noise that
    # resampling adds to the variance.
    assert drawn == pytest.approx(scatter, rel=0.4)
    value, values = found[0]
    assert values.mean() == pytest.approx(value, abs=3 * values.std())


# Relative changes ----------------------------------------------------------------------------------------------------


def verdicts(n=600, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.choice(4, n, p=[0.4, 0.3, 0.2, 0.1])
    clean = rng.random(n) < 0.95 - 0.1 * labels
    return clean, clean & (rng.random(n) < 0.6), labels, rng


def mean_over_classes(right, labels):
    return np.mean([right[labels == k].mean() for k in np.unique(labels)])


def test_values_average_to_the_change():
    clean, attacked, y, _ = verdicts()
    expected = mean_over_classes(attacked, y) / mean_over_classes(clean, y) - 1
    values = spread.change_values((clean, y), [(attacked, y)], True)
    assert values.mean() == pytest.approx(expected, abs=1e-12)
    apart = spread.change_values((clean, y), [(attacked[:300], y[:300]), (attacked[300:], y[300:])], False)
    halves = np.mean([mean_over_classes(attacked[s], y[s]) for s in (slice(300), slice(300, None))])
    assert apart.mean() == pytest.approx(halves / mean_over_classes(clean, y) - 1, abs=1e-12)
    assert len(apart) == 1200


def test_the_identity_changes_nothing():
    clean, _, y, _ = verdicts()
    e = spread.accuracy_change((clean, y), [(clean, y)], True)
    assert e.value == 0 and e.ci_low < 0 < e.ci_high and e.ci_high < 0.02
    assert spread.accuracy_change((clean, y), [(clean, y), (clean, y)], True).value == 0


def test_all_broken_is_minus_one_and_not_certain():
    clean, _, y, _ = verdicts()
    e = spread.accuracy_change((clean, y), [(np.zeros_like(clean), y)], True)
    assert (e.value, e.ci_low) == (-1, -1)
    assert -1 < e.ci_high < -0.95
    nothing = spread.accuracy_change((np.zeros_like(clean), y), [(clean, y)], True)
    assert np.isnan(nothing.value) and "correctly clean" in nothing.reason


def test_order_of_samples_does_not_matter():
    clean, attacked, y, rng = verdicts()
    order = rng.permutation(len(y))
    before = spread.change_values((clean, y), [(attacked, y)], True)
    after = spread.change_values((clean[order], y[order]), [(attacked[order], y[order])], True)
    assert np.allclose(before[order], after, atol=1e-12)


@pytest.mark.parametrize("paired", [True, False])
def test_values_vary_as_the_change_does(paired):
    """Against the spread of the statistic itself over resamples within classes, which the linearisation stands for."""
    clean, attacked, y, rng = verdicts(2000)
    other = attacked if paired else rng.permutation(attacked)
    values = spread.change_values((clean, y), [(other, y)], paired)
    groups = [np.flatnonzero(y == k) for k in range(4)]
    drawn = []
    for _ in range(600):
        one = np.concatenate([rng.choice(g, len(g)) for g in groups])
        two = one if paired else np.concatenate([rng.choice(g, len(g)) for g in groups])
        drawn.append(mean_over_classes(other[two], y[two]) / mean_over_classes(clean[one], y[one]) - 1)
    # A standard deviation of 600 values is known to 2.9 %; the linearisation is exact to 1 / sqrt(2000).
    assert values.std() / np.sqrt(len(values)) == pytest.approx(np.std(drawn), rel=3 * 0.029 + 0.023)
