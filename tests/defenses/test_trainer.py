"""The trainer: resume gives the same weights, the best epoch is kept, faults are explained."""

import json

import pytest
import torch

from defenses import PGDAT, TRADES, Standard
from defenses.trainer import Architecture, Recipe, train, training_key
from robustbench_ext.errors import ConfigError, RobustBenchExtError
from robustbench_ext.models import load_model

RECIPE = Recipe(epochs=4, eps=0.1, attack_steps=2, validation_n=60, validation_steps=2, energy_n=30)


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
        ({"schedule": "cosin"}, "onecycle, cosine, piecewise, cyclic, constant"),
        ({"epochs": 0}, ">= 1"),
        ({"batch_size": 1}, ">= 2"),
        ({"attack_steps": -3}, ">= 1"),
        ({"epochs": 2.5}, "whole number"),
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


def test_a_damaged_checkpoint_counts_as_missing(digits, tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "checkpoint.pt").write_bytes(b"damaged")
    recipe = Recipe(epochs=1, validation_n=20, validation_steps=1)
    train(Standard(), architecture(digits), digits, recipe, tmp_path / "m")
    assert (tmp_path / "m" / "model.json").is_file()


def test_a_seed_does_not_throw_given_weights_away(digits, tmp_path):
    recipe = Recipe(epochs=1, validation_n=20, validation_steps=1)
    train(Standard(), architecture(digits), digits, recipe, tmp_path / "m")
    spec = f"small-cnn + {tmp_path / 'm' / 'model.safetensors'}"
    given = [Architecture(spec, digits.shape, 10).build(seed).state_dict()["fc2.weight"] for seed in (0, 1)]
    fresh = [architecture(digits).build(seed).state_dict()["fc2.weight"] for seed in (0, 1)]
    assert torch.equal(*given)
    assert not torch.equal(*fresh)


class Watching(PGDAT):
    """Remembers what it was given."""

    seen: list = []

    def loss(self, model, batch, state=None):
        Watching.seen.append((batch.epoch, batch.x.clone(), batch.x_adv.clone()))
        return super().loss(model, batch)


def test_every_epoch_has_its_own_order_starts_and_rate(digits, tmp_path, monkeypatch):
    rates = []
    step = torch.optim.SGD.step
    monkeypatch.setattr(
        torch.optim.SGD, "step", lambda self, *a: (rates.append(self.param_groups[0]["lr"]), step(self, *a))[1]
    )
    Watching.seen = []
    recipe = Recipe(epochs=2, eps=0.1, attack_steps=1, step_size=0, validation_n=20, validation_steps=1)
    train(Watching(), architecture(digits), digits, recipe, tmp_path / "m")
    epochs = [[(x, a) for e, x, a in Watching.seen if e == epoch] for epoch in (0, 1)]
    whole = [torch.cat([x for x, _ in epoch]) for epoch in epochs]
    assert not torch.equal(*whole)  # another order ...
    assert torch.allclose(whole[0].sum(0), whole[1].sum(0), atol=1e-2)  # ... of the same samples
    starts = [
        {tuple(x.flatten().tolist()): a for xs, xa in epoch for x, a in zip(xs, xa, strict=True)} for epoch in epochs
    ]
    common = set(starts[0]) & set(starts[1])
    assert len(common) > 1000
    assert not any(torch.equal(starts[0][k], starts[1][k]) for k in list(common)[:50])  # other random starts
    total = len(rates)
    assert rates == pytest.approx([recipe.lr * recipe.factor(i, total) for i in range(total)])


def test_networks_with_dropout_resume_exactly_too(digits, tmp_path):
    (tmp_path / "net.py").write_text(
        "import torch\ndef build():\n    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 32), "
        "torch.nn.Dropout(0.5), torch.nn.Linear(32, 10))\n"
    )
    network = Architecture(f"{tmp_path}/net.py:build", digits.shape, 10)
    recipe = Recipe(epochs=3, lr=0.05, validation_n=20, validation_steps=1)

    def interrupt(row):
        if row["epoch"] == 1:
            raise Stop

    train(Standard(), network, digits, recipe, tmp_path / "whole")
    with pytest.raises(Stop):
        train(Standard(), network, digits, recipe, tmp_path / "cut", on_epoch=interrupt)
    train(Standard(), network, digits, recipe, tmp_path / "cut")
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(a[k], b[k]) for k in a)
