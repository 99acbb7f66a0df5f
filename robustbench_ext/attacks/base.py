"""What every attack promises, checked in one place.

`Attack.__call__` is final. It checks inputs, labels and logits, freezes the model in evaluation mode and restores it,
seeds every sample by its id, shares the clean logits, verifies that every returned input is inside the ball and the
box, and counts passes. A new attack is a frozen dataclass that writes one method, `_run`.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, final

import numpy as np
import torch
from torch import Tensor, nn

from robustbench_ext.attacks.search import Search, Stop
from robustbench_ext.attacks.threat import TOLERANCE, Threat, flat_norm
from robustbench_ext.catalog import ATTACKS
from robustbench_ext.errors import ConfigError, DataError, ThreatModelError, unknown_name
from robustbench_ext.models.contract import (
    check_images,
    check_labels,
    check_logits,
    frozen_eval,
    refuse_probabilities,
)
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
    """

    x_adv: Tensor
    logits: Tensor
    broken: Tensor
    norms: Tensor
    forwards: Tensor
    backwards: Tensor
    broken_by: Tensor

    def rows(self, index: Tensor) -> AttackResult:
        """The result of some of the samples."""
        return AttackResult(**{f.name: getattr(self, f.name)[index] for f in fields(self)})


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
    """

    eps: float
    norm: str = "Linf"
    stop: Stop = "broken"

    name: ClassVar[str]
    version: ClassVar[int] = 1  # part of every record's key: raise it when results change
    norms: ClassVar[tuple[str, ...]] = ("Linf", "L2")
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
        self.threat()

    def threat(self) -> Threat:
        """The threat model that every returned input obeys."""
        return Threat(self.norm, self.eps)

    def spec(self) -> dict[str, Any]:
        """All that a result depends on, as JSON-like values."""
        return {"attack": self.name, "version": self.version, **asdict(self)}

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
            model: raw images in [0, 1] to logits. It comes back in the mode and with the gradients flags it had.
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
        device = next((p.device for p in model.parameters()), x.device)
        keys = sample_keys(range(len(x)) if ids is None else list(ids)).to(device)
        if not len(x):
            raise DataError("no inputs: at least one sample is needed")
        with frozen_eval(model):
            paid = clean_logits is not None
            if clean_logits is None:
                with torch.no_grad():
                    parts = [
                        x[start : start + batch_size].to(device, copy=True) for start in range(0, len(x), batch_size)
                    ]
                    clean_logits = torch.cat([check_logits(model(part), len(part)) for part in parts])
            clean_logits = check_logits(clean_logits.to(device), len(x))
            check_labels(y, clean_logits.shape[1], len(x))
            refuse_probabilities(clean_logits)
            result = self._all(model, x, y, keys, seed, clean_logits, batch_size)
        if not paid:
            result.forwards.add_(1)
        return result

    @property
    def members(self) -> tuple[str, ...]:
        """The names that `AttackResult.broken_by` counts: one for a single attack."""
        return (self.name,)

    def _all(
        self, model: nn.Module, x: Tensor, y: Tensor, keys: Tensor, seed: int, clean_logits: Tensor, batch_size: int
    ) -> AttackResult:
        """Attack all samples, batch by batch; an ensemble goes through its members instead."""
        device = clean_logits.device
        results = []
        for start in range(0, len(x), batch_size):
            rows = slice(start, start + batch_size)
            random = SampleRandom(seed, keys[rows], self.name)
            results.append(self._batch(model, x[rows].to(device), y[rows].to(device), random, clean_logits[rows]))
        return AttackResult(**{f.name: torch.cat([getattr(r, f.name) for r in results]) for f in fields(AttackResult)})

    def _batch(
        self, model: nn.Module, x: Tensor, y: Tensor, random: SampleRandom, clean_logits: Tensor
    ) -> AttackResult:
        threat = self.threat()
        search = Search(model, x, y, threat, random, self.stop, clean_logits)
        if self.eps > 0 and not search.done:
            self._run(search)
        ball, box = threat.excess(search.best, x)
        if not (ball <= TOLERANCE and box <= 0.0):  # also catches NaN
            raise ThreatModelError(
                f"{self.name}: returned inputs leave the threat model {threat} by {ball:.2g} (ball) or {box:.2g} (box). "
                f"An attack must submit projected candidates only: threat.project(candidates, x)."
            )
        norms = flat_norm(search.best - x, self.norm)
        by = torch.where(search.broken & ~search.wrong_clean, 0, -1).to(torch.int16)
        return AttackResult(
            search.best, search.best_logits, search.broken, norms, search.forwards, search.backwards, by
        )

    @abstractmethod
    def _run(self, search: Search) -> None:
        """Search for adversarial inputs: submit candidates, stop when `search.done`."""


def build_attack(name: str, **parameters: Any) -> Attack:
    """An attack by its registered name, such as `pgd` or `torchattacks:CW`.

    Raises:
        ConfigError: an unknown name or parameter; the message names the closest known one.
    """
    family, _, variant = name.partition(":")
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
