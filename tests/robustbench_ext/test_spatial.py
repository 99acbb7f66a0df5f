"""Rotations and translations: the motions themselves, their draws, what they break."""

import pytest
import torch
from torch import nn

from robustbench_ext.attacks import PGD, Spatial, build_attack
from robustbench_ext.attacks.spatial import moved
from robustbench_ext.attacks.threat import Threat
from robustbench_ext.conditions import parse_conditions
from robustbench_ext.errors import ConfigError


def every(x, value):
    return torch.full((len(x),), float(value))


def move(x, degrees=0.0, across=0.0, down=0.0, padding="zeros"):
    return moved(x, every(x, degrees), every(x, across), every(x, down), padding)


@pytest.mark.parametrize("shape", [(3, 1, 8, 8), (2, 3, 7, 7), (2, 1, 6, 10)])
def test_motions_are_what_they_say(shape):
    torch.manual_seed(0)
    x = torch.rand(shape)
    assert torch.equal(move(x), x)
    assert torch.allclose(move(x, degrees=1e-6), x, atol=1e-5)
    right = move(x, across=2)
    assert torch.allclose(right[..., 2:], x[..., :-2], atol=1e-5)
    assert float(right[..., :2].max()) < 1e-5
    lower = move(x, down=1, padding="border")
    assert torch.allclose(lower[..., 1:, :], x[..., :-1, :], atol=1e-5)
    assert torch.allclose(lower[..., :1, :], x[..., :1, :], atol=1e-5)
    assert torch.allclose(move(x, degrees=180), x.flip(2, 3), atol=1e-5)
    if shape[2] == shape[3]:
        assert torch.allclose(move(x, degrees=90), torch.rot90(x, 1, (2, 3)), atol=1e-5)
        # First turned about the centre, then shifted.
        both = move(x, degrees=90, across=1)
        assert torch.allclose(both[..., 1:], torch.rot90(x, 1, (2, 3))[..., :-1], atol=1e-5)


def test_pixels_stay_square_where_images_are_not():
    """A quarter turn of a centred square inside a wide image is that square."""
    x = torch.zeros(1, 1, 8, 12)
    x[..., 2:6, 4:8] = torch.rand(4, 4)
    expected = torch.zeros_like(x)
    expected[..., 2:6, 4:8] = torch.rot90(x[..., 2:6, 4:8], 1, (2, 3))
    assert torch.allclose(move(x, degrees=90), expected, atol=1e-5)


@pytest.mark.parametrize("method", ["random", "grid"])
def test_no_motion_is_the_identity(method, digits_model, digits_test):
    x, y, ids = (v[:40] for v in digits_test)
    attack = Spatial(degrees=0, pixels=0, method=method, angles=3, shifts=1, stop="never")
    result = attack(digits_model, x, y, ids=ids)
    assert torch.equal(result.x_adv, x)
    with torch.no_grad():
        assert torch.equal(result.broken, digits_model(x).argmax(1) != y)


def test_it_breaks_samples_and_more_tries_break_more(mnist_model, mnist_test):
    x, y, ids = (v[:100] for v in mnist_test)
    with torch.no_grad():
        wrong = mnist_model(x).argmax(1) != y
    found = [Spatial(tries=t)(mnist_model, x, y, ids=ids) for t in (1, 10)]
    assert int(found[0].broken.sum()) > int(wrong.sum()) + 3
    assert not (found[0].broken & ~found[1].broken).any()
    assert int(found[1].broken.sum()) > int(found[0].broken.sum())
    grid = Spatial(method="grid", angles=5, shifts=3)
    result = grid(mnist_model, x, y, ids=ids)
    assert int(result.broken.sum()) > int(wrong.sum()) + 3
    assert grid.cost(10).forwards == 45
    assert int(result.forwards.max()) <= 46
    # Reported as the L2 size of the change.
    size = (result.x_adv - x).flatten(1).norm(dim=1)
    assert torch.allclose(result.norms, size, atol=1e-4)
    with torch.no_grad():
        assert torch.equal(mnist_model(result.x_adv).argmax(1) != y, result.broken)


def test_draws_do_not_depend_on_the_batch(digits_test):
    x, y, ids = (v[:30] for v in digits_test)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with torch.no_grad():
        y = model(x).argmax(1)
    attack = Spatial(tries=1, pixels=1, stop="never")
    whole, small, single = (attack(model, x, y, ids=ids, batch_size=size).x_adv for size in (250, 7, 1))
    same = [(a == b).flatten(1).all(1) for a, b in ((whole, small), (whole, single))]
    # A motion that lowers the loss is not kept, and rounding may decide that; what is kept is equal to the last bit.
    assert all(int(s.sum()) >= len(x) - 1 for s in same)
    other = attack(model, x, y, ids=ids, seed=1).x_adv
    assert not torch.equal(other, whole)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": 0.1}, "no budget of a norm"),
        ({"norm": "L2"}, "norm 'L2'"),
        ({"degrees": 200}, "degrees in"),
        ({"pixels": -1}, "pixels >= 0"),
        ({"method": "gradient"}, "random, grid"),
        ({"padding": "mirror"}, "zeros, border"),
        ({"tries": 0}, "at least 1"),
    ],
)
def test_wrong_parameters_are_explained(options, message):
    with pytest.raises(ConfigError, match=message):
        build_attack("spatial", **options)


def test_motions_are_no_ball():
    with pytest.raises(ConfigError, match="norm 'spatial' is not supported"):
        PGD(eps=0.1, norm="spatial")
    assert str(Threat("spatial", float("inf"))) == "spatial"
    small, large = parse_conditions([{"attack": "spatial", "degrees": 10}, {"attack": "spatial"}])[1:]
    assert small.label == "spatial"
    assert large.label == "spatial (degrees=30.0)"
    assert large.facts()["eps"] is None
    assert not large.facts()["minimum_norm"]
