"""Running jobs that depend on each other, through the standard `concurrent.futures` interface.

Only names travel to a worker; it loads data and models itself and writes its records itself. Every worker computes
with one thread, in process too, so that the numbers do not depend on the engine: the order in which a multi-threaded
sum adds up depends on the number of threads.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import Any

from robustbench_ext.errors import ConfigError, RobustBenchExtError, unknown_name

EXECUTORS = ("auto", "serial", "local")


@dataclass(frozen=True)
class Job:
    """A picklable piece of work.

    Attributes:
        id: unique name.
        payload: what the work function is called with.
        after: ids that must be done first.
    """

    id: str
    payload: Any
    after: frozenset[str] = field(default_factory=frozenset)


@dataclass(frozen=True)
class Failure:
    """A job that raised, or could not start since one before it had."""

    job: str
    error: str
    traceback: str = ""


class SerialExecutor(Executor):
    """Runs everything at once, in this process."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Call `fn` now; the future is done when this returns."""
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


def _one_thread() -> None:
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = "1"
    import torch

    torch.set_num_threads(1)


def make_executor(name: str, jobs: int, workers: int | None = None) -> Executor:
    """An executor by name: `serial`, `local` (one spawned process per core), or `auto` (local where it helps).

    Args:
        jobs: how many jobs there are; more workers than jobs are never started.
        workers: processes of `local`; the number of usable cores by default.
    """
    if name not in EXECUTORS:
        raise ConfigError(unknown_name("executor", name, EXECUTORS))
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = min(workers or usable, jobs)
    if name == "serial" or (name == "auto" and (count < 2 or jobs < 4)):
        return SerialExecutor()
    return ProcessPoolExecutor(max(1, count), multiprocessing.get_context("spawn"), initializer=_one_thread)


def run_jobs(
    jobs: Sequence[Job],
    work: Callable[[Any], Any],
    executor: Executor,
    on_done: Callable[[Job, Any], None],
    on_failed: Callable[[Job, Failure], None],
    on_tick: Callable[[list[Job]], None] = lambda running: None,
) -> list[Failure]:
    """Run all jobs, each after those that it needs; returns the failures, in the order in which they came.

    `on_tick` is called about once a second with the jobs in flight, for progress.

    A job that raises is a failure, and so is every job that needs it; the rest goes on. A worker that dies (killed,
    out of memory) ends the run with a message; what was computed is on disk.
    """
    waiting = {job.id: job for job in jobs}
    known = set(waiting)
    done: set[str] = set()
    failed: dict[str, Failure] = {}
    running: dict[Future[Any], Job] = {}
    failures: list[Failure] = []

    def fail(job: Job, failure: Failure) -> None:
        failed[job.id] = failure
        failures.append(failure)
        on_failed(job, failure)

    # One job in flight beyond each worker keeps a pool busy; for the serial executor submission is execution.
    room = 1 if isinstance(executor, SerialExecutor) else 2 * int(getattr(executor, "_max_workers", 1))
    try:
        while waiting or running:
            for job in list(waiting.values()):
                if len(running) >= room:
                    break
                broken = [name for name in job.after if name in failed]
                if broken:
                    del waiting[job.id]
                    fail(job, Failure(job.id, f"not started: it needs '{broken[0]}', which failed"))
                elif all(name in done or name not in known for name in job.after):
                    del waiting[job.id]
                    running[executor.submit(work, job.payload)] = job
            if not running:
                continue
            finished = wait(running, timeout=1.0, return_when=FIRST_COMPLETED).done
            on_tick(list(running.values()))
            for future in finished:
                job = running.pop(future)
                error = future.exception()
                if isinstance(error, BrokenProcessPool):
                    raise RobustBenchExtError(
                        "a worker process died (killed, or out of memory). Everything computed so far is on disk: run the "
                        "same command again to go on, with --executor serial or a smaller batch_size if memory is short."
                    ) from error
                if error is None:
                    done.add(job.id)
                    on_done(job, future.result())
                else:
                    fail(job, Failure(job.id, f"{type(error).__name__}: {error}", _traceback(error)))
    except BaseException:
        for future in running:
            future.cancel()
        executor.shutdown(wait=False, cancel_futures=True)
        raise
    return failures


def _traceback(error: BaseException) -> str:
    import traceback

    return "".join(traceback.format_exception(type(error), error, error.__traceback__))
