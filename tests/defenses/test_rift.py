"""RiFT: the exact invariants of criticality, fine-tuning and interpolation; the folder; the command line."""

import copy
import json
import math
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from typer.testing import CliRunner

from defenses import criticality
from defenses import rift as rift_module
from defenses.criticality import (
    AdversarialSet,
    CriticalityRecipe,
    ModuleCriticality,
    adversarial_set,
    candidates,
    exact_name,
    module_robust_criticality,
    relative_change,
    robust_loss,
    scale_back,
)
from defenses.rift import (
    Alpha,
    RiFTRecipe,
    Watcher,
    best_alpha,
    fine_tune,
    interpolate,
    interpolation_search,
    load_state,
    rift,
    state_of,
)
from defenses.rift_folder import Base, base_model, rift_checkpoint
from defenses.trainer import Architecture
from reports.figures import module_criticality
from reports.svg import save
from robustbench_ext.cli.main import app
from robustbench_ext.data import ArraySplit, Dataset
from robustbench_ext.errors import ConfigError, ModelError, RobustBenchExtError
from robustbench_ext.models import load_model
from robustbench_ext.models.networks import small_cnn

FAST = {"eps": 0.05, "attack_steps": 2, "n": 150, "ascent_epochs": 3, "ascent_batch": 64}


def bits(state):
    """Tensors as bytes: -0.0 is not 0.0 here, and NaN equals itself."""
    return {k: v.detach().cpu().contiguous().numpy().tobytes() for k, v in state.items()}


def whole(model):
    """Everything that a call could leave changed."""
    flags = [p.requires_grad for p in model.parameters()] + [m.training for m in model.modules()]
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    return bits(dict(model.named_parameters()) | dict(model.named_buffers())), flags, str(gradients)


def values(result, name="mrc"):
    return {m.name: getattr(m, name) for m in result.modules}


@pytest.fixture(scope="module")
def model(digits_model):
    """A standard small CNN, in training mode and with one frozen parameter, to see whether both come back."""
    model = copy.deepcopy(digits_model).train()
    model.bn1.eval()
    model.fc1.bias.requires_grad_(False)
    return model


@pytest.fixture(scope="module")
def inputs(model, digits):
    return adversarial_set(model, digits, CriticalityRecipe(**FAST))


def measure(model, digits, inputs, **options):
    return module_robust_criticality(model, digits, CriticalityRecipe(**{**FAST, **options}), inputs=inputs)


# --- criticality


def test_the_adversarial_set_is_in_the_ball_and_wherever_the_model_fails(model, digits, inputs):
    split = digits["train"].take(150)
    natural = AdversarialSet(split.images(slice(None)), torch.from_numpy(split.labels))
    assert (inputs.x - natural.x).abs().max() <= 0.05 + 1e-6
    assert inputs.x.min() >= 0
    assert inputs.x.max() <= 1
    assert robust_loss(model, inputs)[0] > robust_loss(model, natural)[0] + 0.1
    again = adversarial_set(model, digits, CriticalityRecipe(**FAST))
    assert again.checksum == inputs.checksum
    assert adversarial_set(model, digits, CriticalityRecipe(**FAST), seed=1).checksum != inputs.checksum
    none = adversarial_set(model, digits, CriticalityRecipe(**{**FAST, "eps": 0}))
    assert torch.equal(none.x, natural.x)


def test_nothing_is_changed(model, digits, inputs):
    before, checksum, state = whole(model), inputs.checksum, torch.random.get_rng_state()
    found = measure(model, digits, inputs)
    assert whole(model) == before
    assert inputs.digest() == checksum == found.checksum
    assert torch.equal(torch.random.get_rng_state(), state)

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        module_robust_criticality(model, digits, CriticalityRecipe(**FAST), inputs=inputs, on_epoch=stop)
    assert whole(model) == before


def test_a_model_that_writes_into_its_inputs_is_found_out(digits):
    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(64, 10)

        def forward(self, x):
            store[:1] += 0.25
            return self.fc(x.flatten(1))

    network = Writes()
    store = torch.zeros(8, 1, 8, 8)
    inputs = AdversarialSet(store, torch.arange(8))
    with pytest.raises(ModelError, match="writes into its inputs"):
        measure(network, digits, inputs)


@pytest.mark.parametrize("project", ["epoch", "step"])
@pytest.mark.parametrize("report", ["max", "final"])
def test_no_room_no_criticality(model, digits, inputs, project, report):
    for options in ({"eps_w": 0}, {"ascent_lr": 0}):
        found = measure(model, digits, inputs, project=project, report=report, **options)
        assert set(values(found).values()) == {0.0}
        assert set(values(found, "change").values()) == {0.0}


@pytest.mark.parametrize("lr", [1e-3, 1, 1e4])
@pytest.mark.parametrize("project", ["epoch", "step"])
def test_the_largest_loss_is_never_below_the_loss_before(model, digits, inputs, project, lr):
    found = measure(model, digits, inputs, project=project, ascent_lr=lr)
    for m in found.modules:
        assert m.losses[0] == found.loss
        assert len(m.losses) == 4
        assert m.mrc == max(m.losses) - m.losses[0] >= 0
        assert m.change <= 0.1 * (1 + 1e-6)
    final = measure(model, digits, inputs, project=project, ascent_lr=lr, report="final")
    for m, other in zip(found.modules, final.modules, strict=True):
        assert other.losses == (m.losses[0], m.losses[-1])
        assert other.mrc == m.losses[-1] - m.losses[0]


@pytest.mark.parametrize(("report", "mrc", "change"), [("max", 0.0, 0.0), ("final", -0.25, 0.1)])
def test_an_ascent_that_only_falls(model, digits, inputs, monkeypatch, report, mrc, change):
    start = robust_loss(model, inputs, 64)[0]
    looks = iter([start - 0.5, start - 0.125, start - 0.25] if report == "max" else [start - 0.25])
    monkeypatch.setattr(criticality._Ascent, "_look", lambda *_: criticality._Look(next(looks), 0.5))
    options = CriticalityRecipe(**{**FAST, "report": report})
    found = module_robust_criticality(model, digits, options, inputs=inputs, names=["conv1"])
    assert found.modules[0].mrc == pytest.approx(mrc, abs=1e-9)
    assert found.modules[0].change == pytest.approx(change, rel=1e-6)
    assert found.modules[0].accuracy == (found.accuracy if report == "max" else 0.5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("eps_w", [0.0, 1e-4, 0.1, 3.0])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e30])
def test_scaling_back_ends_inside_and_on_the_line(dtype, eps_w, size):
    generator = torch.Generator().manual_seed(0)
    origin = torch.randn(40, 30, generator=generator).to(dtype)
    weight = (origin + size * torch.randn(40, 30, generator=generator)).to(dtype)
    moved = scale_back(weight, origin, eps_w)
    assert moved.dtype == dtype
    change = relative_change(moved, origin)
    assert change <= eps_w * (1 + 1e-6)
    if relative_change(weight, origin) <= eps_w:
        assert torch.equal(moved, weight)
        return
    # As far as it may go, up to the rounding of the weight's own precision, and straight towards the origin.
    rounding = torch.finfo(dtype).eps
    assert change >= eps_w - 2 * rounding * (1 + eps_w)
    if eps_w > 8 * rounding:
        cosine = F.cosine_similarity((moved - origin).double().flatten(), (weight - origin).double().flatten(), dim=0)
        assert cosine > 1 - (2 * rounding / eps_w) ** 2 - 2 * rounding


@pytest.mark.parametrize("project", ["epoch", "step"])
def test_an_ascent_that_explodes_is_cut(model, digits, inputs, project):
    found = measure(model, digits, inputs, project=project, ascent_lr=1e39)
    for m in found.modules:
        assert m.cut == 3
        assert math.isfinite(m.mrc)
        assert m.change <= 0.1 * (1 + 1e-6)
    # The first steps are finite here, a later one is not: what was reached before it is scaled back.
    some = measure(model, digits, inputs, ascent_lr=1e38)
    assert any(m.cut and m.change > 0.09 for m in some.modules)


def test_the_maximum_agrees_with_brute_force(digits):
    """One linear layer with two weights: the loss is convex in them, so its maximum over the disc is on the circle."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(1, 2, bias=False))
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(40, 1, 1, 1, generator=generator), torch.arange(40) % 2
    x[y == 1] *= 0.5
    with torch.no_grad():
        network[1].weight.copy_(torch.tensor([[1.5], [-0.5]]))
    inputs = AdversarialSet(x, y)
    found = measure(network, digits, inputs, project="step", eps_w=1, ascent_epochs=60, ascent_batch=7, ascent_lr=0.05)
    origin = network[1].weight.detach().double()
    angles = torch.linspace(0, 2 * math.pi, 20001, dtype=torch.float64)
    circle = origin[:, 0] + origin.norm() * torch.stack([angles.cos(), angles.sin()], dim=1)  # (A, 2)
    logits = x.double().flatten()[:, None, None] * circle  # (N, A, 2)
    losses = -logits.log_softmax(2)[torch.arange(40), :, y].mean(dim=0)
    before = F.cross_entropy(x.double().flatten()[:, None] * origin[:, 0], y)
    best = float(losses.max() - before)
    # The grid misses the maximum by at most curvature * step^2 < 1e-7; float32 sums of 40 losses by less than 1e-6.
    assert found.modules[0].mrc == pytest.approx(best, abs=2e-6)
    assert best > 0.1


@pytest.mark.parametrize("project", ["epoch", "step"])
def test_it_agrees_with_a_plain_implementation(model, digits, inputs, project):
    """Optimizer, copies and projection written out, with every pass that can be spared made nonetheless."""
    found = measure(model, digits, inputs, project=project)
    cuts = [(0, 50), (50, 100), (100, 150)]
    for m in found.modules:
        network = copy.deepcopy(model).eval()
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(name == m.name)
        weight = dict(network.named_parameters())[m.name]
        origin = weight.detach().clone()
        optimizer = torch.optim.SGD([weight], lr=1.0, maximize=True)

        def look(network=network):
            with torch.no_grad():
                return float(F.cross_entropy(network(inputs.x), inputs.y))

        def project_now(weight=weight, origin=origin):
            with torch.no_grad():
                delta = weight - origin
                weight.copy_(origin + delta * min(1.0, 0.1 * float(origin.norm() / delta.norm())))

        losses = [look()]
        for _ in range(3):
            for a, b in cuts:
                optimizer.zero_grad()
                F.cross_entropy(network(inputs.x[a:b]), inputs.y[a:b]).backward()
                optimizer.step()
                if project == "step":
                    project_now()
            project_now()
            losses.append(look())
        # Both round differently; the ascent carries that on, over 9 steps of a smooth function.
        assert m.losses == pytest.approx(losses, rel=2e-4)


def test_two_layers_around_a_relu_may_trade_scale(digits):
    """(W1, W2) -> (s W1, W2 / s) keeps the function and the relative balls. The ascent is the same if its rate is scaled
    by s^2 (powers of two round alike), and another one if it is not."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Flatten(), nn.Linear(64, 20, bias=False), nn.ReLU(), nn.Linear(20, 10, bias=False))
    scaled, s = copy.deepcopy(plain), 4.0
    with torch.no_grad():
        scaled[1].weight.mul_(s)
        scaled[3].weight.div_(s)
    recipe = CriticalityRecipe(**FAST)
    inputs = adversarial_set(plain, digits, recipe)
    assert adversarial_set(scaled, digits, recipe).checksum == inputs.checksum
    moved = plain[1].weight.detach() + torch.randn(20, 64)
    assert torch.equal(
        s * scale_back(moved, plain[1].weight, 0.1), scale_back(s * moved, scaled[1].weight.detach(), 0.1)
    )
    for name, rate in (("1", s**2), ("3", s**-2)):

        def one(network, lr, name=name):
            options = CriticalityRecipe(**{**FAST, "ascent_lr": lr, "ascent_epochs": 1})
            return module_robust_criticality(network, digits, options, inputs=inputs, names=[name]).modules[0]

        ours, other = one(plain, 0.01), one(scaled, 0.01 * rate)
        assert other.losses == pytest.approx(ours.losses, rel=1e-6)
        assert other.change == pytest.approx(ours.change, rel=1e-5)
        assert one(scaled, 0.01).losses[-1] != pytest.approx(ours.losses[-1], rel=1e-4)


@pytest.mark.parametrize(("report", "each"), [("max", 3 * 5), ("final", 4 * 3 - 1)])
def test_no_more_passes_than_needed(model, digits, inputs, report, each):
    """3 epochs of 3 batches, 5 modules: 3 passes for all together, then per module T (2B - 1) or (T + 1) B - 1."""
    passes = []
    handle = model.register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    measure(model, digits, inputs, report=report)
    handle.remove()
    assert len(passes) == 3 + 5 * each
    assert sum(passes) == 1 + 5 * (3 * 3 - 1)  # with a graph: one shared, and T B - 1 a module


def test_a_module_alone_or_among_others_or_known_already(model, digits, inputs):
    recipe = CriticalityRecipe(**FAST)
    everything = measure(model, digits, inputs)
    alone = module_robust_criticality(model, digits, recipe, inputs=inputs, names=["conv3"])
    assert [m.name for m in everything.modules] == [f"{k}.weight" for k in ("conv1", "conv2", "conv3", "fc1", "fc2")]
    assert alone.modules[0].losses == pytest.approx(everything.modules[2].losses, rel=1e-6)
    computed = []
    known = {m.name: m for m in everything.modules if m.name != "conv3.weight"}
    rest = module_robust_criticality(
        model, digits, recipe, inputs=inputs, finished=known, on_module=lambda m: computed.append(m.name)
    )
    assert computed == ["conv3.weight"]
    assert rest == everything


def test_a_model_that_draws_at_random_draws_the_same_for_every_module(digits):
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(64, 16), nn.Linear(16, 10)

        def forward(self, x):
            hidden = self.a(x.flatten(1))
            return self.b((hidden + 0.1 * torch.randn_like(hidden)).relu())

    network = Noisy()
    inputs = adversarial_set(network, digits, CriticalityRecipe(**FAST))
    whole = measure(network, digits, inputs)
    rest = module_robust_criticality(
        network, digits, CriticalityRecipe(**FAST), inputs=inputs, finished={"a.weight": whole.modules[0]}
    )
    assert rest == whole


class Odd(nn.Module):
    """A shared weight, one that nothing depends on, one under spectral norm, a bias called like a layer's number."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(10, 10) for _ in range(12))
        self.layers[5].weight = self.layers[4].weight
        self.first, self.unused = nn.Linear(64, 10), nn.Conv2d(1, 1, 3)
        self.normed = nn.utils.parametrizations.spectral_norm(nn.Linear(10, 10))

    def forward(self, x):
        x = self.first(x.flatten(1))
        for layer in self.layers:
            x = x + 0.1 * layer(x).relu()
        return self.normed(x)


@pytest.fixture
def odd():
    torch.manual_seed(0)
    return Odd()


def test_candidates_and_exact_names(odd, digits):
    weights, parametrized = candidates(odd)
    numbers = [i for i in range(12) if i != 5]
    assert list(weights) == [*(f"layers.{i}.weight" for i in numbers), "first.weight", "unused.weight"]
    assert parametrized == ("normed.weight",)
    assert exact_name("layers.1", weights) == exact_name("layers.1.weight", weights) == "layers.1.weight"
    for wrong in ("1", "layers.1.bias", "layers", "layers.5", "Layers.1", "ayers.1.weight"):
        with pytest.raises(ConfigError, match="unknown module"):
            exact_name(wrong, weights)
    with pytest.raises(ConfigError, match=r"Did you mean 'layers\.11'"):
        exact_name("layer.11", weights)
    inputs = adversarial_set(odd, digits, CriticalityRecipe(**FAST))
    found = measure(odd, digits, inputs, ascent_epochs=1)
    assert found.unused == ("unused.weight",)  # its criticality would be 0, the lowest of all
    assert found.parametrized == ("normed.weight",)
    assert len(found.modules) == 12


def test_models_without_a_candidate(digits):
    bare = nn.Sequential(nn.Flatten(), nn.LazyBatchNorm1d())
    with pytest.raises(ModelError, match="no Conv2d or Linear layer"):
        candidates(bare)

    class Detached(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(64, 10)

        def forward(self, x):
            with torch.no_grad():
                return self.fc(x.flatten(1))

    inputs = AdversarialSet(torch.rand(8, 1, 8, 8), torch.arange(8))
    with pytest.raises(ModelError, match=r"torch\.no_grad"):
        measure(Detached(), digits, inputs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "test"}, "flatter"),
        ({"project": "never"}, "epoch, step"),
        ({"report": "mean"}, "max, final"),
        ({"bn": "off"}, "eval, train"),
        ({"eps_w": -0.1}, "eps_w = -0.1, expected at least 0"),
        ({"ascent_epochs": 0}, "ascent_epochs = 0, expected at least 1"),
        ({"ascent_batch": 0}, "at least 1"),
        ({"n": 0}, "at least 1"),
        ({"eps": "8/x"}, "eps"),
        ({"eps": 8}, "8/255"),
        ({"lr": -1}, "lr"),
        ({"epochs": 1.5}, "whole number"),
        ({"momentum": 1}, "momentum"),
        ({"restarts": 0}, "restarts"),
        ({"steps": 0}, "steps"),
        ({"module": 3}, "module"),
        ({"flip": 3}, "flip"),
        ({"tolerance": -1}, "tolerance"),
        ({"norm": "L7"}, "Linf"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(ConfigError, match=message):
        RiFTRecipe(**options)


def test_numbers_as_people_write_them():
    recipe = RiFTRecipe(eps="8/255", ascent_lr="1e-1", epochs="1e1")
    assert (recipe.eps, recipe.ascent_lr, recipe.epochs) == (8 / 255, 0.1, 10)
    assert recipe.spec()["criticality"]["eps"] == 8 / 255
    assert "eps" not in recipe.spec()


# --- fine-tuning


TUNE = {**FAST, "epochs": 2, "restarts": 1, "search_n": 60, "steps": 4, "lr": 0.01}


def test_only_the_chosen_weight_moves(model, digits):
    base, before = state_of(model), whole(model)
    tuned = fine_tune(model, digits, "conv2", RiFTRecipe(**TUNE))
    assert whole(model) == before
    changed = [k for k, v in bits(tuned.state).items() if v != bits(base)[k]]
    assert changed == ["conv2.weight"]
    assert 0 < relative_change(tuned.state["conv2.weight"], base["conv2.weight"]) < 0.1
    assert [row["epoch"] for row in tuned.curve] == [1, 2]


def test_training_mode_lets_the_running_statistics_drift(model, digits):
    base, before = state_of(model), whole(model)
    tuned = fine_tune(model, digits, "conv2", RiFTRecipe(**TUNE, bn="train"))
    assert whole(model) == before
    changed = {k for k, v in bits(tuned.state).items() if v != bits(base)[k]}
    statistics = {f"bn{i}.{k}" for i in (1, 2, 3) for k in ("running_mean", "running_var", "num_batches_tracked")}
    assert changed == {"conv2.weight"} | statistics  # every layer's, also before the tuned one; no batch-norm parameter
    half = interpolate(base, tuned.state, 0.5)
    for name in ("bn1.running_mean", "bn3.running_var", "conv2.weight"):
        assert torch.allclose(half[name], (base[name] + tuned.state[name]) / 2, rtol=1e-6, atol=1e-7)
        assert not torch.equal(half[name], base[name])
    assert half["bn1.num_batches_tracked"] == base["bn1.num_batches_tracked"]


def test_no_rate_no_change(model, digits):
    base = bits(state_of(model))
    assert bits(fine_tune(model, digits, "fc1", RiFTRecipe(**{**TUNE, "lr": 0})).state) == base


def test_a_shared_weight_moves_under_all_its_names(odd, digits):
    base = state_of(odd)
    tuned = fine_tune(odd, digits, "layers.4", RiFTRecipe(**TUNE)).state
    changed = {k for k, v in bits(tuned).items() if v != bits(base)[k]}
    assert changed == {"layers.4.weight", "layers.5.weight"}
    assert torch.equal(tuned["layers.4.weight"], tuned["layers.5.weight"])
    with pytest.raises(ConfigError, match="no logit depends on 'unused.weight'"):
        fine_tune(odd, digits, "unused", RiFTRecipe(**TUNE))


def test_the_steps_are_those_of_sgd(digits, model):
    """One batch an epoch, written out: v <- m v + g + wd w, w <- w - lr v, the rate times 0.1 from epoch 2 on."""
    recipe = RiFTRecipe(
        **{**TUNE, "lr": 0.05, "epochs": 5, "batch_size": 10**6, "weight_decay": 0.01, "decay_epoch": 2}
    )
    split = digits["train"]
    x, y = split.images(slice(None)), torch.from_numpy(split.labels)
    network = copy.deepcopy(model).eval()
    w, v, losses, states = network.fc1.weight, 0.0, [], []
    for rate in (0.05, 0.05, 0.005, 0.005, 0.005):
        loss = F.cross_entropy(network(x), y)
        (gradient,) = torch.autograd.grad(loss, [w])
        with torch.no_grad():
            v = 0.9 * v + gradient + 0.01 * w
            w -= rate * v
        losses.append(float(loss.detach()))
        states.append(w.detach().clone())
    tuned = fine_tune(model, digits, "fc1", recipe)
    assert [row["loss"] for row in tuned.curve] == pytest.approx(losses, rel=1e-4)
    assert torch.allclose(tuned.state["fc1.weight"], states[tuned.epoch - 1], atol=1e-5)


def test_the_first_of_the_best_epochs_is_kept(model, digits, monkeypatch):
    counts = iter([300, 310, 310, 305])
    monkeypatch.setattr(rift_module, "_correct", lambda *_: next(counts))
    tuned = fine_tune(model, digits, "fc2", RiFTRecipe(**{**TUNE, "epochs": 4}))
    assert tuned.epoch == 2
    monkeypatch.undo()
    two = fine_tune(model, digits, "fc2", RiFTRecipe(**{**TUNE, "epochs": 2, "decay_epoch": 5}))
    # Had the second epoch been the last, these would be the weights.
    last = two.state if two.epoch == 2 else None
    if last is not None:
        assert torch.equal(tuned.state["fc2.weight"], last["fc2.weight"])
    assert not torch.equal(tuned.state["fc2.weight"], state_of(model)["fc2.weight"])


def test_dropout_is_on_and_reproducible(digits):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 10))
    recipe = RiFTRecipe(**TUNE)
    state = torch.random.get_rng_state()
    first, second = (fine_tune(network, digits, "4", recipe) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert bits(first.state) == bits(second.state)
    network[3].p = 0.0
    assert bits(fine_tune(network, digits, "4", recipe).state) != bits(first.state)


def test_views_are_cropped_and_flipped_on_request(model, digits):
    first = fine_tune(model, digits, "conv1", RiFTRecipe(**TUNE, crop=1, flip=True))
    assert bits(first.state) == bits(fine_tune(model, digits, "conv1", RiFTRecipe(**TUNE, crop=1, flip=True)).state)
    assert bits(first.state) != bits(fine_tune(model, digits, "conv1", RiFTRecipe(**TUNE)).state)
    with pytest.raises(ConfigError, match="crop"):
        fine_tune(model, digits, "conv1", RiFTRecipe(**TUNE, crop=9))


def test_a_fine_tuning_that_diverges_says_so(digits, model):
    with pytest.raises(RobustBenchExtError, match="Lower lr"):
        fine_tune(model, digits, "conv1", RiFTRecipe(**{**TUNE, "lr": 1e30}))


# --- interpolation


def test_both_ends_are_exact():
    torch.manual_seed(0)
    base = {
        "w": torch.randn(50),
        "same": torch.tensor([-0.0, 0.0, -math.inf, 0.1]),  # an attention mask has infinities, and inf - inf is NaN
        "count": torch.tensor(7),
        "half": torch.randn(50).half(),
    }
    tuned = {
        **base,
        "w": torch.randn(50),
        "same": base["same"].clone(),
        "count": torch.tensor(9),
        "half": base["half"] * 3,
    }
    assert bits(interpolate(base, tuned, 0)) == bits(base)
    assert bits(interpolate(base, tuned, 1)) == bits(tuned)
    for k in range(1, 10):
        state = interpolate(base, tuned, k / 10)
        assert bits({"same": state["same"]}) == bits({"same": base["same"]})
        assert torch.allclose(state["w"], (1 - k / 10) * base["w"] + k / 10 * tuned["w"], atol=1e-6)
        assert state["count"] == 7
        assert state["half"].dtype == torch.float16


def test_the_search_looks_at_what_it_says(model, digits):
    recipe, before = RiFTRecipe(**TUNE), whole(model)
    base = state_of(model)
    noise = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    tuned = {**base, "fc1.weight": base["fc1.weight"] - 2 * base["fc1.weight"] * (noise > 0)}
    rows = interpolation_search(model, digits, "fc1", base, tuned, recipe)
    assert whole(model) == before
    assert [row.alpha for row in rows] == [0, 0.25, 0.5, 0.75, 1]
    assert [row.change for row in rows] == pytest.approx([k * rows[-1].change / 4 for k in range(5)], rel=1e-4)
    split = digits["calibration"]
    x, y = split.images(slice(None)), torch.from_numpy(split.labels)
    for row in (rows[0], rows[2], rows[4]):
        network = copy.deepcopy(model).eval()
        load_state(network, interpolate(base, tuned, row.alpha))
        result = recipe.attack()(network, x[:60], y[:60], ids=split.ids[:60])
        assert row.robust_correct == int((~result.broken).sum())
        assert row.clean_correct == int((network(x).argmax(1) == y).sum())
    floor = rows[0].robust_correct - 1  # 0.1 points of 60 samples are none, but one may always be lost
    assert [row.admissible for row in rows] == [row.robust_correct >= floor for row in rows]
    assert not all(row.admissible for row in rows)


def test_the_attack_draws_the_same_for_every_alpha(model, digits):
    base = state_of(model)
    recipe = RiFTRecipe(**{**TUNE, "eps": 0.08, "attack_steps": 1, "step_size": 0.01, "search_n": None})
    rows = interpolation_search(model, digits, "fc1", base, dict(base), recipe)
    assert len({row.robust_correct for row in rows}) == 1
    assert 0 < rows[0].robust_correct < rows[0].clean_correct
    split = digits["calibration"]
    x, y = split.images(slice(None)), torch.from_numpy(split.labels)
    stands = [int((~recipe.attack()(model, x, y, ids=ids).broken).sum()) for ids in (split.ids, None)]
    assert rows[0].robust_correct == stands[0] != stands[1]  # draws belong to samples, not to positions
    others = [interpolation_search(model, digits, "fc1", base, dict(base), recipe, seed=s)[0] for s in range(1, 6)]
    assert len({row.robust_correct for row in others}) > 1  # draws matter here, so equal counts do say something


def test_the_choice():
    def row(alpha, clean, robust, admissible=True):
        return Alpha(alpha, clean, robust, clean / 100, robust / 100, 0.0, admissible)

    assert best_alpha([row(0, 90, 50), row(0.5, 92, 50), row(1, 95, 40, False)]).alpha == 0.5
    assert best_alpha([row(0, 90, 50), row(0.5, 90, 50), row(1, 90, 49)]).alpha == 0
    assert best_alpha([row(0, 90, 50), row(0.5, 92, 50), row(1, 92, 51)]).alpha == 1
    for n, published, floored in ((359, 0, 1), (999, 0, 1), (1000, 1, 1), (3000, 3, 3)):
        assert RiFTRecipe(tolerance_samples=0).allowed(n) == published
        assert RiFTRecipe().allowed(n) == floored
    assert RiFTRecipe(tolerance=2, tolerance_samples=0).allowed(50) == 1


# --- the whole method


def test_everything_together(model, digits):
    before = whole(model)
    bare = Dataset("bare", {k: digits[k] for k in ("train", "calibration")}, digits.classes, digits.shape)
    state, result = rift(model, bare, RiFTRecipe(**TUNE))  # without a test split: nothing asks for it
    assert whole(model) == before
    assert result.module == min(result.criticality.modules, key=lambda m: m.mrc).name
    assert result.chosen == best_alpha(result.alphas)
    assert (result.n, result.n_attacked, result.tolerance_points, result.tolerance_samples) == (359, 60, 0.1, 1)
    assert result.inside == (result.chosen.change <= 0.1)
    again = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert again["criticality"]["modules"][0]["name"] == "conv1.weight"
    differ = [k for k, v in bits(state).items() if v != bits(state_of(model))[k]]
    assert differ == ([result.module] if result.alpha else [])
    _, by_name = rift(model, digits, RiFTRecipe(**TUNE, module="conv3"))
    assert by_name.module == "conv3.weight"
    assert [m.name for m in by_name.criticality.modules] == ["conv3.weight"]  # no other is computed


def test_a_named_module_that_is_not_used_is_refused_before_it_is_tuned(odd, digits):
    class Told(Watcher):
        def chosen(self, criticality, module):
            pytest.fail(f"{module} was chosen")

    with pytest.raises(ConfigError, match="no logit depends on 'unused.weight'"):
        rift(odd, digits, RiFTRecipe(**TUNE, module="unused"), watcher=Told())


def test_where_nothing_is_won_the_base_comes_back_bit_for_bit(model, digits):
    state, result = rift(model, digits, RiFTRecipe(**{**TUNE, "lr": 0, "module": "fc1"}))
    assert result.alpha == 0
    assert bits(state) == bits(state_of(model))


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    """A small CNN of another width, as a folder of the trainer."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(1)
    network = small_cnn(1, 10, 8, width=4)
    shape = {"spec": "small-cnn", "shape": [1, 8, 8], "num_classes": 10, "mean": [0.3], "std": [0.4]}
    inner = {f"inner.{k}": v for k, v in network.state_dict().items()}
    save_file(
        inner | {"mean": torch.full((1, 1, 1, 1), 0.3), "std": torch.full((1, 1, 1, 1), 0.4)},
        folder / "model.safetensors",
    )
    (folder / "model.json").write_text(json.dumps({"key": "abc", "architecture": shape | {"kwargs": {"width": 4}}}))
    return folder


TINY = {**TUNE, "epochs": 1, "ascent_epochs": 1, "lr": 0.1, "steps": 2, "search_n": 30}


class Interrupted(Watcher):
    """Stops after the second module."""

    def __init__(self):
        self.seen = []

    def module(self, found: ModuleCriticality):
        self.seen.append(found.name)
        if len(self.seen) == 2:
            raise KeyboardInterrupt


class Listening(Watcher):
    def __init__(self):
        self.seen = []

    def module(self, found):
        self.seen.append(found.name)


def test_the_folder_loads_and_resumes(base_folder, digits, tmp_path):
    recipe = RiFTRecipe(**TINY)
    base = base_model(str(base_folder), digits)
    out = rift_checkpoint(base, digits, recipe, tmp_path / "whole")
    state, result = rift(base.module, digits, recipe)
    loaded = load_model(str(out))
    assert bits(loaded.module.state_dict()) == bits(state)
    described = json.loads((out / "model.json").read_text())
    assert described["base"]["key"] == "abc"
    assert described["base"]["fingerprint"] == load_model(str(base_folder)).fingerprint
    assert described["architecture"]["kwargs"] == {"width": 4}
    assert described["selected"]["module"] == result.module
    found = json.loads((out / "rift.json").read_text())
    assert found["alphas"] == json.loads(json.dumps(result.to_json()))["alphas"]
    save(tmp_path / "criticality.svg", [lambda axes: module_criticality(found, axes)])
    tree = ElementTree.parse(tmp_path / "criticality.svg")
    texts = {"".join(t.itertext()).strip() for t in tree.iter("{http://www.w3.org/2000/svg}text")}
    assert {"inner.conv1", "inner.fc2", "Module robust criticality"} <= texts
    assert len([t for t in texts if t.endswith("(tuned)")]) == 1

    with pytest.raises(KeyboardInterrupt):
        rift_checkpoint(base, digits, recipe, tmp_path / "cut", watcher=Interrupted())
    assert not (tmp_path / "cut" / "model.json").exists()
    told = Listening()
    rift_checkpoint(base, digits, recipe, tmp_path / "cut", watcher=told)
    assert told.seen == ["inner.conv3.weight", "inner.fc1.weight", "inner.fc2.weight"]
    for name in ("model.safetensors", "model.json", "rift.json", "criticality.json"):
        assert (out / name).read_bytes() == (tmp_path / "cut" / name).read_bytes(), name

    quiet = Listening()
    rift_checkpoint(base, digits, recipe, out, watcher=quiet)  # done is done
    assert quiet.seen == []
    with pytest.raises(ConfigError, match="holds another model"):
        rift_checkpoint(base, digits, RiFTRecipe(**{**TINY, "lr": 0.2}), out)
    # Criticality kept from another run counts only where nothing that it depends on differs.
    elsewhere = Dataset("b", {**digits.splits, "train": digits["test"]}, digits.classes, digits.shape)
    for data, options, computed in (
        (digits, {"lr": 0.2}, 0),
        (digits, {"ascent_lr": 0.5}, 5),
        (digits, {"eps": 0.06}, 5),
        (elsewhere, {}, 5),
    ):
        other = tmp_path / f"{data.name}{options}"
        other.mkdir()
        (other / "criticality.json").write_bytes((out / "criticality.json").read_bytes())
        listening = Listening()
        rift_checkpoint(base, data, RiFTRecipe(**{**TINY, **options}), other, watcher=listening)
        assert len(listening.seen) == computed
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "criticality.json").write_bytes(b"\x00{")
    listening = Listening()
    rift_checkpoint(base, digits, recipe, damaged, watcher=listening)
    assert len(listening.seen) == 5


def test_any_origin_can_be_written_and_loaded(base_folder, digits, tmp_path, monkeypatch):
    torch.manual_seed(3)
    save_file(small_cnn(1, 10, 8, width=6).state_dict(), tmp_path / "six.safetensors")
    (tmp_path / "nets.py").write_text(
        "import torch\ndef build(hidden=8):\n    return torch.nn.Sequential(torch.nn.Flatten(), "
        "torch.nn.Linear(64, hidden), torch.nn.ReLU(), torch.nn.Linear(hidden, 10))\n"
        "def random():\n    return build(torch.seed() % 1000 + 1)\n"
    )
    monkeypatch.chdir(tmp_path)
    recipe = RiFTRecipe(**TINY)
    alphas = []
    for spec, options in (
        ("small-cnn + six.safetensors", {"kwargs": {"width": 6}}),
        ("small-cnn", {"weights": "six.safetensors", "kwargs": {"width": 6}, "mean": [0.2], "std": [0.5]}),
        ("nets.py:build", {"kwargs": {"hidden": 5}}),
        (str(base_folder), {}),
    ):
        base = base_model(spec, digits, **options)
        base.module.to(memory_format=torch.channels_last)
        out = rift_checkpoint(base, digits, recipe, tmp_path / str(len(list(tmp_path.iterdir()))))
        ours, theirs = load_model(str(out)).module.eval(), base.module.to(memory_format=torch.contiguous_format).eval()
        named = json.loads((out / "rift.json").read_text())
        alphas.append(named["alpha"])
        x = digits["calibration"].images(slice(0, 20))
        with torch.no_grad():
            distance = float((ours(x) - theirs(x)).abs().max())
        assert (distance == 0) == (named["alpha"] == 0)
        changed = [k for k, v in bits(ours.state_dict()).items() if v != bits(theirs.state_dict())[k]]
        assert changed == ([named["module"]] if named["alpha"] else [])
    assert max(alphas) > 0  # so the folders do hold other weights than the base
    with pytest.raises(ModelError, match="rebuilds another network"):
        rift_checkpoint(base_model("nets.py:random", digits), digits, recipe, tmp_path / "r")
    with pytest.raises(ConfigError, match="leave width out"):
        base_model(str(base_folder), digits, kwargs={"width": 4})
    tied = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    tied[3].weight = tied[1].weight
    (tmp_path / "tied.py").write_text(
        "import torch\nfrom torch import nn\ndef build():\n"
        "    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))\n"
        "    net[3].weight = net[1].weight\n    return net\n"
    )
    architecture = Architecture(f"{tmp_path}/tied.py:build", digits.shape, 10)
    out = rift_checkpoint(Base(tied, architecture), digits, RiFTRecipe(**TINY, module="1"), tmp_path / "tied")
    stored = load_file(out / "model.safetensors")
    assert torch.equal(stored["1.weight"], stored["3.weight"])


def test_published_weights_are_rebuilt_with_their_normalisation(monkeypatch):
    """torchvision's presets bring mean, std and the number of classes along; the weights are not downloaded here."""
    from torchvision import models

    build = models.get_model

    def published(name, weights, num_classes=1000):
        return build(name, num_classes=num_classes)

    monkeypatch.setattr(models, "get_model", published)
    x = np.random.default_rng(0).random((4, 3, 64, 64), dtype=np.float32)
    split = ArraySplit(x, [0, 1, 2, 0], list("abcd"))
    data = Dataset("tiny", {"train": split, "calibration": split}, ("a", "b", "c"), (3, 64, 64))
    base = base_model("torchvision:squeezenet1_1", data, weights="DEFAULT")
    assert base.architecture.num_classes == 1000
    rebuilt = base.architecture.build(0)
    assert {k: v.shape for k, v in rebuilt.state_dict().items()} == {
        k: v.shape for k, v in state_of(base.module).items()
    }
    assert torch.equal(rebuilt.mean, base.module.mean)


def test_a_module_of_that_name_is_asked_for_before_anything_is_attacked(base_folder, digits, tmp_path):
    class Never(Watcher):
        def inputs(self, inputs):
            pytest.fail("attacked")

    with pytest.raises(ConfigError, match=r"Did you mean 'inner\.conv1'"):
        rift_checkpoint(
            base_model(str(base_folder), digits), digits, RiFTRecipe(module="conv1"), tmp_path / "m", watcher=Never()
        )
    assert not (tmp_path / "m").exists()


def test_the_figure_takes_any_names_and_values():
    modules = [{"name": f"layer{i}.$x^_<b>.weight", "mrc": 10.0 ** (i - 3)} for i in range(5)]
    found = {"criticality": {"modules": modules}, "module": modules[0]["name"], "eps_w": 0.1}
    ax = module_criticality(found)
    assert [p.get_width() for p in ax.patches] == pytest.approx([1e-3, 1e-2, 0.1, 1, 10])
    assert [t.get_text() for t in ax.texts] == ["0.001 (tuned)", "0.01", "0.1", "1", "10"]
    assert ax.get_yticklabels()[0].get_text() == "layer0.$x^_<b>"
    assert len({p.get_facecolor() for p in ax.patches}) == 2


# --- the command line


def rbx(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_command_line(base_folder, tmp_path, monkeypatch):
    settings = [f"--set={k}={v}" for k, v in {**TINY, "eps": "1/20"}.items()]
    command = ("rift", base_folder, "--data", "digits", "--out", tmp_path / "m", *settings)

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(rift_module, "fine_tune", interrupt)
        cut = rbx(*command)
    assert cut.exit_code == 130
    assert "run the same command again" in cut.output
    done = rbx(*command)
    assert done.exit_code == 0, done.output
    assert "inner.conv1 " not in done.output  # its criticality was kept
    for text in ("tuning inner.", "epoch   1/1", "alpha 0.00", "alpha 1.00", "kept alpha", f"model: {tmp_path / 'm'}"):
        assert text in done.output
    assert max(map(len, cut.output.replace(str(tmp_path), "").splitlines())) <= 80
    again = rbx(*command)
    assert again.exit_code == 0
    assert "epoch" not in again.output
    checked = rbx("check", "--model", tmp_path / "m", "--data", "digits")
    assert "verdict" in checked.output


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--set=epsw=1"], "Did you mean 'eps_w'"),
        (["--set=module=conv1"], "Did you mean 'inner.conv1'"),
        (["--set=split=test"], "flatter"),
        (["--kwarg=width=4"], "leave width out"),
    ],
)
def test_command_line_faults(base_folder, tmp_path, settings, message):
    done = rbx("rift", base_folder, "--data", "digits", "--out", tmp_path / "m", *settings)
    assert isinstance(done.exception, ConfigError)
    assert message in str(done.exception)


def test_splits_too_small(model):
    one = ArraySplit(np.zeros((1, 1, 8, 8), np.float32), [0], ["a"])
    data = Dataset("one", {"train": one, "calibration": one}, tuple("0123456789"), (1, 8, 8))
    with pytest.raises(ConfigError, match="too few"):
        fine_tune(model, data, "fc1", RiFTRecipe())
