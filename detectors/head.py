"""The last layer of a classifier: logits = f W^T + b, for detectors that change features or weights and ask again."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustbench_ext.errors import ConfigError, DataError, ModelError
from robustbench_ext.models.observe import PENULTIMATE, Observations


@dataclass(frozen=True)
class Head:
    """Weights (K, d) and bias (K,), float64."""

    weight: Tensor
    bias: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """Logits (n, K) of penultimate features (n, d), float64."""
        if features.ndim != 2 or features.shape[1] != self.weight.shape[1]:
            raise DataError(
                f"features have shape {tuple(features.shape)}, the last layer takes (n, {self.weight.shape[1]})"
            )
        return features.double() @ self.weight.T + self.bias


def head_of(model: nn.Module | None, seen: Observations, name: str) -> Head:
    """The linear layer that makes a model's logits of its penultimate features.

    Args:
        seen: logits with penultimate features, on which the layer is recognised.
        name: of the detector that asks, for the message.

    Raises:
        ModelError: no linear layer does, up to one factor for all logits (cosine classifiers, several heads).
    """
    if model is None:
        raise ConfigError(f"{name}: fitting looks at the model: fit_observations(train, model=model)")
    features, logits = seen.features[PENULTIMATE][:256], seen.logits[:256].double()
    scale = float(logits.abs().max()) or 1.0
    for module in reversed([m for m in model.modules() if isinstance(m, nn.Linear)]):
        if tuple(module.weight.shape) != (logits.shape[1], features.shape[1]):
            continue
        weight = module.weight.detach().double().cpu()
        bias = module.bias.detach().double().cpu() if module.bias is not None else torch.zeros(len(weight)).double()
        plain = Head(weight, bias)(features)
        # One factor behind the layer, such as a temperature, belongs to it.
        factor = float((plain * logits).sum() / plain.square().sum().clamp_min(1e-300))
        head = Head(factor * weight, factor * bias)
        if bool(((head(features) - logits).abs() <= 1e-4 * scale).all()):
            return head
    raise ModelError(
        f"{name}: no linear layer of the model makes its logits ({logits.shape[1]}) of its penultimate features "
        f"({features.shape[1]}). This detector needs a linear last layer with nothing but a factor behind it."
    )
