"""Recipes: schedules, choices, and what the trainer makes of them."""

import json
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from defenses import GAIRAT, PGDAT, Batch, Standard
from defenses.averaging import Average
from defenses.trainer import Architecture, Recipe, train, training_key
from defenses.validation import Alarm, measure_energies
from robustbench_ext.attacks.inner import InnerAttack
from robustbench_ext.errors import ConfigError
from robustbench_ext.models import load_model
from robustbench_ext.models.energy import marginal_energy
from robustbench_ext.randomness import SampleRandom

QUICK = {"epochs": 2, "eps": 0.1, "attack_steps": 1, "validation_n": 20, "validation_steps": 1, "energy_n": 0}


def architecture(data):
    return Architecture("small-cnn", data.shape, 10)


def weights(folder):
    return load_model(str(folder)).module.state_dict()


# Schedules -----------------------------------------------------------------------------------------------------------


def test_piecewise_falls_at_its_marks():
    by_epoch = Recipe(epochs=120, schedule="piecewise", milestones=(75, 90, 100))
    by_share = Recipe(epochs=200, schedule="piecewise", milestones=(0.8, 0.9), gamma=(0.01, 0.01))
    assert [by_epoch.factor(e, 120) for e in (0, 74, 75, 89, 90, 100, 119)] == pytest.approx(
        [1, 1, 0.1, 0.1, 0.01, 0.001, 0.001]
    )
    assert [by_share.factor(e, 200) for e in (159, 160, 180)] == pytest.approx([1, 1e-2, 1e-4])


def test_cyclic_is_a_triangle_and_warmup_is_linear():
    cyclic = [Recipe(schedule="cyclic").factor(s, 100) for s in range(100)]
    assert cyclic.index(max(cyclic)) == 40 and max(cyclic) == 1
    assert np.allclose(np.diff(cyclic[1:40]), 1 / 40) and np.allclose(np.diff(cyclic[41:]), -1 / 60)
    warm = Recipe(epochs=10, schedule="constant", warmup=2)
    assert [warm.factor(s, 100) for s in range(100)] == pytest.approx(
        [min(1.0, (s + 1) / 20) for s in range(100)]
    )  # ten steps an epoch: the twentieth step is the first at the full rate


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"average": "mean"}, "none, ema, swa"),
        ({"precision": "fp8"}, "float32, bfloat16"),
        ({"attack_mode": "both"}, "method, eval, train"),
        ({"milestones": (0.9, 0.5)}, "rising"),
        ({"milestones": (0.5,), "gamma": (0.1, 0.1)}, "2 factors"),
        ({"label_smoothing": 1.5}, "between 0 and 1"),
        ({"clip_grad": 0}, "clip_grad"),
        ({"patience": 0}, ">= 1"),
        ({"augmentation": {"crops": 4}}, "crop"),
        ({"average_decay": 1}, r"\[0, 1\)"),
        ({"average": "swa", "swa_start": 1}, "averages nothing"),
        ({"augmentation": 5}, "expected a mapping"),
        ({"milestones": 100}, "rising list"),
        ({"milestones": "abc"}, "rising list"),
        ({"gamma": -1}, "factors > 0"),
        ({"step_size": -0.01}, "step_size"),
        ({"deterministic": "no"}, "true or false"),
        ({"epochs": float("inf")}, "epochs"),
        ({"lr": float("inf")}, "lr"),
    ],
)
def test_wrong_recipes(options, message):
    with pytest.raises(ConfigError, match=message):
        Recipe(**options)


def test_recipes_read_what_yaml_gives():
    recipe = Recipe(augmentation={"crop": "4", "flip": True}, milestones=["1/2", 0.75], gamma=["1e-2", 0.1], lr="1e-1")
    assert recipe.augmentation.crop == 4 and recipe.milestones == (0.5, 0.75) and recipe.gamma == (0.01, 0.1)
    assert recipe.lr == 0.1


# What the trainer makes of it ----------------------------------------------------------------------------------------


def test_every_option_changes_the_key_and_the_weights(digits, tmp_path):
    options = [
        {},
        {"label_smoothing": 0.1},
        {"augmentation": {"crop": 1}},
        {"augmentation": {"cutmix": 1.0}},
        {"average": "ema", "average_decay": 0.9},
        {"average": "swa", "swa_start": 0.0},
        {"clip_grad": 0.05},
        {"warmup": 1},
        {"attack_mode": "train"},
        {"precision": "bfloat16"},
        {"optimizer": "adamw", "lr": 0.001},
    ]
    keys, found = set(), []
    for number, option in enumerate(options):
        recipe = Recipe(**{**QUICK, **option})
        keys.add(training_key(PGDAT(), architecture(digits), digits, recipe, 0))
        folder = train(PGDAT(), architecture(digits), digits, recipe, tmp_path / str(number))
        found.append(torch.cat([v.flatten().float() for v in weights(folder).values()]))
        assert torch.isfinite(found[-1]).all()
    assert len(keys) == len(options)
    assert all(not torch.equal(a, b) for i, a in enumerate(found) for b in found[:i])


def test_smoothed_and_mixed_labels_reach_the_loss(digits, tmp_path):
    seen = []

    class Watching(PGDAT):
        def loss(self, model, batch, state=None):
            seen.append(batch)
            return super().loss(model, batch, state)

    recipe = Recipe(**{**QUICK, "epochs": 1}, label_smoothing=0.2, augmentation={"cutmix": 1.0})
    train(Watching(), architecture(digits), digits, recipe, tmp_path / "m")
    targets = seen[0].targets
    assert torch.allclose(targets.sum(1), torch.ones(len(targets)), atol=1e-6)
    assert float(targets.min()) == pytest.approx(0.02, abs=1e-6)
    seen.clear()
    train(
        Watching(), architecture(digits), digits, Recipe(**{**QUICK, "epochs": 1}, label_smoothing=0.2), tmp_path / "n"
    )
    batch = seen[0]
    assert torch.allclose(batch.targets, 0.8 * F.one_hot(batch.y, 10).float() + 0.02, atol=1e-6)


def test_labels_that_are_probabilities_are_refused_where_they_mean_nothing(digits, tmp_path):
    with pytest.raises(ConfigError, match="gairat is defined for labels"):
        train(GAIRAT(), architecture(digits), digits, Recipe(**QUICK, label_smoothing=0.1), tmp_path / "m")


def test_mixed_labels_are_what_the_attack_ascends(digits_model, digits_test):
    x, y, ids = (v[:20] for v in digits_test)
    from robustbench_ext.attacks.threat import Threat

    attack, random = InnerAttack(Threat("Linf", 0.1), 3), SampleRandom.of(0, ids, "t")
    hard = attack.craft(digits_model, x, y, random).x_adv
    assert torch.equal(attack.craft(digits_model, x, y, random, 0, F.one_hot(y, 10).float()).x_adv, hard)
    other = attack.craft(digits_model, x, y, random, 0, F.one_hot((y + 1) % 10, 10).float()).x_adv
    assert not torch.equal(other, hard)


def test_averages_are_averages():
    torch.manual_seed(0)
    model, seen = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)), []
    equal, moving = Average(), Average()
    expected = None
    for n in range(6):
        with torch.no_grad():
            model[0].weight.copy_(torch.randn(2, 3))
        model[1].num_batches_tracked.fill_(n)
        seen.append(model[0].weight.detach().clone())
        equal.update(model, None)
        moving.update(model, 0.6)
        decay = min(0.6, (n + 1) / (n + 10))
        expected = seen[-1] if expected is None else decay * expected + (1 - decay) * seen[-1]
    assert torch.allclose(equal.values["0.weight"], torch.stack(seen).mean(0), atol=1e-6)
    assert torch.allclose(moving.values["0.weight"], expected, atol=1e-6)
    assert int(equal.values["1.num_batches_tracked"]) == 5
    own = model[0].weight.detach().clone()
    with equal.applied(model):
        assert torch.equal(model[0].weight, equal.values["0.weight"])
    assert torch.equal(model[0].weight, own)


def test_patience_stops_and_the_best_epoch_stays(digits, tmp_path):
    # A rate of nearly nothing: the accuracy of the first epoch is never beaten.
    recipe = Recipe(**{**QUICK, "epochs": 30}, lr=1e-12, schedule="constant", patience=3)
    described = json.loads(
        (train(Standard(), architecture(digits), digits, recipe, tmp_path / "m") / "model.json").read_text()
    )
    best = described["selected"]["epoch"]
    assert len(described["curve"]) == best + 3 < 30


def test_determinism_is_asked_for_and_given_back(digits, tmp_path):
    asked = []
    recipe = Recipe(**{**QUICK, "epochs": 1}, deterministic=True)
    train(
        Standard(),
        architecture(digits),
        digits,
        recipe,
        tmp_path / "m",
        on_batch=lambda *_: asked.append(torch.are_deterministic_algorithms_enabled()),
    )
    assert all(asked) and asked and not torch.are_deterministic_algorithms_enabled()


# Energies and the alarm ----------------------------------------------------------------------------------------------


def test_energies_of_the_curve_are_the_models(digits, tmp_path):
    recipe = Recipe(**{**QUICK, "energy_n": 50})
    folder = train(PGDAT(), architecture(digits), digits, recipe, tmp_path / "m")
    described = json.loads((folder / "model.json").read_text())
    row = described["curve"][described["selected"]["epoch"] - 1]
    model = load_model(str(folder)).module
    for name in ("train", "calibration"):
        found = measure_energies(model, digits[name], recipe, 0)
        assert row[f"delta_energy_{name}"] == pytest.approx(found["delta_energy"], abs=1e-6)
    x = digits["train"].take(50).images(slice(None))
    with torch.no_grad():
        assert row["energy_train"] == pytest.approx(float(marginal_energy(model.eval()(x)).mean()), abs=1e-5)
    assert row["delta_energy_train"] == pytest.approx(row["energy_train"] - row["energy_adv_train"], abs=1e-6)


def curve(deltas, robust, error=0.05):
    return [
        {"delta_energy_train": d, "delta_energy_se_train": error, "robust_accuracy": r}
        for d, r in zip(deltas, robust, strict=True)
    ]


def test_the_alarm_sounds_when_energies_fall_and_robustness_does_not_rise():
    plateau = [-0.1, -0.5, -0.9, -1.0, -1.0, -1.05, -0.98, -1.0, -1.02, -1.0]
    falling = [-1.3, -1.8, -2.4, -3.0, -3.7, -4.4]
    peak = [*np.linspace(0.2, 0.5, 10), 0.49, 0.48, 0.47, 0.46, 0.45, 0.44]
    sounded = Alarm().epoch(curve([*plateau, *falling], peak))
    assert sounded is not None and 12 <= sounded <= 16
    rising = list(np.linspace(0.2, 0.6, 16))
    assert Alarm().epoch(curve([*plateau, *falling], rising)) is None  # robustness still rises
    assert Alarm().epoch(curve([*plateau, *[-1.0] * 6], peak)) is None  # energies stand still
    assert Alarm().epoch(curve([*plateau, *falling], peak, error=5.0)) is None  # a fall within the noise
    assert Alarm().epoch(curve(plateau[:6], peak[:6])) is None  # too early to tell
    assert Alarm().epoch([{"robust_accuracy": 0.3}] * 20) is None  # energies were not measured


def test_training_stops_on_the_alarm_if_asked(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(Alarm, "epoch", lambda self, rows: 3 if len(rows) >= 3 else None)
    recipe = Recipe(**{**QUICK, "epochs": 6}, stop_on_alarm=True)
    described = json.loads(
        (train(Standard(), architecture(digits), digits, recipe, tmp_path / "m") / "model.json").read_text()
    )
    assert len(described["curve"]) == 3 and described["alarm"] == 3
    going = Recipe(**{**QUICK, "epochs": 4})
    described = json.loads(
        (train(Standard(), architecture(digits), digits, going, tmp_path / "n") / "model.json").read_text()
    )
    assert len(described["curve"]) == 4 and described["alarm"] == 3


def test_progress_of_a_batch():
    x = torch.zeros(1, 1, 8, 8)
    assert Batch(x, torch.zeros(1), x, epoch=3, epochs=12).progress == 0.25
    assert not math.isnan(Batch(x, torch.zeros(1), x).progress)
