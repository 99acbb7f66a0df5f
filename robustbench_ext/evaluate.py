"""One cell of a run: one model under one condition on one chunk of samples, with all probes.

A `Context` is everything that a process needs to compute cells of a run: it loads data and models by name, so that
only names travel between processes, and it knows the key of every record.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from robustbench_ext import fingerprint
from robustbench_ext.conditions import Condition, Inputs, UnderAttack, is_available, labels_tensor, parse_conditions
from robustbench_ext.data import Split, load_dataset
from robustbench_ext.errors import ConfigError, DataError, unknown_name
from robustbench_ext.models import LoadedModel, Observations, Taps, load_model, observe
from robustbench_ext.preflight import PREFLIGHT_VERSION, Check, preflight
from robustbench_ext.probes import Probe, no_gradient, parse_probes, scorer
from robustbench_ext.records import RecordStore
from robustbench_ext.suite import ModelEntry, Suite
from robustbench_ext.validation import SPLIT as VALIDATION
from robustbench_ext.validation import ValidationData

RECORD_VERSION = 1
PREVIEWS = 8  # inputs kept as small images for the report's gallery
CLEAN = "clean"


@dataclass(frozen=True)
class Cell:
    """A unit of work: model, condition label, split, chunk number."""

    model: str
    condition: str
    split: str
    chunk: int

    def __str__(self) -> str:
        where = "" if self.split == "test" else f" [{self.split}]"
        part = f" part {self.chunk + 1}" if self.chunk else ""
        return f"{self.model} · {self.condition}{where}{part}"


class Context:
    """A suite resolved against a run folder."""

    def __init__(self, suite: Suite, folder: Path) -> None:
        self.suite = suite
        self.folder = folder
        self.data = load_dataset(suite.data)
        available = [entry for entry in suite.conditions if is_available(entry)]
        self.left_out = [
            str(e.get("attack") or e.get("outliers"))
            for e in suite.conditions
            if e not in available and isinstance(e, dict)
        ]
        self.conditions = {c.label: c for c in parse_conditions(available)}
        self.probes = parse_probes(suite.detectors, suite.uq)
        self.taps = tuple(sorted({tap for probe in self.probes for tap in probe.taps()}))
        self.store = RecordStore(folder / "records")
        self._models: dict[str, LoadedModel] = {}
        self._readers: dict[str, Taps] = {}
        self._fitted: dict[tuple[str, str], Any] = {}
        self._splits: dict[tuple[str, str], Split] = {}
        self._validations: dict[str, ValidationData] = {}

    # Models ----------------------------------------------------------------------------------------------------------

    def entry(self, name: str) -> ModelEntry:
        """The suite's entry of that model."""
        return next(entry for entry in self.suite.models if entry.name == name)

    @cached_property
    def training(self) -> dict[str, tuple[Any, ...]]:
        """Defense, architecture, recipe, seed and folder of every model that the run trains itself."""
        from defenses.recipes import plan
        from defenses.trainer import Architecture, training_key

        out: dict[str, tuple[Any, ...]] = {}
        for entry in self.suite.models:
            if entry.train is None:
                continue
            told = entry.train
            try:
                made = plan(told.defense_name(), told.recipe, told.defense_options(), told.network, told.kwargs)
            except ConfigError as error:
                raise ConfigError(f"model '{entry.name}': {error}") from None
            architecture = Architecture(
                made.network,
                self.data.shape,
                len(self.data.classes),
                entry.mean,
                entry.std,
                dict(made.kwargs) or None,
            )
            key = training_key(made.defense, architecture, self.data, made.recipe, told.seed)
            out[entry.name] = (made.defense, architecture, made.recipe, told.seed, self.folder / "models" / key)
        return out

    def model(self, name: str) -> LoadedModel:
        """The model, loaded once per process."""
        if name not in self._models:
            entry = self.entry(name)
            if entry.train is not None:
                folder = self.training[name][-1]
                self._models[name] = load_model(str(folder))
            else:
                self._models[name] = load_model(
                    str(entry.spec),
                    shape=self.data.shape,
                    num_classes=len(self.data.classes),
                    mean=entry.mean,
                    std=entry.std,
                    weights=entry.weights,
                    kwargs=entry.kwargs,
                )
        return self._models[name]

    # Samples and keys ------------------------------------------------------------------------------------------------

    def samples(self, condition: Condition, split: str) -> Split:
        """The samples of a condition; `n` cuts the test split only."""
        key = (condition.label if condition.kind == "outliers" else CLEAN, split)
        if key not in self._splits:
            self._splits[key] = condition.samples(self.data, split, self.suite.n if split == "test" else None)
        return self._splits[key]

    def chunks(self, condition: Condition, split: str) -> int:
        """How many records the samples of a condition make."""
        return -(-len(self.samples(condition, split)) // self._chunk_size(condition, split))

    def rows(self, cell: Cell) -> slice:
        """The samples of a cell."""
        size = self._chunk_size(self.conditions[cell.condition], cell.split)
        return slice(cell.chunk * size, (cell.chunk + 1) * size)

    def _chunk_size(self, condition: Condition, split: str) -> int:
        return len(self.samples(condition, split)) if condition.whole else self.suite.chunk_size

    def clean_cells(self, cell: Cell) -> list[Cell]:
        """The cells of the same samples as they are: what an attack takes its clean logits from."""
        chunks = range(self.chunks(self.conditions[CLEAN], cell.split))
        whole = self.conditions[cell.condition].whole
        return [Cell(cell.model, CLEAN, cell.split, chunk) for chunk in (chunks if whole else [cell.chunk])]

    def observation_identity(self, cell: Cell) -> dict[str, Any]:
        """All that the observations of a cell depend on."""
        condition = self.conditions[cell.condition]
        samples = self.samples(condition, cell.split)
        # The whole split's fingerprint and the chunk's ids: a larger n reuses the chunks of a smaller one.
        source = samples if condition.kind == "outliers" else self.data[cell.split]
        against = {}
        if condition.against is not None:
            probe = self.probe(condition.against)
            against = {"against": self._fit_identity(cell.model, probe)}
        return {
            **against,
            "kind": "observations",
            "version": RECORD_VERSION,
            "model": self.model(cell.model).fingerprint,
            "taps": list(self.taps),
            "condition": condition.spec(),
            "samples": source.fingerprint(),
            "ids": fingerprint.hash_strings(samples.ids[self.rows(cell)].tolist()),
            "seed": self.suite.seed,
            "batch_size": self.suite.batch_size if condition.batch_dependent else None,
        }

    def observation_key(self, cell: Cell) -> str:
        """The key of a cell's observations."""
        return fingerprint.key_of(self.observation_identity(cell))

    def fit_cells(self, model: str, split: str) -> list[Cell]:
        """The cells whose observations probes are fitted on."""
        return [Cell(model, CLEAN, split, c) for c in range(self.chunks(self.conditions[CLEAN], split))]

    def probe_identity(self, cell: Cell, probe: Probe) -> dict[str, Any]:
        """All that a probe's outputs in a cell depend on."""
        return {
            "kind": "probe",
            "version": RECORD_VERSION,
            "observations": self.observation_key(cell),
            **self._fit_identity(cell.model, probe),
        }

    def _fit_identity(self, model: str, probe: Probe) -> dict[str, Any]:
        """A probe with all that it is fitted on."""
        fitted = [self.observation_key(c) for c in self.fit_cells(model, probe.fit_on)]
        found: dict[str, Any] = {"probe": probe.spec(), "fitted on": fitted}
        if probe.validate is not None:
            chosen = self.validation(probe).identity(self.suite.seed, self.suite.batch_size)
            found["chosen on"] = {"model": self.model(model).fingerprint, **chosen}
        return found

    def validation(self, probe: Probe) -> ValidationData:
        """What a probe with `validate` chooses its parameters on."""
        if probe.label not in self._validations:
            found = ValidationData(probe.validate or {}, self.data, self.conditions.values())
            self._validations[probe.label] = found
        return self._validations[probe.label]

    def probe_key(self, cell: Cell, probe: Probe) -> str:
        """The key of a probe's outputs in a cell."""
        return fingerprint.key_of(self.probe_identity(cell, probe))

    def probe(self, label: str) -> Probe:
        """The probe of that label."""
        return next(probe for probe in self.probes if probe.label == label)

    def cells(self, model: str) -> list[Cell]:
        """All cells of a model: those that probes are fitted on, clean, then the other conditions."""
        splits = {p.fit_on for p in self.probes}
        if self.thresholds:
            splits.add(VALIDATION)
        fits = [c for s in sorted(splits, reverse=True) for c in self.fit_cells(model, s)]  # train before calibration
        tests = [
            Cell(model, label, "test", chunk)
            for label, condition in self.conditions.items()
            for chunk in range(self.chunks(condition, "test"))
        ]
        return fits + tests

    @property
    def thresholds(self) -> bool:
        """Whether detectors are also read on clean calibration samples, which alarm thresholds are set on."""
        return VALIDATION in self.data.splits and any(p.kind == "detector" for p in self.probes)

    def read_in(self, cell: Cell) -> list[Probe]:
        """The probes that are read in a cell: all on test samples, detectors on calibration samples too."""
        if cell.split == "test":
            return self.probes
        return [p for p in self.probes if p.kind == "detector"] if cell.split == VALIDATION else []

    def is_done(self, cell: Cell) -> bool:
        """Whether all records of a cell are there."""
        keys = [self.observation_key(cell), *(self.probe_key(cell, probe) for probe in self.read_in(cell))]
        return all(self.store.has(key) for key in keys)

    # Work ------------------------------------------------------------------------------------------------------------

    def compute(self, cell: Cell) -> dict[str, Any]:
        """Compute what is missing of a cell; returns what a progress line says."""
        started = time.perf_counter()
        key = self.observation_key(cell)
        made: Inputs | None = None
        if not self.store.has(key):
            made = self._inputs(cell)
            columns = self._observe(cell, made)
            meta = {"what": str(cell), "identity": self.observation_identity(cell)}
            self.store.save(key, columns, {**meta, "seconds": round(time.perf_counter() - started, 3)})
        columns = self.store.load(key)
        for probe in self.read_in(cell):
            probe_key = self.probe_key(cell, probe)
            if not self.store.has(probe_key):
                begun = time.perf_counter()
                x = None
                if probe.reads_inputs:
                    # Inputs are not stored. They are deterministic, so making them again gives the same ones.
                    made = made or self._inputs(cell)
                    x = made.x
                model = self.model(cell.model).module
                read = probe.read(self._fit(cell.model, probe), _observations(columns), model, x)
                meta = {"what": f"{cell} · {probe.label}", "identity": self.probe_identity(cell, probe)}
                self.store.save(probe_key, read, {**meta, "seconds": round(time.perf_counter() - begun, 3)})
        return {"correct": _correct(columns), "n": len(columns["label"]), "seconds": time.perf_counter() - started}

    def _inputs(self, cell: Cell) -> Inputs:
        """What the condition makes of the cell's samples."""
        condition = self.conditions[cell.condition]
        samples, rows = self.samples(condition, cell.split), self.rows(cell)
        x, y, ids = samples.images(rows), labels_tensor(samples, rows), samples.ids[rows]
        clean = None
        if condition.kind == "attack":
            clean = torch.cat([torch.from_numpy(self._needed(c)["logits"]) for c in self.clean_cells(cell)])
        if condition.against is not None and isinstance(condition, UnderAttack):
            condition = condition.bind(scorer(self._fit(cell.model, self.probe(condition.against))))
        return condition.apply(self.model(cell.model).module, x, y, ids, self.suite.seed, clean, self.suite.batch_size)

    def _observe(self, cell: Cell, made: Inputs) -> dict[str, np.ndarray]:
        condition = self.conditions[cell.condition]
        samples, rows = self.samples(condition, cell.split), self.rows(cell)
        y, ids = labels_tensor(samples, rows), samples.ids[rows]
        model = self.model(cell.model).module
        if cell.model not in self._readers:
            self._readers[cell.model] = Taps(model, self.taps)
        seen = observe(model, made.x, y, self._readers[cell.model], self.suite.batch_size)
        if condition.kind == CLEAN and int(y.max()) >= seen.logits.shape[1]:
            raise DataError(
                f"labels reach {int(y.max())}, but model '{cell.model}' has {seen.logits.shape[1]} outputs. "
                f"Use data and a model with the same classes."
            )
        columns = {"id": ids, "label": y.numpy(), "logits": seen.logits.numpy(), **made.columns}
        columns |= {f"features/{name}": value.numpy() for name, value in seen.features.items()}
        if cell.chunk == 0 and cell.split == "test":
            columns["preview"] = (made.x[:PREVIEWS].clamp(0, 1) * 255).round().to(torch.uint8).numpy()
        return columns

    def _fit(self, model: str, probe: Probe) -> Any:
        if (model, probe.label) not in self._fitted:
            parts = [_observations(self._needed(c)) for c in self.fit_cells(model, probe.fit_on)]
            seen = Observations(
                torch.cat([p.logits for p in parts]),
                torch.cat([p.labels for p in parts]),
                {name: torch.cat([p.features[name] for p in parts]) for name in parts[0].features},
            )
            module, validation = self.model(model).module, None
            if probe.validate is not None:
                validation = self.validation(probe).make(module, self.suite.seed, self.suite.batch_size)
            self._fitted[model, probe.label] = probe.fit(seen, module, validation)
        return self._fitted[model, probe.label]

    def _needed(self, cell: Cell) -> dict[str, np.ndarray]:
        if not self.store.has(self.observation_key(cell)):
            self.compute(cell)
        return self.store.load(self.observation_key(cell))

    def fitted_summaries(self, model: str) -> dict[str, dict[str, float]]:
        """Numbers that fitted probes report of themselves, such as the temperature."""
        out = {}
        for probe in self.probes:
            if summary := self._fit(model, probe).summary():
                out[probe.label] = summary
        return out

    def fit_warnings(self, model: str) -> list[str]:
        """What readers should know of the fitted probes."""
        return [f"{model}, {p.label}: {text}" for p in self.probes for text in self._fit(model, p).warnings()]

    # Preflight -------------------------------------------------------------------------------------------------------

    def preflight_key(self, model: str) -> str:
        """The key of a model's preflight."""
        return fingerprint.key_of(
            {
                "kind": "preflight",
                "version": PREFLIGHT_VERSION,
                "model": self.model(model).fingerprint,
                "samples": self.data["test"].fingerprint(),
                "seed": self.suite.seed,
            }
        )

    def preflight(self, model: str) -> list[Check]:
        """A model's checks, made once."""
        key = self.preflight_key(model)
        if not self.store.has(key):
            checks = preflight(self.model(model).module, self.data["test"], seed=self.suite.seed)
            self.store.save(key, {}, {"what": f"{model} · preflight", "checks": [vars(c) for c in checks]})
        return [Check(**check) for check in self.store.meta(key)["checks"]]

    def validate(self) -> None:
        """Find out now what would fail later: splits that probes need, defenses and recipes that do not exist."""
        for probe in self.probes:
            if probe.fit_on not in self.data.splits:
                raise ConfigError(
                    f"{probe.kind} '{probe.label}' is fitted on the {probe.fit_on} split, which {self.suite.data} lacks. "
                    f"Add such a split to the data, or leave the {probe.kind} out."
                )
            if probe.validate is not None:
                if VALIDATION not in self.data.splits:
                    raise ConfigError(
                        f"{probe.kind} '{probe.label}' chooses its parameters on the {VALIDATION} split, which "
                        f"{self.suite.data} lacks. Add such a split to the data, or leave out validate."
                    )
                self.validation(probe)
        for condition in self.conditions.values():
            labels = [probe.label for probe in self.probes]
            if condition.against is not None and condition.against not in labels:
                raise ConfigError(
                    f"condition '{condition.label}': {unknown_name('detector or estimator', condition.against, labels)} "
                    f"An adaptive attack needs it among the suite's detectors or uq."
                )
            if condition.against is not None and not getattr(
                self.probe(condition.against).fresh(), "differentiable", True
            ):
                raise ConfigError(f"condition '{condition.label}': {no_gradient(condition.against)}")
        if self.training and "train" not in self.data.splits:
            raise ConfigError(f"{self.suite.data} has no train split, but the suite trains {', '.join(self.training)}")


def _observations(columns: dict[str, np.ndarray]) -> Observations:
    features = {n.partition("/")[2]: torch.from_numpy(v) for n, v in columns.items() if n.startswith("features/")}
    return Observations(torch.from_numpy(columns["logits"]), torch.from_numpy(columns["label"]), features)


def _correct(columns: dict[str, np.ndarray]) -> int | None:
    """Correct samples of a record: by the attack's verdict where there was one; None for outliers."""
    if "broken" in columns:
        return int((~columns["broken"]).sum())
    if (columns["label"] < 0).any():
        return None
    return int((columns["logits"].argmax(1) == columns["label"]).sum())
