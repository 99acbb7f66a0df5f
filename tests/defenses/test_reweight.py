"""Weights by loss: the specification's invariants."""

import math

import pytest
import torch

from defenses.base import Batch
from defenses.reweight import SHAPES, Reweight, loss_weights
from robustbench_ext.errors import ConfigError

LOSSES = torch.tensor([0.1, 0.5, 1.0, 2.0, 4.0])


def test_the_specified_example():
    weights = loss_weights(LOSSES) / len(LOSSES)  # ours have mean 1, the specification's have sum 1
    expected = torch.tensor([0.1089, 0.1337, 0.1728, 0.2886, 0.2960], dtype=torch.float64)
    torch.testing.assert_close(weights, expected, rtol=0, atol=5e-5)  # four digits are given


@pytest.mark.parametrize("shape", SHAPES)
def test_what_holds_for_every_shape(shape):
    weights = loss_weights(LOSSES, shape, 1.3, 0.7)
    assert float(weights.mean()) == pytest.approx(1.0, abs=1e-12)
    assert float(weights.min()) > 0
    assert not weights.requires_grad
    torch.testing.assert_close(
        loss_weights(3 * LOSSES + 5, shape, 1.3, 0.7), weights, rtol=1e-5, atol=0
    )  # float32 losses
    torch.testing.assert_close(loss_weights(torch.full((4,), 2.0), shape), torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(
        loss_weights(LOSSES, shape, r=1e9), torch.ones(5, dtype=torch.float64), rtol=0, atol=1e-8
    )


def test_linupper_is_bounded_and_flat_above_the_middle():
    weights = loss_weights(torch.tensor([0.0, 1.0, 2.0, 2.5, 3.0, 4.0]), "linupper", 2.0, 0.5)
    assert float(weights.max() / weights.min()) == pytest.approx(math.exp(2.0 / 0.5))
    assert len(weights[2:].unique()) == 1
    assert bool((weights[:3].diff() > 0).all())


def test_the_other_shapes():
    losses = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0])
    quadratic = loss_weights(losses, "quadratic")
    assert quadratic[0] == quadratic[4] == quadratic.min()
    assert quadratic.argmax() == 2
    extremes = loss_weights(losses, "extremes")
    assert extremes[0] == extremes[4] == extremes.max()
    upper = loss_weights(losses, "upper")
    assert bool((upper.diff() > 0).all())


def test_no_gradient_flows_through_the_weights(digits_model, digits_test):
    x, y = digits_test[0][:16], digits_test[1][:16]
    batch = Batch(x, y, x, epoch=5, epochs=10)
    digits_model.zero_grad()
    Reweight(base="standard").loss(digits_model, batch).value.backward()
    got = digits_model.fc2.weight.grad.clone()
    digits_model.zero_grad()
    losses = torch.nn.functional.cross_entropy(digits_model(x), y, reduction="none")
    (loss_weights(losses).float() * losses).mean().backward()
    torch.testing.assert_close(got, digits_model.fc2.weight.grad)
    digits_model.zero_grad()
    early = Reweight(base="standard", burn_in=0.6).loss(digits_model, batch)
    assert early.value.item() == pytest.approx(float(losses.detach().mean()), rel=1e-6)


def test_wrong_options():
    for options in ({"shape": "upside"}, {"delta": 0}, {"r": -1}, {"base": "trades"}):
        with pytest.raises(ConfigError):
            Reweight(**options)
    assert Reweight(base="standard").attack(None, 1, None) is None
