"""index.json: which records of a run folder hold what, so that results can be compared without loading any model or data.

Records lie under content keys, which only a `Context` with the models at hand can tell. The index writes down the keys of a
finished run, and beside them the exact specification of everything that was measured: two runs whose specifications are equal
measured the same thing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from robustbench_ext import fingerprint
from robustbench_ext.errors import ConfigError
from robustbench_ext.evaluate import Cell, Context
from robustbench_ext.measured import Columns, Recent, Table
from robustbench_ext.records import RecordStore

INDEX = "index.json"


class Recorded(Protocol):
    """Joined records by name, wherever they come from."""

    def observations(self, model: str, condition: str) -> Columns:
        """What a model made of a condition's inputs."""

    def probe(self, model: str, condition: str, label: str) -> Columns:
        """What a probe read there."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class IndexedCondition(_Part):
    """What a condition is, exactly, and which samples it showed: a hash of all their ids in order, and of their content."""

    spec: dict[str, Any]
    ids: str
    samples: str


class IndexedModel(_Part):
    """Keys of records: by condition, and for probes by label and condition. What is not complete is not there."""

    fingerprint: str
    observations: dict[str, list[str]]
    probes: dict[str, dict[str, list[str]]]


class Index(_Part):
    """index.json."""

    version: Literal[1] = 1
    seed: int
    conditions: dict[str, IndexedCondition]
    probes: dict[str, dict[str, Any]]
    models: dict[str, IndexedModel]

    @classmethod
    def read(cls, folder: Path) -> Index:
        """The index of a run folder.

        Raises:
            ConfigError: it is not there or cannot be read.
        """
        file = folder / INDEX
        if not file.is_file():
            raise ConfigError(
                f"{folder}: there is no {INDEX}; expected a run folder with its records. Run the suite again into it: what "
                f"is there is reused."
            )
        try:
            return cls.model_validate_json(file.read_text(encoding="utf-8"))
        except ValidationError as error:
            raise ConfigError(f"{file}: not an index that this version can read: {error.errors()[0]['msg']}") from None
        except UnicodeDecodeError as error:
            raise ConfigError(f"{file}: damaged: {error}") from None


def index_of(context: Context, models: list[str]) -> Index:
    """The index of a run's complete records."""
    conditions = {}
    for label, condition in context.conditions.items():
        samples = context.samples(condition, "test")
        conditions[label] = IndexedCondition(
            spec=condition.spec(),
            ids=fingerprint.hash_strings(fingerprint.each_string(samples.ids)),
            samples=samples.fingerprint(),
        )
    return Index(
        seed=context.suite.seed,
        conditions=conditions,
        probes={probe.label: probe.spec() for probe in context.probes},
        models={name: _model(context, name) for name in models},
    )


def _model(context: Context, name: str) -> IndexedModel:
    found = IndexedModel(fingerprint=context.model(name).fingerprint, observations={}, probes={})
    for label, condition in context.conditions_of(name).items():
        cells = [Cell(name, label, "test", chunk) for chunk in range(context.chunks(condition, "test"))]
        if not all(context.is_done(cell) for cell in cells):
            continue
        found.observations[label] = [context.observation_key(cell) for cell in cells]
        for probe in context.probes_read(name):
            found.probes.setdefault(probe.label, {})[label] = [context.probe_key(cell, probe) for cell in cells]
    return found


class Stored:
    """The joined records of a finished run, read through its index."""

    def __init__(self, folder: Path) -> None:
        self.index, self._folder = Index.read(folder), folder
        self._store = RecordStore(folder / "records")
        self._ids: dict[str, np.ndarray] = {}
        self.observations = Recent(self._observations)
        self.probe = Recent(self._probe)

    def _observations(self, model: str, condition: str) -> Table:
        keys = self._model(model).observations.get(condition)
        return self._joined(keys, f"{model} under {condition}", lambda: self._named(keys or []))

    def _probe(self, model: str, condition: str, label: str) -> Table:
        keys = self._model(model).probes.get(label, {}).get(condition)
        return self._joined(keys, f"{label} of {model} under {condition}")

    def _model(self, model: str) -> IndexedModel:
        if model not in self.index.models:
            raise ConfigError(
                f"{self._folder / INDEX} does not know model '{model}'. Run the suite again into this folder."
            )
        return self.index.models[model]

    def _named(self, keys: list[str]) -> np.ndarray:
        """The ids that records hold, whatever the index says of them: one array for all that hold the same ones."""
        found = np.concatenate([self._store.load(key)["id"] for key in keys])
        return self._ids.setdefault(hashlib.sha256(found.tobytes()).hexdigest(), found)

    def _joined(self, keys: list[str] | None, what: str, ids: Callable[[], np.ndarray] | None = None) -> Table:
        if not keys:
            raise ConfigError(f"{self._folder / INDEX} has no records of {what}. Run the suite again into this folder.")
        return Table(keys, self._store.load, ids)
