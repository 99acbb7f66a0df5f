"""Uncertainty estimators: one file each."""

from uq.aps import APS
from uq.base import Estimator, Reading
from uq.bias_variance_mix import BiasVarianceMix, BiasVarianceMixRegressor
from uq.cqr import CQR
from uq.deep_ensemble import DeepEnsemble, DeepEnsembleRegressor
from uq.heteroscedastic import Heteroscedastic
from uq.lac import LAC
from uq.laplace import Laplace
from uq.mc_dropout import MCDropout, MCDropoutRegressor
from uq.naive_bayes_probe import NaiveBayesProbe
from uq.quantile_aggregation import QuantileAggregation
from uq.quantile_regression import QuantileForest, QuantileRegression
from uq.raps import RAPS
from uq.regression import LEVELS, NOMINAL, Prediction, RegressionEstimator, Samples
from uq.split_conformal import SplitConformal
from uq.split_point import SplitPointRegressor
from uq.split_point_classifier import SplitPointClassifier
from uq.temperature import TemperatureScaling
from uq.vector_scaling import VectorScaling

__all__ = [
    "APS",
    "CQR",
    "LAC",
    "LEVELS",
    "NOMINAL",
    "RAPS",
    "BiasVarianceMix",
    "BiasVarianceMixRegressor",
    "DeepEnsemble",
    "DeepEnsembleRegressor",
    "Estimator",
    "Heteroscedastic",
    "Laplace",
    "MCDropout",
    "MCDropoutRegressor",
    "NaiveBayesProbe",
    "Prediction",
    "QuantileAggregation",
    "QuantileForest",
    "QuantileRegression",
    "Reading",
    "RegressionEstimator",
    "Samples",
    "SplitConformal",
    "SplitPointClassifier",
    "SplitPointRegressor",
    "TemperatureScaling",
    "VectorScaling",
]
