"""Work on a Dask cluster: one that is there, or a local one made for the run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future
from typing import Any

import yaml

from robustbench_ext import __version__
from robustbench_ext.errors import ConfigError, MissingExtraError
from robustbench_ext.executors.base import LostWorker


class DaskExecutor(Executor):
    """The workers of a Dask cluster; each needs this package in this version and the run folder under the same path.

    Args:
        address: `HOST:PORT` of a scheduler; empty for a cluster of processes on this machine.
        workers: of a local cluster.
        options: of `distributed.LocalCluster`, or of `distributed.Client` where there is an address.
    """

    def __init__(self, address: str, workers: int, options: Mapping[str, str]) -> None:
        try:
            from distributed import Client, LocalCluster
        except ImportError:
            raise MissingExtraError("executor dask: pip install 'robustbench-ext[dask]'") from None
        given = {name: yaml.safe_load(value) for name, value in options.items()}
        self._cluster: Any = None
        try:
            if address:
                self._client = Client(f"tcp://{address}", **{"timeout": 20, **given})
            else:
                # One thread each: see `robustbench_ext.executors.worker`.
                own = {"n_workers": workers, "threads_per_worker": 1, "dashboard_address": None, **given}
                self._cluster = LocalCluster(**own)
                self._client = Client(self._cluster)
        except (OSError, TypeError, ValueError) as error:
            where = f"dask://{address}" if address else "dask"
            raise ConfigError(
                f"executor {where}: {type(error).__name__}: {error}. Expected the address of a running scheduler, and options "
                f"that Dask knows"
            ) from error
        if address:
            self._compare_versions(address)

    def _compare_versions(self, address: str) -> None:
        """Workers of another version would write records under keys of their own."""
        try:
            found = self._client.run(_version)
        except Exception as error:
            self._client.close()
            raise ConfigError(
                f"executor dask://{address}: its workers cannot import robustbench_ext ({type(error).__name__}: {error}). "
                f"Install the same version there."
            ) from error
        others = {worker: version for worker, version in found.items() if version != __version__}
        if others or not found:
            self._client.close()
            said = ", ".join(f"{worker} has {version}" for worker, version in others.items()) or "there are no workers"
            raise ConfigError(f"executor dask://{address}: {said}; this is robustbench-ext {__version__}")

    @property
    def room(self) -> int:
        """Two pieces of work for each worker; workers come and go."""
        return 2 * max(1, len(self._client.scheduler_info(n_workers=-1)["workers"]))

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Send a call to the cluster."""
        future: Future[Any] = Future()
        # Not pure: the same call may be needed again, once what it waits for is there.
        sent = self._client.submit(fn, *args, **kwargs, pure=False)
        sent.add_done_callback(lambda done: _hand_over(done, future))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Leave the cluster; a local one ends."""
        self._client.close()
        if self._cluster is not None:
            self._cluster.close()


def _version() -> str:
    return __version__


def _hand_over(done: Any, future: Future[Any]) -> None:
    from distributed import KilledWorker

    if not future.set_running_or_notify_cancel():
        return
    try:
        if done.cancelled():
            raise LostWorker("the cluster gave the work up")
        error = done.exception()
    except Exception as lost:  # the connection to the scheduler is gone
        error = lost if isinstance(lost, LostWorker) else LostWorker(str(lost))
    if isinstance(error, KilledWorker):
        error = LostWorker(f"the workers that had it died: {error}")
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(done.result())
