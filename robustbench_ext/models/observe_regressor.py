"""The contract of regressors, enforced, and what they say of some inputs: predictions and features in one pass.

A regressor takes float32 (N, d) in raw units and returns (N,) or (N, 1) in units of the target, finite.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from robustbench_ext import device as devices
from robustbench_ext.errors import DataError, ModelError, unknown_name
from robustbench_ext.models.contract import asked_later, finite_later, frozen_eval
from robustbench_ext.models.observe import PENULTIMATE, Taps


def check_table(x: Tensor, columns: int | None = None, what: str = "inputs") -> None:
    """Raise DataError unless x is a finite float32 (N, d) tensor, with d = `columns` where that is given."""
    if not isinstance(x, Tensor):
        raise DataError(f"{what}: got {type(x).__name__}, expected a torch.Tensor of shape (N, d)")
    if x.ndim != 2 or (columns is not None and x.shape[1] != columns):
        raise DataError(f"{what}: shape {tuple(x.shape)}, expected (N, {'d' if columns is None else columns})")
    if x.dtype != torch.float32:
        raise DataError(f"{what}: dtype {x.dtype}, expected torch.float32: call .float()")
    if not bool(torch.isfinite(x).all()):
        raise DataError(f"{what} hold NaN or infinity. Fill in or leave out missing values before evaluating on them.")


def check_predictions(predictions: object, n: int) -> Tensor:
    """Predictions (n,) or (n, 1) as float64 (n,), with their gradient; ModelError where they are misshapen or not finite."""
    if not isinstance(predictions, Tensor):
        raise ModelError(
            f"the regressor returned {type(predictions).__name__}, expected a tensor of shape (N,) or (N, 1)"
        )
    if tuple(predictions.shape) not in ((n,), (n, 1)):
        raise ModelError(
            f"the regressor returned shape {tuple(predictions.shape)} for {n} inputs, expected ({n},) or ({n}, 1): one number "
            f"for each input. A model with more outputs (quantiles, a variance) needs a wrapper that returns its prediction."
        )
    if asked_later(predictions):
        return predictions.reshape(n).double()
    bad = ~torch.isfinite(predictions)
    if bool(bad.any()):
        raise ModelError(
            f"the regressor returned NaN or infinity for {int(bad.sum())} of {n} inputs (first: row "
            f"{int(bad.reshape(-1).nonzero()[0])}). Check its weights, and its scaling of constant columns (division by 0)."
        )
    return predictions.reshape(n).double()


def predictions_of(model: nn.Module, x: Tensor) -> Tensor:
    """One checked forward pass: finite float64 predictions (N,)."""
    return check_predictions(model(x), len(x))


@dataclass(frozen=True)
class RegressionObservations:
    """Predictions float64 (N,), features by tap name, each float32 (N, f)."""

    predictions: Tensor
    features: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.predictions)


def observe_regressor(
    model: nn.Module,
    x: Tensor,
    taps: Sequence[str] = (),
    batch_size: int = 1000,
    device: torch.device | str | None = None,
) -> RegressionObservations:
    """Predictions and features of all inputs in evaluation mode, batch by batch, without gradients; they lie on the CPU.

    Args:
        model: a regressor.
        x: float32 (N, d).
        taps: names of modules, or `penultimate` (the input of the last linear layer that runs).
        batch_size: changes speed and memory, not the result beyond rounding.
        device: where the model is; asked of the model by default.

    Raises:
        DataError, ModelError: inputs or predictions break the contract, or a tap is not there.
    """
    check_table(x)
    taps = tuple(dict.fromkeys(taps))
    modules = [name for name, _ in model.named_modules() if name]
    for tap in taps:
        if tap != PENULTIMATE and tap not in modules:
            raise ModelError(unknown_name("feature tap", tap, [PENULTIMATE, *modules]))
    if PENULTIMATE in taps and not any(isinstance(m, nn.Linear) for m in model.modules()):
        raise ModelError(
            "feature tap 'penultimate': this regressor has no linear layer of a network, so it has no features"
        )
    # Taps speaks of logits: it sees a classifier of two equal columns that holds the regressor.
    columns = _TwoColumns(model)
    reader = Taps(columns, [tap if tap == PENULTIMATE else f"regressor.{tap}" for tap in taps])
    predictions: list[Tensor] = []
    features: dict[str, list[Tensor]] = {tap: [] for tap in taps}
    there = devices.of(model, x.device) if device is None else torch.device(device)
    with torch.no_grad(), frozen_eval(model), devices.float32(), finite_later():
        for start in range(0, len(x), batch_size):
            batch = devices.send(x[start : start + batch_size], there, copy=True)
            if not taps:
                predictions.append(predictions_of(model, batch).cpu())
                continue
            found = reader(batch)[1]
            predictions.append(columns.last.cpu())
            for tap, feature in zip(taps, found.values(), strict=True):
                features[tap].append(feature.float().cpu())
    empty = torch.zeros(0, dtype=torch.float64)
    joined = {tap: torch.cat(parts) for tap, parts in features.items() if parts}
    return RegressionObservations(torch.cat(predictions) if predictions else empty, joined)


class _TwoColumns(nn.Module):
    """A regressor in the form of a classifier; `last` holds the predictions of the last pass, not rounded to float32."""

    def __init__(self, regressor: nn.Module) -> None:
        super().__init__()
        self.regressor = regressor
        self.last = torch.zeros(0)

    def forward(self, x: Tensor) -> Tensor:
        self.last = predictions_of(self.regressor, x)
        return torch.stack([self.last, self.last], dim=1)
