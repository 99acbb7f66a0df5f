"""The heads of split-point self-consistency: small networks on frozen features, their losses and how they are fitted.

All heads of an estimator are one network with one hidden layer and are read in one pass; branches of their own are one batched
product. They cost little beside the model that they are put on.

`calibration_loss` is the published interval loss, `pinball_loss` what the paper's abstract calls side-specific quantile
regression. They are closer than they look. Where coverage c is below tau, the first pushes the interval of every uncovered
sample up by |tau - c| / n_uncovered; where it is above, of every covered one down by |tau - c| / n_covered. Around c = tau the
counts are (1 - tau) n and tau n. If both cases alternate, as they do in batches, the mean push has the ratio tau : (1 - tau)
of the pinball loss's gradient, so the head is driven to the conditional quantile, in steps that vanish as coverage is met. On
the full batch nothing promises this: the loss is zero at any intervals of the right overall coverage.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from robustbench_ext.errors import ConfigError
from robustbench_ext.models.options import whole
from robustbench_ext.numbers import parse_number

HELD_BACK = 5  # one sample in so many chooses the number of steps
_LOOKS = 40  # times that they are looked at

Loss = Callable[[Tensor, Tensor], Tensor]  # (outputs of some samples, their indices) -> scalar


@dataclass(frozen=True)
class Training:
    """How heads are fitted: Adam on batches, for a number of steps, so that the cost does not grow with the samples.

    Attributes:
        steps: of the optimiser, at most.
        batch_size: samples a step; all of them where there are no more.
        learning_rate, weight_decay: of Adam; the decay is part of the gradient, as published.
        early_stopping: hold one sample in five back, find the number of steps that suits them best, and fit again on all
            samples for that many.
    """

    steps: int
    batch_size: int
    learning_rate: float
    weight_decay: float = 0.0
    early_stopping: bool = True

    def checked(self, name: str, least_batch: int) -> Training:
        """The same with numbers as numbers.

        Raises:
            ConfigError: an option is out of its range.
        """
        rate = parse_number(self.learning_rate, f"{name}: learning_rate")
        decay = parse_number(self.weight_decay, f"{name}: weight_decay")
        if not rate > 0 or not decay >= 0:
            raise ConfigError(f"{name}: learning_rate = {rate}, weight_decay = {decay}; expected > 0 and >= 0")
        steps = whole(self.steps, 1, f"{name}: steps")
        batch = whole(self.batch_size, least_batch, f"{name}: batch_size")
        return Training(steps, batch, rate, decay, bool(self.early_stopping))


class Heads:
    """`branches` networks linear - ReLU - linear on standardised features, as tensors of the features' dtype.

    Args:
        features: (n, d), whose mean and spread standardise the input.
        width: hidden units a branch.
        bias: (branches, outputs), where the output layer's bias starts.
        generator: of the initial weights, uniform in +-1/sqrt(inputs), PyTorch's default.
    """

    def __init__(self, features: Tensor, width: int, bias: Tensor, generator: torch.Generator) -> None:
        d, dtype, (branches, outputs) = features.shape[1], features.dtype, bias.shape
        self.mean = features.mean(dim=0)
        spread = features.std(dim=0, correction=0)
        # A constant feature, such as a dead unit's, has no scale of its own; where all are constant, any will do.
        most = spread.max()
        self.scale = torch.where(spread > 1e-6 * most, spread, most if bool(most > 0) else torch.ones_like(most))

        def draw(*shape: int, inputs: int) -> Tensor:
            unit = torch.rand(*shape, generator=generator, dtype=torch.float64)
            return ((2 * unit - 1) / math.sqrt(inputs)).to(dtype)

        self.hidden, self.offset = draw(d, branches * width, inputs=d), draw(branches * width, inputs=d)
        self.weight = draw(branches, width, outputs, inputs=width)
        self.bias = bias[:, None].to(dtype).clone()

    @property
    def weights(self) -> list[Tensor]:
        """What is fitted."""
        return [self.hidden, self.offset, self.weight, self.bias]

    def __call__(self, features: Tensor) -> Tensor:
        """Outputs (branches, n, outputs) of features (n, d)."""
        branches, width, _ = self.weight.shape
        units = F.relu(torch.addmm(self.offset, (features - self.mean) / self.scale, self.hidden))
        return torch.baddbmm(self.bias, units.view(len(units), branches, width).transpose(0, 1), self.weight)


def fit_heads(
    features: Tensor, width: int, bias: Tensor, training: Training, loss: Loss, judge: Loss, seed: int
) -> tuple[Heads, int]:
    """Heads that minimise `loss`, and the number of steps that they took.

    `judge` is what the held-back samples choose the number of steps by: a mean over samples. All draws depend on `seed` alone.
    """
    n, steps = len(features), training.steps
    if training.early_stopping and n >= 2 * HELD_BACK:
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
        held, rest = order[: n // HELD_BACK], order[n // HELD_BACK :]
        every = max(1, training.steps // _LOOKS)
        best, steps = math.inf, every

        def look(step: int, heads: Heads) -> None:
            nonlocal best, steps
            if step % every == 0 and (found := float(judge(heads(features[held]), held))) < best:
                best, steps = found, step

        _train(features, rest, width, bias, training, training.steps, loss, seed, look)
    return _train(features, torch.arange(n), width, bias, training, steps, loss, seed), steps


def _train(
    features: Tensor,
    index: Tensor,
    width: int,
    bias: Tensor,
    training: Training,
    steps: int,
    loss: Loss,
    seed: int,
    look: Callable[[int, Heads], None] | None = None,
) -> Heads:
    generator = torch.Generator().manual_seed(seed)
    heads = Heads(features[index], width, bias, generator)
    for weight in heads.weights:
        weight.requires_grad_(True)
    adam = torch.optim.Adam(heads.weights, lr=training.learning_rate, weight_decay=training.weight_decay)
    size = min(training.batch_size, len(index))
    order, at = index, 0
    # A caller may have turned gradients off, as the engine does where it reads a model.
    with torch.enable_grad():
        for step in range(1, steps + 1):
            if size < len(index):
                if step == 1 or at + size > len(index):  # the rest of a permutation that fills no batch is left out
                    order, at = index[torch.randperm(len(index), generator=generator)], 0
                batch, at = order[at : at + size], at + size
            else:
                batch = index
            adam.zero_grad()
            loss(heads(features[batch]), batch).backward()
            adam.step()
            if look is not None:
                with torch.no_grad():
                    look(step, heads)
    for weight in heads.weights:
        weight.requires_grad_(False)
    return heads


# Losses of the interval heads ------------------------------------------------------------------------------------------


def calibration_loss(reach: Tensor, distance: Tensor, tau: Tensor) -> Tensor:
    """The published interval loss of one side, for each level.

    With c the share of samples whose distance is within reach, |tau - c| times the mean of what is missing over the uncovered
    where c < tau, of what is too much over the covered otherwise. c has no gradient.

    Args:
        reach: (n, L), how far the interval goes on this side.
        distance: (n,), of the samples on this side from the prediction, >= 0.
        tau: (L,), nominal coverages of the side.

    Returns:
        (L,); zero where there is no sample.
    """
    covered = distance[:, None] <= reach
    count = covered.sum(dim=0)
    share = count.to(reach.dtype) / max(1, len(distance))
    gap = distance[:, None] - reach
    missing = torch.where(covered, 0, gap).sum(dim=0) / (len(distance) - count).clamp_min(1)
    excess = torch.where(covered, -gap, 0).sum(dim=0) / count.clamp_min(1)
    return (tau - share).abs() * torch.where(share < tau, missing, excess)


def pinball_loss(reach: Tensor, distance: Tensor, tau: Tensor) -> Tensor:
    """Mean pinball loss of one side, for each level: its minimum is the conditional tau-quantile of the distance.

    Arguments and result as in `calibration_loss`.
    """
    gap = distance[:, None] - reach
    return torch.maximum(tau * gap, (tau - 1) * gap).sum(dim=0) / max(1, len(distance))
