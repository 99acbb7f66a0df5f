"""What this project promises of its model. `pytest` checks it; `pytest --robust-update` takes today's model as the baseline."""

import pytest
from digitnet import build, split

EPS = 0.1


@pytest.fixture(scope="session")
def model():
    return build()


@pytest.fixture(scope="session")
def data():
    return split()


def test_robust_to_attacks(robustness, model, data):
    r = robustness(model, data, attack="apgd-ce", eps=EPS)
    r.accuracy.at_least(0.95)
    r.robust_accuracy.at_least(0.75)
    r.not_worse_than_baseline("robust_accuracy", margin=0.02)


def test_noise_and_calibration(robustness, model, data):
    r = robustness(model, data, corruption="gaussian-noise", severity=1)
    r.corrupted_accuracy.at_least(0.9)
    r.ece.at_most(0.05)
    r.not_worse_than_baseline("accuracy", margin=0.02)


def test_sees_what_is_no_digit(robustness, model, data):
    r = robustness(model, data, outliers="letters", detector="energy")
    r.auroc.at_least(0.6)
