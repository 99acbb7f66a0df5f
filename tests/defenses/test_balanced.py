"""Class-prior losses: printed numbers, what they are with equal priors, the defenses that they go into, published mistakes."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from defenses import AWP, DSU, MART, PGDAT, SRAT, TRADES, Batch, ClassPrior, Standard, Task
from defenses.balanced import METHODS, WEIGHTS, class_weights, focal_terms, ldam_terms, log_priors
from defenses.imbalance import ldam_margins
from defenses.trainer import Architecture, Recipe, train, training_key
from robustbench_ext.attacks.threat import Threat
from robustbench_ext.data import load_dataset
from robustbench_ext.errors import ConfigError, DataError
from robustbench_ext.models import load_model

PRINTED = np.array([5000, 50, 5])
COUNTS = np.array([40, 12, 6, 2])
K = len(COUNTS)


@pytest.fixture
def logits():
    torch.manual_seed(0)
    return torch.randn(24, K, dtype=torch.float64) * 3, torch.arange(24) % K


@pytest.fixture
def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, K)).double()


def batch_of(n=24, **options):
    torch.manual_seed(1)
    x = torch.rand(n, 1, 4, 4, dtype=torch.float64)
    x_adv = (x + 0.1 * torch.rand_like(x).sign()).clamp(0, 1)
    labels = torch.arange(n) % 5 % K  # class 0 twice as often: weights have another mean than 1
    return Batch(x, labels, x_adv, 0.1, **options)


def value(defense, network, batch, counts=COUNTS):
    state = defense.state(network, Task(np.asarray(counts), (1, 4, 4), 10)).double()
    return float(defense.loss(network, batch, state).value.detach())


# Numbers -------------------------------------------------------------------------------------------------------------


def test_printed_weights_and_margins():
    """Figures with four decimals: half a unit of the last."""
    w = class_weights("effective-number", PRINTED, 0.9999)
    assert np.abs(w - [0.0035, 0.2730, 2.7236]).max() < 5e-5
    assert np.abs(ldam_margins(PRINTED, 0.5) - [0.0889, 0.2812, 0.5]).max() < 5e-5


def test_the_survey_codes_beta_is_no_weighting():
    """At beta = 0.9 classes of 5,000 and of 50 weigh the same to half a percent: 1 - 0.9^50 = 0.9948."""
    w = class_weights("effective-number", PRINTED, 0.9)
    assert w[1] / w[0] == pytest.approx(1 / (1 - 0.9**50), rel=1e-12)
    assert w[1] / w[0] < 1.006
    assert ClassPrior(method="effective-number").beta == 0.9999


@pytest.mark.parametrize("kind", WEIGHTS)
def test_weights_add_up_to_the_number_of_classes_and_fall_as_classes_grow(kind):
    for counts in (PRINTED, COUNTS, np.array([7, 7, 7])):
        w = class_weights(kind, counts)
        assert w.sum() == pytest.approx(len(counts), rel=1e-14)
        order = np.argsort(counts, kind="stable")
        assert (np.diff(w[order]) <= 1e-15).all()
        if kind != "none" and counts.min() < counts.max():
            assert w.max() > w.min()
    assert np.allclose(class_weights(kind, np.array([7, 7, 7])), 1, rtol=1e-14)


def test_weighted_softmax_has_the_surveys_formula():
    pi = PRINTED / PRINTED.sum()
    w = 1 - np.log(pi / pi.max())
    assert np.allclose(class_weights("weighted-softmax", PRINTED), 3 * w / w.sum(), rtol=1e-13)


def test_priors():
    assert np.exp(log_priors(COUNTS)).sum() == pytest.approx(1)
    with pytest.raises(DataError, match=r"classes \[1\]"):
        log_priors(np.array([3, 0, 2]))


# Losses --------------------------------------------------------------------------------------------------------------


def test_focal_with_gamma_0_is_cross_entropy_and_its_gradient_is_not_the_detached_ones(logits):
    z, y = logits
    assert torch.equal(focal_terms(z, y, 0.0), F.cross_entropy(z, y, reduction="none"))
    z = z.clone().requires_grad_(True)
    assert torch.autograd.gradcheck(lambda v: focal_terms(v, y, 2.0).sum(), z)
    (mine,) = torch.autograd.grad(focal_terms(z, y, 2.0).sum(), z)
    ce = F.cross_entropy(z, y, reduction="none")
    (detached,) = torch.autograd.grad(((1 - torch.exp(-ce)).detach() ** 2 * ce).sum(), z)
    assert (mine - detached).norm() > 0.1 * mine.norm()
    p = z.softmax(1).gather(1, y[:, None])[:, 0]
    assert torch.allclose(focal_terms(z, y, 2.0), -((1 - p) ** 2) * p.log(), atol=1e-12)
    for gamma in (0.5, 0.0, 2.0):  # a sure sample must not give NaN
        sure = torch.tensor([[200.0, 0.0]], requires_grad=True)
        (g,) = torch.autograd.grad(focal_terms(sure, torch.tensor([0]), gamma).sum(), sure)
        assert torch.isfinite(g).all()


def test_ldam_takes_the_margin_from_the_true_class_alone(logits):
    _, y = logits
    cosines = F.normalize(torch.randn(24, 7, dtype=torch.float64), dim=1)[:, :K]
    margins = torch.from_numpy(ldam_margins(COUNTS, 0.5))
    expected = []
    for c, k in zip(cosines, y, strict=True):
        moved = c.clone()
        moved[k] -= margins[k]
        expected.append(F.cross_entropy(30 * moved[None], k[None]))
    assert torch.allclose(ldam_terms(30 * cosines, y, margins, 30.0), torch.stack(expected), atol=1e-12)
    assert torch.equal(
        ldam_terms(30 * cosines, y, 0 * margins, 30.0), F.cross_entropy(30 * cosines, y, reduction="none")
    )


@pytest.mark.parametrize("base", ["standard", "pgd-at", {"name": "trades", "beta": 3}])
def test_equal_priors_change_nothing_but_a_constant(base, network):
    """Softmax does not see a constant on all logits, nor a weighted mean the scale of the weights: equal to rounding."""
    batch = batch_of()
    plain = value(ClassPrior(method="ce", base=base), network, batch)
    equal = np.full(K, 15)
    for method in ("balanced-softmax", "weighted-softmax", "effective-number"):
        assert value(ClassPrior(method=method, base=base), network, batch, equal) == pytest.approx(plain, abs=1e-6)
        assert abs(value(ClassPrior(method=method, base=base), network, batch) - plain) > 1e-3
    assert value(ClassPrior(method="focal", gamma=0, base=base), network, batch) == pytest.approx(plain, abs=1e-12)


def test_plain_cross_entropy_inside_is_the_defense_alone(network):
    batch = batch_of()
    task = Task(COUNTS, (1, 4, 4), 10)
    for base in (Standard(), PGDAT(), TRADES(beta=3)):
        alone = base.loss(network, batch, base.state(network, task)).value
        assert value(ClassPrior(method="ce", base=base), network, batch) == float(alone.detach())


def test_balanced_softmax_is_cross_entropy_of_shifted_logits(network):
    """Independent: torch's cross-entropy of logits with the log counts added (a constant aside)."""
    batch = batch_of()
    shift = torch.from_numpy(np.log(COUNTS))
    for base, x in (("standard", batch.x), ("pgd-at", batch.x_adv)):
        expected = F.cross_entropy(network(x) + shift, batch.y)
        # The shift is kept in float32: 1e-7 of about 3.
        assert value(ClassPrior(base=base), network, batch) == pytest.approx(float(expected.detach()), abs=1e-6)
    doubled = F.cross_entropy(network(batch.x) + 2 * shift, batch.y)
    assert value(ClassPrior(tau=2), network, batch) == pytest.approx(float(doubled.detach()), abs=1e-6)


@pytest.mark.parametrize("method", ["weighted-softmax", "effective-number"])
def test_weights_are_those_of_torch_and_no_binary_cross_entropy(method, network):
    batch = batch_of()
    w = torch.from_numpy(class_weights(method, COUNTS))
    found = value(ClassPrior(method=method, base="pgd-at"), network, batch)
    assert found == pytest.approx(float(F.cross_entropy(network(batch.x_adv), batch.y, weight=w).detach()), rel=1e-6)
    p = network(batch.x_adv).softmax(1)
    bce = F.binary_cross_entropy(p, F.one_hot(batch.y, K).double(), w[batch.y][:, None])
    assert abs(found - float(bce.detach())) > 0.1


def test_only_the_loss_of_labels_changes_in_trades(network):
    batch = batch_of()
    task = Task(COUNTS, (1, 4, 4), 10)
    plain = TRADES(beta=3).loss(network, batch)
    wrapped = ClassPrior(base=TRADES(beta=3))
    found = wrapped.loss(network, batch, wrapped.state(network, task))
    assert torch.equal(found.logs["kl"], plain.logs["kl"])
    assert not torch.equal(found.logs["ce"], plain.logs["ce"])


def test_the_inner_attack_is_the_bases_own():
    threat = Threat("Linf", 0.1)
    for base in (PGDAT(), TRADES(beta=3)):
        for method in METHODS:
            assert ClassPrior(method=method, base=base).attack(threat, 3, None) == base.attack(threat, 3, None)
    assert ClassPrior().attack(threat, 3, None) is None
    assert ClassPrior().select_by == "clean"
    assert ClassPrior(base="pgd-at").select_by == "robust"


def test_weights_are_deferred(network):
    defense = ClassPrior(method="effective-number", base="pgd-at", defer=0.8)
    early, late = (batch_of(epoch=e, epochs=10) for e in (7, 8))
    assert value(defense, network, early) == value(ClassPrior(method="ce", base="pgd-at"), network, early)
    assert value(defense, network, late) == value(ClassPrior(method="effective-number", base="pgd-at"), network, late)
    assert ClassPrior(method="ldam").resolved() == ("ldam", "effective-number", 0.8)
    assert ClassPrior(method="ldam", weights="none", defer=0).resolved() == ("ldam", "none", 0)


def test_inside_and_around_other_methods(network):
    batch = batch_of()
    shift = torch.from_numpy(np.log(COUNTS))
    expected = float(F.cross_entropy(network(batch.x_adv) + shift, batch.y).detach())
    task = Task(COUNTS, (1, 4, 4), 10)
    srat = ClassPrior(base=SRAT(base="ce", weights="none", lam=0))
    state = srat.state(network.float(), task).double()  # a dry pass of the network is in float32
    network.double()
    assert float(srat.loss(network, batch, state).value.detach()) == pytest.approx(expected, abs=1e-6)
    for defense in (ClassPrior(base=AWP(base="pgd-at", gamma=0.1)), AWP(base=ClassPrior(base="pgd-at"), gamma=0.1)):
        state = defense.state(network, task)
        before = [p.clone() for p in network.parameters()]
        with defense.perturb(network, batch, state):
            there = float(defense.loss(network, batch, state).value.detach())
        assert there > expected  # moved to raise this very loss
        assert all(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))
    assert DSU(base=ClassPrior()).class_losses is False
    assert DSU(base=ClassPrior()).select_by == "clean"


def test_what_does_not_go_together():
    for base in ("mart", "mail", "done", {"name": "srat", "lam": 0}, {"name": "awp", "base": "mart"}, "class-prior"):
        with pytest.raises(ConfigError, match="no plain cross-entropy"):
            ClassPrior(base=base)
    with pytest.raises(ConfigError, match="method = 'ldma'"):
        ClassPrior(method="ldma")
    with pytest.raises(ConfigError, match="beta = 1"):
        ClassPrior(beta=1)
    with pytest.raises(ConfigError, match="defer = 2"):
        ClassPrior(defer=2)
    with pytest.raises(ConfigError, match="needs to know the classes"):
        ClassPrior().loss(nn.Identity(), batch_of())
    assert ClassPrior(base="pgd-at").soft_targets
    assert not ClassPrior(method="focal").soft_targets
    assert not ClassPrior(method="weighted-softmax").soft_targets
    assert not MART.class_losses


def test_ldam_refuses_logits_that_are_no_cosines():
    task = Task(np.array([50, 20, 5]), (1, 8, 8), 10)
    build = lambda **kwargs: load_model("small-cnn", shape=(1, 8, 8), num_classes=3, kwargs=kwargs).module  # noqa: E731
    plain, cosine = build(), build(cosine_head=True)
    before = {k: v.clone() for k, v in plain.state_dict().items()}
    with pytest.raises(ConfigError, match="cosine_head: true"):
        ClassPrior(method="ldam").state(plain, task)
    assert all(torch.equal(v, before[k]) for k, v in plain.state_dict().items())
    state = ClassPrior(method="ldam").state(cosine, task)
    assert state.margins[2] == 0.5


def test_classes_without_samples_are_refused_where_their_prior_counts(network):
    task = Task(np.array([5, 0, 3, 2]), (1, 4, 4), 10)
    with pytest.raises(DataError, match=r"classes \[1\]"):
        ClassPrior().state(network, task)
    ClassPrior(method="focal").state(network, task)


# Training ------------------------------------------------------------------------------------------------------------


def test_balanced_softmax_lifts_the_cut_classes(tmp_path):
    """Five classes of ten samples: plain training all but forgets them, a prior in the loss does not."""
    data = load_dataset("digits@step:10")
    recipe = Recipe(epochs=5, lr=0.05, validation_n=20, validation_steps=1, energy_n=0)
    x, y = data["test"].images(slice(None)), torch.from_numpy(data["test"].labels)
    tails, keys = {}, set()
    for method in ("ce", "balanced-softmax"):
        architecture = Architecture("small-cnn", data.shape, 10)
        defense = ClassPrior(method=method)
        keys.add(training_key(defense, architecture, data, recipe, 0))
        folder = train(defense, architecture, data, recipe, tmp_path / method)
        with torch.no_grad():
            right = load_model(str(folder)).module.eval()(x).argmax(1) == y
        tails[method] = float(right[y >= 5].double().mean())
    assert len(keys) == 2
    assert tails["balanced-softmax"] > tails["ce"] + 0.05
