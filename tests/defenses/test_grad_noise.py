"""Annealed gradient noise: its variance, its stream, where it is added, and that nothing changes without it."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from defenses import SRAT, Standard
from defenses.grad_noise import GradientNoise
from defenses.trainer import Architecture, Recipe, _recipe_key, train, training_key
from robustbench_ext.errors import ConfigError
from robustbench_ext.models import load_model

QUICK = {"epochs": 2, "batch_size": 400, "validation_n": 20, "validation_steps": 1, "energy_n": 0, "attack_steps": 1}


class Stop(Exception):
    """What a killed run looks like from inside."""


def noise_of(noise, n=20_000, seed=0, step=0, names=("w",)):
    layer = {name: nn.Parameter(torch.zeros(n)) for name in names}
    for parameter in layer.values():
        parameter.grad = torch.zeros(n)
    noise.add(layer.items(), seed, step)
    return [parameter.grad.numpy().astype(np.float64) for parameter in layer.values()]


def test_the_variance_is_eta_at_first_and_falls_as_printed():
    assert GradientNoise(eta=0.3).variance(0) == 0.3
    assert GradientNoise(eta=1).variance(1000) == pytest.approx(0.022375, abs=5e-7)
    assert GradientNoise(eta=0.3, gamma=0).variance(1000) == 0.3


@pytest.mark.parametrize(("eta", "step"), [(0.01, 0), (1.0, 0), (1.0, 1000)])
def test_eta_is_a_variance_and_no_standard_deviation(eta, step):
    """The variance of 20,000 normal draws lies within chi-squared's limits; eta = 0.01 as a deviation would be 1e-4."""
    noise = GradientNoise(eta=eta)
    (drawn,) = noise_of(noise, step=step)
    n, variance = len(drawn), noise.variance(step)
    low, high = stats.chi2.ppf([1e-6, 1 - 1e-6], n - 1) / (n - 1) * variance
    assert low < drawn.var(ddof=1) < high
    assert abs(drawn.mean()) < 5 * np.sqrt(variance / n)
    assert stats.kstest(drawn / np.sqrt(variance), "norm").pvalue > 1e-6


def test_elements_parameters_steps_and_seeds_have_noise_of_their_own():
    noise = GradientNoise(eta=1)
    a, b = noise_of(noise, names=("a", "b"))
    others = [b, noise_of(noise, step=1, names=("a",))[0], noise_of(noise, seed=1, names=("a",))[0]]
    bound = 5 / np.sqrt(len(a))  # five standard errors of a correlation of 0
    for other in (*others, np.roll(a, 1), np.roll(a, len(a) // 2)):
        assert abs(np.corrcoef(a, other)[0, 1]) < bound
    assert np.array_equal(a, noise_of(noise, names=("a",))[0])  # the same seed, the same noise, whoever else is there


def test_eta_0_is_nothing_and_what_has_no_gradient_stays_without():
    with_one, without = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4))
    with_one.grad = torch.ones(4)
    GradientNoise(eta=0).add([("a", with_one)], 0, 0)
    assert torch.equal(with_one.grad, torch.ones(4))
    GradientNoise(eta=1).add([("a", with_one), ("b", without)], 0, 0)
    assert not torch.equal(with_one.grad, torch.ones(4))
    assert without.grad is None
    assert torch.equal(with_one.detach(), torch.zeros(4))  # gradients alone are touched


def test_wrong_options():
    assert Recipe(grad_noise={"eta": "1e-2"}).grad_noise == GradientNoise(eta=0.01, gamma=0.55)
    with pytest.raises(ConfigError, match="Did you mean 'eta'"):
        Recipe(grad_noise={"etta": 1})
    with pytest.raises(ConfigError, match="expected a mapping"):
        Recipe(grad_noise=0.1)
    with pytest.raises(ConfigError, match="eta is a variance"):
        Recipe(grad_noise={"eta": -1})


# In training ---------------------------------------------------------------------------------------------------------


def weights(folder):
    return load_model(str(folder)).module.state_dict()


def equal(a, b):
    return all(torch.equal(a[k], b[k]) for k in a)


def test_without_it_keys_are_what_they_were_and_eta_0_trains_the_same_weights(digits, tmp_path):
    assert "grad_noise" not in _recipe_key(Recipe())
    assert set(asdict(Recipe())) - set(_recipe_key(Recipe())) == {"grad_noise"}
    architecture = Architecture("small-cnn", digits.shape, 10)
    recipes = {name: Recipe(**QUICK, grad_noise=told) for name, told in
               (("none", None), ("zero", {"eta": 0}), ("some", {"eta": 0.01}))}  # fmt: skip
    keys = {n: training_key(Standard(), architecture, digits, r, 0) for n, r in recipes.items()}
    assert len(set(keys.values())) == 3
    found = {n: weights(train(Standard(), architecture, digits, r, tmp_path / n)) for n, r in recipes.items()}
    assert equal(found["none"], found["zero"])
    assert not equal(found["none"], found["some"])
    described = json.loads((tmp_path / "some" / "model.json").read_text())
    assert described["recipe"]["grad_noise"] == {"eta": 0.01, "gamma": 0.55}


def test_killed_in_the_middle_of_an_epoch_it_goes_on_with_the_noise_it_would_have_had(digits, tmp_path):
    recipe = Recipe(**QUICK, clip_grad=0.5, grad_noise={"eta": 0.01})
    architecture = Architecture("small-cnn", digits.shape, 10)
    defense = SRAT(lam=0.1)  # its head has gradients too

    def interrupt(epoch, batch, batches):
        if (epoch, batch) == (1, 2):
            raise Stop

    whole = train(defense, architecture, digits, recipe, tmp_path / "whole")
    with pytest.raises(Stop):
        train(defense, architecture, digits, recipe, tmp_path / "cut", on_batch=interrupt, checkpoint_seconds=0)
    cut = train(defense, architecture, digits, recipe, tmp_path / "cut", checkpoint_seconds=0)
    assert equal(weights(whole), weights(cut))


def test_it_is_added_behind_clipping(digits, tmp_path, monkeypatch):
    """Clipped to 1e-6, what the optimizer sees is the noise alone."""
    seen = {}
    original = torch.optim.SGD.step

    def step(self, *args, **kwargs):
        seen.setdefault(
            "norm", float(torch.cat([p.grad.flatten() for g in self.param_groups for p in g["params"]]).norm())
        )
        seen["n"] = sum(p.numel() for g in self.param_groups for p in g["params"])
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    recipe = Recipe(**{**QUICK, "epochs": 1}, clip_grad=1e-6, grad_noise={"eta": 0.01})
    train(Standard(), Architecture("small-cnn", digits.shape, 10), digits, recipe, tmp_path / "m")
    # The norm of n draws of variance 0.01 is sqrt(0.01 n) to 1 / sqrt(2 n) of itself; clipped behind, it would be 1e-6.
    assert seen["norm"] == pytest.approx(np.sqrt(0.01 * seen["n"]), rel=5 / np.sqrt(2 * seen["n"]))
