"""Running jobs that depend on each other, through the standard `concurrent.futures` interface.

Only names travel to a worker; it loads data and models itself and writes its records itself. Every worker computes
with one thread, in process too, so that the numbers do not depend on the engine: the order in which a multi-threaded
sum adds up depends on the number of threads.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import Any

from robustbench_ext.errors import StoppedError
from robustbench_ext.executors import LostWorker, room_of

NOT_STARTED = "not started"
HELD = "held"  # in what a job gives back: another run is at it
LOSSES = 3  # workers that a job may lose without getting on before it is given up
LOOK = 0.5  # seconds between looks at what other runs are doing


@dataclass(frozen=True)
class Job:
    """A picklable piece of work.

    Attributes:
        id: unique; never shown.
        title: what progress and failures call it.
        payload: what the work function is called with.
        after: ids that must be done first.
        cost: how long it takes beside the others, in any unit; where several run at once, long ones are started first.
    """

    id: str
    title: str
    payload: Any
    after: frozenset[str] = field(default_factory=frozenset)
    cost: float = 0.0


@dataclass(frozen=True)
class Failure:
    """A job that raised, or could not start since one before it had."""

    job: str
    error: str
    traceback: str = ""


class WorkError(Exception):
    """What went wrong in a job, as text: a model's own exceptions need not survive the way between processes.

    Args:
        message: one line; trace: the text of the traceback.
        fatal: no other job could do better (the disk is full), so the run stops.
    """

    def __init__(self, message: str, trace: str = "", fatal: bool = False) -> None:
        super().__init__(message, trace, fatal)
        self.message, self.trace, self.fatal = message, trace, fatal


@dataclass
class Hooks:
    """What the owner of the jobs is asked and told.

    Attributes:
        done: a job came back; it may answer with a failure: then the job counts as failed after all.
        failed: a job raised, lost its workers, or cannot start.
        lost: a job lost its worker and is given to another one.
        tick: about once a second, with the jobs in flight.
        is_free: whether another run that was at this job has ended it, or is gone.
        progress: anything that changes when an unfinished job has got on, such as the time of its checkpoint.
    """

    done: Callable[[Job, Any], Failure | None]
    failed: Callable[[Job, Failure], None]
    lost: Callable[[Job, str], None] = lambda job, why: None
    tick: Callable[[list[Job]], None] = lambda running: None
    is_free: Callable[[Job], bool] = lambda job: True
    progress: Callable[[Job], Any] = lambda job: None


def run_jobs(jobs: Sequence[Job], work: Callable[[Any], Any], executor: Executor, hooks: Hooks) -> list[Failure]:
    """Run all jobs, each after those that it needs; returns the failures, in the order in which they came.

    A job that raises is a failure, and so is every job that needs it; the rest goes on. A job whose worker dies is given to
    another one; after three that died without getting on, the job is taken for the cause, and is a failure too. A job that
    another run is at (its result says `HELD`) is put aside until that run is through with it.

    Raises:
        StoppedError: nothing can go on: the disk is full, or a foreign pool of processes is broken.
    """
    return _Running(jobs, work, executor, hooks).run()


class _Running:
    def __init__(self, jobs: Sequence[Job], work: Callable[[Any], Any], executor: Executor, hooks: Hooks) -> None:
        self._work, self._executor, self._hooks = work, executor, hooks
        if room_of(executor) > 1:
            jobs = sorted(jobs, key=lambda job: -job.cost)
        self._waiting = {job.id: job for job in jobs}
        self._known = set(self._waiting)
        self._aside: dict[str, Job] = {}
        self._running: dict[Future[Any], Job] = {}
        self._done: set[str] = set()
        self._failed: dict[str, Failure] = {}
        self._losses: dict[str, list[Any]] = {}

    def run(self) -> list[Failure]:
        try:
            while self._waiting or self._running or self._aside:
                self._start()
                if self._running:
                    finished = wait(self._running, timeout=1.0, return_when=FIRST_COMPLETED).done
                    self._hooks.tick(list(self._running.values()))
                    for future in finished:
                        self._settle(self._running.pop(future), future)
                elif self._aside:
                    self._hooks.tick([])
                    time.sleep(LOOK)
                for job in [job for job in self._aside.values() if self._hooks.is_free(job)]:
                    self._again(self._aside.pop(job.id))
        except BaseException:
            for future in self._running:
                future.cancel()
            self._executor.shutdown(wait=False, cancel_futures=True)
            raise
        return list(self._failed.values())

    def _start(self) -> None:
        """Give out what can be started, as far as there is room."""
        room = room_of(self._executor)
        for job in list(self._waiting.values()):
            if len(self._running) >= room:
                break
            broken = [name for name in job.after if name in self._failed]
            if broken:
                del self._waiting[job.id]
                self._fail(
                    job, Failure(job.title, f"{NOT_STARTED}: it needs '{self._failed[broken[0]].job}', which failed")
                )
            elif all(name in self._done or name not in self._known for name in job.after):
                del self._waiting[job.id]
                if room == 1:  # `submit` may be the work itself
                    self._hooks.tick([job])
                self._running[self._executor.submit(self._work, job.payload)] = job

    def _settle(self, job: Job, future: Future[Any]) -> None:
        error = future.exception()
        if error is None:
            facts = future.result()
            if isinstance(facts, dict) and facts.get(HELD):
                self._aside[job.id] = job
                return
            refusal = self._hooks.done(job, facts)
            if refusal is None:
                self._done.add(job.id)
            else:
                self._fail(job, refusal)
        elif isinstance(error, LostWorker):
            self._lose(job, str(error))
        elif isinstance(error, BrokenProcessPool):
            titles = "; ".join(j.title for j in [job, *self._running.values()])
            raise StoppedError(
                f"a process of the executor died (killed, out of memory, or the model ended it) during one of: {titles}. "
                f"Everything computed so far is on disk: run the same again to go on, with the executor 'local' or 'serial', "
                f"or a smaller batch_size if memory is short."
            ) from error
        elif isinstance(error, WorkError):
            if error.fatal:
                raise StoppedError(error.message) from error
            self._fail(job, Failure(job.title, error.message, error.trace))
        else:  # the executor's own
            text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
            self._fail(job, Failure(job.title, f"{type(error).__name__}: {error}", text))

    def _lose(self, job: Job, why: str) -> None:
        stamps = self._losses.setdefault(job.id, [])
        stamp = self._hooks.progress(job)
        if stamps and stamps[-1] != stamp:
            stamps.clear()  # it got on between the two losses: not the job's fault
        stamps.append(stamp)
        if len(stamps) < LOSSES:
            self._hooks.lost(job, why)
            self._again(job)
        else:
            self._fail(
                job,
                Failure(
                    job.title,
                    f"{LOSSES} workers died while they had this work, one after the other; the last: {why}. If memory is "
                    f"short, use fewer workers or a smaller batch_size; if the model ends its process, see what it does.",
                ),
            )

    def _again(self, job: Job) -> None:
        """Before all others: it has waited longest."""
        self._waiting = {job.id: job, **self._waiting}

    def _fail(self, job: Job, failure: Failure) -> None:
        self._failed[job.id] = failure
        self._hooks.failed(job, failure)
