"""May this number be trusted? The preflight of regressors: checks that take seconds, with a verdict.

As for classifiers (`robustbench_ext.preflight`), each check is pass, doubt or fail, with the evidence and a hint, and a failed
check marks every result of the model.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from robustbench_ext import device as devices
from robustbench_ext.checks import Check
from robustbench_ext.data.base import Dataset
from robustbench_ext.errors import RobustBenchExtError
from robustbench_ext.models.contract import frozen_eval
from robustbench_ext.models.observe_regressor import check_predictions, check_table, predictions_of

REGRESSION_PREFLIGHT_VERSION = 1
SAMPLES = 256
FAR = 10.0  # standard deviations from the training mean at which a test column is on another scale


def preflight_regressor(model: nn.Module, data: Dataset, n: int = SAMPLES) -> list[Check]:
    """Check a regressor against the first n test samples of a dataset.

    Order matters: once the inputs or the outputs break the contract, the checks that need them are left out.

    Cost: four forward passes of n samples and one of each of four; no backward pass.

    Raises:
        torch.OutOfMemoryError: n samples do not fit, which is not the model's fault; or what else `device.is_out_of_memory`
            knows.
    """
    split = data["test"].take(n)
    x, y = split.inputs(slice(None)), split.labels
    checks: list[Check] = []

    def attempt(name: str, hint: str, check: Callable[[], Check]) -> bool:
        try:
            checks.append(check())
        except RobustBenchExtError as error:
            checks.append(Check(name, "fail", str(error), hint))
        except (
            Exception,
            SystemExit,
        ) as error:  # the model is foreign code: whatever it raises is a finding, not a crash
            if devices.is_out_of_memory(error):
                raise
            checks.append(Check(name, "fail", f"the model raised {type(error).__name__}: {error}", hint))
        return checks[-1].status != "fail"

    if not attempt("input range", "", lambda: _range(x, data)):
        return checks
    x = x.to(devices.of(model, x.device))
    checks.append(_mode(model))
    with frozen_eval(model):
        shapes = "The regressor must accept float32 (N, d) in raw units and return (N,) or (N, 1)."
        if not attempt("in-place changes", shapes, lambda: _in_place(model, x)):
            return checks
        if not attempt("forward pass", shapes, lambda: _forward(model, x)):
            return checks
        with torch.no_grad():
            predicted = predictions_of(model, x.clone())
        attempt("determinism", "", lambda: _determinism(model, x, predicted))
        attempt("batch independence", "", lambda: _batches(model, x, predicted))
        attempt("constant prediction", "", lambda: _constant(predicted, data))
        attempt("error", "", lambda: _error(predicted.cpu().numpy(), y, data))
    return checks


def has_gradient(model: nn.Module, x: Tensor) -> bool:
    """Whether the predictions at x (N, d) depend on x through operations that have a derivative."""
    at = x.clone().to(devices.of(model, x.device)).requires_grad_(True)
    with frozen_eval(model), torch.enable_grad():
        out = check_predictions(model(at), len(at))
        if not out.requires_grad:
            return False
        (gradient,) = torch.autograd.grad(out.sum(), at, allow_unused=True)
    return gradient is not None


def _range(x: Tensor, data: Dataset) -> Check:
    check_table(x, data.shape[0])
    if "train" not in data.splits:
        return Check("input range", "pass", f"float32, finite, {x.shape[1]} columns")
    train = data["train"].inputs(slice(None)).double()
    spread = train.std(dim=0, correction=0)
    away = ((x.double().median(dim=0).values - train.mean(dim=0)).abs() / spread)[spread > 0]
    if len(away) and float(away.max()) > FAR:
        names = [f.name for f, s in zip(data.features, spread.tolist(), strict=True) if s > 0]
        return Check(
            "input range",
            "doubt",
            f"the median of column '{names[int(away.argmax())]}' lies {float(away.max()):.3g} training standard deviations "
            f"from the training mean",
            "Are test and training data in the same units? A regressor that extrapolates so far says nothing of either.",
        )
    return Check("input range", "pass", f"float32, finite, {x.shape[1]} columns, in the range of the training data")


def _mode(model: nn.Module) -> Check:
    if any(m.training for m in model.modules()):
        return Check("mode", "pass", "handed over in training mode; evaluated in eval mode and handed back as it was")
    return Check("mode", "pass", "eval mode")


def _in_place(model: nn.Module, x: Tensor) -> Check:
    given = x.clone()
    with torch.no_grad():
        model(given)  # the first pass: a model that cannot take the input at all says so here
    if not torch.equal(given, x):
        return Check(
            "in-place changes",
            "fail",
            "the model changes its input in place",
            "Attacks would judge other inputs than they return. Work on a copy: x = (x - m) / s instead of x.sub_(m).div_(s).",
        )
    return Check("in-place changes", "pass", "the input is left as it is")


def _forward(model: nn.Module, x: Tensor) -> Check:
    with torch.no_grad():
        out = predictions_of(model, x.clone())
    return Check("forward pass", "pass", f"finite predictions in [{float(out.min()):.4g}, {float(out.max()):.4g}]")


def _size(predicted: Tensor) -> float:
    """What rounding is measured against: the size of the predictions."""
    return max(float(predicted.abs().max()), 1e-30)


def _determinism(model: nn.Module, x: Tensor, predicted: Tensor) -> Check:
    with torch.no_grad():
        again = predictions_of(model, x.clone())
    gap = float((again - predicted).abs().max())
    if gap > 1e-4 * _size(predicted):
        return Check(
            "determinism",
            "fail",
            f"two passes over the same batch differ by {gap:.3g} in eval mode",
            "Dropout that stays on (F.dropout without training=self.training), or random layers? Predictions must not "
            "depend on chance; for passes with dropout take the estimator mc-dropout, which draws them itself.",
        )
    return Check("determinism", "pass", "two passes agree")


def _batches(model: nn.Module, x: Tensor, predicted: Tensor) -> Check:
    with torch.no_grad():
        alone = torch.cat([predictions_of(model, x[i : i + 1].clone()) for i in range(min(4, len(x)))])
    gap = float((alone - predicted[: len(alone)]).abs().max())
    if gap > 1e-3 * _size(predicted):
        return Check(
            "batch independence",
            "fail",
            f"a sample's prediction changes by {gap:.3g} with its batch",
            "Some layer uses batch statistics in eval mode (track_running_stats=False?): one sample's inputs would change "
            "another's prediction.",
        )
    return Check("batch independence", "pass", "a sample's prediction does not depend on its batch")


def _constant(predicted: Tensor, data: Dataset) -> Check:
    spread = float(predicted.std(correction=0))
    if spread <= 1e-6 * float(data["test"].labels.std()):
        return Check(
            "constant prediction",
            "fail",
            f"the prediction is {float(predicted[0]):.4g} for every input",
            "Dead units, a scaling that maps every input to one point, or weights that were never trained.",
        )
    return Check("constant prediction", "pass", f"predictions vary, standard deviation {spread:.4g}")


def _error(predicted: np.ndarray, y: np.ndarray, data: Dataset) -> Check:
    """Against the training mean, the best constant that a model could have known."""
    mean = float(data["train"].labels.mean()) if "train" in data.splits else float(y.mean())
    mine, theirs = float(np.mean((predicted - y) ** 2)), float(np.mean((mean - y) ** 2))
    message = f"mean squared error {mine:.4g} on {len(y)} samples, {theirs:.4g} for the mean of the training targets"
    if mine >= theirs:
        return Check(
            "error",
            "doubt",
            f"{message}: no better than a constant",
            "Untrained weights, other units of the target, columns in another order, or inputs that it expects scaled?",
        )
    return Check("error", "pass", message)
