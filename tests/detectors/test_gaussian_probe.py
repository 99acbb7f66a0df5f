"""The naive-Bayes probe: the specification's invariants, the detector of the same fit, curves against logistic regression.

Features are float64 of size 1 to 10 and variances about 1, so identities hold to 1e-9 (a few hundred roundings of 1e-16 times
squares of up to 1e3, and five digits to spare).
"""

import math

import numpy as np
import pytest
import torch

from detectors import DiagonalMahalanobis, Mahalanobis
from detectors.distances import ClassDistances
from detectors.gaussian import DiagonalMoments, TiedGaussian, whiten
from detectors.gaussian_probe import EPSILON, DiagonalDistances, linear_rule, naive_bayes
from detectors.probe_curve import LOGISTIC, NAIVE_BAYES, crossing, logistic_regression, probe_curves
from robustbench_ext.errors import ConfigError, DataError
from robustbench_ext.models import Observations
from robustbench_ext.models.observe import PENULTIMATE

K, D = 4, 6


def drawn(n=200, seed=0, spread=3.0):
    """Classes with means of their own, features with scales of their own, unequal priors."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.multinomial(torch.tensor([0.4, 0.3, 0.2, 0.1]), n, replacement=True, generator=g)
    means = spread * torch.randn(K, D, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    scale = torch.linspace(0.3, 3.0, D, dtype=torch.float64)
    return means[labels] + scale * torch.randn(n, D, generator=g, dtype=torch.float64), labels


def by_hand(x, y, epsilon):
    """Means, priors and the pooled variance as the specification writes them."""
    priors = torch.stack([(y == k).double().mean() for k in range(K)])
    means = torch.stack([x[y == k].mean(0) for k in range(K)])
    variances = torch.stack([x[y == k].var(0, correction=0) + epsilon for k in range(K)])
    return priors, means, (priors[:, None] * variances).sum(0)


def joint(x, priors, means, s2):
    """log pi_k - 1/2 sum_d (x_d - mu_kd)^2 / s2_d."""
    return priors.log() - 0.5 * ((x[:, None] - means[None]).square() / s2).sum(2)


# The fit -------------------------------------------------------------------------------------------------------------


def test_merged_moments_are_those_of_all_data():
    x, y = drawn(300)
    x = x + 1e4  # far from 0: sums of squares would lose eight digits
    whole = DiagonalMoments.of(x, y, K)
    # Parts of odd sizes, one with a single class, in another order.
    parts = [DiagonalMoments.of(x[i:j], y[i:j], K) for i, j in ((0, 7), (7, 8), (8, 200), (200, 300))]
    merged = parts[3].merged(parts[1]).merged(parts[0].merged(parts[2]))
    assert torch.equal(merged.counts, whole.counts)
    torch.testing.assert_close(merged.means, whole.means, rtol=1e-12, atol=0)
    torch.testing.assert_close(merged.variances, whole.variances, rtol=1e-9, atol=1e-10)
    for k in range(K):
        torch.testing.assert_close(whole.variances[k], x[y == k].var(0, correction=0), rtol=1e-9, atol=1e-10)
    with pytest.raises(DataError, match="cannot be merged"):
        whole.merged(DiagonalMoments.of(x[:, :2], y, K))


def test_blocks_do_not_show(monkeypatch):
    x, y = drawn(300)
    whole = DiagonalMoments.of(x, y, K)
    monkeypatch.setattr("detectors.gaussian.BLOCK", 37)
    found = DiagonalMoments.of(x, y, K)
    torch.testing.assert_close(found.variances, whole.variances, rtol=1e-12, atol=0)


def test_the_pooled_variance_is_the_diagonal_of_the_tied_covariance():
    x, y = drawn()
    tied = TiedGaussian(K)
    tied.update(x, y)
    moments = tied.finish()
    mine = DiagonalMoments.of(x, y, K)
    torch.testing.assert_close(mine.pooled(), moments.covariance.diagonal(), rtol=1e-12, atol=0)
    torch.testing.assert_close(mine.means, moments.means, rtol=1e-12, atol=1e-12)


# The classifier ------------------------------------------------------------------------------------------------------


def test_the_decision_is_linear_and_is_that_of_the_densities():
    x, y = drawn()
    priors, means, s2 = by_hand(x, y, EPSILON)
    test, _ = drawn(500, seed=1, spread=1.0)
    logits = linear_rule(DiagonalMoments.of(x, y, K))(test)
    torch.testing.assert_close(
        logits, test @ (means / s2).T + priors.log() - 0.5 * (means.square() / s2).sum(1), rtol=0, atol=1e-9
    )
    densities = joint(test, priors, means, s2)
    assert torch.equal(logits.argmax(1), densities.argmax(1))
    torch.testing.assert_close(logits.softmax(1), densities.softmax(1), rtol=0, atol=1e-9)
    torch.testing.assert_close(logits.softmax(1).sum(1), torch.ones(500).double(), rtol=0, atol=1e-12)
    # Linear: the middle of two inputs has the mean of their logits.
    middle = linear_rule(DiagonalMoments.of(x, y, K))((test[:250] + test[250:]) / 2)
    torch.testing.assert_close(middle, (logits[:250] + logits[250:]) / 2, rtol=0, atol=1e-9)


def test_shifts_and_scales_change_nothing():
    x, y = drawn()
    test, _ = drawn(100, seed=1)
    shift, scale = torch.randn(D).double() * 5, torch.rand(D).double() + 0.5

    def posteriors(change, epsilon):
        return linear_rule(DiagonalMoments.of(change(x), y, K), epsilon)(change(test)).softmax(1)

    plain = posteriors(lambda v: v, 0.0)
    torch.testing.assert_close(posteriors(lambda v: v + shift, 0.0), plain, rtol=0, atol=1e-9)
    torch.testing.assert_close(posteriors(lambda v: v * scale, 0.0), plain, rtol=0, atol=1e-9)
    # With an epsilon a shift still changes nothing, a scale does.
    with_epsilon = posteriors(lambda v: v, 1.0)
    torch.testing.assert_close(posteriors(lambda v: v + shift, 1.0), with_epsilon, rtol=0, atol=1e-9)
    assert (posteriors(lambda v: v * scale, 1.0) - with_epsilon).abs().max() > 1e-3
    # So scaling to [0, 1], which `naive_bayes` does, decides only how much epsilon is: here 1e-9 of variances of about 0.01.
    torch.testing.assert_close(naive_bayes(x, y, K)(test).softmax(1), plain, rtol=0, atol=1e-5)


def test_equal_priors_and_unit_variances_are_the_nearest_mean():
    means = torch.randn(K, D, generator=torch.Generator().manual_seed(0)).double()
    moments = DiagonalMoments(torch.full((K,), 5.0).double(), means, torch.ones(K, D).double())
    x = 2 * torch.randn(300, D, generator=torch.Generator().manual_seed(1)).double()
    nearest = torch.cdist(x, means).argmin(1)
    assert torch.equal(linear_rule(moments, 0.0)(x).argmax(1), nearest)
    assert len(nearest.unique()) == K
    # Priors move the boundaries.
    uneven = DiagonalMoments(torch.tensor([1e6, 1, 1, 1]).double(), means, torch.ones(K, D).double())
    assert int((linear_rule(uneven, 0.0)(x).argmax(1) == 0).sum()) > int((nearest == 0).sum())


def test_it_is_not_the_gaussian_naive_bayes_of_scikit_learn():
    """That one keeps every class's variances: its boundaries are quadratic. With equal variances the two agree."""
    from sklearn.naive_bayes import GaussianNB

    g = torch.Generator().manual_seed(0)
    y = torch.arange(400) % 2
    x = (
        torch.randn(400, 2, generator=g).double() * torch.where(y == 0, 1.0, 4.0)[:, None]
    )  # equal means, unequal spread
    theirs = GaussianNB(var_smoothing=0.0).fit(x.numpy(), y.numpy())
    ours = linear_rule(DiagonalMoments.of(x, y, 2), 0.0)
    accuracy = [
        float((torch.as_tensor(p) == y).double().mean()) for p in (theirs.predict(x.numpy()), ours(x).argmax(1))
    ]
    assert accuracy[0] > 0.75  # it sees the spread
    assert accuracy[1] < 0.65  # a linear rule cannot
    ends = np.array([[-9.0, 0.0], [9.0, 0.0], [0.0, 0.0]])
    assert (theirs.predict(ends) == [1, 1, 0]).all()  # both sides of one class: no linear rule does that
    # Its own variances replaced by the pooled one, it is ours.
    theirs.var_ = np.tile(DiagonalMoments.of(x, y, 2).pooled().numpy(), (2, 1))
    np.testing.assert_allclose(ours(x).softmax(1).numpy(), theirs.predict_proba(x.numpy()), rtol=0, atol=1e-9)


def test_features_that_do_not_vary_and_classes_that_are_empty():
    x, y = drawn()
    constant = torch.cat([x, torch.full((len(x), 1), 7.25).double()], dim=1)
    test = constant[:20] + torch.tensor([0.0] * D + [1e3]).double()  # it varies later
    torch.testing.assert_close(
        naive_bayes(constant, y, K)(test).softmax(1), naive_bayes(x, y, K)(test[:, :D]).softmax(1), rtol=0, atol=1e-9
    )
    more = naive_bayes(x, y, K + 2)(x)
    assert bool((more[:, K:] == -math.inf).all())
    torch.testing.assert_close(more.softmax(1)[:, :K], naive_bayes(x, y, K)(x).softmax(1), rtol=0, atol=1e-12)
    for wrong in ((x, y + 1), (x[:0], y[:0]), (x, y[:3])):
        with pytest.raises(DataError):
            naive_bayes(*wrong, K)


# The detector --------------------------------------------------------------------------------------------------------


def seen(x, y):
    return Observations(torch.zeros(len(x), K), y, {PENULTIMATE: x})


def test_the_score_is_the_least_distance_and_belongs_to_the_probe():
    x, y = drawn()
    _, means, s2 = by_hand(x, y, 0.0)
    test, labels = drawn(100, seed=1)
    detector = DiagonalMahalanobis().fit_observations(seen(x, y))
    distances = ((test[:, None] - means[None]).square() / s2).sum(2)
    torch.testing.assert_close(detector.score_observations(seen(test, labels)), distances.amin(1), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(detector.distances(test), distances, rtol=1e-9, atol=1e-9)
    # With equal priors the probe predicts the class of the least distance.
    rule = linear_rule(DiagonalMoments.of(x, y, K), 0.0)
    equal = rule.weight, rule.bias - (torch.bincount(y, minlength=K) / len(y)).double().log()
    assert torch.equal((test @ equal[0].T + equal[1]).argmax(1), distances.argmin(1))


def test_it_is_mahalanobis_under_a_diagonal_covariance():
    x, y = drawn()
    moments = DiagonalMoments.of(x, y, K)
    tied = ClassDistances(moments.means, whiten(moments.pooled().diag()), "float64")
    mine = DiagonalDistances(moments.means, moments.pooled().rsqrt())
    test, labels = drawn(100, seed=1)
    torch.testing.assert_close(mine.all(test), tied.all(test), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(mine.nearest(test), tied.nearest(test), rtol=1e-9, atol=1e-9)
    # Correlated features are where the two differ.
    mixing = torch.eye(D).double() + 0.5
    both = [d().fit_observations(seen(x @ mixing, y)) for d in (DiagonalMahalanobis, Mahalanobis)]
    a, b = (d.score_observations(seen(test @ mixing, labels)) for d in both)
    assert float((a - b).abs().max()) > 1


def test_what_is_done_about_features_without_variance():
    x, y = drawn()
    x[:, 2] = 1.0
    moved = x[:10].clone()
    moved[:, 2] = 5.0
    scores = {}
    for inverse in ("pseudo", "shrinkage"):
        detector = DiagonalMahalanobis(inverse=inverse).fit_observations(seen(x, y))
        scores[inverse] = [detector.score_observations(seen(v, y[:10])) for v in (x[:10], moved)]
    assert torch.equal(*scores["pseudo"])
    assert bool((scores["shrinkage"][1] > scores["shrinkage"][0] + 100).all())
    ignoring = DiagonalMahalanobis().fit_observations(seen(x, y))
    assert (ignoring.rank, len(ignoring.warnings())) == (D - 1, 1)
    with pytest.raises(DataError, match="1 of 6 features"):
        DiagonalMahalanobis(inverse="cholesky").fit_observations(seen(x, y))
    with pytest.raises(DataError, match="no variance to measure with"):
        DiagonalMahalanobis().fit_observations(seen(torch.full((20, D), 3.3), y[:20]))
    assert "precision" not in DiagonalMahalanobis().spec()


# Curves --------------------------------------------------------------------------------------------------------------


def test_logistic_regression_is_scikit_learns_on_scaled_features():
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import MinMaxScaler

    x, y = drawn()
    scaler = MinMaxScaler().fit(x.numpy())
    theirs = LogisticRegression(C=1.0, max_iter=1000).fit(scaler.transform(x.numpy()), y.numpy())
    test, _ = drawn(100, seed=1)
    p = logistic_regression(x, y, K)(test).softmax(1)
    np.testing.assert_allclose(p.numpy(), theirs.predict_proba(scaler.transform(test.numpy())), rtol=0, atol=1e-9)
    two = logistic_regression(x[y < 2], y[y < 2], K)(test)
    assert bool((two[:, 2:] == -math.inf).all())
    only = LogisticRegression(C=1.0, max_iter=1000)
    scaler = MinMaxScaler().fit(x[y < 2].numpy())
    only.fit(scaler.transform(x[y < 2].numpy()), y[y < 2].numpy())
    np.testing.assert_allclose(
        two.softmax(1)[:, :2].numpy(), only.predict_proba(scaler.transform(test.numpy())), rtol=0, atol=1e-9
    )


@pytest.mark.parametrize(
    ("ahead", "expected"),
    [
        ([0.2, 0.1, -0.1, -0.2], 20.0),  # half way between 10 and 40 on a logarithmic axis
        ([0.2, -0.1, 0.3, -0.1], 40 * 4**0.75),  # the last crossing counts
        ([0.2, 0.1, 0.1, 0.0], 160.0),  # level is not ahead
        ([-0.1, -0.2, 0.0, -0.1], 0.0),
        ([-0.1, -0.2, -0.1, 0.1], math.inf),
    ],
)
def test_where_the_probes_cross(ahead, expected):
    assert crossing([2.5, 10, 40, 160], np.array(ahead)) == pytest.approx(expected)


def test_curves_are_of_the_data_that_is_drawn():
    x, y = drawn(300)
    test, labels = drawn(200, seed=1)
    sizes = [20, 300]
    found = probe_curves(x, y, {"clean": (test, labels), "train": (x, y)}, sizes, repeats=3)
    assert found.sizes == (20, 300)
    for probe, fit in ((NAIVE_BAYES, naive_bayes), (LOGISTIC, logistic_regression)):
        rows = found.accuracy[probe]["clean"]
        assert rows.shape == (2, 3)
        # All samples are one draw, whatever their order.
        expected = float((fit(x, y, K)(test).argmax(1) == labels).double().mean())
        assert rows[1] == pytest.approx([expected] * 3)
        assert len({*rows[0]}) > 1
    again = probe_curves(x, y, {"clean": (test, labels)}, [20], repeats=2)
    assert np.array_equal(again.accuracy[NAIVE_BAYES]["clean"][0], found.accuracy[NAIVE_BAYES]["clean"][0, :2])
    assert found.crossing("clean") >= 0
    assert len(found.crossings("train")) == 3
    # What is made for a probe is asked of that probe: here its own predictions, which it gets right.
    own = probe_curves(x, y, {"own": lambda head: (test, head(test).argmax(1))}, [20], repeats=1)
    assert own.accuracy[NAIVE_BAYES]["own"] == own.accuracy[LOGISTIC]["own"] == 1
    for wrong in ([3], [301], []):
        with pytest.raises(ConfigError, match="sizes"):
            probe_curves(x, y, {}, wrong)
    rare = torch.arange(300).clamp_max(60)  # sixty classes of one sample
    with pytest.raises(ConfigError, match="none of"):
        probe_curves(x, rare, {}, [61], repeats=1)


def test_where_its_model_is_right_naive_bayes_comes_near_the_best_that_is_possible():
    g = torch.Generator().manual_seed(0)
    means = 0.5 * torch.randn(K, 60, generator=g).double()

    def sample(n, seed):
        g = torch.Generator().manual_seed(seed)
        y = torch.arange(n) % K
        return means[y] + torch.randn(n, 60, generator=g).double(), y

    x, y = sample(400, 1)
    found = probe_curves(x, y, {"clean": sample(1000, 2)}, [12, 400], repeats=5)
    few, many = found.accuracy[NAIVE_BAYES]["clean"].mean(1)
    assert many > few
    # What the true means and variances give.
    test, labels = sample(1000, 2)
    best = float((torch.cdist(test, means).argmin(1) == labels).double().mean())
    assert many == pytest.approx(best, abs=0.03)  # two standard errors of 1,000 samples at 0.9 are 0.02, paired less
