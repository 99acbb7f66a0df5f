"""What makes attacks fast must not change them: cheaper input gradients, fused forward passes."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from robustbench_ext.attacks import Square, build_attack
from robustbench_ext.models import load_model
from robustbench_ext.models.contract import frozen_eval
from robustbench_ext.models.gradients import InputGradients
from robustbench_ext.models.inference import Inference, inference, shared_copies


def net(channels=1, **conv):
    torch.manual_seed(0)
    body = nn.Sequential(
        nn.Conv2d(channels, 6, **{"kernel_size": 5, "stride": 2, "padding": 2, **conv}),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3, 2, 1, bias=False),
        nn.BatchNorm2d(4, affine=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.LazyLinear(3),
    ).double()
    with torch.no_grad():
        body.train()
        for _ in range(3):
            body(torch.rand(20, channels, 13, 11, dtype=torch.float64))  # statistics that are not 0 and 1
    return body


def input_gradient(model, x, fast):
    x = x.clone().requires_grad_(True)
    with frozen_eval(model):
        if fast:
            with InputGradients():
                logits = model(x)
                return logits.detach(), torch.autograd.grad(logits.square().sum(), x)[0]
        logits = model(x)
        return logits.detach(), torch.autograd.grad(logits.square().sum(), x)[0]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "conv",
    [
        {},
        {"kernel_size": 3, "stride": 1, "padding": 1},
        {"kernel_size": 4, "stride": 3, "padding": 0, "bias": False},
        {"kernel_size": (3, 5), "stride": (1, 2), "padding": (0, 2)},
        {"dilation": 2, "padding": 3},
        {"padding": "valid"},
        {"padding_mode": "reflect"},
    ],
    ids=str,
)
def test_frozen_gradients_are_the_plain_ones(channels, conv):
    model = net(channels, **conv)
    x = torch.rand(5, channels, 13, 11, dtype=torch.float64)
    (logits, gradient), (fast_logits, fast_gradient) = (input_gradient(model, x, fast) for fast in (False, True))
    assert torch.equal(logits, fast_logits)  # the forward pass is PyTorch's own
    assert torch.allclose(gradient, fast_gradient, rtol=1e-12, atol=1e-14)


def test_frozen_gradients_leave_what_learns_alone():
    """Parameters that want gradients, and batch norms in training mode, go the ordinary way."""
    model, x = net(), torch.rand(6, 1, 13, 11, dtype=torch.float64)
    for mode in (False, True):
        model.train(mode)
        expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
        before = {k: v.clone() for k, v in model.state_dict().items()}
        with InputGradients():
            found = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
        if not mode:
            assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_frozen_gradients_of_grouped_and_functional_layers():
    weight = torch.rand(4, 1, 3, 3)
    x = torch.rand(3, 4, 8, 8, requires_grad=True)
    with InputGradients():
        out = F.conv2d(x, weight, None, 1, 1, 1, 4)
        (found,) = torch.autograd.grad(out.sum(), x)
    (expected,) = torch.autograd.grad(F.conv2d(x, weight, None, 1, 1, 1, 4).sum(), x)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["small-cnn", "small-resnet"])
def test_the_fused_copy_agrees_within_rounding(name):
    model = load_model(name, shape=(1, 28, 28), num_classes=10).module
    x = torch.rand(8, 1, 28, 28)
    with frozen_eval(model):
        copy = Inference(model, x)
        assert copy.fused
        for n in (1, 3, 8):
            assert torch.allclose(copy(x[:n]), model(x[:n]), rtol=1e-4, atol=1e-4)


class Branching(nn.Module):
    """Takes another way for bright inputs: a trace knows only the way that was taken."""

    def forward(self, x):
        z = x.flatten(1)[:, :3]
        return z * 5 if x.mean() > 0.5 else -z


class Untraceable(nn.Module):
    def forward(self, x):
        return torch.tensor(x.flatten(1)[:, :3].tolist()) if not x.requires_grad else x.flatten(1)[:, :3]


def test_a_copy_that_differs_is_given_up():
    dark, bright = torch.full((4, 1, 2, 2), 0.2), torch.full((4, 1, 2, 2), 0.9)
    model = Branching().eval()
    copy = Inference(model, dark)
    assert torch.allclose(copy(dark), model(dark))
    copy.check(bright)
    assert not copy.fused
    assert torch.equal(copy(bright), model(bright))


def test_randomised_models_and_odd_ones_are_not_copied():
    x = torch.rand(4, 1, 2, 2)

    class Noisy(nn.Module):
        def forward(self, x):
            return x.flatten(1)[:, :3] + torch.randn(len(x), 3)

    assert not Inference(Noisy().eval(), x).fused
    odd = Inference(Untraceable().eval(), x)
    assert torch.allclose(odd(x * 0.5), x.flatten(1)[:, :3] * 0.5)


def test_copies_are_shared_inside_the_block_only():
    model, x = Branching().eval(), torch.full((4, 1, 2, 2), 0.2)
    with shared_copies():
        assert inference(model, x) is inference(model, x)
        with shared_copies():
            inner = inference(model, x)
        assert inference(model, x) is inner
    assert inference(model, x) is not inference(model, x)


def test_breaks_found_with_a_copy_are_confirmed_by_the_model(digits_model, digits_test):
    x, y, ids = (v[:80] for v in digits_test)
    result = Square(eps=0.15, queries=600)(digits_model, x, y, ids=ids)
    with torch.no_grad():
        own = digits_model(result.x_adv).argmax(1) != y
    assert torch.equal(own, result.broken)
    assert int(result.forwards.max()) <= 600 + 1
    assert int(result.broken.sum()) > 0


def test_bfloat16_searches_and_float32_judges(digits_model, digits_test):
    x, y, ids = (v[:80] for v in digits_test)
    rough = build_attack("apgd-ce", eps=0.15, steps=15, precision="bfloat16")(digits_model, x, y, ids=ids)
    exact = build_attack("apgd-ce", eps=0.15, steps=15)(digits_model, x, y, ids=ids)
    with torch.no_grad():
        own = digits_model(rough.x_adv)
    assert torch.equal(own.argmax(1) != y, rough.broken)
    assert torch.allclose(own, rough.logits, atol=1e-4) or bool((~rough.broken).any())
    assert abs(int(rough.broken.sum()) - int(exact.broken.sum())) <= 4
