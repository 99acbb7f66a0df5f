"""Difficulty scores of a suite as work like any other: what its scorers make of the clean test samples, in records with keys.

A record holds what one scorer says of one chunk of samples, with their ids: `logits` (n, K) after one epoch, for EL2N and
margins; `right` (n, T) after each of T epochs, for forgetting; `vog` (n,) over T epochs. What needs all samples or all scorers,
such as VoG's normalisation by class, is computed from the records (`Scoring.scores`).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from robustbench_ext import device, difficulty, fingerprint
from robustbench_ext.data.base import REGRESSION
from robustbench_ext.errors import ConfigError, RobustBenchExtError
from robustbench_ext.memory import BatchSizes
from robustbench_ext.models import checkpoints, observe
from robustbench_ext.suite import OVER_EPOCHS, Difficulty

if TYPE_CHECKING:
    from robustbench_ext.evaluate import Context

VERSION = 1  # part of every key: raise it when scores change
CLEAN = "clean"
Columns = dict[str, np.ndarray]


@dataclass(frozen=True)
class Scorer:
    """A model that difficulty is asked of.

    Attributes:
        name: in the suite.
        epochs: after which it is asked; empty for the weights as they are published.
        identity: all that its answers depend on, besides the samples.
        another: epochs whose weights are another training's than the model's own (`models.checkpoints.kept`).
    """

    name: str
    epochs: tuple[int, ...]
    identity: dict[str, Any]
    another: tuple[int, ...] = ()


class Scoring:
    """The suite's `difficulty`, resolved against a run."""

    def __init__(self, context: Context, asked: Difficulty) -> None:
        self._context, self.asked = context, asked
        self._scorers: dict[str, Scorer] = {}
        self._sizes = BatchSizes(context.folder, context.suite.batch_size)

    def validate(self) -> None:
        """Find out now what would fail later.

        Raises:
            ConfigError: the data is for regression, has fewer test samples than slices, or a training has fewer epochs.
        """
        data, n = self._context.data, len(self._samples)
        if data.task == REGRESSION:
            raise ConfigError(f"difficulty: {data.name} is a regression task; these scores are of classifiers")
        if n < self.asked.bins:
            raise ConfigError(
                f"difficulty: {n} test samples for {self.asked.bins} slices; give a larger n or smaller bins"
            )

    @cached_property
    def _samples(self) -> Any:
        return self._context.samples(self._context.conditions[CLEAN], "test")

    @property
    def chunks(self) -> int:
        """Records per scorer."""
        return self._context.chunks(self._context.conditions[CLEAN], "test")

    def _rows(self, chunk: int) -> slice:
        size = self._context.suite.chunk_size
        return slice(chunk * size, (chunk + 1) * size)

    # Scorers and keys ------------------------------------------------------------------------------------------------

    def scorer(self, name: str) -> Scorer:
        """A scorer whose model is there.

        Raises:
            ConfigError: its training did not come to the epoch that is asked for, or kept fewer than two.
        """
        if name not in self._scorers:
            self._scorers[name] = self._resolved(name)
        return self._scorers[name]

    def _resolved(self, name: str) -> Scorer:
        identity: dict[str, Any] = {"model": self._context.model(name).fingerprint}
        if not self.asked.wanted and self.asked.score not in OVER_EPOCHS:
            return Scorer(name, (), identity)
        folder, training = self._folder(name), self._context.training[name]
        kept = checkpoints.kept(folder)
        named = training.keep if self.asked.wanted in ("all", ()) else self.asked.wanted
        epochs = tuple(sorted(e for e in named if e in kept))
        if len(epochs) < (2 if self.asked.score in OVER_EPOCHS else 1):
            raise ConfigError(
                f"difficulty: the training of '{name}' ended after epoch {checkpoints.epochs_of(folder)}, and of the epochs "
                f"{', '.join(map(str, named))} it has {', '.join(map(str, epochs)) or 'none'}. Name earlier ones."
            )
        identity["epochs"] = {str(e): kept[e]["sha256"] for e in epochs}
        return Scorer(name, epochs, identity, tuple(e for e in epochs if kept[e].get("another")))

    def _folder(self, name: str) -> Path:
        return self._context.training[name].folder

    def key(self, name: str, chunk: int) -> str:
        """The key of a scorer's record."""
        return fingerprint.key_of(self._identity(name, chunk))

    def _identity(self, name: str, chunk: int) -> dict[str, Any]:
        return {
            "kind": "difficulty",
            "version": VERSION,
            "columns": _COLUMNS[self.asked.score],
            "scorer": self.scorer(name).identity,
            "samples": self._context.data["test"].fingerprint(),
            "ids": fingerprint.hash_strings(self._samples.ids[self._rows(chunk)].tolist()),
        }

    def is_done(self, name: str, chunk: int) -> bool:
        """Whether the record is there."""
        return self._context.store.has(self.key(name, chunk))

    # Work ------------------------------------------------------------------------------------------------------------

    def compute(self, name: str, chunk: int) -> dict[str, Any]:
        """Compute a record, if it is not there; returns what a progress line says."""
        started = time.perf_counter()
        n, reused, halved = len(self._samples.ids[self._rows(chunk)]), self.is_done(name, chunk), None
        if not reused:
            who = f"{self._context.model(name).fingerprint}, difficulty, on {device.name(device.current())}"
            with device.settled():
                columns, halved = self._sizes.fitting(who, lambda size: self._columns(name, chunk, size))
            meta = {"what": f"{name} · {self.asked.score} part {chunk + 1}", "identity": self._identity(name, chunk)}
            seconds = round(time.perf_counter() - started, 3)
            self._context.store.save(self.key(name, chunk), columns, {**meta, "seconds": seconds})
        facts = {"n": n, "seconds": time.perf_counter() - started}
        return {**facts, **({"reused": True} if reused else {}), **({"halved": halved} if halved else {})}

    def _columns(self, name: str, chunk: int, batch_size: int) -> Columns:
        here = self._rows(chunk)
        x, y, ids = self._samples.images(here), torch.from_numpy(self._samples.labels[here]), self._samples.ids[here]
        return {"id": ids, "label": y.numpy(), **_READ[self.asked.score](self._networks(name), x, y, batch_size)}

    def _networks(self, name: str) -> list[nn.Module]:
        epochs = self.scorer(name).epochs
        if not epochs:
            return [self._context.placed(name)]
        loaded = [checkpoints.load_checkpoint(self._folder(name), epoch).module for epoch in epochs]
        return [network.to(device.current()) for network in loaded]

    # Scores ----------------------------------------------------------------------------------------------------------

    @property
    def is_complete(self) -> bool:
        """Whether every record is there."""
        try:
            return all(self.is_done(name, chunk) for name in self.asked.models for chunk in range(self.chunks))
        except (RobustBenchExtError, OSError):  # a scorer could not be trained or loaded: the run says so
            return False

    def scores(self) -> difficulty.Scored:
        """The scores of all test samples: means over the scorers."""
        found: list[Columns] = []
        for name in self.asked.models:
            parts = [self._context.store.load(self.key(name, chunk)) for chunk in range(self.chunks)]
            found.append({column: np.concatenate([part[column] for part in parts]) for column in parts[0]})
        return difficulty.Scored(found[0]["id"], found[0]["label"], _values(self.asked.score, found))


def _logits(networks: list[nn.Module], x: Tensor, y: Tensor, batch_size: int) -> Columns:
    return {"logits": observe(networks[0], x, y, (), batch_size).logits.numpy()}


def _right(networks: list[nn.Module], x: Tensor, y: Tensor, batch_size: int) -> Columns:
    seen = [observe(network, x, y, (), batch_size).logits.argmax(dim=1) == y for network in networks]
    return {"right": torch.stack(seen, dim=1).numpy()}


def _vog(networks: list[nn.Module], x: Tensor, y: Tensor, batch_size: int) -> Columns:
    from detectors.vog import vog

    return {"vog": vog(networks, x, y, batch_size).numpy()}


_READ = {"el2n": _logits, "margin": _logits, "forgetting": _right, "vog": _vog}
_COLUMNS = {"el2n": "logits", "margin": "logits", "forgetting": "right", "vog": "vog"}


def _values(score: str, found: list[Columns]) -> np.ndarray:
    labels = found[0]["label"]
    if score == "el2n":
        return difficulty.el2n([f["logits"] for f in found], labels)
    if score == "margin":
        return difficulty.margin_error([f["logits"] for f in found], labels)
    if score == "forgetting":
        return np.asarray(np.mean([difficulty.forgetting(f["right"].T) for f in found], axis=0))
    from detectors.vog import class_normalised

    return np.asarray(np.mean([class_normalised(f["vog"], labels) for f in found], axis=0))
