"""The loss landscape: Hessians against autograd's, known quadratics, paths, similarity, phases; and cards of a suite."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from defenses.making import recompute_statistics, with_state
from defenses.soups import average
from reports import write_reports
from robustbench_ext.engine import run_suite
from robustbench_ext.errors import ConfigError, DataError, ModelError
from robustbench_ext.landscape import (
    Cuts,
    Hessian,
    Samples,
    Spent,
    Surface,
    along,
    cka_error,
    connectivity,
    linear_cka,
    path,
    phase,
    quadratic_forms,
    see,
    top_eigenvalue,
)
from robustbench_ext.results import RunResults
from tests.robustbench_ext.second_device import DEVICE, second_device

CLEAN, ATTACKED = Surface(), Surface(eps=0.1, steps=3)


@pytest.fixture(scope="module")
def samples(digits):
    split = digits["train"].take(60)
    return Samples(split.images(slice(None)), torch.from_numpy(split.labels), split.ids, batch_size=25)


def smooth(seed, hidden=5):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, hidden), nn.Tanh(), nn.Linear(hidden, 10)).eval()


def normed(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)).eval()


# Quadratics ----------------------------------------------------------------------------------------------------------


def symmetric(n, seed=0, shift=0.0):
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(n, n))
    return torch.from_numpy((a + a.T) / 2 + shift * np.eye(n))


@pytest.mark.parametrize("n", [1, 2, 5, 60])
@pytest.mark.parametrize("shift", [0.0, -40.0])  # -40: the largest in size is the smallest
def test_the_top_eigenvalue_of_a_quadratic(n, shift):
    a = symmetric(n, shift=shift)
    gradient = torch.func.grad(lambda v: 0.5 * v @ a @ v)

    def product(v):  # of 0.5 x'Ax, by autograd
        return torch.func.jvp(gradient, (torch.zeros_like(v),), (v,))[1]

    found = top_eigenvalue(product, n, tolerance=1e-10)
    wanted = float(torch.linalg.eigvalsh(a)[-1])
    assert found.converged and found.iterations <= n
    # The residual bounds the distance to an eigenvalue; beside it there is rounding of products of size |A|.
    assert found.value == pytest.approx(wanted, abs=1e-10 * float(a.norm()) + 1e-12)
    assert found.residual <= 1e-10 * float(a.norm())


def test_an_unfinished_eigenvalue_says_how_far_it_is_off():
    a = symmetric(200, seed=1)
    values = torch.linalg.eigvalsh(a)
    for iterations in (1, 3, 6, 12):
        found = top_eigenvalue(lambda v: a @ v, 200, iterations=iterations, tolerance=1e-9)
        assert not found.converged and found.iterations == iterations
        assert float((values - found.value).abs().min()) <= found.residual * (1 + 1e-9)
        assert found.value <= float(values[-1]) + 1e-9  # a Rayleigh quotient is no larger


def test_an_operator_that_is_zero():
    found = top_eigenvalue(torch.zeros_like, 7)
    assert (found.value, found.residual, found.converged) == (0.0, 0.0, True)


def test_the_trace_of_a_quadratic():
    a = symmetric(30, seed=2)
    forms = quadratic_forms(lambda v: a @ v, 30, probes=1000)
    off = a - torch.diag(a.diag())
    spread = math.sqrt(2 * float((off**2).sum()))  # the standard deviation of v'Av for random signs
    # Fixed numbers, so this cannot fail by chance; four standard errors of 1,000 probes, and of their spread (about 2.5 %).
    assert forms.mean() == pytest.approx(float(a.trace()), abs=4 * spread / math.sqrt(1000))
    assert forms.std() == pytest.approx(spread, rel=0.1)
    diagonal = torch.arange(30, dtype=torch.float64)
    assert (quadratic_forms(lambda v: diagonal * v, 30, probes=5) == 435).all()  # of a diagonal each probe is exact


def test_probes_are_prefix_stable_and_seeded():
    a = symmetric(9)
    few, many = (quadratic_forms(lambda v: a @ v, 9, probes=k) for k in (3, 6))
    assert (few == many[:3]).all() and len({*many}) == 6
    assert not (quadratic_forms(lambda v: a @ v, 9, probes=3, seed=1) == few).all()


# Hessians ------------------------------------------------------------------------------------------------------------


def dense(net, x, y):
    """The Hessian of the mean loss in all parameters, by autograd, in float64."""
    net = copy.deepcopy(net).double()
    shapes = {name: p.shape for name, p in net.named_parameters()}
    flat = torch.cat([p.detach().reshape(-1) for p in net.parameters()])

    def loss(vector):
        parts = vector.split([math.prod(shape) for shape in shapes.values()])
        given = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
        return F.cross_entropy(torch.func.functional_call(net, given, (x.double(),)), y)

    return torch.autograd.functional.hessian(loss, flat)


@pytest.mark.parametrize("make", [lambda: smooth(0, 2), lambda: normed(0)], ids=["tanh", "batch norm"])
def test_products_are_those_of_the_hessian(samples, make):
    net = make()
    x, y = samples.x[:12], samples.y[:12]
    wanted = dense(net, x, y)
    before, flags = (
        copy.deepcopy(net.state_dict()),
        [p.requires_grad_(i % 2 == 0) for i, p in enumerate(net.parameters())],
    )
    net.train()
    hessian = Hessian(net, x, y, batch_size=5)  # batches of 5, 5, 2
    assert hessian.dimension == len(wanted)
    v = torch.from_numpy(np.random.default_rng(0).normal(size=hessian.dimension))
    # Float32 gradients of about a thousand terms against float64: 1e-5 of the largest entries.
    torch.testing.assert_close(hessian(v), wanted @ v, rtol=1e-3, atol=1e-4 * float((wanted @ v).abs().max()))
    assert (hessian.spent.forwards, hessian.spent.backwards) == (12, 24)
    assert net.training and [p.requires_grad for p in flags] == [i % 2 == 0 for i in range(len(flags))]
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())


def test_sharpness_of_a_network(samples):
    net = smooth(0, 2)
    wanted = dense(net, samples.x, samples.y)
    hessian = Hessian(net, samples.x, samples.y)
    top = top_eigenvalue(hessian, hessian.dimension, iterations=80, tolerance=1e-5)
    assert top.value == pytest.approx(float(torch.linalg.eigvalsh(wanted)[-1]), rel=1e-3)
    forms = quadratic_forms(hessian, hessian.dimension, probes=60)
    assert forms.mean() == pytest.approx(float(wanted.trace()), abs=4 * forms.std() / math.sqrt(60))


def test_a_model_without_parameters_has_no_landscape(samples):
    with pytest.raises(ConfigError, match="no parameters"):
        Hessian(nn.Flatten(), samples.x, samples.y)


# Surfaces ------------------------------------------------------------------------------------------------------------


def test_losses_of_samples_as_they_are(samples):
    net, spent = smooth(0), Spent()
    seen = see(net, samples, CLEAN, spent=spent)
    with torch.no_grad():
        expected = F.cross_entropy(net(samples.x).double(), samples.y, reduction="none")
    np.testing.assert_allclose(seen.losses, expected.numpy(), rtol=0, atol=1e-6)  # other batches: rounding of logits
    assert torch.equal(seen.x, samples.x)
    assert (spent.forwards, spent.backwards) == (60, 0)


def test_attacked_losses_are_those_of_every_sample_inside_the_budget(samples, digits_model):
    spent = Spent()
    clean, attacked = see(digits_model, samples, CLEAN), see(digits_model, samples, ATTACKED, spent=spent)
    assert attacked.losses.mean() > 2 * clean.losses.mean()
    moved = (attacked.x - samples.x).abs().flatten(1).amax(dim=1)
    assert float(moved.max()) <= 0.1 + 1e-6 and float(moved.min()) > 0
    assert (spent.forwards, spent.backwards) == (240, 180)
    # Also what is misclassified already is attacked.
    wrong = Samples(samples.x, (samples.y + 1) % 10, samples.ids)
    assert (see(digits_model, wrong, CLEAN).logits.argmax(1) != wrong.y).all()
    moved = (see(digits_model, wrong, ATTACKED).x - samples.x).abs().flatten(1).amax(dim=1)
    assert float(moved.min()) > 0
    # Draws belong to samples, not to batches.
    again = see(digits_model, Samples(samples.x, samples.y, samples.ids, batch_size=7), ATTACKED)
    np.testing.assert_allclose(again.losses, attacked.losses, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ("adversarial", "expected clean or"),
        ({"attack": "apgd-ce", "eps": 0.1}, "misclassified already"),
        ({"attack": "pgd"}, "missing eps"),
        ({"attack": "pgd", "eps": 0.1, "step": 3}, "Did you mean 'steps'"),
        ({"attack": "pgd", "eps": 0.1, "steps": 0}, "steps >= 1"),
        ({"attack": "pgd", "eps": 0.1, "norm": "L3"}, "norm 'L3'"),
    ],
)
def test_wrong_surfaces(told, message):
    with pytest.raises(ConfigError, match=message):
        Surface.parse(told)


def test_surfaces_have_names():
    assert Surface.parse("clean").label == "clean"
    assert Surface.parse({"attack": "pgd", "eps": "8/255"}).label == "pgd Linf 8/255, 10 steps"
    assert Surface(eps=0.1, steps=5, step_size=0.05).label == "pgd Linf 0.1, 5 steps of 0.05"


# Paths ---------------------------------------------------------------------------------------------------------------


def test_connectivity():
    assert connectivity([0.3] * 5) == (0.0, 1)
    assert math.copysign(1, connectivity([0.3] * 5)[0]) == 1
    mc, at = connectivity([0.2, 0.4, 1.0, 0.5, 0.2])
    assert (mc, at) == (pytest.approx(-0.8, abs=1e-12), 2)
    assert connectivity([0.4, 0.1, 0.4])[0] == pytest.approx(0.3)  # a valley
    assert connectivity([1.0, 0.5, 0.0])[0] == pytest.approx(0.0)  # downhill all the way: no barrier
    assert connectivity([0.5, 0.75, 0.25, 0.5])[0] == -0.25  # of a peak and a valley of one size the peak
    rng = np.random.default_rng(0)
    for _ in range(50):
        losses = rng.uniform(size=7)
        assert connectivity(losses)[0] == connectivity(losses[::-1])[0]
    for wrong in ([0.1, 0.2], [[0.1, 0.2, 0.3]], [0.1, math.nan, 0.2]):
        with pytest.raises(DataError, match="at least 3 finite"):
            connectivity(wrong)


def test_a_path_from_either_end(samples):
    a, b = smooth(0), smooth(1)
    there, back = along(a, b, samples, CLEAN, points=5), along(b, a, samples, CLEAN, points=5)
    assert (there == back[::-1]).all()
    assert connectivity(there.mean(axis=1))[0] == connectivity(back.mean(axis=1))[0]
    assert (there[0] == see(a, samples, CLEAN).losses).all() and (there[-1] == see(b, samples, CLEAN).losses).all()
    middle = with_state(a, average([a.state_dict(), b.state_dict()]))
    assert (there[2] == see(middle, samples, CLEAN).losses).all()
    with pytest.raises(ConfigError, match="at least 3"):
        path(2)


def test_a_network_and_itself_have_no_barrier_and_a_permuted_twin_has_one(samples):
    a = smooth(0, 10)
    optimizer = torch.optim.Adam(a.parameters(), lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        F.cross_entropy(a(samples.x), samples.y).backward()
        optimizer.step()
    same = along(a, copy.deepcopy(a), samples, CLEAN, points=5).mean(axis=1)
    # k / 4 of two equal float32 numbers, in float64 and rounded once, is the number itself.
    assert connectivity(same)[0] == 0
    twin = copy.deepcopy(a)
    order = torch.arange(10).roll(3)
    with torch.no_grad():
        twin[1].weight.copy_(a[1].weight[order])
        twin[1].bias.copy_(a[1].bias[order])
        twin[3].weight.copy_(a[3].weight[:, order])
    losses = along(a, twin, samples, CLEAN, points=5).mean(axis=1)
    assert losses[-1] == pytest.approx(losses[0], abs=1e-5)  # the same function
    assert connectivity(losses)[0] < -0.3
    seen = [see(net, samples, CLEAN).logits.numpy() for net in (a, twin)]
    assert linear_cka(*seen) == pytest.approx(1, abs=1e-6)


def test_batch_norms_are_measured_again_at_every_point(samples):
    a, b, spent = normed(0), normed(1), Spent()
    batches = [samples.x[:30], samples.x[30:]]
    halves = Samples(samples.x, samples.y, samples.ids, batch_size=30)
    found = along(a, b, samples, CLEAN, points=3, statistics=halves, spent=spent)
    for k, weights in enumerate(([1.0, 0.0], [0.5, 0.5], [0.0, 1.0])):
        net = with_state(a, average([a.state_dict(), b.state_dict()], weights))
        stale = see(net, samples, CLEAN).losses
        recompute_statistics(net, iter(batches))
        assert (found[k] == see(net, samples, CLEAN).losses).all()
        assert abs(found[k].mean() - stale.mean()) > 1e-3
    assert spent.forwards == 3 * (60 + 60)
    attacked = along(a, b, samples, ATTACKED, points=3, statistics=halves)
    net = with_state(a, average([a.state_dict(), b.state_dict()], [0.5, 0.5]))
    recompute_statistics(net, iter(see(net, halves, ATTACKED).x.split(30)))
    assert (attacked[1] == see(net, samples, ATTACKED).losses).all()
    with pytest.raises(DataError, match="have batch norms"):
        along(a, b, samples, CLEAN, points=3)
    with pytest.raises(ModelError, match="one architecture"):
        along(a, smooth(0), samples, CLEAN, points=3)


def test_the_same_numbers_on_another_device(samples):
    few = Samples(samples.x[:10], samples.y[:10], samples.ids[:10], batch_size=4)

    def numbers(a, b):
        hessian = Hessian(a, few.x, few.y, batch_size=4)
        where = {"device": hessian.device}
        return (
            see(a, few, ATTACKED).losses,
            along(a, b, few, ATTACKED, points=3, statistics=few),
            top_eigenvalue(hessian, hessian.dimension, iterations=3, **where).value,
            quadratic_forms(hessian, hessian.dimension, probes=2, **where),
        )

    here = numbers(normed(0), normed(1))
    with second_device():
        there = numbers(normed(0).to(DEVICE), normed(1).to(DEVICE))
    # It computes on the CPU, and refuses what is on both sides.
    assert all(np.array_equal(one, other) for one, other in zip(here, there, strict=True))


# Similarity ----------------------------------------------------------------------------------------------------------


def test_similarity():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(50, 6)), rng.normal(size=(50, 4))
    turn = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    assert linear_cka(x, -3 * x @ turn + rng.normal(size=6)) == pytest.approx(1, abs=1e-12)
    assert linear_cka(x, x @ rng.normal(size=(6, 6))) < 0.99  # not of any linear map
    assert linear_cka(x, y) == pytest.approx(linear_cka(y, x), abs=1e-14)
    values = [linear_cka(rng.normal(size=(20, 3)), rng.normal(size=(20, 5))) for _ in range(50)]
    assert min(values) >= 0 and max(values) <= 1
    assert linear_cka(np.eye(4)[:, :1], np.eye(4)[:, :1]) == 1
    one = np.array([[1.0, 0], [-1, 0], [0, 0], [0, 0]])
    assert linear_cka(one, one[[2, 3, 0, 1]]) == 0  # at right angles
    with pytest.raises(DataError, match="the same for all samples"):
        linear_cka(x, np.ones((50, 4)))
    with pytest.raises(DataError, match="expected"):
        linear_cka(x, y[:-1])


def test_the_jackknife_is_the_jackknife():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(25, 4)) + 5
    y = x @ rng.normal(size=(4, 3)) + rng.normal(size=(25, 3))
    without = [linear_cka(np.delete(x, i, axis=0), np.delete(y, i, axis=0)) for i in range(25)]
    assert cka_error(x, y) == pytest.approx(math.sqrt(24 * np.var(without)), rel=1e-9)


# Phases --------------------------------------------------------------------------------------------------------------

CUTS = Cuts(loss=0.5, sharpness=10, connectivity=0.05, cka=0.9)
LOW, HIGH, FLAT, SHARP = [0.1, 0.2], [0.8, 0.9], [1, 2], [50, 60]


@pytest.mark.parametrize(
    ("losses", "sharpness", "mc", "cka", "name"),
    [
        (HIGH, SHARP, -0.4, 0.5, "I"),
        (HIGH, SHARP, 0.4, 0.5, "II"),
        (LOW, FLAT, -0.4, 0.95, "III"),
        (LOW, FLAT, 0.01, 0.5, "IV-A"),
        (LOW, FLAT, -0.05, 0.95, "IV-B"),
        (LOW, FLAT, 0.3, 0.95, None),
        (HIGH, SHARP, 0.01, 0.5, None),
        (LOW, SHARP, -0.4, 0.5, None),
        (HIGH, FLAT, -0.4, 0.5, None),
        ([0.1, 0.9], FLAT, -0.4, 0.5, None),
        (LOW, [1, 50], -0.4, 0.5, None),
    ],
)
def test_phases(losses, sharpness, mc, cka, name):
    found = phase(losses, sharpness, mc, cka, CUTS)
    assert found.name == name
    assert bool(found.reason) == (name is None)


def test_cuts_have_no_defaults():
    with pytest.raises(TypeError):
        Cuts(loss=0.5, sharpness=10, connectivity=0.05)
    with pytest.raises(ConfigError, match=r"cka in \[0, 1\]"):
        Cuts(loss=0.5, sharpness=10, connectivity=0.05, cka=2)


# Suites --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def suite(tiny_suite):
    quick = {"epochs": 1, "eps": 0.1, "validation_n": 20, "validation_steps": 1, "energy_n": 0}
    tiny_suite["models"] = [
        {"name": "net", "train": {"defense": "standard", "seeds": 2, "recipe": quick}},
        {"name": "other", "train": {"defense": "standard", "seed": 7, "recipe": quick}, "evaluate": False},
    ]
    tiny_suite["conditions"], tiny_suite["detectors"], tiny_suite["uq"] = [], [], []
    small = {"n": 30, "points": 3, "statistics_n": 40, "iterations": 3, "probes": 2}
    tiny_suite["landscape"] = [
        {"models": ["net", "other"], **small},
        {"models": ["net"], "loss": {"attack": "pgd", "eps": 0.1, "steps": 2}, **small},
    ]
    return {**tiny_suite, "n": 20}


def test_cards_of_a_suite(tmp_path, suite):
    folder = tmp_path / "run"
    suite["landscape"][0]["phases"] = {"loss": "1/2", "sharpness": 10, "connectivity": 0.1, "cka": 0.9}
    summary = run_suite(suite, folder)
    assert not summary.failures
    found = summary.results.landscapes
    label = "pgd Linf 0.1, 2 steps"
    assert {(*c.models, c.loss) for c in found} == {
        ("net seed 0", "net seed 1", "clean"),
        ("net seed 0", "other", "clean"),
        ("net seed 1", "other", "clean"),
        ("net seed 0", "net seed 1", label),
    }
    card = next(c for c in found if c.loss == "clean" and c.models[1] == "other")
    ends = card.curve["loss"]
    assert card.curve["t"] == [0, 0.5, 1] and card.at == 0.5
    assert card.connectivity.value == pytest.approx((ends[0] + ends[2]) / 2 - ends[1], abs=1e-12)
    assert 0 <= card.cka.ci_low <= card.cka.value <= card.cka.ci_high <= 1
    assert (card.n, card.cuts["loss"], card.trace[0].n) == (30, 0.5, 2)
    assert card.phase or card.phase_reason
    # Two networks: 30 forward, 3 + 2 products of 30 and 60; the way: three points of 30, and 40 for batch norms.
    assert (card.forwards, card.backwards) == (2 * (30 + 150) + 3 * 70, 2 * 300)
    attacked = next(c for c in found if c.loss == label)
    assert attacked.phase is None and attacked.phase_reason == "no cut-offs were given"
    clean = next(c for c in found if c.models == attacked.models and c.loss == "clean")
    assert all(a.value > c.value for a, c in zip(attacked.train_loss, clean.train_loss, strict=True))
    assert RunResults.read(folder / "results.json").landscapes == found
    write_reports(folder)
    page, text = ((folder / name).read_text() for name in ("report.html", "report.md"))
    assert '<section id="landscape">' in page and page.count("on the straight line from") == 4
    assert "Loss landscape: pairs" in text and "net seed 0 to net seed 1" in text

    # Again: nothing. One record lost: that one.
    again = run_suite(suite, folder)
    assert (again.trained, again.computed) == (0, 0) and again.results.landscapes == found
    notes = {f: json.loads(f.read_text()) for f in (folder / "records").glob("*.json")}
    lost = next(f for f, told in notes.items() if told["what"] == "landscape other · clean")
    lost.unlink()
    repaired = run_suite(suite, folder)
    assert repaired.computed == 1 and repaired.results.landscapes == found
    suite["landscape"][0]["points"] = 5
    assert run_suite(suite, folder).computed == 3  # three ways; the networks are known


def test_what_stands_on_a_model_that_cannot_be_trained_is_a_failure_of_its_own(tmp_path, suite):
    suite["models"][1]["train"] = {**suite["models"][1]["train"], "recipe": {"epochs": 1, "lr": 1e30}}
    summary = run_suite(suite, tmp_path / "run")
    failed = {f.what for f in summary.failures}
    assert "landscape other · clean" in failed and "landscape net seed 0 to other · clean" in failed
    assert {tuple(c.models) for c in summary.results.landscapes} == {("net seed 0", "net seed 1")}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"models": ["net", "otter"]}, "Did you mean 'other'"),
        ({"models": ["other"]}, "at least 2"),
        ({"loss": "robust"}, "expected clean or"),
        ({"points": 2}, "points"),
        ({"phases": {"loss": 1}}, "missing sharpness, connectivity, cka. No cut-offs were published"),
        ({"phases": {"los": 1}}, "Did you mean 'loss'"),
        ({"point": 3}, "Did you mean 'points'"),
        ({"models": ["net", "net"], "loss": ["clean", "clean"]}, "twice"),
    ],
)
def test_wrong_entries_are_refused_before_anything_runs(tmp_path, suite, change, message):
    suite["landscape"][0].update(change)
    with pytest.raises(ConfigError, match=message):
        run_suite(suite, tmp_path / "run")
    assert not (tmp_path / "run" / "models").exists()


def test_two_entries_may_share_and_may_not_contradict(tmp_path, suite):
    first = suite["landscape"][0]
    suite["landscape"] = [first, {**first, "models": ["net"], "probes": 3}]
    with pytest.raises(ConfigError, match="with different settings"):
        run_suite(suite, tmp_path / "run")


def test_regressors_have_none(tmp_path):
    suite = {
        "name": "s",
        "data": "autompg",
        "models": [{"name": n, "train": {"seed": i}} for i, n in enumerate("ab")],
        "landscape": [{"models": ["a", "b"]}],
    }
    with pytest.raises(ConfigError, match="landscape: it is that of classifiers"):
        run_suite(suite, tmp_path / "run")
