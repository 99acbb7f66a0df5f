"""Metrics: golden values of the literature, independent implementations, invariants, coverage of intervals."""

import numpy as np
import pytest
from scipy import stats
from scipy.special import softmax
from sklearn import metrics as sk

from robustbench_ext.errors import DataError
from robustbench_ext.metrics import calibration as cal
from robustbench_ext.metrics import classification as cls
from robustbench_ext.metrics import detection as det
from robustbench_ext.metrics.intervals import (
    bootstrap,
    bootstrap_mean,
    clopper_pearson,
    clopper_pearson_all,
    resamples,
    seed_spread,
    simultaneous_level,
    wilson,
)

SCORES = np.array([0.1, 0.4, 0.35, 0.8, 0.35, 0.6])
UNKNOWN = np.array([0, 0, 0, 1, 1, 1], dtype=bool)
CONFIDENCE = np.array([1, 0.9, 0.8, 0.8, 0.6, 0.6, 0.55, 0.3])
CORRECT = np.array([1, 1, 1, 0, 1, 0, 0, 0], dtype=bool)


def pair(scores, unknown):
    return scores[~unknown], scores[unknown]


# Golden values ------------------------------------------------------------------------------------------------------


def test_detection_golden_values():
    clean, unknown = pair(SCORES, UNKNOWN)
    assert det.auroc(clean, unknown).value == pytest.approx(0.833333, abs=1e-6)
    found = det.threshold_metrics(clean, unknown)
    assert found["aupr_out"].value == pytest.approx(0.866667, abs=1e-6)
    assert found["aupr_in"].value == pytest.approx(0.805556, abs=1e-6)
    assert found["fpr95"].value == pytest.approx(0.333333, abs=1e-6)


def test_calibration_golden_values():
    assert cal.ece(CONFIDENCE, CORRECT, bins=10).value == pytest.approx(0.21875, abs=1e-12)
    assert cal.ece(CONFIDENCE, CORRECT, bins=5).value == pytest.approx(0.21875, abs=1e-12)  # right-closed edges
    p = np.array([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3]])
    y = np.array([0, 2])
    assert cal.brier(np.log(p), y).value == pytest.approx(0.5, abs=1e-12)
    assert cal.nll(np.log(p), y).value == pytest.approx(0.780324, abs=1e-6)


@pytest.mark.parametrize(
    ("k", "n", "w", "c"),
    [
        (0, 10, (0, 0.277533), (0, 0.308497)),
        (5, 10, (0.236593, 0.763407), (0.187086, 0.812914)),
        (10, 10, (0.722467, 1), (0.691503, 1)),
        (487, 1000, (0.456130, 0.517970), (0.455598, 0.518479)),
        (5010, 10000, (0.491202, 0.510798), (0.491151, 0.510848)),
    ],
)
def test_proportion_intervals(k, n, w, c):
    assert wilson(k, n) == pytest.approx(w, abs=1e-6)
    assert clopper_pearson(k, n) == pytest.approx(c, abs=1e-6)
    result = stats.binomtest(k, n)
    assert wilson(k, n) == pytest.approx(tuple(result.proportion_ci(method="wilson")), abs=1e-9)
    assert clopper_pearson(k, n) == pytest.approx(tuple(result.proportion_ci(method="exact")), abs=1e-9)


def test_proportion_intervals_equal_statsmodels():
    proportion = pytest.importorskip("statsmodels.stats.proportion")
    for level in (0.5, 0.95, 0.999):
        for k, n in [(0, 1), (1, 1), (0, 40), (3, 40), (40, 40), (17, 5000)]:
            theirs = proportion.proportion_confint(k, n, 1 - level, "wilson")
            assert wilson(k, n, level) == pytest.approx(theirs, abs=1e-9)
            theirs = proportion.proportion_confint(k, n, 1 - level, "beta")
            assert clopper_pearson(k, n, level) == pytest.approx(np.nan_to_num(theirs, nan=float(k == n)), abs=1e-9)
    k = np.array([0, 0.5, 3, 40])
    ends = clopper_pearson_all(k, np.full(4, 40))
    assert np.stack(ends, axis=1) == pytest.approx(np.array([clopper_pearson(v, 40) for v in k]), abs=1e-15)


def test_spread_over_seeds():
    values = np.array([0.71, 0.74, 0.69, 0.75])
    found = seed_spread(values)
    theirs = stats.t.interval(0.95, 3, values.mean(), stats.sem(values))
    assert (found.ci_low, found.ci_high) == pytest.approx(theirs, abs=1e-12)
    assert (found.value, found.n, found.ci_method) == (pytest.approx(values.mean()), 4, "Student over 4 seeds")
    one = seed_spread(values[:1])
    assert one.value == 0.71 and np.isnan(one.ci_low) and one.reason
    assert np.isnan(seed_spread(np.array([1.0, np.inf])).ci_low)
    with pytest.raises(DataError, match="empty"):
        seed_spread(values[:0])


def test_bca_equals_scipy_within_the_error_of_resampling():
    rng = np.random.default_rng(0)
    x, y = rng.exponential(size=80), rng.lognormal(size=50)

    def spread(w):
        return np.sqrt(w @ x**2 / 80 - (w @ x / 80) ** 2)

    def ratio(v, w):
        return (v @ x / 80) / (w @ y / 50)

    cases = [
        (spread, (x,), lambda a, axis: a.std(axis=axis)),
        (ratio, (x, y), lambda a, b, axis: a.mean(axis=axis) / b.mean(axis=axis)),
    ]
    for statistic, data, theirs in cases:
        sizes, value = tuple(len(v) for v in data), float(theirs(*data, axis=0))
        options = {"n": sum(sizes), "repeats": 10000, "method": "bca"}
        found = bootstrap(value, statistic, sizes, **options)
        told = stats.bootstrap(data, theirs, n_resamples=10000, method="BCa", random_state=0)
        # Both ends are quantiles of 10,000 draws near 1 and 3 %: in standard errors of the statistic, each is known to about
        # sqrt(0.01 x 0.99 / 10000) / density(0.01) = 0.04, more where the tail is long; three of them, twice over, by two.
        allowed = 3 * 0.04 * 2**0.5 * 2 * float(told.standard_error)
        assert found.ci_low == pytest.approx(told.confidence_interval.low, abs=allowed)
        assert found.ci_high == pytest.approx(told.confidence_interval.high, abs=allowed)
        if len(data) == 1:  # where the percentile interval is another one
            plain = bootstrap(value, statistic, sizes, n=sum(sizes), repeats=10000)
            assert found.ci_high - plain.ci_high > allowed
    stuck = bootstrap(1.0, lambda w: np.ones(len(w)) * 0.5, (9,), 9, method="bca")
    assert np.isnan(stuck.ci_low) and "one side" in stuck.reason


def test_bca_of_many_samples_leaves_out_groups():
    x = np.random.default_rng(1).exponential(size=3000)
    shape = {"value": float(x.mean()), "statistic": lambda w: w @ x / 3000, "sizes": (3000,), "n": 3000}
    found, plain = bootstrap(**shape, method="bca"), bootstrap(**shape)
    # The acceleration is 2 / (6 sqrt(3000)) = 0.006: the ends move by 0.006 z^2 = 0.023 standard errors, and by the bias.
    assert 0 <= found.ci_high - plain.ci_high < 0.2 * x.std() / 3000**0.5


def test_simultaneous_level():
    assert simultaneous_level([np.array([1.0])]) == pytest.approx(0.95, abs=0.012)  # one point; 4000 paths
    one, many = simultaneous_level([np.arange(1.0, 101)]), simultaneous_level([np.arange(1.0, 101)] * 3)
    assert 0.95 < one < many < 1 - 0.05 / 300  # less than Bonferroni
    # Independent points: times that grow by large factors.
    apart = simultaneous_level([1e6 ** np.arange(1, 6)])
    assert apart == pytest.approx(0.95 ** (1 / 5), abs=0.004)
    assert simultaneous_level([np.array([0.0, np.inf])]) == pytest.approx(0.0)  # nothing to hold


# Independent implementations ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_detection_equals_scikit_learn(seed, ties):
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=300) + 0.7 * (z := rng.random(300) < 0.3)
    if ties:
        scores = np.round(scores, 1)
    clean, unknown = pair(scores, z)
    assert det.auroc(clean, unknown).value == pytest.approx(sk.roc_auc_score(z, scores), abs=1e-12)
    found = det.threshold_metrics(clean, unknown)
    assert found["aupr_out"].value == pytest.approx(sk.average_precision_score(z, scores), abs=1e-12)
    assert found["aupr_in"].value == pytest.approx(sk.average_precision_score(~z, -scores), abs=1e-12)
    fpr, tpr, _ = sk.roc_curve(~z, -scores, drop_intermediate=False)
    assert found["fpr95"].value == pytest.approx(fpr[np.argmax(tpr >= 0.95)], abs=1e-12)
    fpr, tpr = det.roc_curve(clean, unknown, points=10_000)
    assert sk.auc(fpr, tpr) == pytest.approx(sk.roc_auc_score(z, scores), abs=1e-12)
    fpr, tpr = det.roc_curve(clean, unknown, points=40)
    assert (fpr[0], tpr[0], fpr[-1], tpr[-1]) == (0, 0, 1, 1)
    assert len(fpr) <= 40


def test_nll_and_brier_equal_scikit_learn():
    rng = np.random.default_rng(0)
    logits, y = rng.normal(size=(200, 5)) * 3, rng.integers(0, 5, 200)
    p = softmax(logits, axis=1)
    assert cal.nll(logits, y).value == pytest.approx(sk.log_loss(y, p), abs=1e-9)
    onehot = np.eye(5)[y]
    assert cal.brier(logits, y).value == pytest.approx(((p - onehot) ** 2).sum(1).mean(), abs=1e-12)


def test_delong_variance_equals_its_definition():
    rng = np.random.default_rng(3)
    clean, unknown = rng.normal(size=40), rng.normal(size=25) + 1
    kernel = (unknown[:, None] > clean) + 0.5 * (unknown[:, None] == clean)
    variance = kernel.mean(1).var(ddof=1) / 25 + kernel.mean(0).var(ddof=1) / 40
    auc = kernel.mean()
    half = stats.norm.ppf(0.975) * np.sqrt(variance) / (auc * (1 - auc))
    expected = 1 / (1 + np.exp(-(np.log(auc / (1 - auc)) + np.array([-half, half]))))
    found = det.auroc(clean, unknown)
    assert (found.ci_low, found.ci_high) == pytest.approx(tuple(expected), abs=1e-12)


# Invariants ----------------------------------------------------------------------------------------------------------


def test_detection_invariants():
    rng = np.random.default_rng(1)
    clean, unknown = np.round(rng.normal(size=80), 1), np.round(rng.normal(size=50) + 0.5, 1)
    value = det.auroc(clean, unknown).value
    assert det.auroc(-clean, -unknown).value == pytest.approx(1 - value, abs=1e-12)
    assert det.auroc(np.exp(clean), np.exp(unknown)).value == pytest.approx(value, abs=1e-12)
    order = rng.permutation(80)
    assert det.threshold_metrics(clean[order], unknown) == det.threshold_metrics(clean, unknown) or all(
        a.value == pytest.approx(b.value, abs=1e-12)
        for a, b in zip(
            det.threshold_metrics(clean[order], unknown).values(),
            det.threshold_metrics(clean, unknown).values(),
            strict=True,
        )
    )
    constant = det.threshold_metrics(np.zeros(30), np.zeros(10))
    assert det.auroc(np.zeros(30), np.zeros(10)).value == 0.5
    assert constant["aupr_out"].value == pytest.approx(0.25)
    assert constant["aupr_in"].value == pytest.approx(0.75)
    assert constant["fpr95"].value == 1.0


def test_perfect_separation_still_has_an_interval():
    found = det.auroc(np.arange(20.0), np.arange(20.0) + 100)
    assert found.value == found.ci_high == 1.0
    assert 0.8 < found.ci_low < 1.0
    found = det.auroc(np.arange(20.0) + 100, np.arange(20.0))
    assert found.value == found.ci_low == 0.0
    assert 0.0 < found.ci_high < 0.2


def test_undefined_is_nan_with_a_reason_never_a_number():
    empty = np.zeros(0)
    assert np.isnan(det.auroc(np.ones(3), empty).value)
    assert det.threshold_metrics(np.ones(3), empty)["fpr95"].reason
    for call in (
        lambda: det.auroc(np.array([np.nan]), np.ones(2)),
        lambda: cls.accuracy(np.zeros(0, dtype=bool)),
        lambda: cal.nll(np.full((2, 3), np.nan), np.zeros(2, dtype=int)),
        lambda: cal.ece(np.ones(3), np.ones(2, dtype=bool)),
        lambda: cal.bin_index(np.array([1.2])),
        lambda: wilson(3, 2),
    ):
        with pytest.raises(DataError):
            call()
    infinite = cal.nll(np.array([[0.0, -np.inf]]), np.array([1]))
    assert infinite.value == np.inf  # not clipped
    assert np.isnan(infinite.ci_low)


def test_ece_invariants():
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.2, 1, 500)
    correct = rng.random(500) < confidence
    one = cal.ece(confidence, correct, bins=1)
    assert one.value == pytest.approx(abs(correct.mean() - confidence.mean()), abs=1e-12)
    found = cal.ece(confidence, correct)
    assert 0 <= found.ci_low <= found.value <= found.ci_high <= 1
    order = rng.permutation(500)
    assert cal.ece(confidence[order], correct[order]).value == pytest.approx(found.value, abs=1e-12)
    bins = cal.reliability(confidence, correct)
    assert sum(b.n for b in bins) == 500
    assert sum(b.n * abs(b.accuracy - b.confidence) for b in bins) / 500 == pytest.approx(found.value, abs=1e-12)


def test_proper_scores():
    uniform = np.zeros((6, 4))
    y = np.array([0, 1, 2, 3, 0, 1])
    assert cal.brier(uniform, y).value == pytest.approx(0.75)
    assert cal.nll(uniform, y).value == pytest.approx(np.log(4))
    sure = 200.0 * np.eye(4)[y]
    assert cal.brier(sure, y).value == pytest.approx(0, abs=1e-12)
    # A constant added to a sample's logits changes nothing.
    assert cal.nll(sure + 7.0, y).value == pytest.approx(cal.nll(sure, y).value, abs=1e-12)


def test_worst_case_and_worst_class():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 400)
    verdicts = [rng.random(400) < p for p in (0.9, 0.7, 0.8)]
    union = cls.worst_case(verdicts)
    assert all(union.mean() <= v.mean() for v in verdicts)
    assert union.tolist() == [a and b and c for a, b, c in zip(*verdicts, strict=True)]
    classes = cls.per_class_accuracy(union, labels, 5)
    assert np.isnan(classes[4].value)
    worst, k = cls.worst_class_accuracy(union, labels, 5)
    assert worst.value == min(c.value for c in classes[:4]) == classes[k].value
    assert worst.value <= np.mean([c.value for c in classes[:4]])
    assert worst.ci_low < classes[k].ci_low  # a wider interval: it holds whichever class is worst


def test_worst_class_interval_covers_where_a_small_class_hides():
    rng = np.random.default_rng(5)
    labels = np.repeat([0, 1], [2000, 10])
    hits, repeats = 0, 300
    for _ in range(repeats):
        right = rng.random(2010) < np.where(labels == 0, 0.80, 0.75)
        worst, _k = cls.worst_class_accuracy(right, labels, 2)
        hits += worst.ci_low <= 0.75 <= worst.ci_high
    assert hits >= _covers(repeats)


# Bootstrap -----------------------------------------------------------------------------------------------------------


def test_resamples_are_bounded_in_memory_and_repeatable(monkeypatch):
    whole = [w for (w,) in resamples((50,), 40, seed=1)]
    assert len(whole) == 1
    assert (whole[0].sum(axis=1) == 50).all()
    assert np.array_equal(whole[0], next(resamples((50,), 40, seed=1))[0])
    monkeypatch.setattr("robustbench_ext.metrics.intervals._BLOCK", 500)
    blocks = [w for (w,) in resamples((50,), 40, seed=1)]
    assert [len(b) for b in blocks] == [10, 10, 10, 10]
    assert not np.array_equal(blocks[0], blocks[1])
    two = next(resamples((30, 30), 5, seed=1))
    assert not np.array_equal(*two)  # groups are resampled independently


def test_bootstrap_of_a_mean_matches_normal_theory():
    values = np.random.default_rng(0).normal(size=400)
    found = bootstrap_mean(values)
    half = 1.96 * values.std() / 20
    # The bootstrap's own Monte-Carlo error of a 2.5 % quantile with 1,000 resamples is about 0.085 standard errors.
    assert found.ci_low == pytest.approx(values.mean() - half, abs=3 * 0.085 * half / 1.96)
    assert found.ci_high == pytest.approx(values.mean() + half, abs=3 * 0.085 * half / 1.96)
    assert bootstrap_mean(values) == found
    flat = bootstrap_mean(np.full(20, 0.3))
    assert flat.ci_high - flat.ci_low < 1e-12


def _covers(repeats, level=0.95):
    """The least count of hits that a 95 % interval must reach but for one run in 10,000."""
    return stats.binom.ppf(1e-4, repeats, level)


@pytest.mark.parametrize("shift", [0.0, 0.03, 0.15], ids=["calibrated", "slight", "strong"])
def test_ece_interval_covers(shift):
    rng = np.random.default_rng(7)
    population = 1 - 0.5 * rng.beta(1, 4, 200_000)
    accuracy = np.clip(population - shift, 0, 1)
    index = cal.bin_index(population)
    truth = sum(abs((accuracy - population)[index == b].sum()) for b in range(cal.BINS)) / len(population)
    hits, repeats = 0, 120
    for r in range(repeats):
        drawn = rng.integers(0, len(population), 1000)
        found = cal.ece(population[drawn], rng.random(1000) < accuracy[drawn], repeats=400, seed=r)
        hits += found.ci_low <= truth <= found.ci_high
    assert hits >= _covers(repeats)


def test_ece_interval_of_an_accurate_calibrated_model_reaches_zero():
    """All correct at confidence 0.99: resampled residuals show no variation, yet this is what calibration looks like."""
    found = cal.ece(np.full(360, 0.99), np.ones(360, dtype=bool))
    assert found.ci_low == 0.0
    hits, repeats = 0, 150
    rng = np.random.default_rng(3)
    for r in range(repeats):
        found = cal.ece(np.full(360, 0.995), rng.random(360) < 0.995, repeats=300, seed=r)
        hits += found.ci_low == 0.0
    assert hits >= _covers(repeats)


def test_fpr_interval_covers_a_rare_rate():
    rng = np.random.default_rng(9)
    shift = 4.4
    truth = stats.norm.cdf(stats.norm.ppf(0.95) - shift)
    hits, repeats = 0, 150
    for _ in range(repeats):
        found = det.threshold_metrics(rng.normal(size=500), rng.normal(size=300) + shift)["fpr95"]
        hits += found.ci_low <= truth <= found.ci_high
    assert hits >= _covers(repeats)


def test_fpr95_keeps_exactly_95_percent():
    """Of 20 clean scores the threshold is at the 19th: an unknown input there is accepted, one above is not."""
    clean = np.arange(20.0)
    assert det.threshold_metrics(clean, np.array([18.0, 18.5]))["fpr95"].value == 0.5
    few = det.threshold_metrics(clean, np.array([18.5]))
    assert np.isnan(few["aupr_out"].ci_low)
    assert "fewer than two" in few["aupr_out"].reason
    perfect = det.threshold_metrics(clean, clean + 100)
    assert perfect["fpr95"].ci_high > 0.1  # 0 of 20 is not certainty
    assert "perfect separation" in perfect["aupr_in"].reason


def test_auroc_interval_covers():
    rng = np.random.default_rng(8)
    truth = stats.norm.cdf(1.5 / np.sqrt(2))
    repeats = 400
    hits = 0
    for _ in range(repeats):
        found = det.auroc(rng.normal(size=80), rng.normal(size=60) + 1.5)
        hits += found.ci_low <= truth <= found.ci_high
    assert hits >= _covers(repeats)


def test_wilson_covers_on_average():
    n = 30
    p = (np.arange(4000) + 0.5) / 4000
    inside = np.zeros_like(p)
    exact = np.zeros_like(p)
    for k in range(n + 1):
        mass = stats.binom.pmf(k, n, p)
        low, high = wilson(k, n)
        inside += mass * ((low <= p) & (p <= high))
        low, high = clopper_pearson(k, n)
        exact += mass * ((low <= p) & (p <= high))
    assert inside.mean() == pytest.approx(0.95, abs=0.01)
    assert exact.min() >= 0.95 - 1e-9
