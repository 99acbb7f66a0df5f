"""Robust weight signatures: the algebra of patches, what stays as it is, and their way through a suite."""

import pytest
import torch
from torch import nn

from defenses.augment import Augmentation
from defenses.making import with_state
from defenses.standard import Standard
from defenses.trainer import Architecture, Recipe, training_key
from defenses.weight_patch import Signature, WeightSignature, convolutions
from robustbench_ext.engine import run_suite
from robustbench_ext.errors import ConfigError
from robustbench_ext.models import load_model
from robustbench_ext.randomness import SampleRandom

# Weights are float32 and computed in float64: one rounding of a number of size up to 1 is 2^-25.
ROUNDING = {"rtol": 0.0, "atol": 2**-23}


def network(seed):
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.Flatten(), nn.Linear(48, 10)
    )
    with torch.no_grad():
        net[1].running_mean.normal_()
        net[1].running_var.uniform_(0.5, 2)
    return net.eval()


@pytest.fixture
def states():
    return [network(i).state_dict() for i in range(3)]


NAMES = ["0.weight", "3.weight"]


def test_nothing_of_the_clean_direction_is_left_and_projecting_twice_changes_nothing(states):
    pre, clean, robust = states
    signature = Signature.extract(pre, clean, robust, NAMES)
    for name in NAMES:
        u = (clean[name] - pre[name]).double().flatten()
        along = torch.dot(signature.layers[name].double().flatten(), u) / (
            u.norm() * signature.layers[name].double().norm()
        )
        assert abs(float(along)) < 1e-6
    moved = {name: pre[name] + signature.layers.get(name, 0) for name in pre}
    again = Signature.extract(pre, clean, moved, NAMES)
    for name in NAMES:
        torch.testing.assert_close(again.layers[name], signature.layers[name], **ROUNDING)
    # The reference is the start, not the clean network: with that one in its place the result is another.
    assert not torch.allclose(
        Signature.extract(clean, clean, robust, NAMES).layers[NAMES[0]], signature.layers[NAMES[0]]
    )


def test_a_clean_direction_of_another_length_changes_nothing_and_none_at_all_leaves_the_difference(states):
    pre, clean, robust = states
    signature = Signature.extract(pre, clean, robust, NAMES)
    longer = {name: pre[name] + 3 * (clean[name] - pre[name]) for name in pre}
    for name in NAMES:
        torch.testing.assert_close(
            Signature.extract(pre, longer, robust, NAMES).layers[name], signature.layers[name], **ROUNDING
        )
        none = Signature.extract(pre, pre, robust, NAMES).layers[name]
        torch.testing.assert_close(none, robust[name] - pre[name], **ROUNDING)


def test_alpha_is_applied_once(states):
    pre, clean, robust = states
    signature = Signature.extract(pre, clean, robust, NAMES)
    half = signature.patch(clean, 0.5)
    for name in NAMES:
        torch.testing.assert_close(half[name] - clean[name], 0.5 * signature.layers[name], **ROUNDING)
    # Two equal patches of a half are one, not a half as in the published code.
    twice = signature.patch(half, 0.5)
    for name in NAMES:
        torch.testing.assert_close(twice[name], signature.patch(clean)[name], **ROUNDING)


def test_on_and_off_in_any_order(states):
    pre, clean, robust = states
    one = Signature.extract(pre, clean, robust, NAMES)
    other = Signature.extract(pre, clean, {k: v.roll(1, 0) if v.ndim else v for k, v in robust.items()}, NAMES[:1])
    assert all(torch.equal(v, clean[k]) for k, v in one.patch(clean, 0).items())
    back = one.patch(one.patch(clean, 0.7), -0.7)
    a, b = other.patch(one.patch(clean)), one.patch(other.patch(clean))
    together = (one + other).patch(clean)
    for name in clean:
        torch.testing.assert_close(back[name], clean[name], **ROUNDING)
        torch.testing.assert_close(a[name], b[name], **ROUNDING)
        torch.testing.assert_close(a[name], together[name], **ROUNDING)
        if name not in NAMES:  # untouched layers are the same bits
            assert torch.equal(a[name], clean[name])
    for name in NAMES:
        torch.testing.assert_close(one.scaled(0.3).patch(clean)[name], one.patch(clean, 0.3)[name], **ROUNDING)


@pytest.mark.parametrize("levels", [2, 3, 16])
def test_quantised_signatures_have_so_many_levels_and_keep_their_ends(states, levels):
    signature = Signature.extract(*states, NAMES)
    coarse = signature.quantised(levels)
    for name, value in coarse.layers.items():
        assert len(value.unique()) <= levels
        own = signature.layers[name]
        assert value.min() == own.min() and value.max() == own.max()
        step = float(own.max() - own.min()) / (levels - 1)
        assert float((value - own).abs().max()) <= step / 2 + 1e-6
    assert coarse.bits(16) == sum(4 * v.numel() + 64 for v in coarse.layers.values())
    assert signature.bits() == 32 * sum(v.numel() for v in signature.layers.values())
    flat = Signature({"w": torch.full((3,), 2.0)}).quantised(levels)
    assert torch.equal(flat.layers["w"], torch.full((3,), 2.0))


def test_a_signature_goes_on_networks_that_have_its_layers(states):
    with pytest.raises(ConfigError, match="Did you mean '0.weight'"):
        Signature({"0.weights": torch.zeros(1)}).patch(states[0])
    assert convolutions(network(0)) == ["0.weight", "3.weight"]
    assert convolutions(network(0), 1) == ["0.weight"]


def members():
    return {name: network(i) for i, name in enumerate(("base", "clean", "fog", "noise"))}


def test_the_maker_patches_moves_norms_and_reports(digits):
    nets = members()
    before = {name: {k: v.clone() for k, v in net.state_dict().items()} for name, net in nets.items()}
    maker = WeightSignature(pre="base", clean="clean", alpha=[0.5, 0.25], layers=1)
    made = maker.make(nets, digits, 0)
    assert all(torch.equal(v, before[name][k]) for name, net in nets.items() for k, v in net.state_dict().items())
    expected = before["clean"]["0.weight"]
    for name, alpha in (("fog", 0.5), ("noise", 0.25)):
        expected = Signature.extract(before["base"], before["clean"], before[name], ["0.weight"]).patch(
            {**before["clean"], "0.weight": expected}, alpha
        )["0.weight"]
    torch.testing.assert_close(made.state["0.weight"], expected, **ROUNDING)
    assert torch.equal(made.state["3.weight"], before["clean"]["3.weight"])
    mean = (before["fog"]["1.running_var"] + before["noise"]["1.running_var"]) / 2
    torch.testing.assert_close(made.state["1.running_var"], 0.25 * before["clean"]["1.running_var"] + 0.75 * mean)
    assert made.report["layers"] == ["0.weight"]
    assert made.report["signatures"]["fog"]["kilobytes"] == pytest.approx(4 * 36 / 1000, abs=0.06)


def test_keeping_or_recomputing_the_norms(digits):
    nets = members()
    kept = WeightSignature(pre="base", clean="clean", norms="keep").make(nets, digits, 0).state
    assert torch.equal(kept["1.running_mean"], nets["clean"].state_dict()["1.running_mean"])
    fresh = WeightSignature(pre="base", clean="clean", norms="recompute", statistics_n=200).make(nets, digits, 0).state
    with torch.no_grad():
        seen = with_state(nets["clean"], kept)[0](digits["train"].images(slice(0, 200)))
    torch.testing.assert_close(fresh["1.running_mean"], seen.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    unchanged = WeightSignature(pre="base", clean="clean", alpha=0).make(nets, digits, 0).state
    assert all(torch.equal(v, nets["clean"].state_dict()[k]) for k, v in unchanged.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pre": "bas", "clean": "clean"}, "pre: unknown model 'bas'. Did you mean 'base'"),
        ({"pre": "base", "clean": "clean", "alpha": (1, 2, 3)}, "3 alphas for 2"),
        ({"pre": "base", "clean": "clean", "layers": ("0.wight",)}, "Did you mean '0.weight'"),
    ],
)
def test_wrong_options(digits, options, message):
    with pytest.raises(ConfigError, match=message):
        WeightSignature(**options).make(members(), digits, 0)


def test_a_suite_trains_on_corruptions_and_patches(tmp_path, tiny_suite):
    quick = {"epochs": 1, "lr": 0.02, "validation_n": 50}
    foggy = {**quick, "augmentation": {"corruptions": ["fog"], "severity": 3}}
    tiny_suite["models"] = [
        {"name": "base", "train": {"defense": "standard", "recipe": {**quick, "epochs": 2, "lr": 0.1}}},
        {"name": "clean", "train": {"defense": "standard", "start": "base", "recipe": quick}},
        {"name": "fog", "train": {"defense": "standard", "start": "base", "recipe": foggy}},
        {
            "name": "patched",
            "make": {
                "name": "weight-signature",
                "of": ["base", "clean", "fog"],
                "pre": "base",
                "clean": "clean",
                "levels": 16,
            },
        },
    ]
    tiny_suite["conditions"], tiny_suite["detectors"], tiny_suite["uq"] = ["clean"], [], []
    summary = run_suite(tiny_suite, tmp_path / "run")
    assert not summary.failures
    about = {m["name"]: m for m in summary.results.models}
    report = about["patched"]["made"]["report"]
    assert report["signatures"]["fog"]["norm"] > 0
    patched = [f for f in (tmp_path / "run/models").iterdir() if '"made"' in (f / "model.json").read_text()]
    assert load_model(str(patched[0])).module is not None


def test_corrupted_views_differ_between_epochs_and_not_between_batches(digits):
    x, ids = digits["train"].images(slice(0, 40)), digits["train"].ids[:40]
    augmentation = Augmentation(corruptions=("gaussian-noise", "fog"), severity=3)
    random = SampleRandom.of(0, ids, "augmentation")
    one, two = augmentation.augment(x, random, 0), augmentation.augment(x, random, 1)
    assert not torch.equal(one, two)
    assert float(one.min()) >= 0 and float(one.max()) <= 1
    index = torch.arange(7, 23)
    torch.testing.assert_close(augmentation.augment(x[index], random.select(index), 0), one[index], rtol=0, atol=0)
    assert torch.equal(Augmentation(corruptions=("fog",), corruption_prob=0).augment(x, random, 0), x)
    with pytest.raises(ConfigError, match="Did you mean 'fog'"):
        Augmentation(corruptions=("fogg",))


def test_keys_of_trainings_without_corruptions_stay_what_they_were(digits):
    network = Architecture("small-cnn", digits.shape, 10)
    keys = [
        training_key(Standard(), network, digits, Recipe(augmentation=Augmentation(**options)), 0)
        for options in ({}, {"severity": 3}, {"corruptions": ("fog",)}, {"corruptions": ("fog",), "severity": 3})
    ]
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3
