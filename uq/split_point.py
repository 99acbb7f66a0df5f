"""Split-point self-consistency of a regressor (SPC-UQ; Zhao, Chen 2025, arXiv 2509.13262).

At a fixed input let r = Y - v be the residual, p = P(r > 0), b = E[r], and

    U = E[r | r > 0],   D = E[-r | r <= 0],   M = E|r| = p U + (1 - p) D

its upper, lower and total mean absolute residuals (MARs). For every distribution with 0 < p < 1

    2 U D - M (U + D) = b (D - U),

so if the prediction is the conditional mean (b = 0), M is the harmonic mean of U and D, whatever the shape of the noise. Three
heads on frozen features estimate U, D and M independently of each other; where they contradict each other, they do not know:

    epistemic (SDS) = |2 U D - M (U + D)|,   aleatoric = U + D.

SDS is also 0 for a biased prediction where U = D: it is no test for bias. It vouches for no distance from the data: outside
of them it is the heads that part, which no theorem promises, and how much they do varies between seeds.
`benchmarks/uq/split_point.py` measures what is said here.

`SplitPointRegressor` is the estimator, `attach` puts it on any trained model; the functions are the mathematics alone.
The correction of class probabilities is in `uq.split_point_classifier`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robustbench_ext.errors import ConfigError, DataError
from robustbench_ext.models.contract import frozen_eval
from robustbench_ext.models.observe import PENULTIMATE, pooled
from robustbench_ext.models.options import whole
from robustbench_ext.numbers import parse_number
from uq.regression import NOMINAL, Prediction, RegressionEstimator, Samples
from uq.split_point_heads import Training, calibration_loss, fit_heads, pinball_loss

INPUTS = "inputs"
LOSSES = {"calibration": calibration_loss, "pinball": pinball_loss}
RESIDUALS = ("calibration", "train", "both")

_LEAST = 1e-6  # of a MAR or an interval's side, in units of the mean absolute residual
_ENOUGH = 20  # residuals on a side, of which 0.95 leaves one outside


# Mathematics -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Residuals:
    """Moments of residuals: `total`, `upper`, `lower` MAR, `share` above zero, mean `bias`; NaN for a side without any."""

    total: float
    upper: float
    lower: float
    share: float
    bias: float


def mean_absolute_residuals(residuals: np.ndarray) -> Residuals:
    """M, U, D, p and b of residuals (n,), n >= 1; a residual of 0 counts as below."""
    above = residuals > 0
    upper = float(residuals[above].mean()) if above.any() else np.nan
    lower = float(-residuals[~above].mean()) if not above.all() else np.nan
    return Residuals(float(np.abs(residuals).mean()), upper, lower, float(above.mean()), float(residuals.mean()))


def discrepancy(total: np.ndarray, upper: np.ndarray, lower: np.ndarray, root: bool = False) -> np.ndarray:
    """SDS = |2 U D - M (U + D)|, in units of y^2; its square root, in units of y, with `root`."""
    found = np.asarray(np.abs(2 * upper * lower - total * (upper + lower)))
    return np.asarray(np.sqrt(found)) if root else found


def harmonic_mean(upper: np.ndarray, lower: np.ndarray) -> np.ndarray:
    """The total MAR 2 U D / (U + D) that belongs to U, D > 0 where the prediction is the mean."""
    return np.asarray(2 * upper * lower / (upper + lower))


def solve_side(total: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The MAR of one side that is consistent with M and the other side's X: M X / (2 X - M), infinite where 2 X <= M.

    There no consistent value exists; the formula's negative values would read as "smaller than anything".
    """
    room = 2 * np.asarray(other, dtype=np.float64) - total
    return np.where(room > 0, total * other / np.where(room > 0, room, 1.0), np.inf)


def inflation(
    total: np.ndarray, upper: np.ndarray, lower: np.ndarray, cap: float = 10.0
) -> tuple[np.ndarray, np.ndarray]:
    """Factors (up, down) in [1, cap] for the two sides of an interval: max(1, U* / U), max(1, D* / D), of positive MARs.

    Both are above 1 exactly where M is larger than the harmonic mean of U and D, and `cap` where no U* (D*) exists. A smaller
    M inflates nothing, so the factors see half of the discrepancies that SDS counts. They do not fall as M rises.
    """
    up, down = solve_side(total, lower) / upper, solve_side(total, upper) / lower
    return np.clip(up, 1.0, cap), np.clip(down, 1.0, cap)


def side_coverage(residuals: np.ndarray, up: np.ndarray, down: np.ndarray) -> tuple[float, float, float]:
    """Shares (above, below, all) of residuals (n,) inside [-down, up]; NaN for a side without residuals.

    all = p above + (1 - p) below, so if each side has coverage tau, the interval has it too, whatever p is.
    """
    above = residuals > 0
    inside = np.where(above, residuals <= up, -residuals <= down)
    shares = [float(inside[side].mean()) if side.any() else np.nan for side in (above, ~above)]
    return shares[0], shares[1], float(inside.mean())


# The estimator ---------------------------------------------------------------------------------------------------------


class SplitPointRegressor(RegressionEstimator):
    """Heads for the MARs and for both sides of every nominal interval, on a regressor that stays as it is.

    The interval is [v - q_down, v + q_up], each q covering the nominal share of the residuals of its side; it is no pair of
    quantiles. Aleatoric (units of y) is U + D, epistemic SDS (units of y^2, with `root` of y); they are not added up.

    Args:
        tap: what the heads read: a tap of a network ("penultimate": its last hidden layer, as published), or "inputs" for
            regressors without features.
        residuals: whose residuals the heads learn. "calibration": held-out ones (default). "train": as published; a network
            that has fitted its noise shows residuals that are too small there, and intervals under-cover. "both".
        loss: of the intervals, "calibration" as published, or "pinball"; see `uq.split_point_heads`. The published one stops
            where coverage is met, so it learns less by heart: with few samples its intervals were the better ones, with many
            both were alike.
        calibrate: widen each side by the factor of `inflation`; off, as in the published scripts. Without effect where one
            side had no residuals to learn from.
        cap: the largest such factor (this project's; the published formula is negative where heads contradict most).
        root: epistemic as the square root of SDS.
        width: hidden units of the heads.
        steps, batch_size, learning_rate, weight_decay, early_stopping: see `Training`. Published are 5,000 steps on all
            samples. Batches are at least 64: a smaller one cannot show a coverage of 0.95. Early stopping, off as published,
            helps aleatoric and coverage where samples are few, and weakens SDS: heads that have learnt less contradict each
            other less.
        seed: of initial weights and batches, added to the fit's.

    MARs have linear outputs, and SDS is made of these: a positive output saturates at 0 outside of the data, where then all
    three agree. Aleatoric and the factors take the outputs' positive part. Residuals are divided by their mean absolute value,
    so nothing depends on the units of y.
    """

    name: ClassVar[str] = "split-point"
    reference: ClassVar[str] = "arXiv 2509.13262"

    def __init__(
        self,
        tap: str = PENULTIMATE,
        residuals: str = "calibration",
        loss: str = "calibration",
        calibrate: bool = False,
        cap: float = 10.0,
        root: bool = False,
        width: int = 64,
        steps: int = 2000,
        batch_size: int = 256,
        learning_rate: float = 1e-3,
        weight_decay: float = 1e-4,
        early_stopping: bool = False,
        seed: int = 0,
    ) -> None:
        for what, value, known in (("residuals", residuals, RESIDUALS), ("loss", loss, tuple(LOSSES))):
            if value not in known:
                raise ConfigError(f"{self.name}: {what} = {value!r}, expected one of {', '.join(known)}")
        self.tap, self.residuals, self.loss = tap, residuals, loss
        self.taps = () if tap == INPUTS else (tap,)
        self.calibrate, self.root = bool(calibrate), bool(root)
        self.cap = parse_number(cap, f"{self.name}: cap")
        if self.cap < 1:
            raise ConfigError(f"{self.name}: cap = {self.cap}, expected a factor >= 1")
        self.width, self.seed = whole(width, 1, f"{self.name}: width"), whole(seed, 0, f"{self.name}: seed")
        training = Training(steps, batch_size, learning_rate, weight_decay, early_stopping)
        self.training = training.checked(self.name, least_batch=64)
        self._notes: list[str] = []
        self._summary: dict[str, float] = {}

    def parameters(self) -> dict[str, Any]:
        named = ("tap", "residuals", "loss", "calibrate", "cap", "root", "width")
        return {name: getattr(self, name) for name in named} | vars(self.training) | {"seed": self.seed}

    def warnings(self) -> list[str]:
        return list(self._notes)

    def summary(self) -> dict[str, float]:
        return dict(self._summary)

    # Fitting ---------------------------------------------------------------------------------------------------------

    def _fit(self, train: Samples, calibration: Samples, model: nn.Module | None, seed: int) -> None:
        chosen = {"calibration": [calibration], "train": [train], "both": [train, calibration]}[self.residuals]
        features = torch.cat([self._features(s) for s in chosen])
        r = np.concatenate([_targets(s) - s.prediction.astype(np.float64) for s in chosen])
        scale = float(np.abs(r).mean())
        if not scale > 0:
            raise DataError(
                f"{self.name}: all {len(r)} residuals are zero, so there is nothing to learn of them. Fit on samples that the "
                f"regressor was not trained on (residuals='calibration')."
            )
        moments = mean_absolute_residuals(r)
        self._scale = scale
        self._empty = (not moments.share > 0, not moments.share < 1)
        self._notes = self._doubts(r, moments)
        objective = _Objective(torch.from_numpy(r / scale), LOSSES[self.loss])
        self._heads, steps = fit_heads(
            features, self.width, objective.start(), self.training, objective.loss, objective.judge, self.seed + seed
        )
        self._summary = {
            "share_above": moments.share,
            "bias": moments.bias,
            "mar": moments.total,
            "steps": float(steps),
        }

    def _doubts(self, r: np.ndarray, moments: Residuals) -> list[str]:
        notes = []
        above = int((r > 0).sum())
        for side, count in (("above", above), ("below", len(r) - above)):
            if count == 0:
                notes.append(f"no residual is {side} the prediction: that side of the intervals has no width")
            elif count < _ENOUGH:
                notes.append(
                    f"only {count} residuals are {side} the prediction, too few to learn a coverage of 0.95 from"
                )
        error = float(r.std()) / np.sqrt(len(r))
        if abs(moments.bias) > 3 * error:
            notes.append(
                f"the predictions are off by {-moments.bias:.3g} on average (standard error {error:.2g}); where "
                f"residuals are skewed, this bias is part of the epistemic score"
            )
        return notes

    def _features(self, samples: Samples) -> Tensor:
        found = samples.x if self.tap == INPUTS else samples.features[self.tap]
        return torch.from_numpy(np.ascontiguousarray(found, dtype=np.float64))

    # Prediction ------------------------------------------------------------------------------------------------------

    def _predict(self, samples: Samples, model: nn.Module | None, seed: int) -> Prediction:
        mars, up, down = self._read(samples)
        total, upper, lower = mars.T
        epistemic = discrepancy(total, upper, lower, self.root)
        total, upper, lower = np.maximum(mars, _LEAST * self._scale).T
        if self.calibrate and not any(self._empty):  # with an empty side p is 0 or 1, and the factors' identity fails
            wider = inflation(total, upper, lower, self.cap)
            up, down = up * wider[0][:, None], down * wider[1][:, None]
        point = samples.prediction.astype(np.float64)
        return Prediction(
            point, point[:, None] - down, point[:, None] + up, aleatoric=upper + lower, epistemic=epistemic
        )

    def _read(self, samples: Samples) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """MARs (N, 3) as they come: total, upper, lower; the sides' reach (N, L) up and down, not falling with the level."""
        out = _reach(self._heads(self._features(samples))[0]).numpy() * self._scale
        mars, up, down = np.split(out, [3, 3 + len(NOMINAL)], axis=1)
        for i, side in enumerate((up, down)):
            if self._empty[i]:
                mars[:, 1 + i], side[:] = 0.0, 0.0
        return mars, np.sort(up, axis=1), np.sort(down, axis=1)


def _targets(samples: Samples) -> np.ndarray:
    if samples.y is None:  # `fit` has refused this
        raise DataError("split-point: samples without targets")
    return samples.y.astype(np.float64)


def _reach(out: Tensor) -> Tensor:
    """Outputs (n, 3 + 2 L) with the interval sides made positive; the three MARs stay as they are."""
    return torch.cat([out[:, :3], F.softplus(out[:, 3:]) + _LEAST], dim=1)


class _Objective:
    """What heads of standardised residuals (n,) are fitted to: three squared errors, and the interval loss of either side."""

    def __init__(self, r: Tensor, interval: Any) -> None:
        self.r, self.interval = r, interval
        self.tau = torch.tensor(NOMINAL, dtype=r.dtype)

    def start(self) -> Tensor:
        """Initial output bias (1, 3 + 2 L): about one mean absolute residual each, which is 1."""
        levels = len(NOMINAL)
        return torch.cat([torch.ones(3), torch.full((2 * levels,), 0.5)])[None]

    def loss(self, out: Tensor, batch: Tensor) -> Tensor:
        return self._terms(out, batch, self.interval)

    def judge(self, out: Tensor, batch: Tensor) -> Tensor:
        """The same with the pinball loss, which is smallest at the quantiles; the published loss is 0 at any mean coverage."""
        return self._terms(out, batch, pinball_loss)

    def _terms(self, out: Tensor, batch: Tensor, interval: Any) -> Tensor:
        found, r, levels = _reach(out[0]), self.r[batch], len(NOMINAL)
        above = r > 0
        total = (found[:, 0] - r.abs()).square().mean()
        for side, distance, column in ((above, r, 0), (~above, -r, 1)):
            if bool(side.any()):  # a side without samples has no term
                mine, reach = found[side], slice(3 + column * levels, 3 + (column + 1) * levels)
                total = total + (mine[:, 1 + column] - distance[side]).square().mean()
                total = total + interval(mine[:, reach], distance[side], self.tau).sum()
        return total


# On any trained model --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attached:
    """A trained model with a fitted estimator beside it; the model is not changed."""

    model: Any
    estimator: SplitPointRegressor

    def predict(self, x: np.ndarray) -> Prediction:
        """The model's own predictions of inputs (N, d), with intervals, aleatoric and epistemic scores."""
        return self.estimator.predict(samples_of(self.model, x, tap=self.estimator.tap))


def attach(model: Any, x: np.ndarray, y: np.ndarray, **options: Any) -> Attached:
    """Fit split-point heads to a trained regressor, as it is.

    Args:
        model: a torch module that maps (N, d) to (N,) or (N, 1), or anything with `predict(x)`, such as
            scikit-learn's regressors.
        x, y: inputs (N, d) and targets (N,) that the model was not trained on.
        options: of `SplitPointRegressor`. `tap` is "penultimate" for torch modules, "inputs" otherwise.

    Raises:
        ConfigError, DataError: as the estimator's; the model gives no (N,) predictions, or the tap is not reached.
    """
    options = {"tap": PENULTIMATE if isinstance(model, nn.Module) else INPUTS, **options}
    estimator = SplitPointRegressor(**options)
    held_out = samples_of(model, x, y, tap=estimator.tap)
    return Attached(model, estimator.fit(held_out, held_out))


def samples_of(model: Any, x: np.ndarray, y: np.ndarray | None = None, tap: str = INPUTS) -> Samples:
    """Inputs (N, d) with a trained model's predictions and, of a torch module, the features `tap`; see `attach`."""
    x = np.asarray(x)
    features: dict[str, np.ndarray] = {}
    if isinstance(model, nn.Module):
        v, features = _observe(model, x, tap)
    elif tap != INPUTS:
        raise ConfigError(f"split-point: {type(model).__name__} has no features '{tap}'; give tap='inputs'")
    else:
        v = np.asarray(model.predict(x), dtype=np.float64)
    if v.size != len(x):
        raise DataError(f"split-point: the model predicts {v.shape} for {len(x)} inputs, expected ({len(x)},)")
    return Samples(x, v.reshape(len(x)), None if y is None else np.asarray(y, dtype=np.float64), features)


def _observe(model: nn.Module, x: np.ndarray, tap: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Predictions and features of a torch module, by a hook on the very model, in evaluation mode."""
    caught: dict[str, Tensor] = {}
    modules = dict(model.named_modules())
    if tap not in (INPUTS, PENULTIMATE) and tap not in modules:
        raise ConfigError(f"split-point: the model has no module '{tap}'; name one, or 'penultimate' or 'inputs'")
    handles = []
    if tap == PENULTIMATE:  # the last linear layer to run wins
        for module in modules.values():
            if isinstance(module, nn.Linear):
                handles.append(module.register_forward_pre_hook(lambda _, given: caught.update({tap: given[0]})))
    elif tap != INPUTS:
        handles.append(modules[tap].register_forward_hook(lambda _, __, made: caught.update({tap: made})))
    first = next(model.parameters(), torch.zeros(()))
    try:
        with torch.no_grad(), frozen_eval(model):
            v = model(torch.from_numpy(x).to(first.device, first.dtype))
    finally:
        for handle in handles:
            handle.remove()
    if tap != INPUTS and tap not in caught:
        raise DataError(f"split-point: features '{tap}' were not reached by a forward pass; name another module")
    return v.double().cpu().numpy(), {name: pooled(f).double().cpu().numpy() for name, f in caught.items()}
