"""Detectors of unknown or tampered inputs: one file each. Higher score = more out-of-distribution, always."""

from detectors.ash import ASH
from detectors.base import Detector
from detectors.dice import DICE
from detectors.energy import Energy
from detectors.entropy import Entropy
from detectors.feature_squeezing import FeatureSqueezing
from detectors.gaussian_probe import DiagonalMahalanobis
from detectors.gradnorm import GradNorm
from detectors.incremental import IncrementalGaussian
from detectors.kl_matching import KLMatching
from detectors.knn import KNN
from detectors.mahalanobis import Mahalanobis
from detectors.max_logit import MaxLogit
from detectors.msp import MSP
from detectors.odin import ODIN
from detectors.react import ReAct
from detectors.relative_mahalanobis import MarginalMahalanobis, RelativeMahalanobis
from detectors.validation import Validation, with_attack, with_outliers
from detectors.vim import ViM
from detectors.vog import VoG

__all__ = [
    "ASH",
    "DICE",
    "KNN",
    "MSP",
    "ODIN",
    "Detector",
    "DiagonalMahalanobis",
    "Energy",
    "Entropy",
    "FeatureSqueezing",
    "GradNorm",
    "IncrementalGaussian",
    "KLMatching",
    "Mahalanobis",
    "MarginalMahalanobis",
    "MaxLogit",
    "ReAct",
    "RelativeMahalanobis",
    "Validation",
    "ViM",
    "VoG",
    "with_attack",
    "with_outliers",
]
