"""The trainer: resume gives the same weights, the best epoch is kept, faults are explained."""

import json

import pytest
import torch

from defenses import PGDAT, TRADES, Standard
from defenses.trainer import Architecture, Recipe, train, training_key
from robustbench_ext.errors import ConfigError, RobustBenchExtError
from robustbench_ext.models import load_model

RECIPE = Recipe(epochs=4, eps=0.1, attack_steps=2, validation_n=60, validation_steps=2)


def architecture(data):
    return Architecture("small-cnn", data.shape, 10)


def weights(folder):
    return load_model(str(folder)).module.state_dict()


class Stop(Exception):
    """What a killed run looks like from inside."""


@pytest.mark.parametrize("defense", [Standard(), TRADES(beta=2)], ids=lambda d: d.name)
def test_an_interrupted_run_ends_at_the_same_weights(defense, digits, tmp_path):
    def interrupt(row):
        if row["epoch"] == 2:
            raise Stop

    whole = train(defense, architecture(digits), digits, RECIPE, tmp_path / "whole")
    with pytest.raises(Stop):
        train(defense, architecture(digits), digits, RECIPE, tmp_path / "cut", on_epoch=interrupt)
    assert not (tmp_path / "cut" / "model.json").exists()
    epochs = []
    cut = train(
        defense, architecture(digits), digits, RECIPE, tmp_path / "cut", on_epoch=lambda r: epochs.append(r["epoch"])
    )
    assert epochs == [3, 4]
    a, b = weights(whole), weights(cut)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert [json.loads((f / "model.json").read_text())["curve"] for f in (whole, cut)][0] == json.loads(
        (cut / "model.json").read_text()
    )["curve"]
    # Done is done: a third call trains nothing.
    train(
        defense, architecture(digits), digits, RECIPE, tmp_path / "cut", on_epoch=lambda r: pytest.fail("trained again")
    )
    assert not (cut / "checkpoint.pt").exists()


def test_the_best_epoch_is_kept(digits, tmp_path):
    out = train(PGDAT(), architecture(digits), digits, RECIPE, tmp_path / "m")
    described = json.loads((out / "model.json").read_text())
    curve = described["curve"]
    scores = [(row["robust_accuracy"], row["clean_accuracy"]) for row in curve]
    assert described["selected"] == {"epoch": scores.index(max(scores)) + 1, "by": "robust", "on": "calibration"}
    assert len(curve) == 4
    model = load_model(str(out)).module.eval()
    split = digits["calibration"]
    with torch.no_grad():
        clean = float((model(split.images(slice(None))).argmax(1) == torch.from_numpy(split.labels)).float().mean())
    assert clean == pytest.approx(curve[described["selected"]["epoch"] - 1]["clean_accuracy"], abs=1e-6)


def test_adversarial_training_is_more_robust(digits, tmp_path):
    recipe = Recipe(epochs=12, eps=0.15, attack_steps=4, validation_steps=10)
    robust = {}
    for defense in (Standard(), PGDAT(), TRADES(beta=6)):
        out = train(defense, architecture(digits), digits, recipe, tmp_path / defense.name)
        described = json.loads((out / "model.json").read_text())
        robust[defense.name] = described["curve"][described["selected"]["epoch"] - 1]["robust_accuracy"]
    assert min(robust["pgd-at"], robust["trades"]) >= robust["standard"] + 0.4


def test_key_names_everything(digits):
    base = training_key(Standard(), architecture(digits), digits, RECIPE, 0)
    assert training_key(Standard(), architecture(digits), digits, RECIPE, 0) == base
    others = [
        training_key(PGDAT(), architecture(digits), digits, RECIPE, 0),
        training_key(Standard(), architecture(digits), digits, RECIPE, 1),
        training_key(Standard(), architecture(digits), digits, Recipe(epochs=5), 0),
        training_key(Standard(), Architecture("small-resnet", digits.shape, 10), digits, RECIPE, 0),
        training_key(Standard(), Architecture("small-cnn", digits.shape, 10, (0.5,), (0.5,)), digits, RECIPE, 0),
        training_key(TRADES(beta=1), architecture(digits), digits, RECIPE, 0),
        training_key(TRADES(beta=2), architecture(digits), digits, RECIPE, 0),
    ]
    assert len({base, *others}) == len(others) + 1


def test_faults(digits, tmp_path):
    train(
        Standard(), architecture(digits), digits, Recipe(epochs=1, validation_n=20, validation_steps=1), tmp_path / "m"
    )
    with pytest.raises(ConfigError, match="another training run"):
        train(Standard(), architecture(digits), digits, RECIPE, tmp_path / "m")
    with pytest.raises(RobustBenchExtError, match="Lower lr"):
        train(
            Standard(), architecture(digits), digits, Recipe(epochs=3, lr=1e30, schedule="constant"), tmp_path / "nan"
        )
    for options, message in (
        ({"schedule": "cosin"}, "onecycle, cosine, constant"),
        ({"epochs": 0}, "at least 1"),
        ({"lr": 0}, "> 0"),
        ({"eps": "8/x"}, "eps"),
    ):
        with pytest.raises(ConfigError, match=message):
            Recipe(**options)


@pytest.mark.parametrize("schedule", ["onecycle", "cosine", "constant"])
def test_schedules(schedule):
    factors = [Recipe(schedule=schedule).factor(step, 100) for step in range(100)]
    assert max(factors) == pytest.approx(1.0, abs=1e-3)
    assert min(factors) > 0
    if schedule == "onecycle":
        assert factors.index(max(factors)) == 25
        assert factors[0] < 0.05
    if schedule != "constant":
        assert factors[-1] < 0.01
