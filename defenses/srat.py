"""SRAT: separable reweighted adversarial training for imbalanced data (Wang et al. 2021, arXiv 2107.13639).

    L = L_cls(f(x*), y; w) + lambda L_sep(h(x*), y),

class-weighted cross-entropy, focal or LDAM loss, and a supervised contrastive loss that pulls the features of a class
together. h is a projection of the penultimate features, normalised to length 1; for an anchor i with P(i) the others of
its class and A(i) all others of the batch,

    L_sep = mean over anchors with P(i) not empty of
            -1/|P(i)| sum_{j in P(i)} log( exp(h_i.h_j / tau) / sum_{a in A(i)} exp(h_i.h_a / tau) ).

The weights are switched on late (deferred re-weighting). The attack is plain cross-entropy, without weights. The paper's
body was not available to us: what it leaves open is an option here. The public script that matches it attacks in training
mode; here the recipe's `attack_mode` decides, evaluation mode by default.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from defenses.base import Batch, Crafter, Defense, Loss, Task, at_least, bare, detached, one_of, read_booleans, share
from defenses.imbalance import (
    effective_number_weights,
    focal,
    inverse_weights,
    ldam,
    ldam_margins,
    weighted_cross_entropy,
)
from robustbench_ext.attacks.inner import InnerAttack
from robustbench_ext.attacks.threat import Threat
from robustbench_ext.errors import ConfigError, ModelError
from robustbench_ext.models.contract import frozen_eval
from robustbench_ext.numbers import read_numbers

BASES = ("ce", "focal", "ldam")
WEIGHTS = ("inverse", "effective", "none")


def separation_loss(h: Tensor, y: Tensor, tau: float) -> Tensor:
    """L_sep of features h (B, d) of length 1 with labels y (B,).

    Anchors that are alone of their class are skipped (they still are negatives for others); 0 where all are alone.
    """
    similarity = h @ h.T / tau
    itself = torch.eye(len(h), dtype=torch.bool, device=h.device)
    similarity = similarity.masked_fill(itself, -torch.inf)
    log_p = similarity - similarity.logsumexp(dim=1, keepdim=True)
    same = (y[:, None] == y[None]) & ~itself
    positives = same.sum(dim=1)
    per_anchor = -log_p.masked_fill(~same, 0.0).sum(dim=1) / positives.clamp_min(1)
    anchors = positives > 0
    return (per_anchor * anchors).sum() / anchors.sum().clamp_min(1)


@contextmanager
def penultimate(model: nn.Module) -> Iterator[list[Tensor]]:
    """Inside, the input of the last linear layer that runs is kept as the list's last entry, with its graph."""
    caught: list[Tensor] = []

    def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        caught.append(inputs[0])

    handles = [m.register_forward_pre_hook(keep) for m in bare(model).modules() if isinstance(m, nn.Linear)]
    try:
        yield caught
    finally:
        for handle in handles:
            handle.remove()


class Projection(nn.Module):
    """The contrastive head: two layers (or one, for hidden = 0), then length 1. Class weights and margins beside it."""

    class_weights: Tensor
    margins: Tensor

    def __init__(self, features: int, hidden: int, width: int, class_weights: Tensor, margins: Tensor) -> None:
        super().__init__()
        self.layers = (
            nn.Sequential(nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, width))
            if hidden
            else nn.Linear(features, width)
        )
        self.register_buffer("class_weights", class_weights)
        self.register_buffer("margins", margins)

    def forward(self, features: Tensor) -> Tensor:
        return F.normalize(self.layers(features), dim=1)


@dataclass(frozen=True, kw_only=True)
class SRAT(Defense):
    """Class weights, switched on late, and features that are pulled apart by class; all on adversarial inputs.

    Args:
        base: "ce", "focal" or "ldam".
        lam: lambda, weight of the separation loss; 2 in the public script, the paper's tuned values are not known.
        tau: temperature of the separation loss.
        weights: "inverse" (n_max / n_c), "effective" (effective numbers with `b`) or "none".
        b: of effective numbers.
        defer: share of the training without class weights first; published: epoch 160 of 200.
        width: of the projected features; its hidden layer is as wide as the features, or missing (`hidden` = false).
        gamma: of the focal loss.
        focal_form: "inside" (the class weight belongs to the modulating factor, as in the public code) or "textbook".
        margin: LDAM's largest margin, of the rarest class.
        scale: LDAM's scale of the logits. 30 presumes a head that returns cosines (`cosine_head` of the reference networks
            returns them times 30 already: give scale = 1 and margin = 15); which head was published is not known.
    """

    base: str = "ce"
    lam: float = 2.0
    tau: float = 0.07
    weights: str = "inverse"
    b: float = 0.9999
    defer: float = 0.8
    width: int = 128
    hidden: bool = True
    gamma: float = 1.0
    focal_form: str = "inside"
    margin: float = 0.5
    scale: float = 30.0

    name: ClassVar[str] = "srat"
    reference: ClassVar[str] = "arXiv 2107.13639"

    def __post_init__(self) -> None:
        read_numbers(self, "srat")
        read_booleans(self, "srat")
        one_of(self.base, BASES, "srat: base")
        one_of(self.weights, WEIGHTS, "srat: weights")
        one_of(self.focal_form, ("inside", "textbook"), "srat: focal_form")
        share(self.defer, "srat: defer")
        for name in ("lam", "gamma", "margin"):
            at_least(getattr(self, name), 0, f"srat: {name}")
        at_least(self.width, 1, "srat: width")
        if not 0 <= self.b < 1 or not self.tau > 0 or not self.scale > 0:
            raise ConfigError(
                f"srat: b = {self.b}, tau = {self.tau}, scale = {self.scale}; expected b in [0, 1), the others > 0"
            )

    @property
    def class_losses(self) -> bool:  # type: ignore[override]
        return self.base == "ce" and self.weights == "none"

    def attack(self, threat: Threat, steps: int, step_size: float | None) -> Crafter:
        return InnerAttack(threat, steps, step_size)

    def state(self, model: nn.Module, task: Task) -> nn.Module:
        # What is not used is not computed: a class without samples has no weight and no margin.
        weights, margins = np.ones(task.num_classes), np.zeros(task.num_classes)
        if self.weights == "inverse":
            weights = inverse_weights(task.counts)
        elif self.weights == "effective":
            weights = effective_number_weights(task.counts, self.b)
        if self.base == "ldam":
            margins = ldam_margins(task.counts, self.margin)
        device = next(model.parameters()).device
        with torch.no_grad(), frozen_eval(model), penultimate(model) as caught:
            model(torch.zeros(1, *task.shape, device=device))
        if not caught:
            raise ModelError("srat: the network has no linear layer, so there are no penultimate features to separate")
        features = caught[-1].flatten(1).shape[1]
        head = Projection(
            features,
            features if self.hidden else 0,
            self.width,
            torch.from_numpy(weights).float(),
            torch.from_numpy(margins).float(),
        )
        return head.to(device)

    def loss(self, model: nn.Module, batch: Batch, state: nn.Module | None = None) -> Loss:
        if not isinstance(state, Projection):
            raise ConfigError("srat: the loss needs the projection head: give the state that srat.state(...) made")
        with penultimate(model) as caught:
            logits = model(batch.x_adv)
        classified = self._classification(logits, batch, state)
        if self.lam == 0:
            return Loss(classified)
        # At tau = 0.07 similarities reach 14, where bfloat16 has steps of 0.06.
        with torch.autocast(logits.device.type, enabled=False):
            separation = separation_loss(state(caught[-1].flatten(1).float()), batch.y, self.tau)
        return Loss(classified + self.lam * separation, detached(classification=classified, separation=separation))

    def _classification(self, logits: Tensor, batch: Batch, state: Projection) -> Tensor:
        if batch.class_loss is not None:
            return batch.class_loss(logits, batch).mean()
        weights = state.class_weights
        if batch.progress < self.defer:
            weights = torch.ones_like(weights)
        if self.base == "ce":
            return weighted_cross_entropy(logits, batch.y, weights)
        if self.base == "focal":
            return focal(logits, batch.y, weights, self.gamma, self.focal_form == "inside")
        return ldam(logits, batch.y, weights, state.margins, self.scale)
