"""Uncertainty estimators: one file each."""

from uq.base import Estimator
from uq.temperature import TemperatureScaling

__all__ = ["Estimator", "TemperatureScaling"]
