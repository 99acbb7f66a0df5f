"""Model soups: averages, the greedy recipe, batch statistics; and models that a suite makes of others."""

import copy
import json

import pytest
import torch
from torch import nn

from defenses.making import check_alike, make, make_key, recompute_statistics, with_state
from defenses.soups import Soup, average
from robustbench_ext.attacks.pgd import PGD
from robustbench_ext.engine import run_suite
from robustbench_ext.errors import ConfigError, ModelError
from robustbench_ext.models import load_model
from robustbench_ext.suite import load_suite


def linear(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def normed(seed):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
    net[1].num_batches_tracked += 7 + seed
    return net.eval()


def test_one_ingredient_is_the_identity_and_equal_ones_are_their_average():
    state = normed(0).state_dict()
    for states in ([state], [state] * 5):
        for name, value in average(states).items():
            # Five equal float32 numbers: sums of fifths in float64, rounded once to float32, give the number itself.
            assert torch.equal(value, state[name]), name
            assert value.dtype == state[name].dtype


def test_order_does_not_matter_and_the_running_update_is_the_mean():
    states = [linear(i).state_dict() for i in range(4)]
    mean = average(states)
    for name, value in average(states[::-1]).items():
        # Sums of four float64 in another order: 4 ulp of float64, far below one of float32, which may round either way.
        torch.testing.assert_close(value, mean[name], rtol=2**-22, atol=1e-9)
    running = {k: v.double() for k, v in states[0].items()}
    for n, state in enumerate(states[1:], start=1):
        running = {k: v * (n / (n + 1)) + state[k].double() / (n + 1) for k, v in running.items()}
    for name, value in running.items():
        torch.testing.assert_close(value.float(), mean[name], rtol=2**-22, atol=1e-9)


def test_a_soup_of_linear_models_is_their_ensemble(digits_test):
    x = digits_test[0][:50]
    models = [linear(i) for i in range(3)]
    soup = with_state(models[0], average([m.state_dict() for m in models]))
    with torch.no_grad():
        # 65 float32 products a logit, of size up to about 1: 65 * 2^-24 on either side.
        torch.testing.assert_close(soup(x), torch.stack([m(x) for m in models]).mean(0), rtol=0, atol=1e-5)


def test_counts_are_copied_not_averaged():
    mean = average([normed(0).state_dict(), normed(5).state_dict()])
    assert int(mean["1.num_batches_tracked"]) == 7
    assert mean["1.num_batches_tracked"].dtype == torch.int64


def test_models_that_do_not_fit_together_are_refused():
    with pytest.raises(ModelError, match="Expected models of one architecture"):
        check_alike({"a": linear(0), "b": normed(0)})
    wide = nn.Sequential(nn.Flatten(), nn.Linear(64, 11))
    with pytest.raises(ModelError, match=r"1\.(weight|bias)"):
        check_alike({"a": linear(0), "b": wide})


def test_the_greedy_path_never_falls_and_ends_no_lower_than_the_best_alone(digits):
    models = {str(i): linear(i) for i in range(5)}
    # Any judge: here how near the weights are to a fixed point, which an average of several can be nearer to than each.
    goal = average([models[i].state_dict() for i in "034"])

    def judge(model):
        return -sum(float(((v - goal[k]) ** 2).sum()) for k, v in model.state_dict().items())

    made = Soup(how="greedy").greedy(models, digits, judge)
    path = made.report["path"]
    kept = [step["soup"] for step in path if step["kept"]]
    assert kept == sorted(kept)
    assert made.report["score"] >= max(step["alone"] for step in path)
    assert [step["alone"] for step in path] == sorted((step["alone"] for step in path), reverse=True)
    assert made.report["score"] == pytest.approx(judge(with_state(models["0"], made.state)))
    assert len(made.report["ingredients"]) > 1
    torch.testing.assert_close(
        made.state["1.weight"],
        average([models[name].state_dict() for name in made.report["ingredients"]])["1.weight"],
        rtol=0,
        atol=0,
    )


@pytest.mark.parametrize(("strict", "ingredients"), [(False, ["a", "b"]), (True, ["a"])])
def test_equal_scores_are_accepted_as_in_the_paper_or_not_as_in_its_code(digits, strict, ingredients):
    models = {"a": linear(0), "b": linear(1)}
    made = Soup(how="greedy", strict=strict).greedy(models, digits, lambda model: 0.5)
    assert made.report["ingredients"] == ingredients


def test_the_judge_scores_clean_and_robust_accuracy(digits, digits_model):
    scores = [
        Soup(how="greedy", clean=clean, eps=0.1, steps=5, judge_n=60)._judge(digits, 0)(digits_model)
        for clean in (1.0, 0.0, 0.25)
    ]
    assert scores[0] > scores[1]  # the attack breaks something
    assert scores[2] == pytest.approx(0.25 * scores[0] + 0.75 * scores[1])
    with pytest.raises(ConfigError, match="eps: 8/255"):
        Soup(how="greedy", clean=0.5)


def test_batch_statistics_are_those_of_the_soup(digits):
    a, b = normed(0), normed(1)
    made = Soup(statistics_n=120, batch_size=40).make({"a": a, "b": b}, digits, 0)
    soup = with_state(a, made.state)
    with torch.no_grad():
        seen = soup[0](digits["train"].images(slice(0, 120)))
    # Three batches of equal size: the mean of their means is the mean of all, that of their variances is not quite.
    torch.testing.assert_close(soup[1].running_mean, seen.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    parts = torch.stack([part.transpose(0, 1).flatten(1).var(1) for part in seen.split(40)]).mean(0)
    torch.testing.assert_close(soup[1].running_var, parts, rtol=1e-4, atol=1e-6)
    # Or they are averaged like everything else.
    plain = Soup(statistics="mean").make({"a": a, "b": b}, digits, 0).state
    torch.testing.assert_close(plain["1.running_var"], (a[1].running_var + b[1].running_var) / 2)
    torch.testing.assert_close(plain["0.weight"], made.state["0.weight"], rtol=0, atol=0)


def test_statistics_of_attacked_images(digits):
    a, b = normed(0), normed(1)
    threat = {"eps": 0.1, "steps": 3, "statistics_n": 60, "batch_size": 60}
    made = Soup(**threat).make({"a": a, "b": b}, digits, 0)  # eps says that attacks matter
    mean = with_state(a, Soup(statistics="mean").make({"a": a, "b": b}, digits, 0).state)
    split = digits["train"].take(60)
    attack = PGD(eps=0.1, norm="Linf", steps=3, stop="never")
    attacked = attack(mean, split.images(slice(None)), torch.from_numpy(split.labels), ids=split.ids, seed=0).x_adv
    recompute_statistics(mean, iter([attacked]))
    for name, value in mean.state_dict().items():
        torch.testing.assert_close(made.state[name], value, rtol=0, atol=0)
    clean = Soup(statistics="clean", statistics_n=60, batch_size=60).make({"a": a, "b": b}, digits, 0).state
    assert not torch.equal(clean["1.running_mean"], made.state["1.running_mean"])
    with pytest.raises(ConfigError, match="eps: 8/255"):
        Soup(statistics="attacked")


def test_recomputing_leaves_everything_else_alone(digits):
    net = normed(3).train()
    net[1].eval()
    before = copy.deepcopy(net.state_dict())
    modes = [m.training for m in net.modules()]
    recompute_statistics(net, iter([digits["train"].images(slice(0, 50))]))
    assert [m.training for m in net.modules()] == modes
    assert net[1].momentum == 0.1
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]) == (not name.startswith("1.running") and "tracked" not in name), name


@pytest.fixture
def soup_suite(tiny_suite):
    quick = {"epochs": 1, "lr": 0.02, "eps": 0.1, "validation_n": 50}
    tiny_suite["models"] = [
        {"name": "base", "train": {"defense": "standard", "recipe": {**quick, "epochs": 3, "lr": 0.1}}},
        {"name": "fine", "train": {"defense": "standard", "start": "base", "seeds": 2, "recipe": quick}},
        {"name": "soup", "make": {"name": "soup", "of": ["fine", "base"], "how": "greedy"}},
    ]
    tiny_suite["conditions"], tiny_suite["detectors"] = ["clean"], []
    return tiny_suite


def test_a_suite_fine_tunes_and_makes_soup(tmp_path, soup_suite):
    summary = run_suite(soup_suite, tmp_path / "run")
    assert not summary.failures
    about = {m["name"]: m for m in summary.results.models}
    assert list(about) == ["base", "fine seed 0", "fine seed 1", "soup"]
    made = about["soup"]["made"]
    assert made["of"] == ["fine seed 0", "fine seed 1", "base"]
    assert set(made["report"]["ingredients"]) <= set(made["of"])
    # Fine-tuning started from the base's weights: a step at this rate leaves them near, fresh ones would be far.
    folders = {
        json.loads((f / "model.json").read_text())["seed"]: f
        for f in (tmp_path / "run" / "models").iterdir()
        if "defense" in json.loads((f / "model.json").read_text())
    }
    states = {seed: load_model(str(folder)).module.state_dict() for seed, folder in folders.items()}
    gap = (states[1]["fc1.weight"] - states[0]["fc1.weight"]).norm() / states[0]["fc1.weight"].norm()
    assert gap < 0.5
    # Again: nothing is trained, made or computed.
    again = run_suite(soup_suite, tmp_path / "run")
    assert (again.trained, again.computed) == (0, 0)
    # Another base is another start, so everything on top of it is made anew.
    soup_suite["models"][0]["train"]["seed"] = 5
    assert run_suite(soup_suite, tmp_path / "run").trained == 4


def test_what_stands_on_a_model_that_cannot_be_trained_is_not_started(tmp_path, soup_suite):
    soup_suite["models"][0]["train"]["recipe"]["lr"] = 1e30
    summary = run_suite(soup_suite, tmp_path / "run")
    errors = {f.what: f.error for f in summary.failures}
    assert "NaN" in errors["base · training"] or "infinite" in errors["base · training"]
    assert errors["soup · making"].startswith("not started")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"of": ["fines"]}, "Did you mean 'fine seed"),
        ({"of": []}, "at least 1"),
        ({"name": "soap"}, "Did you mean 'soup'"),
        ({"hows": "greedy"}, "Did you mean 'how'"),
    ],
)
def test_wrong_entries_are_refused_before_anything_runs(tmp_path, soup_suite, change, message):
    soup_suite["models"][2]["make"].update(change)
    with pytest.raises(ConfigError, match=message):
        run_suite(soup_suite, tmp_path / "run")


def test_models_stand_after_those_that_they_need(soup_suite):
    soup_suite["models"].reverse()
    with pytest.raises(ConfigError, match="before it"):
        load_suite(soup_suite)


def test_a_folder_with_another_model_is_left_alone(tmp_path, digits):
    key = make_key(Soup(), [tmp_path / "a"], digits, 0)
    assert key != make_key(Soup(), [tmp_path / "b"], digits, 0)
    assert key != make_key(Soup(), [tmp_path / "a"], digits, 1)
    assert key == make_key(Soup(), [tmp_path / "elsewhere" / "a"], digits, 0)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.json").write_text('{"key": "another"}')
    with pytest.raises(ConfigError, match="holds another model"):
        make(Soup(), {"a": tmp_path / "a"}, digits, tmp_path / "out")
