"""Running jobs that depend on each other, through the standard `concurrent.futures` interface.

Only names travel to a worker; it loads data and models itself and writes its records itself. Every worker computes
with one thread, in process too, so that the numbers do not depend on the engine: the order in which a multi-threaded
sum adds up depends on the number of threads.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.context
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import Any

from robustbench_ext.errors import ConfigError, RobustBenchExtError, unknown_name

EXECUTORS = ("auto", "serial", "local")
NOT_STARTED = "not started"


@dataclass(frozen=True)
class Job:
    """A picklable piece of work.

    Attributes:
        id: unique; never shown.
        title: what progress and failures call it.
        payload: what the work function is called with.
        after: ids that must be done first.
    """

    id: str
    title: str
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


def _worker() -> None:
    """Make this process a worker: one thread, deaf to Ctrl-C (the run's own process handles it), no orphan."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = "1"
    import torch

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_follow, daemon=True).start()


def _follow() -> None:
    """End the worker when the run's own process is gone, however that ended (the fork server would not notice)."""
    run = multiprocessing.parent_process()
    if run is not None:
        run.join()
        os._exit(1)


def _start_method(long: bool) -> multiprocessing.context.BaseContext:
    """Workers forked from a clean server that has imported torch once: its memory is shared and they start at once.

    The server has used neither torch nor CUDA when it forks, so this is as safe as spawning. Where there is no fork
    server (Windows), workers are spawned.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    # Constructing a torch optimizer imports torch._dynamo (150 MB): once in the server, not once in every worker.
    training = ["torch._dynamo", "defenses.trainer"] if long else []
    context.set_forkserver_preload(["torch", "robustbench_ext.engine", *training])
    return context


def make_executor(name: str, jobs: int, workers: int | None = None, long: bool = False) -> Executor:
    """An executor by name: `serial`, `local` (one process per core), or `auto` (local where it helps).

    Args:
        jobs: how many jobs there are; more workers than jobs are never started.
        long: whether the jobs are long (training); a few short ones are not worth starting processes for.
        workers: processes of `local`; the number of usable cores by default.
    """
    if name not in EXECUTORS:
        raise ConfigError(unknown_name("executor", name, EXECUTORS))
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = min(workers or usable, jobs)
    if name == "serial" or (name == "auto" and (usable < 2 or (jobs < 4 and not long))):
        return SerialExecutor()
    return ProcessPoolExecutor(max(1, count), _start_method(long), initializer=_worker)


def run_jobs(
    jobs: Sequence[Job],
    work: Callable[[Any], Any],
    executor: Executor,
    on_done: Callable[[Job, Any], Failure | None],
    on_failed: Callable[[Job, Failure], None],
    on_tick: Callable[[list[Job]], None] = lambda running: None,
) -> list[Failure]:
    """Run all jobs, each after those that it needs; returns the failures, in the order in which they came.

    `on_done` may answer with a failure: then the job counts as failed after all. `on_tick` is called about once a
    second with the jobs in flight, for progress.

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
                    fail(job, Failure(job.title, f"{NOT_STARTED}: it needs '{failed[broken[0]].job}', which failed"))
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
                        f"a worker process died (killed, out of memory, or the model ended it) during one of: "
                        f"{'; '.join(j.title for j in [job, *running.values()])}. Everything computed so far is on disk: run "
                        f"the same command again to go on, with --executor serial or a smaller batch_size if memory is short."
                    ) from error
                if error is None:
                    refusal = on_done(job, future.result())
                    if refusal is None:
                        done.add(job.id)
                    else:
                        fail(job, refusal)
                else:
                    # A WorkError brings its message and the text of its traceback; anything else is the executor's own.
                    message = str(error.args[0]) if len(error.args) == 2 else f"{type(error).__name__}: {error}"
                    fail(job, Failure(job.title, message, _traceback(error)))
    except BaseException:
        for future in running:
            future.cancel()
        executor.shutdown(wait=False, cancel_futures=True)
        raise
    return failures


def _traceback(error: BaseException) -> str:
    if len(error.args) == 2 and isinstance(error.args[1], str):
        return error.args[1]  # a WorkError brings the text of the traceback from its own process
    import traceback

    return "".join(traceback.format_exception(type(error), error, error.__traceback__))
