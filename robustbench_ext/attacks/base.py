"""What every attack promises, checked in one place.

`Attack.__call__` is final. It checks inputs, labels and logits, freezes the model in evaluation mode and restores it,
seeds every sample by its id, shares the clean logits, verifies that every returned input is inside the ball and the
box, and counts passes. A new attack is a frozen dataclass that writes one method, `_run`.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, final

import numpy as np
import torch
from torch import Tensor, nn

from robustbench_ext import device as devices
from robustbench_ext.attacks.losses import rivals
from robustbench_ext.attacks.search import Keep, Search, Stop, mean_logits
from robustbench_ext.attacks.threat import TOLERANCE, Threat, flat_norm
from robustbench_ext.catalog import ATTACKS
from robustbench_ext.errors import ConfigError, DataError, ThreatModelError, unknown_name
from robustbench_ext.models.contract import (
    ask_if_finite,
    check_images,
    check_labels,
    check_logits,
    finite_later,
    frozen_eval,
    refuse_probabilities,
)
from robustbench_ext.models.inference import shared_copies
from robustbench_ext.numbers import read_numbers
from robustbench_ext.randomness import SampleRandom, sample_keys


@dataclass(frozen=True)
class AttackResult:
    """What an attack did to N samples.

    Attributes:
        x_adv: float32 (N, C, H, W), inside the threat model; the clean input where that is misclassified already.
        logits: (N, K) at x_adv.
        broken: bool (N,), misclassified at x_adv (clean errors included).
        norms: (N,), the size of the perturbation in the attack's norm.
        forwards, backwards: int32 (N,), passes spent on each sample, the clean forward included where it was needed.
        broken_by: int16 (N,), which member of an ensemble broke the sample (see `Attack.members`); -1 where the clean
            input is misclassified or nothing broke it.
        reached: bool (N,), the attack's goal is reached: `broken`, or for a targeted attack the target class.
        late_gain: (N,), the share of the gain in loss that came in the last tenth of the iterations; NaN where the
            attack does not say, or was done before.
        extra: further columns (N,) of single attacks.
    All of it lies where the inputs were, wherever the model is.
    """

    x_adv: Tensor
    logits: Tensor
    broken: Tensor
    norms: Tensor
    forwards: Tensor
    backwards: Tensor
    broken_by: Tensor
    reached: Tensor
    late_gain: Tensor
    extra: dict[str, Tensor] = field(default_factory=dict)

    def rows(self, index: Tensor) -> AttackResult:
        """The result of some of the samples."""
        extra = {name: column[index] for name, column in self.extra.items()}
        return AttackResult(**{name: getattr(self, name)[index] for name in COLUMNS}, extra=extra)

    def to(self, device: torch.device) -> AttackResult:
        """The result on a device."""
        extra = {name: column.to(device) for name, column in self.extra.items()}
        return AttackResult(**{name: getattr(self, name).to(device) for name in COLUMNS}, extra=extra)


COLUMNS = tuple(f.name for f in fields(AttackResult) if f.name != "extra")


@dataclass(frozen=True)
class Passes:
    """Forward and backward passes that a sample may cost, beside the clean pass that all attacks share."""

    forwards: int
    backwards: int

    def __add__(self, other: Passes) -> Passes:
        return Passes(self.forwards + other.forwards, self.backwards + other.backwards)


@dataclass(frozen=True, kw_only=True)
class Attack(ABC):
    """An attack with its parameters.

    Args:
        eps: budget, in units of [0, 1] pixels; a string such as "8/255" will do.
        norm: "Linf" or "L2".
        stop: "broken" (default): a sample leaves at its first misclassified input, which is what robust accuracy
            needs. "never": go on to the end and return the input of highest cross-entropy among the misclassified ones
            (or among all, where none is), which is what calibration, energies and detection under a full-strength attack
            need. Samples that are misclassified clean are never attacked: they count as broken as they are.
        draws: passes of each look at the model. More than 1 for randomised models: gradients and predictions are means
            over draws (expectation over transformations), and a break must be confirmed by fresh ones.
        precision: "float32", or "tf32" or "bfloat16": gradients are taken at lower precision (faster on GPUs made for it). A
            sample counts as broken only when the float32 model confirms it.
    """

    eps: float
    norm: str = "Linf"
    stop: Stop = "broken"
    draws: int = 1
    precision: str = "float32"

    name: ClassVar[str]
    version: ClassVar[int] = 1  # part of every record's key: raise it when results change
    norms: ClassVar[tuple[str, ...]] = ("Linf", "L2")
    whole: ClassVar[bool] = False  # True: needs all samples at once, not chunk by chunk
    keep: ClassVar[Keep] = "loss"  # "norm": return the smallest perturbation that reaches the goal
    access: ClassVar[str] = "white"
    stochastic: ClassVar[bool] = False
    per_sample_draws: ClassVar[bool] = True  # False: random draws depend on the composition of the batch
    reference: ClassVar[str] = ""

    def __post_init__(self) -> None:
        read_numbers(self, self.name)
        if self.norm not in self.norms:
            raise ConfigError(
                f"{self.name}: norm '{self.norm}' is not supported; expected one of {', '.join(self.norms)}"
            )
        if self.stop not in ("broken", "never"):
            raise ConfigError(f"{self.name}: stop = {self.stop!r}, expected 'broken' or 'never'")
        if self.draws < 1:
            raise ConfigError(f"{self.name}: draws = {self.draws}, expected at least 1")
        if self.precision not in devices.PRECISIONS:
            raise ConfigError(
                f"{self.name}: precision = {self.precision!r}, expected one of {', '.join(devices.PRECISIONS)}"
            )
        self.threat()

    def threat(self) -> Threat:
        """The threat model that every returned input obeys."""
        return Threat(self.norm, self.eps)

    def spec(self) -> dict[str, Any]:
        """All that a result depends on, as JSON-like values."""
        values = {"attack": self.name, "version": self.version, **asdict(self)}
        return values if self.eps < float("inf") else {**values, "eps": None}  # JSON has no infinity

    def cost(self, num_classes: int) -> Passes | None:
        """The most passes that a sample which nothing breaks can cost; None where it cannot be said beforehand."""
        return None

    @final
    def __call__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        *,
        ids: Sequence[object] | np.ndarray | None = None,
        seed: int = 0,
        clean_logits: Tensor | None = None,
        batch_size: int = 250,
    ) -> AttackResult:
        """Attack `model` at inputs x with labels y.

        Args:
            model: raw images in [0, 1] to logits, on any device: batches are sent to it. It comes back in the mode and with the
                gradients flags it had.
            x: float32 (N, C, H, W) in [0, 1].
            y: int64 (N,).
            ids: one id per sample, for its random draws; the position 0..N-1 by default.
            seed: of the random draws.
            clean_logits: (N, K) at x, if they are known; saves a forward pass.
            batch_size: changes speed and memory, not draws; verdicts only by rounding.

        Raises:
            DataError, ModelError: inputs, labels or logits break the contract.
            ThreatModelError: the attack left its threat model.
        """
        check_images(x)
        if len(y) != len(x):
            raise DataError(f"{len(y)} labels for {len(x)} inputs, expected one each")
        if ids is not None and len(ids) != len(x):
            raise DataError(f"{len(ids)} ids for {len(x)} inputs, expected one each")
        device = devices.of(model, x.device)
        keys, y = sample_keys(range(len(x)) if ids is None else list(ids)).to(x.device), y.to(x.device)
        if not len(x):
            raise DataError("no inputs: at least one sample is needed")
        # A model's own random draws come from torch's generators: seeded here, and given back as they were.
        with frozen_eval(model), seeded(seed, device), shared_copies(), devices.float32(), finite_later():
            paid = 0
            if clean_logits is None or self.draws > 1:
                paid = self.draws
                with torch.no_grad():
                    parts = [
                        mean_logits(model, devices.send(x[start : start + batch_size], device, copy=True), self.draws)
                        for start in range(0, len(x), batch_size)
                    ]
                    clean_logits = torch.cat(parts)
            ask_if_finite()
            clean_logits = check_logits(clean_logits.to(x.device), len(x))
            check_labels(y, clean_logits.shape[1], len(x))
            refuse_probabilities(clean_logits)
            result = self._all(model, x, y, keys, seed, clean_logits, batch_size)
        result.forwards.add_(paid)
        return result

    @property
    def members(self) -> tuple[str, ...]:
        """The names that `AttackResult.broken_by` counts: one for a single attack."""
        return (self.name,)

    def _all(
        self, model: nn.Module, x: Tensor, y: Tensor, keys: Tensor, seed: int, clean_logits: Tensor, batch_size: int
    ) -> AttackResult:
        """Attack all samples, batch by batch; an ensemble goes through its members instead."""
        device = devices.of(model, x.device)
        results = []
        for start in range(0, len(x), batch_size):
            rows = slice(start, start + batch_size)
            part, labels, chosen, logits = (devices.send(given[rows], device) for given in (x, y, keys, clean_logits))
            results.append(self._batch(model, part, labels, SampleRandom(seed, chosen, self.name), logits).to(x.device))
        columns: dict[str, Any] = {name: torch.cat([getattr(r, name) for r in results]) for name in COLUMNS}
        return AttackResult(**columns)

    def _batch(
        self, model: nn.Module, x: Tensor, y: Tensor, random: SampleRandom, clean_logits: Tensor
    ) -> AttackResult:
        threat = self.threat()
        target = self._target(clean_logits, y, random)
        search = Search(
            model,
            x,
            y,
            threat,
            random,
            self.stop,
            clean_logits,
            target=target,
            keep=self.keep,
            draws=self.draws,
            precision=self.precision,
        )
        if self.eps > 0 and not search.done:
            self._run(search)
        ask_if_finite()
        ball, box = threat.excess(search.best, x)
        if not (ball <= TOLERANCE and box <= 0.0):  # also catches NaN
            raise ThreatModelError(
                f"{self.name}: returned inputs leave the threat model {threat} by {ball:.2g} (ball) or {box:.2g} (box). "
                f"An attack must submit projected candidates only: threat.project(candidates, x)."
            )
        norms = flat_norm(search.best - x, self.norm)
        by = torch.where(search.broken & ~search.wrong_clean, 0, -1).to(torch.int16)
        return AttackResult(
            search.best,
            search.best_logits,
            search.broken,
            norms,
            search.forwards,
            search.backwards,
            by,
            search.reached,
            search.late_gain(),
        )

    def _target(self, clean_logits: Tensor, y: Tensor, random: SampleRandom) -> Tensor | None:
        """The class that each sample is to become, (N,), or None: any mistake will do. See `Targeted`."""
        return None

    @abstractmethod
    def _run(self, search: Search) -> None:
        """Search for adversarial inputs: submit candidates, stop when `search.done`."""


TARGETS = ("none", "least-likely", "most-likely", "next", "random")


@dataclass(frozen=True, kw_only=True)
class Targeted(Attack):
    """An attack that may be given a class to reach.

    Args:
        target: "none" (default): any mistake will do. "least-likely", "most-likely": of the wrong classes, by the clean
            logits. "next": label + 1. "random": uniform among the wrong classes. Or a class number. A targeted attack
            goes on until the target is reached; `AttackResult.reached` says for whom it was, `broken` still means any
            mistake. Samples whose label is the target are left alone.
    """

    target: str | int = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.target, str) and self.target.isdigit():
            object.__setattr__(self, "target", int(self.target))
        wrong = self.target < 0 if isinstance(self.target, int) else self.target not in TARGETS
        if wrong or isinstance(self.target, bool):
            raise ConfigError(f"{self.name}: target = {self.target!r}, expected a class number or {', '.join(TARGETS)}")

    def _target(self, clean_logits: Tensor, y: Tensor, random: SampleRandom) -> Tensor | None:
        classes = clean_logits.shape[1]
        if self.target == "none":
            return None
        if isinstance(self.target, int):
            if self.target >= classes:
                raise ConfigError(f"{self.name}: target = {self.target}, but the model has {classes} outputs")
            return torch.full_like(y, self.target)
        if self.target == "next":
            return (y + 1) % classes
        if self.target == "random":
            draw = random.child("target").bits(1)[:, 0] % (classes - 1)
            return (y + 1 + draw) % classes
        if self.target == "most-likely":
            return rivals(clean_logits, y, 1)[:, 0]
        return clean_logits.scatter(1, y[:, None], torch.inf).argmin(dim=1)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Torch's global generators set to `seed` inside the block, and as they were after it."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def build_attack(name: str, **parameters: Any) -> Attack:
    """An attack by its registered name, such as `pgd` or `torchattacks:CW`, or one of your own, `file.py:MyAttack`.

    Raises:
        ConfigError: an unknown name or parameter; the message names the closest known one.
    """
    family, variant = ATTACKS.split(name)
    cls = ATTACKS.load(family)
    if variant:
        parameters = {"attack": variant, **parameters}
    return build(cls, name, parameters)  # type: ignore[no-any-return]


def build(cls: Any, name: str, parameters: Mapping[str, Any]) -> Any:
    """Call a class with named parameters; an unknown or a missing one is an error that says which there are."""
    signature = inspect.signature(cls).parameters
    for given in parameters:
        if given not in signature:
            raise ConfigError(f"{name}: " + unknown_name("parameter", given, signature))
    missing = [p for p, v in signature.items() if v.default is inspect.Parameter.empty and p not in parameters]
    if missing:
        raise ConfigError(f"{name}: missing {', '.join(missing)}, for example eps: 8/255")
    return cls(**parameters)
