"""Weights of several estimators in closed form: the specification's invariants and its number."""

import pytest
import torch

from robustbench_ext.errors import ConfigError, DataError
from uq.bias_variance_mix import BiasVarianceMix
from uq.mixing import (
    Moments,
    affine_weights,
    error_moments,
    inverse_variance_weights,
    second_moments,
    simplex_weights,
)


def t(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_inverse_variances():
    v = t(0.5, 2.0, 8.0)
    w = inverse_variance_weights(v)
    torch.testing.assert_close(w, t(16, 4, 1) / 21)
    assert float(w.sum()) == pytest.approx(1, abs=1e-15)
    assert float((w.square() * v).sum()) == pytest.approx(1 / float((1 / v).sum()))  # the variance of the mix
    torch.testing.assert_close(inverse_variance_weights(t(3, 3, 3, 3)), torch.full((4,), 0.25).double())
    for scale in (1e-200, 1e-3, 1e200):  # in any unit, also where 1/v would overflow
        torch.testing.assert_close(inverse_variance_weights(scale * v), w)
    torch.testing.assert_close(inverse_variance_weights(t(0, 1, 0)), t(0.5, 0, 0.5))
    for wrong in (t(), t(1, -1), t(1, float("nan")), t(1, float("inf")), torch.ones(2, 2)):
        with pytest.raises(DataError, match="finite numbers >= 0"):
            inverse_variance_weights(wrong)


def test_no_move_on_the_plane_lowers_the_error():
    g = torch.Generator().manual_seed(0)
    for _ in range(30):
        factor, b = torch.randn(5, 7, generator=g).double(), torch.randn(5, generator=g).double()
        a = error_moments(b, factor @ factor.T / 7)
        w = affine_weights(a)
        assert float(w.sum()) == pytest.approx(1, abs=1e-12)
        for _ in range(20):
            move = torch.randn(5, generator=g).double()
            move -= move.mean()  # the sum stays 1
            assert float((w + 0.1 * move) @ a @ (w + 0.1 * move)) > float(w @ a @ w)
        torch.testing.assert_close(affine_weights(1e-9 * a), w, rtol=1e-6, atol=1e-8)
        solved = torch.linalg.solve(a, torch.ones(5).double())
        torch.testing.assert_close(w, solved / solved.sum())
        # Where none of them is negative, non-negative weights are the same ones; and they are never better.
        bounded = simplex_weights(a)
        assert float(bounded @ a @ bounded) >= float(w @ a @ w) - 1e-12
        if float(w.min()) > 0:
            torch.testing.assert_close(bounded, w, rtol=1e-6, atol=1e-8)


def test_unbiased_and_independent_is_by_inverse_variance():
    v = t(0.5, 2.0, 8.0)
    torch.testing.assert_close(affine_weights(error_moments(torch.zeros(3), v.diag())), inverse_variance_weights(v))


@pytest.mark.parametrize(
    ("v_a", "v_b", "b_a", "b_b"), [(2, 0.3, 0, 0.5), (1, 0.5, -0.7, 0.2), (1, 3, 0, 0), (0, 2, 1, 0)]
)
def test_two_estimators_are_the_closed_form_and_the_alpha_of_the_mix(v_a, v_b, b_a, b_b):
    w = float(affine_weights(error_moments(t(b_a, b_b), t(v_a, v_b).diag()))[0])
    expected = (v_b + b_b * (b_b - b_a)) / (v_a + v_b + (b_a - b_b) ** 2)
    assert w == pytest.approx(expected, abs=1e-12)
    if (v_a, v_b, b_a, b_b) == (2, 0.3, 0, 0.5):
        assert w == pytest.approx(0.21569, abs=5e-6)  # the specification gives five digits
    known = Moments.of(t(b_a), t(b_b), t(v_a)[None], t(v_b)[None])
    assert float(known.ratio().weight(clamp=False)) == pytest.approx(w, abs=1e-12)


def test_coordinates_are_added_up():
    g = torch.Generator().manual_seed(1)
    target, bias = torch.randn(4000, 3, generator=g).double(), torch.randn(2, 3, generator=g).double()
    estimates = target + bias[:, None] + torch.randn(2, 4000, 3, generator=g).double() * t(1.0, 2.0)[:, None, None]
    known = affine_weights(error_moments(bias, t(3.0, 12.0).diag()))  # traces of three coordinates
    # 4,000 samples: second moments are good to two per cent.
    torch.testing.assert_close(affine_weights(second_moments(estimates, target)), known, rtol=0, atol=0.03)


def test_singular_moments():
    same = error_moments(t(1, 1, 2), torch.zeros(3, 3))  # no variance: b b' of rank 1
    w = affine_weights(same)
    assert float(w.sum()) == pytest.approx(1)
    assert float(w @ same @ w) == pytest.approx(0, abs=1e-12)  # biases 1 and 2 extrapolate to 0
    torch.testing.assert_close(affine_weights(torch.ones(2, 2)), t(0.5, 0.5))  # copies share
    torch.testing.assert_close(affine_weights(torch.zeros(3, 3)), torch.full((3,), 1 / 3).double())
    for wrong in (torch.tensor([[1.0, 2.0], [2.0, 1.0]]), torch.ones(2, 3), torch.tensor([[1.0, 0.0], [1.0, 1.0]])):
        with pytest.raises(DataError):
            affine_weights(wrong)
    with pytest.raises(DataError, match="expected"):
        error_moments(t(1, 2), torch.eye(3))


@pytest.mark.parametrize("weight", ["entropy", "inverse-variance"])
def test_the_entropy_of_a_single_pass_is_no_variance(weight):
    with pytest.raises(ConfigError, match="one pass shows no variance"):
        BiasVarianceMix(weight=weight)
