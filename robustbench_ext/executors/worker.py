"""What makes a process a worker: one thread, no orphan, deaf to Ctrl-C, its own device."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading

from robustbench_ext.settings import WORKER


def one_thread() -> None:
    """Compute with one thread: the order in which a multi-threaded sum adds up depends on the number of threads."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = "1"
    import torch

    if torch.get_num_threads() != 1:
        torch.set_num_threads(1)


def begin(number: int) -> None:
    """Of a process that a run has started on its own machine; `number` counts the workers from 0."""
    os.environ[WORKER] = str(number)
    one_thread()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the run's own process handles it
    threading.Thread(target=_follow, daemon=True).start()


def _follow() -> None:
    """End the worker when the run's own process is gone, however that ended (a fork server would not notice)."""
    run = multiprocessing.parent_process()
    if run is not None:
        run.join()
        os._exit(1)
