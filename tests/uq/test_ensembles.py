"""Two-tier ensembles: the specification's invariants, the network, weights, disagreement, the model of a suite.

Networks compute in float32; log-probabilities down to about -20 are compared to 1e-5.
"""

import json
import math

import pytest
import torch
from torch import nn

from defenses.ensembling import TwoTierEnsemble
from defenses.making import make
from robustbench_ext.attacks import build_attack
from robustbench_ext.engine import run_suite
from robustbench_ext.errors import ConfigError, ModelError
from robustbench_ext.models import load_model, observe
from robustbench_ext.models.ensemble import Ensemble
from robustbench_ext.reach import lacks
from robustbench_ext.suite import load_suite
from uq.deep_ensemble import DeepEnsemble
from uq.ensembles import (
    disagreement,
    inverse_mse_weights,
    kinds,
    likelihood_weights,
    make_ensemble,
    mean_nll,
    member_weights,
    over_families,
    within_families,
)

FAMILIES = [[0, 1, 2], [3, 4], [5]]


def drawn(n=50, members=6, k=4, seed=0):
    logits = 2 * torch.randn(members, n, k, generator=torch.Generator().manual_seed(seed)).double()
    return logits.log_softmax(2)


def linear(seed, width=None):
    torch.manual_seed(seed)
    inner = [nn.Linear(64, width), nn.ReLU()] if width else []
    return nn.Sequential(nn.Flatten(), *inner, nn.Linear(width or 64, 10))


# Invariants ----------------------------------------------------------------------------------------------------------


def test_equal_weights_are_the_plain_mean_of_families():
    log_p = drawn()
    log_q = within_families(log_p, FAMILIES)
    means = torch.stack([log_p[family].exp().mean(0) for family in FAMILIES])
    torch.testing.assert_close(log_q.exp(), means, rtol=0, atol=1e-12)
    w = torch.zeros(3).double()
    mixed = over_families(log_q, w.softmax(0)).exp()
    torch.testing.assert_close(mixed, means.mean(0), rtol=0, atol=1e-12)
    # Not the mean of all members: families count alike, however many members they have.
    assert (mixed - log_p.exp().mean(0)).abs().max() > 1e-3


def test_the_mixture_lies_between_its_families_and_sums_to_one():
    log_q = within_families(drawn(), FAMILIES)
    for weights in ([0.7, 0.1, 0.2], [0.0, 0.0, 1.0]):
        p = over_families(log_q, torch.tensor(weights, dtype=torch.float64)).exp()
        assert bool((p >= log_q.exp().amin(0) - 1e-12).all())
        assert bool((p <= log_q.exp().amax(0) + 1e-12).all())
        torch.testing.assert_close(p.sum(1), torch.ones(50).double(), rtol=0, atol=1e-12)


def test_what_changes_nothing():
    log_p = drawn()
    w = torch.tensor([0.3, -1.0, 2.0]).double()
    weights = w.softmax(0)
    mixed = over_families(within_families(log_p, FAMILIES), weights)
    permuted = over_families(within_families(log_p, [[2, 0, 1], [4, 3], [5]]), weights)
    torch.testing.assert_close(permuted, mixed, rtol=0, atol=1e-12)
    torch.testing.assert_close((w + 5).softmax(0), weights, rtol=0, atol=1e-15)  # a constant added to w
    one = within_families(log_p, [list(range(6))])
    torch.testing.assert_close(over_families(one, torch.ones(1).double()), one[0], rtol=0, atol=1e-12)
    # One weight a member says the same as both tiers.
    each = member_weights(FAMILIES, weights)
    torch.testing.assert_close((each[:, None, None] * log_p.exp()).sum(0), mixed.exp(), rtol=0, atol=1e-12)
    assert float(each.sum()) == pytest.approx(1)


def test_probabilities_are_averaged_and_not_logits():
    """One sure member outvotes two others in a mean of logits, and does not in a mean of probabilities."""

    class Constant(nn.Module):
        def __init__(self, logits):
            super().__init__()
            self.logits = nn.Parameter(torch.tensor(logits))

        def forward(self, x):
            return self.logits.expand(len(x), -1)

    members = [Constant([9.0, 0.0]), Constant([0.0, 2.0]), Constant([0.0, 2.0])]
    out = Ensemble(members)(torch.zeros(1, 1, 2, 2))
    p = torch.stack([m.logits.softmax(0) for m in members]).mean(0)
    torch.testing.assert_close(out.exp()[0], p, rtol=1e-6, atol=1e-7)
    assert int(out.argmax()) == 1
    assert int(torch.stack([m.logits for m in members]).mean(0).argmax()) == 0


# Weights -------------------------------------------------------------------------------------------------------------


def test_fitted_weights_are_the_maximum_of_the_likelihood():
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (300,), generator=g)
    signal = nn.functional.one_hot(labels, 4).double()
    log_q = torch.stack(
        [(scale * signal + torch.randn(300, 4, generator=g).double()).log_softmax(1) for scale in (2.0, 1.0, -1.0)]
    )
    weights = likelihood_weights(log_q, labels)
    equal = torch.full((3,), 1 / 3).double()
    fitted = mean_nll(over_families(log_q, weights), labels)
    assert fitted < mean_nll(over_families(log_q, equal), labels)
    # Karush, Kuhn and Tucker: no family's share would explain more; those in use explain exactly as much.
    p = log_q[:, torch.arange(300), labels].exp()
    gain = (p / (weights @ p)).mean(1)
    assert bool((gain <= 1 + 1e-5).all())
    torch.testing.assert_close(
        gain[weights > 1e-3], torch.ones(int((weights > 1e-3).sum())).double(), rtol=0, atol=1e-4
    )
    assert float(weights[2]) < 1e-3  # worse than guessing
    # Back-propagation from w = 0 comes to the same place.
    w = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([w], max_iter=200, line_search_fn="strong_wolfe")

    def loss():
        optimiser.zero_grad()
        value = nn.functional.nll_loss(over_families(log_q, w.softmax(0)), labels)
        value.backward()
        return value

    optimiser.step(loss)
    assert fitted == pytest.approx(float(loss().detach()), abs=1e-6)


def test_a_perfect_family_gets_the_weight_and_equal_ones_share_it():
    labels = torch.arange(60) % 4
    perfect = (50 * nn.functional.one_hot(labels, 4).double()).log_softmax(1)
    others = drawn(60, 2)
    weights = likelihood_weights(torch.stack([others[0], perfect, others[1]]), labels)
    assert float(weights[1]) > 0.999
    torch.testing.assert_close(likelihood_weights(others[[0, 0, 0]], labels), torch.full((3,), 1 / 3).double())
    assert float(inverse_mse_weights(torch.stack([others[0], perfect]), labels)[1]) > 0.999
    brier = (others.exp() - nn.functional.one_hot(labels, 4)).square().sum(2).mean(1)
    torch.testing.assert_close(inverse_mse_weights(others, labels), (1 / brier) / (1 / brier).sum())


def test_disagreement_within_and_across():
    predicted = torch.tensor([[0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 1], [2, 2, 2, 2], [2, 2, 2, 2], [0, 0, 0, 2]])
    found = disagreement(nn.functional.one_hot(predicted, 4).double(), FAMILIES)
    assert found.within == (pytest.approx((1 / 4 + 2 / 4 + 1 / 4) / 3), 0.0, None)
    pairs = [(a, b) for a in range(6) for b in range(a + 1, 6)]
    family = [0, 0, 0, 1, 1, 2]
    apart = [float((predicted[a] != predicted[b]).double().mean()) for a, b in pairs if family[a] != family[b]]
    assert found.across == pytest.approx(sum(apart) / len(apart))
    alone = disagreement(nn.functional.one_hot(predicted[:2], 4).double(), [[0, 1]])
    assert alone.across is None


# The network ---------------------------------------------------------------------------------------------------------


def test_the_network_is_the_deep_ensemble_with_equal_weights(digits, digits_test):
    x, y, ids = (v[:40] for v in digits_test)
    models = [linear(0), linear(1), linear(2, width=8)]
    reading = DeepEnsemble(["b", "c"]).with_members(models[1:]).fit(models[0], x, y).predict(x, ids=ids)
    seen = observe(Ensemble(models), x, y)
    torch.testing.assert_close(seen.logits.double(), reading.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(seen.logits.exp().sum(1), torch.ones(40), rtol=0, atol=1e-5)
    for weights in ([1, -1, 1], [1, 1], [0, 0, 0], [1, math.nan, 1]):
        with pytest.raises(ModelError, match="weights"):
            Ensemble(models, weights)


def test_a_member_of_no_weight_takes_no_part_and_leaves_the_gradient_finite(digits_test):
    x = digits_test[0][:5].clone().requires_grad_()
    models = [linear(0), linear(1), linear(2)]
    out = Ensemble(models, [3, 0, 1])(x)
    p = [m(x).softmax(1) for m in models]
    torch.testing.assert_close(out.exp(), 0.75 * p[0] + 0.25 * p[2], rtol=1e-5, atol=1e-7)
    (gradient,) = torch.autograd.grad(out[:, 0].sum(), x)
    assert bool(torch.isfinite(gradient).all())
    assert float(gradient.abs().max()) > 0
    assert lacks(Ensemble(models)) == {"penultimate"}
    assert lacks(models[0]) == frozenset()


def test_what_is_made_of_networks(digits_test):
    x, y, _ = (v[:200] for v in digits_test)
    members = {"a": linear(0), "b": linear(1), "c": linear(2, width=8), "d": linear(3, width=8)}
    before = {n: {k: v.clone() for k, v in m.state_dict().items()} for n, m in members.items()}
    assert kinds(members) == {"Sequential": ["a", "b"], "Sequential 2": ["c", "d"]}
    network, report = make_ensemble(members, x, y)
    assert report["nll"] <= report["nll_uniform"]
    named, again = make_ensemble(members, x, y, {"wide": ["d", "c"], "plain": ["b", "a"]})
    assert [f["weight"] for f in again["families"].values()] == pytest.approx(
        [f["weight"] for f in report["families"].values()][::-1], abs=1e-6
    )
    with torch.no_grad():
        torch.testing.assert_close(named(x), network(x), rtol=0, atol=1e-4)
    assert report["families"]["Sequential"]["disagreement"] > 0.1  # untrained
    assert report["n"] == 200
    _, uniform = make_ensemble(members, x, y, rule="uniform")
    assert [f["weight"] for f in uniform["families"].values()] == [0.5, 0.5]
    assert uniform["nll"] == uniform["nll_uniform"] == report["nll_uniform"]
    for name, member in members.items():
        assert all(torch.equal(v, before[name][k]) for k, v in member.state_dict().items())
    for families in ({"x": ["a", "b"]}, {"x": ["a", "b", "c", "d"], "y": ["a"]}, {"x": ["a", "b", "c", "d"], "y": []}):
        with pytest.raises(ConfigError, match="expected each of a, b, c, d once"):
            make_ensemble(members, x, y, families)
    with pytest.raises(ConfigError, match="learned, uniform"):
        make_ensemble(members, x, y, rule="best")


def test_attacking_one_member_overstates_robustness(digits, digits_model, digits_test):
    """The whole is attacked through all of its members; what was made for one of them leaves the others standing."""
    x, y, ids = (v[:100] for v in digits_test)
    train = digits["train"]
    others = [linear(seed) for seed in (0, 1)]
    for other in others:  # a second later they classify digits
        optimiser = torch.optim.Adam(other.parameters(), lr=0.01)
        for _ in range(150):
            optimiser.zero_grad()
            nn.functional.cross_entropy(other(train.images(slice(None))), torch.from_numpy(train.labels)).backward()
            optimiser.step()
    whole = Ensemble([digits_model, *others]).eval()
    attack = build_attack("pgd", eps=0.15, steps=15)
    right = observe(whole, x, y).logits.argmax(1) == y
    assert float(right.double().mean()) > 0.9
    of_one = attack(digits_model, x, y, ids=ids).x_adv
    after = float((right & (observe(whole, of_one, y).logits.argmax(1) == y)).double().mean())
    of_all = float((~attack(whole, x, y, ids=ids).broken).double().mean())
    assert of_all < after - 0.1
    leaf = x[:5].clone().requires_grad_()
    # Of log-probabilities: their sum does not move.
    (gradient,) = torch.autograd.grad(whole(leaf).logsumexp(1).sum(), leaf)
    assert float(gradient.abs().max()) < 1e-4


def test_fresh_members_differ_and_architectures_are_checked():
    told = {"members": [{"spec": "small-cnn"}, "small-cnn", {"spec": "small-resnet", "kwargs": {"width": 4}}]}
    loaded = load_model("ensemble", shape=(1, 8, 8), kwargs=told)
    first, second, third = loaded.module.members
    assert not torch.equal(first.fc1.weight, second.fc1.weight)
    assert third.fc.in_features == 16
    assert loaded.fingerprint == load_model("ensemble", shape=(1, 8, 8), kwargs=told).fingerprint
    for wrong, message in (({}, "members are missing"), ({"members": [{"kwargs": {}}]}, "spec is missing")):
        with pytest.raises(ConfigError, match=message):
            load_model("ensemble", kwargs=wrong)
    with pytest.raises(ConfigError, match="Did you mean 'spec'"):
        load_model("ensemble", kwargs={"members": [{"spek": "small-cnn"}]})


# As a model of a suite -----------------------------------------------------------------------------------------------


def entry(name, network, **more):
    recipe = {"epochs": 2, "eps": 0.1, "validation_n": 50, "validation_steps": 1}
    return {
        "name": name,
        "evaluate": False,
        "train": {"defense": "standard", "network": network, "recipe": recipe, **more},
    }


def suite_of(**make_options):
    return {
        "schema": 1,
        "name": "together",
        "data": "digits",
        "n": 100,
        "chunk_size": 50,
        "models": [
            entry("cnn", "small-cnn", seeds=2),
            entry("resnet", "small-resnet", kwargs={"width": 4}),
            {"name": "both", "make": {"name": "ensemble", "of": ["cnn", "resnet"], **make_options}},
            {"name": "lone", "train": entry("", "small-cnn")["train"]},
        ],
        "conditions": [
            {"attack": "pgd", "eps": 0.1, "steps": 5, "stop": "never"},
            {"corruption": "gaussian-noise", "severity": 3},
        ],
        "detectors": [
            "energy",
            "diagonal-mahalanobis",
            {"name": "mahalanobis", "label": "layer", "layers": "members.0.fc1", "only": "both"},
        ],
        "uq": ["naive-bayes-probe"],
    }


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    folder = tmp_path_factory.mktemp("together") / "run"
    return folder, run_suite(suite_of(), folder)


def test_a_suite_makes_and_measures_an_ensemble(together):
    folder, summary = together
    assert not summary.failures
    results = summary.results
    assert [m["name"] for m in results.models] == ["both", "lone"]
    about = results.models[0]
    families = about["made"]["report"]["families"]
    assert {name: f["members"] for name, f in families.items()} == {
        "SmallCNN": ["cnn seed 0", "cnn seed 1"],
        "SmallResNet": ["resnet"],
    }
    assert sum(f["weight"] for f in families.values()) == pytest.approx(1)
    # The checkpoint is one like any other.
    made = next(f for f in (folder / "models").iterdir() if "made" in json.loads((f / "model.json").read_text()))
    model = load_model(str(made)).module
    assert isinstance(model, Ensemble)
    torch.testing.assert_close(
        model.weights, torch.tensor([families["SmallCNN"]["weight"] / 2] * 2 + [families["SmallResNet"]["weight"]])
    )
    # What reads its penultimate features is left out and said to be; what names a layer is there.
    assert {r.probe for r in results.results if r.model == "both"} >= {"classifier", "energy", "layer"}
    assert not [
        r for r in results.results if r.model == "both" and r.probe in ("diagonal-mahalanobis", "naive-bayes-probe")
    ]
    assert any(
        "both has no last linear layer of its own" in note and "naive-bayes-probe" in note for note in results.notes
    )
    # Attacked as a whole: as many passes as for any model, and less accurate than clean.
    clean = results.find(model="both", condition="clean", metric="accuracy", probe="classifier", group=None)[0]
    attacked = results.find(model="both", condition="pgd Linf 0.1", metric="robust_accuracy", group=None)[0]
    assert attacked.value < clean.value
    again = run_suite(suite_of(), folder)
    assert (again.trained, again.computed) == (0, 0)


def test_the_probe_stands_beside_the_classifier_under_every_condition(together):
    _, summary = together
    for condition in ("clean", "pgd Linf 0.1", "gaussian-noise 3"):
        mine = {r.metric: r for r in summary.results.find(model="lone", condition=condition, probe="naive-bayes-probe")}
        assert {"accuracy", "ece", "nll", "brier"} <= set(mine)
        assert mine["accuracy"].n == 100
    found = {
        probe: summary.results.find(model="lone", condition="clean", probe=probe, metric="accuracy", group=None)[
            0
        ].value
        for probe in ("classifier", "naive-bayes-probe")
    }
    assert found["naive-bayes-probe"] > 0.5
    detected = summary.results.find(
        model="lone", condition="pgd Linf 0.1", probe="diagonal-mahalanobis", metric="auroc"
    )
    assert detected[0].value is not None
    assert summary.results.models[1]["fitted"]["naive-bayes-probe"]["samples of the smallest class"] > 50


def test_filters_stand_beside_every_checkpoint(together):
    from robustbench_ext.filters import filter_rows

    folder, summary = together
    for about in summary.results.models:
        assert about["filters"] == filter_rows(_loaded(folder, about["name"]))
        assert about["filters"]
    assert {f["layer"].split(".")[1] for f in summary.results.models[0]["filters"]} == {"0", "1", "2"}


def _loaded(folder, name):
    from robustbench_ext.evaluate import Context
    from robustbench_ext.suite import validate_suite

    return Context(validate_suite(suite_of()), folder).model(name).module


def test_the_reports_hold_families_and_filters(together):
    from reports.contents import sections
    from reports.ensembles import ensembles
    from reports.filters import filters

    _, summary = together
    text = {section.title: section.table for section in sections(summary.results)}
    rows = dict(text["Ensembles"].rows)
    assert list(rows) == ["both · SmallCNN", "both · SmallResNet", "both · all"]
    report = summary.results.models[0]["made"]["report"]
    assert rows["both · SmallResNet"][1].value == report["families"]["SmallResNet"]["weight"]
    assert rows["both · SmallResNet"][3].text == "–"  # one member
    assert rows["both · all"][3].value == report["disagreement_across"]
    assert "equal weights" in rows["both · all"][2].text
    assert [name for name, _ in text["Filters"].rows] == ["both", "lone"]
    assert ensembles(summary.results)
    assert [table.caption for table in filters(summary.results).more] == ["both: layers", "lone: layers"]
    made_of_nothing = summary.results.model_copy(update={"models": [{"name": "lone"}]})
    assert not ensembles(made_of_nothing)


@pytest.mark.slow
def test_the_html_report_shows_them(together):
    from reports import write_reports

    folder, _ = together
    html = write_reports(folder)["html"].read_text()
    assert 'id="filters"' in html
    assert 'id="ensembles"' in html


@pytest.mark.slow
def test_workers_give_the_same_bytes(together, tmp_path):
    folder, _ = together
    run_suite(suite_of(), tmp_path, executor="local", workers=2)
    assert (tmp_path / "results.json").read_bytes() == (folder / "results.json").read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"families": {"a": ["cnn"]}}, "expected each of cnn seed 0, cnn seed 1, resnet once"),
        ({"families": ["cnn"]}, "lists of members by name"),
        ({"weights": "best"}, "learned, uniform, inverse-variance"),
        ({"of": ["resnet"]}, "expected at least 2"),
        ({"wait": "x"}, "Did you mean 'weights'"),
    ],
)
def test_wrong_ensembles_are_refused(tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        run_suite(suite_of(**change), tmp_path / "run")


def test_an_entry_of_several_seeds_is_several_members_of_a_family():
    suite = load_suite(suite_of(families={"conv": ["cnn"], "res": ["resnet"]}))
    told = next(m.make for m in suite.models if m.make is not None).options()
    assert told["families"] == {"conv": ["cnn seed 0", "cnn seed 1"], "res": ["resnet"]}


def test_members_of_any_architecture_are_made_into_one_folder(tmp_path, digits):
    from defenses import Standard
    from defenses.trainer import Architecture, Recipe, train

    folders = {}
    for name, network in (("a", "small-cnn"), ("b", "small-resnet")):
        folders[name] = tmp_path / name
        recipe = Recipe(epochs=1, eps=0.1, validation_n=20, validation_steps=1)
        train(Standard(), Architecture(network, digits.shape, 10, (0.5,), (0.5,)), digits, recipe, folders[name])
    out = make(TwoTierEnsemble(), folders, digits, tmp_path / "out")
    described = json.loads((out / "model.json").read_text())
    assert described["architecture"]["spec"] == "ensemble"
    x = digits["test"].images(slice(0, 20))
    whole, members = load_model(str(out)).module, [load_model(str(f)).module for f in folders.values()]
    with torch.no_grad():
        p = [m.eval()(x).softmax(1) for m in members]
        w = whole.weights
        torch.testing.assert_close(whole.eval()(x).exp(), w[0] * p[0] + w[1] * p[1], rtol=1e-4, atol=1e-6)
