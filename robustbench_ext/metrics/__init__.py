"""Metrics: pure functions of recorded arrays. Each gives a value, an interval, n, and says how it got them."""

from robustbench_ext.metrics.estimate import METRICS, Estimate, MetricInfo

__all__ = ["METRICS", "Estimate", "MetricInfo"]
