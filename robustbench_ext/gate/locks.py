"""Each piece of work done once, by whichever process comes first. Locks are files; stale ones are taken over."""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

BEAT = 2.0  # seconds between the signs of life of who holds a lock
STALE = 60.0  # seconds without one, after which it counts as dead
PAUSE = 0.05


class Lock:
    """A file that exists while somebody works.

    It holds the host and the process; its time of change is renewed while that process lives. A lock is stale where its
    process is known to be dead (same host), or where it has not been renewed for `STALE` seconds (any host).
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def acquire(self) -> bool:
        """Take the lock if nobody holds it; at once."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for _ in range(2):
            try:
                handle = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
            except (FileExistsError, PermissionError):  # Windows refuses while the file is being removed
                if not self._is_stale():
                    return False
                # Of several who see a stale lock one succeeds in moving it away; a rename is atomic.
                grave = self.path.with_name(f"{self.path.name}.{uuid.uuid4().hex}")
                try:
                    self.path.rename(grave)
                    grave.unlink(missing_ok=True)
                except OSError:
                    return False
                continue
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(f"{socket.gethostname()} {os.getpid()}")
            return True
        return False

    def release(self) -> None:
        """Give it back."""
        self.path.unlink(missing_ok=True)

    def _is_stale(self) -> bool:
        try:
            age = time.time() - self.path.stat().st_mtime
            host, _, process = self.path.read_text(encoding="utf-8").partition(" ")
        except OSError:
            return False  # given back a moment ago: the next attempt will tell
        if age > STALE:
            return True
        return host == socket.gethostname() and process.isdigit() and not _is_alive(int(process))

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Renew the lock while the work goes on, then give it back."""
        done = threading.Event()

        def beat() -> None:
            while not done.wait(BEAT):
                try:
                    os.utime(self.path)
                except OSError:
                    return

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            self.release()


def _is_alive(process: int) -> bool:
    if os.name == "nt":
        return True  # there, signal 0 would end it; its signs of life decide
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


@dataclass(frozen=True)
class Task:
    """A piece of work: `key` names it for all processes, `is_done` looks for its result, `work` makes it."""

    key: str
    is_done: Callable[[], bool]
    work: Callable[[], object]


def share(tasks: Sequence[Task], folder: Path, late: Callable[[], bool] = lambda: False) -> list[Task]:
    """Do all tasks, each in one process only, whichever that is; what others are doing is left to them and waited for.

    Args:
        folder: of the locks.
        late: asked before every task; once it is true nothing more is begun.

    Returns:
        The tasks that are not done, where it got late.
    """
    waiting = list(tasks)
    while waiting:
        waiting = [task for task in waiting if not task.is_done()]
        began = False
        for task in waiting:
            if late():
                return [task for task in waiting if not task.is_done()]
            lock = Lock(folder / f"{task.key}.lock")
            if not lock.acquire():
                continue
            began = True
            with lock.kept():
                if not task.is_done():
                    task.work()
        if waiting and not began:
            time.sleep(PAUSE)
    return []
