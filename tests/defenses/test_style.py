"""Style augmentation: what each method does to statistics and gradients, and that nothing happens in evaluation mode."""

import os
import socket
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from defenses import (
    AWP,
    TRADES,
    AdvStyle,
    AdvStyleModule,
    DSUModule,
    MixStyle,
    MixStyleModule,
    PAdaINModule,
    advstyle,
    place_style,
)
from defenses.advstyle import reverse_gradient
from defenses.base import Batch, Task
from defenses.mixstyle import mix_styles
from defenses.padain import permute_styles
from defenses.style import EPS, batch_deviation, convolutions, style_of
from defenses.trainer import Architecture, Recipe, train
from robustbench_ext.errors import ConfigError, ModelError
from robustbench_ext.models import load_model
from robustbench_ext.models.networks import small_cnn

MODULES = [
    partial(AdvStyleModule, branches="always"),
    partial(MixStyleModule, p=1.0),
    partial(DSUModule, p=1.0),
    partial(PAdaINModule, p=1.0),
]


def maps(b=8, c=5, h=6, w=7, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    scale = 0.5 + torch.rand(b, c, 1, 1, generator=g)
    return (scale * torch.randn(b, c, h, w, generator=g) + torch.randn(b, c, 1, 1, generator=g)).to(dtype)


def noise(x, seed=1):
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(x.shape[0], x.shape[1], 1, 1, generator=g) for _ in range(2))


def started(x, **options):
    module = AdvStyleModule(x.shape[1], branches="always", **options).train()
    module._start(*style_of(x))
    return module


@pytest.mark.parametrize("make", MODULES)
def test_nothing_happens_in_evaluation_mode_or_where_there_is_no_style(make):
    x = maps()
    module = make(5)
    assert not torch.equal(module.train()(x), x)
    assert torch.equal(module.eval()(x), x)
    module.train()
    assert torch.equal(module(x[:1]), x[:1])  # no batch to compare with
    point = torch.randn(4, 5, 1, 1)
    assert torch.equal(module(point), point)  # no deviation of one position
    flat = torch.randn(4, 5)
    assert torch.equal(module(flat), flat)
    dead = torch.zeros(4, 5, 6, 6)
    assert bool(torch.isfinite(module(dead)).all())


def test_zero_intensity_is_the_identity():
    x = maps()
    module = started(x)
    with torch.no_grad():
        module.scale_mu.zero_()
        module.scale_sigma.zero_()
    # sigma (x - mu) / sigma + mu: two roundings relative to |x - mu| and mu.
    assert torch.allclose(module.perturbed(x, *style_of(x), *noise(x)), x, atol=1e-5)


def test_statistics_behind_the_module_are_the_perturbed_ones():
    x = maps(h=9, w=9, dtype=torch.float64).float()
    module = started(x)
    mu, sigma = style_of(x)
    noise_mu, noise_sigma = noise(x)
    out = module.perturbed(x, mu, sigma, noise_mu, noise_sigma).double()
    new_mu = mu + noise_mu * module.scale_mu
    new_sigma = sigma + noise_sigma * module.scale_sigma
    assert torch.allclose(out.mean((2, 3), keepdim=True), new_mu.double(), atol=1e-5)
    variance = x.double().var((2, 3), keepdim=True)
    expected = new_sigma.abs() * (variance / (variance + EPS)).sqrt()
    assert torch.allclose(out.std((2, 3), keepdim=True), expected.double(), rtol=1e-4, atol=1e-6)
    positive = started(x, positive=True).perturbed(x, mu, sigma, noise_mu, -100 * noise_sigma.abs())
    assert torch.allclose(positive, (mu + noise_mu * module.scale_mu).expand_as(x), atol=1e-4)


def test_the_gradient_of_the_intensity_is_reversed_and_only_that():
    x = maps(b=4, c=3).requires_grad_()
    target = torch.randn(4, 3, 6, 7, generator=torch.Generator().manual_seed(5))
    noise_mu, noise_sigma = noise(x)
    outputs, of_scale, of_x = [], [], []
    for weight in (-1.0, 0.0, 1.0, 2.5):  # -1 undoes the reversal
        module = started(x.detach(), weight=weight)
        mu, sigma = style_of(x)
        out = module.perturbed(x, mu, sigma, noise_mu, noise_sigma)
        outputs.append(out.detach())
        g_mu, g_sigma, g_x = torch.autograd.grad(((out - target) ** 2).mean(), [module.scale_mu, module.scale_sigma, x])
        of_scale.append(torch.cat([g_mu, g_sigma]))
        of_x.append(g_x)
    for i in range(1, 4):
        assert torch.equal(outputs[i], outputs[0]) and torch.allclose(of_x[i], of_x[0], atol=1e-9)
    plain = of_scale[0]
    assert float(plain.abs().max()) > 1e-3
    assert torch.equal(of_scale[1], torch.zeros_like(plain))  # AdvStyle with weight 0: fixed noise
    assert torch.allclose(of_scale[2], -plain) and torch.allclose(of_scale[3], -2.5 * plain)


def test_the_gradient_is_minus_the_sum_of_noise_times_that_of_the_statistic():
    x = maps(b=6, c=4, dtype=torch.float64)
    noise_mu, noise_sigma = (n.double() for n in noise(x))
    scale = torch.rand(1, 4, 1, 1, dtype=torch.float64, requires_grad=True)
    mu, sigma = x.mean((2, 3), keepdim=True), (x.var((2, 3), keepdim=True) + EPS).sqrt()
    new_mu = mu + noise_mu * reverse_gradient(scale, 1.0)
    new_mu.retain_grad()
    out = (sigma + noise_sigma) * (x - mu) / sigma + new_mu
    (out**3).mean().backward()
    assert torch.allclose(scale.grad, -(noise_mu * new_mu.grad).sum(0, keepdim=True), rtol=1e-12)


def test_a_step_of_the_intensity_raises_the_loss_and_one_of_the_network_lowers_it():
    torch.manual_seed(0)
    x, y = maps(b=32, c=3), torch.arange(32) % 4
    module = started(x, weight=1.0)
    head = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 4))
    noise_mu, noise_sigma = noise(x)

    def loss():
        mu, sigma = style_of(x)
        return nn.functional.cross_entropy(head(module.perturbed(x, mu, sigma, noise_mu, noise_sigma)), y)

    before = loss()
    before.backward()
    with torch.no_grad():
        kept = [p.clone() for p in module.parameters()]
        for p in module.parameters():
            p -= 0.05 * p.grad
        assert float(loss()) > float(before)
        for p, old in zip(module.parameters(), kept, strict=True):
            p.copy_(old)
        for p in head.parameters():
            p -= 0.01 * p.grad
        assert float(loss()) < float(before)


def test_sign_symmetry_and_the_variance_of_the_noise():
    x = maps(b=6, c=3)
    module = started(x)
    mu, sigma = style_of(x)
    noise_mu, noise_sigma = noise(x)
    one = module.perturbed(x, mu, sigma, noise_mu, noise_sigma)
    with torch.no_grad():
        module.scale_mu.neg_()
        module.scale_sigma.neg_()
    assert torch.equal(one, module.perturbed(x, mu, sigma, -noise_mu, -noise_sigma))
    torch.manual_seed(0)
    draws = torch.stack([module(x).detach().mean((2, 3)) - mu[..., 0, 0] for _ in range(3000)])
    expected = module.scale_mu.detach()[..., 0, 0].expand(6, 3) ** 2
    # The variance of 3,000 normal draws has a relative error of sqrt(2/3000) = 2.6 %; five of those.
    assert torch.allclose(draws.var(0), expected, rtol=0.13)
    assert float((draws.mean(0) / (expected / 3000).sqrt()).abs().max()) < 5
    correlation = float(np.corrcoef(draws[:, 0, 0], draws[:, 1, 0])[0, 1])
    assert abs(correlation) < 5 / 3000**0.5


def test_the_first_batch_sets_the_intensity_and_no_later_one_does():
    x, other = maps(), maps(seed=3)
    module = AdvStyleModule(5, branches="always").train()
    assert torch.equal(module.scale_mu, torch.full((1, 5, 1, 1), 0.1))
    module(x)
    mu, sigma = style_of(x)
    assert torch.allclose(module.scale_mu, batch_deviation(mu)) and torch.allclose(
        module.scale_sigma, batch_deviation(sigma)
    )
    kept = module.scale_mu.detach().clone()
    module(other)
    assert torch.equal(module.scale_mu, kept)
    again = AdvStyleModule(5, branches="always").train()
    again.load_state_dict(module.state_dict())
    again(other)
    assert torch.equal(again.scale_mu, kept)


def test_branches_are_drawn_evenly():
    x = maps(b=4, c=2, h=3, w=3)
    module = started(x)
    module.branches = "published"
    module.scale_mu.data.fill_(100.0)
    torch.manual_seed(1)
    counts = {"identity": 0, "adversarial": 0, "batch": 0}
    for _ in range(3000):
        moved = float((module(x).detach() - x).abs().max())
        counts["identity" if moved == 0 else "adversarial" if moved > 20 else "batch"] += 1
    # Binomial: 1000 +- 26; five of those.
    assert all(abs(n - 1000) < 130 for n in counts.values()), counts


def test_a_cap_and_a_direction_bound_the_intensity():
    x = maps()
    module = started(x, cap=2.0)
    module.scale_mu.data *= -50
    module.limit()
    assert torch.allclose(module.scale_mu, -2 * module.first_mu)
    direction = started(x, form="direction")
    mu, sigma = style_of(x)
    noise_mu, noise_sigma = noise(x)
    one = direction.perturbed(x, mu, sigma, noise_mu, noise_sigma)
    with torch.no_grad():
        direction.scale_mu.mul_(1000)
        direction.scale_sigma.mul_(1000)
    assert torch.allclose(one, direction.perturbed(x, mu, sigma, noise_mu, noise_sigma), rtol=1e-4, atol=1e-5)


def test_a_direction_takes_its_length_from_the_batch_with_gradient():
    x = maps(b=6, c=4).double().float().requires_grad_()
    module = started(x.detach(), form="direction", weight=1.0)
    with torch.no_grad():  # another direction than the batch's own
        module.scale_mu.copy_(torch.tensor([1.0, -2.0, 0.5, 3.0]).reshape(1, 4, 1, 1))
    target = torch.randn(6, 4, 6, 7, generator=torch.Generator().manual_seed(5))
    mu, sigma = style_of(x)
    noise_mu, noise_sigma = noise(x)
    out = module.perturbed(x, mu, sigma, noise_mu, noise_sigma)
    found = torch.autograd.grad((out * target).sum(), [x, module.scale_mu, module.scale_sigma])
    # The same, written out: S / |S| times |deviation of the batch|, nothing detached, nothing reversed.
    y = x.detach().clone().requires_grad_()
    directions = [
        module.scale_mu.detach().clone().requires_grad_(),
        module.scale_sigma.detach().clone().requires_grad_(),
    ]
    m, s = y.mean((2, 3), keepdim=True), (y.var((2, 3), keepdim=True) + EPS).sqrt()
    sizes = [
        d / (d**2).sum().sqrt() * (statistic.var(0) + EPS).sum().sqrt()
        for d, statistic in zip(directions, (m, s), strict=True)
    ]
    plain = (s + noise_sigma * sizes[1]) * (y - m) / s + m + noise_mu * sizes[0]
    expected = torch.autograd.grad((plain * target).sum(), [y, *directions])
    for ours, theirs, sign in zip(found, expected, (1, -1, -1), strict=True):
        assert float(theirs.abs().max()) > 1e-2
        # float32: sums of up to 42 products of numbers up to 10.
        assert torch.allclose(ours, sign * theirs, rtol=1e-3, atol=1e-4)


def test_mixstyle_and_padain_at_their_ends():
    x = maps()
    swap = torch.randperm(8, generator=torch.Generator().manual_seed(2))
    ones, zeros = torch.ones(8, 1, 1, 1), torch.zeros(8, 1, 1, 1)
    assert torch.allclose(mix_styles(x, ones, swap), x, atol=1e-5)
    assert torch.allclose(permute_styles(x, torch.arange(8)), x, atol=1e-5)
    # lambda = 0 is pAdaIN, but for the constant under the root.
    assert torch.allclose(mix_styles(x, zeros, swap), permute_styles(x, swap), atol=1e-3)
    mixed = mix_styles(x, torch.full((8, 1, 1, 1), 0.3), swap)
    mu, sigma = style_of(x)
    assert torch.allclose(style_of(mixed)[0], 0.3 * mu + 0.7 * mu[swap], atol=1e-5)
    assert torch.allclose(style_of(mixed)[1], 0.3 * sigma + 0.7 * sigma[swap], atol=1e-4)


# Placing ----------------------------------------------------------------------------------------------------------------


def test_placing_leaves_the_network_as_it_is():
    model = small_cnn(3, 10, 32)
    x = torch.rand(6, 3, 32, 32)
    names, plain = list(model.state_dict()), model.eval()(x)
    styles = place_style(model, partial(AdvStyleModule, branches="always"))
    assert list(styles) == ["input", "bn1", "bn2", "bn3"]
    assert list(model.state_dict()) == names and torch.equal(model(x), plain)
    model.train()
    styles.train()
    assert not torch.equal(model(x), model(x))
    with pytest.raises(ConfigError, match="conv1"):
        place_style(model, AdvStyleModule, ["conv9"])
    with pytest.raises(ModelError, match="not a map"):
        place_style(model, AdvStyleModule, ["fc1"])
    with pytest.raises(ModelError, match="shape="):
        place_style(model, AdvStyleModule, shape=(3, 8, 8))
    worn = model.eval()(x)  # other batch statistics than before
    styles.remove()
    assert torch.equal(model(x), worn) and not model.conv1._forward_hooks and not model._forward_pre_hooks
    assert convolutions(model) == ["conv1", "conv2", "conv3"]


def test_a_defense_of_ones_own_network_trains_and_resumes(digits, tmp_path):
    recipe = Recipe(epochs=2, lr=0.05, eps=0.1, attack_steps=2, validation_n=50, validation_steps=1, energy_n=0)
    defense = AdvStyle(base={"name": "trades", "beta": 2}, branches="two", weight=0.1)
    assert defense.select_by == "robust" and defense.spec()["base"]["defense"] == "trades"
    weights = []
    for folder in ("a", "b"):
        train(defense, Architecture("small-cnn", digits.shape, 10), digits, recipe, tmp_path / folder)
        model = load_model(str(tmp_path / folder)).module
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        weights.append(torch.cat([p.flatten() for p in model.parameters()]))
    assert torch.equal(*weights)


def test_the_alternating_trainer_leaves_gradients_alone(digits):
    torch.manual_seed(0)
    model = small_cnn(1, 10, 8).train()
    defense = AdvStyle(branches="always", inner_steps=2, inner_lr=0.5, weight=1.0, layers=("bn1",))
    state = defense.state(model, Task(np.full(10, 10), (1, 8, 8), 1))
    x, y = digits["train"].images(slice(0, 32)), torch.from_numpy(digits["train"].labels[:32])
    batch = Batch(x, y, x)
    defense.loss(model, batch, state)  # the first batch starts the intensity
    before = state["styles"]["bn1"].scale_mu.detach().clone()
    with defense.perturb(model, batch, state):
        assert all(p.grad is None for p in model.parameters())
        assert not torch.equal(state["styles"]["bn1"].scale_mu, before)
        defense.loss(model, batch, state).value.backward()
    assert all(p.grad is not None for p in model.parameters())
    assert all(p.grad is None for p in state["styles"].parameters())


def test_the_cap_holds_when_the_network_steps(digits):
    torch.manual_seed(0)
    model = small_cnn(1, 10, 8).train()
    defense = AdvStyle(branches="always", inner_steps=3, inner_lr=1e6, weight=1.0, cap=1.5, layers=("bn1",))
    state = defense.state(model, Task(np.full(10, 10), (1, 8, 8), 1))
    x, y = digits["train"].images(slice(0, 32)), torch.from_numpy(digits["train"].labels[:32])
    batch = Batch(x, y, x)
    with defense.perturb(model, batch, state):
        module = state["styles"]["bn1"]
        for scale, first in ((module.scale_mu, module.first_mu), (module.scale_sigma, module.first_sigma)):
            # Steps as large as these bring every channel that gets a gradient to the cap.
            assert float((scale.detach().abs() / first).max()) == pytest.approx(1.5)


PROCESSES = """
import os, sys
import numpy as np
import torch
torch.set_num_threads(1)
from pathlib import Path
from defenses import AdvStyle
from defenses.runtime import Runtime
from defenses.trainer import Architecture, Recipe, _Training
from robustbench_ext.data import load_dataset

data = load_dataset("digits@step:5")
recipe = Recipe(epochs=1, batch_size=20, lr=0.05)
out = []
for options in ({"branches": "published"}, {"branches": "always", "inner_steps": 2}):
    defense, network = AdvStyle(weight=1.0, **options), Architecture("small-cnn", data.shape, 10)
    run = _Training(defense, network, data, recipe, 0, Runtime("cpu"), "key", Path(sys.argv[1]), 60.0)
    run.model.train()
    for step, dice in zip(range(8), run._dice(0)):
        run.step(np.arange(20 * step, 20 * (step + 1)), dice)
    out.append(torch.cat([p.detach().flatten() for p in run.state.parameters()]))
    run.runtime.close()
torch.save(torch.stack(out), sys.argv[1] + os.environ["RANK"])
"""


def test_every_process_takes_the_branch_that_the_first_one_drew(monkeypatch):
    """A process that went another way would not join the others in starting S, or in averaging its gradient."""
    sent = []

    def broadcast(drawn, source):
        sent.append(source)
        drawn.fill_(0)  # the first process drew "identity"

    monkeypatch.setattr(advstyle, "_several_processes", lambda: True)
    monkeypatch.setattr(torch.distributed, "broadcast", broadcast)
    x, module = maps(), AdvStyleModule(5).train()
    torch.manual_seed(0)
    assert all(torch.equal(module(x), x) for _ in range(20)) and sent == [0] * 20


@pytest.mark.slow
def test_processes_agree_on_the_intensities(tmp_path):
    """They start S on the same batch's statistics, draw the same branches, and step by the mean gradient."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    jobs = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESSES, str(tmp_path / "intensities")],
            env={**os.environ, **shared, "RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    try:
        for job in jobs:
            _, errors = job.communicate(timeout=120)  # where they wait for each other, for ever
            assert job.returncode == 0, errors[-3000:]
    finally:
        for job in jobs:
            job.kill()
    one, other = (torch.load(tmp_path / f"intensities{rank}", weights_only=True) for rank in (0, 1))
    assert torch.equal(one, other) and float(one.std()) > 0


def test_bad_options_are_errors():
    for options, said in (
        ({"branches": "three"}, "published"),
        ({"base": 3}, "expected a defense"),
        ({"base": "mixstyle"}, "style method too"),
        ({"layers": "conv1"}, "list of names"),
        ({"weight": -1}, "weight"),
    ):
        with pytest.raises(ConfigError, match=said):
            AdvStyle(**options)
    with pytest.raises(ConfigError, match="between 0 and 1"):
        MixStyle(p=2)
    assert AWP(base=MixStyle(base=TRADES())).select_by == "robust"
