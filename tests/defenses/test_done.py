"""DONE: weights, the tracked expectation, the barrier's inner problem, and the hypergradient against brute force."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from defenses import DONE, PGDAT, Batch
from defenses.barrier import BarrierAttack, barrier_curvature, barrier_gradient, box, implicit_direction
from defenses.done import Tracked, soft_worst_case
from robustbench_ext.attacks.threat import Threat
from robustbench_ext.errors import ConfigError
from robustbench_ext.randomness import SampleRandom

LOSSES = torch.tensor([0.3, 2.1, 0.9, 3.0, 0.05], dtype=torch.float64)


def test_weights_are_a_softmax():
    w = DONE(r=0.7).weights(LOSSES) / len(LOSSES)
    assert torch.allclose(w, (LOSSES / 0.7).softmax(0), atol=1e-14)
    assert float(w.sum()) == pytest.approx(1, abs=1e-14)
    assert torch.allclose(DONE(r=0.7).weights(LOSSES + 5), DONE(r=0.7).weights(LOSSES), atol=1e-12)
    assert float(w[3] / w[0]) == pytest.approx(math.exp((3.0 - 0.3) / 0.7), rel=1e-12)
    assert torch.allclose(DONE(r=0.7).weights(torch.full((6,), 2.0)), torch.ones(6), atol=1e-12)
    assert torch.isfinite(DONE(r=0.01).weights(torch.tensor([100.0, 0.0]))).all()  # exp(l / r) overflows


def test_the_soft_worst_case_lies_between_mean_and_maximum():
    values = [float(soft_worst_case(LOSSES, r)) for r in (1e-3, 0.1, 0.5, 1, 3, 10, 1e4, math.inf)]
    assert values == sorted(values, reverse=True)
    assert values[0] == pytest.approx(3.0, abs=1e-2) and values[-1] == pytest.approx(float(LOSSES.mean()), abs=1e-12)
    expansion = float(LOSSES.mean() + LOSSES.var(unbiased=False) / 20)  # mean + var / 2r, up to r^-2
    assert float(soft_worst_case(LOSSES, 10.0)) == pytest.approx(expansion, abs=LOSSES.max().item() ** 3 / 6 / 100)


def test_duality():
    """The penalised maximum over the simplex, at the closed-form weights, is the log-mean-exp."""
    r = 0.8
    w = (LOSSES / r).softmax(0)
    dual = (w * LOSSES).sum() - r * (w * (len(LOSSES) * w).log()).sum()
    assert float(dual) == pytest.approx(float(soft_worst_case(LOSSES, r)), abs=1e-12)
    torch.manual_seed(0)
    for other in torch.rand(50, 5, dtype=torch.float64):
        o = other / other.sum()
        assert (o * LOSSES).sum() - r * (o * (5 * o).log()).sum() < dual


def test_a_batch_step_is_the_gradient_of_the_soft_worst_case():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).double()
    x = torch.rand(10, 1, 4, 4, dtype=torch.float64)
    batch = Batch(x, torch.arange(10) % 3, x, eps=0.1)
    found = torch.autograd.grad(DONE(r=0.5, implicit="none").loss(model, batch).value, list(model.parameters()))
    losses = F.cross_entropy(model(x), batch.y, reduction="none")
    expected = torch.autograd.grad(soft_worst_case(losses, 0.5), list(model.parameters()))
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(found, expected, strict=True))


def test_the_tracked_expectation():
    state, done = Tracked(), DONE(r=0.5, eta=0.25, cap=False)
    first, second = LOSSES, LOSSES.flip(0) * 1.3
    u = (first / 0.5).exp().mean()
    assert torch.allclose(done.weights(first, state), (first / 0.5).exp() / u, atol=1e-12)  # u_0: the first batch's own
    u = 0.75 * u + 0.25 * (second / 0.5).exp().mean()
    assert torch.allclose(done.weights(second, state), (second / 0.5).exp() / u, rtol=1e-12)
    assert float(state.log_u) == pytest.approx(float(u.log()), abs=1e-12)
    resumed = Tracked()
    resumed.load_state_dict(state.state_dict())
    assert torch.equal(done.weights(first, resumed), done.weights(first, state))


def test_the_cap_holds_rising_weights_and_leaves_falling_ones():
    rising, falling = LOSSES + 4, LOSSES - 4
    for cap in (True, False):
        state, done = Tracked(), DONE(r=0.5, eta=0.1, cap=cap)
        done.weights(LOSSES, state)
        mean = float(done.weights(rising, state).mean())
        assert mean == pytest.approx(1.0, abs=1e-12) if cap else mean > 5
    state, done = Tracked(), DONE(r=0.5, eta=0.1)
    done.weights(LOSSES, state)
    assert float(done.weights(falling, state).mean()) < 0.01


# The barrier ---------------------------------------------------------------------------------------------------------


def test_the_box_and_the_barrier_against_autograd():
    x = torch.tensor([[0.0, 1.0, 0.5, 0.05]], dtype=torch.float64)
    lo, hi = box(x, 0.1)
    assert torch.allclose(lo, torch.tensor([[0.0, -1.0, -1.0, -0.5]], dtype=torch.float64), atol=1e-12)
    assert torch.allclose(hi, torch.tensor([[1.0, 0.0, 1.0, 1.0]], dtype=torch.float64), atol=1e-12)
    s = ((lo + hi) / 2 + 0.3 * (hi - lo) / 2).requires_grad_(True)
    value = -0.02 * ((hi - s).log() + (s - lo).log()).sum()
    (g,) = torch.autograd.grad(value, s, create_graph=True)
    (h,) = torch.autograd.grad(g.sum(), s)
    assert torch.allclose(barrier_gradient(s.detach(), lo, hi, 0.02), g.detach(), atol=1e-12)
    assert torch.allclose(barrier_curvature(s.detach(), lo, hi, 0.02), h, atol=1e-10)


def test_every_optimizer_attacks_a_robust_looking_model(mnist_model, mnist_test):
    """Where gradients are tiny, as on confident samples, a plain gradient step of any fixed rate stands still."""
    x, y, ids = (v[:100] for v in mnist_test)
    random = SampleRandom.of(0, ids, "t")
    found = {}
    for optimizer in ("sign", "gd", "adam"):
        x_adv = BarrierAttack(Threat("Linf", 0.1), 10, optimizer=optimizer).craft(mnist_model, x, y, random).x_adv
        with torch.no_grad():
            found[optimizer] = float(F.cross_entropy(mnist_model(x_adv), y))
    with torch.no_grad():
        clean = float(F.cross_entropy(mnist_model(x), y))
    assert min(found.values()) > clean + 0.3, (clean, found)


@pytest.mark.parametrize("optimizer", ["sign", "gd", "adam"])
def test_the_attack_stays_strictly_inside_and_ascends(optimizer, digits_model, digits_test):
    x, y, ids = (v[:60] for v in digits_test)
    assert bool((x == 0).any()) and bool((x == 1).any())  # delta = 0 is on the boundary there
    before = {k: v.clone() for k, v in digits_model.state_dict().items()}
    attack = BarrierAttack(Threat("Linf", 0.15), 10, optimizer=optimizer)
    random = SampleRandom.of(0, ids, "t")
    x_adv = attack.craft(digits_model, x, y, random).x_adv
    lo, hi = box(x, 0.15)
    s = (x_adv - x) / 0.15
    inside = 1e-3 * (hi - lo) - 1e-5  # x + eps s is rounded in float32
    assert bool((s > lo + inside).all()) and bool((s < hi - inside).all())
    with torch.no_grad():
        clean, attacked = (F.cross_entropy(digits_model(v), y) for v in (x, x_adv))
    assert float(attacked) > float(clean) + 0.3
    assert torch.equal(attack.craft(digits_model, x, y, random).x_adv, x_adv)
    assert all(torch.equal(v, before[k]) for k, v in digits_model.state_dict().items())
    assert torch.equal(BarrierAttack(Threat("Linf", 0.0), 10).craft(digits_model, x, y, random).x_adv, x)


# The hypergradient ---------------------------------------------------------------------------------------------------

EPS = 0.2


class Tiny(nn.Module):
    """A softmax-linear model on six inputs, K = 4."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.weight = nn.Parameter(torch.randn(4, 6, dtype=torch.float64))

    def forward(self, x):
        return x.flatten(1) @ self.weight.T


def solve(model, x, y, c):
    """The minimiser of phi_bar in s, by damped Newton steps in float64, far beyond the tests' tolerances."""
    lo, hi = box(x, EPS)
    s = ((lo + hi) / 2).clone()

    def phi(s):
        fit = F.cross_entropy(model(x + EPS * s), y, reduction="sum")
        return -fit - c * ((hi - s).log() + (s - lo).log()).sum()

    flat = s.shape
    for _ in range(100):
        point = s.detach().requires_grad_(True)
        (g,) = torch.autograd.grad(phi(point), point)
        if float(g.abs().max()) < 1e-12:
            break
        hessian = torch.autograd.functional.hessian(lambda v: phi(v.view(flat)), point.detach().flatten())
        values, vectors = torch.linalg.eigh(hessian)
        step = -(vectors @ ((vectors.T @ g.flatten()) / values.abs().clamp_min(1e-6))).view(flat)
        size = 1.0
        while True:
            moved = s + size * step
            if bool((moved > lo).all()) and bool((moved < hi).all()) and phi(moved) <= phi(s) + 1e-15:
                break
            size /= 2
            if size < 1e-12:
                return s
        s = moved.detach()
    return s


def brute_force(x, y, c, weights):
    """d/dtheta sum_i w_i l_i(theta, s_i(theta)) by central differences, solving the inner problem each time."""
    model, h = Tiny(), 1e-5
    out = torch.zeros_like(model.weight)

    def value():
        total = 0.0
        for i in range(len(x)):
            s = solve(model, x[i : i + 1], y[i : i + 1], c)
            loss = F.cross_entropy(model(x[i : i + 1] + EPS * s), y[i : i + 1])
            total += float(weights[i] * loss.detach()) / len(x)
        return total

    for k in range(model.weight.numel()):
        entry, ends = model.weight.data.view(-1), []
        for side in (h, -2 * h, h):  # up, down, and back
            entry[k] += side
            ends.append(value())
        out.view(-1)[k] = (ends[0] - ends[1]) / (2 * h)
    return out


@pytest.mark.parametrize("c", [1e-1, 1e-2])
def test_the_hypergradient_equals_a_brute_force_one(c):
    torch.manual_seed(5)
    model = Tiny()
    x = torch.rand(3, 1, 2, 3, dtype=torch.float64)
    y = torch.tensor([0, 1, 2])
    s = torch.cat([solve(model, x[i : i + 1], y[i : i + 1], c) for i in range(3)])
    batch = Batch(x, y, x + EPS * s, eps=EPS)
    found = {}
    for implicit in ("cg", "diagonal", "none"):
        loss = DONE(r=1.0, implicit=implicit, barrier=c, cg_steps=30).loss(model, batch)
        (found[implicit],) = torch.autograd.grad(loss.value, model.weight)
    losses = F.cross_entropy(model(batch.x_adv), y, reduction="none").detach()
    exact = brute_force(x, y, c, DONE(r=1.0).weights(losses))

    def error(g):
        return float((g - exact).norm() / exact.norm())

    # Central differences are good to h^2 and 1e-16 / h: about 1e-9 here.
    assert error(found["cg"]) < 1e-6
    assert error(found["cg"]) < error(found["diagonal"]) < error(found["none"])


def test_conjugate_gradients_solve_and_bad_curvature_falls_back():
    torch.manual_seed(0)
    lo, hi = -torch.ones(2, 5, dtype=torch.float64), torch.ones(2, 5, dtype=torch.float64)
    s, g = 0.5 * torch.randn(2, 5, dtype=torch.float64).tanh(), 0.1 * torch.randn(2, 5, dtype=torch.float64)
    a = torch.randn(2, 5, 5, dtype=torch.float64)
    a = -0.05 * a @ a.transpose(1, 2)  # the loss is concave in s: H is positive definite
    v = implicit_direction(g, s, lo, hi, 0.1, lambda u: torch.einsum("bij,bj->bi", a, u), 20)
    h = torch.diag_embed(barrier_curvature(s, lo, hi, 0.1)) - a
    assert torch.allclose(v, torch.linalg.solve(h, g), rtol=1e-8)
    bad = implicit_direction(g, s, lo, hi, 0.1, lambda u: 1e6 * u, 20)
    assert torch.equal(bad, implicit_direction(g, s, lo, hi, 0.1))


def test_the_diagonal_answer_is_exact_at_a_stationary_point_and_held_in_the_box_elsewhere():
    torch.manual_seed(0)
    lo, hi = -torch.rand(4, 9, dtype=torch.float64), torch.rand(4, 9, dtype=torch.float64)
    s = lo + (hi - lo) * torch.rand(4, 9, dtype=torch.float64)
    nearer = torch.minimum(hi - s, s - lo)
    for c in (1e-1, 1e-5):
        g = barrier_gradient(s, lo, hi, c)  # what the loss's gradient is where phi_bar is stationary
        v = implicit_direction(g, s, lo, hi, c)
        assert torch.allclose(v, g / barrier_curvature(s, lo, hi, c), rtol=1e-12)
        assert bool((v.abs() <= nearer).all())
        far = implicit_direction(1e3 * g, s, lo, hi, c)
        assert bool((far.abs() <= nearer).all()) and torch.equal(far.sign(), g.sign())


def test_at_the_default_barrier_on_images_the_answer_is_held_and_said(digits_model, digits_test):
    x, y, ids = (v[:32] for v in digits_test)
    held = {}
    for implicit in ("diagonal", "cg"):
        done = DONE(implicit=implicit)
        x_adv = (
            done.attack(Threat("Linf", 0.1), 5, None).craft(digits_model, x, y, SampleRandom.of(0, ids, "t"), 0).x_adv
        )
        loss = done.loss(digits_model, Batch(x, y, x_adv, eps=0.1))
        held[implicit] = float(loss.logs["held_share"])
        # The implicit term has a gradient and no value of its own.
        plain = DONE(implicit="none").loss(digits_model, Batch(x, y, x_adv, eps=0.1)).value
        assert torch.allclose(loss.value, plain, atol=1e-6)
    assert 0 < held["diagonal"] < 1


def test_options():
    for options, message in (
        ({"r": 0}, "r > 0"),
        ({"eta": 0}, "eta"),
        ({"implicit": "yes"}, "diagonal, cg, none"),
        ({"optimizer": "lbfgs"}, "sign, gd, adam"),
    ):
        with pytest.raises(ConfigError, match=message):
            DONE(**options)
    with pytest.raises(ConfigError, match="implicit: none"):
        DONE().attack(Threat("L2", 1.0), 5, None)
    assert DONE(implicit="none").attack(Threat("L2", 1.0), 5, None) == PGDAT().attack(Threat("L2", 1.0), 5, None)
    assert DONE(r="inf").spec()["r"] == "inf"


def test_it_trains_with_every_variant(digits_model, digits_test):
    x, y, ids = (v[:32] for v in digits_test)
    for options in ({}, {"implicit": "cg", "cg_steps": 3}, {"implicit": "none"}, {"eta": 0.3, "r": 1}):
        done = DONE(**options)
        attack = done.attack(Threat("Linf", 0.1), 3, None)
        x_adv = attack.craft(digits_model, x, y, SampleRandom.of(0, ids, "t"), 0).x_adv
        loss = done.loss(digits_model, Batch(x, y, x_adv, eps=0.1), done.state(digits_model, None))
        grads = torch.autograd.grad(loss.value, list(digits_model.parameters()))
        assert all(torch.isfinite(g).all() for g in grads)
        assert 0 < float(loss.logs["effective_share"]) <= 1
