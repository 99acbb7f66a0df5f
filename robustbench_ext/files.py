"""Files that are either whole or not there."""

from __future__ import annotations

import errno
import hashlib
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Call `write` on a temporary name beside `path`, flush it to disk, then rename it.

    A process that is killed at any moment leaves the old file or the new one, never half of one. The temporary name
    keeps the suffix, since some writers add their own to names without it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_temporary(*folders: Path) -> None:
    """Remove what `write_atomically` could not, since its process was killed; nobody may be writing there meanwhile."""
    for folder in folders:
        for file in folder.glob(".*-*"):
            file.unlink(missing_ok=True)


def seal(file: Path) -> dict[str, Any]:
    """What tells a file that was damaged later from the one that was written: its size and SHA-256."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return {"bytes": file.stat().st_size, "sha256": digest.hexdigest()}


def fits(file: Path, sealed: Mapping[str, Any]) -> bool:
    """Whether a file is there and is the one that was sealed; what a damaged note says of it may be anything."""
    try:
        return bool(file.stat().st_size == sealed["bytes"] and seal(file)["sha256"] == sealed["sha256"])
    except (OSError, KeyError, TypeError):
        return False


_FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}


def is_disk_full(error: BaseException) -> bool:
    """Whether an error, or one that it came from, says that there is no room left (a full disk, a used up quota).

    Libraries that are not written in Python say so in words only.
    """
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        if isinstance(current, OSError) and current.errno in _FULL:
            return True
        if any(text in str(current) for text in ("No space left on device", "Disk quota exceeded", "(os error 28)")):
            return True
        current = current.__cause__ or current.__context__
    return False
