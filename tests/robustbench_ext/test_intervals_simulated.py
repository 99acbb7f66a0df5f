"""Intervals cover, tests keep their level, and sample sizes have the power that they promise: on data made for the purpose.

Each case is drawn afresh many times and compared with its known truth. Tolerances are three and a half binomial standard
deviations of the number of repetitions, so that a correct method fails one case in two thousand. What is exact, or accurate at
the sizes used, is held to its nominal rate from both sides; what is conservative by construction is held from below alone, and
the list says so. The quick version has few repetitions and finds gross errors only; `make slow` is the test.
"""

import math
from itertools import combinations

import numpy as np
import pytest
from scipy import stats
from scipy.special import expit, logit

from robustbench_ext.metrics import binned, calibration, classification, decision, detection, distance, paired, tails
from robustbench_ext.metrics import coverage_curves as curves
from robustbench_ext.metrics import regression as reg
from robustbench_ext.metrics import selective as sel
from robustbench_ext.metrics.estimate import LEVEL, Estimate
from robustbench_ext.metrics.intervals import bootstrap, bootstrap_mean, clopper_pearson, seed_spread, wilson
from robustbench_ext.metrics.paired import Comparison
from robustbench_ext.metrics.resampling import resampled_bin_sums, sample_mean
from robustbench_ext.metrics.selective import _aurc, _Blocks

ALPHA = 1 - LEVEL


def error(rate, repeats):
    """Three and a half standard deviations of a share of `repeats` trials."""
    return 3.5 * math.sqrt(rate * (1 - rate) / repeats)


def several(quick, slow):
    """Few repetitions always, many with the slow tests."""
    return pytest.mark.parametrize("repeats", [quick, pytest.param(slow, marks=pytest.mark.slow)])


# Data ----------------------------------------------------------------------------------------------------------------


def confident(rng, n, sharp=True):
    """Confidences of a model of ten classes; a sharp one is nearly always sure, a blunt one never."""
    level, spread = (4, 2.5) if sharp else (0.5, 1)
    return 0.1 + 0.9 * expit(level + spread * rng.normal(size=n))


def normals(rng, n0=200, n1=150, shift=1.2):
    return rng.normal(size=n0), rng.normal(size=n1) + shift


def verdicts(rng, accuracies, n):
    """Labels in turn, and right answers with their class's probability."""
    labels = np.arange(n) % len(accuracies)
    return rng.random(n) < np.asarray(accuracies)[labels], labels


def two_models(rng, n, first, second, shared=0.6):
    """Right answers of two models, alike on a share of the samples (so that tables are not those of independence)."""
    common, own = rng.random(n), rng.random((2, n))
    u = np.where(rng.random(n) < shared, common, own)
    return u[0] < first, u[1] < second


def likelihoods(rng, n):
    """NLL of two classifiers on the same samples: one noisy, one overconfident."""
    margin = rng.normal(2.0, 2.0, size=n)
    return np.logaddexp(0, -margin - 0.7 * rng.normal(size=n)), np.logaddexp(0, -2.0 * margin)


# Intervals -----------------------------------------------------------------------------------------------------------


def a_proportion(method):
    def draw(rng):
        p = rng.uniform(0.05, 0.95)
        k = rng.binomial(100, p)
        return Estimate(k / 100, *method(k, 100), "", 100), p

    return draw


def a_worst_class(rng):
    right, labels = verdicts(rng, [0.6, 0.6, 0.7, 0.9, 0.9], 400)
    return classification.worst_class_accuracy(right, labels, 5)[0], 0.6


def an_ece(rng):
    confidence = confident(rng, 500, sharp=False)
    # As overconfident everywhere by 0.05, whatever the bin.
    return calibration.ece(confidence, rng.random(500) < confidence - 0.05), 0.05


def an_aurc(rng):
    scores = rng.random(300)  # P(wrong | s) = s^2: R(c) = c^2 / 3, and its mean is 1/9
    return sel.aurc(scores, rng.random(300) < scores**2), 1 / 9


def a_difference(rng):
    a, b = two_models(rng, 150, 0.85, 0.8)
    table = [np.count_nonzero(v) for v in (a & b, a & ~b, ~a & b, ~a & ~b)]
    return Estimate(a.mean() - b.mean(), *paired.newcombe_paired(*(int(v) for v in table)), "", 150), 0.05


def a_bca_ratio(rng):
    x, y = rng.exponential(size=250), 0.5 + rng.exponential(size=200)
    value = float(x.mean() / y.mean())
    found = bootstrap(value, lambda v, w: (v @ x / 250) / (w @ y / 200), (250, 200), 450, method="bca")
    return found, 1 / 1.5


def an_auroc_gain(rng):
    x0, x1 = normals(rng)
    a = (x0 + 0.5 * rng.normal(size=200), x1 + 0.5 * rng.normal(size=150))
    b = (x0 + rng.normal(size=200), x1 + rng.normal(size=150))
    truth = stats.norm.cdf(1.2 / math.sqrt(2.5)) - stats.norm.cdf(1.2 / 2)
    return paired.compare_auroc(*a, *b).difference, truth


def an_fpr(rng):
    found = detection.threshold_metrics(*normals(rng, 200, 100, 2.0))["fpr95"]
    return found, stats.norm.cdf(stats.norm.ppf(0.95) - 2.0)


def a_difference_of_ece(rng):
    """The first model is calibrated, the second overconfident by 0.08."""
    sharp, blunt = confident(rng, 800), confident(rng, 800, sharp=False)
    found = compared_ece(sharp, rng.random(800) < sharp, blunt, rng.random(800) < blunt - 0.08)
    return found.difference, -0.08


INTERVALS = {
    # name: (draw, conservative by construction)
    "Wilson": (a_proportion(wilson), False),
    "Clopper-Pearson": (a_proportion(clopper_pearson), True),
    "DeLong": (lambda rng: (detection.auroc(*normals(rng)), stats.norm.cdf(1.2 / math.sqrt(2))), False),
    "paired DeLong": (an_auroc_gain, False),
    "Newcombe, paired": (a_difference, False),
    "bootstrap of a mean": (lambda rng: (bootstrap_mean(rng.exponential(size=400)), 1.0), False),
    "grouped bootstrap of a mean": (lambda rng: (sample_mean(rng.exponential(size=400)), 1.0), False),
    "BCa of a ratio, stratified": (a_bca_ratio, False),
    "skewed means": (lambda rng: (paired.compare_means(rng.exponential(size=150), np.ones(150)).difference, 0.0), True),
    "RMSE": (lambda rng: (reg.rmse(2 * rng.normal(size=300), np.zeros(300)), 2.0), False),
    "AURC": (an_aurc, False),
    "balanced accuracy": (
        lambda rng: (tails.balanced_accuracy(*verdicts(rng, [0.5, 0.7, 0.9, 0.9], 300), 4), 0.75),
        False,
    ),
    "worst class": (a_worst_class, True),
    "ECE": (an_ece, True),
    "FPR@95": (an_fpr, True),
    "difference of ECE": (a_difference_of_ece, True),
    "spread over 3 seeds": (lambda rng: (seed_spread(rng.normal(0.8, 0.02, size=3)), 0.8), False),
    "spread over 6 seeds": (lambda rng: (seed_spread(rng.normal(0.8, 0.02, size=6)), 0.8), False),
    "median distance": (
        lambda rng: (distance.median_distance(rng.exponential(size=200)), math.log(2)),
        True,
    ),
}


@several(60, 800)
@pytest.mark.parametrize("name", INTERVALS)
def test_intervals_cover(name, repeats):
    draw, conservative = INTERVALS[name]
    rng = np.random.default_rng(11)
    covered = 0
    for _ in range(repeats):
        found, truth = draw(rng)
        covered += found.ci_low <= truth <= found.ci_high
    rate, allowed = covered / repeats, error(LEVEL, repeats)
    assert rate >= LEVEL - allowed, rate
    assert conservative or rate <= LEVEL + allowed, rate


# Bands ---------------------------------------------------------------------------------------------------------------


def a_robust_accuracy_curve(rng):
    found = distance.robust_accuracy_curve(rng.exponential(size=200) * (rng.random(200) < 0.8))
    truth = 0.8 * np.exp(-found["eps"])
    return found["low"], truth, found["high"]


def a_consistency_band(rng):
    """It is for the measured accuracies of a calibrated model, which are to lie within."""
    confidence = confident(rng, 600, sharp=False)
    band, bins = calibration.consistency_band(confidence, repeats=500), calibration.bin_index(confidence)
    right = np.bincount(bins, rng.random(600) < confidence, calibration.BINS)
    there = np.bincount(bins, minlength=calibration.BINS) > 0
    return band.low_all, right[there] / band.n, band.high_all


def a_coverage_curve(rng):
    levels = np.arange(0.05, 1.0, 0.05)
    found = curves.pit_curve(rng.beta(1.5, 1.5, size=200), levels)
    return found.low, stats.beta.cdf(levels, 1.5, 1.5), found.high


def a_roc(n0, n1, shift, spread):
    def draw(rng):
        rates, _, low, high = detection.roc_band(rng.normal(size=n0), rng.normal(shift, spread, size=n1))
        return low, stats.norm.sf((stats.norm.isf(rates) - shift) / spread), high

    return draw


def a_risk_curve(n, rate, integral):
    def draw(rng):
        scores = rng.random(n)
        coverage, _, low, high = sel.risk_coverage_band(scores, rng.random(n) < rate(scores))
        return low, integral(coverage) / coverage, high

    return draw


BANDS = {
    "robust accuracy": a_robust_accuracy_curve,
    "consistency": a_consistency_band,
    "coverage": a_coverage_curve,
    "ROC": a_roc(200, 150, 1.2, 1.0),
    "ROC, few unknown": a_roc(300, 20, 0.5, 1.5),
    "ROC, nearly perfect": a_roc(200, 150, 4.0, 1.0),
    "risk, rising": a_risk_curve(400, lambda s: s**3, lambda c: c**4 / 4),
    "risk, a step": a_risk_curve(
        400, lambda s: np.where(s > 0.8, 0.6, 0.02), lambda c: 0.02 * c + 0.58 * np.maximum(c - 0.8, 0)
    ),
    "risk, flat": a_risk_curve(100, lambda s: 0.2 + 0 * s, lambda c: 0.2 * c),
}


@several(40, 400)
@pytest.mark.parametrize("name", BANDS)
def test_bands_hold_everywhere_at_once(name, repeats):
    rng = np.random.default_rng(12)
    whole, apart = 0, []
    for _ in range(repeats):
        low, truth, high = BANDS[name](rng)
        assert (low <= high).all()
        whole += bool(((low <= truth + 1e-12) & (truth <= high + 1e-12)).all())
        apart.append(np.mean(high - low))
    assert whole / repeats >= LEVEL - error(LEVEL, repeats)
    assert np.mean(apart) < 0.75  # and not by holding everything


def test_bands_lie_around_their_curves():
    rng = np.random.default_rng(13)
    for decimals in (1, 12):  # with ties and without
        clean, unknown = (np.round(v, decimals) for v in normals(rng))
        rates, found, low, high = detection.roc_band(clean, unknown)
        assert np.array_equal(np.stack([rates, found]), np.stack(detection.roc_curve(clean, unknown)))
        assert ((low <= found) & (found <= high)).all()
        scores = np.round(rng.random(300), decimals)
        errors = rng.random(300) < scores
        coverage, risk, low, high = sel.risk_coverage_band(scores, errors)
        assert np.array_equal(np.stack([coverage, risk]), np.stack(sel.risk_coverage(scores, errors)))
        assert ((low <= risk) & (risk <= high)).all()
    # A perfect order and a perfect separation are not certain.
    _, _, low, high = sel.risk_coverage_band(np.arange(50.0), np.zeros(50, dtype=bool))
    assert (low == 0).all() and (high > 0.05).all()
    _, found, low, _ = detection.roc_band(np.arange(50.0), np.arange(50.0) + 100)
    assert (low[found > 0.5] < 0.98).all()


# Levels of tests -----------------------------------------------------------------------------------------------------


def ece_and_resamples(confidence, right):
    index = calibration.bin_index(confidence)
    gaps, n = right - confidence, len(right)
    drawn = np.abs(resampled_bin_sums(index, gaps, bins=calibration.BINS)[0]).sum(axis=1) / n
    return float(np.abs(np.bincount(index, gaps, calibration.BINS)).sum() / n), drawn


def compared_ece(confidence_a, right_a, confidence_b, right_b):
    (value_a, a), (value_b, b) = ece_and_resamples(confidence_a, right_a), ece_and_resamples(confidence_b, right_b)
    return paired.compare_resampled(value_a, value_b, a, b, len(right_a))


def compared_worst(rng, first, second, n=400):
    """Both models' lowest true accuracies are the same, whatever the other classes'."""
    found = []
    for accuracies in (first, second):
        right, labels = verdicts(rng, accuracies, n)
        hits, sizes = resampled_bin_sums(labels, right.astype(float), np.ones(n), bins=len(accuracies))
        value = min(right[labels == k].mean() for k in range(len(accuracies)))
        found.append((value, (hits / sizes).min(axis=1)))
    return paired.compare_resampled(found[0][0], found[1][0], found[0][1], found[1][1], n)


def compared_aurc(rng, n=300):
    found = []
    x = rng.normal(size=n)
    wrong = x + rng.normal(size=n) > 1
    for _ in range(2):
        blocks = _Blocks(x + 0.7 * rng.normal(size=n), wrong)
        weights = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=400).astype(float)
        found.append((float(_aurc(blocks, np.ones((1, n)))[0]), _aurc(blocks, weights)))
    return paired.compare_resampled(found[0][0], found[1][0], found[0][1], found[1][1], n)


def calibrated_pair(rng, n, over=0.0, sharp=(True, False)):
    """Two models of the same true ECE, one sharp and one blunt: both calibrated, or both overconfident by `over` everywhere."""
    made = []
    for kind in sharp:
        confidence = np.clip(confident(rng, n, kind), over, 1)
        made += [confidence, rng.random(n) < confidence - over]
    return compared_ece(*made)


def scattered_pair(rng, n):
    """The same true ECE of 0.02 in all bins of one model, in the top bin of the other alone: the plug-ins' biases differ."""
    made = []
    for top_only in (False, True):
        confidence = 0.1 + 0.9 * expit(1.5 + 2 * rng.normal(size=n))
        top = confidence > 14 / 15
        # P(top) from logit((14/15 - 0.1) / 0.9) = 2.526 and the normal law.
        share = stats.norm.sf((logit((14 / 15 - 0.1) / 0.9) - 1.5) / 2)
        off = np.where(top, 0.02 / share, 0.0) if top_only else np.full(n, 0.02)
        made += [confidence, rng.random(n) < confidence - off]
    return compared_ece(*made)


def equal_likelihoods(n):
    a, b = likelihoods(np.random.default_rng(0), 4_000_000)
    bias = float((a - b).mean())  # known to 0.0005, a hundredth of the standard error at n = 1000

    def draw(rng):
        a, b = likelihoods(rng, n)
        return paired.compare_means(a, b + bias)

    return draw


def equal_rmse(rng):
    e = rng.normal(size=(3, 400))
    return paired.compare_means(*((e[0] + e[i]) ** 2 for i in (1, 2)))


LEVELS = {
    # name: (draw, conservative by construction)
    "exact McNemar": (lambda rng: paired.compare_proportions(*two_models(rng, 200, 0.8, 0.8)), True),
    "paired DeLong": (lambda rng: _equal_auroc(rng), False),
    "means, normal": (lambda rng: paired.compare_means(*rng.normal(size=(2, 150))), False),
    "means, exponential, 100": (lambda rng: _skewed(rng, 100), True),
    "means, exponential, 300": (lambda rng: _skewed(rng, 300), True),
    "means, lognormal, 1000": (lambda rng: paired.compare_means(*rng.lognormal(size=(2, 1000))), True),
    "means, NLL, 100": (equal_likelihoods(100), True),
    "means, NLL, 300": (equal_likelihoods(300), True),
    "means, NLL, 1000": (equal_likelihoods(1000), True),
    "means, squared errors": (equal_rmse, True),
    "ECE, both calibrated, 500": (lambda rng: calibrated_pair(rng, 500), True),
    "ECE, both calibrated, 2000": (lambda rng: calibrated_pair(rng, 2000), True),
    "ECE, both calibrated, equally sharp": (lambda rng: calibrated_pair(rng, 500, sharp=(True, True)), True),
    "ECE, both off by 0.05": (lambda rng: calibrated_pair(rng, 1000, 0.05), True),
    "ECE, everywhere and on top, 2000": (lambda rng: scattered_pair(rng, 2000), True),
    "worst class, all alike": (lambda rng: compared_worst(rng, [0.7] * 8, [0.7] * 8), True),
    "worst class, one and all": (lambda rng: compared_worst(rng, [0.7] * 8, [0.7] + [0.9] * 7, 800), True),
    "AURC": (compared_aurc, False),
}


def _equal_auroc(rng):
    x0, x1 = normals(rng)
    noisy = [(x0 + 0.7 * rng.normal(size=200), x1 + 0.7 * rng.normal(size=150)) for _ in range(2)]
    return paired.compare_auroc(*noisy[0], *noisy[1])


def _skewed(rng, n):
    return paired.compare_means(rng.exponential(size=n), np.ones(n))


@several(60, 800)
@pytest.mark.parametrize("name", LEVELS)
def test_levels_are_kept(name, repeats):
    draw, conservative = LEVELS[name]
    rng = np.random.default_rng(14)
    found = [draw(rng) for _ in range(repeats)]
    for one in found:
        d = one.difference
        assert (one.p_value < ALPHA) == (not d.ci_low <= 0 <= d.ci_high)
        assert d.ci_low <= d.value <= d.ci_high
    rate, allowed = np.mean([one.p_value < ALPHA for one in found]), error(ALPHA, repeats)
    assert rate <= ALPHA + allowed, rate
    assert conservative or rate >= ALPHA - allowed, rate


@several(1000, 20000)
def test_mcnemar_levels(repeats):
    """Mid-p is close to its level where the exact test stays below."""
    rng = np.random.default_rng(15)
    differing = rng.binomial(200, 0.15, size=repeats)
    b = rng.binomial(differing, 0.5)
    rates = {
        kind: np.mean([paired.mcnemar(int(x), int(m - x), kind) < ALPHA for x, m in zip(b, differing, strict=True)])
        for kind in ("exact", "mid-p")
    }
    assert rates["exact"] <= ALPHA
    assert abs(rates["mid-p"] - ALPHA) < 0.01 + error(ALPHA, repeats)
    assert rates["exact"] < rates["mid-p"]


@several(60, 500)
def test_holm_keeps_the_family_wise_error(repeats):
    """Six models, five of them equally good and one worse: any false finding among the ten true nulls counts."""
    rng = np.random.default_rng(16)
    accuracies, n = np.array([0.8] * 5 + [0.6]), 250
    wrong = uncorrected = found = 0
    for _ in range(repeats):
        common, own = rng.random((n, 1)), rng.random((n, 6))
        right = np.where(rng.random((n, 6)) < 0.4, common, own) < accuracies
        pairs = list(combinations(range(6), 2))
        p = [paired.compare_means(right[:, i] * 1.0, right[:, j] * 1.0).p_value for i, j in pairs]
        null = np.array([j < 5 for _, j in pairs])
        adjusted = np.array(paired.holm(p))
        wrong += bool((adjusted[null] < ALPHA).any())
        uncorrected += bool((np.array(p)[null] < ALPHA).any())
        found += (adjusted[~null] < ALPHA).sum()
    assert wrong / repeats <= ALPHA + error(ALPHA, repeats)
    assert uncorrected / repeats > 0.15
    assert found / (5 * repeats) > 0.9


# Power ---------------------------------------------------------------------------------------------------------------


def proportions(rng, n):
    return paired.compare_proportions(*two_models(rng, n, 0.85, 0.8))


def means(rng, n):
    a, b = likelihoods(rng, n)
    return paired.compare_means(a, b)


def aurocs(rng, n):
    x0, x1 = normals(rng, n // 2, n - n // 2)
    a = (x0 + 0.5 * rng.normal(size=len(x0)), x1 + 0.5 * rng.normal(size=len(x1)))
    b = (x0 + rng.normal(size=len(x0)), x1 + rng.normal(size=len(x1)))
    return paired.compare_auroc(*a, *b)


def eces(rng, n):
    sharp, blunt = confident(rng, n), confident(rng, n, sharp=False)
    return compared_ece(sharp, rng.random(n) < sharp, blunt, rng.random(n) < blunt - 0.08)


POWERS = {"proportions": proportions, "means": means, "AUROC": aurocs}


@several(80, 600)
@pytest.mark.parametrize("name", POWERS)
def test_samples_to_decide_have_the_promised_power(name, repeats):
    """A pilot of 200,000 samples knows the difference and its spread; at the n that it names, four in five decide."""
    rng = np.random.default_rng(17)
    pilot = POWERS[name](rng, 200_000)
    n = decision.samples_to_decide(pilot)
    assert 50 < n < 10000
    direction = math.copysign(1, pilot.difference.value)
    decided = [decision.outcome(POWERS[name](rng, n), direction > 0) == "better" for _ in range(repeats)]
    power = np.mean(decided)
    # The pilot's own error in the difference counts: a z of the pilot z_p makes n uncertain by 2 / z_p, and power by 0.28
    # times 2.8 / z_p (one standard deviation; two are allowed). Another 0.04 are for the discreteness of the exact test.
    z = abs(pilot.difference.value) / ((pilot.difference.ci_high - pilot.difference.ci_low) / 3.92)
    assert abs(power - 0.8) <= 2 * 0.28 * 2.8 / z + 0.04 + error(0.8, repeats), (power, n)


@several(40, 400)
def test_a_small_pilot_promises_no_more_than_it_keeps_for_ece(repeats):
    """The room for bias shrinks faster than the standard error, so that n from a smaller pilot is on the safe side."""
    rng = np.random.default_rng(23)
    pilot = eces(rng, 300).difference
    moved = -0.08 - pilot.value  # a pilot that happens to see the true difference
    pilot = Comparison(Estimate(-0.08, pilot.ci_low + moved, pilot.ci_high + moved, "", 300), 1.0, "")
    n = decision.samples_to_decide(pilot)
    assert 300 < n < 5000
    power = np.mean([decision.outcome(eces(rng, n), False) == "better" for _ in range(repeats)])
    assert power >= 0.8 - error(0.8, repeats), (power, n)


def test_fewer_samples_decide_less():
    rng = np.random.default_rng(18)
    n = decision.samples_to_decide(proportions(rng, 20000))
    power = {m: np.mean([proportions(rng, m).p_value < ALPHA for _ in range(150)]) for m in (n // 3, n)}
    assert power[n // 3] < power[n] - 0.25


def test_non_inferiority_keeps_its_level_and_decides():
    """Models that differ by exactly the margin are called "not worse by more" in 2.5 of 100 cases, equal ones mostly."""
    rng = np.random.default_rng(19)
    repeats, margin, n = 400, 0.05, 600

    def said(first, second):
        return np.mean(
            [
                decision.outcome(paired.compare_proportions(*two_models(rng, n, first, second)), True, margin=margin)
                == "better"
                for _ in range(repeats)
            ]
        )

    assert said(0.80, 0.85) <= ALPHA / 2 + error(ALPHA / 2, repeats)
    assert said(0.85, 0.85) > 0.7


def test_gates_are_wrong_at_most_at_their_rate():
    rng = np.random.default_rng(20)
    repeats, n, p = 2000, 300, 0.9
    k = rng.binomial(n, p, size=repeats)
    verdicts = [decision.at_least(Estimate(v / n, *wilson(v, n), "Wilson", n), p + 1e-12) for v in k]
    assert np.mean([v == "pass" for v in verdicts]) <= ALPHA / 2 + error(ALPHA / 2, repeats)
    assert np.mean([v == "inconclusive" for v in verdicts]) >= LEVEL - error(LEVEL, repeats)


def test_debiased_squares_and_ece_agree_on_who_is_better_calibrated():
    """The comparison of ECE leaves room for its bias; the debiased square needs none. Both find what is plain."""
    rng = np.random.default_rng(21)
    sharp, blunt = confident(rng, 3000), confident(rng, 3000, sharp=False)
    right_a, right_b = rng.random(3000) < sharp, rng.random(3000) < blunt - 0.1
    assert compared_ece(sharp, right_a, blunt, right_b).p_value < 0.01
    a, b = (binned.ece_debiased(c, r)["ece2_debiased"] for c, r in ((sharp, right_a), (blunt, right_b)))
    assert a.ci_high < b.ci_low


def test_comparisons_know_their_kind():
    rng = np.random.default_rng(22)
    kinds = {name: draw(rng, 400).test for name, draw in (*POWERS.items(), ("ECE", eces))}
    assert kinds == {
        "proportions": "exact McNemar",
        "means": "paired t, skewness-corrected",
        "AUROC": "paired DeLong",
        "ECE": "paired bootstrap",
    }
