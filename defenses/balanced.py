"""Class-prior losses: what another defense's loss of labels becomes when it knows how often each class was trained on.

With logits z, n_k training samples of class k, pi_k = n_k / n and p = softmax(z):

    balanced-softmax   CE(z + tau log pi, y)           Ren et al., NeurIPS 2020, arXiv 2007.10740; with tau, the logit-adjusted
                                                       loss of Menon et al., ICLR 2021, arXiv 2007.07314
    weighted-softmax   w_y CE(z, y), w_k = 1 - log(pi_k / max pi)                             the survey, arXiv 2110.04596
    effective-number   w_y CE(z, y), w_k ~ (1 - beta) / (1 - beta^n_k)           Cui et al., CVPR 2019, arXiv 1901.05555
    ldam               CE(z - s m_y e_y, y), z = s cos, m_k ~ n_k^(-1/4), later with effective-number weights (DRW)
                                                                          Cao et al., NeurIPS 2019, arXiv 1906.07413
    focal              -(1 - p_y)^gamma log p_y                         Lin et al., ICCV 2017, arXiv 1708.02002

Predicted is argmax z in every case: the prior is in the loss alone. The inner attack is that of the defense inside and
maximises its own objective of plain z, since mistakes of argmax z are what counts; what is descended on changes, and
nothing else. TRADES' divergence compares plain probabilities and has no weights.

Weights add up to K, and a batch counts as sum w_y l / sum w_y over the joint batch, as `torch.nn.CrossEntropyLoss(weight=w)`
has it. Published code is not always what it says: the survey's run of effective numbers has beta = 0.9, at which the weights of
all classes of 50 samples and more are equal to half a percent, and binary cross-entropy on softmax outputs; its focal loss has
p_y detached, so that its gradient is not that of the focal loss. Here beta is 0.9999, and nothing is detached.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from defenses.base import Batch, Crafter, Defense, Loss, Task, at_least, bare, batch_mean, one_of, share
from defenses.imbalance import effective_number_weights, inverse_weights, ldam_margins
from defenses.style import base_defense
from robustbench_ext.attacks.threat import Threat
from robustbench_ext.errors import ConfigError, DataError
from robustbench_ext.models.contract import frozen_eval
from robustbench_ext.numbers import read_numbers

# Name: form of the loss, its weights, and the share of the training before these are switched on.
METHODS = {
    "balanced-softmax": ("balanced-softmax", "none", 0.0),
    "weighted-softmax": ("ce", "weighted-softmax", 0.0),
    "effective-number": ("ce", "effective-number", 0.0),
    "ldam": ("ldam", "effective-number", 0.8),
    "focal": ("focal", "none", 0.0),
    "ce": ("ce", "none", 0.0),
}
WEIGHTS = ("none", "weighted-softmax", "effective-number", "inverse")


# Priors, weights and margins -----------------------------------------------------------------------------------------


def log_priors(counts: np.ndarray) -> np.ndarray:
    """log pi_k, float64 (K,), from training samples of each class.

    Raises:
        DataError: a class has none.
    """
    if not len(counts) or np.min(counts) < 1:
        empty = np.flatnonzero(np.asarray(counts) < 1).tolist()
        raise DataError(f"classes {empty} have no training samples, so their prior is 0; leave them out of the data")
    n = np.asarray(counts, dtype=np.float64)
    return np.asarray(np.log(n) - np.log(n.sum()))


def class_weights(kind: str, counts: np.ndarray, beta: float = 0.9999) -> np.ndarray:
    """Weights of the classes, float64 (K,), that add up to K.

    Args:
        kind: one of `WEIGHTS`.
        beta: of effective numbers, in [0, 1).

    >>> [round(w, 4) for w in class_weights("effective-number", np.array([5000, 50, 5])).tolist()]
    [0.0035, 0.273, 2.7236]
    """
    one_of(kind, WEIGHTS, "class weights")
    if kind == "none":
        return np.ones(len(counts))
    if kind == "weighted-softmax":
        logs = log_priors(counts)
        w = 1 - (logs - logs.max())
    elif kind == "effective-number":
        w = effective_number_weights(counts, beta)
    else:
        w = inverse_weights(counts)
    return np.asarray(w * len(w) / w.sum())


def focal_terms(logits: Tensor, y: Tensor, gamma: float) -> Tensor:
    """-(1 - p_y)^gamma log p_y, (B,); gradients flow through both factors."""
    ce = F.cross_entropy(logits, y, reduction="none")
    doubt = -torch.expm1(-ce)  # 1 - p_y without cancellation
    return doubt.clamp_min(torch.finfo(ce.dtype).tiny).pow(gamma) * ce  # 0 ** gamma has no gradient for gamma < 1


def ldam_terms(logits: Tensor, y: Tensor, margins: Tensor, scale: float) -> Tensor:
    """CE(z - s m_y e_y, y), (B,), of logits that are cosines times s."""
    taken = scale * margins.to(logits.dtype)[y]
    return F.cross_entropy(logits.scatter_add(1, y[:, None], -taken[:, None]), y, reduction="none")


# The defense ---------------------------------------------------------------------------------------------------------


class Priors(nn.Module):
    """What the loss knows of the classes, and the state of the defense inside."""

    shift: Tensor
    class_weights: Tensor
    margins: Tensor

    def __init__(self, shift: np.ndarray, class_weights: np.ndarray, margins: np.ndarray, base: nn.Module) -> None:
        super().__init__()
        for name, values in (("shift", shift), ("class_weights", class_weights), ("margins", margins)):
            self.register_buffer(name, torch.from_numpy(values).float())
        self.base = base


@dataclass(frozen=True, kw_only=True)
class ClassPrior(Defense):
    """Another defense with a class-prior loss of labels.

    Args:
        method: "balanced-softmax", "weighted-softmax", "effective-number", "ldam", "focal", or "ce", the defense's own.
        base: the defense inside: an instance, its name, or a mapping {name: trades, beta: 6}; "standard" is clean training. Any
            whose loss of labels is a cross-entropy: standard, pgd-at, trades, gairat, weat, srat with base: ce and weights:
            none, and awp or a style method round one of these.
        weights: of the classes: "none", "weighted-softmax", "effective-number" or "inverse" (1 / n_k); None for what the method
            comes with, for ldam effective numbers.
        defer: share of the training before the weights are switched on; None for what the method comes with: for ldam 0.8
            (published: epoch 160 of 200), without which it does worse (arXiv 2110.04596), otherwise 0.
        tau: of balanced-softmax, what the log prior is multiplied by.
        beta: of effective numbers.
        gamma: of focal; 0 is cross-entropy, published: 2.
        margin: of ldam, m_k of the rarest class, in cosines.
        scale: of ldam, s: what the network's last layer multiplies its cosines by. The reference networks have such a layer
            with `kwargs: {cosine_head: true}`, times 30.
    """

    method: str = "balanced-softmax"
    base: Any = "standard"
    weights: str | None = None
    defer: float | None = None
    tau: float = 1.0
    beta: float = 0.9999
    gamma: float = 2.0
    margin: float = 0.5
    scale: float = 30.0

    name: ClassVar[str] = "class-prior"
    reference: ClassVar[str] = "arXiv 2110.04596"

    def __post_init__(self) -> None:
        read_numbers(self, self.name)
        one_of(self.method, tuple(METHODS), "class-prior: method")
        if self.weights is not None:
            one_of(self.weights, WEIGHTS, "class-prior: weights")
        if self.defer is not None:
            share(self.defer, "class-prior: defer")
        for name in ("tau", "gamma", "margin"):
            at_least(getattr(self, name), 0, f"class-prior: {name}")
        if not 0 <= self.beta < 1 or not self.scale > 0:
            raise ConfigError(
                f"class-prior: beta = {self.beta}, scale = {self.scale}; expected beta in [0, 1), scale > 0"
            )
        object.__setattr__(self, "base", base_defense(self.base, self.name))
        if not self.base.class_losses:
            raise ConfigError(
                f"class-prior: base is {self.base.name}, whose loss is no plain cross-entropy that a class-prior loss could "
                f"replace; expected standard, pgd-at, trades, gairat, weat, or srat with base: ce and weights: none"
            )

    @property
    def select_by(self) -> str:  # type: ignore[override]
        chosen: str = self.base.select_by
        return chosen

    @property
    def soft_targets(self) -> bool:  # type: ignore[override]
        form, weights, _ = self.resolved()
        return form in ("ce", "balanced-softmax") and weights == "none" and bool(self.base.soft_targets)

    def resolved(self) -> tuple[str, str, float]:
        """Form of the loss, weights, and the share of the training before these are switched on."""
        form, weights, defer = METHODS[self.method]
        return form, self.weights or weights, defer if self.defer is None else self.defer

    def spec(self) -> dict[str, Any]:
        own = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "base"}
        return {"defense": self.name, "version": self.version, **own, "base": self.base.spec()}

    def attack(self, threat: Threat, steps: int, step_size: float | None) -> Crafter | None:
        crafter: Crafter | None = self.base.attack(threat, steps, step_size)
        return crafter

    def state(self, model: nn.Module, task: Task) -> nn.Module:
        # What is not used is not computed: a class without samples has no prior, no weight and no margin.
        form, weights, _ = self.resolved()
        shift = margins = np.zeros(task.num_classes)
        if form == "balanced-softmax":
            shift = self.tau * log_priors(task.counts)
        if form == "ldam":
            _check_cosines(bare(model), task)
            margins = ldam_margins(task.counts, self.margin)
        found = class_weights(weights, task.counts, self.beta)
        return Priors(shift, found, margins, self.base.state(model, task)).to(next(model.parameters()).device)

    def loss(self, model: nn.Module, batch: Batch, state: nn.Module | None = None) -> Loss:
        priors = _priors(state)
        loss: Loss = self.base.loss(model, self._told(batch, priors), priors.base)
        return loss

    @contextmanager
    def perturb(self, model: nn.Module, batch: Batch, state: nn.Module) -> Iterator[None]:
        priors = _priors(state)
        with self.base.perturb(model, self._told(batch, priors), priors.base):
            yield

    def _told(self, batch: Batch, priors: Priors) -> Batch:
        return replace(batch, class_loss=partial(self.terms, priors=priors))

    def terms(self, logits: Tensor, batch: Batch, priors: Priors) -> Tensor:
        """The loss of each sample, (B,), in the place of its cross-entropy."""
        form, weights, defer = self.resolved()
        if form == "ldam":
            losses = ldam_terms(logits, batch.y, priors.margins, self.scale)
        elif form == "focal":
            losses = focal_terms(logits, batch.y, self.gamma)
        else:
            targets = batch.y if batch.targets is None else batch.targets
            shifted = logits if form == "ce" else logits + priors.shift.to(logits.dtype)
            losses = F.cross_entropy(shifted, targets, reduction="none")
        if weights == "none" or batch.progress < defer:
            return losses
        w = priors.class_weights.to(logits.dtype)[batch.y]
        return w / batch_mean(w) * losses


def _priors(state: nn.Module | None) -> Priors:
    if not isinstance(state, Priors):
        raise ConfigError("class-prior: the loss needs to know the classes: give the state that its state(...) made")
    return state


def _check_cosines(model: nn.Module, task: Task) -> None:
    """Refuse margins on logits that are no cosines: they are if they do not grow with the last layer's weights.

    A last layer that is no `nn.Linear` cannot be tried, and is believed.
    """
    heads = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == task.num_classes]
    if not heads:
        return
    x = torch.linspace(0, 1, int(np.prod(task.shape)), device=heads[-1].weight.device).reshape(1, *task.shape)
    with torch.no_grad(), frozen_eval(model):
        before = model(x)
        heads[-1].weight.mul_(2)  # and back, exactly
        after = model(x)
        heads[-1].weight.div_(2)
    if not torch.allclose(before, after, rtol=1e-3, atol=1e-3):
        raise ConfigError(
            "class-prior: ldam takes margins from cosines, and this network's last layer is a plain linear one. Give the "
            "network a head that returns cosines: kwargs: {cosine_head: true} for the reference networks"
        )
