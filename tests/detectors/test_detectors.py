"""Detectors: exact invariants, an independent implementation of Mahalanobis, faults."""

import numpy as np
import pytest
import torch
from scipy import stats

from detectors import MSP, Energy, Mahalanobis
from detectors.energy import marginal_energy
from detectors.mahalanobis import TiedGaussian
from detectors.msp import msp_score
from robustbench_ext.errors import ConfigError, DataError, NotFittedError
from robustbench_ext.models import Observations

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


def reference(train, labels, features, pinv=True):
    """Mahalanobis straight from its definition, in numpy."""
    f, y, x = train.double().numpy(), labels.numpy(), features.double().numpy()
    means = np.stack([f[y == c].mean(0) for c in np.unique(y)])
    centred = f - means[y]
    precision = np.linalg.pinv(centred.T @ centred / len(f), rcond=1e-10, hermitian=True)
    return np.stack([np.einsum("nd,de,ne->n", x - m, precision, x - m) for m in means], axis=1)


# MSP and energy ------------------------------------------------------------------------------------------------------


def test_msp_is_one_minus_the_maximum_probability_without_rounding_to_zero():
    logits = torch.randn(50, 7)
    assert torch.allclose(msp_score(logits), 1 - logits.double().softmax(1).amax(1), atol=1e-12)
    sure = torch.tensor([[60.0, 0.0], [70.0, 0.0]])
    assert msp_score(sure)[0] > msp_score(sure)[1] > 0  # float32's 1 - p would tie both at 0
    assert torch.allclose(msp_score(torch.zeros(1, 4)), torch.tensor([0.75], dtype=torch.float64))


def test_energy_identities():
    torch.manual_seed(0)
    f, y = torch.randn(40, 6, dtype=torch.float64) * 5, torch.randint(0, 6, (40,))
    energy = marginal_energy(f)
    joint = -f.gather(1, y[:, None])[:, 0]
    assert torch.allclose(torch.nn.functional.cross_entropy(f, y, reduction="none"), joint - energy, atol=1e-12)
    assert torch.allclose(marginal_energy(f + 3), energy - 3, atol=1e-12)
    assert torch.allclose(marginal_energy(f[:, torch.randperm(6)]), energy, atol=1e-12)
    assert torch.allclose(marginal_energy(f, 2.5), 2.5 * marginal_energy(f / 2.5), atol=1e-12)
    assert torch.allclose(f.log_softmax(1).amax(1), energy + f.amax(1), atol=1e-12)
    for t in (0.5, 1.0, 7.0):
        assert (
            (f.amax(1) <= -marginal_energy(f, t) + 1e-9) & (-marginal_energy(f, t) <= f.amax(1) + t * np.log(6) + 1e-9)
        ).all()
    assert torch.allclose(-marginal_energy(f, 1e-3), f.amax(1), atol=1e-3)
    assert torch.isfinite(marginal_energy(torch.full((1, 3), 6e4, dtype=torch.float16))).all()
    leaf = f.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(marginal_energy(leaf, 2.0).sum(), leaf)
    assert torch.allclose(gradient, -(f / 2).softmax(1), atol=1e-12)


# Mahalanobis ---------------------------------------------------------------------------------------------------------


def test_mahalanobis_equals_its_definition():
    train, labels = mixture()
    new, _ = mixture(80, seed=1)
    detector = Mahalanobis().fit_observations(seen(train, labels))
    expected = reference(train, labels, new)
    np.testing.assert_allclose(detector.distances(new).numpy(), expected, rtol=1e-6)
    np.testing.assert_allclose(detector.score_observations(seen(new)).numpy(), expected.min(1), rtol=1e-6)


def test_singular_covariance_is_the_normal_case():
    train, labels = mixture(d=6)
    dead = torch.cat([train, torch.zeros(len(train), 2), train[:, :1] * 2], dim=1)  # two dead units, one copy
    detector = Mahalanobis().fit_observations(seen(dead, labels))
    assert detector.rank == 6
    np.testing.assert_allclose(detector.distances(dead).numpy(), reference(dead, labels, dead), rtol=1e-5, atol=1e-8)
    # Directions that the training data never use: ignored by the pseudo-inverse, punished by shrinkage.
    moved = dead.clone()
    moved[:, 6] += 100
    assert torch.allclose(detector.distances(moved), detector.distances(dead))
    shrunk = Mahalanobis(inverse="shrinkage", shrinkage=1e-3).fit_observations(seen(dead, labels))
    assert (shrunk.distances(moved) > 10 * shrunk.distances(dead) + 10).all()
    assert shrunk.rank == 9


def test_mean_own_class_distance_on_training_data_is_the_rank():
    train, labels = mixture()
    detector = Mahalanobis().fit_observations(seen(train, labels))
    own = detector.distances(train).gather(1, labels[:, None])
    assert float(own.mean()) == pytest.approx(6, abs=1e-6)


def test_affine_invariance_permutation_and_batch_independence():
    train, labels = mixture()
    new, _ = mixture(50, seed=2)
    base = Mahalanobis().fit_observations(seen(train, labels)).distances(new)
    a, b = torch.randn(6, 6, generator=torch.Generator().manual_seed(3)) + 2 * torch.eye(6), torch.arange(6.0)
    other = Mahalanobis().fit_observations(seen(train @ a + b, labels)).distances(new @ a + b)
    np.testing.assert_allclose(other.numpy(), base.numpy(), rtol=2e-4)  # float32 features in, condition number ~ 1e2
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(4))
    shuffled = Mahalanobis().fit_observations(seen(train[order], labels[order])).distances(new)
    np.testing.assert_allclose(shuffled.numpy(), base.numpy(), rtol=1e-8)
    renamed = Mahalanobis().fit_observations(seen(train, (labels + 1) % 3)).distances(new)
    np.testing.assert_allclose(renamed[:, [1, 2, 0]].numpy(), base.numpy(), rtol=1e-8)
    detector = Mahalanobis().fit_observations(seen(train, labels))
    rows = torch.cat([detector.score_observations(seen(new[i : i + 1])) for i in range(len(new))])
    np.testing.assert_allclose(rows.numpy(), detector.score_observations(seen(new)).numpy(), rtol=1e-9)


def test_streaming_fit_survives_large_means():
    train, labels = mixture()
    far = train.double() + 1e6
    gaussian = TiedGaussian(3)
    for start in range(0, 600, 37):
        gaussian.update(far[start : start + 37], labels[start : start + 37])
    counts, means, covariance = gaussian.finish()
    assert counts.tolist() == [200, 200, 200]
    for c in range(3):
        assert torch.allclose(means[c], far[labels == c].mean(0), rtol=1e-12)
    centred = far - torch.stack([far[labels == c].mean(0) for c in range(3)])[labels]
    # Doubles of size 1e6 carry 1e-10 of absolute error, next to entries of order 10.
    assert torch.allclose(covariance, centred.T @ centred / 600, atol=1e-7)


def test_own_class_distances_follow_the_chi_square_law():
    train, labels = mixture(n=5000)
    own = Mahalanobis().fit_observations(seen(train, labels)).distances(train).gather(1, labels[:, None])[:, 0]
    assert stats.kstest(own.numpy(), stats.chi2(6).cdf).pvalue > 1e-3


def test_a_class_without_samples_is_left_out():
    train, labels = mixture(classes=2)
    detector = Mahalanobis().fit_observations(seen(train, labels, classes=5))
    assert detector.distances(train).shape == (600, 2)


# The public face -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "detector", [MSP(), Energy(), Mahalanobis(), Mahalanobis(inverse="shrinkage")], ids=lambda d: d.name
)
def test_fit_and_score_on_a_model(detector, digits_model, digits):
    train, test = digits["train"], digits["test"]
    y = torch.from_numpy(train.labels)
    detector.fit(digits_model, train.images(slice(None)), y)
    known = detector.score(test.images(slice(None)))
    noise = detector.score(torch.rand(200, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert known.shape == (len(test),)
    assert known.dtype == torch.float64
    assert float(noise.median()) > float(known.median())  # higher = more unknown
    assert torch.allclose(detector.score(test.images(slice(None)), batch_size=7), known, rtol=1e-3, atol=1e-6)
    with pytest.raises(DataError, match="expected"):
        detector.score(torch.rand(2, 1, 8, 8) - 3)


def test_faults_are_explained():
    with pytest.raises(NotFittedError, match="before"):
        Mahalanobis().score(torch.rand(2, 1, 8, 8))
    with pytest.raises(NotFittedError, match="before"):
        Mahalanobis().score_observations(seen(torch.rand(2, 3)))
    train, labels = mixture()
    with pytest.raises(DataError, match="NaN"):
        Mahalanobis().fit_observations(seen(train * float("nan"), labels))
    with pytest.raises(DataError, match="no covariance"):
        Mahalanobis().fit_observations(seen(torch.ones(10, 4), torch.arange(10) % 3))
    with pytest.raises(DataError, match="at least two labelled samples"):
        Mahalanobis().fit_observations(seen(train, labels - 1))
    with pytest.raises(DataError, match="missing"):
        Mahalanobis().fit_observations(Observations(torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64)))
    with pytest.raises(DataError, match="no covariance"):  # constant per class, up to rounding
        Mahalanobis().fit_observations(seen(0.1 * torch.eye(3)[torch.arange(30) % 3] + 7.3, torch.arange(30) % 3))
    with pytest.raises(ConfigError, match="between 0 and 1"):
        Mahalanobis(inverse="shrinkage", shrinkage=2)
    with pytest.raises(ConfigError, match="pseudo, shrinkage"):
        Mahalanobis(inverse="cholesky")
    with pytest.raises(ConfigError, match="> 0"):
        Energy(temperature=0)
