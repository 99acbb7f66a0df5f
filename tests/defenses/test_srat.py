"""SRAT: class weights, the three base losses, the separation loss."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from defenses import PGDAT, SRAT, Batch, Task
from defenses.imbalance import (
    effective_number_weights,
    focal,
    inverse_weights,
    ldam,
    ldam_margins,
    weighted_cross_entropy,
)
from defenses.srat import separation_loss
from robustbench_ext.errors import ConfigError, DataError, ModelError
from robustbench_ext.models import load_model

COUNTS = np.array([5000, 5000, 500, 50])


def unit(*shape):
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=1)


# Weights -------------------------------------------------------------------------------------------------------------


def test_class_weights():
    assert inverse_weights(COUNTS).tolist() == [1, 1, 10, 100]
    w = effective_number_weights(COUNTS, 0.9999)
    assert w[3] == pytest.approx(78.89, abs=0.01) and w[0] == 1
    assert np.allclose(effective_number_weights(COUNTS, 0.0), 1)
    # b -> 1: n log b is small, and the relative error of the limit is (n_max - n) (1 - b) / 2.
    assert np.allclose(effective_number_weights(COUNTS, 1 - 1e-10), inverse_weights(COUNTS), rtol=5000 * 1e-10)
    assert np.allclose(inverse_weights(np.full(5, 7)), 1)
    margins = ldam_margins(COUNTS, 0.5)
    assert margins[3] == 0.5 and margins.max() == 0.5
    assert margins[0] / margins[3] == pytest.approx((50 / 5000) ** 0.25)
    with pytest.raises(DataError, match=r"classes \[1\]"):
        inverse_weights(np.array([3, 0, 2]))


def test_scale_of_the_weights_cancels_except_in_focal():
    torch.manual_seed(0)
    z, y = torch.randn(20, 4, dtype=torch.float64), torch.arange(20) % 4
    w, m = torch.from_numpy(inverse_weights(COUNTS)), torch.from_numpy(ldam_margins(COUNTS, 0.5))
    assert torch.allclose(weighted_cross_entropy(z, y, w), weighted_cross_entropy(z, y, 7 * w), atol=1e-12)
    assert torch.allclose(ldam(z, y, w, m, 30.0), ldam(z, y, 7 * w, m, 30.0), atol=1e-12)
    assert not torch.allclose(focal(z, y, w, 1.0, True), focal(z, y, 7 * w, 1.0, True))


def test_base_losses_are_their_formulas():
    torch.manual_seed(0)
    z, y = torch.randn(20, 4, dtype=torch.float64), torch.arange(20) % 4
    w = torch.from_numpy(inverse_weights(COUNTS))
    ce, p = F.cross_entropy(z, y, reduction="none"), z.softmax(1).gather(1, y[:, None])[:, 0]
    assert torch.allclose(weighted_cross_entropy(z, y, w), (w[y] * ce).sum() / w[y].sum(), atol=1e-12)
    inside = ((1 - torch.exp(-w[y] * ce)) ** 1.5 * w[y] * ce).mean()
    assert torch.allclose(focal(z, y, w, 1.5, True), inside, atol=1e-12)
    textbook = (w[y] * (1 - p) ** 1.5 * ce).mean()
    assert torch.allclose(focal(z, y, w, 1.5, False), textbook, atol=1e-12)
    assert torch.allclose(focal(z, y, torch.ones(4), 0.0, True), ce.mean(), atol=1e-12)
    m = torch.from_numpy(ldam_margins(COUNTS, 0.5))
    shifted = z.clone()
    shifted[torch.arange(20), y] -= m[y]
    assert torch.allclose(ldam(z, y, w, m, 3.0), weighted_cross_entropy(3 * shifted, y, w), atol=1e-12)


# Separation ----------------------------------------------------------------------------------------------------------


def plain(h, y, tau):
    """The definition, anchor by anchor."""
    terms = []
    for i in range(len(h)):
        others = [a for a in range(len(h)) if a != i]
        positive = [j for j in others if y[j] == y[i]]
        if positive:
            bottom = sum(math.exp(float(h[i] @ h[a]) / tau) for a in others)
            terms.append(-sum(float(h[i] @ h[j]) / tau - math.log(bottom) for j in positive) / len(positive))
    return sum(terms) / len(terms) if terms else 0.0


def test_separation_is_its_definition():
    torch.manual_seed(0)
    h, y = unit(9, 5), torch.tensor([0, 0, 1, 2, 2, 2, 3, 0, 1])  # class 3 is alone
    assert float(separation_loss(h, y, 0.07)) == pytest.approx(plain(h, y, 0.07), abs=1e-10)


def test_separation_limits_and_invariances():
    torch.manual_seed(0)
    h, y = unit(8, 5), torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    order = torch.randperm(8)
    rotation, _ = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))
    base = separation_loss(h, y, 0.07)
    assert torch.allclose(separation_loss(h[order], y[order], 0.07), base, atol=1e-10)
    assert torch.allclose(separation_loss(h @ rotation, y, 0.07), base, atol=1e-10)
    assert float(separation_loss(unit(2, 5), torch.tensor([1, 1]), 0.07)) == pytest.approx(0, abs=1e-12)
    equal = unit(1, 5).expand(6, 5)
    assert float(separation_loss(equal, torch.zeros(6, dtype=torch.int64), 0.07)) == pytest.approx(
        math.log(5), abs=1e-10
    )
    together = F.normalize(h + 2 * F.one_hot(y, 5).double(), dim=1)
    assert separation_loss(together, y, 0.07) < base


def test_anchors_without_a_positive_are_skipped_and_gradients_stay_finite():
    torch.manual_seed(0)
    h = unit(6, 5).requires_grad_(True)
    for y in (torch.arange(6), torch.tensor([0, 0, 0, 0, 0, 1])):
        loss = separation_loss(h, y, 0.07)
        (g,) = torch.autograd.grad(loss, h)
        assert torch.isfinite(loss) and torch.isfinite(g).all()
    assert float(separation_loss(h, torch.arange(6), 0.07).detach()) == 0.0


# The defense ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def setting():
    torch.manual_seed(0)
    model = load_model("small-cnn", shape=(1, 8, 8)).module
    x = torch.rand(24, 1, 8, 8)
    y = torch.arange(24) % 10
    task = Task(np.array([100] * 5 + [10] * 5), (1, 8, 8), 10)
    return model, Batch(x, y, (x + 0.1).clamp(0, 1), eps=0.1, epoch=9, epochs=10), task


@pytest.mark.parametrize("base", ["ce", "focal", "ldam"])
@pytest.mark.parametrize("weights", ["inverse", "effective", "none"])
def test_every_combination_gives_gradients_to_model_and_head(base, weights, setting):
    model, batch, task = setting
    srat = SRAT(base=base, weights=weights, defer=0)
    state = srat.state(model, task)
    loss = srat.loss(model, batch, state)
    loss.value.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in (*model.parameters(), *state.parameters()))
    assert torch.allclose(loss.value, loss.logs["classification"] + 2 * loss.logs["separation"], atol=1e-5)


def test_what_is_not_used_needs_no_samples_of_every_class(setting):
    model, batch, _ = setting
    empty = Task(np.array([100] * 9 + [0]), (1, 8, 8), 10)
    SRAT(weights="none").loss(model, batch, SRAT(weights="none").state(model, empty))
    for options in ({}, {"weights": "none", "base": "ldam"}):
        with pytest.raises(DataError, match="classes"):
            SRAT(**options).state(model, empty)


def test_the_separation_is_computed_in_float32_under_autocast(setting):
    model, batch, task = setting
    model.eval()
    srat = SRAT()
    state = srat.state(model, task)
    seen = []
    handle = state.register_forward_hook(lambda _, __, h: seen.append(h.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        loss = srat.loss(model, batch, state)
    handle.remove()
    assert seen == [torch.float32] and loss.logs["separation"].dtype == torch.float32


def test_deferred_weights(setting):
    model, batch, task = setting
    model.eval()  # the same logits twice
    srat = SRAT(lam=0, defer=0.95)
    state = srat.state(model, task)
    early = srat.loss(model, batch, state).value  # progress 0.9
    assert torch.allclose(early, PGDAT().loss(model, batch).value, atol=1e-6)
    late = SRAT(lam=0, defer=0.9).loss(model, batch, state).value
    w = torch.from_numpy(inverse_weights(task.counts)).float()
    assert torch.allclose(late, F.cross_entropy(model(batch.x_adv), batch.y, weight=w), atol=1e-6)
    assert not torch.allclose(early, late, atol=1e-4)


def test_the_head_is_not_part_of_the_model_and_sees_the_penultimate_features(setting):
    model, batch, task = setting
    keys = set(model.state_dict())
    srat = SRAT()
    state = srat.state(model, task)
    assert set(model.state_dict()) == keys
    assert state.layers[0].in_features == 64
    caught = []
    handle = state.layers.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    srat.loss(model, batch, state)
    handle.remove()
    relu = torch.relu  # fc2 reads relu(fc1(...)): no negative features
    assert torch.equal(caught[0], relu(caught[0])) and caught[0].shape == (24, 64)
    assert not model.fc2._forward_pre_hooks


def test_a_cosine_head_gives_scaled_cosines_and_a_penultimate_tap():
    from robustbench_ext.models import observe

    model = load_model("small-cnn", shape=(1, 8, 8), kwargs={"cosine_head": True}).module.eval()
    x = torch.rand(5, 1, 8, 8)
    seen = observe(model, x, torch.zeros(5, dtype=torch.int64), ["penultimate"])
    h = seen.features["penultimate"]
    expected = 30 * F.normalize(h, dim=1) @ F.normalize(model.fc2.linear.weight, dim=1).T
    assert torch.allclose(seen.logits, expected.detach(), atol=1e-4)
    assert float(seen.logits.abs().max()) <= 30 + 1e-4


def test_errors(setting):
    model, batch, task = setting
    with pytest.raises(ConfigError, match="projection head"):
        SRAT().loss(model, batch)
    with pytest.raises(ModelError, match="linear layer"):
        SRAT().state(torch.nn.Sequential(torch.nn.Conv2d(1, 10, 8), torch.nn.Flatten()), task)
    for options, message in (
        ({"base": "mse"}, "ce, focal, ldam"),
        ({"tau": 0}, "tau"),
        ({"b": 1}, "b in"),
        ({"defer": 160}, "between"),
    ):
        with pytest.raises(ConfigError, match=message):
            SRAT(**options)
