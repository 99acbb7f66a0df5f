"""Difficulty scores: the specification's invariants."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from robustbench_ext.difficulty import (
    Scored,
    accuracy_by_slice,
    el2n,
    forgetting,
    grand,
    margin_error,
    read_scores,
    slices,
)
from robustbench_ext.errors import ConfigError, DataError


@pytest.fixture
def runs():
    rng = np.random.default_rng(0)
    return [3 * rng.normal(size=(50, 10)).astype(np.float32) for _ in range(3)], rng.integers(0, 10, 50)


def test_bounds_and_known_values(runs):
    scores = el2n(*runs)
    assert scores.min() >= 0 and scores.max() <= math.sqrt(2)
    y = np.arange(10)
    np.testing.assert_allclose(el2n([np.zeros((10, 10))], y), math.sqrt(1 - 1 / 10), atol=1e-12)
    np.testing.assert_allclose(el2n([1e3 * np.eye(10)], y), 0.0, atol=1e-12)
    np.testing.assert_allclose(el2n([1e3 * np.roll(np.eye(10), 1, axis=1)], y), math.sqrt(2), atol=1e-12)


def test_constants_names_of_classes_and_the_order_of_runs_do_not_matter(runs):
    logits, y = runs
    scores = el2n(logits, y)
    np.testing.assert_allclose(el2n([z.astype(np.float64) + 7 for z in logits], y), scores, atol=1e-12)
    names = np.random.default_rng(1).permutation(10)
    np.testing.assert_allclose(el2n([z[:, np.argsort(names)] for z in logits], names[y]), scores, atol=1e-12)
    np.testing.assert_allclose(el2n(logits[::-1], y), scores, atol=1e-12)
    np.testing.assert_allclose(scores, np.mean([el2n([z], y) for z in logits], axis=0), atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
def test_it_is_the_gradient_of_the_last_layer_but_for_the_size_of_its_input(bias):
    torch.manual_seed(0)
    head = nn.Linear(6, 4, bias=bias).double()
    h, y = torch.randn(5, 6, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0])
    scores = el2n([head(h).detach().numpy()], y.numpy())
    for i in range(5):
        head.zero_grad()
        nn.functional.cross_entropy(head(h[i : i + 1]), y[i : i + 1]).backward()
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in head.parameters()))
        assert norm == pytest.approx(scores[i] * math.sqrt(float(h[i].square().sum()) + bias), rel=1e-10)


def test_margins():
    z = np.log(np.array([[0.7, 0.2, 0.1], [0.2, 0.3, 0.5]]))
    y = np.array([0, 1])
    np.testing.assert_allclose(margin_error([z], y), [-0.5, 0.2])
    np.testing.assert_allclose(margin_error([z], y, "sum"), [1 - 3 * 0.7, 1 - 3 * 0.3])


def test_forgetting():
    right = np.array([[0, 1, 1, 0, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1], [1, 0, 1, 0, 1]], dtype=bool).T
    np.testing.assert_array_equal(forgetting(right), [1, np.inf, 0, 2])
    with pytest.raises(DataError, match="at least one check"):
        forgetting(np.zeros((0, 3), dtype=bool))


def test_slices_are_equal_in_size_ordered_and_independent_of_the_order_of_the_samples(runs):
    scores = el2n(*runs)
    ids = np.array([f"sample-{i}" for i in range(50)])
    cut = slices(scores, ids, 10)
    assert [s.number for s in cut] == list(range(1, 11))
    assert sorted(np.concatenate([s.index for s in cut])) == list(range(50))
    assert {len(s.index) for s in cut} == {5}
    assert all(a.high <= b.low for a, b in pairwise(cut))
    shuffled = np.random.default_rng(2).permutation(50)
    equal = np.zeros(50)
    for given in (scores, equal):
        one = [set(ids[s.index]) for s in slices(given, ids, 10)]
        other = [set(ids[shuffled][s.index]) for s in slices(given[shuffled], ids[shuffled], 10)]
        assert one == other
    assert slices(forgetting(np.eye(12, dtype=bool)), ids[:12], 3)[-1].high == 1.0


@pytest.mark.parametrize(
    "call",
    [
        lambda: el2n([], np.array([0])),
        lambda: el2n([np.zeros((2, 3))], np.array([0])),
        lambda: el2n([np.zeros((1, 3))], np.array([3])),
        lambda: el2n([np.full((1, 3), np.nan)], np.array([0])),
        lambda: margin_error([np.zeros((1, 3))], np.array([0]), "mean"),
        lambda: slices(np.zeros(3), np.array(list("abc")), 10),
        lambda: slices(np.full(30, np.nan), np.arange(30).astype(str), 10),
    ],
)
def test_nonsense_is_refused(call):
    with pytest.raises(DataError):
        call()


# Gradients -----------------------------------------------------------------------------------------------------------


class Small(nn.Module):
    """Batch norm and a linear head; `seen` keeps what the head reads."""

    def __init__(self, seed=0, bias=True):
        super().__init__()
        torch.manual_seed(seed)
        self.conv, self.norm, self.head = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Linear(12, 4, bias=bias)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2)

    def features(self, x):
        return torch.relu(self.norm(self.conv(x))).flatten(1)

    def forward(self, x):
        return self.head(self.features(x))


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    return torch.rand(7, 1, 4, 4, generator=generator), torch.randint(0, 4, (7,), generator=generator)


def one_by_one(model, x, y):
    """Norms by plain backward passes, a sample at a time."""
    model.eval()
    norms = []
    for i in range(len(x)):
        model.zero_grad()
        nn.functional.cross_entropy(model(x[i : i + 1]), y[i : i + 1]).backward()
        norms.append(math.sqrt(sum(float(p.grad.double().square().sum()) for p in model.parameters())))
    model.zero_grad(set_to_none=True)
    return np.array(norms)


def test_grand_is_the_norm_of_each_samples_gradient_in_all_parameters(images):
    networks = [Small(0), Small(1)]
    expected = np.mean([one_by_one(network, *images) for network in networks], axis=0)
    networks[0].train()
    networks[0].conv.weight.requires_grad_(False)  # all parameters: also those that somebody has frozen
    for size in (1, 2, 7, 32):  # 7 samples: published code needs sizes that divide it
        np.testing.assert_allclose(grand(networks, *images, epoch=3, batch_size=size), expected, rtol=1e-4)
    assert networks[0].training and not networks[0].conv.weight.requires_grad
    assert all(p.grad is None for network in networks for p in network.parameters())
    assert int(networks[0].norm.num_batches_tracked) == 0  # no statistics were gathered


@pytest.mark.parametrize("bias", [True, False])
def test_grand_of_the_last_layer_is_el2n_times_the_size_of_its_input(images, bias):
    x, y = images
    model = Small(bias=bias).eval()
    alone = nn.Sequential(nn.Flatten(), nn.Linear(16, 4, bias=bias))
    size = np.sqrt(x.flatten(1).double().square().sum(dim=1).numpy() + bias)
    scores = el2n([alone(x).detach().numpy()], y.numpy())
    np.testing.assert_allclose(grand([alone], x, y, epoch=1), scores * size, rtol=1e-5)
    of_head = el2n([model(x).detach().numpy()], y.numpy()) * np.sqrt(
        model.features(x).detach().double().square().sum(dim=1).numpy() + bias
    )
    assert (grand([model], x, y, epoch=1) > of_head).all()


def test_grand_of_one_parameter_is_a_difference_quotient(images):
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.by = nn.Parameter(torch.tensor(0.7))

        def forward(self, x):
            return self.by * x.flatten(1)[:, :4]

    x, y = images
    model, h = Scale(), 1e-2

    def loss(by):
        z = by * x.flatten(1)[:, :4].double()
        return nn.functional.cross_entropy(z, y, reduction="none").numpy()

    # Central differences: the error is h^2 / 6 times a third derivative below 1.
    np.testing.assert_allclose(
        grand([model], x, y, epoch=1), np.abs(loss(0.7 + h) - loss(0.7 - h)) / (2 * h), atol=3e-5
    )


def test_before_training_there_is_nothing_to_see(images):
    with pytest.raises(ConfigError, match="how large inputs are"):
        grand([Small()], *images, epoch=0)
    assert len(grand([Small()], *images, epoch=0, untrained=True)) == 7
    with pytest.raises(DataError, match="no runs"):
        grand([], *images, epoch=1)


# Scores with ids -----------------------------------------------------------------------------------------------------


@pytest.fixture
def scored():
    rng = np.random.default_rng(0)
    values = rng.exponential(size=30)
    values[4] = np.inf
    return Scored(np.array([f"s{i}" for i in range(30)]), rng.integers(0, 3, 30), values)


def test_scores_belong_to_ids_and_not_to_places(scored):
    """Published score arrays are in an order of their own, by class."""
    by_class = np.argsort(scored.labels, kind="stable")
    other = scored.of(scored.ids[by_class])
    np.testing.assert_array_equal(other.values, scored.values[by_class])
    np.testing.assert_array_equal(other.labels, scored.labels[by_class])
    assert scored.of(scored.ids) is scored
    some = scored.of(np.array(["s7", "s3"]))
    np.testing.assert_array_equal(some.values, scored.values[[7, 3]])
    for one, two in zip(scored.slices(3), other.slices(3), strict=True):
        assert set(scored.ids[one.index]) == set(other.ids[two.index])
    for unknown in ("t0", "zz", "a"):
        with pytest.raises(DataError, match=f"1 of 2 samples have no score, the first is {unknown}"):
            scored.of(np.array(["s1", unknown]))


def test_scores_are_written_and_read(scored, tmp_path):
    scored.write(tmp_path / "difficulty.csv", 5)
    found = read_scores(tmp_path)
    for name in ("ids", "labels", "values"):
        np.testing.assert_array_equal(getattr(found, name), getattr(scored, name))
    lines = (tmp_path / "difficulty.csv").read_text().splitlines()
    assert lines[0] == "id,label,score,slice"
    number = {line.split(",")[0]: int(line.split(",")[3]) for line in lines[1:]}
    assert all(number[str(i)] == part.number for part in scored.slices(5) for i in scored.ids[part.index])
    assert number["s4"] == 5  # infinitely hard


@pytest.mark.parametrize("text", ["", "id,label\n", "id,label,score,slice\ns0,1\n", "id,label,score,slice\ns0,a,1,1\n"])
def test_a_file_of_scores_that_cannot_be_read(text, tmp_path):
    with pytest.raises(ConfigError, match="no difficulty.csv"):
        read_scores(tmp_path)
    (tmp_path / "difficulty.csv").write_text(text)
    with pytest.raises(ConfigError, match="damaged"):
        read_scores(tmp_path)


def test_accuracy_by_slice(scored):
    right = np.arange(30) % 2 == 0
    found = accuracy_by_slice(right, scored.slices(3))
    assert [e.n for e in found] == [10, 10, 10]
    assert sum(e.value * e.n for e in found) == right.sum()
    assert {e.ci_method for e in found} == {"Wilson"}
