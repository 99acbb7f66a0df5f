"""Running a suite: train what is missing, check the models, compute the missing cells, measure, write results."""

from __future__ import annotations

import json
import os
import socket
import tempfile
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from robustbench_ext import __version__, landscape_cards
from robustbench_ext.callbacks import Callback, Callbacks
from robustbench_ext.checks import verdict
from robustbench_ext.data.given import given_dataset
from robustbench_ext.errors import ConfigError, RobustBenchExtError, StoppedError, line_of_user
from robustbench_ext.evaluate import CLEAN, GIVEN, Cell, Context, Given
from robustbench_ext.execute import HELD, NOT_STARTED, Failure, Hooks, Job, WorkError, run_jobs
from robustbench_ext.executors import CLUSTERS, make_executor
from robustbench_ext.executors.worker import one_thread
from robustbench_ext.files import is_disk_full, remove_temporary, write_atomically
from robustbench_ext.fingerprint import canonical_json
from robustbench_ext.leases import Leases
from robustbench_ext.preflight import refused
from robustbench_ext.publish import RunLog, assemble, previous_suite, unchanged_results, write_results
from robustbench_ext.results import Failed, RunResults
from robustbench_ext.settings import follow, snapshot
from robustbench_ext.suite import Suite, load_suite, validate_suite


@dataclass
class Progress:
    """What a caller may want to hear while a suite runs. Every hook has a default that does nothing."""

    running: Callable[[list[str]], None] = lambda jobs: None
    line: Callable[[int, int, str, Mapping[str, Any]], None] = lambda i, total, what, facts: None
    epoch: Callable[[str, Mapping[str, Any]], None] = lambda model, row: None
    message: Callable[[str], None] = lambda text: None


@dataclass
class RunSummary:
    """How a run went."""

    folder: Path
    results: RunResults
    computed: int
    reused: int
    trained: int
    seconds: float
    failures: list[Failed] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        """The worst status of all models' checks, before the run and after it."""
        return self.results.verdict


_CONTEXTS: dict[str, Context] = {}
_GIVEN: dict[str, Given] = {}  # by run folder, while it runs
_ONE_AT_A_TIME = threading.Lock()  # pools of threads and workers of clusters may have several; a model is not shared
PROGRESS = "progress.json"
Payload = tuple[str, str, dict[str, Any], Any, dict[str, Any]]


def _context(folder: str, suite: Mapping[str, Any], run: str) -> Context:
    """The context of a run, made once per process and run: files may have changed since another run."""
    key = f"{run}|{folder}|{canonical_json(dict(suite))}"
    if key not in _CONTEXTS:
        _CONTEXTS.clear()
        _CONTEXTS[key] = Context(validate_suite(suite), Path(folder), _GIVEN.get(folder))
    return _CONTEXTS[key]


def work(payload: Payload) -> dict[str, Any]:
    """One job, in whatever process and on whatever machine.

    Args:
        payload: kind, run folder, suite, what, and where it comes from (`run`, `version`, `cwd`, `settings`). What is a
            model's name for the kinds "train" and "check", the fields of a `Cell` for "cell", a scorer's name and a chunk for
            "score", a unit's title for "landscape".

    Returns:
        What a progress line says. `reused` where everything was there already; `HELD` where another run is at it.

    Raises:
        WorkError: whatever went wrong, as text.
    """
    kind, folder, suite, what, origin = payload
    with _ONE_AT_A_TIME:
        try:
            _same_version(origin["version"])
            follow(origin["settings"])
            _go_to(origin["cwd"], folder)
            one_thread()
            with Leases(Path(folder), origin["run"]).hold(job_id(kind, what)) as mine:
                return _work(kind, _context(folder, suite, origin["run"]), what) if mine else {HELD: True}
        except (Exception, SystemExit) as error:
            full = is_disk_full(error)
            message = f"{type(error).__name__}: {error}{line_of_user(error)}"
            if full:
                message = (
                    f"no space left on the device that holds {folder} ({error}). What was computed before is kept: make room, "
                    f"then run the same command again to go on."
                )
            raise WorkError(message, traceback.format_exc(), full) from None


def job_id(kind: str, what: Any) -> str:
    """The name of a piece of work, the same in every run of a folder."""
    return "|".join([kind, what] if isinstance(what, str) else [kind, *map(str, what)])


def _same_version(version: str) -> None:
    """Another version would look for, and write, records under other keys."""
    if version != __version__:
        raise ConfigError(
            f"this worker ({socket.gethostname()}) has robustbench-ext {__version__}, the run has {version}. Install the same "
            f"version on both."
        )


def _go_to(cwd: str, folder: str) -> None:
    """Be where the run was started: specifications may hold relative paths."""
    if Path.cwd() == Path(cwd):
        return
    try:
        os.chdir(cwd)
    except OSError as error:
        raise ConfigError(
            f"this worker ({socket.gethostname()}) cannot enter {cwd}, where the run was started: {error.strerror}. Workers "
            f"need the same paths as the run; start it in a folder that they share, and give --out {folder} there too."
        ) from error


def _work(kind: str, context: Context, what: Any) -> dict[str, Any]:
    if kind == "train":
        return _train(context, what)
    if kind == "landscape":
        return landscape_cards.compute(context, what)
    if kind == "score":
        assert context.scoring is not None  # noqa: S101 - it gave this work out
        return context.scoring.compute(*what)
    started = time.perf_counter()
    if kind == "check":
        checks = context.preflight(what)
        return {"status": verdict(checks), "refused": refused(checks), "seconds": time.perf_counter() - started}
    return context.compute(Cell(*what))


def _train(context: Context, name: str) -> dict[str, Any]:
    started = time.perf_counter()
    training = context.training[name]
    out = training.folder
    if training.is_done:  # another run has just done it
        return {"reused": True, "epochs": training.epochs, "seconds": 0.0}
    training.discard_damaged()
    last: dict[str, Any] = {}

    def on_epoch(row: dict[str, Any]) -> None:
        last.update(row)
        # Through a file, so that the run's own process sees it whichever process trains.
        write_atomically(out / PROGRESS, lambda file: file.write_text(json.dumps(row), encoding="utf-8"))

    training.run(on_epoch)
    seconds = time.perf_counter() - started
    timing = json.dumps({"seconds": round(seconds, 1)})
    write_atomically(out / "timing.json", lambda file: file.write_text(timing, encoding="utf-8"))
    (out / PROGRESS).unlink(missing_ok=True)
    return {**last, "epochs": training.epochs, "seconds": seconds}


def run_suite(
    suite: Suite | str | Path | Mapping[str, Any],
    out: str | Path,
    *,
    models: Mapping[str, nn.Module] | None = None,
    data: Any = None,
    executor: str | Executor = "serial",
    workers: int | None = None,
    executor_options: Mapping[str, str] | None = None,
    callbacks: Sequence[Callback] = (),
    progress: Progress | None = None,
) -> RunSummary:
    """Run a suite into a folder. Running it again computes what is missing and nothing else.

    Args:
        suite: a `Suite`, a bundled name, a YAML file or a mapping.
        out: the run folder; made where it does not exist.
        models: modules to evaluate instead of the suite's models, by name. They stay in this process, so they need the serial
            executor, and they are told apart by their weights, structure and source: change them and they are others.
        data: instead of the suite's; see `robustbench_ext.data.given.given_dataset` for what is understood.
        executor: "serial", "local" (one process per core or GPU), "auto", "dask", "slurm", "ray" with or without an address
            (see `robustbench_ext.executors.make_executor`), or any `concurrent.futures.Executor`. From a script, all but
            "serial" need the usual `if __name__ == "__main__":` guard.
        workers, executor_options: of an executor that is given by name.
        callbacks: told what happens; one that raises is left out from then on, and the run goes on.
        progress: like a callback, and trusted: what it raises ends the run.

    Returns:
        A summary with all results; they are also in `out/results.json` and `out/results.csv`.

    Raises:
        StoppedError: the run could not go on (the disk is full); what it has computed is kept.
    """
    hooks = progress or Progress()
    told = Callbacks(callbacks, hooks.message)
    try:
        return _run_suite(suite, Path(out), models, data, (executor, workers, executor_options), told, hooks)
    finally:
        told.close()


def _run_suite(
    suite: Suite | str | Path | Mapping[str, Any],
    folder: Path,
    models: Mapping[str, nn.Module] | None,
    data: Any,
    where: tuple[str | Executor, int | None, Mapping[str, str] | None],
    told: Callbacks,
    hooks: Progress,
) -> RunSummary:
    started = time.perf_counter()
    executor, workers, options = where
    suite, given = _with_given(suite, models, data)
    if given is not None and executor not in ("serial", "auto"):
        raise ConfigError(
            f"executor '{executor}': models and data that are handed over in Python stay in this process. Take the serial "
            f"executor, or name them (pkg.module:factory, npz:PATH) so that every process can load them."
        )
    executor = executor if given is None else "serial"
    _CONTEXTS.clear()  # files may have changed since the last run of this process
    _GIVEN.clear()
    if given is not None:
        _GIVEN[str(folder)] = given
    context = Context(suite, folder, given)
    context.validate()
    _writable(folder)
    told.on_run_start(suite, folder)
    hooks.message(f"suite {suite.name}: {_count(len(context.evaluated), 'model')} on {suite.data}, into {folder}")
    previous = previous_suite(folder)
    if previous is not None and previous.get("name") != suite.name:
        hooks.message(
            f"note: {folder} held a run of suite {previous.get('name')}; its report is replaced, its records stay"
        )
    asked, there = suite.n, len(context.data["test"])
    if asked is not None and asked > there:
        hooks.message(f"note: n = {asked} test samples were asked for, {suite.data} has {there}")
    for name in context.left_out:
        why = "not installed: pip install --no-deps torchattacks" if "torchattacks" in name else "the data is not there"
        hooks.message(f"left out: {name} ({why})")
    for note in context.data.notes:
        hooks.message(f"note: {note}")
    runner = _Runner(context, (executor, workers, options), told, hooks)
    runner.run()
    context = runner.context
    unchanged = not runner.log.computed and not runner.log.trained and not runner.log.failures
    results = unchanged_results(context) if unchanged else None
    if results is None:
        results, measured = assemble(context, runner.log)
        try:
            write_results(context, results, measured, runner.log, started)
        except OSError as error:
            if not is_disk_full(error):
                raise
            raise StoppedError(
                f"no space left for the results in {folder} ({error}). All records are there: make room, then run the same "
                f"command again, which computes nothing anew."
            ) from error
    summary = RunSummary(
        folder,
        results,
        runner.log.computed,
        runner.log.reused,
        runner.log.trained,
        time.perf_counter() - started,
        results.failures,
    )
    told.on_run_end(summary)
    return summary


def _writable(folder: Path) -> None:
    """Find out now whether the run folder can be written to, not after the first cell."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(
            f"the run folder {folder} cannot be written to: {error.strerror or error}. Give another one with --out"
        ) from error


def _with_given(
    suite: Suite | str | Path | Mapping[str, Any], models: Mapping[str, nn.Module] | None, data: Any
) -> tuple[Suite, Given | None]:
    """The suite with what is handed over in the places of its own models and data."""
    if not models and data is None:
        return (suite if isinstance(suite, Suite) else load_suite(suite)), None
    entries: dict[str, Any] = {}
    if models:
        entries["models"] = [{"name": name, "spec": GIVEN} for name in models]
    if data is not None:
        entries["data"] = GIVEN
    if isinstance(suite, Mapping):
        loaded = load_suite({**suite, **entries})
    else:
        own = suite if isinstance(suite, Suite) else load_suite(suite)
        loaded = validate_suite({**own.model_dump(by_alias=True), "title": "", "description": "", **entries})
    return loaded, Given(dict(models or {}), None if data is None else given_dataset(data))


def _fields(cell: Cell) -> tuple[str, str, str, int]:
    return cell.model, cell.condition, cell.split, cell.chunk


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


class _Runner:
    """Two waves of jobs: training, then checks and cells, whose keys need the trained weights."""

    def __init__(
        self,
        context: Context,
        where: tuple[str | Executor, int | None, Mapping[str, str] | None],
        told: Callbacks,
        hooks: Progress,
    ) -> None:
        self.context, self.hooks, self._told = context, hooks, told
        self._executor, self._workers, self._options = where
        self._suite = context.suite.model_dump(by_alias=True, mode="json")
        run = uuid.uuid4().hex
        self._origin = {"run": run, "version": __version__, "cwd": str(Path.cwd()), "settings": snapshot()}
        self._leases = Leases(context.folder, run)
        self._made: Executor | None = None
        self._waits: set[str] = set()
        self._epochs: dict[str, dict[str, Any]] = {}
        self.log = RunLog()

    def run(self) -> None:
        """Do all that is missing."""
        trainings = self.context.training.items()
        try:
            self._wave(
                [
                    self._job("train", name, needs=frozenset(job_id("train", needed) for needed in training.needs))
                    for name, training in trainings
                    if not training.is_done
                ]
            )
            self._leave_out_probes()
            jobs = self._score_jobs()
            for name in self.context.evaluated:
                if name not in self.log.broken:
                    jobs += self._model_jobs(name)
            self._wave(jobs + self._landscape_jobs())
        finally:
            self._leave()
            if self._leases.clear():
                # Nobody is writing: what has a temporary name was left by a process that was killed.
                remove_temporary(self.context.store.folder, *(t.folder for _, t in trainings))

    def _leave_out_probes(self) -> None:
        """Go on without the probes whose members could not be trained or loaded."""
        suite, lost = self.context.suite, set()
        for probe in self.context.probes:
            try:
                self.context.members(probe)
            except RobustBenchExtError as error:
                lost.add(probe.label)
                broken = [member for member in probe.members if member in self.log.broken]
                why = f"its member {', '.join(broken)} could not be trained" if broken else str(error)
                self._fail(f"{probe.kind} {probe.label}", why)
        if lost:
            entries = zip(self.context.probes, (*suite.detectors, *suite.uq), strict=True)
            kept = [(probe.kind, entry) for probe, entry in entries if probe.label not in lost]
            detectors = tuple(entry for kind, entry in kept if kind == "detector")
            uq = tuple(entry for kind, entry in kept if kind != "detector")
            kept_suite = suite.model_copy(update={"detectors": detectors, "uq": uq})
            self.context = Context(kept_suite, self.context.folder, self.context.given)
            self._suite = self.context.suite.model_dump(by_alias=True, mode="json")

    def _landscape_jobs(self) -> list[Job]:
        """What is missing of loss landscapes, after the checks of their models."""
        jobs = []
        for title, unit in landscape_cards.units(self.context).items():
            if self.log.refused.intersection(unit.models):
                continue  # a note says so
            try:
                done = landscape_cards.is_done(self.context, unit)
            except RobustBenchExtError as error:
                lost = [name for name in unit.models if name in self.log.broken]
                self._fail(title, f"{', '.join(lost)} could not be trained" if lost else str(error))
                continue
            self.log.reused += done
            if not done:
                needs = frozenset(job_id("check", name) for name in unit.models)
                jobs.append(self._job("landscape", title, title, needs))
        return jobs

    def _score_jobs(self) -> list[Job]:
        """Difficulty scores of the test samples, as far as they are missing and their models are there."""
        scoring, jobs = self.context.scoring, list[Job]()
        if scoring is None:
            return jobs
        for name in scoring.asked.models:
            try:
                done = [scoring.is_done(name, chunk) for chunk in range(scoring.chunks)]
            except RobustBenchExtError as error:
                why = "its training failed" if name in self.log.broken else str(error)
                self._fail(f"difficulty scores by {name}", why)
                continue
            self.log.reused += sum(done)
            for chunk in (chunk for chunk, there in enumerate(done) if not there):
                part = f" part {chunk + 1}" if chunk else ""
                jobs.append(self._job("score", (name, chunk), f"{name} · {scoring.asked.score} scores{part}"))
        return jobs

    def _model_jobs(self, name: str) -> list[Job]:
        try:
            self.context.model(name)
        except RobustBenchExtError as error:
            self.log.broken.add(name)
            self._fail(name, str(error))
            self.hooks.message(f"{name}: {error}")
            return []
        self.context.try_again(name)
        check = self._job("check", name)
        jobs = []
        if not self.context.store.has(self.context.preflight_key(name)):
            jobs.append(check)
        elif refused(self.context.preflight(name)):
            self.log.refused.add(name)
            return []
        done = {cell: self.context.is_done(cell) for cell in self.context.cells(name)}
        self.log.reused += sum(done.values())
        ids = {cell: job_id("cell", _fields(cell)) for cell in done}
        fits = {ids[cell] for cell, there in done.items() if not there and cell.split != "test"}
        trains = {ids[cell] for cell, there in done.items() if not there and cell.split == "train"}
        for cell, there in done.items():
            if there:
                continue
            needs = {check.id} | (fits if cell.split == "test" else trains if cell.split != "train" else set())
            if cell.split == "test" and cell.condition != CLEAN:
                needs |= {ids[clean] for clean in self.context.clean_cells(cell) if not done.get(clean, True)}
            jobs.append(self._job("cell", _fields(cell), str(cell), frozenset(needs), self._cost(cell)))
        return jobs

    def _cost(self, cell: Cell) -> float:
        """Roughly the passes that a cell takes; clean cells first, since others start from them."""
        if cell.condition == CLEAN:
            return float("inf")
        condition = self.context.conditions[cell.condition]
        passes = condition.cost(max(1, len(self.context.data.classes)))
        each = 1000 if passes is None else 1 + passes.forwards + 2 * passes.backwards
        return float(each * len(self.context.samples(condition, cell.split).labels[self.context.rows(cell)]))

    def _job(
        self, kind: str, what: Any, title: str = "", needs: frozenset[str] = frozenset(), cost: float = float("inf")
    ) -> Job:
        made = kind == "train" and self.context.entry(what).make is not None
        title = title or f"{what} · {'preflight' if kind == 'check' else 'making' if made else 'training'}"
        # Of training, the longest first; all epochs are taken to be equal.
        cost = self.context.training[what].epochs if kind == "train" else cost
        payload = (kind, str(self.context.folder), self._suite, what, self._origin)
        return Job(job_id(kind, what), title, payload, needs, cost)

    def _judge(self, job: Job, facts: Any) -> Failure | None:
        """Whether a job that came back has done what it was for."""
        kind, what = job.payload[0], job.payload[3]
        if kind == "check" and facts["refused"]:
            self.log.refused.add(what)
            return Failure(job.title, "the preflight refuses this model")
        if kind == "cell" and not self.context.is_done(Cell(*what)):
            return Failure(
                job.title,
                "the model differs each time that it is loaded, so its results belong to no model in particular. Seed its "
                "factory, or load fixed weights in it.",
            )
        if facts.get("reused"):
            self.log.reused += kind in ("cell", "score", "landscape")
        else:
            self.log.trained += kind == "train"
            self.log.computed += kind in ("cell", "score", "landscape")
        if facts.get("halved"):
            wanted = self.context.suite.batch_size
            self.hooks.message(f"{job.title}: out of memory with batch_size {wanted}; goes on with {facts['halved']}")
        return None

    def _wave(self, jobs: list[Job]) -> None:
        if not jobs:
            return
        count = 0

        def done(job: Job, facts: Any) -> Failure | None:
            nonlocal count
            failure = self._judge(job, facts)
            if failure is None:
                count += 1
                self._line(count, len(jobs), job.title, facts)
            return failure

        def failed(job: Job, failure: Failure) -> None:
            nonlocal count
            count += 1
            kind, what = job.payload[0], job.payload[3]
            if kind == "train":
                self.log.broken.add(what)
            name = what if isinstance(what, str) else what[0]
            names = landscape_cards.units(self.context)[what].models if kind == "landscape" else (name,)
            if not self.log.refused.intersection(names):
                self._fail(job.title, failure.error, failure.traceback)
            if not failure.error.startswith(NOT_STARTED):
                self._line(count, len(jobs), job.title, {"error": failure.error})

        def tick(running: list[Job]) -> None:
            for job in running:
                row = self._epoch(job.payload[3]) if job.payload[0] == "train" else None
                if row is not None and self._epochs.get(job.id) != row:
                    self._epochs[job.id] = row
                    self.hooks.epoch(job.payload[3], row)
                    self._told.on_epoch(job.payload[3], row)
            self.hooks.running([job.title for job in running])

        def lost(job: Job, why: str) -> None:
            self.hooks.message(f"{job.title}: {why}; another worker takes it over")

        hooks = Hooks(done, failed, lost, tick, self._is_free, self._progress)
        import torch

        threads = torch.get_num_threads()
        try:
            run_jobs(jobs, work, self._pool(jobs), hooks)
        finally:
            torch.set_num_threads(threads)  # work in this process used one: see robustbench_ext.execute

    def _pool(self, jobs: list[Job]) -> Executor:
        """The executor for a wave of jobs. Clusters are joined once; processes of this machine are started for each wave."""
        if not isinstance(self._executor, str):
            return self._executor
        kind = self._executor.partition(":")[0]
        if self._made is not None and kind in CLUSTERS:
            return self._made
        self._leave()
        self._made = make_executor(
            self._executor,
            len(jobs),
            self._workers,
            any(job.payload[0] == "train" for job in jobs),
            folder=self.context.folder,
            options=self._options,
            say=self.hooks.message,
        )
        return self._made

    def _leave(self) -> None:
        if self._made is not None:
            self._made.shutdown()
            self._made = None

    def _line(self, done: int, total: int, what: str, facts: Mapping[str, Any]) -> None:
        self.hooks.line(done, total, what, facts)
        self._told.on_cell(done, total, what, facts)

    def _is_free(self, job: Job) -> bool:
        """Whether another run that was at a job is through with it; says once what is waited for."""
        holder = self._leases.holder(job.id)
        if holder is not None and holder.run != self._origin["run"] and holder.token not in self._waits:
            self._waits.add(holder.token)
            self.hooks.message(f"{job.title}: {holder} is at it, in another run of this folder; waiting for its result")
        return self._leases.is_free(job.id)

    def _progress(self, job: Job) -> Any:
        """The time of the latest checkpoint of a model in training."""
        if job.payload[0] != "train":
            return None
        folder = self.context.training[job.payload[3]].folder
        try:
            return max((file.stat().st_mtime_ns for file in folder.iterdir()), default=None)
        except OSError:
            return None

    def _epoch(self, name: str) -> dict[str, Any] | None:
        """The last finished epoch of a model that is training somewhere."""
        try:
            row: dict[str, Any] = json.loads(
                (self.context.training[name].folder / PROGRESS).read_text(encoding="utf-8")
            )
        except (OSError, ValueError):
            return None
        return row

    def _fail(self, what: str, error: str, trace: str = "") -> None:
        self.log.failures.append(Failed(what=what, error=error.removeprefix("WorkError: ")))
        if trace:
            with (self.context.folder / "failures.log").open("a", encoding="utf-8") as file:
                file.write(f"{what}\n{trace}\n")
