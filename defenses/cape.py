"""CaPE: a classifier fine-tuned to say how likely the outcome is (Liu et al., ICML 2022, arXiv 2111.10734).

Start from an early-stopped network, and go round: one epoch on calibrated targets (`uq.cape`), made of the network's
predictions as they are then, and five on the outcomes themselves, which keep it discriminating. Of all epochs, and the start
itself, the one of least log-loss on the calibration split is kept.

    models:
      - {name: net, train: {defense: standard, network: small-cnn, recipe: {epochs: 10}}}
      - {name: cape, make: {name: cape, of: [net]}}

A training objective (`defenses.base`) sees batches; calibrated targets need all predictions at once, and the choice of the
epoch is by log-loss and not by accuracy. So this is made of a trained model, like a soup.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from defenses.base import at_least, one_of
from defenses.making import Made, Maker, State
from robustbench_ext.data.base import Dataset, Split
from robustbench_ext.errors import ConfigError
from robustbench_ext.numbers import read_numbers
from robustbench_ext.randomness import SampleRandom
from uq.cape import binned_targets, kernel_targets

TARGETS = ("bins", "kernel")


@dataclass(frozen=True, kw_only=True)
class CaPE(Maker):
    """A network of two classes, fine-tuned.

    Args:
        epochs: of fine-tuning; 6 are one round.
        raw: epochs on outcomes after each on calibrated targets; published: 5.
        targets: "bins" (mean outcomes of `bins` equal-mass bins) or "kernel" (Gaussian, `sigma`, within `reach` positions).
        batch_size, patience, min_lr: published: 256; the rate is halved after `patience` = 5 epochs without a lower log-loss,
            down to 1e-6.
        lr: of Adam, at the start; the rate of the paper depends on the data set. At a high one the rounds undo each other.
    """

    name: ClassVar[str] = "cape"
    reference: ClassVar[str] = "arXiv 2111.10734"

    epochs: int = 30
    raw: int = 5
    targets: str = "bins"
    bins: int = 10
    sigma: float = 0.1
    reach: int = 500
    lr: float = 1e-4
    batch_size: int = 256
    patience: int = 5
    min_lr: float = 1e-6

    def __post_init__(self) -> None:
        read_numbers(self, "cape")
        one_of(self.targets, TARGETS, "cape: targets")
        least = {"epochs": 1, "raw": 0, "bins": 1, "reach": 0, "batch_size": 2, "patience": 0}
        for name, value in least.items():
            at_least(getattr(self, name), value, f"cape: {name}")
        for name in ("sigma", "lr", "min_lr"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"cape: {name} = {getattr(self, name)}, expected a number > 0")

    def make(self, members: Mapping[str, nn.Module], data: Dataset, seed: int) -> Made:
        if len(members) > 1:
            raise ConfigError(f"cape: of {', '.join(members)}, expected one model")
        if len(data.classes) != 2:
            raise ConfigError(
                f"cape: {data.name} has {len(data.classes)} classes; it estimates the probability of one outcome"
            )
        for split in ("train", "calibration"):
            if split not in data.splits:
                raise ConfigError(f"cape: {data.name} has no {split} split, which it needs")
        (network,) = members.values()
        model = copy.deepcopy(network)
        return self._tune(model, data["train"], data["calibration"], seed)

    def _tune(self, model: nn.Module, train: Split, held_out: Split, seed: int) -> Made:
        x, y = train.images(slice(None)), train.labels
        optimizer = torch.optim.Adam(model.parameters(), lr=self.lr)
        slower = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, factor=0.5, patience=self.patience, min_lr=self.min_lr
        )
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        losses, chosen, best = [self._log_loss(model, held_out)], 0, _copy(model)
        for epoch in range(self.epochs):
            targets = y.astype(np.float64)
            if epoch % (self.raw + 1) == 0:
                targets = self._calibrated(_probabilities(model, x), y)
            draws = SampleRandom.of(seed, train.ids, "cape-order").bits(1, step=epoch)[:, 0].numpy()
            self._epoch(model, x, torch.from_numpy(targets).float(), np.argsort(draws, kind="stable"), optimizer)
            losses.append(self._log_loss(model, held_out))
            slower.step(losses[-1])
            if losses[-1] < losses[chosen]:
                chosen, best = epoch + 1, _copy(model)
        report = {"epoch": chosen, "log_loss": losses[chosen], "log_loss_of_start": losses[0], "log_losses": losses}
        return Made(best, report)

    def _calibrated(self, p: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (
            binned_targets(p, y, self.bins) if self.targets == "bins" else kernel_targets(p, y, self.sigma, self.reach)
        )

    def _epoch(
        self, model: nn.Module, x: Tensor, targets: Tensor, order: np.ndarray, optimizer: torch.optim.Optimizer
    ) -> None:
        model.train()
        for rows in np.array_split(order, math.ceil(len(order) / self.batch_size)):
            some = torch.from_numpy(rows)
            soft = torch.stack([1 - targets[some], targets[some]], dim=1)
            loss = F.cross_entropy(model(x[some]), soft)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()

    @staticmethod
    def _log_loss(model: nn.Module, split: Split) -> float:
        return float(F.cross_entropy(_logits(model, split.images(slice(None))), torch.from_numpy(split.labels)))


def _copy(model: nn.Module) -> State:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


@torch.no_grad()
def _logits(model: nn.Module, x: Tensor, batch_size: int = 500) -> Tensor:
    model.eval()
    return torch.cat([model(x[i : i + batch_size]) for i in range(0, len(x), batch_size)]).double()


def _probabilities(model: nn.Module, x: Tensor) -> np.ndarray:
    """Of the second class, (N,)."""
    return np.asarray(_logits(model, x).softmax(dim=1)[:, 1].numpy())
