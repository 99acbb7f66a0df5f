"""A measurement: the cells of one model computed once by whichever process comes first, then its results.

It stands on the engine's `Context` (keys, cells, records) and on `assemble` (metrics). Other than `run_suite` it shares one
folder of records between measurements and processes, and it can stop when its time is over.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from robustbench_ext import __version__, fingerprint
from robustbench_ext.checks import Check
from robustbench_ext.doubts import DOUBTS_VERSION
from robustbench_ext.errors import ConfigError, RobustBenchExtError
from robustbench_ext.evaluate import CLEAN, Cell, Context
from robustbench_ext.files import write_atomically
from robustbench_ext.gate.checks import check_mode, check_normalised_once
from robustbench_ext.gate.locks import Task, share
from robustbench_ext.gate.options import seconds_of as seconds_of  # where others look for it
from robustbench_ext.measured import Tables
from robustbench_ext.publish import RunLog, assemble
from robustbench_ext.results import Finding, RunResults

MODEL = "model"  # what every measured model is called in its results; tests call it by its own name
RANDOMISED = "determinism"


class PreflightError(AssertionError):
    """The model cannot be tested: a check of it, or of its data, failed."""


class _OutOfTime(BaseException):
    """Raised between two passes of the model; not an Exception, so that nobody takes it for the model's own."""


@dataclass
class Measured:
    """What was measured.

    Attributes:
        undone: how much is missing, by condition; empty where there was time for all.
        doubts: what speaks against trusting the numbers without making them worthless.
        seconds: that this process spent on it.
    """

    context: Context
    results: RunResults
    records: Tables
    undone: dict[str, str]
    doubts: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def fingerprint(self) -> str:
        """Of the model."""
        return self.context.model(MODEL).fingerprint


def measure(context: Context, accept: tuple[str, ...] = (), deadline: float | None = None) -> Measured:
    """Measure the model of a context.

    Args:
        accept: names of checks whose failure is to be a doubt only.
        deadline: on the clock of `time.monotonic`; None: take as long as it takes.

    Raises:
        PreflightError: a check failed, which is the reason to give.
        RobustBenchExtError: something could not be computed.
    """
    began = time.perf_counter()
    context.validate()
    if any(context.beyond(MODEL, condition) for condition in context.conditions_for(MODEL).values()):
        # A test that asks for an attack must not go on without it.
        raise ConfigError(" ".join(context.notes_of(MODEL)))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums depend on the number of threads: numbers must not depend on who computes them
    try:
        doubts = _preflight(context, accept)
        _compute(context, deadline)
        results = _results(context)
    finally:
        torch.set_num_threads(threads)
    for finding in results.doubts:
        text = _sentence(finding)
        if finding.status == "fail" and finding.name not in accept:
            raise PreflightError(f"{text}\n(accept=['{finding.name}'] makes this a warning)")
        if finding.status != "pass":
            doubts.append(text)
    return Measured(context, results, Tables(context), _undone(context), doubts, time.perf_counter() - began)


# Checks --------------------------------------------------------------------------------------------------------------


def _preflight(context: Context, accept: tuple[str, ...]) -> list[str]:
    """The doubts of all checks of the model; the first failure is raised."""
    own = []
    given = context.given.models.get(MODEL)
    if given is not None:
        own.append(check_mode(given))
    _raise_failed(own, accept, context)
    key = context.preflight_key(MODEL)
    folder = context.folder / "locks"
    share([Task(key, lambda: context.store.has(key), lambda: context.preflight(MODEL))], folder)
    checks = context.preflight(MODEL)
    _raise_failed([c for c in checks if c.name != "normalisation"], accept, context)
    # Before the preflight's own: a second normalisation makes other wrong ones look better, too.
    twice = check_normalised_once(context.model(MODEL).module, context.data)
    _raise_failed([*([twice] if twice is not None else []), *checks], accept, context)
    return [_sentence(c) for c in [*own, *checks] if c.status != "pass"]


def _raise_failed(checks: list[Check], accept: tuple[str, ...], context: Context) -> None:
    for check in checks:
        # Which normalisation is right is never a matter of opinion: a significant gain by another one is a failure here.
        failed = check.status == "fail" or (check.name == "normalisation" and check.status == "doubt")
        if failed and check.name not in accept and not (check.name == RANDOMISED and _draws(context)):
            raise PreflightError(
                f"{_sentence(check)}\nNothing was measured: the numbers of such a model mean little. "
                f"(accept=['{check.name}'] makes this a warning)"
            )


def _sentence(check: Check | Finding) -> str:
    return f"{check.name}: {check.message.rstrip('.')}. {check.hint}".rstrip()


def _draws(context: Context) -> bool:
    """Whether all attacks take means over several draws, as randomised models need."""
    attacks = [c.facts().get("parameters", {}) for c in context.conditions.values() if c.kind == "attack"]
    return bool(attacks) and all(p.get("draws", 1) > 1 for p in attacks)


# Cells ---------------------------------------------------------------------------------------------------------------


def _compute(context: Context, deadline: float | None) -> None:
    """All cells that are missing, in three stages, since the later ones need the earlier ones' records."""
    folder = context.folder / "locks"

    def late() -> bool:
        return deadline is not None and time.monotonic() >= deadline

    def task(cell: Cell) -> Task:
        def work() -> None:
            context.compute(cell)
            if not context.is_done(cell):
                raise RobustBenchExtError(
                    f"{cell}: its records are not there after computing them; is {context.folder} full?"
                )

        # Cells of one model under other probes share observations, not keys: the lock is on the observations.
        return Task(context.observation_key(cell), lambda: context.is_done(cell), work)

    cells = context.cells(MODEL)
    stages = (
        [c for c in cells if c.split != "test"],
        [c for c in cells if c.split == "test" and c.condition == CLEAN],
        [c for c in cells if c.split == "test" and c.condition != CLEAN],
    )
    try:
        with _interrupted(context.model(MODEL).module, deadline):
            for stage in stages:
                share([task(cell) for cell in stage], folder, late)
    except _OutOfTime:
        pass


@contextmanager
def _interrupted(model: nn.Module, deadline: float | None) -> Iterator[None]:
    """Within this context a pass of the model after the deadline raises: one attack may take longer than that."""
    if deadline is None or isinstance(model, torch.jit.ScriptModule):  # which takes no hooks: it stops between chunks
        yield
        return

    def look(*_: object) -> None:
        if time.monotonic() >= deadline:
            raise _OutOfTime

    handle = model.register_forward_pre_hook(look)
    try:
        yield
    finally:
        handle.remove()


def _undone(context: Context) -> dict[str, str]:
    """What is missing, by condition."""
    missing: dict[str, str] = {}
    for label, condition in context.conditions_of(MODEL).items():
        cells = [Cell(MODEL, label, "test", chunk) for chunk in range(context.chunks(condition, "test"))]
        total = len(context.samples(condition, "test"))
        done = sum(len(context.samples(condition, "test").ids[context.rows(c)]) for c in cells if context.is_done(c))
        if done < total:
            missing[label] = f"the time was over after {done} of {total} samples"
    return missing


# Results -------------------------------------------------------------------------------------------------------------


def _results(context: Context) -> RunResults:
    """The results of all complete records, made once for all processes."""
    missing = sorted(_undone(context))
    identity: dict[str, Any] = {
        "kind": "results",
        "version": [__version__, context.task.preflight_version, DOUBTS_VERSION],
        "suite": {**context.suite.model_dump(by_alias=True, mode="json"), "name": "", "title": ""},
        "model": context.model(MODEL).fingerprint,
        "data": context.data.describe(),
        "missing": missing,
    }
    key = fingerprint.key_of(identity)
    file = context.folder / "results" / f"{key}.json"

    def write() -> None:
        results, _ = assemble(context, RunLog())
        write_atomically(file, lambda path: path.write_text(results.to_json(), encoding="utf-8"))

    share([Task(key, file.is_file, write)], context.folder / "locks")
    return RunResults.read(file)
