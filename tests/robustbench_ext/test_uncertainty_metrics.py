"""Metrics of uncertainty: golden values, independent implementations, invariants, coverage of intervals."""

import math
from itertools import pairwise

import numpy as np
import pytest
from scipy import stats
from scipy.integrate import quad
from scipy.special import log_softmax, softmax
from sklearn import metrics as sk

from robustbench_ext.errors import DataError
from robustbench_ext.metrics import METRICS, binned, classwise, conditional, crps, ranking, resampling, selective
from robustbench_ext.metrics import calibration as cal
from robustbench_ext.metrics import coverage_curves as curves
from robustbench_ext.metrics import quantiles as qu
from robustbench_ext.metrics import regression as reg
from robustbench_ext.metrics import sets as ps

CONFIDENCE = np.array([1, 0.9, 0.8, 0.8, 0.6, 0.6, 0.55, 0.3])
CORRECT = np.array([1, 1, 1, 0, 1, 0, 0, 0], dtype=bool)
NOMINAL = (0.5, 0.8, 0.9, 0.95)
LEVELS = (0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.975)


def forecasts(n=400, seed=0, inflate=1.0):
    """Targets, and the quantiles, median and central intervals of a heteroscedastic normal forecast."""
    rng = np.random.default_rng(seed)
    mean, std = rng.normal(size=n) * 2, rng.uniform(0.3, 2, n)
    y = mean + std * rng.normal(size=n) * inflate
    q = mean[:, None] + std[:, None] * stats.norm.ppf(LEVELS)
    return y, mean, std, q, q[:, [3, 2, 1, 0]], q[:, [5, 6, 7, 8]]


def classifier(n=500, classes=4, seed=0):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(n, classes)) * 2
    return logits, (logits + rng.gumbel(size=logits.shape)).argmax(axis=1)  # labels drawn from the softmax: calibrated


def least_hits(repeats, level=0.95):
    """The least count of hits that a 95 % interval must reach but for one run in 10,000."""
    return stats.binom.ppf(1e-4, repeats, level)


# Golden values ----------------------------------------------------------------------------------------------------------


def test_golden_values():
    assert binned.ece_equal_mass(CONFIDENCE, CORRECT, bins=4).value == pytest.approx(0.21875, abs=1e-12)
    assert binned.ece_debiased(CONFIDENCE, CORRECT, bins=4)["ece2_debiased"].value == pytest.approx(
        -0.05421875, abs=1e-12
    )
    assert binned.ece_debiased(CONFIDENCE, CORRECT, bins=4)["rmsce_debiased"].value == 0.0
    lo, up = np.zeros(2), np.full(2, 2.0)
    assert reg.interval_scores(np.array([3.0, 1.0]), lo, up, 0.9) == pytest.approx([22.0, 2.0], abs=1e-12)
    assert reg.interval_score(np.array([-0.5]), lo[:1], up[:1], 0.95).value == pytest.approx(22.0, abs=1e-9)
    one = np.ones(1)
    assert crps.crps_gaussian(0.5 * one, 0 * one, one).value == pytest.approx(0.331404, abs=1e-6)
    members = np.array([[3.0, 0.0, 1.0]])
    assert crps.crps_ensemble(2 * one, members).value == pytest.approx(2 / 3, abs=1e-12)
    assert crps.crps_ensemble(2 * one, members, fair=True).value == pytest.approx(1 / 3, abs=1e-12)
    t, q, y = (0.1, 0.25, 0.5, 0.75, 0.9), np.array([[-1, -0.4, 0.1, 0.6, 1.4]]), np.array([1.7])
    wis = qu.wis_from_quantiles(y, q, t)
    assert wis["wis_sum"].value == pytest.approx(5.38, abs=1e-12)
    assert qu.pinball(y, q, t).value == pytest.approx(0.538, abs=1e-12)
    assert wis["wis_mean"].value == pytest.approx(1.076, abs=1e-12)
    scores, errors = -np.array([0.9, 0.8, 0.7, 0.6, 0.5]), np.array([0, 0, 1, 0, 1], dtype=bool)
    # 1/25 (3 + 1): the third answered sample is wrong in 3 of 5 coverages, the fifth in one.
    assert selective.augrc(scores, errors).value == pytest.approx(4 / 25, abs=1e-12)
    assert selective.aurc(scores, errors).value == pytest.approx(0.196667, abs=1e-6)
    # AURC's best is 0.13, so the area between is 0.0667, over a mean error of 0.4.
    assert selective.ause(scores, errors.astype(float)).value == pytest.approx(1 / 6, abs=1e-12)


def test_every_metric_is_described():
    y, mean, _, q, low, high = forecasts(50)
    logits, labels = classifier(60)
    confidence, correct = cal.confidence_and_correctness(logits, labels)
    made = {
        *binned.ece_debiased(confidence, correct),
        *classwise.brier_parts(logits, labels),
        *ps.set_metrics(logits > 0, labels),
        *reg.side_coverage(y, mean, low[:, 0], high[:, 0]),
        *qu.wis_from_quantiles(y, q, LEVELS),
    }
    own = "ece_equal_mass mce classwise_ece ace tace augrc ause error_spearman error_auroc rmse mae r2 coverage"
    more = "side_error width width_normalised interval_score pinball crps crossing_rate sharpness interval_ece quantile_ece"
    worst = "worst_group_coverage width_stratified_coverage worst_slab_coverage"
    assert {*made, *own.split(), *more.split(), *worst.split()} <= set(METRICS)


# Independent implementations ----------------------------------------------------------------------------------------------


def test_regression_equals_scikit_learn():
    y, mean, _, q, _, _ = forecasts()
    assert reg.rmse(y, mean).value == pytest.approx(sk.mean_squared_error(y, mean) ** 0.5, abs=1e-12)
    assert reg.mae(y, mean).value == pytest.approx(sk.mean_absolute_error(y, mean), abs=1e-12)
    assert reg.r2(y, mean).value == pytest.approx(sk.r2_score(y, mean), abs=1e-12)
    losses = qu.pinball_losses(y, q, LEVELS).mean(axis=0)
    for k, t in enumerate(LEVELS):
        assert losses[k] == pytest.approx(sk.mean_pinball_loss(y, q[:, k], alpha=t), abs=1e-12)


def test_scores_equal_scoringrules():
    sr = pytest.importorskip("scoringrules")
    y, mean, std, q, low, high = forecasts()
    alpha = 1 - np.array(NOMINAL)
    assert crps.crps_gaussian(y, mean, std).value == pytest.approx(
        sr.crps_normal(y, mean, std, backend="numpy").mean(), abs=1e-9
    )
    for fair, estimator in ((False, "nrg"), (True, "fair")):
        theirs = sr.crps_ensemble(y, q, estimator=estimator, backend="numpy").mean()
        assert crps.crps_ensemble(y, q[:, ::-1], fair).value == pytest.approx(theirs, abs=1e-9)
    for k, c in enumerate(NOMINAL):
        theirs = sr.interval_score(y, low[:, k], high[:, k], 1 - c, backend="numpy")
        assert reg.interval_scores(y, low[:, k], high[:, k], c) == pytest.approx(theirs, abs=1e-9)
    # Its median term (0.10, NumPy) takes the median itself for the distance to it, so the intervals alone are compared.
    theirs = sr.weighted_interval_score(y, mean, low, high, alpha, w_median=0.0, backend="numpy").mean()
    theirs += np.abs(y - mean).mean() / 9
    assert qu.wis_from_intervals(y, mean, low, high, NOMINAL)["wis_mean"].value == pytest.approx(theirs, abs=1e-9)
    middle = (np.arange(9) + 0.5) / 9
    theirs = sr.crps_quantile(y, q, middle, backend="numpy").mean()
    assert crps.crps_quantiles(y, q, middle).value == pytest.approx(theirs, abs=1e-9)


def test_calibration_equals_torchmetrics():
    pytest.importorskip("torchmetrics")
    import torch
    from torchmetrics.functional.classification import binary_calibration_error

    # Its bins are closed on the left and ours on the right: no confidence lies on an edge here. Single precision.
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.01, 0.99, 700).astype(np.float32).astype(np.float64)
    correct = rng.random(700) < confidence**2
    p, a = torch.from_numpy(confidence).float(), torch.from_numpy(correct).long()
    for norm, ours in (("l1", cal.ece(confidence, correct).value), ("max", binned.mce(confidence, correct).value)):
        assert ours == pytest.approx(float(binary_calibration_error(p, a, n_bins=15, norm=norm)), abs=1e-6)
    from torchmetrics.functional.regression import continuous_ranked_probability_score

    y, _, _, q, _, _ = forecasts()
    theirs = continuous_ranked_probability_score(torch.from_numpy(q), torch.from_numpy(y))
    assert crps.crps_ensemble(y, q).value == pytest.approx(float(theirs), abs=1e-6)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # mapie takes the mean of sizes that no set has
def test_coverage_equals_mapie():
    regression = pytest.importorskip("mapie.metrics.regression")
    classification = pytest.importorskip("mapie.metrics.classification")
    y, _, _, _, low, high = forecasts(inflate=1.3)
    lo, up = low[:, 2], high[:, 2]
    both = np.stack([lo, up], axis=1)
    covered = reg.covered(y, lo, up)
    assert reg.coverage(y, lo, up).value == pytest.approx(regression.regression_coverage_score(y, both)[0], abs=1e-12)
    assert reg.width(lo, up).value == pytest.approx(
        regression.regression_mean_width_score(both[:, :, None])[0], abs=1e-12
    )
    assert reg.interval_score(y, lo, up, 0.9).value == pytest.approx(
        regression.regression_mwi_score(y, both[:, :, None], 0.9), abs=1e-9
    )
    worst, _ = conditional.width_stratified_coverage(covered, lo, up, strata=4)
    assert worst.value == pytest.approx(regression.regression_ssc_score(y, both, num_bins=4)[0], abs=1e-12)
    logits, labels = classifier()
    chosen = softmax(logits, axis=1) > 0.2
    chosen[np.arange(len(labels)), logits.argmax(axis=1)] = True  # no empty sets, which the two treat differently
    assert ps.set_coverage(chosen, labels).value == pytest.approx(
        classification.classification_coverage_score(labels, chosen)[0], abs=1e-12
    )
    assert ps.set_size(chosen, labels).value == pytest.approx(
        classification.classification_mean_width_score(chosen[:, :, None])[0], abs=1e-12
    )
    by_size = classification.classification_ssc(labels, chosen)[0]
    there = np.unique(chosen.sum(axis=1))
    worst, size = ps.size_stratified_coverage(chosen, labels)
    assert worst.value == pytest.approx(by_size[there].min(), abs=1e-12)
    assert by_size[size] == worst.value


@pytest.mark.parametrize("ties", [False, True])
def test_ranks_equal_scipy(ties):
    rng = np.random.default_rng(1)
    u, e = rng.random(200), rng.normal(size=200)
    if ties:
        u, e = np.round(u, 1), np.round(e, 1)
    found = ranking.error_spearman(u, e)
    assert found.value == pytest.approx(stats.spearmanr(u, np.abs(e)).statistic, abs=1e-12)
    # A resample is the statistic of the resample: weights stand for copies.
    drawn = rng.integers(0, 200, 200)
    w = np.bincount(drawn, minlength=200)[None].astype(float)
    a, b = ranking._Ranks(u).of(w), ranking._Ranks(np.abs(e)).of(w)
    expected = stats.spearmanr(u[drawn], np.abs(e)[drawn]).statistic
    assert ranking._correlation(a, b, w)[0] == pytest.approx(expected, abs=1e-12)
    wrong = np.abs(e) > 1
    assert ranking.error_auroc(u, wrong).value == pytest.approx(sk.roc_auc_score(wrong, u), abs=1e-12)


# Calibration: invariants ---------------------------------------------------------------------------------------------------


def test_equal_mass_bins():
    rng = np.random.default_rng(0)
    values = rng.random(103)
    index = binned.equal_mass_index(values, 10)
    assert np.bincount(index).tolist() == [11, 11, 11, *[10] * 7]
    assert all(values[index == a].max() < values[index == b].min() for a, b in pairwise(range(10)))
    tied = np.round(values, 1)
    index = binned.equal_mass_index(tied, 10)
    assert all(len(set(index[tied == v])) == 1 for v in np.unique(tied))  # ties are not split
    order = rng.permutation(103)
    assert np.array_equal(binned.equal_mass_index(tied[order], 10), index[order])


def test_calibration_invariants():
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.2, 1, 500)
    correct = rng.random(500) < confidence**2
    gap = abs(correct.mean() - confidence.mean())
    for metric in (cal.ece, binned.ece_equal_mass, binned.mce):
        assert metric(confidence, correct, bins=1).value == pytest.approx(gap, abs=1e-12)
        found = metric(confidence, correct)
        assert 0 <= found.ci_low <= found.value <= found.ci_high <= 1
        order = rng.permutation(500)
        assert metric(confidence[order], correct[order]).value == pytest.approx(found.value, abs=1e-12)
    single = binned.ece_equal_mass(confidence, correct, bins=500)
    assert single.value == pytest.approx(np.abs(correct - confidence).mean(), abs=1e-12)
    assert binned.mce(confidence, correct).value >= cal.ece(confidence, correct).value
    # One bin: the debiased square is the squared gap less the variance of the accuracy.
    noise = correct.mean() * (1 - correct.mean()) / 499
    found = binned.ece_debiased(confidence, correct, bins=1)
    assert found["ece2_debiased"].value == pytest.approx(gap**2 - noise, abs=1e-12)
    assert found["rmsce_debiased"].value == pytest.approx(math.sqrt(gap**2 - noise), abs=1e-12)


def test_debiased_square_is_unbiased_where_the_plug_in_is_not():
    rng = np.random.default_rng(0)
    plug_in, debiased = [], []
    for _ in range(300):
        confidence = np.repeat([0.6, 0.7, 0.8, 0.9], 15)
        correct = rng.random(60) < confidence - 0.1
        index = binned.equal_mass_index(confidence, 4)
        plug_in.append((np.bincount(index, correct - confidence) ** 2).sum() / 15 / 60)
        debiased.append(binned.ece_debiased(confidence, correct, bins=4)["ece2_debiased"].value)
    error = np.std(debiased) / math.sqrt(300)
    assert abs(np.mean(debiased) - 0.01) < 4 * error  # true gaps are 0.1 everywhere
    assert np.mean(plug_in) - 0.01 > 4 * error


def test_debiased_interval_takes_off_the_bias_of_resampling():
    """Many small bins of a calibrated model: resampled squares alone would lie above the truth, 0, most of the time."""
    rng = np.random.default_rng(1)
    hits, repeats = 0, 100
    for _ in range(repeats):
        confidence = rng.uniform(0.5, 0.9, 200)
        found = binned.ece_debiased(confidence, rng.random(200) < confidence, bins=40)["ece2_debiased"]
        hits += found.ci_low <= 0 <= found.ci_high
    assert hits >= least_hits(repeats)


def test_classwise_invariants():
    logits, labels = classifier()
    p = softmax(logits, axis=1)
    onehot = np.eye(4)[labels]
    expected = np.mean(
        [np.abs(np.bincount(cal.bin_index(p[:, k]), onehot[:, k] - p[:, k])).sum() / 500 for k in range(4)]
    )
    assert classwise.classwise_ece(logits, labels).value == pytest.approx(expected, abs=1e-12)
    assert classwise.tace(logits, labels, threshold=0.0).value == classwise.ace(logits, labels).value
    kept = p[:, 1] >= 0.3
    one = np.where(np.arange(4) == 1, p, 0.0)  # what is left of TACE if class 1 alone is ever above the threshold
    assert kept.any()
    index = binned.equal_mass_index(one[kept, 1], 5)
    term = np.abs(np.bincount(index, onehot[kept, 1] - p[kept, 1])).sum() / kept.sum()
    terms = []
    for k in range(4):
        kept = p[:, k] >= 0.3
        index = binned.equal_mass_index(p[kept, k], 5)
        terms.append(np.abs(np.bincount(index, onehot[kept, k] - p[kept, k])).sum() / kept.sum())
    assert terms[1] == term
    assert classwise.tace(logits, labels, bins=5, threshold=0.3).value == pytest.approx(np.mean(terms), abs=1e-12)
    assert "no probability" in classwise.tace(np.zeros((5, 4)), labels[:5], threshold=0.3).reason
    # Two classes: both classes' gaps are the same but for their sign. Odd bins, and no p on an edge, so bins mirror too.
    logits, labels = classifier(classes=2)
    p = softmax(logits, axis=1)[:, 1]
    binary = np.abs(np.bincount(cal.bin_index(p), labels - p)).sum() / 500
    assert classwise.classwise_ece(logits, labels).value == pytest.approx(binary, abs=1e-12)
    order = np.random.default_rng(0).permutation(500)
    for metric in (classwise.classwise_ece, classwise.ace, classwise.tace):
        assert metric(logits[order], labels[order]).value == pytest.approx(metric(logits, labels).value, abs=1e-12)


def test_many_classes_in_chunks(monkeypatch):
    logits, labels = classifier(classes=7)
    whole = [classwise.ace(logits, labels), *classwise.brier_parts(logits, labels).values()]
    monkeypatch.setattr(classwise, "_TABLE", 500 * 50 * 2)
    parts = [classwise.ace(logits, labels), *classwise.brier_parts(logits, labels).values()]
    for a, b in zip(whole, parts, strict=True):
        assert (a.value, a.ci_low, a.ci_high) == pytest.approx((b.value, b.ci_low, b.ci_high), abs=1e-12)


def test_brier_parts_add_up():
    logits, labels = classifier()
    parts = {name: e.value for name, e in classwise.brier_parts(logits, labels).items()}
    total = parts["brier_reliability"] - parts["brier_resolution"] + parts["brier_uncertainty"] + parts["brier_within"]
    assert total == pytest.approx(cal.brier(logits, labels).value, abs=1e-12)
    share = np.bincount(labels) / 500
    assert parts["brier_uncertainty"] == pytest.approx(1 - (share**2).sum(), abs=1e-12)
    # Within a bin: variance of the forecasts less twice their covariance with the outcome.
    p, within = softmax(logits, axis=1), 0.0
    for k in range(4):
        index, hit = cal.bin_index(p[:, k]), labels == k
        for b in range(15):
            if (here := index == b).any():
                q, z = p[here, k], hit[here]
                within += here.mean() * (q.var() - 2 * ((q - q.mean()) * (z - z.mean())).mean())
    assert parts["brier_within"] == pytest.approx(within, abs=1e-12)
    # Three forecasts, each shared by all samples of its bins: the textbook's three parts are all.
    three = np.log([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.4, 0.3, 0.3]])[np.arange(300) % 3]
    shared = classwise.brier_parts(three, np.random.default_rng(0).integers(0, 3, 300))
    assert shared["brier_within"].value == pytest.approx(0, abs=1e-12)


def test_reliability_bands():
    rng = np.random.default_rng(2)
    confidence = 1 - 0.5 * rng.beta(1, 4, 600)
    band = cal.consistency_band(confidence)
    assert (band.low_all <= band.low).all()
    assert (band.low <= band.confidence).all()
    assert (band.confidence <= band.high).all()
    assert (band.high <= band.high_all).all()
    assert band.n.tolist() == [b.n for b in cal.reliability(confidence, confidence > 0.8)]
    inside, everywhere, repeats = np.zeros(len(band.n)), 0, 400
    for _ in range(repeats):
        correct = rng.random(600) < confidence
        accuracy = np.array([b.accuracy for b in cal.reliability(confidence, correct)])
        inside += (band.low - 1e-12 <= accuracy) & (accuracy <= band.high + 1e-12)
        everywhere += ((band.low_all - 1e-12 <= accuracy) & (accuracy <= band.high_all + 1e-12)).all()
    assert (inside >= least_hits(repeats)).all()
    # Not far above its level either: outcomes are discrete, so bars cover a little more than they say.
    assert least_hits(repeats) <= everywhere <= stats.binom.ppf(1 - 1e-4, repeats, 0.985)
    wrong = rng.random(600) < confidence - 0.2
    accuracy = np.array([b.accuracy for b in cal.reliability(confidence, wrong)])
    assert (accuracy < band.low_all).any()


# Regression: invariants ----------------------------------------------------------------------------------------------------


def test_interval_invariants():
    y, mean, std, _, low, high = forecasts(inflate=1.2)
    assert (np.diff([reg.coverage(y, low[:, k], high[:, k]).value for k in range(4)]) >= 0).all()  # nested
    for k, c in enumerate(NOMINAL):
        lo, up = low[:, k], high[:, k]
        scores, covered = reg.interval_scores(y, lo, up, c), reg.covered(y, lo, up)
        assert (scores >= up - lo).all()
        assert np.array_equal(scores[covered], (up - lo)[covered])
        losses = qu.pinball_losses(y, np.stack([lo, up], axis=1), ((1 - c) / 2, (1 + c) / 2))
        assert scores == pytest.approx(2 / (1 - c) * losses.sum(axis=1), rel=1e-12)
    sides = reg.side_coverage(y, mean, low[:, 2], high[:, 2])
    above = (y > mean).mean()
    total = above * sides["coverage_above"].value + (1 - above) * sides["coverage_below"].value
    assert total == pytest.approx(reg.coverage(y, low[:, 2], high[:, 2]).value, abs=1e-12)
    error = reg.side_error(y, mean, low[:, 2], high[:, 2], 0.9)
    assert error.value == pytest.approx(sum(abs(e.value - 0.9) for e in sides.values()), abs=1e-12)
    assert error.ci_low <= error.value <= error.ci_high
    assert reg.width_normalised(y, low[:, 2], high[:, 2]).value == pytest.approx(
        (high[:, 2] - low[:, 2]).mean() / y.std(), abs=1e-12
    )
    assert reg.width_normalised(y, low[:, 2], high[:, 2], by="range").value == pytest.approx(
        (high[:, 2] - low[:, 2]).mean() / np.ptp(y), abs=1e-12
    )
    assert reg.sharpness(std).value == pytest.approx(math.sqrt((std**2).mean()), abs=1e-12)
    edge = np.array([0.0, 1.0])
    assert reg.coverage(edge, np.zeros(2), np.ones(2)).value == 1.0  # both ends are closed


def test_wis_is_twice_the_pinball_sum_either_way():
    y, _, _, q, low, high = forecasts()
    a, b = qu.wis_from_quantiles(y, q, LEVELS), qu.wis_from_intervals(y, q[:, 4], low, high, NOMINAL)
    for name in ("wis_sum", "wis_mean"):
        assert (a[name].value, a[name].ci_low, a[name].ci_high) == pytest.approx(
            (b[name].value, b[name].ci_low, b[name].ci_high), rel=1e-12
        )
    assert a["wis_sum"].value == pytest.approx(2 * 9 * qu.pinball(y, q, LEVELS).value, rel=1e-12)
    assert a["wis_sum"].value == pytest.approx(9 * a["wis_mean"].value, rel=1e-12)
    flat = np.repeat(y[:, None], 9, axis=1)
    assert qu.wis_from_quantiles(y, flat, LEVELS)["wis_sum"].value == 0.0
    with pytest.raises(DataError, match="symmetric"):
        qu.wis_from_quantiles(y, q[:, :3], LEVELS[:3])


def test_crps():
    y, mean, std, _, _, _ = forecasts(20)
    assert crps.crps_gaussian(y, mean, np.zeros(20)).value == pytest.approx(np.abs(y - mean).mean(), abs=1e-12)
    assert crps.crps_ensemble(y, mean[:, None]).value == pytest.approx(np.abs(y - mean).mean(), abs=1e-12)
    assert "two members" in crps.crps_ensemble(y, mean[:, None], fair=True).reason
    for i in range(3):
        norm = stats.norm(mean[i], std[i])
        below = quad(lambda x: norm.cdf(x) ** 2, -40, y[i])[0]  # noqa: B023
        above = quad(lambda x: norm.sf(x) ** 2, y[i], 40)[0]  # noqa: B023
        here = slice(i, i + 1)
        assert crps.crps_gaussian(y[here], mean[here], std[here]).value == pytest.approx(below + above, abs=1e-6)
    # Quantiles at (k - 1/2) / m are an ensemble, and approach the distribution as 1 / m.
    errors = []
    for m in (20, 40, 80, 160):
        t = (np.arange(m) + 0.5) / m
        q = mean[:, None] + std[:, None] * stats.norm.ppf(t)
        found = crps.crps_quantiles(y, q, t).value
        assert found == pytest.approx(crps.crps_ensemble(y, q).value, rel=1e-12)
        errors.append(abs(found - crps.crps_gaussian(y, mean, std).value))
    assert all(b < 0.65 * a for a, b in pairwise(errors))


@pytest.mark.parametrize("score", ["nll", "brier", "pinball", "interval", "crps"])
def test_proper_scores_are_least_at_the_truth(score):
    """Over a grid of forecasts, on outcomes in the proportions of the truth: no sampling error."""
    if score in ("nll", "brier"):
        labels = np.repeat([0, 1], [3, 7])
        metric = cal.nll if score == "nll" else cal.brier
        grid = np.arange(0.1, 1, 0.1)
        found = [metric(np.log(np.tile([p, 1 - p], (10, 1))), labels).value for p in grid]
        assert grid[np.argmin(found)] == pytest.approx(0.3)
        return
    y = stats.norm.ppf((np.arange(2001) + 0.5) / 2001)
    grid = np.arange(0.5, 1.55, 0.1)
    ones = np.ones(2001)
    metrics = {
        "pinball": lambda s: qu.pinball(y, np.outer(ones, s * stats.norm.ppf(LEVELS)), LEVELS).value,
        "interval": lambda s: reg.interval_score(y, -1.644854 * s * ones, 1.644854 * s * ones, 0.9).value,
        "crps": lambda s: crps.crps_gaussian(y, 0 * ones, s * ones).value,
    }
    assert grid[np.argmin([metrics[score](s) for s in grid])] == pytest.approx(1.0)


def test_translation_scale_and_order():
    y, mean, std, q, low, high = forecasts()
    lo, up = low[:, 1], high[:, 1]
    order = np.random.default_rng(0).permutation(len(y))
    scale, shift = 3.7, -11.0

    def move(v):
        return scale * v + shift

    # Each metric on (y, mean, std, lo, up, q), and the power of the scale that it has.
    table = {
        "rmse": (lambda y, m, s, lo, up, q: reg.rmse(y, m), 1),
        "mae": (lambda y, m, s, lo, up, q: reg.mae(y, m), 1),
        "r2": (lambda y, m, s, lo, up, q: reg.r2(y, m), 0),
        "coverage": (lambda y, m, s, lo, up, q: reg.coverage(y, lo, up), 0),
        "above": (lambda y, m, s, lo, up, q: reg.side_coverage(y, m, lo, up)["coverage_above"], 0),
        "width": (lambda y, m, s, lo, up, q: reg.width(lo, up), 1),
        "normalised": (lambda y, m, s, lo, up, q: reg.width_normalised(y, lo, up), 0),
        "score": (lambda y, m, s, lo, up, q: reg.interval_score(y, lo, up, 0.8), 1),
        "wis": (lambda y, m, s, lo, up, q: qu.wis_from_quantiles(y, q, LEVELS)["wis_sum"], 1),
        "crps": (lambda y, m, s, lo, up, q: crps.crps_gaussian(y, m, s), 1),
        "crps-q": (lambda y, m, s, lo, up, q: crps.crps_quantiles(y, q, LEVELS), 1),
        "crps-e": (lambda y, m, s, lo, up, q: crps.crps_ensemble(y, q, fair=True), 1),
        "spearman": (lambda y, m, s, lo, up, q: ranking.error_spearman(s, y - m), 0),
        "ause": (lambda y, m, s, lo, up, q: selective.ause(s, np.abs(y - m)), 0),
        "interval-ece": (lambda y, m, s, lo, up, q: curves.interval_ece(y, lo[:, None], up[:, None], (0.8,)), 0),
        "quantile-ece": (lambda y, m, s, lo, up, q: curves.quantile_ece(y, q, LEVELS), 0),
        "worst-width": (
            lambda y, m, s, lo, up, q: conditional.width_stratified_coverage((lo <= y) & (y <= up), lo, up)[0],
            0,
        ),
    }
    for name, (metric, power) in table.items():
        here = metric(y, mean, std, lo, up, q).value
        moved = metric(move(y), move(mean), scale * std, move(lo), move(up), move(q)).value
        assert moved == pytest.approx(scale**power * here, rel=1e-9), name
        shuffled = metric(*(a[order] for a in (y, mean, std, lo, up, q))).value
        assert shuffled == pytest.approx(here, rel=1e-12), name


def test_crossing():
    crossed = qu.crossings(np.array([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0], [1.0, 3.0, 2.0]]))
    assert crossed.tolist() == [0, 2, 1]
    assert qu.crossing_rate(crossed, 2).value == 0.5
    none = qu.crossing_rate(np.zeros(50, dtype=int), 8)
    assert none.value == none.ci_low == 0.0
    assert none.ci_high == pytest.approx(0.0714, abs=1e-4)  # Wilson's upper end of 0 of 50


def test_coverage_curves():
    y, mean, std, q, low, high = forecasts(2000)
    intervals, quantiles = curves.interval_curve(y, low, high, NOMINAL), curves.quantile_curve(y, q, LEVELS)
    for curve in (intervals, quantiles):
        assert ((curve.low <= curve.nominal) & (curve.nominal <= curve.high)).all()
        assert (np.diff(curve.observed) >= 0).all()
    pit = curves.pit_curve(curves.pit_gaussian(y, mean, std), LEVELS)
    assert pit.observed == pytest.approx(quantiles.observed, abs=1e-12)
    assert curves.interval_ece(y, low, high, NOMINAL).value == pytest.approx(
        np.abs(intervals.observed - NOMINAL).mean(), abs=1e-12
    )
    wide = curves.interval_curve(*(forecasts(2000, inflate=0.5)[i] for i in (0, 4, 5)), NOMINAL)
    assert (wide.low > wide.nominal).all()
    # All of 50 covered at a nominal 0.95: no resample varies, and yet it is what one calibrated method in 13 would show.
    all_in = curves.interval_ece(y[:50], low[:50, 3:] - 100, high[:50, 3:] + 100, (0.95,))
    assert (all_in.value, all_in.ci_low) == (pytest.approx(0.05), 0.0)
    assert curves.interval_ece(*(forecasts(2000, inflate=0.5)[i] for i in (0, 4, 5)), NOMINAL).ci_low > 0


# Selective prediction and conditional coverage ----------------------------------------------------------------------------


def brute_curves(scores, errors):
    """Mean over orders of ties of (AURC, AUGRC): errors within ties are replaced by their mean."""
    expected = np.array([errors[scores == s].mean() for s in np.sort(scores)])
    n = len(scores)
    joint = np.cumsum(expected) / n
    return (joint * n / np.arange(1, n + 1)).mean(), joint.mean()


@pytest.mark.parametrize("ties", [False, True])
def test_augrc_and_ause_by_brute_force(ties):
    rng = np.random.default_rng(3)
    scores, errors = rng.random(60), rng.exponential(size=60)
    if ties:
        scores, errors = np.round(scores, 1), np.round(errors, 1)
    wrong = errors > 1
    assert selective.augrc(scores, wrong).value == pytest.approx(brute_curves(scores, wrong)[1], abs=1e-12)
    expected = (brute_curves(scores, errors)[0] - brute_curves(errors, errors)[0]) / errors.mean()
    assert selective.ause(scores, errors).value == pytest.approx(expected, abs=1e-12)
    assert selective.ause(np.exp(scores), errors).value == selective.ause(scores, errors).value
    assert selective.augrc(np.zeros(60), np.ones(60, dtype=bool)).value == pytest.approx(0.5 + 1 / 120, abs=1e-12)
    coverage, curve, oracle = selective.sparsification_curve(scores, errors)
    assert coverage[-1] == 1.0
    assert curve[-1] == pytest.approx(oracle[-1], abs=1e-12)
    assert (oracle <= curve + 1e-12).all()
    # Weights stand for copies: exact for AUGRC.
    drawn = rng.integers(0, 60, 60)
    w = np.bincount(drawn, minlength=60)[None].astype(float)
    found = selective._augrc(selective._Blocks(scores, wrong), w)[0]
    assert found == pytest.approx(selective.augrc(scores[drawn], wrong[drawn]).value, abs=1e-12)
    perfect = selective.ause(errors, errors)
    assert perfect.value == pytest.approx(0, abs=1e-12)
    assert "no resample differs" in perfect.reason


def test_groups():
    covered = np.array([True] * 90 + [False] * 10 + [True] * 8 + [False] * 2)
    names = np.array(["a"] * 100 + ["b"] * 10)
    by_group = conditional.coverage_by_group(covered, names)
    assert {name: e.value for name, e in by_group.items()} == {"a": 0.9, "b": 0.8}
    worst, which = conditional.worst_group_coverage(covered, names)
    assert (worst.value, which, worst.n) == (0.8, "b", 10)
    assert (
        worst.ci_low == by_group["b"].ci_low < conditional.coverage_by_group(covered, names[:1].repeat(110))["a"].ci_low
    )
    # A small group may be the worst though it was measured to be the better one.
    hidden = np.array([True] * 160 + [False] * 40 + [True] * 9 + [False])
    worst, which = conditional.worst_group_coverage(hidden, np.array(["a"] * 200 + ["b"] * 10))
    assert (worst.value, which) == (0.8, "a")
    assert worst.ci_low < 0.6
    # The true coverage is 0.9 in each of 20 groups: the lowest measured one is far below, its interval is not.
    rng = np.random.default_rng(0)
    labels, hits, repeats = np.repeat(np.arange(20), 50), 0, 200
    for _ in range(repeats):
        worst, _ = conditional.worst_group_coverage(rng.random(1000) < 0.9, labels)
        hits += worst.ci_low <= 0.9 <= worst.ci_high
    assert hits >= least_hits(repeats)


def test_lowest_slab_by_brute_force():
    rng = np.random.default_rng(0)
    x, v = rng.normal(size=(40, 3)), rng.normal(size=(6, 3))
    covered = rng.random(40) < 0.6
    best, low, high = conditional._lowest(x, covered, v, 9)
    lowest = min(covered[np.argsort(x @ d)][i:j].mean() for d in v for i in range(40) for j in range(i + 9, 41))
    along = x @ v[best]
    inside = (low <= along) & (along <= high)
    assert inside.sum() >= 9
    assert covered[inside].mean() == pytest.approx(lowest, abs=1e-12)


def test_worst_slab_is_found_and_does_not_cheat():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(4000, 3))
    bad = x[:, 0] > 1.2  # an eighth of the inputs
    covered = rng.random(4000) < np.where(bad, 0.5, 0.95)
    found, slab = conditional.worst_slab_coverage(x, covered)
    assert found.ci_low < 0.6
    assert found.value < 0.7
    assert slab.direction[0] * (1 if slab.low > -np.inf else -1) > 0.9  # along the first input, on its upper side
    assert slab.mass == pytest.approx(0.1, abs=0.03)
    order = rng.permutation(4000)
    assert conditional.worst_slab_coverage(x[order], covered[order])[0] == found
    scaled, _ = conditional.worst_slab_coverage(x * [1e3, 1, 1e-3] + 5, covered)
    assert scaled.value == pytest.approx(found.value, abs=1e-12)
    # The same coverage everywhere: the chosen half shows a low one, the other half does not.
    values, hits, repeats = [], 0, 60
    for seed in range(repeats):
        covered = rng.random(600) < 0.9
        found, slab = conditional.worst_slab_coverage(x[:600], covered, directions=100, seed=seed)
        values.append(covered[slab.holds(x[:600])].mean())
        hits += found.ci_low <= 0.9 <= found.ci_high
    assert np.mean(values) < 0.88
    assert hits >= least_hits(repeats, 0.93)  # Wilson's own coverage at n = 30, p = 0.9


def test_sets():
    sets = np.array([[1, 0, 0], [1, 1, 0], [0, 0, 0], [1, 1, 1], [0, 1, 0]], dtype=bool)
    labels = np.array([0, 1, 2, 2, 0])
    found = {name: e.value for name, e in ps.set_metrics(sets, labels).items()}
    assert found["set_coverage"] == pytest.approx(0.6)
    assert found["set_size"] == pytest.approx(7 / 5)
    assert (found["set_empty"], found["set_single"]) == (0.2, 0.4)
    assert found["set_size_stratified_coverage"] == pytest.approx(1 / 3)  # one of two singles and an empty set
    assert found["set_class_coverage"] == 0.5
    assert ps.class_coverage(sets, labels)[1] == 0


# What is undefined, what is refused ---------------------------------------------------------------------------------------


def test_undefined_is_nan_with_a_reason():
    y, ones = np.arange(5.0), np.ones(5)
    found = [
        reg.r2(ones, y),
        reg.width_normalised(ones, y, y + 1),
        reg.side_coverage(y, y + 1, y, y)["coverage_above"],
        reg.side_error(y, y + 1, y, y, 0.9),
        ranking.error_spearman(ones, y),
        ranking.error_spearman(y, ones),
        ranking.error_auroc(y, np.ones(5, dtype=bool)),
        selective.ause(ones, y),
        selective.ause(y, 0 * y),
        conditional.worst_slab_coverage(np.ones((5, 2)), ones > 0)[0],
        conditional.worst_slab_coverage(np.ones((1, 2)), ones[:1] > 0)[0],
    ]
    for estimate in found:
        assert math.isnan(estimate.value)
        assert estimate.reason
    endless = np.full(5, np.inf)
    for estimate in (
        reg.width(-endless, endless),
        reg.interval_score(y, -endless, endless, 0.9),
        reg.width_normalised(y, -endless, endless),
        qu.pinball(y, np.stack([-endless, y, endless], axis=1), (0.1, 0.5, 0.9)),
        qu.wis_from_intervals(y, y, -endless[:, None], endless[:, None], (0.9,))["wis_mean"],
    ):
        assert estimate.value == math.inf
        assert math.isnan(estimate.ci_low)
    assert reg.coverage(y, -endless, endless).value == 1.0
    assert math.isnan(reg.mae(y[:1], y[:1] + 1).ci_low)  # one sample has no bootstrap


def test_bad_input_is_refused():
    y, logits, labels = np.arange(3.0), np.zeros((3, 2)), np.array([0, 1, 0])
    nan, empty = np.array([np.nan, 1, 2]), np.zeros(0)
    for call in (
        lambda: reg.rmse(y, y[:2]),
        lambda: reg.rmse(y, y[:, None]),
        lambda: reg.mae(empty, empty),
        lambda: reg.mae(y, nan),
        lambda: reg.coverage(y, y, nan),
        lambda: reg.coverage(y, y, y - 1),
        lambda: reg.coverage(nan, y, y),
        lambda: reg.width(np.full(3, np.inf), np.full(3, np.inf)),
        lambda: reg.interval_score(y, y, y, 90.0),
        lambda: reg.width_normalised(y, y, y, by="iqr"),
        lambda: reg.sharpness(-y),
        lambda: qu.pinball(y, np.zeros((3, 2)), (0.5,)),
        lambda: qu.pinball(y, np.zeros((3, 2)), (0.9, 0.1)),
        lambda: qu.pinball(y, np.zeros((3, 2)), (0.0, 0.1)),
        lambda: qu.wis_from_intervals(y, y, y, y, (0.9,)),
        lambda: qu.crossing_rate(np.array([3]), 2),
        lambda: crps.crps_gaussian(y, y, -y),
        lambda: crps.crps_ensemble(y, np.zeros((3, 0))),
        lambda: crps.crps_ensemble(y, nan[:, None]),
        lambda: curves.interval_ece(y, y[:, None], y[:, None], (0.5, 0.9)),
        lambda: curves.pit_curve(y, (0.5,)),
        lambda: curves.pit_gaussian(y, y, 0 * y),
        lambda: binned.ece_equal_mass(nan, labels > 0),
        lambda: binned.mce(y, labels > 0),
        lambda: binned.equal_mass_index(y, 0),
        lambda: classwise.ace(logits, labels + 1),
        lambda: classwise.brier_parts(logits[:2], labels),
        lambda: cal.consistency_band(empty),
        lambda: ps.set_coverage(logits > 0, labels + 1),
        lambda: ps.set_coverage(logits, labels),
        lambda: ps.set_size(np.zeros((0, 2), dtype=bool), np.zeros(0, dtype=int)),
        lambda: conditional.coverage_by_group(labels > 0, labels[:2]),
        lambda: conditional.worst_slab_coverage(y, labels > 0),
        lambda: conditional.worst_slab_coverage(logits, labels > 0, delta=0.0),
        lambda: ranking.error_spearman(nan, y),
        lambda: selective.ause(y, -y),
        lambda: selective.augrc(nan, labels > 0),
    ):
        with pytest.raises(DataError):
            call()


# Intervals -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 2.0], ids=["calibrated", "overconfident"])
def test_intervals_of_binned_metrics_cover(temperature):
    """The truth of binned plug-in metrics, which they overestimate, is inside as often as it says."""
    rng = np.random.default_rng(5)
    pool = rng.normal(size=(50_000, 3)) * 2
    forecast, truth = softmax(pool, axis=1), softmax(pool / temperature, axis=1)
    reliability = resolution = 0.0
    adaptive = []
    for k in range(3):
        index, p, pi = cal.bin_index(forecast[:, k]), forecast[:, k], truth[:, k]
        count = np.bincount(index, minlength=15)
        reliability += (np.bincount(index, pi - p) ** 2 / count).sum() / len(pool)
        resolution += (count * (np.bincount(index, pi) / count - pi.mean()) ** 2).sum() / len(pool)
        adaptive.append(np.abs(np.bincount(binned.equal_mass_index(p), pi - p)).sum() / len(pool))
    top = forecast.argmax(axis=1)
    confidence, right = forecast.max(axis=1), np.take_along_axis(truth, top[:, None], axis=1)[:, 0]
    index = binned.equal_mass_index(confidence)
    gap = np.bincount(index, right - confidence) / np.bincount(index)
    wide = cal.bin_index(confidence)
    there = np.bincount(wide, minlength=15) > 0
    largest = np.abs(np.bincount(wide, right - confidence)[there] / np.bincount(wide)[there]).max()
    expected = {
        "ece_equal_mass": np.abs(gap).mean(),
        "ece2_debiased": (gap**2).mean(),
        "mce": largest,
        "ace": np.mean(adaptive),
        "brier_reliability": reliability,
        "brier_resolution": resolution,
    }
    hits, repeats = dict.fromkeys(expected, 0), 40
    for _ in range(repeats):
        i = rng.integers(0, len(pool), 300)
        labels = (np.cumsum(truth[i], axis=1) < rng.random((300, 1))).sum(axis=1).clip(0, 2)
        c, a = cal.confidence_and_correctness(pool[i], labels)
        found = {
            "ece_equal_mass": binned.ece_equal_mass(c, a),
            "mce": binned.mce(c, a),
            "ace": classwise.ace(pool[i], labels),
            **binned.ece_debiased(c, a),
            **classwise.brier_parts(pool[i], labels),
        }
        for name, value in expected.items():
            hits[name] += found[name].ci_low <= value <= found[name].ci_high
    assert min(hits.values()) >= least_hits(repeats), hits


@pytest.mark.parametrize("spread", [1.0, 1.5], ids=["calibrated", "overconfident"])
def test_intervals_of_regression_metrics_cover(spread):
    rng = np.random.default_rng(6)
    z = stats.norm.ppf((1 + np.array(NOMINAL)) / 2)
    truth = {
        "interval_ece": np.abs(2 * stats.norm.cdf(z / spread) - 1 - NOMINAL).mean(),
        "rmse": spread,
        "r2": 0.8,
        # E (|X| - z)+ of N(0, s^2) is 2 s (phi(z/s) - z/s (1 - Phi(z/s))), and 2/a = 20.
        "interval_score": 2 * z[2]
        + 40 * spread * (stats.norm.pdf(z[2] / spread) - z[2] / spread * stats.norm.sf(z[2] / spread)),
    }
    hits, repeats = dict.fromkeys(truth, 0), 100
    for _ in range(repeats):
        mean, e = 2 * spread * rng.normal(size=300), spread * rng.normal(size=300)
        found = {
            "interval_ece": curves.interval_ece(mean + e, mean[:, None] - z, mean[:, None] + z, NOMINAL),
            "rmse": reg.rmse(mean + e, mean),
            "r2": reg.r2(mean + e, mean),
            "interval_score": reg.interval_score(mean + e, mean - z[2], mean + z[2], 0.9),
        }
        for name, value in truth.items():
            hits[name] += found[name].ci_low <= value <= found[name].ci_high
    # A percentile bootstrap of 300 samples falls a little short of its level.
    assert min(hits.values()) >= least_hits(repeats, 0.935), hits


def test_intervals_of_rank_metrics_cover():
    """Uncertainty and error are correlated normals' ranks: Spearman's rho is 6/pi arcsin(r/2)."""
    rng = np.random.default_rng(7)
    truth, hits, repeats = 6 / np.pi * np.arcsin(0.25), 0, 100
    for _ in range(repeats):
        a = rng.normal(size=120)
        b = 0.5 * a + math.sqrt(0.75) * rng.normal(size=120)
        found = ranking.error_spearman(a, np.exp(b))
        hits += found.ci_low <= truth <= found.ci_high
    assert hits >= least_hits(repeats, 0.935)


def test_large_samples_take_short_cuts_to_the_same_intervals(monkeypatch):
    n = 4000
    y, mean, std, _, low, high = forecasts(n, inflate=1.3)
    confidence = 1 / (1 + np.exp(-np.abs(mean)))
    correct = np.random.default_rng(0).random(n) < confidence**1.5
    logits = np.stack([mean, -mean], axis=1)
    labels = (y < 0).astype(int)

    def all_of_them():
        return [
            reg.rmse(y, mean),
            reg.r2(y, mean),
            reg.interval_score(y, low[:, 2], high[:, 2], 0.9),
            cal.ece(confidence, correct),
            binned.ece_debiased(confidence, correct)["ece2_debiased"],
            classwise.ace(logits, labels),
            classwise.brier_parts(logits, labels)["brier_resolution"],
            ranking.error_spearman(std, y - mean),
            selective.ause(std, np.abs(y - mean)),
            selective.augrc(-confidence, ~correct),
        ]

    exact = all_of_them()
    monkeypatch.setattr(resampling, "LIMIT", n - 1)
    monkeypatch.setattr(resampling, "GROUPS", 1000)
    monkeypatch.setattr(resampling, "BATCHES", 32)
    monkeypatch.setattr(cal, "LIMIT", n - 1)
    short = all_of_them()
    for a, b in zip(exact, short, strict=True):
        assert a.value == b.value
        # Widths vary by Monte Carlo: 1,000 resamples give each end to 0.085 standard errors, 32 batches the width to 13 %.
        assert 0.65 < (b.ci_high - b.ci_low) / (a.ci_high - a.ci_low) < 1.4
    assert "batches" in short[-1].ci_method


def test_bootstrap_is_repeatable_and_flat_records_have_no_width():
    y, mean, *_ = forecasts(100)
    assert reg.rmse(y, mean) == reg.rmse(y, mean)
    flat = reg.mae(np.ones(30), np.full(30, 0.7))
    assert flat.ci_high - flat.ci_low < 1e-12


def test_probabilities_come_from_logits():
    """A constant added to a sample's logits changes nothing: all classwise metrics start from logits."""
    logits, labels = classifier(100)
    moved = logits + np.random.default_rng(0).normal(size=(100, 1))
    assert classwise.ace(moved, labels).value == pytest.approx(classwise.ace(logits, labels).value, abs=1e-12)
    logs = log_softmax(logits, axis=1)
    assert classwise.classwise_ece(logs, labels).value == pytest.approx(
        classwise.classwise_ece(logits, labels).value, abs=1e-12
    )
