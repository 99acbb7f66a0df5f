"""VoG: the specification's invariants, and the mistakes of published code that it warns of."""

import numpy as np
import pytest
import torch
from torch import nn

from detectors.vog import VoG, class_normalised, vog
from robustbench_ext.errors import ConfigError, DataError, NotFittedError
from tests.robustbench_ext.second_device import DEVICE, second_device


class Net(nn.Module):
    """A small network with batch norm, so that mode and batches matter."""

    def __init__(self, seed, scale=1.0):
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(36, 4))
        self.body[1].running_mean.normal_()
        self.body[1].running_var.uniform_(0.5, 2)
        self.scale = scale

    def forward(self, x):
        return self.scale * self.body(x)


class Plane(nn.Module):
    """Logits that are linear in the input, beside what does not depend on the class."""

    def __init__(self, weight, bias=0.0, shared=None):
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(torch.tensor(bias))
        self.register_buffer("shared", torch.zeros(weight.shape[0]) if shared is None else shared)

    def forward(self, x):
        flat = x.flatten(1)
        return flat @ self.weight + self.bias + (flat @ self.shared)[:, None]


@pytest.fixture
def networks():
    return [Net(seed) for seed in range(4)]


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    return torch.rand(9, 3, 5, 5, generator=generator), torch.randint(0, 4, (9,), generator=generator)


def maps(networks, x, y):
    """Gradients one sample and one checkpoint at a time, by another route: (T, N, H, W)."""
    found = []
    for network in networks:
        network.eval()
        jacobian = torch.func.vmap(torch.func.jacrev(lambda one, network=network: network(one[None])[0]))(x)
        found.append(jacobian[torch.arange(len(x)), y].detach().double().mean(dim=1).numpy())
    return np.stack(found)


def test_it_is_the_mean_over_pixels_of_the_standard_deviation_over_checkpoints(networks, batch):
    x, y = batch
    found = vog(networks, x, y).numpy()
    # Gradients are float32: 2^-24 relative, some hundred additions each.
    np.testing.assert_allclose(found, maps(networks, x, y).std(axis=0).mean(axis=(1, 2)), rtol=1e-5)
    assert found.min() > 0
    # Not of the variances, as the name says.
    assert not np.allclose(found, maps(networks, x, y).var(axis=0).mean(axis=(1, 2)), rtol=0.01)


def test_only_the_checkpoints_that_are_given_count(networks, batch):
    """Published code divides sums over all checkpoints by the length of a window."""
    x, y = batch
    for window in (slice(0, 2), slice(2, 4), slice(1, 4)):
        expected = maps(networks[window], x, y).std(axis=0).mean(axis=(1, 2))
        np.testing.assert_allclose(vog(networks[window], x, y).numpy(), expected, rtol=1e-5)


def test_gradients_of_passes_do_not_add_up(networks, batch):
    """Published code never sets the input's gradient to zero between checkpoints."""
    x, y = batch
    x.requires_grad_(True)
    first = vog(networks, x, y)
    assert x.grad is None
    torch.testing.assert_close(vog(networks, x, y), first, rtol=0, atol=0)
    summed = np.cumsum(maps(networks, x.detach(), y), axis=0).std(axis=0).mean(axis=(1, 2))
    assert (np.abs(first.numpy() - summed) > 0.05 * summed).all()


def test_it_looks_at_logits_and_not_at_probabilities():
    """What all logits share leaves probabilities alone, and moves logits: published code sees the former only."""
    torch.manual_seed(0)
    weight, x, y = torch.randn(12, 4), torch.rand(5, 3, 2, 2), torch.tensor([0, 1, 2, 3, 0])
    moving = [Plane(weight, shared=torch.full((12,), float(t))) for t in range(3)]
    probabilities = [network(x).softmax(dim=1) for network in moving]
    for p in probabilities[1:]:
        torch.testing.assert_close(p, probabilities[0])
    expected = np.std([0.0, 1.0, 2.0])  # the shared slope at every pixel
    np.testing.assert_allclose(vog(moving, x, y).numpy(), expected, rtol=1e-5)


def test_what_does_not_move_scores_nothing(networks, batch):
    x, y = batch
    for still in ([networks[0]], [networks[0], Net(0), Net(0)]):
        assert torch.equal(vog(still, x, y), torch.zeros(len(x), dtype=torch.float64))
    torch.manual_seed(0)
    weight = torch.randn(75, 4)
    same_slopes = [Plane(weight, bias) for bias in (0.0, 1.0, -3.0)]
    assert torch.equal(vog(same_slopes, x, y), torch.zeros(len(x), dtype=torch.float64))


def test_the_scale_of_logits_scales_it_and_leaves_the_normalised_score(networks, batch):
    x, y = batch
    raw = vog(networks, x, y)
    for scale in (-2.0, 3.0):
        scaled = vog([Net(seed, scale) for seed in range(4)], x, y)
        torch.testing.assert_close(scaled, abs(scale) * raw, rtol=1e-5, atol=0)
        found, expected = (class_normalised(v.numpy(), y.numpy()) for v in (scaled, raw))
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)  # spreads are a tenth of the scores or less


@pytest.mark.parametrize("size", [1, 2, 4, 9, 100])
def test_batches_do_not_matter(networks, batch, size):
    x, y = batch
    torch.testing.assert_close(vog(networks, x, y, batch_size=size), vog(networks, x, y), rtol=1e-5, atol=1e-9)


def test_neither_does_the_order_of_checkpoints(networks, batch):
    x, y = batch
    torch.testing.assert_close(vog(networks[::-1], x, y), vog(networks, x, y), rtol=1e-12, atol=0)


def test_without_labels_the_last_checkpoints_prediction_stands_for_them(networks, batch):
    x, _ = batch
    predicted = networks[-1].eval()(x).argmax(dim=1)
    assert torch.equal(vog(networks, x), vog(networks, x, predicted))
    assert not torch.allclose(vog(networks, x), vog(networks, x, (predicted + 1) % 4))


def test_channels_are_averaged_before_the_spread_is_taken():
    """Slopes that move in opposite directions in two channels have a mean that stands still."""
    x, y = torch.rand(3, 2, 2, 2), torch.zeros(3, dtype=torch.int64)

    def opposite(t):
        weight = torch.ones(2, 4, 2)
        weight[0] += t
        weight[1] -= t
        return Plane(weight.reshape(8, 2))

    assert float(vog([opposite(t) for t in (0.0, 1.0, 4.0)], x, y).max()) < 1e-7


def test_embeddings_have_no_channels(networks):
    x, y = torch.randn(4, 5, 6), torch.tensor([0, 1, 0, 1])  # not confined to [0, 1]
    torch.manual_seed(0)
    several = [Plane(torch.randn(30, 2)) for _ in range(3)]
    slopes = np.stack([network.weight.detach().numpy()[:, y].T for network in several])
    np.testing.assert_allclose(vog(several, x, y).numpy(), slopes.std(axis=0).mean(axis=1), rtol=1e-6)


def test_networks_are_left_as_they_were(networks, batch):
    x, y = batch
    networks[0].train()
    before = [{k: v.clone() for k, v in n.state_dict().items()} for n in networks]
    vog(networks, x, y)
    assert networks[0].training
    assert all(p.requires_grad and p.grad is None for n in networks for p in n.parameters())
    assert all(
        torch.equal(v, old[k]) for n, old in zip(networks, before, strict=True) for k, v in n.state_dict().items()
    )


def test_each_class_has_mean_nought_and_spread_one():
    rng = np.random.default_rng(0)
    classes = np.repeat([0, 1, 2], 40)
    scores = rng.exponential(size=120) * (1 + classes)
    found = class_normalised(scores, classes)
    for k in range(3):
        assert found[classes == k].mean() == pytest.approx(0, abs=1e-12)
        assert found[classes == k].std() == pytest.approx(1, abs=1e-12)
        assert np.array_equal(np.argsort(found[classes == k]), np.argsort(scores[classes == k]))


def test_classes_without_spread_score_nothing():
    found = class_normalised(np.array([0.1, 0.1, 0.1, 5.0, 0.0, 0.0]), np.array([0, 0, 0, 1, 2, 2]))
    np.testing.assert_array_equal(found, np.zeros(6))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda n, x, y: vog([], x, y), "no checkpoints"),
        (lambda n, x, y: vog(n, 300 * x, y), "expected"),
        (lambda n, x, y: vog(n, x.long().flatten(1), y), "expected floats"),
        (lambda n, x, y: vog(n, x, y + 4), "labels span"),
        (lambda n, x, y: class_normalised(np.array([np.nan]), np.array([0])), "expected finite"),
        (lambda n, x, y: class_normalised(np.zeros(3), np.zeros(2)), "expected finite"),
    ],
)
def test_nonsense_is_refused(networks, batch, call, message):
    with pytest.raises(DataError, match=message):
        call(networks, *batch)


class TestDetector:
    def test_it_scores_the_models_own_prediction(self, networks, batch):
        x, _ = batch
        model = Net(7)
        detector = VoG().with_checkpoints(networks).fit(model, x, torch.zeros(len(x), dtype=torch.int64))
        predicted = model.eval()(x).argmax(dim=1)
        torch.testing.assert_close(detector.score(x), vog(networks, x, predicted), rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(detector.score(x, batch_size=2), detector.score(x), rtol=1e-5, atol=1e-9)
        assert detector.summary() == {"checkpoints": 4.0}

    def test_what_it_is_made_of_is_in_its_specification(self):
        assert VoG().spec() == {"detector": "vog", "version": 1, "epochs": "all"}
        assert VoG([3, 1]).spec()["epochs"] == [1, 3]

    @pytest.mark.parametrize("epochs", ["some", 3, [2], [2, 2], [0, 1], []])
    def test_fewer_than_two_epochs_are_refused(self, epochs):
        with pytest.raises(ConfigError, match="vog: epochs"):
            VoG(epochs)

    def test_checkpoints_are_needed(self, networks, batch):
        with pytest.raises(ConfigError, match="two or more"):
            VoG().with_checkpoints(networks[:1])
        with pytest.raises(NotFittedError, match="with_checkpoints"):
            VoG().score_inputs(networks[0], batch[0])


def test_it_does_the_same_elsewhere(networks, batch):
    x, y = batch
    expected = vog(networks, x, y), VoG().with_checkpoints(networks).score_inputs(Net(7), x)
    with second_device():
        there = [network.to(DEVICE) for network in networks]
        found = vog(there, x, y), VoG().with_checkpoints(there).score_inputs(Net(7).to(DEVICE), x)
    for one, other in zip(found, expected, strict=True):
        assert one.device.type == "cpu"
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
