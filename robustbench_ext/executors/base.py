"""Executors by name. Each gives futures that hold a result, what the work raised, or `LostWorker`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

from robustbench_ext.errors import ConfigError, unknown_name

EXECUTORS = ("auto", "serial", "local", "dask", "slurm", "ray", "queue")
CLUSTERS = ("dask", "slurm", "ray", "queue")  # joined once for a whole run


class LostWorker(Exception):  # noqa: N818 - it says what happened; nobody outside the engine meets it
    """The worker that had this work is gone (killed, out of memory, its machine is down); the work may be given to another."""


class SerialExecutor(Executor):
    """Runs everything at once, in this process."""

    room = 1

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Call `fn` now; the future is done when this returns."""
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


def room_of(executor: Executor) -> int:
    """How many jobs to keep with an executor at a time: enough that no worker waits, few enough that the order still counts."""
    room = getattr(executor, "room", None)
    return int(room) if room is not None else 2 * int(getattr(executor, "_max_workers", 1))


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def make_executor(
    name: str,
    jobs: int,
    workers: int | None = None,
    long: bool = False,
    *,
    folder: Path | None = None,
    options: Mapping[str, str] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Executor:
    """An executor by name.

    Args:
        name: `serial`; `local`, processes of this machine; `auto`, local where it helps; `dask`, a local cluster, or
            `dask://HOST:PORT`; `slurm`, or `slurm:local` and `slurm:debug` for submitit's stand-ins; `ray`, or `ray://HOST:PORT`,
            or `ray:auto` for the cluster that this machine belongs to; `queue`, workers that somebody starts with `rbx work`.
        jobs: how many jobs there are; more processes of this machine than jobs are never started.
        workers: by default one per GPU where the work is done on GPUs, otherwise one per usable core of this machine; on a
            cluster that is there already, those that it has.
        long: whether the jobs are long (training); a few short ones are not worth starting processes for.
        folder: the run folder, which executors without a channel of their own work through.
        options: of the executor: `slurm` passes them on to submitit (`slurm_partition=gpu`, `timeout_min=240`), `dask` to its
            local cluster, `ray` to `ray.init`.
        say: told what is worth knowing while it works.

    Raises:
        ConfigError: no such executor, options that it does not take, a cluster that does not answer.
        MissingExtraError: its package is not installed.
    """
    kind, _, where = name.partition(":")
    address = where.removeprefix("//")
    if kind not in EXECUTORS:
        raise ConfigError(unknown_name("executor", name, EXECUTORS))
    if where and kind not in ("dask", "slurm", "ray"):
        raise ConfigError(f"executor '{name}': {kind} takes no address")
    if options and kind in ("serial", "local", "auto", "queue"):
        raise ConfigError(
            f"executor {kind} takes no options, got {', '.join(options)}. They belong to dask, slurm and ray; the number of "
            f"processes is --workers."
        )
    given = dict(options or {})
    if kind not in CLUSTERS:
        from robustbench_ext.device import current

        current()  # a device that is not here is one error now, not one for each job
    count = workers or default_workers()
    if kind not in CLUSTERS:
        count = max(1, min(count, jobs))
    if kind == "serial" or (kind == "auto" and (count < 2 or (jobs < 4 and not long))):
        return SerialExecutor()
    if kind in ("local", "auto"):
        from robustbench_ext.executors.local import LocalExecutor

        return LocalExecutor(count, long, say)
    if kind == "dask":
        from robustbench_ext.executors.dask import DaskExecutor

        return DaskExecutor(address, count, given)
    if kind == "ray":
        from robustbench_ext.executors.ray import RayExecutor

        return RayExecutor(address, count, given)
    if folder is None:
        raise ConfigError(f"executor {kind} works through the run folder; there is none")
    if kind == "queue":
        from robustbench_ext.executors.queue import QueueExecutor

        say(f"waiting for workers: start them with `rbx work {folder}`, as many as you like")
        return QueueExecutor(folder, count, say)
    from robustbench_ext.executors.slurm import SlurmExecutor

    return SlurmExecutor(folder, where or "slurm", count, given, say)


def default_workers() -> int:
    """One per GPU where the work is done on GPUs, otherwise one per usable core."""
    from robustbench_ext.device import gpus

    return gpus() or usable_cores()
