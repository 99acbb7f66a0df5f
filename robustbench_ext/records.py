"""Records: one row per sample, kept under a key that names all that they depend on.

`KEY.npz` holds the columns, `KEY.json` says what made them and how many bytes and which hash the columns have. Both are
written under a temporary name and renamed, the JSON last: a record is there when its JSON is there and fits, so a run
that is killed at any moment leaves whole records and nothing else. A record whose bytes do not fit its hash counts as
missing, and is computed again.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from robustbench_ext.errors import RobustBenchExtError
from robustbench_ext.files import fits, seal, write_atomically


class RecordStore:
    """The records of one run folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._verified: dict[str, tuple[int, int]] = {}

    def _paths(self, key: str) -> tuple[Path, Path]:
        return self.folder / f"{key}.npz", self.folder / f"{key}.json"

    def has(self, key: str) -> bool:
        """Whether a whole record of that key is there; its bytes are hashed once in this store's life."""
        columns, note = self._paths(key)
        try:
            stat = columns.stat()
            stamp = (stat.st_size, stat.st_mtime_ns)
            if self._verified.get(key) == stamp:
                return True
            meta = json.loads(note.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        if not fits(columns, meta):
            return False
        self._verified[key] = stamp
        return True

    def save(self, key: str, columns: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> None:
        """Write a record; `meta` is kept beside it for people who want to know what a key stands for."""
        file, note = self._paths(key)
        objects = [name for name, column in columns.items() if column.dtype.hasobject]
        if objects:
            raise ValueError(f"record {key}: columns of Python objects cannot be kept: {', '.join(objects)}")
        # Not allow_pickle=False: before numpy 2.2 that is no option but a column of this name.
        write_atomically(file, lambda path: np.savez(path, **columns))  # type: ignore[arg-type]
        text = json.dumps({"key": key, **seal(file), **meta}, indent=1)
        write_atomically(note, lambda path: path.write_text(text, encoding="utf-8"))

    def load(self, key: str, names: Iterable[str] | None = None) -> dict[str, np.ndarray]:
        """The columns of a record.

        Args:
            names: those that are wanted, which must be there; all of them by default. Of others nothing is read but their part
                in the hash of the file.

        Raises:
            RobustBenchExtError: it is missing or damaged.
        """
        if not self.has(key):
            raise RobustBenchExtError(
                f"record {key} is missing or damaged in {self.folder}. Run the suite again: it computes what is missing."
            )
        try:
            with np.load(self._paths(key)[0], allow_pickle=False) as archive:
                return {name: archive[name] for name in (archive.files if names is None else names)}
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise RobustBenchExtError(f"record {key} cannot be read: {error}") from error

    def discard(self, key: str) -> None:
        """Forget a record, if it is there."""
        for path in self._paths(key):
            path.unlink(missing_ok=True)

    def meta(self, key: str) -> dict[str, Any]:
        """What made a record."""
        meta: dict[str, Any] = json.loads(self._paths(key)[1].read_text(encoding="utf-8"))
        return meta
