"""What a defense is: given a model and a batch, a loss and what it wants logged.

Attack, schedule, averaging and data belong to the trainer. A defense says which inner attack it is defined with, and
may keep a state: parameters that are trained beside the model's (a projection head) and buffers that must survive an
interruption (a moving average).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robustbench_ext.attacks.inner import Crafted, Mode
from robustbench_ext.attacks.threat import Threat
from robustbench_ext.errors import ConfigError
from robustbench_ext.randomness import SampleRandom


@dataclass(frozen=True)
class Task:
    """What a defense may know of the training it is part of, before it starts.

    Attributes:
        counts: int64 (K,), training samples of each class.
        shape: (C, H, W) of an input.
        epochs: of the whole training.
    """

    counts: np.ndarray
    shape: tuple[int, int, int]
    epochs: int

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.counts)


@dataclass(frozen=True)
class Batch:
    """One training batch.

    Attributes:
        x, y: inputs (B, C, H, W) in [0, 1] and labels (B,).
        x_adv: adversarial inputs, detached; equal to x where the defense asks for none.
        eps: budget of the attack.
        epoch: counted from 0, of `epochs`.
        targets: (B, K) probabilities in the place of the labels where labels are smoothed or mixed, else None.
        steps_correct: int64 (B,), how many of the attack's `attack_steps` iterates were classified correctly before each
            step, where the defense's attack counts them.
        class_loss: what `cross_entropy` gives in the place of cross-entropy, where a class-prior loss surrounds the defense.
    """

    x: Tensor
    y: Tensor
    x_adv: Tensor
    eps: float = 0.0
    epoch: int = 0
    epochs: int = 1
    targets: Tensor | None = None
    steps_correct: Tensor | None = None
    attack_steps: int = 0
    class_loss: Callable[[Tensor, Batch], Tensor] | None = None

    @property
    def progress(self) -> float:
        """The share of the training that is done, 0 in the first epoch."""
        return self.epoch / self.epochs


@dataclass(frozen=True)
class Loss:
    """A scalar to descend on, and scalars to log (detached, on the model's device)."""

    value: Tensor
    logs: dict[str, Tensor] = field(default_factory=dict)


class Crafter(Protocol):
    """An inner attack: adversarial inputs of one batch, and what it noticed on the way. A dataclass, so that the recipe can
    replace its mode.
    """

    @property
    def mode(self) -> Mode: ...

    def craft(
        self, model: nn.Module, x: Tensor, y: Tensor, random: SampleRandom, step: int, targets: Tensor | None = None
    ) -> Crafted: ...


@dataclass(frozen=True, kw_only=True)
class Defense(ABC):
    """A training objective with its hyper-parameters.

    Class attributes:
        select_by: the accuracy by which the trainer keeps the best epoch, "robust" or "clean".
        soft_targets: whether the loss is defined for targets that are probabilities (label smoothing, CutMix).
        class_losses: whether its loss of labels goes through `cross_entropy`, so that a class-prior loss can take its place.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1  # part of every training's key: raise it when weights change
    select_by: ClassVar[str] = "robust"
    soft_targets: ClassVar[bool] = False
    class_losses: ClassVar[bool] = False
    reference: ClassVar[str] = ""

    def spec(self) -> dict[str, Any]:
        """All that the trained weights depend on here."""
        return {"defense": self.name, "version": self.version, **asdict(self)}

    def attack(self, threat: Threat, steps: int, step_size: float | None) -> Crafter | None:
        """The inner attack that the method is defined with; None where it needs no adversarial inputs."""
        return None

    def state(self, model: nn.Module, task: Task) -> nn.Module:
        """A module of parameters to train beside the model's and of buffers to keep; empty by default."""
        return nn.Module()

    @contextmanager
    def perturb(self, model: nn.Module, batch: Batch, state: nn.Module) -> Iterator[None]:
        """Entered before the loss and left after its backward pass, before the optimizer's step: for methods that take
        the gradient at other weights than they update. Does nothing by default.
        """
        yield

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch, state: nn.Module | None = None) -> Loss:
        """The loss of one batch; the model is in training mode. Natural and adversarial inputs go through separate
        forward passes: concatenating them would change the batch statistics, and so the method.

        Args:
            state: what `state` made; methods that have none do without.
        """


def cross_entropy(logits: Tensor, batch: Batch) -> Tensor:
    """Per-sample cross-entropy (B,) with the batch's labels, or with its target probabilities where it has any; the batch's own
    `class_loss` in its place, where it has one.
    """
    if batch.class_loss is not None:
        return batch.class_loss(logits, batch)
    return F.cross_entropy(logits, batch.y if batch.targets is None else batch.targets, reduction="none")


def probability_margin(logits: Tensor, y: Tensor) -> Tensor:
    """p_y - max_{k != y} p_k, (B,), in [-1, 1]: positive where the sample is classified correctly."""
    p = logits.softmax(dim=1)
    true = p.gather(1, y[:, None])[:, 0]
    return true - p.scatter(1, y[:, None], -1.0).amax(dim=1)


def bare(model: nn.Module) -> nn.Module:
    """The module behind a distributed wrapper: what is attacked, and where layers are looked up by name."""
    inner = getattr(model, "module", None)
    is_wrapper = isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel))
    return inner if is_wrapper and isinstance(inner, nn.Module) else model


def read_booleans(instance: Any, what: str) -> None:
    """Refuse anything but true and false in the boolean fields of a dataclass: the string "no" would count as true."""
    for spec in fields(instance):
        value = getattr(instance, spec.name)
        if str(spec.type) == "bool" and not isinstance(value, bool):
            raise ConfigError(f"{what}: {spec.name} = {value!r}, expected true or false")


def share(value: float, what: str) -> None:
    """Refuse what is not in [0, 1]."""
    if not 0 <= value <= 1:
        raise ConfigError(f"{what} = {value}, expected a share between 0 and 1")


def one_of(value: str, choices: tuple[str, ...], what: str) -> None:
    """Refuse what is none of the choices."""
    if value not in choices:
        raise ConfigError(f"{what} = {value!r}, expected one of {', '.join(choices)}")


def at_least(value: float, least: float, what: str) -> None:
    """Refuse what is smaller, and infinity."""
    if not least <= value < math.inf:
        raise ConfigError(f"{what} = {value}, expected a finite number >= {least:g}")


def detached(**values: Tensor) -> dict[str, Tensor]:
    """Scalars to log: means of tensors, without their graph."""
    return {name: value.detach().mean() for name, value in values.items()}


def batch_mean(values: Tensor) -> Tensor:
    """The mean of detached values (B,) over the joint batch of all processes of a distributed training."""
    if not _several_processes():
        return values.mean()
    total = torch.stack([values.detach().double().sum(), values.new_tensor(len(values), dtype=torch.float64)])
    torch.distributed.all_reduce(total)
    return (total[0] / total[1]).to(values.dtype)


def batch_max(values: Tensor) -> Tensor:
    """The largest of detached values (B,) of the joint batch of all processes."""
    largest = values.detach().max()
    if _several_processes():
        torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
    return largest


def _several_processes() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
