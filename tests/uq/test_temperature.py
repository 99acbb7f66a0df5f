"""Temperature scaling: the optimum, its limits, what it leaves alone."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from torch.nn import functional as F

from robustbench_ext.errors import DataError, NotFittedError
from robustbench_ext.metrics import calibration as cal
from robustbench_ext.models import Observations
from uq import TemperatureScaling
from uq.temperature import optimal_temperature


def draw(n=4000, k=5, seed=0, sharpness=1.0):
    """Logits whose softmax at temperature `sharpness` is the truth."""
    g = torch.Generator().manual_seed(seed)
    truth = 2 * torch.randn(n, k, generator=g, dtype=torch.float64)
    y = torch.multinomial(truth.softmax(1), 1, generator=g)[:, 0]
    return truth * sharpness, y


def test_it_is_the_minimum_of_the_nll():
    z, y = draw(sharpness=2.5)
    found = optimal_temperature(z, y)
    other = minimize_scalar(lambda t: float(F.cross_entropy(z / np.exp(t), y)), bracket=(-1, 2), tol=1e-12)
    assert found == pytest.approx(np.exp(other.x), rel=1e-5)
    # The truth is 2.5; the estimator's standard error at n = 4,000 is about 1.5 %.
    assert found == pytest.approx(2.5, rel=0.06)


def test_scaling_the_logits_scales_the_temperature():
    z, y = draw()
    base = optimal_temperature(z, y)
    assert optimal_temperature(3 * z, y) == pytest.approx(3 * base, rel=1e-8)
    assert optimal_temperature(z + 7, y) == pytest.approx(base, rel=1e-8)


def test_limits_are_finite():
    z = torch.eye(4) * 3
    assert optimal_temperature(z, torch.arange(4)) == pytest.approx(1e-3)
    assert "means nothing" in TemperatureScaling().fit_observations(Observations(z, torch.arange(4))).warnings()[0]
    assert optimal_temperature(z, (torch.arange(4) + 1) % 4) == pytest.approx(1e3)


def test_estimator_calibrates_and_keeps_predictions():
    z, y = draw(sharpness=3.0, seed=1)
    half = len(z) // 2
    estimator = TemperatureScaling().fit_observations(Observations(z[:half], y[:half]))
    test = Observations(z[half:], y[half:])
    out = estimator.calibrate(test)
    assert torch.equal(out.argmax(1), test.logits.argmax(1))
    before, after = (
        cal.ece(*cal.confidence_and_correctness(x.numpy(), test.labels.numpy())).value for x in (test.logits, out)
    )
    assert after < 0.5 * before
    assert estimator.summary() == {"temperature": estimator.temperature}


def test_faults():
    with pytest.raises(NotFittedError):
        TemperatureScaling().calibrate(Observations(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)))
    with pytest.raises(DataError, match="labelled samples"):
        TemperatureScaling().fit_observations(Observations(torch.zeros(2, 3), torch.full((2,), -1)))
