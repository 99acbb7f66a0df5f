"""Uncertainty estimators: one file each."""

from uq.base import Estimator, Reading
from uq.regression import LEVELS, NOMINAL, Prediction, RegressionEstimator, Samples
from uq.temperature import TemperatureScaling

__all__ = [
    "LEVELS",
    "NOMINAL",
    "Estimator",
    "Prediction",
    "Reading",
    "RegressionEstimator",
    "Samples",
    "TemperatureScaling",
]
