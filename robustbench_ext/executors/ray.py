"""Work on a Ray cluster: one that is there, or one of this machine made for the run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future
from typing import Any

import yaml

from robustbench_ext.errors import ConfigError, MissingExtraError
from robustbench_ext.executors.base import LostWorker


class RayExecutor(Executor):
    """Ray tasks of one core each (and one GPU, where the work is done on GPUs).

    Args:
        address: `HOST:PORT` of a Ray client server, `auto` for the cluster that this machine belongs to; empty for a local one.
        workers: cores of a local one.
        options: of `ray.init`.
    """

    def __init__(self, address: str, workers: int, options: Mapping[str, str]) -> None:
        try:
            import ray
        except ImportError:
            raise MissingExtraError("executor ray: pip install 'robustbench-ext[ray]'") from None
        from robustbench_ext.device import gpus

        self._ray, self._count = ray, workers
        self._joined = ray.is_initialized()  # somebody else's: not ours to end
        given = {name: yaml.safe_load(value) for name, value in options.items()}
        if address:
            given["address"] = address if address == "auto" else f"ray://{address}"
        else:
            given = {"num_cpus": workers, "include_dashboard": False, **given}
        try:
            ray.init(ignore_reinit_error=True, logging_level=logging.WARNING, log_to_driver=False, **given)
        except (OSError, TypeError, ValueError, RuntimeError) as error:
            raise ConfigError(
                f"executor ray: {type(error).__name__}: {error}. Expected ray, ray:auto or ray://HOST:PORT of a running "
                f"cluster, and options that ray.init knows"
            ) from error
        # Lost work is given out again by the run, which knows how often it was lost, and not by Ray.
        self._options: dict[str, Any] = {"num_cpus": 1, "max_retries": 0, **({"num_gpus": 1} if gpus() else {})}

    @property
    def room(self) -> int:
        """Two pieces of work for each core of the cluster."""
        return 2 * max(1, int(self._ray.cluster_resources().get("CPU", self._count)))

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Send a call to the cluster."""
        future: Future[Any] = Future()
        sent = self._ray.remote(**self._options)(fn).remote(*args, **kwargs).future()
        sent.add_done_callback(lambda done: self._hand_over(done, future))
        return future

    def _hand_over(self, done: Future[Any], future: Future[Any]) -> None:
        if not future.set_running_or_notify_cancel():
            return
        error = done.exception()
        if error is None:
            future.set_result(done.result())
            return
        errors = self._ray.exceptions
        lost = (errors.WorkerCrashedError, errors.NodeDiedError, errors.OutOfMemoryError, errors.RaySystemError)
        if isinstance(error, lost):
            future.set_exception(LostWorker(f"{type(error).__name__}: {error}"))
        elif isinstance(error, errors.RayTaskError):
            future.set_exception(error.cause or error)  # what the work itself raised
        else:
            future.set_exception(error)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Leave the cluster; a local one ends."""
        if not self._joined:
            self._ray.shutdown()
