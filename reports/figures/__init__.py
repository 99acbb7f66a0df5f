"""Figures of results: each function draws on a matplotlib Axes and returns it, in a notebook as well as in the report."""

from reports.figures.accuracy import (
    against,
    axes_of,
    clean_against_robust,
    corruption_curve,
    distance_curves,
    forest,
    robust_accuracy_curve,
    robust_against_calibration,
    tradeoffs,
)
from reports.figures.detection import energy_histogram, roc, score_histogram
from reports.figures.drawing import MARKERS, new_axes
from reports.figures.grids import class_matrix, corruption_heatmap, corruption_matrix, per_class
from reports.figures.training import module_criticality, training_curve, training_energies, training_loss
from reports.figures.uncertainty import coverage_gap, intervals, reliability_diagram, risk_coverage, sharpness

__all__ = [
    "MARKERS",
    "against",
    "axes_of",
    "class_matrix",
    "clean_against_robust",
    "corruption_curve",
    "corruption_heatmap",
    "corruption_matrix",
    "coverage_gap",
    "distance_curves",
    "energy_histogram",
    "forest",
    "intervals",
    "module_criticality",
    "new_axes",
    "per_class",
    "reliability_diagram",
    "risk_coverage",
    "robust_accuracy_curve",
    "robust_against_calibration",
    "roc",
    "score_histogram",
    "sharpness",
    "tradeoffs",
    "training_curve",
    "training_energies",
    "training_loss",
]
