"""index.json: which records of a run folder hold what, so that results can be compared without loading any model or data.

Records lie under content keys, which only a `Context` with the models at hand can tell. The index writes down the keys of a
finished run, and beside them the exact specification of everything that was measured: two runs whose specifications are equal
measured the same thing.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable
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

    def own(self, model: str, condition: str, metric: str) -> np.ndarray | None:
        """What a metric of the user's own gave for each sample, float64 or bool (n,); None where it could not."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class IndexedCondition(_Part):
    """What a condition is, exactly, and which samples it showed: a hash of all their ids in order, and of their content."""

    spec: dict[str, Any]
    ids: str
    samples: str


class IndexedModel(_Part):
    """Keys of records: by condition, and for probes by label and condition. What is not complete is not there.

    `metrics` are those of the user's own, by name and condition: what they gave, so that comparing runs runs no code of theirs.
    """

    fingerprint: str
    observations: dict[str, list[str]]
    probes: dict[str, dict[str, list[str]]]
    metrics: dict[str, dict[str, str]] = {}


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
        for metric in context.metrics:
            if context.store.has(key := context.metric_key(name, label, metric)):
                found.metrics.setdefault(metric.name, {})[label] = key
    return found


def _finite(value: Any) -> Any:
    """A JSON-like value with null for what the index cannot hold: an infinite budget."""
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


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

    def own(self, model: str, condition: str, metric: str) -> np.ndarray | None:
        """See `Recorded`."""
        key = self._model(model).metrics.get(metric, {}).get(condition)
        return None if key is None else self._store.load(key, ["value"])["value"]

    def _model(self, model: str) -> IndexedModel:
        if model not in self.index.models:
            raise ConfigError(
                f"{self._folder / INDEX} does not know model '{model}'. Run the suite again into this folder."
            )
        return self.index.models[model]

    def check(self, model: str, conditions: Iterable[str], probes: Iterable[str] = ()) -> None:
        """Whether the records that the index names are there, whole, and of what it says.

        Raises:
            ConfigError: which are not, and what to run.
        """
        indexed, wrong = self._model(model), dict[str, str]()
        for label in sorted(set(conditions) & set(indexed.observations)):
            said = {"model": indexed.fingerprint, "condition": self.index.conditions[label].spec}
            for key in indexed.observations[label]:
                if (text := self._wrong(key, said)) is not None:
                    wrong.setdefault(f"{model} under {label}", text)
            for probe in sorted(set(probes) & set(indexed.probes)):
                if any(self._wrong(key, {}) is not None for key in indexed.probes[probe].get(label, [])):
                    wrong.setdefault(f"{probe} of {model} under {label}", "missing or damaged")
        if wrong:
            named = "; ".join(f"{what}: {text}" for what, text in list(wrong.items())[:3])
            more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise ConfigError(
                f"{self._folder}: {INDEX} names records that do not fit: {named}{more}. Run the suite again into this folder "
                f"(rbx run SUITE --out {self._folder}): it computes what is missing, and nothing else."
            )

    def _wrong(self, key: str, said: dict[str, Any]) -> str | None:
        """What is wrong with a record; None where nothing is."""
        if not self._store.has(key):
            return "missing or damaged"
        identity = self._store.meta(key).get("identity") or {}
        differing = [n for n, value in said.items() if n in identity and _finite(identity[n]) != _finite(value)]
        return f"of another {differing[0]}" if differing else None

    def _named(self, keys: list[str]) -> np.ndarray:
        """The ids that records hold, whatever the index says of them: one array for all that hold the same ones."""
        found = np.concatenate([self._store.load(key, ["id"])["id"] for key in keys])
        return self._ids.setdefault(hashlib.sha256(found.tobytes()).hexdigest(), found)

    def _joined(self, keys: list[str] | None, what: str, ids: Callable[[], np.ndarray] | None = None) -> Table:
        if not keys:
            raise ConfigError(f"{self._folder / INDEX} has no records of {what}. Run the suite again into this folder.")
        return Table(keys, self._store.load, ids)
