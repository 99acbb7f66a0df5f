"""Planted defects, each caught with its reason."""

import numpy as np
import pytest
import torch
from torch import nn

from robustbench_ext.data import ArraySplit
from robustbench_ext.models import wrap
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
    def forward(self, x):
        return torch.round(x * 16) / 16


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
        (lambda m: nn.Sequential(Rounding(), m), "gradients", "doubt"),
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
        (lambda m: nn.Linear(7, 7), "in-place changes", "fail"),
    ],
)
def test_planted_defects(change, name, status, digits_model, digits):
    torch.manual_seed(0)
    result, checks = found(change(digits_model), digits["test"])
    assert checks[name].status == status, checks
    assert checks[name].hint or status == "fail"
    assert result == status or (result == "fail" and status == "doubt")


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
