"""Planted defects, each caught with its reason."""

import json
import math

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from defenses import PGDAT
from defenses.trainer import Architecture, Recipe, train
from robustbench_ext.cli.main import app
from robustbench_ext.data import ArraySplit
from robustbench_ext.engine import run_suite
from robustbench_ext.models import load_model, wrap
from robustbench_ext.preflight import CHANCE, _accuracy, preflight, verdict


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


# Better than a guess? -----------------------------------------------------------------------------------------------------


def outputs_of(labels, right, classes):
    """Logits that are right for the first `right` samples and wrong for the others."""
    said = [y if i < right else (y + 1) % classes for i, y in enumerate(labels)]
    return nn.functional.one_hot(torch.tensor(said), classes).float()


@pytest.mark.parametrize(
    ("labels", "right", "classes", "status"),
    [
        ([0, 1] * 32, 46, 2, "pass"),  # P(X >= 46) = 0.0003 where X ~ B(64, 1/2)
        ([0, 1] * 32, 42, 2, "pass"),  # 0.0085
        ([0, 1] * 32, 41, 2, "doubt"),  # 0.016
        ([0] * 58 + [1] * 6, 58, 2, "doubt"),  # what always answering 0 reaches
        ([0] * 58 + [1] * 6, 64, 2, "pass"),  # ((58 / 64)^2 + (6 / 64)^2)^64 = 7e-6
        ([1] * 13 + [0] * 51, 58, 2, "pass"),  # always answering 0 reaches 51
        (list(range(10)) * 6 + [0, 1, 2, 3], 12, 10, "doubt"),  # 0.03 where p is about 1 / 10
        (list(range(10)) * 6 + [0, 1, 2, 3], 15, 10, "pass"),  # 0.002
        (list(range(64)), 5, 1000, "pass"),  # of a thousand outputs
        (list(range(64)), 1, 1000, "doubt"),  # 0.63: one sample is what a constant answer gets
        ([3] * 20, 20, 10, "pass"),  # one class alone says nothing of constant answers
        ([3] * 20, 2, 10, "doubt"),  # of one in ten it does
        ([0, 1, 2], 3, 10, "pass"),  # too few to tell: (1/3)^3 = 0.037
        ([0, 1, 2], 0, 10, "pass"),
    ],
)
def test_no_better_than_a_guess(labels, right, classes, status):
    """The tail of the binomial distribution, summed here term by term; the level is 1 %."""
    check = _accuracy(outputs_of(labels, right, classes), torch.tensor(labels))
    n, said = len(labels), outputs_of(labels, right, classes).argmax(1).tolist()
    agreement = sum(said.count(k) * labels.count(k) for k in range(classes)) / n**2
    chance = max(1 / classes, agreement if len(set(labels)) > 1 else 0.0)
    tail = sum(math.comb(n, k) * chance**k * (1 - chance) ** (n - k) for k in range(right, n + 1))
    assert check.status == status
    assert (tail < CHANCE) == (status == "pass") or chance**n >= CHANCE
    assert f"{right} of {n}" in check.message
    if status == "doubt":
        assert f"p = {tail:.2g}" in check.message
        assert f"{100 * chance:.3g} %" in check.message


# Memory -----------------------------------------------------------------------------------------------------------------


class Hungry(nn.Module):
    """A model that fits with some inputs at a time and not with more."""

    def __init__(self, inner, most):
        super().__init__()
        self.inner, self.most = inner, most

    def forward(self, x):
        if len(x) > self.most:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {len(x)} MiB")
        return self.inner(x)


def test_out_of_memory_is_not_the_models_fault(digits_model, digits):
    with pytest.raises(torch.OutOfMemoryError):
        preflight(Hungry(digits_model, 20), digits["test"])
    result, checks = found(Hungry(digits_model, 64), digits["test"])
    assert result == "pass", checks


@pytest.mark.parametrize("batch_size", [250, 32])
def test_where_memory_is_short_the_checks_look_at_fewer_samples(digits_model, digits, tmp_path, batch_size):
    suite = {
        "schema": 1,
        "name": "s",
        "data": "digits",
        "n": 40,
        "batch_size": batch_size,
        "models": [{"name": "m", "spec": "given"}],
    }
    done = run_suite(suite, tmp_path / "run", models={"m": Hungry(digits_model, 20)})
    assert not done.failures and done.verdict == "pass"
    (accuracy,) = (check for check in done.results.preflight if check.name == "accuracy")
    assert "of 16 samples correct" in accuracy.message  # 64, 32, 16
    roomy = run_suite(suite, tmp_path / "roomy", models={"m": Hungry(digits_model, 64)})
    (accuracy,) = (check for check in roomy.results.preflight if check.name == "accuracy")
    assert "of 64 samples correct" in accuracy.message  # whatever the batch size
    assert roomy.results.results == done.results.results


def test_a_model_of_which_no_input_fits_is_a_failure_of_the_machine(digits_model, tmp_path):
    suite = {"schema": 1, "name": "s", "data": "digits", "n": 20, "models": [{"name": "m", "spec": "given"}]}
    done = run_suite(suite, tmp_path, models={"m": Hungry(digits_model, 0)})
    errors = {failure.what: failure.error for failure in done.failures}
    assert "out of memory with a single input" in errors["m · preflight"]
    assert not done.results.preflight


def test_regressors_are_halved_too():
    from robustbench_ext.data import load_dataset
    from robustbench_ext.models.tabular import load_regressor
    from robustbench_ext.regression_preflight import preflight_regressor

    data = load_dataset("diabetes")
    module = load_regressor("mlp", data).module
    with pytest.raises(torch.OutOfMemoryError):
        preflight_regressor(Hungry(module, 60), data)
    assert {c.name for c in preflight_regressor(Hungry(module, 60), data, 60)} >= {"forward pass", "determinism"}


def test_the_command_halves_too(tmp_path, monkeypatch):
    (tmp_path / "net.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.f = torch.nn.Linear(64, 10)\n"
        "    def forward(self, x):\n"
        "        if len(x) > 20:\n"
        "            raise torch.OutOfMemoryError('no')\n"
        "        return self.f(x.flatten(1))\n"
    )
    said = CliRunner().invoke(app, ["check", "--model", f"{tmp_path}/net.py:Net", "--data", "digits", "--json"])
    checks = {c["name"]: c for c in json.loads(said.output)["checks"]}
    assert "of 16 samples correct" in checks["accuracy"]["message"]
