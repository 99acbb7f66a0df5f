"""Running a suite: train what is missing, check the models, compute the missing cells, measure, write results."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from robustbench_ext.checks import verdict
from robustbench_ext.data.given import given_dataset
from robustbench_ext.errors import ConfigError, RobustBenchExtError
from robustbench_ext.evaluate import CLEAN, GIVEN, Cell, Context, Given
from robustbench_ext.execute import NOT_STARTED, Failure, Job, SerialExecutor, make_executor, run_jobs
from robustbench_ext.files import write_atomically
from robustbench_ext.fingerprint import canonical_json
from robustbench_ext.preflight import refused
from robustbench_ext.publish import RunLog, assemble, previous_suite, unchanged_results, write_results
from robustbench_ext.results import Failed, RunResults
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
PROGRESS = "progress.json"


def _context(folder: str, suite: Mapping[str, Any]) -> Context:
    """The context of a run, made once per process."""
    key = f"{folder}|{canonical_json(dict(suite))}"
    if key not in _CONTEXTS:
        _CONTEXTS.clear()
        _CONTEXTS[key] = Context(validate_suite(suite), Path(folder), _GIVEN.get(folder))
    return _CONTEXTS[key]


class WorkError(Exception):
    """What went wrong in a job, as text: a model's own exceptions need not survive the way between processes."""


def work(payload: tuple[str, str, dict[str, Any], Any]) -> dict[str, Any]:
    """One job, in whatever process: ("train", ..., model), ("check", ..., model) or ("cell", ..., cell fields)."""
    try:
        return _work(*payload)
    except (Exception, SystemExit) as error:
        raise WorkError(f"{type(error).__name__}: {error}", traceback.format_exc()) from None


def _work(kind: str, folder: str, suite: dict[str, Any], what: Any) -> dict[str, Any]:
    context = _context(folder, suite)
    if kind == "train":
        return _train(context, what)
    started = time.perf_counter()
    if kind == "check":
        checks = context.preflight(what)
        return {"status": verdict(checks), "refused": refused(checks), "seconds": time.perf_counter() - started}
    return context.compute(Cell(*what))


def _train(context: Context, name: str) -> dict[str, Any]:
    started = time.perf_counter()
    training = context.training[name]
    out = training.folder
    last: dict[str, Any] = {}

    def on_epoch(row: dict[str, Any]) -> None:
        last.update(row)
        # Through a file, so that the run's own process sees it whichever process trains.
        write_atomically(out / PROGRESS, lambda file: file.write_text(json.dumps(row)))

    training.run(on_epoch)
    seconds = time.perf_counter() - started
    write_atomically(out / "timing.json", lambda file: file.write_text(json.dumps({"seconds": round(seconds, 1)})))
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
    progress: Progress | None = None,
) -> RunSummary:
    """Run a suite into a folder. Running it again computes what is missing and nothing else.

    Args:
        suite: a `Suite`, a bundled name, a YAML file or a mapping.
        out: the run folder; made where it does not exist.
        models: modules to evaluate instead of the suite's models, by name. They stay in this process, so they need the serial
            executor, and they are told apart by their weights, structure and source: change them and they are others.
        data: instead of the suite's; see `robustbench_ext.data.given.given_dataset` for what is understood.
        executor: "serial", "local" (one process per core), "auto", or any `concurrent.futures.Executor`. From a script,
            "local" needs the usual `if __name__ == "__main__":` guard.

    Returns:
        A summary with all results; they are also in `out/results.json` and `out/results.csv`.
    """
    started = time.perf_counter()
    hooks = progress or Progress()
    folder = Path(out)
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
    folder.mkdir(parents=True, exist_ok=True)
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
    runner = _Runner(context, executor, workers, hooks)
    runner.run()
    context = runner.context
    unchanged = not runner.log.computed and not runner.log.trained and not runner.log.failures
    results = unchanged_results(context) if unchanged else None
    if results is None:
        results, measured = assemble(context, runner.log)
        write_results(context, results, measured, runner.log, started)
    return RunSummary(
        folder,
        results,
        runner.log.computed,
        runner.log.reused,
        runner.log.trained,
        time.perf_counter() - started,
        results.failures,
    )


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


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


class _Runner:
    """Two waves of jobs: training, then checks and cells, whose keys need the trained weights."""

    def __init__(self, context: Context, executor: str | Executor, workers: int | None, hooks: Progress) -> None:
        self.context, self.hooks = context, hooks
        self._executor, self._workers = executor, workers
        self._suite = context.suite.model_dump(by_alias=True, mode="json")
        self.log = RunLog()

    def run(self) -> None:
        """Do all that is missing."""
        self._wave(
            [self._job("train", name) for name, training in self.context.training.items() if not training.is_done]
        )
        self._leave_out_probes()
        jobs = []
        for name in self.context.evaluated:
            if name not in self.log.broken:
                jobs += self._model_jobs(name)
        self._wave(jobs)

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
        ids = {cell: f"cell|{cell.model}|{cell.condition}|{cell.split}|{cell.chunk}" for cell in done}
        fits = {ids[cell] for cell, there in done.items() if not there and cell.split != "test"}
        trains = {ids[cell] for cell, there in done.items() if not there and cell.split == "train"}
        for cell, there in done.items():
            if there:
                continue
            needs = {check.id} | (fits if cell.split == "test" else trains if cell.split != "train" else set())
            if cell.split == "test" and cell.condition != CLEAN:
                needs |= {ids[clean] for clean in self.context.clean_cells(cell) if not done.get(clean, True)}
            fields = (cell.model, cell.condition, cell.split, cell.chunk)
            payload = ("cell", str(self.context.folder), self._suite, fields)
            jobs.append(Job(ids[cell], str(cell), payload, frozenset(needs)))
        return jobs

    def _job(self, kind: str, name: str) -> Job:
        title = f"{name} · {'preflight' if kind == 'check' else 'training'}"
        return Job(f"{kind}|{name}", title, (kind, str(self.context.folder), self._suite, name))

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
        self.log.trained += kind == "train"
        self.log.computed += kind == "cell"
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
                self.hooks.line(count, len(jobs), job.title, facts)
            return failure

        def failed(job: Job, failure: Failure) -> None:
            nonlocal count
            count += 1
            kind, what = job.payload[0], job.payload[3]
            if kind == "train":
                self.log.broken.add(what)
            name = what if isinstance(what, str) else what[0]
            if name not in self.log.refused:
                self._fail(job.title, failure.error, failure.traceback)
            if not failure.error.startswith(NOT_STARTED):
                self.hooks.line(count, len(jobs), job.title, {"error": failure.error})

        def tick(running: list[Job]) -> None:
            for job in running:
                row = self._epoch(job.payload[3]) if job.payload[0] == "train" else None
                if row is not None:
                    self.hooks.epoch(job.payload[3], row)
            self.hooks.running([job.title for job in running])

        executor = self._executor
        if not isinstance(executor, str):
            run_jobs(jobs, work, executor, done, failed, tick)
            return
        import torch

        threads = torch.get_num_threads()
        long = any(job.payload[0] == "train" for job in jobs)
        with make_executor(executor, len(jobs), self._workers, long) as pool:
            try:
                if isinstance(pool, SerialExecutor):
                    torch.set_num_threads(1)  # as in a worker: see robustbench_ext.execute
                run_jobs(jobs, work, pool, done, failed, tick)
            finally:
                torch.set_num_threads(threads)

    def _epoch(self, name: str) -> dict[str, Any] | None:
        """The last finished epoch of a model that is training somewhere."""
        try:
            row: dict[str, Any] = json.loads((self.context.training[name].folder / PROGRESS).read_text())
        except (OSError, ValueError):
            return None
        return row

    def _fail(self, what: str, error: str, trace: str = "") -> None:
        self.log.failures.append(Failed(what=what, error=error.removeprefix("WorkError: ")))
        if trace:
            with (self.context.folder / "failures.log").open("a", encoding="utf-8") as file:
                file.write(f"{what}\n{trace}\n")
