"""Objectives: limits, identities, gradients by hand, what is detached."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from defenses import PGDAT, TRADES, Batch, Standard
from defenses.trades import kl_natural_adversarial
from robustbench_ext.attacks.inner import InnerAttack
from robustbench_ext.attacks.threat import Threat
from robustbench_ext.errors import ConfigError
from robustbench_ext.randomness import SampleRandom


@pytest.fixture
def batch():
    torch.manual_seed(0)
    x = torch.rand(12, 1, 8, 8, dtype=torch.float64)
    return Batch(x, torch.arange(12) % 4, (x + 0.1 * torch.randn_like(x)).clamp(0, 1))


@pytest.fixture
def linear():
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 4)).double()


def test_reduction_chain(batch, linear):
    standard = Standard().loss(linear, batch).value
    assert torch.equal(standard, F.cross_entropy(linear(batch.x), batch.y))
    assert torch.equal(TRADES(beta=0).loss(linear, batch).value, standard)
    same = Batch(batch.x, batch.y, batch.x)
    assert torch.allclose(TRADES(beta=6).loss(linear, same).value, standard, atol=1e-12)  # eps = 0: the KL vanishes
    assert torch.equal(PGDAT().loss(linear, same).value, standard)


def test_kl_direction_value_and_invariance():
    torch.manual_seed(0)
    z, z_adv = torch.randn(9, 5, dtype=torch.float64), torch.randn(9, 5, dtype=torch.float64)
    p, q = z.softmax(1), z_adv.softmax(1)
    expected = (p * (p.log() - q.log())).sum(1)
    assert torch.allclose(kl_natural_adversarial(z, z_adv), expected, atol=1e-12)
    assert (expected >= 0).all()
    assert not torch.allclose(kl_natural_adversarial(z_adv, z), expected)  # the direction matters
    assert torch.allclose(kl_natural_adversarial(z + 3, z_adv - 2), expected, atol=1e-12)


def test_kl_gradients_through_both_arguments():
    torch.manual_seed(0)
    z = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    z_adv = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    kl = kl_natural_adversarial(z, z_adv)
    at_natural, at_adversarial = torch.autograd.grad(kl.sum(), (z, z_adv))
    p, q = z.softmax(1), z_adv.softmax(1)
    assert torch.allclose(at_adversarial, q - p, atol=1e-12)
    assert torch.allclose(at_natural, p * (p.log() - q.log() - kl[:, None]), atol=1e-12)
    assert at_natural.abs().max() > 0.01
    assert torch.autograd.gradcheck(kl_natural_adversarial, (z, z_adv))


def test_trades_energy_identity(batch, linear):
    """KL = sum_k p_k(x) [E(x*, k) - E(x, k)] + E(x) - E(x*), and CE = E(x, y) - E(x), in float64."""
    z, z_adv = linear(batch.x), linear(batch.x_adv)
    energy, energy_adv = -z.logsumexp(1), -z_adv.logsumexp(1)
    kl = (z.softmax(1) * (z - z_adv)).sum(1) + energy - energy_adv
    assert torch.allclose(kl_natural_adversarial(z, z_adv), kl, atol=1e-12)
    joint = -z.gather(1, batch.y[:, None])[:, 0]
    expected = (joint - energy + 6 * kl).mean()
    assert torch.allclose(TRADES(beta=6).loss(linear, batch).value, expected, atol=1e-10)


def test_trades_gradient_flows_through_both_forwards(batch, linear):
    """The gradient of the loss itself equals the one written out, with nothing detached."""
    loss = TRADES(beta=3).loss(linear, batch).value
    found = torch.autograd.grad(loss, list(linear.parameters()))
    z, z_adv = linear(batch.x), linear(batch.x_adv)
    p, q = z.log_softmax(1), z_adv.log_softmax(1)
    written = F.cross_entropy(z, batch.y) + 3 * (p.exp() * (p - q)).sum(1).mean()
    for a, b in zip(found, torch.autograd.grad(written, list(linear.parameters())), strict=True):
        assert torch.allclose(a, b, atol=1e-12)


def test_inner_attack_ascends_kl_from_natural_to_adversarial(linear, batch):
    """One step follows the sign of the gradient of KL(p(x) || p(x')), not of the reverse divergence."""
    threat = Threat("Linf", 0.2)
    random = SampleRandom.of(0, range(12), "t")
    x = batch.x.float()
    linear = linear.float()
    with torch.no_grad():
        linear[1].weight.mul_(5)
        linear[1].bias.mul_(5)
    steps, size = 4, 0.06  # near x' = x both divergences have the same gradient; a few steps away they part
    attack = InnerAttack(threat, steps, step_size=size, objective="kl", start="gaussian")
    found = attack(linear, x, batch.y, random)

    def walk(divergence):
        point = x + 0.001 * random.normal(x.shape[1:])
        for _ in range(steps):
            point = point.detach().requires_grad_(True)
            p, q = linear(x).detach(), linear(point)
            (gradient,) = torch.autograd.grad(divergence(p.log_softmax(1), q.log_softmax(1)).sum(), point)
            point = threat.project(point.detach() + size * gradient.sign(), x)
        return point

    expected = walk(lambda p, q: (p.exp() * (p - q)).sum(1))
    reverse = walk(lambda p, q: (q.exp() * (q - p)).sum(1))
    assert torch.allclose(found, expected, atol=1e-6)
    assert not torch.allclose(found, reverse, atol=1e-3)


def test_trades_reduction_is_a_batch_mean(batch, linear):
    """Not torch's "mean", which also divides by K and makes beta K times smaller."""
    loss = TRADES(beta=2)
    doubled = Batch(batch.x.repeat(2, 1, 1, 1), batch.y.repeat(2), batch.x_adv.repeat(2, 1, 1, 1))
    assert torch.allclose(loss.loss(linear, batch).value, loss.loss(linear, doubled).value, atol=1e-12)
    logs = loss.loss(linear, batch)
    assert torch.allclose(logs.value, logs.logs["ce"] + 2 * logs.logs["kl"], atol=1e-12)


@pytest.mark.parametrize("objective", ["ce", "kl"])
@pytest.mark.parametrize(("norm", "eps"), [("Linf", 0.1), ("L2", 0.8)])
def test_inner_attack(objective, norm, eps, digits_model, digits_test):
    x, y, ids = (v[:50] for v in digits_test)
    before = {k: v.clone() for k, v in digits_model.state_dict().items()}
    digits_model.train()
    random = SampleRandom.of(0, ids, "t")
    start = "uniform" if objective == "ce" else "gaussian"
    attack = InnerAttack(Threat(norm, eps), 5, objective=objective, start=start)
    x_adv = attack(digits_model, x, y, random)
    assert digits_model.training
    digits_model.eval()
    assert all(torch.equal(v, before[k]) for k, v in digits_model.state_dict().items())
    assert max(Threat(norm, eps).excess(x_adv, x)) <= 1e-6
    assert not x_adv.requires_grad
    assert all(p.grad is None and p.requires_grad for p in digits_model.parameters())
    with torch.no_grad():
        z, z_adv = digits_model(x), digits_model(x_adv)
    if objective == "ce":
        assert float(F.cross_entropy(z_adv, y)) > float(F.cross_entropy(z, y)) + 0.1
    else:
        assert float(kl_natural_adversarial(z, z_adv).mean()) > 0.05  # the Gaussian start has left the zero gradient
    assert torch.equal(attack(digits_model, x, y, random), x_adv)
    assert not torch.equal(attack(digits_model, x, y, random, step=1), x_adv)
    assert torch.equal(InnerAttack(Threat(norm, 0.0), 5)(digits_model, x, y, random), x)


def test_wrong_beta():
    with pytest.raises(ConfigError, match="beta"):
        TRADES(beta=-1)
    assert TRADES(beta="1/2").beta == 0.5
