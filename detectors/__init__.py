"""Detectors of unknown or tampered inputs: one file each. Higher score = more out-of-distribution, always."""

from detectors.base import Detector
from detectors.energy import Energy
from detectors.mahalanobis import Mahalanobis
from detectors.msp import MSP

__all__ = ["MSP", "Detector", "Energy", "Mahalanobis"]
