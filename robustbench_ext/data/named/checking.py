"""Are these the published bytes? Checksums, verified once and remembered; and what people save in the place of a file.

What was found out is remembered in a cache folder ($RBX_CACHE, by default `robustbench-ext` in $XDG_CACHE_HOME or
~/.cache), under the file's path, size and time of change: later loads are instant, and a changed file is looked at
again. Where nothing can be written, everything is found out anew each time, and nothing else happens.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from pathlib import Path

from robustbench_ext.errors import DataError
from robustbench_ext.files import write_atomically

CACHE = "RBX_CACHE"
_BLOCK = 1 << 20
_LFS = b"version https://git-lfs"


def cache_folder() -> Path:
    """Where small results about files on this machine are kept.

    Raises:
        RuntimeError: none is named, and the user has no home.
    """
    if os.environ.get(CACHE):
        return Path(os.environ[CACHE]).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "robustbench-ext"


def recall(key: str) -> str | None:
    """What was remembered under a key; None where nothing was."""
    with suppress(OSError, RuntimeError, UnicodeDecodeError):
        return _place(key).read_text(encoding="utf-8")
    return None


def remember(key: str, value: str) -> None:
    """Keep a short text under a key, if that can be done."""
    with suppress(OSError, RuntimeError):
        write_atomically(_place(key), lambda file: file.write_text(value, encoding="utf-8"))


def _place(key: str) -> Path:
    return cache_folder() / "data" / hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()[:32]


def stamp(file: Path) -> str:
    """What tells a file from a changed one without reading it."""
    status = file.stat()
    return f"{file.resolve()}|{status.st_size}|{status.st_mtime_ns}"


def verify(file: Path, md5: str, what: str) -> None:
    """Compare a file with its published MD5, unless that was done before and the file is as it was.

    Args:
        what: the dataset, for the error.

    Raises:
        DataError: it differs; the message says from what, and what the file looks like instead.
    """
    key = f"md5|{stamp(file)}"
    found = recall(key)
    if found != md5:
        with file.open("rb") as stream:
            digest = hashlib.md5(usedforsecurity=False)
            while block := stream.read(_BLOCK):
                digest.update(block)
        found = digest.hexdigest()
        remember(key, found)
    if found != md5:
        raise DataError(mismatch(file, md5, found, what))


def mismatch(file: Path, expected: str, found: str, what: str) -> str:
    """The sentence about a file that is not the published one."""
    kind = mistaken(file)
    cause = f"It is {kind}." if kind else "The download was cut short or changed, or it is another version."
    return (
        f"{file}: MD5 {found} ({file.stat().st_size:,} bytes), expected {expected} as published for {what}. {cause} Delete it "
        f"and get it again from its source; for data of your own use folder:PATH or npz:PATH."
    )


def mistaken(file: Path) -> str | None:
    """What a file is that is no data at all; None where it may be data."""
    with file.open("rb") as stream:
        start = stream.read(512)
    if not start:
        return "empty"
    if start.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith((b"<!doctype html", b"<html", b"<head", b"<?xml")):
        return "a web page saved under this name: the server answered with a page (a login, a quota, an error), not the file"
    if start.startswith(_LFS):
        return "a pointer of Git LFS: run `git lfs pull` where it came from"
    return None


def refuse_mistaken(file: Path, what: str) -> None:
    """For files without a published checksum.

    Raises:
        DataError: it is empty, a web page, or a pointer.
    """
    if kind := mistaken(file):
        raise DataError(f"{file}: it is {kind}. {what} was expected here; delete it and get it again from its source.")
