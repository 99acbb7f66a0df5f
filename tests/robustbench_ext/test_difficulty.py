"""Difficulty scores: the specification's invariants."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from robustbench_ext.difficulty import el2n, forgetting, margin_error, slices
from robustbench_ext.errors import DataError


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
