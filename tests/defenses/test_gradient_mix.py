"""Mixed adversarial training: its ends, the mixed gradient, the estimate of the weight, its survival of an interruption."""

import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from defenses import AWP, PGDAT, Batch, GradientMix, Standard
from defenses.gradient_mix import Estimated, flat_gradient
from defenses.trainer import Architecture, Recipe, train
from robustbench_ext.attacks.inner import InnerAttack
from robustbench_ext.attacks.threat import Threat
from robustbench_ext.errors import ConfigError
from robustbench_ext.models import load_model
from robustbench_ext.randomness import SampleRandom
from uq.mixing import Ratio


@pytest.fixture
def batch():
    g = torch.Generator().manual_seed(0)
    x = torch.rand(24, 1, 8, 8, generator=g)
    x_adv = (x + 0.1 * (2 * torch.rand(x.shape, generator=g) - 1)).clamp(0, 1)
    return Batch(x, torch.arange(24) % 4, x_adv, eps=0.1, epoch=0, epochs=4)


def network(norm=False):
    torch.manual_seed(1)
    middle = [nn.BatchNorm2d(4)] if norm else []
    return nn.Sequential(nn.Conv2d(1, 4, 3), *middle, nn.ReLU(), nn.Flatten(), nn.Linear(144, 4))


def grads(value, model):
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(model.parameters()))])


def test_the_ends_are_pgd_at_and_standard_bit_for_bit(batch):
    model = network(norm=True)
    assert torch.equal(GradientMix(alpha=1).loss(model, batch).value, PGDAT().loss(model, batch).value)
    assert torch.equal(
        GradientMix(alpha=0, cheap="clean").loss(model, batch).value, Standard().loss(model, batch).value
    )
    threat = Threat("Linf", 0.1)
    assert GradientMix(alpha=0).attack(threat, 3, None) is None
    assert GradientMix().attack(threat, 3, None) == PGDAT().attack(threat, 3, None)


def test_the_gradient_is_the_mix_of_gradients(batch):
    model = network().double()
    batch = Batch(batch.x.double(), batch.y, batch.x_adv.double(), eps=0.1)
    for cheap in ("fgsm", "clean"):
        ends = [grads(GradientMix(alpha=a, cheap=cheap).loss(model, batch).value, model) for a in (0, 1)]
        mixed = grads(GradientMix(alpha=0.3, cheap=cheap).loss(model, batch).value, model)
        # Without batch norm exactly so: float64, values of order 1.
        assert torch.allclose(mixed, 0.7 * ends[0] + 0.3 * ends[1], atol=1e-13)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_fgsm_is_one_step_of_the_full_budget(batch, norm):
    model = network(norm=True).train()
    running = model[1].running_mean.clone()
    made = GradientMix(norm=norm).cheap_inputs(model, batch)
    assert torch.equal(model[1].running_mean, running) and model.training
    x = batch.x.clone().requires_grad_(True)
    model.eval()
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(x), batch.y, reduction="sum"), x)
    threat = Threat(norm, 0.1)
    assert torch.allclose(made, threat.project(batch.x + 0.1 * threat.steepest(gradient), batch.x), atol=1e-6)
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(ConfigError, match="give the same norm"):
        GradientMix(norm=norm).attack(Threat("L2" if norm == "Linf" else "Linf", 0.1), 3, None)


def test_soft_targets_reach_both_parts(batch):
    model = network()
    hard = F.one_hot(batch.y, 4).float()
    soft = Batch(batch.x, batch.y, batch.x_adv, eps=0.1, targets=hard)
    assert torch.allclose(GradientMix().loss(model, soft).value, GradientMix().loss(model, batch).value, atol=1e-6)
    other = Batch(batch.x, batch.y, batch.x_adv, eps=0.1, targets=hard.roll(1, 1))
    assert not torch.allclose(GradientMix().loss(model, other).value, GradientMix().loss(model, batch).value, atol=1e-3)


def test_the_estimate_is_the_cross_fitted_formula(batch):
    model = network(norm=True).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    defense = GradientMix(alpha="estimate", probe=16, reference_steps=4, restarts=2)
    found = defense.estimate(model, batch)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())  # batch norm saw nothing
    part = Batch(batch.x[:16], batch.y[:16], batch.x_adv[:16], eps=0.1)
    worst = defense.worst_inputs(model, part)
    e, m, t = (
        flat_gradient(model, part, x) for x in (defense.cheap_inputs(network(norm=True), part), worst, part.x_adv)
    )
    assert float(found.numerator) == pytest.approx(float((e - m) @ (e - t)), rel=1e-4)
    assert float(found.denominator) == pytest.approx(float((t - e) @ (t - e)), rel=1e-4)
    # The reference: of two long attacks the worse one, for each sample.
    attack = InnerAttack(Threat("Linf", 0.1), 4)
    stream = SampleRandom.of(0, range(16), "gradient-mix/reference")
    model.load_state_dict(before)
    tries = [attack(model, part.x, part.y, stream, r) for r in (0, 1)]
    model.eval()
    with torch.no_grad():
        losses = torch.stack([F.cross_entropy(model(v), part.y, reduction="none") for v in tries])
        reached = F.cross_entropy(model(worst), part.y, reduction="none")
    assert torch.allclose(reached, losses.amax(0), atol=1e-6) and 0 < int(losses.argmax(0).sum()) < 16


def test_the_weight_follows_what_the_pgd_inputs_are_worth(batch):
    model = network()
    defense = GradientMix(alpha="estimate", probe=24, reference_steps=10, restarts=3)
    worst = defense.worst_inputs(model, batch)

    def weight(x_adv, **options):
        made = Batch(batch.x, batch.y, x_adv, eps=0.1)
        return float(
            GradientMix(alpha="estimate", probe=24, reference_steps=10, restarts=3, **options)
            .estimate(model, made)
            .weight(clamp=False)
        )

    assert weight(worst, cheap="clean") == pytest.approx(1, abs=1e-6)  # t is the reference itself
    noise = (batch.x + 0.1 * torch.randn(batch.x.shape, generator=torch.Generator().manual_seed(0)).sign()).clamp(0, 1)
    assert weight(noise) < 0.2  # random corners, against one step of the attack
    assert (
        weight(InnerAttack(Threat("Linf", 0.1), 7)(model, batch.x, batch.y, SampleRandom.of(0, range(24), "t"))) > 0.5
    )


def test_estimates_come_once_in_every_epochs(batch):
    model = network()
    defense = GradientMix(alpha="estimate", prior=0.4, every=2, rate=0.5, probe=8, reference_steps=2, restarts=1)
    state = defense.state(model, None)
    seen = []
    for epoch in (0, 0, 1, 2, 2, 3, 4):
        now = Batch(batch.x, batch.y, batch.x_adv, eps=0.1, epoch=epoch, epochs=5)
        loss = defense.loss(model, now, state)
        seen.append(int(state.estimates))
        if epoch < 2:
            assert float(loss.logs["alpha"]) == pytest.approx(0.4)
    assert seen == [0, 0, 0, 1, 1, 1, 2]
    with pytest.raises(ConfigError, match="needs the state"):
        defense.loss(model, batch)


def test_moving_averages_are_of_numerator_and_denominator():
    state = Estimated()
    one = torch.tensor(1.0, dtype=torch.float64)
    assert state.weight(0.3) == pytest.approx(0.3)
    state.update(Ratio(one, 10 * one), 0.25)
    assert state.weight(0.3) == pytest.approx(0.1)
    state.update(Ratio(one, one), 0.25)
    assert state.weight(0.3) == pytest.approx(1 / 7.75)  # not the mean of 0.1 and 1
    assert {k: v.dtype for k, v in state.state_dict().items()}["estimates"] == torch.int64


def test_an_interrupted_training_ends_at_the_same_bits(digits, tmp_path):
    class Stop(Exception):
        pass

    defense = GradientMix(alpha="estimate", probe=32, reference_steps=3, restarts=2)
    options = {"batch_size": 200, "eps": 0.1, "attack_steps": 2, "validation_n": 20, "validation_steps": 1}
    recipe = Recipe(epochs=3, **options)
    architecture = Architecture("small-cnn", digits.shape, 10)
    train(defense, architecture, digits, recipe, tmp_path / "whole")

    def interrupt(stop):
        def on_batch(epoch, number, batches):
            if (epoch, number) == stop:
                raise Stop

        return on_batch

    for stop in ((1, 1), (1, 4), (2, 2)):  # after an estimate, in the middle, after another
        with pytest.raises(Stop):
            train(
                defense, architecture, digits, recipe, tmp_path / "cut", on_batch=interrupt(stop), checkpoint_seconds=0
            )
    train(defense, architecture, digits, recipe, tmp_path / "cut", checkpoint_seconds=0)
    a, b = (load_model(str(tmp_path / name)).module.state_dict() for name in ("whole", "cut"))
    assert all(torch.equal(a[k], b[k]) for k in a)
    curves = [json.loads((tmp_path / name / "model.json").read_text())["curve"] for name in ("whole", "cut")]
    assert curves[0] == curves[1]
    alphas = [row.get("alpha") for row in curves[0]]
    assert alphas[0] == pytest.approx(0.5) and alphas[1] != alphas[2]


def test_inside_awp(batch):
    model = network()
    defense = AWP(base={"name": "gradient-mix", "alpha": "estimate", "probe": 8, "reference_steps": 2}, gamma=0.01)
    state = defense.state(model, None)
    now = Batch(batch.x, batch.y, batch.x_adv, eps=0.1, epoch=1, epochs=4)
    with defense.perturb(model, now, state):
        assert int(state.estimates) == 0  # the pass that looks for v leaves no trace
        assert torch.isfinite(defense.loss(model, now, state).value)
    assert int(state.estimates) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 1.2}, "alpha"),
        ({"alpha": "best"}, "estimate"),
        ({"cheap": "pgd"}, "fgsm, clean"),
        ({"norm": "L1"}, "Linf, L2"),
        ({"every": 0}, "every"),
        ({"probe": 1.5}, "whole number"),
        ({"rate": 0}, "rate"),
    ],
)
def test_options(options, message):
    with pytest.raises(ConfigError, match=message):
        GradientMix(**options)
    assert GradientMix(alpha="1e-1").alpha == 0.1
    assert GradientMix(alpha="estimate").spec()["alpha"] == "estimate"
