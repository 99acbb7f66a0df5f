"""Methods that weight samples, divergences or parameters: MART, GAIRAT, MAIL, WEAT, AWP. In float64 on a linear model."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from defenses import AWP, GAIRAT, MAIL, MART, PGDAT, SRAT, TRADES, WEAT, Batch, Standard, Task
from defenses.awp import perturbation, perturbed_weights
from defenses.base import probability_margin
from defenses.done import DONE
from defenses.gairat import geometry_weights
from defenses.mail import margin_weights
from defenses.mart import boosted_cross_entropy
from defenses.trades import energy_terms, kl_natural_adversarial
from defenses.weat import energy_weights
from robustbench_ext.attacks.inner import InnerAttack
from robustbench_ext.attacks.threat import Threat
from robustbench_ext.errors import ConfigError
from robustbench_ext.randomness import SampleRandom


@pytest.fixture
def batch():
    torch.manual_seed(0)
    x = torch.rand(12, 1, 8, 8, dtype=torch.float64)
    x_adv = (x + 0.1 * torch.randn_like(x)).clamp(0, 1)
    kappa = torch.arange(12) % 11
    return Batch(x, torch.arange(12) % 4, x_adv, eps=0.1, epoch=9, epochs=10, steps_correct=kappa, attack_steps=10)


@pytest.fixture
def linear():
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 4)).double()


def gradients(value, model):
    return torch.autograd.grad(value, list(model.parameters()), retain_graph=True)


def same_gradients(a, b, model, tolerance=1e-12):
    return all(
        torch.allclose(x, y, atol=tolerance, rtol=0)
        for x, y in zip(gradients(a, model), gradients(b, model), strict=True)
    )


def test_all_reduce_to_pgd_at_given_the_same_inputs(batch, linear):
    """DONE(r = inf) = GAIRAT(lambda = inf) = MAIL(slope 0) = SRAT(lambda 0, balanced) = AWP(gamma 0) = PGD-AT."""
    plain = PGDAT().loss(linear, batch).value
    srat = SRAT(lam=0, defer=0)
    state = srat.state(linear.float(), Task(torch.full((4,), 7).numpy(), (1, 8, 8), 10))
    linear.double()
    for loss in (
        DONE(r="inf", implicit="none").loss(linear, batch),
        DONE(r=1e9, implicit="none").loss(linear, batch),
        GAIRAT(lam=1e3, burn_in=0).loss(linear, batch),
        GAIRAT(burn_in=1).loss(linear, batch),
        MAIL(slope=0, burn_in=0).loss(linear, batch),
        MAIL(burn_in=1).loss(linear, batch),
        AWP(gamma=0).loss(linear, batch),
        srat.loss(linear, batch, state.double()),
    ):
        # r = 1e9 leaves a weight of 1 + O(loss / r).
        assert torch.allclose(loss.value, plain, atol=1e-7, rtol=0)
        assert same_gradients(loss.value, PGDAT().loss(linear, batch).value, linear, 1e-7)


def test_batches_are_weighted_as_each_method_says(batch, linear):
    """Divided by B (WEAT), weights of mean 1 (GAIRAT, MAIL), times a constant 3 (MAIL's code)."""
    ce = F.cross_entropy(linear(batch.x_adv), batch.y, reduction="none")
    omega = geometry_weights(batch.steps_correct, 10, -1.0)
    assert torch.allclose(GAIRAT(burn_in=0).loss(linear, batch).value, (omega * ce).sum() / omega.sum(), atol=1e-12)
    m = margin_weights(probability_margin(linear(batch.x_adv), batch.y), 10.0, -0.5)
    assert torch.allclose(MAIL(burn_in=0).loss(linear, batch).value, (m * ce).sum() / m.sum(), atol=1e-12)
    constant = MAIL(burn_in=0, normalise="constant").loss(linear, batch).value
    assert torch.allclose(constant, (3 * m * ce).mean(), atol=1e-12)


# MART ----------------------------------------------------------------------------------------------------------------


def test_mart_is_its_formula(batch, linear):
    z, z_adv, y = linear(batch.x), linear(batch.x_adv), batch.y
    p, q = z.softmax(1), z_adv.softmax(1)
    rival = q.scatter(1, y[:, None], -1).amax(1)
    bce = -q.gather(1, y[:, None])[:, 0].log() - (1 - rival).log()
    assert torch.allclose(boosted_cross_entropy(z_adv, y), bce, atol=1e-12)
    assert (bce >= F.cross_entropy(z_adv, y, reduction="none")).all()
    kl = (p * (p.log() - q.log())).sum(1)
    written = bce.mean() + 5 * ((1 - p.gather(1, y[:, None])[:, 0]) * kl).mean()  # nothing is detached
    assert torch.allclose(MART().loss(linear, batch).value, written, atol=1e-12)
    assert same_gradients(MART().loss(linear, batch).value, written, linear)
    assert torch.allclose(MART(lam=0).loss(linear, batch).value, bce.mean(), atol=1e-12)


def test_mart_stays_finite_where_the_formula_does_not():
    z = torch.tensor([[0.0, 200.0, 0.0], [200.0, 0.0, 0.0]], requires_grad=True)
    loss = boosted_cross_entropy(z, torch.tensor([0, 0]))  # the rival has probability 1, then 0
    assert torch.allclose(loss, torch.tensor([400.0 - math.log(2), 0.0]), atol=1e-4)
    (g,) = torch.autograd.grad(loss.sum(), z)
    assert torch.isfinite(g).all()


def test_a_confident_sample_adds_no_divergence_to_mart(linear, batch):
    class Fixed(nn.Module):
        """Sure of class 0 to a degree on the first input it sees, torn between all on the second."""

        def __init__(self, natural):
            super().__init__()
            self.logits = iter([[natural, 0.0, 0.0], [0.0, 1.0, 2.0]])

        def forward(self, x):
            return torch.tensor([next(self.logits)], dtype=x.dtype)

    one = Batch(batch.x[:1], torch.tensor([0]), batch.x_adv[:1])
    assert float(MART().loss(Fixed(1e3), one).logs["weighted_kl"]) == 0.0  # although the divergence is large
    assert float(MART().loss(Fixed(0.3), one).logs["weighted_kl"]) > 0.1


# GAIRAT, MAIL --------------------------------------------------------------------------------------------------------


def test_geometry_weights_are_the_published_ones():
    expected = [0.99967, 0.99753, 0.98201, 0.88080, 0.5, 0.11920, 0.01799, 0.00247, 0.00034, 0.00005, 0.00001]
    found = geometry_weights(torch.arange(11), 10, -1.0)
    assert torch.allclose(found, torch.tensor(expected, dtype=torch.float64), atol=5e-6)
    assert (found.diff() < 0).all()


def test_the_attack_counts_what_is_still_correct(digits_model, digits_test):
    x, y, ids = (v[:40] for v in digits_test)
    random = SampleRandom.of(0, ids, "t")
    threat, steps = Threat("Linf", 0.15), 6
    crafted = InnerAttack(threat, steps, count=True).craft(digits_model, x, y, random)
    correct = torch.zeros(len(y), dtype=torch.int64)
    for k in range(steps):  # x^k is where an attack of k steps of the same size ends
        point = InnerAttack(threat, k, step_size=2.5 * 0.15 / steps).craft(digits_model, x, y, random).x_adv
        if k == 0:
            point = threat.random_point(x, random)
        with torch.no_grad():
            correct += digits_model(point).argmax(1) == y
    assert torch.equal(crafted.steps_correct, correct)
    assert 0 < int((correct < steps).sum()) < 40
    assert InnerAttack(threat, steps).craft(digits_model, x, y, random).steps_correct is None


def test_gairat_and_mail_weights_are_detached(batch, linear):
    ce = F.cross_entropy(linear(batch.x_adv), batch.y, reduction="none")
    m = margin_weights(probability_margin(linear(batch.x_adv), batch.y), 10.0, -0.5).detach()
    assert same_gradients(MAIL(burn_in=0).loss(linear, batch).value, (m / m.mean() * ce).mean(), linear)
    trades = MAIL(base="trades", burn_in=0)
    z, z_adv = linear(batch.x), linear(batch.x_adv)
    w = margin_weights(probability_margin(z_adv, batch.y), 2.0, 0.0).detach()
    written = F.cross_entropy(z, batch.y) + (w / w.mean() * 5 * kl_natural_adversarial(z, z_adv)).mean()
    assert torch.allclose(trades.loss(linear, batch).value, written, atol=1e-12)
    assert same_gradients(trades.loss(linear, batch).value, written, linear)


def test_weights_survive_batches_far_from_the_boundary():
    far = geometry_weights(torch.full((4,), 10), 10, -25.0)
    assert bool((far > 0).all()) and torch.allclose(far / far.mean(), torch.ones(4, dtype=torch.float64))
    sure = margin_weights(torch.ones(4), 300.0, 0.0)
    assert bool((sure > 0).all()) and torch.allclose(sure / sure.mean(), torch.ones(4, dtype=torch.float64))


def test_without_a_budget_every_iterate_is_the_input(digits_model, digits_test):
    x, y, ids = (v[:40] for v in digits_test)
    wrong = (y + 1) % 10
    for labels, correct in ((y, None), (wrong, 0)):
        crafted = InnerAttack(Threat("Linf", 0.0), 5, count=True).craft(
            digits_model, x, labels, SampleRandom.of(0, ids, "t")
        )
        with torch.no_grad():
            right = digits_model(x).argmax(1) == labels
        assert torch.equal(crafted.steps_correct, 5 * right)
        assert correct is None or int(right.sum()) < 5


def test_a_train_mode_attack_updates_statistics_and_gives_flags_back(digits_model, digits_test):
    import copy

    x, y, ids = (v[:40] for v in digits_test)
    model = copy.deepcopy(digits_model).train()
    model.bn2.eval()
    seen = int(model.bn1.num_batches_tracked)
    InnerAttack(Threat("Linf", 0.1), 3, mode="train")(model, x, y, SampleRandom.of(0, ids, "t"))
    assert int(model.bn1.num_batches_tracked) == seen + 3
    assert model.training and model.bn1.training and not model.bn2.training
    assert all(p.requires_grad for p in model.parameters())


def test_probability_margin():
    z = torch.log(torch.tensor([[0.7, 0.2, 0.1], [0.2, 0.5, 0.3]]))
    assert torch.allclose(probability_margin(z, torch.tensor([0, 2])), torch.tensor([0.5, -0.2]), atol=1e-6)


def test_burn_in_is_plain(batch, linear):
    early = Batch(batch.x, batch.y, batch.x_adv, epoch=4, epochs=10)
    assert torch.equal(GAIRAT(burn_in=0.5).loss(linear, early).value, PGDAT().loss(linear, early).value)
    with pytest.raises(ConfigError, match="steps_correct"):
        GAIRAT(burn_in=0.4).loss(linear, early)


# WEAT ----------------------------------------------------------------------------------------------------------------


def test_energy_weights():
    e = torch.tensor([0.0, 1.0, 5.0, 10.0, 12.0, 100.0, 1e4], dtype=torch.float64)
    w = energy_weights(e)
    assert torch.equal(w, energy_weights(-e))
    assert float(w[0]) == pytest.approx(1 / math.log(2), abs=1e-12)
    assert (w.diff() < 0).all() and float(w.max()) <= 1 / math.log(2)
    assert ((w * e)[4:] - 1).abs().max() < 1e-4
    assert torch.allclose(w[2:4], torch.tensor([0.1997, 0.1000], dtype=torch.float64), atol=5e-5)
    assert float(energy_weights(torch.tensor(-100.0))) == pytest.approx(0.01, rel=1e-6)  # the literal formula gives 0


def test_zero_logits_give_the_weight_of_log_one_plus_k():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).double()
    for p in model.parameters():
        nn.init.zeros_(p)
    x = torch.rand(5, 1, 8, 8, dtype=torch.float64)
    logs = WEAT().loss(model, Batch(x, torch.arange(5), x)).logs
    assert float(logs["weight"]) == pytest.approx(1 / math.log(11), abs=1e-12) == pytest.approx(0.4170, abs=1e-4)


def test_weat_is_its_formula_and_its_weight_is_detached(batch, linear):
    z, z_adv = linear(batch.x), linear(batch.x_adv)
    w = 1 / torch.log(1 + torch.exp((-z.logsumexp(1)).abs()))
    kl = kl_natural_adversarial(z, z_adv)
    for variant, logits in (("adv", z_adv), ("nat", z)):
        written = (w.detach() * (F.cross_entropy(logits, batch.y, reduction="none") + 6 * kl)).mean()
        found = WEAT(variant=variant).loss(linear, batch).value
        assert torch.allclose(found, written, atol=1e-12)
        assert same_gradients(found, written, linear)
        through = (w * (F.cross_entropy(logits, batch.y, reduction="none") + 6 * kl)).mean()
        assert not same_gradients(WEAT(variant=variant).loss(linear, batch).value, through, linear, 1e-6)


def test_weat_limits(batch, linear, monkeypatch):
    same = Batch(batch.x, batch.y, batch.x)
    assert torch.allclose(
        WEAT(variant="adv").loss(linear, same).value, WEAT(variant="nat").loss(linear, same).value, atol=1e-12
    )
    monkeypatch.setattr("defenses.weat.energy_weights", torch.ones_like)
    assert torch.allclose(WEAT(variant="nat").loss(linear, batch).value, TRADES().loss(linear, batch).value, atol=1e-12)


def test_normalised_weat_has_mean_weight_one_and_depends_on_logit_shifts(batch, linear):
    normal = WEAT(normalise=True).loss(linear, batch)
    assert float(normal.logs["weight"]) == pytest.approx(1.0, abs=1e-12)
    before, trades = WEAT().loss(linear, batch).value, TRADES().loss(linear, batch).value
    with torch.no_grad():
        linear[1].bias += 3  # changes no prediction
    assert torch.allclose(TRADES().loss(linear, batch).value, trades, atol=1e-10)
    assert abs(float(WEAT().loss(linear, batch).value.detach() - before.detach())) > 0.01


def test_the_energy_view_of_trades_is_an_identity(batch, linear):
    z, z_adv = linear(batch.x), linear(batch.x_adv)
    terms = energy_terms(z, z_adv, batch.y)
    assert torch.allclose(terms["conditional"] + terms["marginal"], kl_natural_adversarial(z, z_adv), atol=1e-10)
    beta = 6.0
    whole = (
        terms["joint_energy"] + (beta - 1) * terms["energy"] - beta * terms["energy_adv"] + beta * terms["conditional"]
    )
    assert torch.allclose(whole.mean(), TRADES(beta=beta).loss(linear, batch).value, atol=1e-10)
    logs = TRADES(beta=beta).loss(linear, batch).logs
    assert torch.allclose(logs["conditional"] + logs["marginal"], logs["kl"], atol=1e-10)
    shifted = energy_terms(z, z_adv + 2, batch.y)  # a constant moves between the terms; neither has a sign of its own
    assert torch.allclose(shifted["marginal"], terms["marginal"] + 2, atol=1e-10)
    assert torch.allclose(shifted["conditional"], terms["conditional"] - 2, atol=1e-10)


# AWP -----------------------------------------------------------------------------------------------------------------


def network():
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 8), nn.ReLU(), nn.Linear(8, 4)
    ).double()


@pytest.mark.parametrize("base", [PGDAT(), TRADES(beta=3)], ids=lambda d: d.name)
def test_awp_takes_the_gradient_at_perturbed_weights_and_gives_the_weights_back(batch, base):
    model = network()
    awp, state = AWP(base=base, gamma=0.02), nn.Module()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    value = base.loss(model, batch).value
    g = dict(
        zip(perturbed_weights(model), torch.autograd.grad(value, list(perturbed_weights(model).values())), strict=True)
    )
    model.load_state_dict(before)
    v = perturbation({k: before[k] for k in g}, g, 0.02)
    assert set(v) == {"0.weight", "4.weight", "6.weight"}  # more than one dimension: no batch norm, no biases
    for name, step in v.items():
        assert float(step.norm()) == pytest.approx(0.02 * float(before[name].norm()), rel=1e-12)
        assert torch.allclose(step / step.norm(), g[name] / g[name].norm(), atol=1e-12)
    seen = {}
    with awp.perturb(model, batch, state):
        buffers = {k: b.clone() for k, b in model.named_buffers()}
        assert all(torch.equal(buffers[k], before[k]) for k in buffers)  # the pass that found v left no trace
        seen = {k: p.detach().clone() for k, p in model.named_parameters()}
        loss = awp.loss(model, batch, state).value
        loss.backward()
    for name in v:
        assert torch.allclose(seen[name], before[name] + v[name], atol=1e-12)
    assert all(torch.equal(p.detach(), before[n]) for n, p in model.named_parameters())
    assert loss > value.detach()  # it ascended
    moved = network()
    moved.load_state_dict({k: seen.get(k, b) for k, b in before.items()})
    expected = torch.autograd.grad(base.loss(moved, batch).value, list(moved.parameters()))
    assert all(torch.allclose(p.grad, e, atol=1e-12) for p, e in zip(model.parameters(), expected, strict=True))


def test_awp_without_budget_or_before_its_time_does_nothing(batch):
    model = network()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    early = Batch(batch.x, batch.y, batch.x_adv, epoch=0, epochs=10)
    for awp, what in ((AWP(gamma=0), batch), (AWP(gamma=0.1, burn_in=0.05), early)):
        if what is early:
            what = Batch(batch.x, batch.y, batch.x_adv, epoch=0, epochs=10)
        with awp.perturb(model, what, nn.Module()):
            assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_awp_round_a_tracked_state_moves_it_once_a_step(batch):
    model, done = network(), DONE(r=1, eta=0.3)
    awp = AWP(base=done, gamma=0.05)
    state, plain = awp.state(model, None), done.state(model, None)
    for shift in range(3):
        before, other = state.log_u.clone(), replace(batch, y=(batch.y + shift) % 4)
        with awp.perturb(model, other, state):
            assert torch.equal(state.log_u, before)  # the pass that found v left no trace
            awp.loss(model, other, state)
        assert not torch.equal(state.log_u, before)
    done.loss(model, batch, plain)
    assert not torch.equal(plain.log_u, state.log_u)


def test_awp_gives_the_weights_back_after_an_error(batch):
    model = network()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="planted"), AWP(gamma=0.1).perturb(model, batch, nn.Module()):
        raise RuntimeError("planted")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_awp_wraps_what_it_is_given():
    assert AWP(base={"name": "trades", "beta": "3"}).base == TRADES(beta=3)
    assert AWP(base="standard").select_by == "clean" and AWP().select_by == "robust"
    assert AWP(base=TRADES(beta=2)).spec()["base"] == TRADES(beta=2).spec()
    inner = AWP(base="trades").attack(Threat("Linf", 0.1), 3, None)
    assert inner.objective == "kl"
    with pytest.raises(ConfigError, match="awp itself"):
        AWP(base="awp")
    with pytest.raises(ConfigError, match="did you mean|Did you mean"):
        AWP(base={"name": "trades", "bet": 3})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MART(lam=-1), "mart: lam"),
        (lambda: GAIRAT(burn_in=60), "between 0 and 1"),
        (lambda: MAIL(base="mart"), "pgd-at, trades"),
        (lambda: MAIL(normalise="yes"), "batch, constant"),
        (lambda: WEAT(variant="both"), "adv, nat"),
        (lambda: WEAT(beta="x"), "beta"),
        (lambda: AWP(gamma=-1), "awp: gamma"),
        (lambda: AWP(base=5), "expected a defense"),
        (lambda: AWP(base=["trades"]), "expected a defense"),
        (lambda: AWP(base={"beta": 3}), "expected a defense"),
        (lambda: WEAT(normalise="no"), "true or false"),
        (lambda: TRADES(beta="1e400"), "finite"),
    ],
)
def test_wrong_options(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_which_inner_attack_each_method_prescribes():
    threat = Threat("Linf", 0.1)
    attacks = {
        d.name: d.attack(threat, 10, None) for d in (PGDAT(), TRADES(), MART(), GAIRAT(), MAIL(), WEAT(), SRAT())
    }
    assert Standard().attack(threat, 10, None) is None
    assert TRADES(beta=0).attack(threat, 10, None) is None
    assert {k: (a.objective, a.start) for k, a in attacks.items()} == {
        "pgd-at": ("ce", "uniform"),
        "trades": ("kl", "gaussian"),
        "mart": ("ce", "gaussian"),
        "gairat": ("ce", "uniform"),
        "mail": ("ce", "gaussian"),
        "weat": ("kl", "gaussian"),
        "srat": ("ce", "uniform"),
    }
    assert all(a.mode == "eval" for a in attacks.values())
    assert MAIL(base="trades").attack(threat, 10, None).objective == "kl"
