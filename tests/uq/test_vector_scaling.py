"""Vector scaling: the optimum, what holds there exactly, temperature scaling inside it, where there is no optimum."""

import pytest
import torch
from torch.nn import functional as F

from robustbench_ext.errors import ConfigError
from robustbench_ext.models import Observations
from uq import VectorScaling
from uq.temperature import optimal_temperature
from uq.vector_scaling import optimal_scaling

TRUE_SCALE = torch.tensor([0.5, 0.8, 1.0, 1.5, 2.5], dtype=torch.float64)
TRUE_BIAS = torch.tensor([1.0, 0.5, 0.0, -0.5, -1.0], dtype=torch.float64)


def draw(n=3000, seed=0):
    """Logits z for which softmax(TRUE_SCALE z + TRUE_BIAS) is the truth."""
    g = torch.Generator().manual_seed(seed)
    z = 2 * torch.randn(n, 5, generator=g, dtype=torch.float64)
    y = torch.multinomial((TRUE_SCALE * z + TRUE_BIAS).softmax(1), 1, generator=g)[:, 0]
    return z, y


def nll(z, y):
    return float(F.cross_entropy(z, y))


@pytest.mark.parametrize("l2", [0.0, 0.3])
def test_it_is_the_optimum_that_another_optimiser_finds(l2):
    """PyTorch's L-BFGS on the loss as written, its gradient by autograd, from another start."""
    z, y = draw()
    temperature = optimal_temperature(z, y)
    w = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    b = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [w, b], max_iter=500, tolerance_grad=1e-10, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def loss():
        penalty = ((w - 1 / temperature) ** 2).sum() + (b**2).sum()
        return F.cross_entropy(w * z + b, y) + l2 / 10 * penalty

    def closure():
        optimiser.zero_grad()
        value = loss()
        value.backward()
        return value

    optimiser.step(closure)
    scale, bias = optimal_scaling(z, y, l2=l2)
    # Both stop at gradients below 1e-9 or where float64 sees no descent (about 1e-8); the curvature is above 0.01.
    torch.testing.assert_close(scale, w.detach(), rtol=0, atol=1e-5)
    torch.testing.assert_close(bias, b.detach() - b.detach().mean(), rtol=0, atol=1e-5)
    if not l2:
        assert nll(scale * z + bias, y) == pytest.approx(loss().item(), abs=1e-12)
        # The standard errors of 3,000 samples are below 0.1.
        torch.testing.assert_close(scale, TRUE_SCALE, rtol=0, atol=0.3)
        torch.testing.assert_close(bias, TRUE_BIAS, rtol=0, atol=0.3)


def test_at_the_optimum_predicted_frequencies_are_the_observed_ones():
    """The gradients are sum (p - hit) z and sum (p - hit), by class."""
    z, y = draw(seed=1)
    hit = F.one_hot(y, 5).double()
    scale, bias = optimal_scaling(z, y)
    p = (scale * z + bias).softmax(1)
    torch.testing.assert_close(p.mean(0), hit.mean(0), rtol=0, atol=1e-7)
    torch.testing.assert_close((p * z).mean(0), (hit * z).mean(0), rtol=0, atol=1e-7)
    scale, bias = optimal_scaling(z, y, bias_only=True)
    assert torch.equal(scale, torch.ones(5, dtype=torch.float64))
    torch.testing.assert_close((z + bias).softmax(1).mean(0), hit.mean(0), rtol=0, atol=1e-7)


@pytest.mark.parametrize("seed", range(5))
def test_temperature_scaling_is_never_better_on_the_fitting_data(seed):
    z, y = draw(60, seed)
    temperature = optimal_temperature(z, y)
    scale, bias = optimal_scaling(z, y)
    assert nll(scale * z + bias, y) < nll(z / temperature, y)
    bound, offset = optimal_scaling(z, y, l2=1e8)
    torch.testing.assert_close(bound, torch.full_like(bound, 1 / temperature), rtol=0, atol=1e-6)
    torch.testing.assert_close(offset, torch.zeros_like(offset), rtol=0, atol=1e-6)


def test_where_temperature_scaling_is_the_truth_little_else_is_found():
    g = torch.Generator().manual_seed(3)
    truth = 2 * torch.randn(20_000, 4, generator=g, dtype=torch.float64)
    y = torch.multinomial(truth.softmax(1), 1, generator=g)[:, 0]
    scale, bias = optimal_scaling(3 * truth, y)
    # Standard errors: about 0.02 / 3 of a slope, 0.03 of an offset.
    torch.testing.assert_close(scale, torch.full_like(scale, 1 / 3), rtol=0, atol=0.03)
    assert float(bias.abs().max()) < 0.12


def test_the_order_of_classes_does_not_matter():
    z, y = draw(500)
    order = torch.tensor([3, 0, 4, 1, 2])
    scale, bias = optimal_scaling(z, y)
    permuted, offset = optimal_scaling(z[:, order], order.argsort()[y])
    torch.testing.assert_close(permuted, scale[order], rtol=0, atol=1e-5)
    torch.testing.assert_close(offset, bias[order], rtol=0, atol=1e-5)


def test_without_an_optimum_it_stays_finite_and_says_so():
    z, y = draw(500)
    estimator = VectorScaling().fit_observations(Observations(z[y != 2], y[y != 2]))
    assert "classes without a calibration sample: 1" in estimator.warnings()[0]
    assert torch.isfinite(estimator.read(Observations(z, y)).logits).all()
    assert (estimator.read(Observations(z, y)).logits.argmax(1) != 2).all()
    apart = Observations(3 * torch.eye(4), torch.arange(4))
    assert "without an error" in VectorScaling().fit_observations(apart).warnings()[0]
    assert VectorScaling(l2=0.1).fit_observations(apart).warnings() == []


def test_the_estimator_reads_what_was_fitted():
    z, y = draw(500)
    seen = Observations(z.float(), y)
    estimator = VectorScaling(bias_only=True).fit_observations(seen)
    scale, bias = optimal_scaling(z.float(), y, bias_only=True)
    torch.testing.assert_close(estimator.read(seen).logits, scale * z.float().double() + bias, rtol=0, atol=0)
    assert estimator.spec() == {"uq": "vector-scaling", "version": 1, "bias_only": True, "l2": 0.0}
    assert estimator.summary()["largest offset"] == float(bias.abs().max())
    for wrong in ({"bias_only": 1}, {"l2": -1}, {"l2": "much"}):
        with pytest.raises(ConfigError):
            VectorScaling(**wrong)
