"""Mahalanobis: exact invariants, independent implementations, numerical traps, layers, validation, added classes."""

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from detectors import IncrementalGaussian, Mahalanobis, MarginalMahalanobis, RelativeMahalanobis, Validation
from detectors.distances import ClassDistances
from detectors.gaussian import TiedGaussian, whiten
from detectors.layers import Combination, logistic
from robustbench_ext.errors import ConfigError, DataError, NotFittedError
from robustbench_ext.models import Observations, observe

TAP = "penultimate"


def seen(features, labels=None, classes=3):
    labels = torch.zeros(len(features), dtype=torch.int64) if labels is None else labels
    return Observations(torch.zeros(len(features), classes), labels, {TAP: features.float()})


def mixture(n=600, d=6, classes=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    root = torch.randn(d, d, generator=g)
    labels = torch.arange(n) % classes
    means = 3 * torch.randn(classes, d, generator=g)
    return torch.randn(n, d, generator=g) @ root + means[labels] + 5, labels


def reference(train, labels, features):
    """Mahalanobis straight from its definition, in numpy."""
    f, y, x = train.double().numpy(), labels.numpy(), features.double().numpy()
    means = np.stack([f[y == c].mean(0) for c in np.unique(y)])
    centred = f - means[y]
    precision = np.linalg.pinv(centred.T @ centred / len(f), rcond=1e-10, hermitian=True)
    return np.stack([np.einsum("nd,de,ne->n", x - m, precision, x - m) for m in means], axis=1)


def exact(**options):
    return Mahalanobis(precision="float64", **options)


# The Gaussian --------------------------------------------------------------------------------------------------------


def test_mahalanobis_equals_its_definition():
    train, labels = mixture()
    new, _ = mixture(80, seed=1)
    detector = exact().fit_observations(seen(train, labels))
    expected = reference(train, labels, new)
    np.testing.assert_allclose(detector.distances(new).numpy(), expected, rtol=1e-9)
    np.testing.assert_allclose(detector.score_observations(seen(new)).numpy(), expected.min(1), rtol=1e-9)
    fast = Mahalanobis().fit_observations(seen(train, labels)).score_observations(seen(new))
    np.testing.assert_allclose(fast.numpy(), expected.min(1), rtol=1e-5)  # what precision="auto" promises


def test_pytorch_ood_agrees():
    theirs = pytest.importorskip("pytorch_ood.detector")
    train, labels = mixture()
    new, _ = mixture(80, seed=1)
    peer = theirs.Mahalanobis(None).fit_features(train, labels)
    # Theirs is half of the distance under the sum of outer products, not their mean: a factor of 2 N.
    scores = Mahalanobis().fit_observations(seen(train, labels)).score_observations(seen(new))
    np.testing.assert_allclose(2 * len(train) * peer.predict_features(new).double().numpy(), scores.numpy(), rtol=1e-4)
    relative = RelativeMahalanobis().fit_observations(seen(train, labels)).score_observations(seen(new))
    rmd = theirs.RMD(None).fit_features(train, labels).predict_features(new)
    np.testing.assert_allclose(len(train) * rmd.double().numpy(), relative.numpy(), rtol=1e-4, atol=1e-4)


def test_singular_covariance_is_the_normal_case():
    train, labels = mixture(d=6)
    dead = torch.cat([train, torch.zeros(len(train), 2), train[:, :1] * 2], dim=1)  # two dead units, one copy
    detector = exact().fit_observations(seen(dead, labels))
    assert detector.rank == 6
    assert "6 of 9 directions" in detector.warnings()[0]
    np.testing.assert_allclose(detector.distances(dead).numpy(), reference(dead, labels, dead), rtol=1e-5, atol=1e-8)
    # Directions that the training data never use: ignored by the pseudo-inverse, punished by shrinkage.
    moved = dead.clone()
    moved[:, 6] += 100
    assert torch.allclose(detector.distances(moved), detector.distances(dead))
    shrunk = Mahalanobis(inverse="shrinkage", shrinkage=1e-3).fit_observations(seen(dead, labels))
    assert (shrunk.distances(moved) > 10 * shrunk.distances(dead) + 10).all()
    assert shrunk.rank == 9
    assert shrunk.warnings() == []
    with pytest.raises(DataError, match="singular"):
        exact(inverse="cholesky").fit_observations(seen(dead, labels))


@pytest.mark.parametrize("inverse", ["pseudo", "cholesky"])
def test_cholesky_pseudo_inverse_and_explicit_inverse_agree(inverse):
    train, labels = mixture()
    gaussian = TiedGaussian(3)
    gaussian.update(train, labels)
    moments = gaussian.finish()
    found = whiten(moments.covariance, moments.noise, inverse)
    assert found.method == "Cholesky"
    assert torch.allclose(found.matrix @ found.matrix.T, torch.linalg.inv(moments.covariance), rtol=1e-8, atol=1e-10)
    values = torch.linalg.eigvalsh(moments.covariance)
    assert found.condition == pytest.approx(float(values[-1] / values[0]), rel=0.3)  # six steps of power iteration


def test_training_means_of_distances():
    """Own-class distances average to the rank; relative ones to 0; Sigma_0 is Sigma plus the spread of the means."""
    train, labels = mixture()
    detector = exact().fit_observations(seen(train, labels))
    own = detector.distances(train.float()).gather(1, labels[:, None])
    assert float(own.mean()) == pytest.approx(6, abs=1e-9)
    marginal = MarginalMahalanobis(precision="float64").fit_observations(seen(train, labels))
    background = marginal.score_observations(seen(train))
    assert float(background.mean()) == pytest.approx(6, abs=1e-9)
    gaussian = TiedGaussian(3)
    gaussian.update(train, labels)
    mean, covariance = gaussian.finish().background()
    f = train.double()
    assert torch.allclose(mean, f.mean(0), rtol=1e-12)
    assert torch.allclose(covariance, (f - f.mean(0)).T @ (f - f.mean(0)) / len(f), rtol=1e-9, atol=1e-9)
    relative = RelativeMahalanobis(precision="float64").fit_observations(seen(train, labels))
    new, _ = mixture(60, seed=3)
    expected = detector.score_observations(seen(new)) - marginal.score_observations(seen(new))
    assert torch.allclose(relative.score_observations(seen(new)), expected, rtol=1e-9, atol=1e-9)
    # Sigma^-1 - Sigma_0^-1 is positive semidefinite.
    tied = torch.linalg.inv(gaussian.finish().covariance)
    assert float(torch.linalg.eigvalsh(tied - torch.linalg.inv(covariance)).min()) > -1e-9


def test_affine_invariance_permutation_and_batch_independence():
    train, labels = mixture()
    new, _ = mixture(50, seed=2)
    base = exact().fit_observations(seen(train, labels)).distances(new)
    a, b = torch.randn(6, 6, generator=torch.Generator().manual_seed(3)) + 2 * torch.eye(6), torch.arange(6.0)
    other = exact().fit_observations(seen(train @ a + b, labels)).distances(new @ a + b)
    np.testing.assert_allclose(other.numpy(), base.numpy(), rtol=2e-4)  # float32 features in, condition number ~ 1e2
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(4))
    shuffled = exact().fit_observations(seen(train[order], labels[order])).distances(new)
    np.testing.assert_allclose(shuffled.numpy(), base.numpy(), rtol=1e-8)
    renamed = exact().fit_observations(seen(train, (labels + 1) % 3)).distances(new)
    np.testing.assert_allclose(renamed[:, [1, 2, 0]].numpy(), base.numpy(), rtol=1e-8)
    for detector, rtol in ((exact(), 1e-9), (Mahalanobis(), 2e-5)):  # float32: 1e-5 on either side
        detector.fit_observations(seen(train, labels))
        rows = torch.cat([detector.score_observations(seen(new[i : i + 1])) for i in range(len(new))])
        np.testing.assert_allclose(rows.numpy(), detector.score_observations(seen(new)).numpy(), rtol=rtol)


def test_streaming_fit_survives_large_means():
    train, labels = mixture()
    far = train.double() + 1e6
    gaussian = TiedGaussian(3)
    for start in range(0, 600, 37):
        gaussian.update(far[start : start + 37], labels[start : start + 37])
    moments = gaussian.finish()
    assert moments.counts.tolist() == [200, 200, 200]
    for c in range(3):
        assert torch.allclose(moments.means[c], far[labels == c].mean(0), rtol=1e-12)
    centred = far - torch.stack([far[labels == c].mean(0) for c in range(3)])[labels]
    # Doubles of size 1e6 carry 1e-10 of absolute error, next to entries of order 10.
    assert torch.allclose(moments.covariance, centred.T @ centred / 600, atol=1e-7)


@pytest.mark.parametrize("d", [5, 33, 300])
def test_blocks_of_the_outer_product_add_up(d):
    """Sizes on both sides of a block, more rows than are added at a time, in uneven batches."""
    g = torch.Generator().manual_seed(1)
    f, y = torch.randn(1300, d, generator=g) + 2, torch.randint(0, 4, (1300,), generator=g)
    gaussian = TiedGaussian(4)
    for part in (slice(0, 700), slice(700, 701), slice(701, 1300)):
        gaussian.update(f[part], y[part])
    moments = gaussian.finish()
    x = f.double()
    means = torch.stack([x[y == c].mean(0) for c in range(4)])
    assert torch.allclose(moments.covariance, (x - means[y]).T @ (x - means[y]) / 1300, atol=1e-12)
    assert torch.allclose(moments.means, means, atol=1e-12)


def test_single_precision_keeps_its_promise_or_is_not_used():
    """Over conditions and spreads of the means: where float32 is chosen the error is below 1e-5, else it is float64."""
    g = torch.Generator().manual_seed(0)
    chosen = []
    for condition in (1e1, 1e3, 1e5, 1e8):
        for spread in (0.1, 3.0, 300.0):
            for offset in (0.0, 30.0):
                d, classes = 24, 5
                scale = torch.logspace(0, -0.5 * np.log10(condition), d)
                turn = torch.linalg.qr(torch.randn(d, d, generator=g))[0]
                y = torch.arange(2000) % classes
                means = spread * torch.randn(classes, d, generator=g) + offset
                f = (torch.randn(2000, d, generator=g) * scale) @ turn + means[y]
                gaussian = TiedGaussian(classes)
                gaussian.update(f, y)
                moments = gaussian.finish()
                distances = ClassDistances(moments.present(), whiten(moments.covariance, moments.noise))
                # Also far outside the training data, and on a class mean, where the result is smallest.
                x = torch.cat([f[:300], 5 * torch.randn(100, d, generator=g) + offset, means])
                exactly = distances.all(x).amin(1)
                direct = torch.stack(
                    [((x.double() - m) @ distances.whitening.matrix).square().sum(1) for m in moments.means]
                )
                error = ((distances.nearest(x).double() - direct.amin(0)) / direct.amin(0)).abs().max()
                assert float(error) < 1e-5, (condition, spread, offset, distances.dtype)
                # The expanded square of `all` loses what cancels: some 1e-16 of its largest term.
                assert torch.allclose(exactly, direct.amin(0), rtol=1e-9, atol=1e-14 * float(direct.max()))
                chosen.append(distances.dtype)
    assert {torch.float32, torch.float64} == set(chosen)
    assert chosen[0] == torch.float32  # well conditioned, near the origin: the fast path is used


def test_own_class_distances_follow_the_chi_square_law():
    train, labels = mixture(n=5000)
    own = exact().fit_observations(seen(train, labels)).distances(train).gather(1, labels[:, None])[:, 0]
    assert stats.kstest(own.numpy(), stats.chi2(6).cdf).pvalue > 1e-3


def test_one_class_an_empty_class_and_few_samples():
    """Stated fallbacks: a single class is one Gaussian; a class without samples is left out; few samples are few directions."""
    train, labels = mixture(classes=2)
    assert exact().fit_observations(seen(train, labels, classes=5)).distances(train).shape == (600, 2)
    one = exact().fit_observations(seen(train, torch.zeros_like(labels)))
    marginal = MarginalMahalanobis(precision="float64").fit_observations(seen(train, labels))
    assert torch.allclose(one.score_observations(seen(train)), marginal.score_observations(seen(train)), rtol=1e-9)
    g = torch.Generator().manual_seed(0)
    sphere = torch.randn(100_000, 3, generator=g)
    detector = exact().fit_observations(seen(sphere, torch.zeros(len(sphere), dtype=torch.int64)))
    # Identity covariance up to sampling (1/sqrt(N) = 0.3 %): squared Euclidean distance.
    near = torch.randn(50, 3, generator=g)
    assert torch.allclose(detector.score_observations(seen(near)), near.double().square().sum(1), rtol=0.03, atol=0.03)
    few = exact().fit_observations(seen(torch.randn(12, 40, generator=g), torch.arange(12) % 3))
    assert few.rank == 9  # 12 samples about 3 means
    assert "9 of 40" in few.warnings()[0]


def test_faults_are_explained():
    train, labels = mixture()
    with pytest.raises(DataError, match="NaN"):
        Mahalanobis().fit_observations(seen(train * float("nan"), labels))
    with pytest.raises(DataError, match="no covariance"):
        Mahalanobis().fit_observations(seen(torch.ones(10, 4), torch.arange(10) % 3))
    with pytest.raises(DataError, match="no covariance"):  # constant per class, up to rounding
        Mahalanobis().fit_observations(seen(0.1 * torch.eye(3)[torch.arange(30) % 3] + 7.3, torch.arange(30) % 3))
    with pytest.raises(DataError, match="no covariance"):  # one sample a class
        Mahalanobis().fit_observations(seen(torch.randn(3, 4), torch.arange(3)))
    with pytest.raises(DataError, match=r"labels span -1\.\.1, expected 0\.\.2"):
        Mahalanobis().fit_observations(seen(train, labels - 1))
    with pytest.raises(DataError, match="at least two"):
        Mahalanobis().fit_observations(seen(train[:1], labels[:1]))
    with pytest.raises(DataError, match="missing"):
        Mahalanobis().fit_observations(Observations(torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64)))
    with pytest.raises(DataError, match=r"shape \(5, 4\), but the fit was on \(n, 6\)"):
        Mahalanobis().fit_observations(seen(train, labels)).score_observations(seen(torch.rand(5, 4)))
    with pytest.raises(DataError, match="had 6"):
        gaussian = TiedGaussian(3)
        gaussian.update(train, labels)
        gaussian.update(train[:, :4], labels)
    with pytest.raises(DataError, match="no features"):
        TiedGaussian(3).finish()
    for options, message in (
        ({"inverse": "shrinkage", "shrinkage": 2}, "between 0 and 1"),
        ({"inverse": "inv"}, "pseudo, shrinkage, cholesky"),
        ({"precision": "half"}, "auto, float32, float64"),
        ({"layers": []}, "one or more"),
        ({"layers": ["a", "a"]}, "different"),
        ({"layers": ["a", "b"], "weights": [1]}, "one for each"),
        ({"eps": [0, 0.1]}, "validate"),
        ({"eps": -1}, ">= 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            Mahalanobis(**options)


# Layers and pre-processing -------------------------------------------------------------------------------------------


class Linear(nn.Module):
    """Two linear layers and nothing else, so that gradients can be written down."""

    def __init__(self):
        super().__init__()
        g = torch.Generator().manual_seed(5)
        self.first, self.last = nn.Linear(16, 6, bias=False), nn.Linear(6, 3, bias=False)
        with torch.no_grad():
            self.first.weight.copy_(torch.randn(6, 16, generator=g))
            self.last.weight.copy_(torch.randn(3, 6, generator=g))

    def forward(self, x):
        return self.last(self.first(x.flatten(1)))


def images(n, seed):
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 3
    centres = torch.rand(3, 16, generator=g)
    return (0.25 + 0.5 * centres[y] + 0.05 * torch.randn(n, 16, generator=g)).clamp(0, 1).view(n, 1, 4, 4), y


def test_preprocessing_is_one_step_down_the_distance():
    model = Linear().eval()
    x, y = images(300, 0)
    new, _ = images(40, 1)
    layers = ["first", "last"]
    plain = exact(layers=layers, weights=[1, 0]).fit(model, x, y)
    moved = exact(layers=layers, weights=[1, 0], eps=0.002).fit(model, x, y)
    assert moved.reads_inputs and not moved.differentiable and plain.differentiable
    # By hand: the feature is W x, so the gradient of the nearest distance is 2 W^T P (W x - mu).
    w = model.first.weight.detach().double()
    f = new.flatten(1).double() @ w.T
    train = x.flatten(1).double() @ w.T
    means = torch.stack([train[y == c].mean(0) for c in range(3)])
    centred = train - means[y]
    precision = torch.linalg.inv(centred.T @ centred / len(train))
    apart = f[:, None] - means[None]  # tiny here
    nearest = torch.einsum("ncd,de,nce->nc", apart, precision, apart).argmin(1)
    gradient = 2 * (apart[torch.arange(40), nearest] @ precision) @ w
    stepped = (new.flatten(1).double() - 0.002 * gradient.sign()) @ w.T
    after = stepped[:, None] - means[None]
    expected = torch.einsum("ncd,de,nce->nc", after, precision, after).amin(1)
    # The sign of a gradient near 0 may differ in float32; one of 16 pixels moves the distance by a few per mille.
    assert torch.allclose(moved.score(new), expected, rtol=1e-3)
    assert (moved.score(new) < plain.score(new)).all()
    zero = exact(layers=layers, weights=[1, 0], eps=[0.0])
    assert torch.equal(zero.fit(model, x, y).score(new), plain.score(new))
    clipped = exact(layers=layers, weights=[1, 0], eps=0.5, clip=True).fit(model, x, y)
    assert not torch.equal(
        clipped.score(new), exact(layers=layers, weights=[1, 0], eps=0.5).fit(model, x, y).score(new)
    )


def test_layers_are_combined():
    model = Linear().eval()
    x, y = images(300, 0)
    new, _ = images(40, 1)
    one = [exact(layers=tap).fit(model, x, y).score(new) for tap in ("first", "last")]
    both = exact(layers=["first", "last"])
    seen_new = observe(model, new, torch.zeros(40), both.taps)
    both.fit(model, x, y)
    assert torch.allclose(both.layer_scores(seen_new), torch.stack(one, 1))
    assert torch.allclose(both.score(new), 0.5 * (one[0] / 6 + one[1] / 3))  # each layer per direction
    for number, weights in enumerate(([1, 0], [0, 1])):
        single = exact(layers=["first", "last"], weights=weights).fit(model, x, y)
        assert torch.equal(single.score(new), one[number])


def test_regression_finds_the_layer_that_tells():
    g = torch.Generator().manual_seed(0)
    known, unknown = torch.randn(200, 3, generator=g).double(), torch.randn(200, 3, generator=g).double()
    unknown[:, 1] += 3
    unknown[:, 2] -= 1.5
    known, unknown = known * torch.tensor([1, 1e4, 1e-4]).double(), unknown * torch.tensor([1, 1e4, 1e-4]).double()
    found = logistic(known, unknown)
    standard = found.weights * torch.cat([known, unknown]).std(0)
    assert standard[1] > 1 and standard[2] < -0.5 and abs(standard[0]) < 0.5  # signs are not forced
    assert float(((found(unknown) > 0).float().mean() + (found(known) < 0).float().mean()) / 2) > 0.93
    # Units do not matter: scores are standardised first.
    other = logistic(known * 7, unknown * 7)
    assert torch.allclose(other(known * 7), found(known), rtol=1e-4, atol=1e-4)
    assert torch.equal(Combination(torch.tensor([0.0, 1.0, 0.0]).double())(known), known[:, 1])
    constant = torch.cat([known[:, :1] * 0, known[:, 1:]], 1), torch.cat([unknown[:, :1] * 0, unknown[:, 1:]], 1)
    assert torch.isfinite(logistic(*constant)(known)).all()


def test_validation_with_outliers_chooses_weights_and_eps():
    model = Linear().eval()
    x, y = images(300, 0)
    known, _ = images(60, 1)
    unknown = torch.rand(60, 1, 4, 4, generator=torch.Generator().manual_seed(9))
    detector = exact(layers=["first", "last"], eps=[0.0, 0.001, 0.01], validate={"outliers": "uniform-noise"})
    with pytest.raises(ConfigError, match="needs data to choose on"):
        detector.fit(model, x, y)
    with pytest.raises(NotFittedError):
        detector.score_inputs(model, x)
    detector.fit(model, x, y, validation=Validation(known, unknown, "tnr95", "noise"))
    assert detector.eps in (0.0, 0.001, 0.01)
    assert "noise" in detector.warnings()[-1]
    assert set(detector.summary()) == {"rank first", "rank last", "eps", "weight first", "weight last"}
    fresh, _ = images(60, 2)
    noise = torch.rand(60, 1, 4, 4, generator=torch.Generator().manual_seed(10))
    assert float(detector.score(noise).median()) > float(detector.score(fresh).quantile(0.95))
    again = exact(layers=["first", "last"], eps=[0.0, 0.001, 0.01], validate={"outliers": "uniform-noise"})
    again.fit(model, x, y, validation=Validation(known, unknown, "tnr95", "noise"))
    assert torch.equal(again.score(noise), detector.score(noise))
    few = exact(layers=["first", "last"], eps=[0.0, 0.001, 0.01], validate={"outliers": "uniform-noise"})
    few.fit(model, x, y, validation=Validation(known, unknown[:12], "tnr95", "noise"))
    assert "only 12 unknown inputs" in few.warnings()[-1]


# Classes added one by one --------------------------------------------------------------------------------------------


def test_classes_added_one_by_one():
    train, labels = mixture(n=600, classes=6)
    order = [4, 0, 5, 1, 3, 2]
    grown = {update: IncrementalGaussian(update) for update in ("paper", "weighted")}
    uneven = torch.cat([torch.arange(600)[labels == c][: 40 + 10 * c] for c in range(6)])
    features, y = train[uneven], labels[uneven]
    for label in order:
        for model in grown.values():
            model.add_class(label, features[y == label])
    batch = TiedGaussian(6)
    batch.update(features, y)
    assert torch.allclose(grown["weighted"].covariance, batch.finish().covariance, rtol=1e-10, atol=1e-10)
    own = torch.stack([torch.cov(features[y == c].double().T, correction=0) for c in range(6)])
    assert torch.allclose(grown["paper"].covariance, own.mean(0), rtol=1e-10, atol=1e-10)
    # Equal sizes: both are the fit on everything.
    equal = IncrementalGaussian("paper")
    for label in order:
        equal.add_class(label, train[labels == label])
    everything = TiedGaussian(6)
    everything.update(train, labels)
    assert torch.allclose(equal.covariance, everything.finish().covariance, rtol=1e-10, atol=1e-10)
    predicted = equal.predict(train)
    direct = exact().fit_observations(seen(train, labels, classes=6)).distances(train).argmin(1)
    assert torch.equal(predicted, direct)
    # Gaussian discriminant analysis with equal priors has the same arg-max.
    moments = everything.finish()
    precision = torch.linalg.inv(moments.covariance)
    w, b = moments.means @ precision, -0.5 * torch.einsum("cd,de,ce->c", moments.means, precision, moments.means)
    assert torch.equal((train.double() @ w.T + b).argmax(1), predicted)


def test_faults_of_added_classes():
    model = IncrementalGaussian()
    with pytest.raises(NotFittedError, match="no class"):
        model.predict(torch.rand(3, 4))
    model.add_class(1, torch.rand(20, 4))
    with pytest.raises(DataError, match="there already"):
        model.add_class(1, torch.rand(20, 4))
    with pytest.raises(DataError, match="4"):
        model.add_class(2, torch.rand(20, 5))
    with pytest.raises(DataError, match="finite"):
        model.add_class(2, torch.full((3, 4), float("nan")))
    with pytest.raises(ConfigError, match="paper, weighted"):
        IncrementalGaussian("mean")
