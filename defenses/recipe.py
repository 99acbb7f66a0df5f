"""How a network is trained, apart from the defense: optimizer, schedule, augmentation, attack budget, validation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from defenses.augment import Augmentation
from defenses.base import at_least, one_of, read_booleans, share
from defenses.grad_noise import GradientNoise
from robustbench_ext.attacks.threat import Threat
from robustbench_ext.errors import ConfigError, unknown_name
from robustbench_ext.numbers import parse_number, read_numbers

Schedule = Literal["onecycle", "cosine", "piecewise", "cyclic", "constant"]
SCHEDULES = ("onecycle", "cosine", "piecewise", "cyclic", "constant")


@dataclass(frozen=True)
class Recipe:
    """Everything about a training run but the defense, the network and the data.

    Args:
        epochs, batch_size: of the outer loop; an epoch is cut into equal batches of at most `batch_size`.
        optimizer: "sgd" (momentum) or "adamw".
        lr, momentum, weight_decay: of the optimizer.
        schedule: stepped every batch: "onecycle" (25 % warm-up, then cosine to nearly 0), "cosine", "piecewise" (times
            `gamma` at each milestone), "cyclic" (a triangle with its peak at 40 % of the training), "constant".
        milestones: shares of the training (0.5, "75/120") or epochs (75, counted from 0) at which a piecewise schedule falls.
        gamma: the factor of each fall, or one for each milestone.
        warmup: epochs over which the rate rises linearly to what the schedule says; 0 for none.
        clip_grad: the largest allowed norm of the gradient; None for no limit.
        grad_noise: {eta: 0.01, gamma: 0.55} adds fading noise to clipped gradients (`defenses.grad_noise`); None for none.
        label_smoothing: the share of each label that is spread over all classes, in the loss (not in the attack).
        augmentation: see `defenses.augment.Augmentation`; {crop: 4, flip: true} is CIFAR's usual one.
        eps, norm: of the inner attack, and of the PGD attack that validates.
        attack_steps, step_size: of the inner attack; 2.5 eps / steps by default.
        attack_mode: the network's mode while it is attacked: "method" (what the defense prescribes), "eval" or "train".
        average: "none"; "ema": exponential moving average of all weights and batch-norm statistics with
            `average_decay`, stepped every batch; "swa": equal average of the epochs' ends from `swa_start` (a share of
            the training) on. What is validated, selected and published is the average.
        precision: "float32" or "bfloat16": autocast of forward and backward passes; weights and losses stay float32.
        validation_steps: PGD steps (of the default size) on the calibration split after an epoch.
        validation_n: how many calibration samples are attacked (the first, a stratified sample); None for all.
        energy_n: how many samples of train and of calibration the energies are measured on after an epoch; 0 for none.
        patience: stop after so many epochs without a better one; None to go on to the end.
        stop_on_alarm: stop when the energies say that the network has begun to overfit robustly.
        deterministic: refuse operations that have no deterministic implementation. On the CPU training is
            deterministic anyhow.
    """

    epochs: int = 20
    batch_size: int = 128
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: Schedule = "onecycle"
    milestones: tuple[float, ...] = (0.5, 0.75)
    gamma: float | tuple[float, ...] = 0.1
    warmup: float = 0
    clip_grad: float | None = None
    label_smoothing: float = 0.0
    augmentation: Augmentation = field(default_factory=Augmentation)
    eps: float = 0.1
    norm: str = "Linf"
    attack_steps: int = 10
    step_size: float | None = None
    attack_mode: Literal["method", "eval", "train"] = "method"
    average: Literal["none", "ema", "swa"] = "none"
    average_decay: float = 0.995
    swa_start: float = 0.75
    precision: Literal["float32", "bfloat16"] = "float32"
    validation_steps: int = 10
    validation_n: int | None = 500
    energy_n: int = 128
    patience: int | None = None
    stop_on_alarm: bool = False
    deterministic: bool = False
    grad_noise: GradientNoise | None = None

    def __post_init__(self) -> None:
        for name in ("milestones", "gamma"):
            value = getattr(self, name)
            if name == "milestones" and not isinstance(value, (list, tuple)):
                raise ConfigError(f"recipe: milestones = {value!r}, expected a rising list such as [0.5, 0.75]")
            if isinstance(value, (list, tuple)):
                object.__setattr__(self, name, tuple(parse_number(v, f"recipe: {name}") for v in value))
        if isinstance(self.gamma, str):
            object.__setattr__(self, "gamma", parse_number(self.gamma, "recipe: gamma"))
        if not isinstance(self.augmentation, Augmentation):
            object.__setattr__(self, "augmentation", _augmentation(self.augmentation))
        if self.grad_noise is not None and not isinstance(self.grad_noise, GradientNoise):
            object.__setattr__(self, "grad_noise", _grad_noise(self.grad_noise))
        _read_plain_numbers(self)
        read_booleans(self, "recipe")
        for name, choices in CHOICES.items():
            one_of(getattr(self, name), choices, f"recipe: {name}")
        # Batch norm needs two samples in a batch.
        for name, least in {"epochs": 1, "batch_size": 2, "attack_steps": 1, "validation_steps": 1}.items():
            at_least(getattr(self, name), least, f"recipe: {name}")
        for name in ("validation_n", "patience"):
            if getattr(self, name) is not None:
                at_least(getattr(self, name), 1, f"recipe: {name}")
        for name in ("weight_decay", "energy_n", "warmup", "step_size"):
            if getattr(self, name) is not None:
                at_least(getattr(self, name), 0, f"recipe: {name}")
        for name in ("label_smoothing", "swa_start"):
            share(getattr(self, name), f"recipe: {name}")
        if not 0 <= self.momentum < 1 or not 0 <= self.average_decay < 1:
            raise ConfigError(
                f"recipe: momentum = {self.momentum}, average_decay = {self.average_decay}; expected both in [0, 1)"
            )
        self.threat()
        for name in ("lr", "clip_grad"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"recipe: {name} = {value}, expected a number > 0")
        if self.average == "swa" and self.swa_start == 1:
            raise ConfigError("recipe: swa_start = 1 averages nothing; expected a share below 1")
        falls = self.gamma if isinstance(self.gamma, tuple) else (self.gamma,)
        if not all(0 < fall < math.inf for fall in falls):
            raise ConfigError(f"recipe: gamma = {self.gamma}, expected factors > 0")
        if isinstance(self.gamma, tuple) and len(self.gamma) != len(self.milestones):
            raise ConfigError(f"recipe: {len(self.gamma)} factors gamma for {len(self.milestones)} milestones")
        if list(self.milestones) != sorted(self.milestones):
            raise ConfigError(f"recipe: milestones = {self.milestones}, expected a rising list such as [0.5, 0.75]")

    def threat(self) -> Threat:
        """The threat model of training and validation."""
        return Threat(self.norm, self.eps)

    def factor(self, step: int, total: int) -> float:
        """The learning rate at a step of `total`, as a share of `lr`."""
        done = step / max(1, total)
        epoch = done * self.epochs
        rising = min(1.0, (epoch + self.epochs / max(1, total)) / self.warmup) if self.warmup else 1.0
        return rising * self._shape(done)

    def _shape(self, done: float) -> float:
        if self.schedule == "constant":
            return 1.0
        if self.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * done))
        if self.schedule == "cyclic":
            return max(1e-4, done / 0.4 if done < 0.4 else (1 - done) / 0.6)
        if self.schedule == "piecewise":
            falls = self.gamma if isinstance(self.gamma, tuple) else (self.gamma,) * len(self.milestones)
            marks = [m if m < 1 else m / self.epochs for m in self.milestones]
            return math.prod(f for f, mark in zip(falls, marks, strict=True) if done >= mark - 1e-9)
        if done < 0.25:  # from 1/25 up, as one-cycle schedules begin
            return 0.04 + 0.96 * 0.5 * (1 - math.cos(math.pi * done / 0.25))
        return 1e-4 + (1 - 1e-4) * 0.5 * (1 + math.cos(math.pi * (done - 0.25) / 0.75))


CHOICES = {
    "optimizer": ("sgd", "adamw"),
    "schedule": SCHEDULES,
    "attack_mode": ("method", "eval", "train"),
    "average": ("none", "ema", "swa"),
    "precision": ("float32", "bfloat16"),
}


def _augmentation(options: Any) -> Augmentation:
    if not isinstance(options, Mapping):
        raise ConfigError(f"recipe: augmentation = {options!r}, expected a mapping such as {{crop: 4, flip: true}}")
    known = {f.name for f in fields(Augmentation)}
    for name in options:
        if name not in known:
            raise ConfigError("recipe: augmentation: " + unknown_name("option", name, known))
    return Augmentation(**options)


def _grad_noise(options: Any) -> GradientNoise:
    if not isinstance(options, Mapping):
        raise ConfigError(f"recipe: grad_noise = {options!r}, expected a mapping such as {{eta: 0.01, gamma: 0.55}}")
    known = {f.name for f in fields(GradientNoise)}
    for name in options:
        if name not in known:
            raise ConfigError("recipe: grad_noise: " + unknown_name("option", name, known))
    return GradientNoise(**options)


def _read_plain_numbers(recipe: Recipe) -> None:
    """As `read_numbers`, for a dataclass in which gamma may be a tuple."""
    if isinstance(recipe.gamma, tuple):
        gamma = recipe.gamma
        object.__setattr__(recipe, "gamma", 1.0)
        read_numbers(recipe, "recipe")
        object.__setattr__(recipe, "gamma", gamma)
    else:
        read_numbers(recipe, "recipe")
