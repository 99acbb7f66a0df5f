"""Planted defects, each caught with its reason."""

import numpy as np
import pytest
import torch
from torch import nn

from defenses import PGDAT
from defenses.trainer import Architecture, Recipe, train
from robustbench_ext.data import ArraySplit
from robustbench_ext.models import load_model, wrap
from robustbench_ext.preflight import preflight, verdict


def found(model, split):
    checks = preflight(model, split)
    return verdict(checks), {c.name: c for c in checks}


def test_a_sound_model_passes_and_is_handed_back_as_it_was(digits_model, digits):
    digits_model.train()
    before = {k: v.clone() for k, v in digits_model.state_dict().items()}
    result, checks = found(digits_model, digits["test"])
    assert digits_model.training
    digits_model.eval()
    assert result == "pass", checks
    assert {"input range", "mode", "logits", "determinism", "gradients", "eps = 0", "labels"} <= set(checks)
    assert all(torch.equal(v, before[k]) for k, v in digits_model.state_dict().items())
    assert "training mode" in checks["mode"].message


class Noisy(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        z = self.inner(x)
        return z + torch.randn_like(z)


class Rounding(nn.Module):
    def __init__(self, straight_through=False, levels=16):
        super().__init__()
        self.straight_through, self.levels = straight_through, levels

    def forward(self, x):
        rounded = torch.round(x * self.levels) / self.levels
        return x + (rounded - x).detach() if self.straight_through else rounded


class Scaled(nn.Module):
    def __init__(self, inner, factor):
        super().__init__()
        self.inner, self.factor = inner, factor

    def forward(self, x):
        return self.inner(x) * self.factor


class Steep(nn.Module):
    """A step that is differentiable in name only: its gradients are exact, and lead nowhere."""

    def forward(self, x):
        return torch.sigmoid(200 * (x - 0.5))


class Clamping(nn.Module):
    def forward(self, x):
        return x.clamp_(max=0.3)


class Shifted(nn.Module):
    """Undoes (x - 0.5) / 0.5, so that raw images come out wrong."""

    def forward(self, x):
        return 0.5 * x + 0.5


class Detaching(nn.Module):
    def forward(self, x):
        return x.detach()


@pytest.mark.parametrize(
    ("change", "name", "status"),
    [
        (lambda m: nn.Sequential(m, nn.Softmax(1)), "logits", "fail"),
        (lambda m: nn.Sequential(m, nn.LogSoftmax(1)), "logits", "doubt"),
        (lambda m: nn.Sequential(m, nn.Threshold(1e9, float("nan"))), "forward pass", "fail"),
        (Noisy, "determinism", "fail"),
        (lambda m: nn.Sequential(Rounding(), m), "gradients", "fail"),
        (lambda m: nn.Sequential(Rounding(), m), "layers", "doubt"),
        (lambda m: nn.Sequential(Rounding(levels=4), m), "huge budget", "doubt"),
        (lambda m: nn.Sequential(Rounding(straight_through=True), m), "gradients", "doubt"),
        (lambda m: nn.Sequential(Rounding(straight_through=True, levels=255), m), "gradients", "doubt"),
        (lambda m: Scaled(m, 1000.0), "gradients", "fail"),
        (Noisy, "gradients", "doubt"),
        (lambda m: nn.Sequential(Detaching(), m), "gradients", "fail"),
        (
            lambda m: nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64, track_running_stats=False), nn.Linear(64, 10)),
            "batch independence",
            "fail",
        ),
        (lambda m: nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), "accuracy", "doubt"),
        (lambda m: nn.Sequential(Clamping(), m), "in-place changes", "fail"),
        (lambda m: wrap(m, [0.9], [0.05]), "normalisation", "doubt"),  # it was trained on raw images
        (lambda m: nn.Sequential(Shifted(), m), "normalisation", "doubt"),  # it wants (x - 0.5) / 0.5
        (lambda m: nn.Sequential(nn.Flatten(), nn.Linear(64, 5)), "labels", "fail"),
        (lambda m: nn.Linear(7, 7), "forward pass", "fail"),
    ],
)
def test_planted_defects(change, name, status, digits_model, digits):
    torch.manual_seed(0)
    result, checks = found(change(digits_model), digits["test"])
    assert checks[name].status == status, checks
    assert checks[name].hint or status == "fail"
    assert result == status or (result == "fail" and status == "doubt")


def test_a_saturated_softmax_is_told_from_a_layer_that_rounds(digits_model, digits):
    """Users have to know which: another loss helps against the first only."""
    saturated = found(Scaled(digits_model, 1000.0), digits["test"])[1]
    assert "softmax saturates" in saturated["gradients"].message
    assert "apgd-dlr" in saturated["gradients"].hint
    assert saturated["huge budget"].status == "pass"  # the margin's gradient leads somewhere
    rounded = found(nn.Sequential(Rounding(levels=4), digits_model), digits["test"])[1]
    assert "quantised or non-differentiable" in rounded["gradients"].message
    assert "RoundBackward" in rounded["layers"].message
    assert "accuracy stays at 1" in rounded["huge budget"].message


def test_the_hint_to_a_randomised_model_names_the_attack(digits_model, digits):
    assert "`rand`" in found(Noisy(digits_model), digits["test"])[1]["determinism"].hint


def test_exact_gradients_that_lead_nowhere(mnist_model, mnist):
    _, checks = found(nn.Sequential(Steep(), mnist_model), mnist["test"])
    assert checks["huge budget"].status == "doubt"
    assert "of 16 under a budget that allows any image" in checks["huge budget"].message


class Cliff(nn.Module):
    """Changes little, with a gradient of some 1e5 where the first pixel is just above a half."""

    def forward(self, x):
        height = (x[:, :, :1, :1] - 0.5).clamp_min(0.0) + 1e-14
        return x + 100.0 * height.sqrt() * (height < 1e-3)


def test_exploding_gradients(digits_model, digits):
    split = digits["test"]
    x = split.images(slice(0, 64)).clone()
    x[0, 0, 0, 0] = 0.5 + 6e-8
    _, checks = found(nn.Sequential(Cliff(), digits_model), ArraySplit(x, split.labels[:64], split.ids[:64]))
    assert checks["gradients"].status == "doubt"
    assert "explode" in checks["gradients"].message


class FakeQuantize(nn.Module):
    def forward(self, x):
        return x


def test_layers_that_quantise_are_named(digits_model, digits):
    _, checks = found(nn.Sequential(FakeQuantize(), digits_model), digits["test"])
    assert checks["layers"].status == "doubt"
    assert "FakeQuantize (0)" in checks["layers"].message
    digits_like = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    digits_like.register_buffer("codes", torch.zeros(3, dtype=torch.int8))
    assert "torch.int8 numbers (codes)" in found(digits_like, digits["test"])[1]["layers"].message


def test_ordinary_networks_raise_none_of_the_gradient_checks(mnist_model, mnist, digits, tmp_path):
    """Standard, adversarially trained, and a deep one with random weights."""
    from torchvision.models import resnet18

    recipe = Recipe(epochs=4, eps=0.1, attack_steps=2, validation_n=50, validation_steps=1)
    train(PGDAT(), Architecture("small-cnn", digits.shape, 10), digits, recipe, tmp_path / "model")
    robust = load_model(str(tmp_path / "model")).module
    torch.manual_seed(0)
    noise = ArraySplit(torch.rand(8, 3, 64, 64), np.arange(8), np.array([str(i) for i in range(8)]))
    for model, split in ((mnist_model, mnist["test"]), (robust, digits["test"]), (resnet18(num_classes=10), noise)):
        _, checks = found(model, split)
        assert {checks[name].status for name in ("gradients", "layers", "huge budget")} == {"pass"}, checks


@pytest.mark.parametrize(
    ("change", "status", "word"),
    [
        (lambda x: (x - 0.45) / 0.22, "fail", "ImageNet-normalised"),
        (lambda x: x * 255, "fail", "divide by 255"),
        (lambda x: x / 255, "doubt", "divided by 255 twice"),
    ],
)
def test_wrong_inputs(change, status, word, digits_model, digits):
    split = digits["test"]
    x = change(split.images(slice(0, 64)))
    wrong = ArraySplit(x, split.labels[:64], split.ids[:64])
    result, checks = found(digits_model, wrong)
    assert checks["input range"].status == status
    assert word in checks["input range"].message + checks["input range"].hint
    assert result in (status, "fail")


def test_labels_out_of_range(digits_model, digits):
    split = digits["test"]
    wrong = ArraySplit(split.images(slice(0, 30)), np.full(30, 11), split.ids[:30])
    assert found(digits_model, wrong)[1]["labels"].status == "fail"


def test_a_normalising_layer_inside_a_normalised_model_is_noticed(digits_model, digits):
    class Normalize(nn.Module):
        def forward(self, x):
            return (x - 0.3) / 0.4

    _, checks = found(wrap(nn.Sequential(Normalize(), digits_model), [0.3], [0.4]), digits["test"])
    assert checks["normalisation"].status == "doubt"
    assert "twice" in checks["normalisation"].message
