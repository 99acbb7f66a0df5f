"""What all detectors keep, and the ones on logits: exact invariants, faults, the public face."""

import numpy as np
import pytest
import torch

from detectors import (
    ASH,
    DICE,
    KNN,
    MSP,
    ODIN,
    DiagonalMahalanobis,
    Energy,
    Entropy,
    FeatureSqueezing,
    GradNorm,
    KLMatching,
    Mahalanobis,
    MarginalMahalanobis,
    MaxLogit,
    ReAct,
    RelativeMahalanobis,
    Validation,
    ViM,
)
from detectors.entropy import entropy
from detectors.msp import msp_score
from robustbench_ext.attacks import build_attack
from robustbench_ext.attacks.adaptive import Adaptive
from robustbench_ext.catalog import DETECTORS
from robustbench_ext.errors import ConfigError, DataError, ModelError, NotFittedError
from robustbench_ext.models import observe
from robustbench_ext.models.energy import marginal_energy
from robustbench_ext.probes import scorer
from robustbench_ext.testing import check_detector

EVERY = [
    MSP(),
    MaxLogit(),
    Entropy(),
    Energy(),
    Energy(temperature=2, suspect="high", reading="joint"),
    KLMatching(),
    Mahalanobis(),
    Mahalanobis(inverse="shrinkage"),
    RelativeMahalanobis(),
    MarginalMahalanobis(),
    DiagonalMahalanobis(),
    KNN(k=10),
    ViM(),
    ReAct(),
    DICE(),
    ASH(),
    GradNorm(),
    ODIN(),
    FeatureSqueezing(),
]


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


def test_entropy_and_max_logit():
    f = torch.randn(20, 5)
    p = f.double().softmax(1)
    assert torch.allclose(entropy(f), -(p * p.log()).sum(1), atol=1e-12)
    assert torch.allclose(entropy(torch.zeros(1, 5)), torch.tensor([np.log(5)]).double())
    assert entropy(torch.tensor([[1e4, 0.0]])).item() == 0  # no 0 log 0
    seen = observe_logits(f)
    assert torch.equal(MaxLogit().score_observations(seen), Energy(reading="joint").score_observations(seen))
    low = Energy(suspect="low").score_observations(seen)
    assert torch.equal(low, -Energy().score_observations(seen))


def observe_logits(f):
    from robustbench_ext.models import Observations

    return Observations(f, torch.zeros(len(f), dtype=torch.int64))


@pytest.mark.parametrize("detector", EVERY, ids=lambda d: f"{d.name}-{getattr(d, 'inverse', '')}")
def test_fit_and_score_on_a_model(detector, digits_model, digits):
    train, test = digits["train"], digits["test"]
    y = torch.from_numpy(train.labels)
    before = {name: value.clone() for name, value in digits_model.state_dict().items()}
    detector.fit(digits_model, train.images(slice(None)), y)
    known = detector.score(test.images(slice(None)))
    noise = detector.score(torch.rand(200, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert known.shape == (len(test),)
    assert known.dtype == torch.float64
    assert bool(torch.isfinite(known).all())
    assert float(noise.median()) > float(known.median())  # higher = more unknown
    assert torch.allclose(detector.score(test.images(slice(None)), batch_size=7), known, rtol=1e-3, atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in digits_model.state_dict().items())
    with pytest.raises(DataError, match="expected"):
        detector.score(torch.rand(2, 1, 8, 8) - 3)


@pytest.mark.parametrize("detector", EVERY, ids=lambda d: f"{d.name}-{getattr(d, 'inverse', '')}")
def test_conformance(detector):
    # There are 48 samples of 128 features.
    options = {"knn": {"k": 5}, "vim": {"dim": 16}}.get(detector.name, {})
    check_detector(type(detector)(**options))


def test_every_registered_detector_is_tested_here():
    tested = {d.name for d in EVERY} | {"pytorch-ood", "vog"}  # these have tests of their own
    assert {entry.name for entry in DETECTORS} == tested


@pytest.mark.parametrize("detector", [d for d in EVERY if not d.reads_inputs], ids=lambda d: d.name)
def test_scores_of_observations_equal_scores_of_inputs_and_have_a_gradient(detector, digits_model, digits):
    x, y = digits["test"].images(slice(0, 50)), torch.from_numpy(digits["test"].labels[:50])
    train = digits["train"]
    detector.fit(digits_model, train.images(slice(None)), torch.from_numpy(train.labels))
    seen = observe(digits_model, x, y, detector.taps)
    assert torch.allclose(detector.score_observations(seen), detector.score(x), rtol=1e-6, atol=1e-9)
    assert detector.differentiable
    leaf = type(seen)(seen.logits.requires_grad_(), y, {k: v.requires_grad_() for k, v in seen.features.items()})
    found = torch.autograd.grad(
        detector.score_observations(leaf).sum(), [leaf.logits, *leaf.features.values()], allow_unused=True
    )
    assert any(g is not None and bool(g.abs().sum() > 0) for g in found)
    assert all(g is None or bool(torch.isfinite(g).all()) for g in found)


@pytest.mark.parametrize("detector", [d for d in EVERY if not d.reads_inputs], ids=lambda d: d.name)
def test_an_attacker_who_knows_of_it_lowers_the_score(detector, digits_model, digits, digits_test):
    x, y, ids = (v[:40] for v in digits_test)
    train = digits["train"]
    detector.fit(digits_model, train.images(slice(None)), torch.from_numpy(train.labels))
    plain = build_attack("pgd", eps=0.2, steps=20, stop="never")(digits_model, x, y, ids=ids)
    knowing = Adaptive(eps=0.2, steps=40, scorer=scorer(detector))(digits_model, x, y, ids=ids)
    both = plain.broken & knowing.broken & (plain.norms > 0) & (knowing.norms > 0)
    assert int(both.sum()) > 25
    lower = detector.score(knowing.x_adv[both]) <= detector.score(plain.x_adv[both]) + 1e-6
    assert float(lower.float().mean()) > 0.7


def test_faults_are_explained(digits_model):
    for detector in (Mahalanobis(), KNN(), ViM(), ReAct(), KLMatching()):
        with pytest.raises(NotFittedError, match="before"):
            detector.score(torch.rand(2, 1, 8, 8))
        with pytest.raises(NotFittedError, match="before"):
            detector.score_observations(observe(digits_model, torch.rand(2, 1, 8, 8), torch.zeros(2), detector.taps))
    with pytest.raises(ConfigError, match="need the inputs and the model"):
        ODIN().score_observations(observe_logits(torch.zeros(2, 3)))
    train = observe(digits_model, torch.rand(30, 1, 8, 8), torch.zeros(30, dtype=torch.int64), ("penultimate",))
    with pytest.raises(ConfigError, match="model=model"):
        ViM().fit_observations(train)
    with pytest.raises(DataError, match="only 30 training samples"):
        KNN(k=31).fit_observations(train)
    with pytest.raises(DataError, match="fewer than the 64 features"):
        ViM(dim=64).fit_observations(train, model=digits_model)
    for make, message in (
        (lambda: Energy(temperature=0), "> 0"),
        (lambda: Energy(reading="free"), "marginal, joint, delta"),
        (lambda: Energy(temperature=[1, 2]), "validate"),
        (lambda: ODIN(eps=[0, 0.1]), "validate"),
        (lambda: ODIN(eps=-0.1), ">= 0"),
        (lambda: ReAct(quantile=2), "quantile"),
        (lambda: DICE(sparsity=1), "sparsity"),
        (lambda: ASH(variant="x"), "s, p, b"),
        (lambda: KNN(k=0), "k"),
        (lambda: KNN(k=2.5), "whole"),
        (lambda: ViM(dim=1.5), "whole"),
        (lambda: GradNorm(temperature=-1), "> 0"),
        (lambda: FeatureSqueezing(bits=0, window=0), "nothing would change"),
        (lambda: FeatureSqueezing(bits=9), "bits <= 8"),
    ):
        with pytest.raises(ConfigError, match=message):
            make()
    with pytest.raises(DataError, match="at least 10 of each"):
        Validation(torch.rand(20, 1, 8, 8), torch.rand(9, 1, 8, 8))
    with pytest.raises(DataError, match="tnr95, auroc"):
        Validation(torch.rand(20, 1, 8, 8), torch.rand(20, 1, 8, 8), "accuracy")


def test_a_head_that_is_not_linear_is_refused(digits_model, digits):
    class Behind(torch.nn.Module):
        def __init__(self, inner, change):
            super().__init__()
            self.inner, self.change = inner, change

        def forward(self, x):
            return self.change(self.inner(x))

    x, y = digits["train"].images(slice(0, 200)), torch.from_numpy(digits["train"].labels[:200])
    with pytest.raises(ModelError, match="nothing but a factor behind it"):
        ViM().fit(Behind(digits_model, lambda z: z - z.mean(1, keepdim=True)).eval(), x, y)
    # A temperature behind the last layer is part of it: the energies are those of the scaled logits.
    test = digits["test"].images(slice(0, 20))
    hot = ReAct(quantile=1.0).fit(Behind(digits_model, lambda z: z / 2).eval(), x, y).score(test)
    plain = ReAct(quantile=1.0, temperature=2.0).fit(digits_model, x, y).score(test)
    assert torch.allclose(2 * hot, plain, rtol=1e-5)
