"""Weights on the quantiles of several models: global or by a network of x, at three resolutions, fitted to the pinball loss.

Fakoor, Kim, Mueller, Smola, Tibshirani: *Flexible Model Aggregation for Quantile Regression*, JMLR 24 (2023), arXiv
2103.00083. With p models and m levels:

    coarse   one weight per model (p)
    medium   one per model and level (p, m); for each level they sum to one over the models
    fine     every level of every model feeds every level (m, p, m); for each level they sum to one over all that feeds it

Softmax keeps weights positive with the right sums, so an aggregate lies within the hull of what it is made of. Local fine
weights are their deep quantile aggregation. The models' predictions are data: no gradient reaches them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustbench_ext.errors import ConfigError
from uq.fitting import Fit, minimise, mlp
from uq.isotonic import OPERATORS, operator
from uq.pinball import adaptive_margins, crossing_penalty, pinball, wis_sum

RESOLUTIONS = ("coarse", "medium", "fine")
_BLOCK = 1 << 23  # weights that are held at a time when predicting


def normalised(logits: Tensor, resolution: str) -> Tensor:
    """Weights from logits of shape (..., p), (..., p, m) or (..., m, p, m): softmax over what must sum to one."""
    if resolution == "coarse":
        return logits.softmax(-1)
    if resolution == "medium":
        return logits.softmax(-2)
    return logits.flatten(-2).softmax(-1).view(logits.shape)


def aggregate(weights: Tensor, base: Tensor, resolution: str) -> Tensor:
    """Quantiles (N, m) from base (N, p, m) and weights as of `normalised`, with or without a leading N (or 1)."""
    if resolution == "coarse":
        return (weights[..., None] * base).sum(-2)
    if resolution == "medium":
        return (weights * base).sum(-2)
    return torch.einsum("...kpm,...pm->...k", weights, base)


@dataclass(frozen=True)
class Shape:
    """Which weights.

    Args:
        resolution: one of `RESOLUTIONS`.
        local: weights by a network of x, of that width, layers and dropout; else the same for all x.
        diagonal: logit that fine weights start with where a level feeds itself. At 0 they would start at the mean over all
            levels, a nearly flat set of quantiles.

    Raises:
        ConfigError: the resolution is unknown.
    """

    resolution: str = "fine"
    local: bool = True
    width: int = 64
    layers: int = 2
    dropout: float = 0.0
    diagonal: float = 4.0

    def __post_init__(self) -> None:
        if self.resolution not in RESOLUTIONS:
            raise ConfigError(f"resolution must be one of {', '.join(RESOLUTIONS)}, got {self.resolution!r}")


class Aggregator(nn.Module):
    """Weights of `shape` for d inputs, p models and m levels. It starts uniform over the models, whether local or not."""

    def __init__(self, shape: Shape, d: int, p: int, m: int) -> None:
        super().__init__()
        self.shape = shape
        self.form = {"coarse": (p,), "medium": (p, m), "fine": (m, p, m)}[shape.resolution]
        start = torch.zeros(self.form)
        if shape.resolution == "fine":
            start += shape.diagonal * torch.eye(m)[:, None, :]
        if shape.local:
            self.net = mlp(d, start.numel(), shape.width, shape.layers, shape.dropout)
            last = self.net[-1]
            assert isinstance(last, nn.Linear)  # noqa: S101 - mlp ends in one
            nn.init.zeros_(last.weight)
            with torch.no_grad():
                last.bias.copy_(start.flatten())
        else:
            self.logits = nn.Parameter(start)

    def weights(self, x: Tensor) -> Tensor:
        """(N, ...) for x (N, d) where local, (1, ...) otherwise."""
        logits = self.net(x).view(-1, *self.form) if self.shape.local else self.logits[None]
        return normalised(logits, self.shape.resolution)

    def forward(self, x: Tensor, base: Tensor) -> Tensor:
        """Quantiles (N, m), not yet sorted, for x (N, d) and the models' base (N, p, m)."""
        return aggregate(self.weights(x), base, self.shape.resolution)

    def predict(self, x: Tensor, base: Tensor) -> Tensor:
        """The same without gradient, in blocks of samples."""
        rows = max(1, _BLOCK // max(1, torch.Size(self.form).numel()))
        with torch.no_grad():
            return torch.cat([self(a, b) for a, b in zip(x.split(rows), base.split(rows), strict=True)])


@dataclass(frozen=True)
class Objective:
    """What is minimised: summed pinball loss + margin_weight times the penalty on crossing of all pairs of levels.

    Args:
        margin: the distance that two levels should keep, in standard deviations of y.
        adaptive: the margin of a pair is `margin` times the distance of the pilot's residual quantiles instead; the pilot is
            the median over models of their medians.
        inside: isotonisation that the loss is taken after, gradients through it; one of `OPERATORS`.

    Raises:
        ConfigError: the operator is unknown, or a number is negative.
    """

    margin_weight: float = 1.0
    margin: float = 1e-3
    adaptive: bool = False
    inside: str = "none"

    def __post_init__(self) -> None:
        if self.inside not in OPERATORS:
            raise ConfigError(f"inside must be one of {', '.join(OPERATORS)}, got {self.inside!r}")
        if self.margin_weight < 0 or self.margin < 0:
            raise ConfigError(f"margin_weight {self.margin_weight} and margin {self.margin} must not be negative")


def margins(objective: Objective, y: Tensor, base: Tensor, levels: Tensor) -> Tensor:
    """(m, m), for targets (n,) and the models' quantiles (n, p, m)."""
    if not objective.adaptive:
        return torch.full((len(levels), len(levels)), objective.margin, dtype=base.dtype)
    middle = int((levels - 0.5).abs().argmin())
    pilot = base[:, :, middle].quantile(0.5, dim=1)
    return adaptive_margins(y - pilot, levels, objective.margin)


@dataclass(frozen=True)
class Rows:
    """Samples in standard units, float32: x (n, d), y (n,) and the models' quantiles base (n, p, m)."""

    x: Tensor
    y: Tensor
    base: Tensor

    def __getitem__(self, index: Tensor) -> Rows:
        return Rows(self.x[index], self.y[index], self.base[index])


def fit_aggregator(
    train: Rows,
    levels: Tensor,
    shape: Shape,
    objective: Objective,
    how: Fit,
    seed: int,
    *,
    validation: Rows | None = None,
    post: str = "sort",
) -> tuple[Aggregator, int, float]:
    """The weights, the steps of the best validation WIS after `post` (all steps without validation), and that WIS.

    `train.base` must come from models that did not see the row they predict: in-sample predictions give all weight to
    whichever model remembers best.
    """
    gap = margins(objective, train.y, train.base, levels)
    inside, outside = operator(objective.inside, levels), operator(post, levels)

    def loss(net: nn.Module, rows: Tensor) -> Tensor:
        part = train[rows]
        raw = net(part.x, part.base)
        penalty = objective.margin_weight * crossing_penalty(raw, gap) if objective.margin_weight else 0.0
        return pinball(part.y, inside(raw), levels).sum(-1).mean() + penalty

    def validate(net: nn.Module) -> Tensor:
        assert validation is not None and isinstance(net, Aggregator)  # noqa: S101 - called with validation only
        return wis_sum(validation.y, outside(net.predict(validation.x, validation.base)), levels).mean()

    _, p, m = train.base.shape
    net, steps, value = minimise(
        lambda: Aggregator(shape, train.x.shape[1], p, m),
        loss,
        len(train.y),
        how,
        seed,
        validate if validation is not None else None,
    )
    assert isinstance(net, Aggregator)  # noqa: S101 - what was built
    return net, steps, value
