"""Paired comparisons: golden values, statsmodels and scipy, agreement of every interval with its test, edges."""

import math

import numpy as np
import pytest
from scipy import stats

from robustbench_ext.errors import DataError
from robustbench_ext.metrics import calibration, paired
from robustbench_ext.metrics.resampling import resampled_bin_sums, resampled_sums

EXACT = 1e-9


def flags(both, only_a, only_b, neither):
    """Right answers of two models with this table."""
    a = np.repeat([True, True, False, False], [both, only_a, only_b, neither])
    b = np.repeat([True, False, True, False], [both, only_a, only_b, neither])
    return a, b


def agree(found):
    """p < 0.05 exactly where the interval does not hold 0, and the interval holds the difference."""
    d = found.difference
    assert d.ci_low <= d.value <= d.ci_high
    assert (found.p_value < 0.05) == (not d.ci_low <= 0 <= d.ci_high), found


# McNemar -------------------------------------------------------------------------------------------------------------


def test_mcnemar_golden():
    found = [paired.mcnemar(25, 12, kind) for kind in ("exact", "mid-p", "chi2", "chi2-corrected")]
    assert found == pytest.approx([0.047031, 0.033552, 0.032583, 0.048520], abs=5e-7)
    assert stats.chi2.isf(found[2], 1) == pytest.approx(4.5676, abs=5e-5)


def test_mcnemar_equals_statsmodels_and_the_sign_test():
    contingency = pytest.importorskip("statsmodels.stats.contingency_tables")
    for b, c in [(25, 12), (0, 5), (5, 0), (1, 1), (7, 7), (1, 0), (300, 260), (6000, 5700)]:
        table = [[3, b], [c, 4]]
        theirs = {
            "exact": contingency.mcnemar(table, exact=True).pvalue,
            "chi2": contingency.mcnemar(table, exact=False, correction=False).pvalue,
            "chi2-corrected": contingency.mcnemar(table, exact=False, correction=True).pvalue,
        }
        for kind, p in theirs.items():
            # statsmodels squares |b - c| - 1 also where that is -1; the specification takes 0.
            if not (kind == "chi2-corrected" and b == c):
                assert paired.mcnemar(b, c, kind) == pytest.approx(p, rel=EXACT), (b, c, kind)
            assert paired.mcnemar(b, c, kind) == paired.mcnemar(c, b, kind)
        exact = stats.binomtest(b, b + c).pvalue
        assert paired.mcnemar(b, c) == pytest.approx(exact, rel=EXACT)
        mass = stats.binom.pmf(min(b, c), b + c, 0.5)
        assert paired.mcnemar(b, c, "mid-p") == pytest.approx(1.0 if b == c else exact - mass, rel=EXACT)


def test_mcnemar_edges():
    for kind in ("exact", "mid-p", "chi2", "chi2-corrected"):
        assert paired.mcnemar(0, 0, kind) == 1.0
        assert paired.mcnemar(9, 9, kind) == 1.0
    assert paired.mcnemar(4000, 1000) < 1e-300 or paired.mcnemar(4000, 1000) == 0.0  # and no overflow
    with pytest.raises(DataError, match="counts"):
        paired.mcnemar(-1, 3)
    with pytest.raises(DataError, match="mid-p"):
        paired.mcnemar(1, 3, "fisher")


@pytest.mark.parametrize("n", [8, 30, 60])
def test_the_exact_test_is_size_controlled(n):
    """The rejection probability by summing over all tables, where b + c is binomial: at most 5 %; mid-p at most little more."""
    for share in (0.1, 0.4):
        size = {"exact": 0.0, "mid-p": 0.0}
        for m in range(n + 1):
            for b in range(m + 1):
                chance = stats.binom.pmf(m, n, share) * stats.binom.pmf(b, m, 0.5)
                for kind in size:
                    size[kind] += chance * (paired.mcnemar(b, m - b, kind) < 0.05)
        assert size["exact"] <= 0.05
        assert size["exact"] <= size["mid-p"] <= 0.055  # Fagerland, Lydersen, Laake 2013 found no more


# Proportions ---------------------------------------------------------------------------------------------------------


def newcombe_again(e, f, g, h, level=0.95):
    """Method 10 written down once more, from statsmodels' Wilson limits and in the terms of the paper."""
    proportion = pytest.importorskip("statsmodels.stats.proportion")
    n = e + f + g + h
    l2, u2 = proportion.proportion_confint(e + f, n, 1 - level, "wilson")
    l3, u3 = proportion.proportion_confint(e + g, n, 1 - level, "wilson")
    p2, p3 = (e + f) / n, (e + g) / n
    dl2, du2, dl3, du3 = p2 - l2, u2 - p2, p3 - l3, u3 - p3
    product = (e + f) * (g + h) * (e + g) * (f + h)
    numerator = e * h - f * g
    numerator = numerator - n / 2 if numerator > n / 2 else min(numerator, 0)
    phi = numerator / product**0.5 if product else 0.0
    delta = math.sqrt(dl2**2 - 2 * phi * dl2 * du3 + du3**2)
    epsilon = math.sqrt(du2**2 - 2 * phi * du2 * dl3 + dl3**2)
    return (f - g) / n - delta, (f - g) / n + epsilon


def test_newcombe_equals_its_definition():
    rng = np.random.default_rng(0)
    for _ in range(300):
        table = rng.integers(0, rng.choice([3, 20, 500]), size=4).tolist()
        if sum(table):
            assert paired.newcombe_paired(*table) == pytest.approx(newcombe_again(*table), abs=EXACT), table
    theirs = getattr(pytest.importorskip("statsmodels.stats.proportion"), "confint_proportions_paired", None)
    if theirs is not None:  # statsmodels has it from 0.15
        assert paired.newcombe_paired(20, 12, 2, 16) == pytest.approx(theirs([[20, 12], [2, 16]]), abs=EXACT)


def test_no_table_has_an_interval_at_odds_with_its_test():
    for n in (6, 15, 30, 60):
        for only_a in range(n + 1):
            for only_b in range(min(only_a, n - only_a) + 1):
                rest = n - only_a - only_b
                for both in {0, rest // 3, rest // 2, rest}:
                    found = paired.compare_proportions(*flags(both, only_a, only_b, rest - both))
                    low, high = paired.newcombe_paired(both, only_a, only_b, rest - both)
                    agree(found)
                    # Only ever widened, and only to 0.
                    assert found.difference.ci_low in (low, 0.0) and found.difference.ci_high == high
                    assert found.difference.ci_low <= low


def test_proportions_that_do_not_differ_keep_an_interval():
    for table in [(10, 0, 0, 0), (0, 0, 0, 10), (6, 0, 0, 4), (9000, 0, 0, 1000)]:
        found = paired.compare_proportions(*flags(*table))
        assert (found.difference.value, found.p_value) == (0.0, 1.0)
        assert found.difference.ci_low < 0 < found.difference.ci_high
        assert found.test == "exact McNemar" and found.difference.n == sum(table)
    assert paired.newcombe_paired(0, 10, 0, 0) == pytest.approx((1 - math.sqrt(2) * 0.277533, 1), abs=1e-6)
    a, b = flags(40, 9, 3, 48)
    assert paired.compare_proportions(b, a).difference.value == -0.06
    mirrored, there = paired.newcombe_paired(40, 3, 9, 48), paired.newcombe_paired(40, 9, 3, 48)
    assert mirrored == pytest.approx((-there[1], -there[0]), abs=EXACT)
    with pytest.raises(DataError, match="lengths"):
        paired.compare_proportions(a, b[1:])


# Means ---------------------------------------------------------------------------------------------------------------


def test_means_are_students_where_nothing_is_skewed():
    rng = np.random.default_rng(0)
    half = rng.normal(size=40)
    d = np.concatenate([half, -half])  # skewness 0
    for shift in (0.0, 0.2, 0.5):
        b = rng.exponential(size=80)
        found = paired.compare_means(b + d + shift, b)
        theirs = stats.ttest_rel(b + d + shift, b)
        assert found.p_value == pytest.approx(theirs.pvalue, rel=1e-6)  # a skewness of 1e-16 is left
        interval = theirs.confidence_interval(0.95)
        assert (found.difference.ci_low, found.difference.ci_high) == pytest.approx(interval, abs=1e-6)
        assert found.difference.value == pytest.approx(d.mean() + shift, abs=1e-12)


def test_halls_transformation_is_monotone_and_inverted():
    for k in (-0.33, -0.02, 1e-12, 0.02, 0.33):  # |skewness| is at most sqrt(n), so |k| at most a third
        t = np.linspace(-60, 60, 2001)
        bent = np.array([paired._bent(v, k) for v in t])
        assert (np.diff(bent) >= 0).all()
        assert np.array([paired._unbent(v, k) for v in bent]) == pytest.approx(t, abs=2e-4)  # flat at t = -1/k
    # Its terms are those of the Edgeworth expansion: the transformed statistic of exponentials is symmetric.
    rng = np.random.default_rng(1)
    x = rng.exponential(size=(20000, 60)) - 1
    t = x.mean(axis=1) / (x.std(axis=1, ddof=1) / math.sqrt(60))
    k = stats.skew(x, axis=1) / (3 * math.sqrt(60))
    bent = t + k * t**2 + k**2 * t**3 / 3 + k / 2
    gap, before = (abs((v > 2.0).mean() - (v < -2.0).mean()) for v in (bent, t))
    assert gap < before / 3


def test_means_agree_with_their_test_and_have_no_floor():
    rng = np.random.default_rng(2)
    for _ in range(600):
        n = int(rng.choice([3, 20, 150]))
        draw = rng.choice([rng.normal, rng.exponential, rng.lognormal])
        a, b = draw(size=n), draw(size=n) + rng.normal() / math.sqrt(n)
        found, mirrored = paired.compare_means(a, b), paired.compare_means(b, a)
        agree(found)
        assert mirrored.p_value == pytest.approx(found.p_value, rel=1e-9)
        assert mirrored.difference.ci_low == pytest.approx(-found.difference.ci_high, abs=1e-12)
    # Holm multiplies by the number of tests: what is plain stays plain among two hundred.
    plain = paired.compare_means(rng.exponential(size=500) + 1, rng.exponential(size=500)).p_value
    assert paired.holm([plain] + [1.0] * 199)[0] < 1e-6


def test_means_edges():
    a = np.array([0.1, 0.7, 3.0])
    same = paired.compare_means(a, a)
    assert (same.difference.value, same.difference.ci_low, same.difference.ci_high, same.p_value) == (0, 0, 0, 1)
    shifted = paired.compare_means(a + 1, a)
    assert shifted.difference.value == pytest.approx(1) and math.isnan(shifted.p_value) and shifted.difference.reason
    one = paired.compare_means(a[:1] + 1, a[:1])
    assert math.isnan(one.p_value) and math.isnan(one.difference.ci_low)
    endless = paired.compare_means(np.array([np.inf, 1, 2]), a)
    assert math.isnan(endless.difference.value) and "infinite" in endless.difference.reason
    with pytest.raises(DataError, match="NaN"):
        paired.compare_means(a * np.nan, a)


# Statistics of resamples ---------------------------------------------------------------------------------------------


def ece_of(confidence, right, repeats=1000):
    index = calibration.bin_index(confidence)
    gaps, n = right - confidence, len(right)
    drawn = np.abs(resampled_bin_sums(index, gaps, bins=calibration.BINS, repeats=repeats)[0]).sum(axis=1) / n
    return float(np.abs(np.bincount(index, gaps, calibration.BINS)).sum() / n), drawn


def calibrated(rng, n, sharp):
    """Confidences and right answers of a perfectly calibrated model; a sharp one is nearly always sure."""
    level, spread = (4, 2.5) if sharp else (0.5, 1)
    confidence = 0.1 + 0.9 / (1 + np.exp(-level - spread * rng.normal(size=n)))
    return confidence, rng.random(n) < confidence


def test_resampled_smooth_statistics_are_as_means():
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=300) + 0.3, rng.normal(size=300)
    drawn = resampled_sums(np.stack([a, b], axis=1)) / 300
    found = paired.compare_resampled(a.mean(), b.mean(), drawn[:, 0], drawn[:, 1], 300)
    theirs = stats.ttest_rel(a, b)
    # The bootstrap's standard error is known to 1 / sqrt(2 x 1000) = 2.2 %; three of those, and t against normal at n = 300.
    half = (found.difference.ci_high - found.difference.ci_low) / 2
    assert half == pytest.approx(np.ptp(theirs.confidence_interval(0.95)) / 2, rel=0.08)
    assert found.difference.value == pytest.approx((a - b).mean(), abs=1e-12)
    assert found.difference.ci_method == "bootstrap (1000), normal"
    agree(found)


def test_a_sharp_and_a_blunt_calibrated_model_do_not_differ_in_ece():
    """Both have a true ECE of 0; the plug-in of the blunt one is far higher. Without room for that, a quarter "differ"."""
    rng = np.random.default_rng(4)
    trials, plain, allowed = 60, 0, 0
    for _ in range(trials):
        (value_a, a), (value_b, b) = (ece_of(*calibrated(rng, 500, sharp), repeats=300) for sharp in (False, True))
        found = paired.compare_resampled(value_a, value_b, a, b, 500)
        agree(found)
        allowed += found.p_value < 0.05
        plain += abs(value_a - value_b) > 1.96 * (a - b).std()
    assert plain > 0.12 * trials
    assert allowed <= 0.05 * trials


def test_resampled_finds_what_is_there():
    rng = np.random.default_rng(5)
    confidence, right = calibrated(rng, 2000, False)
    over = np.clip(confidence + 0.15, 0, 1)
    (value_a, a), (value_b, b) = ece_of(over, right), ece_of(confidence, right)
    found = paired.compare_resampled(value_a, value_b, a, b, 2000)
    agree(found)
    assert found.p_value < 1e-6 and found.difference.value == value_a - value_b
    assert "bias-extended" in found.difference.ci_method
    mirrored = paired.compare_resampled(value_b, value_a, b, a, 2000)
    assert mirrored.p_value == pytest.approx(found.p_value, rel=1e-9)
    assert mirrored.difference.ci_low == pytest.approx(-found.difference.ci_high, abs=1e-12)


def test_resampled_edges():
    drawn = np.linspace(0, 1, 50)
    same = paired.compare_resampled(0.5, 0.5, drawn, drawn, 9)
    assert (same.difference.value, same.p_value) == (0.0, 1.0)
    stuck = paired.compare_resampled(0.6, 0.5, drawn + 0.1, drawn, 9)
    assert math.isnan(stuck.p_value) and "does not vary" in stuck.difference.reason
    some = np.where(np.arange(50) % 5 == 0, np.nan, drawn)
    left_out = paired.compare_resampled(0.5, 0.4, some, drawn[::-1].copy(), 9)
    assert "bootstrap (40)" in left_out.difference.ci_method and left_out.p_value == left_out.p_value
    none = paired.compare_resampled(math.nan, 0.4, drawn, drawn, 9)
    assert math.isnan(none.difference.value) and none.difference.reason
    with pytest.raises(DataError, match="same resamples"):
        paired.compare_resampled(0.5, 0.4, drawn, drawn[1:], 9)


# AUROC ---------------------------------------------------------------------------------------------------------------


def detectors(rng, n0=120, n1=90):
    x0, x1 = rng.normal(size=n0), rng.normal(size=n1) + 1
    noisy = [(x0 + 0.5 * rng.normal(size=n0), x1 + 0.5 * rng.normal(size=n1)) for _ in range(2)]
    return (*noisy[0], *noisy[1])


def test_auroc_of_models_is_delongs_where_all_is_shared_and_a_sum_where_nothing_is():
    clean_a, unknown_a, clean_b, unknown_b = detectors(np.random.default_rng(6))
    ids = np.array([f"s{i}" for i in range(90)])
    whole = paired.compare_auroc(clean_a, unknown_a, clean_b, unknown_b)
    order = np.random.default_rng(0).permutation(90)  # the order does not matter, ids do
    same = paired.compare_auroc_models(clean_a, clean_b, unknown_a, unknown_b[order], ids, ids[order])
    assert same.difference.ci_low == pytest.approx(whole.difference.ci_low, abs=1e-12)
    assert same.p_value == pytest.approx(whole.p_value, rel=1e-9) and same.test == "paired DeLong"
    wrong = paired.compare_auroc_models(clean_a, clean_b, unknown_a, unknown_b[order], ids, ids)
    assert wrong.p_value != pytest.approx(whole.p_value, rel=1e-3)

    apart = paired.compare_auroc_models(clean_a, clean_b, unknown_a, unknown_b, ids, np.char.add(ids, "'"))
    a0, a1 = paired.placements(clean_a, unknown_a)
    b0, b1 = paired.placements(clean_b, unknown_b)
    variance = (a0 - b0).var(ddof=1) / 120 + a1.var(ddof=1) / 90 + b1.var(ddof=1) / 90
    half = (apart.difference.ci_high - apart.difference.ci_low) / 2
    assert half == pytest.approx(1.959964 * math.sqrt(variance), rel=1e-6)
    assert apart.test == "partly paired DeLong" and apart.difference.n == 300
    # A part in common: between the two, and by the covariance of that part alone.
    part = paired.compare_auroc_models(
        clean_a, clean_b, unknown_a, unknown_b, ids, np.append(ids[:40], [f"other {i}" for i in range(50)])
    )
    shared = 2 * ((a1 - a1.mean())[:40] * (b1 - b1.mean())[:40]).sum() / (90 * 89)
    half = (part.difference.ci_high - part.difference.ci_low) / 2
    assert half == pytest.approx(1.959964 * math.sqrt(variance - shared), rel=1e-6)


def test_partly_paired_auroc_keeps_its_level():
    """Attacks that fool each of two equally good models on overlapping halves of the samples."""
    rng = np.random.default_rng(7)
    trials, n0, n1 = 600, 100, 160
    ids, rejected, ignored = np.arange(n1), 0, 0
    for _ in range(trials):
        clean_a, unknown_a, clean_b, unknown_b = detectors(rng, n0, n1)
        weak = rng.normal(size=n1)
        fooled_a, fooled_b = (weak + 0.5 * rng.normal(size=n1) > 0 for _ in range(2))
        found = paired.compare_auroc_models(
            clean_a, clean_b, unknown_a[fooled_a], unknown_b[fooled_b], ids[fooled_a], ids[fooled_b]
        )
        agree(found)
        rejected += found.p_value < 0.05
        alone = paired.compare_auroc_models(
            clean_a, clean_b, unknown_a[fooled_a], unknown_b[fooled_b], ids[fooled_a], ids[fooled_b] + 1000
        )
        ignored += alone.p_value < 0.05
    # Binomial error of 600 trials, three and a half standard deviations.
    assert abs(rejected / trials - 0.05) < 3.5 * math.sqrt(0.05 * 0.95 / trials)
    assert ignored < rejected  # without the shared samples' covariance it is too careful


def test_auroc_of_models_refuses_what_it_cannot_pair():
    clean_a, unknown_a, clean_b, unknown_b = detectors(np.random.default_rng(8))
    ids = np.arange(90)
    with pytest.raises(DataError, match="same samples"):
        paired.compare_auroc_models(clean_a, clean_b[1:], unknown_a, unknown_b, ids, ids)
    with pytest.raises(DataError, match="ids"):
        paired.compare_auroc_models(clean_a, clean_b, unknown_a, unknown_b, ids[1:], ids)
    with pytest.raises(DataError, match="twice"):
        paired.compare_auroc_models(clean_a, clean_b, unknown_a, unknown_b, ids, np.append(ids[:-1], 0))
    none = paired.compare_auroc_models(clean_a, clean_b, unknown_a[:0], unknown_b, ids[:0], ids)
    assert math.isnan(none.difference.value) and "two of each" in none.difference.reason


def test_the_lowest_of_several_shares_is_no_surer_than_both_intervals():
    """A class at 0 has no variance in any resample, and its true accuracy may still be 17 %."""
    rng = np.random.default_rng(0)
    a, b = 0.7, 0.0
    found = paired.compare_resampled(a, b, a + 0.02 * rng.normal(size=1000), np.zeros(1000), 200)
    wide = paired.widened(found, a, (0.55, 0.82), b, (0.0, 0.17))
    assert wide.difference.ci_low == pytest.approx(0.7 - np.hypot(0.15, 0.17))
    assert wide.difference.ci_high == pytest.approx(max(found.difference.ci_high, 0.7 + 0.12))
    assert wide.p_value >= found.p_value
    # Interval and p-value belong together.
    for value in (0.1, 0.2, 0.22, 0.25, 0.3):
        shifted = paired.compare_resampled(value, b, value + 0.02 * rng.normal(size=1000), np.zeros(1000), 200)
        one = paired.widened(shifted, value, (value - 0.15, value + 0.12), b, (0.0, 0.17))
        assert (one.p_value < 0.05) == (one.difference.ci_low > 0)
