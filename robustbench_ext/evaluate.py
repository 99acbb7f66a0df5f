"""One cell of a run: one model under one condition on one chunk of samples, with all probes.

A `Context` is everything that a process needs to compute cells of a run: it loads data and models by name, so that
only names travel between processes, and it knows the key of every record.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from robustbench_ext import __version__, device, fingerprint, landscape_cards, reach
from robustbench_ext.catalog import ATTACKS
from robustbench_ext.checks import Check
from robustbench_ext.classification import Classification
from robustbench_ext.conditions import Condition, Inputs, UnderAttack, is_available
from robustbench_ext.data import Dataset, Split, load_dataset
from robustbench_ext.data.base import REGRESSION
from robustbench_ext.errors import ConfigError, ModelError, RobustBenchExtError, unknown_name
from robustbench_ext.memory import BatchSizes, fitting
from robustbench_ext.models import LoadedModel, checkpoints
from robustbench_ext.probes import Fitting, Probe, Shown, has_gradient, no_gradient, parse_probes, scorer
from robustbench_ext.records import RecordStore
from robustbench_ext.regression import Regression
from robustbench_ext.scoring import Scoring
from robustbench_ext.suite import ModelEntry, Suite
from robustbench_ext.task import Columns, Task, Training
from robustbench_ext.validation import SPLIT as VALIDATION
from robustbench_ext.validation import ValidationData

if TYPE_CHECKING:
    from robustbench_ext.own_metrics import OwnMetric

RECORD_VERSION = 1
PREVIEWS = 8  # inputs kept as small images for the report's gallery
CLEAN = "clean"
GIVEN = "given"  # in a suite: what the caller of `run_suite` hands over


@dataclass(frozen=True)
class Given:
    """What a caller hands over in Python instead of naming it: models by name, data. It stays in this process."""

    models: Mapping[str, nn.Module] = field(default_factory=dict)
    data: Dataset | None = None


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


def task_of(data: Dataset) -> Task:
    """What the engine leaves to the task that the data decides."""
    return Regression(data) if data.task == REGRESSION else Classification(data)


def _at_precision(entries: list[Any], precision: str, data: Dataset) -> list[Any]:
    """The entries of conditions, with the suite's precision for attacks that follow gradients and name none themselves."""
    if precision == "float32":
        return entries
    if data.task == REGRESSION:
        raise ConfigError(f"precision: {precision} is for attacks on classifiers; leave it out for {data.name}")

    def follows(entry: Any) -> bool:
        if not isinstance(entry, Mapping) or "attack" not in entry or "precision" in entry:
            return False
        return bool(ATTACKS.load(ATTACKS.split(str(entry["attack"]))[0]).access == "white")

    return [{**entry, "precision": precision} if follows(entry) else entry for entry in entries]


class Context:
    """A suite resolved against a run folder."""

    def __init__(self, suite: Suite, folder: Path, given: Given | None = None) -> None:
        self.suite = suite
        self.folder = folder
        self.given = given or Given()
        self.data = load_dataset(suite.data) if suite.data != GIVEN else self._given_data()
        self.task = task_of(self.data)
        available = [entry for entry in suite.conditions if is_available(entry)]
        self.left_out = [
            str(e.get("attack") or e.get("outliers"))
            for e in suite.conditions
            if e not in available and isinstance(e, dict)
        ]
        self.conditions = {
            c.label: c for c in self.task.conditions(_at_precision(available, suite.precision, self.data))
        }
        self.probes = parse_probes(suite.detectors, suite.uq, self.task.estimator)
        self.metrics = self.task.metrics(suite.metrics)
        self.scoring = None if suite.difficulty is None else Scoring(self, suite.difficulty)
        self.store = RecordStore(folder / "records")
        self._sizes = BatchSizes(folder, suite.batch_size)
        self._models: dict[str, LoadedModel] = {}
        self._lacks: dict[str, frozenset[str]] = {}
        self._others: dict[str, LoadedModel] = {}  # members of probes that are no models of the suite
        self._readers: dict[str, Any] = {}
        self._fitted: dict[tuple[str, str], Any] = {}
        self._unfit_keys: dict[tuple[str, str], str] = {}
        self._keys: dict[Cell, str] = {}
        self._probe_keys: dict[tuple[Cell, str], str] = {}
        self._checkpoints: dict[str, dict[int, dict[str, Any]]] = {}
        self._splits: dict[tuple[str, str], Split] = {}
        self._validations: dict[str, ValidationData] = {}

    def _given_data(self) -> Dataset:
        if self.given.data is None:
            raise ConfigError(f"data: {GIVEN} stands for data that is handed over in Python: run_suite(..., data=...)")
        return self.given.data

    def probes_of(self, model: str) -> list[Probe]:
        """The probes that are read off a model."""
        return [p for p in self.probes if (not p.only or model in p.only) and not self.beyond(model, p)]

    def probes_read(self, model: str) -> list[Probe]:
        """Those of them that could be fitted, as far as is known: the others are failures of their own, not of the cells."""
        return [probe for probe in self.probes_of(model) if self.unfit(model, probe) is None]

    def unfit(self, model: str, probe: Probe) -> str | None:
        """Why a probe could not be fitted for a model; None where it could, or was not tried yet."""
        key = self._unfit_key(model, probe)
        return str(self.store.meta(key)["error"]) if self.store.has(key) else None

    def _unfit_key(self, model: str, probe: Probe) -> str:
        if (model, probe.label) not in self._unfit_keys:
            identity = {"kind": "unfit", "version": __version__, **self._fit_identity(model, probe)}
            self._unfit_keys[model, probe.label] = fingerprint.key_of(identity)
        return self._unfit_keys[model, probe.label]

    def try_again(self, model: str) -> None:
        """Forget which probes could not be fitted: a package may have been installed since."""
        for probe in self.probes_of(model):
            self.store.discard(self._unfit_key(model, probe))

    def conditions_for(self, model: str) -> dict[str, Condition]:
        """The conditions that the suite has for a model, by label."""
        return {k: c for k, c in self.conditions.items() if not c.only or model in c.only}

    def conditions_of(self, model: str) -> dict[str, Condition]:
        """Those of them that it meets: all, but for attacks that follow a gradient which the model has not."""
        return {k: c for k, c in self.conditions_for(model).items() if not self.beyond(model, c)}

    def beyond(self, model: str, part: Condition | Probe) -> bool:
        """Whether a condition or a probe needs something of a model that it has not, such as gradients."""
        return bool(self.lacks(model) and reach.why_not(part, self.lacks(model)))

    def lacks(self, model: str) -> frozenset[str]:
        """What a model of the suite has not; see `robustbench_ext.reach`. What the run trains or makes is not there yet."""
        if model not in self._lacks:
            planned = self.training.get(model)
            self._lacks[model] = frozenset() if planned is None else reach.lacks_by_design(planned.architecture)
            if self.data.task != REGRESSION and self.entry(model).spec is not None:
                with suppress(RobustBenchExtError):  # it cannot be loaded: the run says so, and goes on with the others
                    self._lacks[model] = reach.lacks(self.model(model).module)
        return self._lacks[model]

    def notes_of(self, model: str) -> list[str]:
        """What results say of a model that cannot be asked everything: what was left out for it, and what remains."""
        named = [p for p in self.probes if not p.only or model in p.only]
        text = reach.note(model, self.lacks(model), list(self.conditions_for(model).values()), named)
        return [text] if self.lacks(model) and text else []

    def taps(self, model: str) -> list[str]:
        """The features that the probes of a model read."""
        return sorted({tap for probe in self.probes_of(model) for tap in probe.taps()})

    # Models ----------------------------------------------------------------------------------------------------------

    def entry(self, name: str) -> ModelEntry:
        """The suite's entry of that model."""
        return next(entry for entry in self.suite.models if entry.name == name)

    @cached_property
    def training(self) -> dict[str, Training]:
        """Every model that the run trains, or makes of others."""
        found: dict[str, Training] = {}
        for entry in self.suite.models:
            if entry.spec is None:
                found[entry.name] = self.task.training(entry, self.folder / "models", found)
        return found

    def model(self, name: str) -> LoadedModel:
        """The model, loaded once per process."""
        if name not in self._models:
            trained, entry = self.training.get(name), self.entry(name)
            if trained is not None:
                self._models[name] = self.task.load_other(str(trained.folder))
            elif entry.spec != GIVEN:
                self._models[name] = self.task.load(entry)
            elif name in self.given.models:
                self._models[name] = self.task.adopt(self.given.models[name], entry)
            else:
                raise ConfigError(
                    f"model '{name}': {GIVEN} stands for a model that is handed over in Python: run_suite(..., models={{...}})"
                )
        return self._models[name]

    def placed(self, name: str) -> nn.Module:
        """The model on the device of this process, to work with; one that was handed over stays where it is.

        Only those who work ask: a process that gives out work, on a machine without a GPU perhaps, needs fingerprints alone.
        """
        module, there = self.model(name).module, device.current()
        if self.data.task == REGRESSION and not device.has_float64(there):
            raise ConfigError(f"device '{there}' has no float64, which regressors are measured in: give --device cpu")
        return module if self.entry(name).spec == GIVEN else module.to(there)

    def members(self, probe: Probe) -> list[LoadedModel]:
        """The other models that a probe needs, such as those of an ensemble."""
        return [self.model(m) if m in self.names else self._other(m, probe) for m in probe.members]

    def _placed_member(self, name: str, probe: Probe) -> nn.Module:
        return self.placed(name) if name in self.names else self._other(name, probe).module.to(device.current())

    def _placed_checkpoints(self, model: str, probe: Probe) -> list[nn.Module]:
        folder = self.training[model].folder
        loaded = [checkpoints.load_checkpoint(folder, epoch).module for epoch in self._kept(model, probe)]
        return [network.to(device.current()) for network in loaded]

    @property
    def names(self) -> list[str]:
        """The suite's models."""
        return [entry.name for entry in self.suite.models]

    @property
    def evaluated(self) -> list[str]:
        """Those of them that are evaluated; the others serve as members of ensembles."""
        return [entry.name for entry in self.suite.models if entry.evaluate]

    def _other(self, spec: str, probe: Probe) -> LoadedModel:
        if spec not in self._others:
            try:
                self._others[spec] = self.task.load_other(spec)
            except ModelError as error:
                raise ConfigError(
                    f"{probe.kind} '{probe.label}', member '{spec}': it is none of the suite's models "
                    f"({', '.join(self.names)}), and: {error}"
                ) from None
        return self._others[spec]

    # Samples and keys ------------------------------------------------------------------------------------------------

    def samples(self, condition: Condition, split: str) -> Split:
        """The samples of a condition; `n` cuts the test split only."""
        key = (condition.label if condition.own_samples else CLEAN, split)
        if key not in self._splits:
            n = self.suite.n if split == "test" else None
            self._splits[key] = condition.samples(self.data, split, n, self.suite.seed)
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
        source = samples if condition.own_samples else self.data[cell.split]
        against = {}
        if condition.against is not None:
            probe = self.probe(condition.against)
            against = {"against": self._fit_identity(cell.model, probe)}
        return {
            **against,
            "kind": "observations",
            "version": RECORD_VERSION,
            "model": self.model(cell.model).fingerprint,
            "taps": self.taps(cell.model),
            "condition": condition.spec(),
            "samples": source.fingerprint(),
            "ids": fingerprint.hash_strings(samples.ids[self.rows(cell)].tolist()),
            "seed": self.suite.seed,
            "batch_size": self.suite.batch_size if condition.batch_dependent else None,
        }

    def observation_key(self, cell: Cell) -> str:
        """The key of a cell's observations."""
        if cell not in self._keys:  # asked for many times, and every time all ids of the cell would be hashed
            self._keys[cell] = fingerprint.key_of(self.observation_identity(cell))
        return self._keys[cell]

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
        probe = probe.beside(model)
        fitted = [self.observation_key(c) for split in probe.fit_on for c in self.fit_cells(model, split)]
        found: dict[str, Any] = {"probe": probe.spec(), "fitted on": fitted}
        if probe.members:
            found["members"] = [member.fingerprint for member in self.members(probe)]
        if probe.checkpoints:
            found["checkpoints"] = {str(epoch): note["sha256"] for epoch, note in self._kept(model, probe).items()}
        if probe.validate is not None:
            chosen = self.validation(probe).identity(self.suite.seed, self.suite.batch_size)
            found["chosen on"] = {"model": self.model(model).fingerprint, **chosen}
        return found

    def _kept(self, model: str, probe: Probe) -> dict[int, dict[str, Any]]:
        """The weights after epochs of a model's training that a probe looks at, as far as they are there."""
        if model not in self._checkpoints:  # asked for by every key, and every file would be hashed
            self._checkpoints[model] = checkpoints.kept(self.training[model].folder)
        kept = self._checkpoints[model]
        wanted = self.training[model].keep if probe.checkpoints == "all" else probe.checkpoints
        return {int(epoch): kept[int(epoch)] for epoch in wanted if int(epoch) in kept}

    def validation(self, probe: Probe) -> ValidationData:
        """What a probe with `validate` chooses its parameters on."""
        if probe.label not in self._validations:
            found = ValidationData(probe.validate or {}, self.data, self.conditions.values())
            self._validations[probe.label] = found
        return self._validations[probe.label]

    def probe_key(self, cell: Cell, probe: Probe) -> str:
        """The key of a probe's outputs in a cell."""
        if (cell, probe.label) not in self._probe_keys:
            self._probe_keys[cell, probe.label] = fingerprint.key_of(self.probe_identity(cell, probe))
        return self._probe_keys[cell, probe.label]

    def metric_key(self, model: str, condition: str, metric: OwnMetric) -> str:
        """The key of what a metric of the user's own gives for each sample of a condition."""
        cells = [Cell(model, condition, "test", c) for c in range(self.chunks(self.conditions[condition], "test"))]
        said = {"kind": "metric", "version": RECORD_VERSION, "metric": [metric.name, metric.version]}
        return fingerprint.key_of({**said, "observations": [self.observation_key(cell) for cell in cells]})

    def probe(self, label: str) -> Probe:
        """The probe of that label."""
        return next(probe for probe in self.probes if probe.label == label)

    def cells(self, model: str) -> list[Cell]:
        """All cells of a model: those that probes are fitted on, clean, then the other conditions."""
        splits = {split for p in self.probes_of(model) for split in p.fit_on}
        if self.thresholds:
            splits.add(VALIDATION)
        fits = [c for s in sorted(splits, reverse=True) for c in self.fit_cells(model, s)]  # train before calibration
        tests = [
            Cell(model, label, "test", chunk)
            for label, condition in self.conditions_of(model).items()
            for chunk in range(self.chunks(condition, "test"))
        ]
        return fits + tests

    @property
    def thresholds(self) -> bool:
        """Whether detectors are also read on clean calibration samples, which alarm thresholds are set on."""
        return VALIDATION in self.data.splits and any(p.kind == "detector" for p in self.probes)

    def read_in(self, cell: Cell) -> list[Probe]:
        """The probes that are read in a cell: all on test samples, detectors on calibration samples too."""
        if cell.split not in ("test", VALIDATION):
            return []
        probes = self.probes_read(cell.model)
        if cell.split == "test":
            return probes
        return [p for p in probes if p.kind == "detector"]

    def is_done(self, cell: Cell) -> bool:
        """Whether all records of a cell are there."""
        keys = [self.observation_key(cell), *(self.probe_key(cell, probe) for probe in self.read_in(cell))]
        return all(self.store.has(key) for key in keys)

    # Work ------------------------------------------------------------------------------------------------------------

    def compute(self, cell: Cell) -> dict[str, Any]:
        """Compute what is missing of a cell; returns what a progress line says.

        `reused` is true in it where nothing was missing. Where memory runs out, it is done again with half as many inputs at
        a time, which is remembered for the next cells, and `halved` says how many.
        """
        reused = self.is_done(cell)
        may_halve = not self.conditions[cell.condition].batch_dependent
        with device.settled():
            facts, halved = self._sizes.fitting(
                self._who(cell.model), lambda size: self._compute(cell, size), may_halve
            )
        return {**facts, **({"reused": True} if reused else {}), **({"halved": halved} if halved else {})}

    def _who(self, model: str) -> str:
        """What the number of inputs that fit into memory belongs to."""
        return f"{self.model(model).fingerprint} on {self._device(model)}"

    def _device(self, model: str) -> str:
        return device.name(device.of(self.placed(model)))

    def _compute(self, cell: Cell, batch_size: int) -> dict[str, Any]:
        started = time.perf_counter()
        key = self.observation_key(cell)
        made: Inputs | None = None
        if not self.store.has(key):
            made = self._inputs(cell, batch_size)
            columns = self._observe(cell, made, batch_size)
            meta = {"what": str(cell), "identity": self.observation_identity(cell), "device": self._device(cell.model)}
            self.store.save(key, columns, {**meta, "seconds": round(time.perf_counter() - started, 3)})
        columns = self.store.load(key)

        def inputs() -> Tensor:
            # Inputs are not stored. They are deterministic, so making them again gives the same ones.
            nonlocal made
            made = made or self._inputs(cell, batch_size)
            return made.x

        for probe in self.read_in(cell):
            probe_key = self.probe_key(cell, probe)
            if not self.store.has(probe_key):
                begun = time.perf_counter()
                model, seed = self.placed(cell.model), self.suite.seed
                shown = Shown(model, inputs, columns["id"], seed, batch_size)
                try:
                    fitted = self._fit(cell.model, probe)
                except RobustBenchExtError as error:
                    # Its failure alone: the model's other probes and conditions go on without it.
                    self.store.save(
                        self._unfit_key(cell.model, probe),
                        {},
                        {"what": f"{cell.model} · {probe.label}", "error": str(error)},
                    )
                    continue
                read = probe.read(fitted, self.task.seen([columns]), shown)
                meta = {"what": f"{cell} · {probe.label}", "identity": self.probe_identity(cell, probe)}
                meta |= {"fitted": _about(fitted), "device": self._device(cell.model)}
                self.store.save(probe_key, read, {**meta, "seconds": round(time.perf_counter() - begun, 3)})
        return {**self.task.progress(columns), "n": len(columns["label"]), "seconds": time.perf_counter() - started}

    def _inputs(self, cell: Cell, batch_size: int) -> Inputs:
        """What the condition makes of the cell's samples."""
        condition = self.conditions[cell.condition]
        samples, rows = self.samples(condition, cell.split), self.rows(cell)
        x, y, ids = (
            self.task.inputs(samples, rows),
            torch.from_numpy(self.task.targets(samples, rows)),
            samples.ids[rows],
        )
        clean = None
        if condition.kind == "attack":
            clean = self.task.clean_outputs([self._needed(c) for c in self.clean_cells(cell)])
        if condition.against is not None and isinstance(condition, UnderAttack):
            condition = condition.bind(scorer(self._fit(cell.model, self.probe(condition.against))))
        return condition.apply(self.placed(cell.model), x, y, ids, self.suite.seed, clean, batch_size)

    def _observe(self, cell: Cell, made: Inputs, batch_size: int) -> Columns:
        condition = self.conditions[cell.condition]
        samples, rows = self.samples(condition, cell.split), self.rows(cell)
        if cell.model not in self._readers:
            self._readers[cell.model] = self.task.reader(self.placed(cell.model), self.taps(cell.model))
        targets = self.task.targets(samples, rows)
        seen = self.task.observe(self._readers[cell.model], made.x, targets, batch_size)
        if condition.kind == CLEAN:
            self.task.check_clean(cell.model, seen)
        columns = {"id": samples.ids[rows], **seen, **made.columns}
        if cell.chunk == 0 and cell.split == "test":
            columns |= self.task.preview(made.x[:PREVIEWS])
        return columns

    def _fit(self, model: str, probe: Probe) -> Any:
        if (model, probe.label) not in self._fitted:
            probe = probe.beside(model)
            cells = {split: self.fit_cells(model, split) for split in probe.fit_on}
            module, seed, validation = self.placed(model), self.suite.seed, None
            if probe.validate is not None:
                validation = self.validation(probe).make(module, seed, self.suite.batch_size)
            fitting = Fitting(
                {split: self.task.seen([self._needed(c) for c in mine]) for split, mine in cells.items()},
                module,
                seed,
                lambda split: (self.task.inputs(self.data[split], slice(None)), self.data[split].ids),
                [self._placed_member(name, probe) for name in probe.members],
                validation,
                self._placed_checkpoints(model, probe) if probe.checkpoints else (),
            )
            self._fitted[model, probe.label] = probe.fit(fitting)
        return self._fitted[model, probe.label]

    def _needed(self, cell: Cell) -> Columns:
        if not self.store.has(self.observation_key(cell)):
            self.compute(cell)
        return self.store.load(self.observation_key(cell))

    def fitted_summaries(self, model: str) -> dict[str, dict[str, float]]:
        """Numbers that fitted probes report of themselves, such as the temperature."""
        said = {probe.label: self._said(model, probe)["summary"] for probe in self.probes_read(model)}
        return {label: summary for label, summary in said.items() if summary}

    def fit_warnings(self, model: str) -> list[str]:
        """What readers should know of the fitted probes."""
        return [
            f"{model}, {p.label}: {text}" for p in self.probes_read(model) for text in self._said(model, p)["warnings"]
        ]

    def _said(self, model: str, probe: Probe) -> dict[str, Any]:
        """What a fitted probe says of itself, from a record that it made: fitting it again only for this may take long."""
        for cell in self.cells(model):
            if probe in self.read_in(cell) and self.store.has(key := self.probe_key(cell, probe)):
                # Records of earlier versions do not hold it.
                said: dict[str, Any] = self.store.meta(key).get("fitted") or _about(self._fit(model, probe))
                return said
        return {"summary": {}, "warnings": []}  # it was never read: the failures say why

    # Preflight -------------------------------------------------------------------------------------------------------

    def preflight_key(self, model: str) -> str:
        """The key of a model's preflight."""
        return fingerprint.key_of(
            {
                "kind": "preflight",
                "version": self.task.preflight_version,
                "model": self.model(model).fingerprint,
                "samples": self.task.preflight_samples(),
                "seed": self.suite.seed,
            }
        )

    def preflight(self, model: str) -> list[Check]:
        """A model's checks, made once."""
        key = self.preflight_key(model)
        if not self.store.has(key):
            who, n = self._who(model), self.task.preflight_n
            fits = self._sizes.of(who)
            with device.settled():
                # On fewer samples only where memory is short: no result may depend on the suite's batch size.
                checks, _ = fitting(
                    lambda size: self.task.preflight(self.placed(model), self.suite.seed, size),
                    min(n, fits) if fits < self.suite.batch_size else n,
                    halved=lambda size: self._sizes.note(who, size),
                )
            meta = {"what": f"{model} · preflight", "device": self._device(model)}
            self.store.save(key, {}, {**meta, "checks": [vars(c) for c in checks]})
        return [Check(**check) for check in self.store.meta(key)["checks"]]

    def validate(self) -> None:
        """Find out now what would fail later: splits that probes need, defenses and recipes that do not exist."""
        restricted = [(p.label, p.only) for p in self.probes] + [(c.label, c.only) for c in self.conditions.values()]
        for label, only in restricted:
            for name in only:
                if name not in self.names:
                    raise ConfigError(f"'{label}': only: {unknown_name('model', name, self.names)}")
        for probe in self.probes:
            self._validate_probe(probe)
        for condition in self.conditions.values():
            if condition.against is not None:
                self._validate_against(condition, condition.against)
        self.task.refuse(self)
        if self.scoring is not None:
            self.scoring.validate()
        if self.suite.landscape:
            landscape_cards.validate(self)
        if "train" not in self.data.splits and any(
            t.data is None or t.data is self.data for t in self.training.values()
        ):
            raise ConfigError(f"{self.suite.data} has no train split, but the suite trains {', '.join(self.training)}")

    def _validate_probe(self, probe: Probe) -> None:
        for split in probe.fit_on:
            if split not in self.data.splits:
                raise ConfigError(
                    f"{probe.kind} '{probe.label}' is fitted on the {split} split, which {self.suite.data} lacks. "
                    f"Add such a split to the data, or leave the {probe.kind} out."
                )
        for model in self.evaluated:
            if probe in self.probes_of(model):
                probe.beside(model).fresh()
                self._validate_checkpoints(model, probe)
        for member in probe.members:
            if member not in self.names:
                self._other(member, probe)  # the suite's own are there once they are trained
        if probe.validate is not None:
            if VALIDATION not in self.data.splits:
                raise ConfigError(
                    f"{probe.kind} '{probe.label}' chooses its parameters on the {VALIDATION} split, which "
                    f"{self.suite.data} lacks. Add such a split to the data, or leave out validate."
                )
            self.validation(probe)

    def _validate_checkpoints(self, model: str, probe: Probe) -> None:
        keep = self.training[model].keep if model in self.training else ()
        wanted = keep if probe.checkpoints == "all" else probe.checkpoints
        if probe.checkpoints and (len(wanted) < 2 or not set(keep).issuperset(wanted)):
            raise ConfigError(
                f"{probe.kind} '{probe.label}' looks at epochs {probe.checkpoints} of a model's training, and of '{model}' the "
                f"run keeps {', '.join(map(str, keep)) or 'none'}: give it keep: all in its train, or name others with only:"
            )

    def _validate_against(self, condition: Condition, against: str) -> None:
        labels = [probe.label for probe in self.probes]
        if against not in labels:
            raise ConfigError(
                f"condition '{condition.label}': {unknown_name('detector or estimator', against, labels)} "
                f"An adaptive attack needs it among the suite's detectors or uq."
            )
        if not has_gradient(self.probe(against).fresh()):
            raise ConfigError(f"condition '{condition.label}': {no_gradient(against)}")
        for model in self.evaluated:
            if condition.label in self.conditions_of(model) and self.probe(against) not in self.probes_of(model):
                raise ConfigError(
                    f"condition '{condition.label}': model '{model}' meets it, and '{against}' is not read off that model. "
                    f"Give both the same only:."
                )


def _about(fitted: Any) -> dict[str, Any]:
    return {"summary": fitted.summary(), "warnings": list(fitted.warnings())}
