"""Processes of this machine, one pool of one process each: a process that dies takes nothing with it but its own work."""

from __future__ import annotations

import multiprocessing
import multiprocessing.context
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import Any

from robustbench_ext.executors.base import LostWorker
from robustbench_ext.executors.worker import begin

_PATIENCE = 5.0  # seconds for a process that was told to end


class LocalExecutor(Executor):
    """Several processes, each with one thread (and one GPU, where the work is done on GPUs).

    The standard pool of several processes is broken as a whole when one of them dies, and does not say whose work killed
    it. Here the future of the lost work fails with `LostWorker`, the process is started anew, and the others go on.

    Args:
        count: processes; each is started with the first work that it gets.
        long: whether the work is training, whose imports are then made once for all processes.
    """

    def __init__(self, count: int, long: bool = False, say: Callable[[str], None] = lambda text: None) -> None:
        self._context, self._say = _start_method(long), say
        self._pools: list[ProcessPoolExecutor | None] = [None] * count
        self._idle = deque(range(count))
        self._queue: deque[tuple[Future[Any], Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = deque()
        self._lock = threading.RLock()
        self._closed = False

    @property
    def room(self) -> int:
        """One piece of work waits beside those in progress, so that no process has to."""
        return len(self._pools) + 1

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Queue a call; pickled, so only names and numbers should travel."""
        future: Future[Any] = Future()
        with self._lock:
            if self._closed:
                raise RuntimeError("this executor has been shut down")
            self._queue.append((future, fn, args, kwargs))
            self._next()
        return future

    def _next(self) -> None:
        """Give waiting work to idle processes; called with the lock held."""
        while self._queue and self._idle and not self._closed:
            future, fn, args, kwargs = self._queue.popleft()
            if not future.set_running_or_notify_cancel():
                continue
            number = self._idle.popleft()
            pool = self._pools[number]
            try:
                if pool is None:
                    pool = self._start(number)
                inner = pool.submit(fn, *args, **kwargs)
            except BrokenProcessPool:  # it died while it had nothing to do
                pool = self._start(number)
                inner = pool.submit(fn, *args, **kwargs)
            inner.add_done_callback(partial(self._done, number, future))

    def _start(self, number: int) -> ProcessPoolExecutor:
        pool = ProcessPoolExecutor(1, self._context, initializer=begin, initargs=(number,))
        self._pools[number] = pool
        return pool

    def _done(self, number: int, future: Future[Any], inner: Future[Any]) -> None:
        """Runs in the pool's own thread when a piece of work is over."""
        with self._lock:
            error = LostWorker("the work was given up") if inner.cancelled() else inner.exception()
            if isinstance(error, BrokenProcessPool):
                pool, self._pools[number] = self._pools[number], None
                if pool is not None:
                    pool.shutdown(wait=False)
                error = LostWorker("its process died (killed, out of memory, or the model ended it)")
            self._idle.append(number)
            self._next()
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(inner.result())

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End the processes, after the work in progress, or at once: `shutdown(wait=False, cancel_futures=True)`.

        At once is safe: records are written whole or not at all.
        """
        with self._lock:
            self._closed = True
            if cancel_futures:
                for future, *_ in self._queue:
                    future.cancel()
                self._queue.clear()
            pools = [pool for pool in self._pools if pool is not None]
        for pool in pools:
            processes = list((getattr(pool, "_processes", None) or {}).values())
            pool.shutdown(wait=wait, cancel_futures=cancel_futures)
            if cancel_futures and not wait:
                for process in processes:
                    process.terminate()
                for process in processes:  # what they had begun to write is swept up next, and must not come back
                    process.join(_PATIENCE)


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
    context.set_forkserver_preload(["robustbench_ext.executors.server", "torch", "robustbench_ext.engine", *training])
    return context
