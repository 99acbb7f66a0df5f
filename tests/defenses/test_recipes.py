"""Named recipes: every file can be built, what is given by hand wins, suites train by name."""

import pytest

from defenses import AWP, TRADES, WEAT
from defenses.recipes import plan, preset, read_recipe, recipe_names
from robustbench_ext.catalog import DEFENSES, MODELS
from robustbench_ext.engine import run_suite
from robustbench_ext.errors import ConfigError


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_can_be_built(name):
    content = read_recipe(name)
    assert content["title"] and content["source"]
    assert content["network"] in MODELS
    assert set(content) <= {"title", "source", "network", "kwargs", "recipe", "methods"}
    for method, own in content["methods"].items():
        assert set(own or {}) <= {"defense", "recipe", "note"}
        made = plan(method, name)
        assert made.defense.name == method and made.network == content["network"]


def test_the_published_ones_say_what_was_published():
    trades = plan("trades", "cifar10-wrn34-10")
    assert trades.defense == TRADES(beta=6)
    r = trades.recipe
    assert (r.eps, r.step_size, r.attack_steps, r.epochs, r.lr, r.weight_decay) == (0.031, 0.007, 10, 76, 0.1, 2e-4)
    awp = plan("awp", "cifar10-wrn34-10")
    assert awp.defense == AWP(base=TRADES(beta=6), gamma=0.005, burn_in=0.045) and awp.recipe.epochs == 200
    weat = plan("weat", "cifar10-resnet18").recipe
    assert (weat.schedule, weat.epochs, weat.eps) == ("onecycle", 100, 8 / 255)
    srat = plan("srat", "cifar10-resnet18").recipe
    # Scripts that count epochs from 1: TRADES publishes two of 76 epochs at the low rate, GAIRAT falls at 30 and 60 of 100.
    assert [r.factor(e, 76) for e in (73, 74, 75)] == pytest.approx([1, 0.1, 0.1])
    gairat = plan("gairat", "cifar10-resnet18").recipe
    assert [gairat.factor(e, 100) for e in (29, 30, 60, 99)] == pytest.approx([1, 0.1, 0.01, 0.01])
    wide = plan("gairat", "cifar10-wrn34-10").recipe
    assert [wide.factor(e, 120) for e in (59, 60, 90, 110)] == pytest.approx([1, 0.1, 0.01, 0.005])
    short = plan("mart", {"name": "cifar10-resnet18", "epochs": 12}).recipe  # shares hold for other lengths
    assert min(short.factor(s, 120) for s in range(120)) == pytest.approx(1e-3)
    assert [srat.factor(e * 10, 2000) for e in (4, 159, 160, 180)] == pytest.approx([0.82, 1, 1e-2, 1e-4])


def test_what_is_given_by_hand_wins():
    made = plan(
        "weat",
        {"name": "cifar10-resnet18", "epochs": 3, "eps": "4/255"},
        {"beta": 2},
        kwargs={"width": 8},
    )
    assert made.defense == WEAT(beta=2, variant="adv")
    assert made.recipe.epochs == 3 and made.recipe.eps == 4 / 255 and made.recipe.batch_size == 128
    cut = plan("weat", {"name": "cifar10-resnet18", "augmentation": {"cutmix": 1}}).recipe.augmentation
    assert (cut.crop, cut.flip, cut.cutmix) == (4, True, 1)
    assert made.network == "resnet-18" and dict(made.kwargs) == {"width": 8}
    assert plan("weat", "cifar10-resnet18", network="small-cnn").network == "small-cnn"
    assert plan("trades").network == "small-cnn" and plan("trades").defense == TRADES()


def test_unknown_names():
    with pytest.raises(ConfigError, match="Did you mean 'cifar10-resnet18'"):
        plan("weat", "cifar10-resnet-18")
    with pytest.raises(ConfigError, match="method 'weat'"):
        preset("cifar10-wrn34-10", "weat")
    with pytest.raises(ConfigError, match="Did you mean 'epochs'"):
        plan("weat", {"epoch": 3})
    with pytest.raises(ConfigError, match="Did you mean 'beta'"):
        plan("weat", "", {"betta": 3})


def test_every_defense_is_in_the_small_recipe():
    assert set(read_recipe("mnist5k-small-cnn")["methods"]) == set(DEFENSES.names())


def test_a_suite_trains_by_recipe_once(tmp_path):
    suite = {
        "schema": 1,
        "name": "recipes",
        "data": "digits",
        "n": 40,
        "models": [
            {
                "name": "weat",
                "train": {
                    "defense": {"name": "weat", "beta": 3},
                    "recipe": {
                        "name": "mnist5k-small-cnn",
                        "epochs": 1,
                        "eps": 0.1,
                        "validation_n": 20,
                        "energy_n": 10,
                    },
                },
            }
        ],
        "conditions": [{"attack": "pgd", "eps": 0.1, "steps": 2}],
    }
    first = run_suite(suite, tmp_path)
    assert first.trained == 1 and not first.failures
    (model,) = first.results.models
    assert model["spec"] == "small-cnn" and model["training"]["defense"]["beta"] == 3
    assert "delta_energy_train" in model["training"]["curve"][0] and model["training"]["alarm"] is None
    again = run_suite(suite, tmp_path)
    assert again.trained == 0 and again.computed == 0
    suite["models"][0]["train"]["recipe"]["name"] = "mnist5k"
    with pytest.raises(ConfigError, match="model 'weat'.*Did you mean 'mnist5k-small-cnn'"):
        run_suite(suite, tmp_path / "other")
