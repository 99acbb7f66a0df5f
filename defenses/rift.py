"""RiFT: robust-critical fine-tuning (Zhu, Hu, Wang, Xie, Yang, ICCV 2023, arXiv 2308.02533).

An adversarially trained network has modules that its robustness hardly depends on. RiFT finds the least critical one
(`defenses.criticality`), fine-tunes that weight alone on natural inputs, and goes back towards where it came from as far
as robustness demands:

    theta_alpha = (1 - alpha) theta_AT + alpha theta_FT,   alpha in {0, 0.1, ..., 1}
    alpha* = argmax natural accuracy,  subject to  robust accuracy(alpha) >= robust accuracy(0) - tolerance

The published script chooses the module, the epoch and alpha on test data. Here D_adv comes from `train`, epoch and alpha
are chosen on `calibration`, and `test` is never touched.

The published script also fine-tunes with the whole network in training mode: batch-norm parameters are frozen, but the
running statistics of every layer are estimated anew on natural inputs and interpolated as well, so a part of the effect
is theirs, whichever module is tuned. `bn="eval"` (default; what the paper's text describes) leaves them alone; "train" is the
script's way.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from defenses.augment import Augmentation
from defenses.criticality import (
    AdversarialSet,
    Criticality,
    CriticalityRecipe,
    ModuleCriticality,
    candidates,
    device_of,
    exact_name,
    module_robust_criticality,
    relative_change,
)
from robustbench_ext.attacks.base import seeded
from robustbench_ext.attacks.pgd import PGD
from robustbench_ext.data.base import Dataset, Split
from robustbench_ext.errors import ConfigError, RobustBenchExtError
from robustbench_ext.models.contract import check_images, check_logits, frozen_eval
from robustbench_ext.randomness import SampleRandom

RIFT_VERSION = 1
ARGMIN = "argmin"
_LOOK_BATCH = 500

State = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class RiFTRecipe(CriticalityRecipe):
    """All options of the method. Defaults are the published values where there are any.

    Args:
        module: "argmin" (the least critical one), or a layer's or parameter's exact name. The published choices are argmin
            plus judgement; the authors advise middle layers. With a name, no other module's criticality is computed.
        epochs, batch_size, lr, momentum, weight_decay: of the fine-tuning by SGD on natural cross-entropy.
        decay_epoch, decay: from that epoch on (counted from 0) the rate is lr times decay.
        bn: "eval" or "train", see the module. Dropout is on in both.
        crop, flip: augmentation: random crops after mirroring so many pixels beyond each border, horizontal flips. The
            paper has 4 and true, for CIFAR; off by default, since a flipped digit is no digit.
        steps: alpha runs through 0, 1/steps, ..., 1.
        restarts: of the PGD that measures robust accuracy (the steps of `attack_steps`, `step_size`): a sample counts as
            robust if no iterate of any restart is misclassified. The paper has the worst of three runs.
        search_n: attack the first so many calibration samples; None for all.
        tolerance: percentage points of robust accuracy that may be lost against alpha = 0.
        tolerance_samples: but so many samples may always be lost. 0.1 points are less than one of 1,000 samples. 0 is the
            published criterion to the letter.
    """

    module: str = ARGMIN
    epochs: int = 10
    batch_size: int = 128
    lr: float = 0.001
    momentum: float = 0.9
    weight_decay: float = 5e-4
    decay_epoch: int = 5
    decay: float = 0.1
    bn: Literal["eval", "train"] = "eval"
    crop: int = 0
    flip: bool = False
    steps: int = 10
    restarts: int = 3
    search_n: int | None = None
    tolerance: float = 0.1
    tolerance_samples: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_choice("bn", ("eval", "train"))
        # Batch norm in training mode needs two samples in a batch.
        self.require_least(2, "batch_size")
        self.require_least(1, "epochs", "steps", "restarts", "search_n")
        self.require_least(0, "lr", "weight_decay", "decay_epoch", "decay", "tolerance", "tolerance_samples")
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"rift: momentum = {self.momentum}, expected a number in [0, 1)")
        if not isinstance(self.module, str):
            raise ConfigError(f"rift: module = {self.module!r}, expected '{ARGMIN}' or a layer's name")
        self.augmentation()
        self.attack()

    def augmentation(self) -> Augmentation:
        """What is done to the natural inputs of the fine-tuning."""
        return Augmentation(crop=self.crop, crop_mode="reflect", flip=self.flip)

    def attack(self) -> PGD:
        """What measures robust accuracy."""
        return PGD(
            eps=self.eps, norm=self.norm, steps=self.attack_steps, step_size=self.step_size, restarts=self.restarts
        )

    def allowed(self, n: int) -> int:
        """How many of n attacked samples may be lost."""
        return max(math.floor(self.tolerance / 100 * n + 1e-9), self.tolerance_samples)

    def spec(self) -> dict[str, Any]:
        """All that the resulting weights depend on here."""
        return {"defense": "rift", "version": RIFT_VERSION, "criticality": self.criticality_spec()} | {
            f.name: getattr(self, f.name) for f in fields(self) if f.name not in _CRITICALITY
        }


_CRITICALITY = {f.name for f in fields(CriticalityRecipe)}


@dataclass(frozen=True)
class FineTuned:
    """The fine-tuned network.

    Attributes:
        state: of the best epoch, as `state_dict` names it; tensors that did not change are the base's own.
        epoch: the best one, counted from 1.
        curve: a row for every epoch: epoch, loss (mean natural cross-entropy), clean_correct, clean_accuracy.
    """

    state: State
    epoch: int
    curve: tuple[dict[str, float], ...]


@dataclass(frozen=True)
class Alpha:
    """One point between the base (0) and the fine-tuned network (1), judged on the calibration split.

    Attributes:
        clean_correct, robust_correct: samples.
        clean_accuracy, robust_accuracy: shares of the n and of the attacked ones.
        change: ||theta_alpha - theta_AT||_2 / ||theta_AT||_2 of the module.
        admissible: it loses no more robust samples than the tolerance allows.
    """

    alpha: float
    clean_correct: int
    robust_correct: int
    clean_accuracy: float
    robust_accuracy: float
    change: float
    admissible: bool


@dataclass(frozen=True)
class RiFTResult:
    """Everything that a RiFT found; `to_json` makes it plain values.

    Attributes:
        module: the fine-tuned weight.
        criticality: of the modules.
        curve, epoch: of the fine-tuning, and the epoch that was kept.
        alphas, alpha: the interpolation, and the point that was chosen. Among admissible points the highest clean
            accuracy decides, then the highest robust accuracy, then the smaller alpha.
        n, n_attacked: calibration samples that clean and robust accuracy were measured on.
        tolerance_points, tolerance_samples: the robust accuracy that may be lost, as given and in samples.
        eps_w: radius of the ball that `criticality` looked at.
        inside: whether the chosen weight lies in it, so that the criticality says something about it.
        seed: of the attacks and of the data order.
    """

    module: str
    criticality: Criticality
    curve: tuple[dict[str, float], ...]
    epoch: int
    alphas: tuple[Alpha, ...]
    alpha: float
    n: int
    n_attacked: int
    tolerance_points: float
    tolerance_samples: int
    eps_w: float
    inside: bool
    seed: int

    @property
    def chosen(self) -> Alpha:
        """The row of the chosen alpha."""
        return next(row for row in self.alphas if row.alpha == self.alpha)

    def to_json(self) -> dict[str, Any]:
        """Plain values, for json.dumps."""
        return asdict(self)


def state_of(model: nn.Module) -> State:
    """A copy of all tensors of `state_dict`."""
    return {k: v.detach().clone() for k, v in model.state_dict().items() if isinstance(v, Tensor)}


def load_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy the tensors into the model, in place."""
    own = model.state_dict()
    with torch.no_grad():
        for name, value in state.items():
            own[name].copy_(value)


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """All parameters and buffers come back bit for bit, also those that `state_dict` leaves out."""
    kept = [
        (held, name, value.detach().clone())
        for module in model.modules()
        for held in (module._parameters, module._buffers)
        for name, value in held.items()
        if value is not None
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for held, name, value in kept:
                held[name].copy_(value)  # type: ignore[union-attr]


def interpolate(base: State, tuned: State, alpha: float) -> State:
    """(1 - alpha) base + alpha tuned. Both ends are exact, and so is every tensor that is equal in both.

    Whole numbers (batch norm's counter of batches) are the base's, except at alpha = 1.
    """

    def between(a: Tensor, b: Tensor) -> Tensor:
        if alpha == 1:
            return b
        if alpha == 0 or not a.is_floating_point() or torch.equal(a, b):
            return a
        return torch.lerp(a, b, alpha)

    return {name: between(value, tuned[name]) for name, value in base.items()}


class Watcher:
    """Is told how far a RiFT has come. Does nothing; override what is of interest."""

    def inputs(self, inputs: AdversarialSet) -> None:
        """The adversarial set is made."""

    def ascent(self, name: str, before: int, epoch: int) -> None:
        """An epoch of a module's ascent is over; `before` modules are done."""

    def module(self, found: ModuleCriticality) -> None:
        """A module's criticality was computed."""

    def chosen(self, criticality: Criticality, module: str) -> None:
        """The module to tune."""

    def batch(self, epoch: int, batch: int, batches: int) -> None:
        """A batch of the fine-tuning, all counted from 1."""

    def epoch(self, row: dict[str, float]) -> None:
        """A row of the fine-tuning's curve."""

    def alpha(self, row: Alpha) -> None:
        """A point of the interpolation."""


def fine_tune(
    model: nn.Module,
    data: Dataset,
    module: str,
    recipe: RiFTRecipe | None = None,
    seed: int = 0,
    watcher: Watcher | None = None,
) -> FineTuned:
    """Tune one weight on the natural inputs of `train`; keep the epoch of best natural accuracy on `calibration`, the first
    of equals. The network comes back as it was.

    Args:
        module: a layer's or parameter's exact name.

    Raises:
        ConfigError: there is no such module, or no logit depends on it.
        RobustBenchExtError: the loss became NaN or infinite.
    """
    recipe, watcher = recipe or RiFTRecipe(), watcher or Watcher()
    weights, _ = candidates(model)
    name, split, device = exact_name(module, weights), data["train"], device_of(model)
    if len(split) < 2:
        raise ConfigError(f"{data.name}/train has {len(split)} sample: too few to train on")
    base, weight = state_of(model), weights[name]
    # A shared weight has several names in the state.
    names = [k for k, v in model.state_dict(keep_vars=True).items() if v is weight]
    tuned, best, best_correct, curve = base, 0, -1, []
    gradient_before = weight.grad
    with restored(model), frozen_eval(model):
        try:
            optimizer = torch.optim.SGD([weight], recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay)
            for epoch in range(recipe.epochs):
                for group in optimizer.param_groups:
                    group["lr"] = recipe.lr * (recipe.decay if epoch >= recipe.decay_epoch else 1.0)
                _training_mode(model, recipe.bn)
                weight.requires_grad_(True)
                with seeded(_epoch_seed(seed, epoch), device):  # for layers that draw from the global generator
                    loss = _tune_epoch(model, name, weight, optimizer, data["train"], recipe, seed, epoch, watcher)
                weight.requires_grad_(False)
                model.eval()
                correct = _correct(_logits(model, data["calibration"]), data["calibration"])
                row = {
                    "epoch": epoch + 1,
                    "loss": loss,
                    "clean_correct": correct,
                    "clean_accuracy": correct / len(data["calibration"]),
                }
                curve.append(row)
                watcher.epoch(row)
                if correct > best_correct:
                    best, best_correct = epoch + 1, correct
                    moved = {k: weight.detach().clone() for k in names}
                    tuned = state_of(model) if recipe.bn == "train" else {**base, **moved}
        finally:
            weight.grad = gradient_before
    return FineTuned(tuned, best, tuple(curve))


def _training_mode(model: nn.Module, bn: str) -> None:
    """Evaluation mode with dropout on, or training mode. Only the latter may change a buffer."""
    model.train(bn == "train")
    for part in model.modules():
        if isinstance(part, _DROPOUT):
            part.train()


_DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def _tune_epoch(
    model: nn.Module,
    name: str,
    weight: nn.Parameter,
    optimizer: torch.optim.Optimizer,
    split: Split,
    recipe: RiFTRecipe,
    seed: int,
    epoch: int,
    watcher: Watcher,
) -> float:
    """One epoch of SGD; the mean loss."""
    device, augmentation, total, seen = weight.device, recipe.augmentation(), 0.0, 0
    draws = SampleRandom.of(seed, split.ids, "rift-order").bits(1, step=epoch)[:, 0].numpy()
    order = np.lexsort((np.arange(len(draws)), draws))
    # Batch norm needs two samples in a batch.
    batches = [b for b in np.array_split(order, math.ceil(len(order) / recipe.batch_size)) if len(b) > 1]
    for number, positions in enumerate(batches, 1):
        index = np.sort(positions)
        x, y = split.images(index).to(device), torch.from_numpy(split.labels[index]).to(device)
        check_images(x, "train")
        x = augmentation.augment(x, SampleRandom.of(seed, split.ids[index], "rift-views", device), epoch)
        loss = F.cross_entropy(model(x), y)
        if not loss.requires_grad:
            raise ConfigError(f"rift: no logit depends on '{name}', so there is nothing to tune; choose another module")
        if not bool(torch.isfinite(loss)):
            raise RobustBenchExtError(
                f"rift: the fine-tuning loss became {float(loss.detach())} in epoch {epoch + 1}. Lower lr, or check the "
                f"data for NaN."
            )
        (weight.grad,) = torch.autograd.grad(loss, [weight])
        optimizer.step()
        total, seen = total + float(loss.detach()) * len(index), seen + len(index)
        watcher.batch(epoch + 1, number, len(batches))
    return total / seen


def _epoch_seed(seed: int, epoch: int) -> int:
    return int(SampleRandom.of(seed, ["all"], "rift-global").bits(1, step=epoch)[0, 0])


def _logits(model: nn.Module, split: Split) -> Tensor:
    """Logits (N, K) of the whole split in evaluation mode, on the CPU."""
    found, device = [], device_of(model)
    with torch.no_grad(), frozen_eval(model):
        for start in range(0, len(split), _LOOK_BATCH):
            x = split.images(slice(start, min(start + _LOOK_BATCH, len(split))))
            found.append(check_logits(model(x.to(device)), len(x)).cpu())
    return torch.cat(found)


def _correct(logits: Tensor, split: Split) -> int:
    return int((logits.argmax(dim=1) == torch.from_numpy(split.labels)).sum())


def interpolation_search(
    model: nn.Module,
    data: Dataset,
    module: str,
    base: State,
    tuned: State,
    recipe: RiFTRecipe | None = None,
    seed: int = 0,
    watcher: Watcher | None = None,
) -> tuple[Alpha, ...]:
    """Natural and robust accuracy on `calibration` along the way from `base` (alpha = 0) to `tuned` (1).

    The attack's random starts are the same for every alpha (they belong to the samples), so a difference between two
    points is not the luck of a draw. The network comes back as it was.
    """
    recipe, watcher = recipe or RiFTRecipe(), watcher or Watcher()
    name, split = exact_name(module, candidates(model)[0]), data["calibration"]
    attacked, attack = split.take(recipe.search_n), recipe.attack()
    n, labels = len(attacked), torch.from_numpy(split.labels)
    rows: list[Alpha] = []
    for step in range(recipe.steps + 1):
        alpha = step / recipe.steps
        state = interpolate(base, tuned, alpha)
        with restored(model):
            load_state(model, state)
            logits = _logits(model, split)
            images = attacked.images(slice(0, n))
            result = attack(model, images, labels[:n], ids=attacked.ids, seed=seed, clean_logits=logits[:n])
        clean, robust = _correct(logits, split), int((~result.broken).sum())
        floor = (rows[0].robust_correct if rows else robust) - recipe.allowed(n)
        rows.append(
            Alpha(
                alpha=alpha,
                clean_correct=clean,
                robust_correct=robust,
                clean_accuracy=clean / len(split),
                robust_accuracy=robust / n,
                change=relative_change(state[name], base[name]),
                admissible=robust >= floor,
            )
        )
        watcher.alpha(rows[-1])
    return tuple(rows)


def best_alpha(rows: Collection[Alpha]) -> Alpha:
    """The admissible point of highest clean accuracy; of equals the most robust one, then the one nearest to the base."""
    return max((row for row in rows if row.admissible), key=lambda r: (r.clean_correct, r.robust_correct, -r.alpha))


def rift(
    model: nn.Module,
    data: Dataset,
    recipe: RiFTRecipe | None = None,
    seed: int = 0,
    *,
    inputs: AdversarialSet | None = None,
    finished: Mapping[str, ModuleCriticality] | None = None,
    watcher: Watcher | None = None,
) -> tuple[State, RiFTResult]:
    """The whole method on any network: criticality, choice of the module, fine-tuning, interpolation.

    Args:
        model: an adversarially trained network, raw images in [0, 1] to logits. It comes back as it was, bit for bit.
        data: `train` and `calibration` are used, `test` is not.
        inputs: the adversarial set of `adversarial_set`, if there is one already.
        finished: modules whose criticality is known already, by parameter name.

    Returns:
        The state to load (`model.load_state_dict(state)`), and what was found.

    Raises:
        ConfigError: `recipe.module` names no Conv2d or Linear layer, or one that no logit depends on.
        DataError, ModelError: data or network break the contract.
    """
    recipe, watcher = recipe or RiFTRecipe(), watcher or Watcher()
    asked = None if recipe.module == ARGMIN else [recipe.module]
    criticality = module_robust_criticality(
        model,
        data,
        recipe,
        seed,
        inputs=inputs,
        names=asked,
        finished=finished,
        on_epoch=watcher.ascent,
        on_module=watcher.module,
    )
    name = criticality.least().name if asked is None else exact_name(recipe.module, candidates(model)[0])
    if name in criticality.unused:
        raise ConfigError(f"rift: no logit depends on '{name}', so there is nothing to tune; choose another module")
    watcher.chosen(criticality, name)
    base = state_of(model)
    tuned = fine_tune(model, data, name, recipe, seed, watcher)
    rows = interpolation_search(model, data, name, base, tuned.state, recipe, seed, watcher)
    chosen = best_alpha(rows)
    attacked = len(data["calibration"].take(recipe.search_n))
    result = RiFTResult(
        module=name,
        criticality=criticality,
        curve=tuned.curve,
        epoch=tuned.epoch,
        alphas=rows,
        alpha=chosen.alpha,
        n=len(data["calibration"]),
        n_attacked=attacked,
        tolerance_points=recipe.tolerance,
        tolerance_samples=recipe.allowed(attacked),
        eps_w=recipe.eps_w,
        inside=chosen.change <= recipe.eps_w,
        seed=seed,
    )
    return interpolate(base, tuned.state, chosen.alpha), result
