"""A queue of work in the run folder, for workers that share nothing with the run but a file system.

A run puts one file per piece of work into `queue/RUN/todo`; whichever worker renames it into `queue/RUN/taken` has it, since
a rename succeeds for one only; the answer appears in `queue/RUN/done`. A worker holds a lease on its own name
(`robustbench_ext.leases`), so one that is gone is noticed and its work handed out again. `rbx work FOLDER` starts such a
worker anywhere, and the executor `slurm` starts them as jobs.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Executor, Future
from contextlib import suppress
from pathlib import Path
from typing import Any

from robustbench_ext.errors import RobustBenchExtError
from robustbench_ext.execute import WorkError
from robustbench_ext.executors.base import LostWorker
from robustbench_ext.files import write_atomically
from robustbench_ext.leases import Leases

QUEUE = "queue"
TODO, TAKEN, DONE, CLOSED = "todo", "taken", "done", "closed"
POLL = 0.2  # seconds between looks at a folder
_PATIENCE = 10.0  # a listing of a network file system may be that old


class QueueExecutor(Executor):
    """Hands work out through files, and collects the answers.

    Args:
        folder: the run folder; workers must see it under the same path.
        count: workers that are expected.
        say: told when workers come and go.
    """

    def __init__(self, folder: Path, count: int, say: Callable[[str], None] = lambda text: None) -> None:
        self.folder = folder.resolve() / QUEUE / uuid.uuid4().hex[:12]
        for name in (TODO, TAKEN, DONE):
            (self.folder / name).mkdir(parents=True)
        self._count, self._say = count, say
        self._leases = Leases(self.folder, run="")
        self._waiting: dict[str, Future[Any]] = {}
        self._seen: set[str] = set()
        self._lock, self._over = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    @property
    def room(self) -> int:
        """Two pieces of work for each worker."""
        return 2 * max(self._count, len(self._seen))

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Queue a call of `robustbench_ext.engine.work`, the only thing that workers do; its argument goes through JSON."""
        from robustbench_ext.engine import work

        if fn is not work or kwargs:
            raise RobustBenchExtError(
                f"the queue in a run folder carries calls of engine.work only, not of {getattr(fn, '__name__', fn)}"
            )
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()
        name = uuid.uuid4().hex
        with self._lock:
            self._waiting[name] = future
        write_atomically(
            self.folder / TODO / f"{name}.json", lambda f: f.write_text(json.dumps(args), encoding="utf-8")
        )
        return future

    def _watch(self) -> None:
        while not self._over.wait(POLL):
            try:
                self._look()
            except Exception as error:  # a network file system that is away for a moment must not end the run
                self._say(f"queue: {type(error).__name__}: {error}; looking again")
                self._over.wait(_PATIENCE)

    def _look(self) -> None:
        for file in _files(self.folder / DONE):
            with self._lock:
                future = self._waiting.pop(file.stem, None)
            if future is not None:
                _settle(future, json.loads(file.read_text(encoding="utf-8")))
            file.unlink(missing_ok=True)
        for file in _files(self.folder / TAKEN):
            name, _, worker = file.stem.partition("@")
            if worker not in self._seen:
                self._seen.add(worker)
                self._say(f"worker {worker} has joined")
            if self._leases.is_free(worker) and not (self.folder / DONE / f"{name}.json").is_file():
                with self._lock:
                    future = self._waiting.pop(name, None)
                file.unlink(missing_ok=True)
                if future is not None:
                    future.set_exception(LostWorker(f"worker {worker} is gone"))

    def give_up(self, why: str) -> None:
        """Fail all that waits: there is nobody left to do it."""
        with self._lock:
            waiting, self._waiting = self._waiting, {}
        for future in waiting.values():
            future.set_exception(LostWorker(why))

    @property
    def pending(self) -> int:
        """Pieces of work without an answer."""
        with self._lock:
            return len(self._waiting)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Close the queue: workers end after what they have in hand."""
        if self._over.is_set():
            return
        (self.folder / CLOSED).touch()
        self._over.set()
        self._thread.join()
        self.give_up("the queue was closed")
        shutil.rmtree(self.folder, ignore_errors=True)  # workers find it gone, which says the same as closed
        with suppress(OSError):
            self.folder.parent.rmdir()


def _settle(future: Future[Any], answer: dict[str, Any]) -> None:
    if "error" in answer:
        future.set_exception(WorkError(*answer["error"]))
    else:
        future.set_result(answer["facts"])


def serve(folder: Path, *, idle: float = 600.0, queue: str | None = None, say: Callable[[str], None] = print) -> int:
    """Be a worker of a run folder until its queues are closed, or nothing comes for `idle` seconds.

    Args:
        folder: the run folder; it may still be empty.
        queue: work for this queue only, and end with it.

    Returns:
        The pieces of work done.
    """
    from robustbench_ext.executors.worker import one_thread

    one_thread()
    worker = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:4]}"
    done, since = 0, time.monotonic()
    said: set[str] = set()
    while time.monotonic() - since < idle:
        root = folder.resolve() / QUEUE
        queues = [root / queue] if queue else sorted(p for p in root.glob("*") if p.is_dir()) if root.is_dir() else []
        if queue and (not queues[0].is_dir() or (queues[0] / CLOSED).exists()):
            break
        worked = 0
        for each in queues:
            if (each / CLOSED).exists():
                continue
            if each.name not in said:
                said.add(each.name)
                say(f"worker {worker} serves {each}")
            worked += _serve_once(each, worker)
        done += worked
        if worked:
            since = time.monotonic()
        else:
            time.sleep(POLL)
    say(f"worker {worker} is done: {done} pieces of work")
    return done


def _serve_once(queue: Path, worker: str) -> int:
    """All that this queue has at the moment, one by one."""
    done = 0
    with Leases(queue, run=worker).hold(worker) as mine:
        if not mine:
            return 0
        for file in sorted(_files(queue / TODO), key=_age):
            if (queue / CLOSED).exists():
                break
            taken = queue / TAKEN / f"{file.stem}@{worker}.json"
            try:
                file.rename(taken)
            except OSError:
                continue  # somebody else has it
            answer = _answer(taken)
            if not queue.is_dir():
                break  # closed and gone meanwhile; what was computed is in the records
            write_atomically(
                queue / DONE / f"{file.stem}.json",
                lambda f, said=answer: f.write_text(json.dumps(said), encoding="utf-8"),  # type: ignore[misc]
            )
            taken.unlink(missing_ok=True)
            done += 1
    return done


def _files(folder: Path) -> list[Path]:
    """The whole ones; those under temporary names are still being written."""
    return [file for file in folder.glob("*.json") if not file.name.startswith(".")]


def _age(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except OSError:
        return 0.0


def _answer(task: Path) -> dict[str, Any]:
    from robustbench_ext.engine import work

    try:
        (payload,) = json.loads(task.read_text(encoding="utf-8"))
        return {"facts": work(tuple(payload))}
    except WorkError as error:
        return {"error": list(error.args)}
    except Exception as error:  # a file that cannot be read, an answer that is no JSON
        return {"error": [f"{type(error).__name__}: {error}", "", False]}
