"""Metrics of a user's own: functions of logits and labels that give a number per sample, named in a suite's `metrics`.

    def top2(logits, labels):
        \"\"\"Top-2 accuracy: the label is one of the two most probable classes.\"\"\"
        return (logits.topk(2).indices == labels[:, None]).any(dim=1)

    top2.higher_is_better = True

The mean over samples is reported, of every model under every condition in which each sample has a label and logits of its own,
with Wilson's interval where the numbers are yes or no (bool), otherwise with that of the bootstrap, and models are compared in
it like in others. Records are no part of a metric, so an edited one costs no pass through a model; the numbers are kept beside
them, so that comparing finished runs runs none of this code.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robustbench_ext.errors import ConfigError
from robustbench_ext.evaluate import Context
from robustbench_ext.measured import Columns, Measured, row, rows
from robustbench_ext.metrics import METRICS, Estimate, MetricInfo
from robustbench_ext.metrics.blocks import each
from robustbench_ext.metrics.classification import accuracy
from robustbench_ext.metrics.resampling import resampled_mean
from robustbench_ext.named_code import load_named
from robustbench_ext.own import is_own, mark
from robustbench_ext.probes import CLASSIFIER

TRIED = 4  # samples on which a metric is tried before the run


@dataclass(frozen=True)
class OwnMetric:
    """A metric with what reports need to know of it; `version` holds the hash of its source."""

    name: str
    origin: str
    version: str
    info: MetricInfo
    function: Callable[[Tensor, Tensor], Tensor]

    def described(self) -> dict[str, Any]:
        """As it stands in results.json beside the definitions of the other metrics."""
        return {**asdict(self.info), "origin": self.origin, "version": self.version}

    def values(self, logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """A number per sample, float64 or bool (n,).

        Raises:
            ConfigError: it raises, or gives anything else.
        """
        try:
            with torch.no_grad():
                found = torch.as_tensor(self.function(torch.from_numpy(logits.copy()), torch.from_numpy(labels.copy())))
        except Exception as error:  # the user's own code
            raise ConfigError(f"metric '{self.origin}' raised {type(error).__name__}: {error}") from error
        if found.shape != (len(labels),) or not bool(torch.isfinite(found).all()):
            raise ConfigError(
                f"metric '{self.origin}' gave values of shape {tuple(found.shape)} for {len(labels)} samples, expected "
                f"one finite number, or one bool, per sample"
            )
        return found.numpy() if found.dtype == torch.bool else found.double().numpy()


def own_metrics(specs: Sequence[str], classes: int) -> list[OwnMetric]:
    """The metrics that a suite names, each tried on random logits.

    Args:
        specs: `file.py:function` or `pkg.module:function`; classes: K.

    Raises:
        ConfigError: no such function, one without a docstring, a name that is taken, or a function that gives something else.
    """
    found: list[OwnMetric] = []
    for spec in specs:
        if not is_own(spec):
            raise ConfigError(
                f"metric '{spec}': expected file.py:function or pkg.module:function; metrics that come with the package are "
                f"all computed, without being named"
            )
        function = load_named(spec, "metric")
        is_function = inspect.isfunction(function)  # a name of its own: narrowed, it would have no attributes
        if not is_function:
            raise ConfigError(
                f"metric '{spec}' is a {type(function).__name__}, expected a function of logits and labels"
            )
        text = inspect.cleandoc(function.__doc__ or "").partition("\n\n")[0].replace("\n", " ")
        if not text:
            raise ConfigError(f"metric '{spec}' has no docstring; reports print its first paragraph as the definition")
        mark(function, spec)
        if function.name in METRICS or function.name in [metric.name for metric in found]:
            raise ConfigError(f"metric '{spec}': the name '{function.name}' is taken; give the function another one")
        found.append(_tried(function, spec, text, classes))
    return found


def _tried(function: Any, spec: str, definition: str, classes: int) -> OwnMetric:
    title, higher = function.name.replace("_", " "), getattr(function, "higher_is_better", None)
    metric = OwnMetric(function.name, spec, function.version, MetricInfo(title, definition, higher, False), function)
    labels = np.arange(TRIED, dtype=np.int64) % classes
    values = metric.values(np.random.default_rng(0).normal(size=(TRIED, classes)).astype(np.float32), labels)
    info = MetricInfo(title, definition, higher, percent=values.dtype == np.bool_)
    return OwnMetric(function.name, spec, function.version, info, function)


def measure_own(out: Measured, context: Context, model: str, condition: str, columns: Columns) -> None:
    """Add a row for each metric, and keep its values for comparisons; one that fails here is undefined, and says why."""
    for metric in context.metrics:
        n = len(columns["label"])
        try:
            (values,) = each(lambda z, y, m=metric: (m.values(z, y),), rows(columns, "logits"), columns["label"])
            estimate = accuracy(values) if values.dtype == np.bool_ else resampled_mean(values)
            if not context.store.has(key := context.metric_key(model, condition, metric)):
                meta = {"what": f"{model} · {condition} · {metric.name}", "origin": metric.origin}
                context.store.save(key, {"value": values}, meta)
        except ConfigError as error:
            estimate = Estimate.undefined(n, str(error))
        out.rows.append(row(model, condition, CLASSIFIER, metric.name, estimate))
