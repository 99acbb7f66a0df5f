"""Detection statistics against scikit-learn, torchmetrics, theory and simulation."""

import math

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from robustbench_ext.errors import DataError
from robustbench_ext.metrics import calibration, conformal, paired, selective
from robustbench_ext.metrics import detection as det
from robustbench_ext.metrics.streaming import StreamingCalibration


def groups(seed, n0=403, n1=300, ties=True):  # 95 % of 403 is no whole number
    rng = np.random.default_rng(seed)
    clean, unknown = rng.normal(size=n0), rng.normal(size=n1) + 0.8
    return (np.round(clean, 1), np.round(unknown, 1)) if ties else (clean, unknown)


@pytest.mark.parametrize("ties", [False, True])
def test_detection_metrics_equal_scikit_learn_and_torchmetrics(ties):
    import torch
    from torchmetrics.functional.classification import binary_auroc, binary_average_precision

    for seed in range(4):
        clean, unknown = groups(seed, ties=ties)
        scores, labels = np.concatenate([clean, unknown]), np.repeat([0, 1], [len(clean), len(unknown)])
        value = det.auroc(clean, unknown).value
        assert value == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
        assert det.area(clean, unknown) == pytest.approx(value, abs=1e-12)
        # torchmetrics wants probabilities; a sigmoid would merge scores that differ in their last digit.
        theirs = torch.from_numpy((scores - scores.min()) / (scores.max() - scores.min()))
        assert value == pytest.approx(float(binary_auroc(theirs, torch.from_numpy(labels))), abs=1e-6)
        found = det.threshold_metrics(clean, unknown)
        assert found["aupr_out"].value == pytest.approx(average_precision_score(labels, scores), abs=1e-12)
        assert found["aupr_in"].value == pytest.approx(average_precision_score(1 - labels, -scores), abs=1e-12)
        ap = binary_average_precision(theirs, torch.from_numpy(labels))
        assert found["aupr_out"].value == pytest.approx(float(ap), abs=1e-6)
        # Known inputs are the positives: the first point of the full ROC with at least 95 % of them.
        fpr, tpr, _ = roc_curve(1 - labels, -scores, drop_intermediate=False)
        assert found["fpr95"].value == pytest.approx(fpr[np.argmax(tpr >= 0.95)], abs=1e-12)
        assert found["tnr95"].value == pytest.approx(1 - found["fpr95"].value, abs=1e-12)
        assert det.tnr_at_95(clean, unknown) == pytest.approx(found["tnr95"].value, abs=1e-12)
        assert found["detection_accuracy"].value == pytest.approx(((tpr + 1 - fpr) / 2).max(), abs=1e-12)
        for name in ("tnr95", "detection_accuracy"):
            assert found[name].ci_low <= found[name].value <= found[name].ci_high


def test_golden_detection_accuracy():
    clean, unknown = np.array([0.1, 0.4, 0.35]), np.array([0.8, 0.35, 0.6])
    assert det.threshold_metrics(clean, unknown)["detection_accuracy"].value == pytest.approx(0.833333, abs=1e-6)
    assert det.threshold_metrics(np.zeros(5), np.zeros(5))["detection_accuracy"].value == 0.5
    backwards = det.threshold_metrics(unknown + 9, clean)["detection_accuracy"]
    assert backwards.value == 0.5  # never below chance: a threshold may flag nothing


# Paired -------------------------------------------------------------------------------------------------------------


def delong_reference(a0, a1, b0, b1):
    """The covariance matrix of two AUROCs from its definition, with explicit comparisons of all pairs."""

    def kernel(clean, unknown):
        return (unknown[None] > clean[:, None]) + 0.5 * (unknown[None] == clean[:, None])  # (n0, n1), tests only

    ka, kb = kernel(a0, a1), kernel(b0, b1)
    s10 = np.cov(np.stack([ka.mean(0), kb.mean(0)]))
    s01 = np.cov(np.stack([ka.mean(1), kb.mean(1)]))
    cov = s10 / len(a1) + s01 / len(a0)
    return ka.mean() - kb.mean(), cov[0, 0] + cov[1, 1] - 2 * cov[0, 1]


def related(seed, n0=150, n1=120, shift=0.0):
    """Two detectors that see much the same of each sample; equally good for shift = 0."""
    rng = np.random.default_rng(seed)
    x = np.concatenate([rng.normal(size=n0), rng.normal(size=n1) + 1])
    a, b = x + 0.5 * rng.normal(size=n0 + n1), x + 0.5 * rng.normal(size=n0 + n1)
    a[n0:] += shift
    return a[:n0], a[n0:], b[:n0], b[n0:]


def test_paired_delong_equals_its_definition_and_mirrors():
    from scipy.stats import norm

    for ties in (False, True):
        a0, a1, b0, b1 = (np.round(v, 1) if ties else v for v in related(3, shift=0.2))
        found = paired.compare_auroc(a0, a1, b0, b1)
        value, variance = delong_reference(a0, a1, b0, b1)
        assert found.difference.value == pytest.approx(value, abs=1e-12)
        half = (found.difference.ci_high - found.difference.ci_low) / 2
        assert half == pytest.approx(1.959964 * math.sqrt(variance), rel=1e-6)
        assert found.p_value == pytest.approx(2 * norm.sf(abs(value) / math.sqrt(variance)), rel=1e-9)
        mirrored = paired.compare_auroc(b0, b1, a0, a1)
        assert mirrored.difference.value == pytest.approx(-value, abs=1e-12)
        assert mirrored.p_value == pytest.approx(found.p_value, rel=1e-9)


def test_the_paired_test_keeps_its_level_and_sees_more_than_separate_intervals():
    trials = 400
    rejected = np.mean([paired.compare_auroc(*related(seed)).p_value < 0.05 for seed in range(trials)])
    assert abs(rejected - 0.05) < 3.5 * math.sqrt(0.05 * 0.95 / trials)
    found = [paired.compare_auroc(*related(seed, shift=0.3)) for seed in range(100)]
    power = np.mean([c.p_value < 0.05 for c in found])
    apart = []
    for seed in range(100):
        a0, a1, b0, b1 = related(seed, shift=0.3)
        apart.append(det.auroc(a0, a1).ci_low > det.auroc(b0, b1).ci_high)
    assert power > np.mean(apart) + 0.3


def test_paired_edges():
    a0, a1, b0, b1 = related(0)
    same = paired.compare_auroc(a0, a1, 3 * a0 + 1, 3 * a1 + 1)
    assert (same.difference.value, same.p_value) == (0.0, 1.0)
    few = paired.compare_auroc(a0, a1[:1], b0, b1[:1])
    assert math.isnan(few.difference.value) and math.isnan(few.p_value)
    with pytest.raises(DataError, match="same samples"):
        paired.compare_auroc(a0, a1, b0[:-1], b1)
    with pytest.raises(DataError, match="NaN"):
        paired.compare_auroc(a0 * np.nan, a1, b0, b1)
    assert paired.holm([0.01, 0.04, math.nan, 0.03])[:2] == [0.03, 0.06]
    assert paired.holm([0.9, 0.8]) == [1.0, 1.0]


# Conformal -----------------------------------------------------------------------------------------------------------


def test_conformal_p_values_by_counting():
    calibration, scores = np.array([1.0, 2.0, 2.0, 5.0]), np.array([0.0, 2.0, 3.0, 6.0])
    expected = [(1 + (calibration >= s).sum()) / 5 for s in scores]
    assert conformal.p_values(calibration, scores) == pytest.approx(expected)
    rng = np.random.default_rng(0)
    for n in (7, 19, 20, 99, 250):
        calibration, scores = np.round(rng.normal(size=n), 1), np.round(rng.normal(size=500), 1)
        for level in (0.05, 0.1, 0.5):
            flagged = conformal.p_values(calibration, scores) <= level + 1e-12
            assert np.array_equal(flagged, scores > conformal.threshold(calibration, level))
    assert conformal.threshold(np.arange(10.0), 0.05) == math.inf  # 1 / 11 > 0.05: no alarm is possible
    assert conformal.alarms(np.arange(10.0), np.arange(100.0)).value == 0


def test_false_alarms_stay_below_the_level_and_within_their_range():
    rng = np.random.default_rng(1)
    n, level, rates = 200, 0.05, []
    for _ in range(400):
        calibration = rng.normal(size=n)
        # The true rate given this calibration set, from the normal law.
        from scipy.stats import norm

        rates.append(norm.sf(conformal.threshold(calibration, level)))
    k = math.floor(level * (n + 1))
    assert np.mean(rates) == pytest.approx(k / (n + 1), abs=3.5 * np.std(rates) / 20)
    assert np.mean(rates) <= level + 3.5 * np.std(rates) / 20
    low, high = conformal.false_alarm_range(n, level)
    inside = np.mean([(low <= r <= high) for r in rates])
    assert abs(inside - 0.95) < 3.5 * math.sqrt(0.95 * 0.05 / 400)
    with pytest.raises(DataError, match="between 0 and 1"):
        conformal.alarms(np.zeros(5), np.zeros(5), 0.0)
    with pytest.raises(DataError, match="empty"):
        conformal.p_values(np.array([]), np.zeros(5))


# Selective prediction ------------------------------------------------------------------------------------------------


def aurc_by_hand(scores, errors, orders):
    """Mean over random orders of tied samples."""
    values = []
    for order in orders:
        ranked = errors[order][np.argsort(scores[order], kind="stable")]
        values.append(np.mean(np.cumsum(ranked) / np.arange(1, len(ranked) + 1)))
    return np.mean(values)


def test_golden_aurc():
    suspicion, errors = -np.array([0.9, 0.8, 0.7, 0.6, 0.5]), np.array([0, 0, 1, 0, 1]).astype(bool)
    assert selective.aurc(suspicion, errors).value == pytest.approx(0.196667, abs=1e-6)
    assert selective.excess_aurc(suspicion, errors).value == pytest.approx(0.066667, abs=1e-6)
    assert selective.best_aurc(5, 2) == pytest.approx(0.13, abs=1e-12)
    assert selective.aurc(-np.array([0.8, 0.7, 0.6]), np.array([False, False, True])).value == pytest.approx(1 / 9)


def test_aurc_of_ties_is_the_expectation_over_orders():
    rng = np.random.default_rng(0)
    scores, errors = np.round(rng.normal(size=30), 0), rng.random(30) < 0.3
    expected = aurc_by_hand(scores, errors, [rng.permutation(30) for _ in range(8000)])
    assert selective.aurc(scores, errors).value == pytest.approx(expected, abs=2e-3)  # 4 standard errors
    constant = selective.aurc(np.zeros(30), errors)
    assert constant.value == pytest.approx(errors.mean(), abs=1e-12)
    order = rng.permutation(30)
    assert selective.aurc(scores[order], errors[order]).value == pytest.approx(selective.aurc(scores, errors).value)


def test_a_perfect_order_has_no_excess_and_bounds_hold():
    errors = np.arange(40) >= 31
    found = selective.excess_aurc(np.arange(40.0), errors)
    assert found.value == pytest.approx(0, abs=1e-12)
    assert selective.aurc(np.arange(40.0), errors).value == pytest.approx(selective.best_aurc(40, 9), abs=1e-12)
    assert selective.excess_aurc(-np.arange(40.0), errors).value > 0.3
    none = selective.excess_aurc(np.arange(40.0), np.zeros(40, dtype=bool))
    assert none.value == 0
    rng = np.random.default_rng(2)
    scores = rng.normal(size=300)
    errors = rng.random(300) < 1 / (1 + np.exp(-scores))
    for metric in (selective.aurc, selective.excess_aurc):
        found = metric(scores, errors)
        assert found.ci_low < found.value < found.ci_high
    assert selective.aurc(np.exp(scores), errors).value == pytest.approx(selective.aurc(scores, errors).value)


def test_the_interval_of_aurc_covers_its_truth():
    """Scores uniform, error probability equal to the score: AURC of the population is the integral of c / 2, i.e. 1/4."""
    rng = np.random.default_rng(3)
    hits = 0
    for _ in range(150):
        scores = rng.random(200)
        found = selective.aurc(scores, rng.random(200) < scores)
        hits += found.ci_low <= 0.25 <= found.ci_high
    assert hits / 150 > 0.95 - 3.5 * math.sqrt(0.05 * 0.95 / 150)


def test_curves_and_points_of_selective_prediction():
    scores, errors = np.arange(10.0), np.array([0, 0, 0, 1, 0, 0, 1, 1, 1, 1]).astype(bool)
    coverage, risk = selective.risk_coverage(scores, errors)
    assert coverage.tolist() == pytest.approx([i / 10 for i in range(1, 11)])
    assert risk[-1] == pytest.approx(0.5) and risk[2] == 0
    assert selective.coverage_at_risk(scores, errors, 0.0) == pytest.approx(0.3)
    assert selective.coverage_at_risk(scores, errors, 0.2) == pytest.approx(0.6)  # the last such, not the first
    assert selective.coverage_at_risk(-scores, errors, 0.1) == 0.0
    assert selective.accuracy_at_coverage(scores, errors, 0.3) == 1.0
    assert selective.accuracy_at_coverage(scores, errors, 0.31) == pytest.approx(0.75)
    with pytest.raises(DataError):
        selective.accuracy_at_coverage(scores, errors, 0.0)
    with pytest.raises(DataError):
        selective.coverage_at_risk(scores, errors, 2.0)


# Streaming calibration -----------------------------------------------------------------------------------------------


def test_streaming_calibration_equals_the_metric():
    from torchmetrics.functional.classification import binary_calibration_error

    rng = np.random.default_rng(0)
    edges = np.concatenate([np.linspace(0, 1, 16), np.nextafter(np.linspace(0, 1, 16)[1:-1], 2), [0.0, 1.0]])
    confidence = np.concatenate([rng.random(5000), edges])
    correct = rng.random(len(confidence)) < confidence**1.5
    whole = StreamingCalibration().update(confidence, correct)
    assert whole.ece() == pytest.approx(calibration.ece(confidence, correct, repeats=2).value, abs=1e-12)
    parts = [StreamingCalibration().update(confidence[i::3], correct[i::3]) for i in range(3)]
    assert parts[0].merge(parts[1]).merge(parts[2]).ece() == pytest.approx(whole.ece(), abs=1e-12)
    assert np.array_equal(whole._bins(confidence), calibration.bin_index(confidence))
    import torch

    inner = confidence[:5000]  # off the edges, where the conventions differ
    theirs = binary_calibration_error(torch.from_numpy(inner), torch.from_numpy(correct[:5000]).long(), 15)
    mine = StreamingCalibration().update(inner, correct[:5000])
    assert mine.ece() == pytest.approx(float(theirs), abs=1e-6)
    worst = binary_calibration_error(torch.from_numpy(inner), torch.from_numpy(correct[:5000]).long(), 15, norm="max")
    assert mine.mce() == pytest.approx(float(worst), abs=1e-6)


def test_streaming_calibration_faults():
    with pytest.raises(DataError, match="nothing was added"):
        StreamingCalibration().ece()
    with pytest.raises(DataError, match="expected"):
        StreamingCalibration().update(np.array([1.2]), np.array([True]))
    with pytest.raises(DataError, match="NaN"):
        StreamingCalibration().update(np.array([np.nan]), np.array([True]))
    with pytest.raises(DataError, match="cannot be added"):
        StreamingCalibration(10).merge(StreamingCalibration(15))
