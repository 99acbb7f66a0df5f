"""One trainer for every defense: data order, inner attack, schedule, validation, checkpoints.

All randomness is counter-based - the order of an epoch and the attack's starts are functions of (seed, epoch, sample
id), and the global generator, which dropout uses, is seeded anew for every epoch - so a checkpoint needs no generator
states: a run that was killed and is started again ends at the same weights as one that was not.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from defenses.base import Batch, Defense
from robustbench_ext.attacks.inner import InnerAttack
from robustbench_ext.attacks.pgd import PGD
from robustbench_ext.attacks.threat import Threat
from robustbench_ext.catalog import MODELS
from robustbench_ext.data.base import Dataset, Split
from robustbench_ext.errors import ConfigError, RobustBenchExtError
from robustbench_ext.files import write_atomically
from robustbench_ext.fingerprint import key_of
from robustbench_ext.models.contract import check_images, frozen_eval
from robustbench_ext.models.loading import RECIPE_FILE, WEIGHTS_FILE, fingerprint_module, load_model
from robustbench_ext.numbers import read_numbers
from robustbench_ext.randomness import SampleRandom

CHECKPOINT_FILE = "checkpoint.pt"
TRAINER_VERSION = 1


@dataclass(frozen=True)
class Recipe:
    """Everything about a training run but the defense, the network and the data.

    Args:
        epochs, batch_size: of the outer loop; an epoch is cut into equal batches of at most `batch_size`.
        optimizer: "sgd" (momentum) or "adamw".
        lr, momentum, weight_decay: of the optimizer.
        schedule: "onecycle" (25 % warm-up, then cosine to nearly 0), "cosine" or "constant"; stepped every batch.
        eps, norm: of the inner attack, and of the PGD attack that validates.
        attack_steps, step_size: of the inner attack; 2.5 eps / steps by default.
        validation_steps: PGD steps (of the default size) on the calibration split after an epoch.
        validation_n: how many calibration samples are attacked (the first, a stratified sample); None for all.
    """

    epochs: int = 20
    batch_size: int = 128
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: Literal["onecycle", "cosine", "constant"] = "onecycle"
    eps: float = 0.1
    norm: str = "Linf"
    attack_steps: int = 10
    step_size: float | None = None
    validation_steps: int = 10
    validation_n: int | None = 500

    def __post_init__(self) -> None:
        read_numbers(self, "recipe")
        for name, choices in {"optimizer": ("sgd", "adamw"), "schedule": ("onecycle", "cosine", "constant")}.items():
            if getattr(self, name) not in choices:
                raise ConfigError(f"recipe: {name} = {getattr(self, name)!r}, expected one of {', '.join(choices)}")
        # Batch norm needs two samples in a batch.
        for name, least in {"epochs": 1, "batch_size": 2, "attack_steps": 1, "validation_steps": 1}.items():
            if getattr(self, name) < least:
                raise ConfigError(f"recipe: {name} = {getattr(self, name)}, expected at least {least}")
        if self.validation_n is not None and self.validation_n < 1:
            raise ConfigError(f"recipe: validation_n = {self.validation_n}, expected at least 1")
        if not 0 <= self.momentum < 1 or self.weight_decay < 0:
            raise ConfigError(
                f"recipe: momentum = {self.momentum}, weight_decay = {self.weight_decay}; expected both >= 0"
            )
        self.threat()
        if self.lr <= 0:
            raise ConfigError(f"recipe: lr = {self.lr}, expected a number > 0")

    def threat(self) -> Threat:
        """The threat model of training and validation."""
        return Threat(self.norm, self.eps)

    def factor(self, step: int, total: int) -> float:
        """The learning rate at a step, as a share of `lr`."""
        if self.schedule == "constant":
            return 1.0
        done = step / max(1, total)
        if self.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * done))
        if done < 0.25:  # from 1/25 up, as one-cycle schedules begin
            return 0.04 + 0.96 * 0.5 * (1 - math.cos(math.pi * done / 0.25))
        return 1e-4 + (1 - 1e-4) * 0.5 * (1 + math.cos(math.pi * (done - 0.25) / 0.75))


@dataclass(frozen=True)
class Architecture:
    """The network to train, by its specification; `mean` and `std` are applied inside it."""

    spec: str
    shape: tuple[int, int, int]
    num_classes: int
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    kwargs: dict[str, Any] | None = None

    def build(self, seed: int) -> nn.Module:
        """The network; reference networks get other weights for another seed, given weights and factories stay."""
        module = load_model(
            self.spec, shape=self.shape, num_classes=self.num_classes, mean=self.mean, std=self.std, kwargs=self.kwargs
        ).module
        if seed and self.spec in MODELS:
            torch.manual_seed(seed)
            for child in module.modules():
                if isinstance(child, (nn.Conv2d, nn.Linear)):
                    child.reset_parameters()
        return module


def training_key(defense: Defense, architecture: Architecture, data: Dataset, recipe: Recipe, seed: int) -> str:
    """The content key of the weights that this training gives."""
    return key_of(
        {
            "kind": "training",
            "version": TRAINER_VERSION,
            "defense": defense.spec(),
            "architecture": asdict(architecture),
            "weights": fingerprint_module(architecture.build(seed)),
            "recipe": asdict(recipe),
            "train": data["train"].fingerprint(),
            "calibration": data["calibration"].fingerprint(),
            "seed": seed,
        }
    )


@dataclass(frozen=True)
class Validation:
    """Accuracy on the calibration split."""

    clean: float
    robust: float


def validate(model: nn.Module, split: Split, recipe: Recipe, seed: int, batch_size: int = 500) -> Validation:
    """Clean accuracy of the whole split and PGD accuracy of its first samples; draws are the same in every epoch."""
    attacked = split.take(recipe.validation_n)
    logits, labels = [], torch.from_numpy(split.labels)
    with torch.no_grad(), frozen_eval(model):
        for start in range(0, len(split), batch_size):
            logits.append(model(split.images(slice(start, start + batch_size))))
    scores = torch.cat(logits)
    attack = PGD(eps=recipe.eps, norm=recipe.norm, steps=recipe.validation_steps)
    n = len(attacked)
    result = attack(
        model, attacked.images(slice(0, n)), labels[:n], ids=attacked.ids, seed=seed, clean_logits=scores[:n]
    )
    clean = float((scores.argmax(1) == labels).float().mean())
    return Validation(clean, float((~result.broken).float().mean()))


def _order(split: Split, seed: int, epoch: int) -> np.ndarray:
    draws = SampleRandom.of(seed, split.ids, "epoch-order").bits(1, step=epoch)[:, 0].numpy()
    return np.lexsort((np.arange(len(draws)), draws))


def train(
    defense: Defense,
    architecture: Architecture,
    data: Dataset,
    recipe: Recipe,
    out: Path,
    seed: int = 0,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
    on_batch: Callable[[int, int, int], None] | None = None,
) -> Path:
    """Train, keep the best epoch, write `model.safetensors`, `model.json` and the curve into the folder `out`.

    Training that was interrupted goes on at the last finished epoch; training that is done already is not repeated.

    Args:
        defense: the objective.
        data: trained on `train`; the best epoch is chosen on `calibration`, by the accuracy that `defense.select_by`
            names (ties go to the other one). `test` is never touched.
        on_epoch: called with the epoch's row of the curve.
        on_batch: called with (epoch, batch, batches).

    Raises:
        ConfigError: `out` holds another training run.
        RobustBenchExtError: the loss became NaN or infinite.
    """
    key = training_key(defense, architecture, data, recipe, seed)
    out.mkdir(parents=True, exist_ok=True)
    finished = out / RECIPE_FILE
    if finished.is_file():
        if json.loads(finished.read_text())["key"] != key:
            raise ConfigError(
                f"{out} holds a model of another training run (other recipe, data, network or seed). "
                f"Give another --out, or remove the folder."
            )
        return out
    split = data["train"]
    check_images(split.images(slice(0, min(len(split), 256))), f"{data.name}/train")
    model = architecture.build(seed)
    optimizer = _optimizer(model, recipe)
    state = _resume(out, key, model, optimizer)
    batches = [
        b for b in np.array_split(np.arange(len(split)), math.ceil(len(split) / recipe.batch_size)) if len(b) > 1
    ]
    if not batches:
        raise ConfigError(f"{data.name}/train has {len(split)} samples: too few to train on")
    attack = _inner(defense, recipe)
    while state.epoch < recipe.epochs:
        started = time.perf_counter()
        order = _order(split, seed, state.epoch)
        model.train()
        torch.manual_seed(
            _epoch_seed(seed, state.epoch)
        )  # for layers that draw from the global generator, such as dropout
        totals: dict[str, float] = {}
        for number, positions in enumerate(batches):
            step = state.epoch * len(batches) + number
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr * recipe.factor(step, recipe.epochs * len(batches))
            index = np.sort(order[positions])
            x, y = split.images(index), torch.from_numpy(split.labels[index])
            x_adv = x
            if attack is not None:
                x_adv = attack(model, x, y, SampleRandom.of(seed, split.ids[index], "inner-attack"), step=state.epoch)
            loss = defense.loss(model, Batch(x, y, x_adv, state.epoch))
            _descend(optimizer, loss.value, state.epoch)
            for name, value in {"loss": float(loss.value.detach()), **loss.logs}.items():
                totals[name] = totals.get(name, 0.0) + value * len(index)
            if on_batch is not None:
                on_batch(state.epoch, number + 1, len(batches))
        measured = validate(model, data["calibration"], recipe, seed)
        row = {
            "epoch": state.epoch + 1,
            **{name: total / len(split) for name, total in totals.items()},
            "clean_accuracy": measured.clean,
            "robust_accuracy": measured.robust,
        }
        state.finish_epoch(model, row, defense.select_by)
        _checkpoint(out, key, model, optimizer, state)
        if on_epoch is not None:
            on_epoch({**row, "seconds": time.perf_counter() - started, "epochs": recipe.epochs})
    _publish(out, key, defense, architecture, data, recipe, seed, state)
    return out


def _epoch_seed(seed: int, epoch: int) -> int:
    return int(SampleRandom.of(seed, ["all"], "global").bits(1, step=epoch)[0, 0])


def _inner(defense: Defense, recipe: Recipe) -> InnerAttack | None:
    if defense.objective is None:
        return None
    return InnerAttack(recipe.threat(), recipe.attack_steps, recipe.step_size, defense.objective, defense.start)


def _optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    return torch.optim.SGD(model.parameters(), lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay)


def _descend(optimizer: torch.optim.Optimizer, loss: Tensor, epoch: int) -> None:
    if not bool(torch.isfinite(loss)):
        raise RobustBenchExtError(
            f"the training loss became {float(loss.detach())} in epoch {epoch + 1}. Lower lr, or check the data for NaN; "
            f"the last finished epoch is kept in the checkpoint."
        )
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()


@dataclass
class _State:
    """Where a training run stands: finished epochs, its curve, the best weights so far."""

    epoch: int
    curve: list[dict[str, float]]
    best: dict[str, Tensor]
    best_score: tuple[float, float]
    best_epoch: int

    def finish_epoch(self, model: nn.Module, row: dict[str, float], select_by: str) -> None:
        self.epoch += 1
        self.curve.append(row)
        other = "clean" if select_by == "robust" else "robust"
        score = (row[f"{select_by}_accuracy"], row[f"{other}_accuracy"])
        if score > self.best_score:
            self.best_score, self.best_epoch = score, self.epoch
            self.best = {name: value.detach().clone() for name, value in model.state_dict().items()}


def _checkpoint(out: Path, key: str, model: nn.Module, optimizer: torch.optim.Optimizer, state: _State) -> None:
    content = {
        "key": key,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "epoch": state.epoch,
        "curve": state.curve,
        "best": state.best,
        "best_score": list(state.best_score),
        "best_epoch": state.best_epoch,
    }
    write_atomically(out / CHECKPOINT_FILE, lambda file: torch.save(content, file))


def _resume(out: Path, key: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> _State:
    file = out / CHECKPOINT_FILE
    if file.is_file():
        try:
            content = torch.load(file, weights_only=True)
        except Exception:  # a damaged file raises whatever its bytes happen to trip; it counts as missing
            content = {"key": None}
        if content["key"] == key:
            model.load_state_dict(content["model"])
            optimizer.load_state_dict(content["optimizer"])
            first, second = content["best_score"]
            return _State(content["epoch"], content["curve"], content["best"], (first, second), content["best_epoch"])
    return _State(0, [], {}, (-1.0, -1.0), 0)


def _publish(
    out: Path,
    key: str,
    defense: Defense,
    architecture: Architecture,
    data: Dataset,
    recipe: Recipe,
    seed: int,
    state: _State,
) -> None:
    from safetensors.torch import save_file

    weights = {name: value.contiguous() for name, value in state.best.items()}
    write_atomically(out / WEIGHTS_FILE, lambda file: save_file(weights, str(file)))
    description = {
        "key": key,
        "defense": defense.spec(),
        "architecture": asdict(architecture),
        "recipe": asdict(recipe),
        "data": data.describe(),
        "seed": seed,
        "selected": {"epoch": state.best_epoch, "by": defense.select_by, "on": "calibration"},
        "curve": state.curve,
    }
    # model.json is what marks the folder as finished, so it is written last.
    write_atomically(out / RECIPE_FILE, lambda file: file.write_text(json.dumps(description, indent=1)))
    (out / CHECKPOINT_FILE).unlink(missing_ok=True)
