"""Who is working on what, when several runs or machines share a run folder: one small file per piece of work.

A lease saves work; no result rests on it. Should two workers ever hold the same one, both compute the same bytes and write
them whole, so nothing is wrong and only time is lost. That is why plain files will do, on network file systems too, and why
there is neither a server nor a lock.

A lease is a file that exactly one process can create. Its holder touches it every few seconds. Whoever waits for it watches
whether the touch *changes*, measured on its own monotonic clock: clocks of different machines are never compared, and one
that jumps does no harm. On the same machine a holder that is gone is seen at once.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

FOLDER = "leases"
BEAT = 5.0  # seconds between touches
# Seconds without a touch after which a holder on another machine counts as gone. Network file systems may show a change as
# late as a minute after it was made.
STALE = 120.0


@dataclass(frozen=True)
class Holder:
    """Who holds a lease.

    Attributes:
        run: the run that it works for; `token`: this very lease.
        machine: of the process, told apart also from other containers; host: its name, for messages.
        pid, born: of the process. A process of the same number that was born at another time is another one.
    """

    name: str
    run: str
    token: str
    machine: str
    host: str
    pid: int
    born: str

    @property
    def is_gone(self) -> bool:
        """Whether the holder is known to be dead; False where it cannot be known from here."""
        if self.machine != _machine() or os.name != "posix":
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except OSError:
            return False  # it is there and is somebody else's
        state, born = _stat(self.pid)
        # One that is over and waits for its parent to ask how it ended (in a container perhaps for ever) is gone too.
        return born != self.born or state in ("Z", "X")

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class Leases:
    """The leases of one run folder, as one run sees them.

    Args:
        folder: the run folder.
        run: a name of this run of it. A lease of the same run is taken over without waiting: a run gives a piece of work to
            one worker at a time, so the one that held it is lost.
    """

    def __init__(self, folder: Path, run: str, stale: float = STALE, beat: float = BEAT) -> None:
        self.folder, self.run = folder / FOLDER, run
        self._stale, self._beat = stale, beat
        self._watched: dict[str, tuple[tuple[int, str], float]] = {}

    def path(self, name: str) -> Path:
        """The file of a lease."""
        return self.folder / f"{hashlib.sha256(name.encode()).hexdigest()[:24]}.json"

    @contextmanager
    def hold(self, name: str) -> Iterator[bool]:
        """Hold the lease inside the block, and keep it touched; gives False, and holds nothing, where somebody else does."""
        holder = Holder(
            name, self.run, uuid.uuid4().hex, _machine(), socket.gethostname(), os.getpid(), _born(os.getpid())
        )
        if not self._take(holder):
            yield False
            return
        over = threading.Event()
        beat = threading.Thread(target=self._touch, args=(holder, over), daemon=True)
        beat.start()
        try:
            yield True
        finally:
            over.set()
            beat.join()
            self._drop(holder)

    def holder(self, name: str) -> Holder | None:
        """Who holds a lease; None for nobody, or where the file cannot be read at the moment."""
        try:
            return Holder(**json.loads(self.path(name).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def is_free(self, name: str) -> bool:
        """Whether nobody works on that any more. A lease whose holder is gone is removed.

        To be asked again and again by whoever waits: a holder on another machine counts as gone once its lease has not been
        touched for a while during which this was asked.
        """
        path = self.path(name)
        try:
            touched = path.stat().st_mtime_ns
        except FileNotFoundError:
            self._watched.pop(name, None)
            return True
        except OSError:
            return False
        holder = self.holder(name)
        sign = (touched, holder.token if holder is not None else "")
        seen, since = self._watched.get(name, (None, 0.0))
        now = time.monotonic()
        if sign != seen:
            self._watched[name] = (sign, now)
            since = now
        if (holder is not None and holder.is_gone) or now - since >= self._stale:
            self._break(path, holder)
            self._watched.pop(name, None)
            return True
        return False

    def clear(self) -> bool:
        """Remove the folder, if nobody holds anything; whether that is so."""
        with suppress(OSError):
            self.folder.rmdir()
        return not self.folder.exists()

    # Files -----------------------------------------------------------------------------------------------------------

    def _take(self, holder: Holder) -> bool:
        path = self.path(holder.name)
        for _ in range(2):
            if self._create(path, holder):
                return True
            current = self.holder(holder.name)
            if current is None or not (current.run == self.run or current.is_gone):
                return False
            self._break(path, current)
        return False

    def _create(self, path: Path, holder: Holder) -> bool:
        """Create the file with its content, or find that it is there: one step, so that nobody sees half of it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=".lease-", dir=self.folder)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(asdict(holder), file)
        try:
            os.link(name, path)
        except FileExistsError:
            return False
        except OSError:  # a file system without links
            try:
                with path.open("x", encoding="utf-8") as file:
                    json.dump(asdict(holder), file)
            except FileExistsError:
                return False
        finally:
            Path(name).unlink(missing_ok=True)
        return True

    def _break(self, path: Path, holder: Holder | None) -> None:
        """Remove a lease, unless it is no longer the one that was looked at: renaming shows which one it was."""
        away = path.with_name(f".gone-{uuid.uuid4().hex}")
        try:
            path.rename(away)
        except OSError:
            return
        try:
            found = json.loads(away.read_text(encoding="utf-8")).get("token")
        except (OSError, ValueError, AttributeError):
            found = None
        if holder is not None and found is not None and found != holder.token:
            with suppress(OSError):  # somebody else was quicker and holds it now: give it back
                os.link(away, path)
        away.unlink(missing_ok=True)

    def _drop(self, holder: Holder) -> None:
        current = self.holder(holder.name)
        if current is not None and current.token == holder.token:
            self.path(holder.name).unlink(missing_ok=True)

    def _touch(self, holder: Holder, over: threading.Event) -> None:
        path = self.path(holder.name)
        while not over.wait(self._beat):
            current = self.holder(holder.name)
            if current is not None and current.token != holder.token:
                return  # taken over, since this process looked dead; it finishes all the same
            with suppress(OSError):
                os.utime(path)


def _machine() -> str:
    """Tells machines apart, and containers in which the same process numbers mean other processes."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
    with suppress(OSError):
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return "|".join(parts)


def _born(pid: int) -> str:
    """When a process was started, in ticks since the machine's; empty where that cannot be read."""
    return _stat(pid)[1]


def _stat(pid: int) -> tuple[str, str]:
    """A process's state, one letter, and when it was started; both empty where they cannot be read."""
    try:
        # The second field is the name in brackets, which may hold anything; the start time is the 20th after it.
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return fields[0], fields[19]
    except (OSError, IndexError):
        return "", ""
