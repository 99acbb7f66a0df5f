"""Arrays that are read when they are asked for: in `.npy` files, in the members of `.npz` archives, or some rows of another.

Reading with pread rather than through a memory map: what is read is in memory once and gone with the batch, where the pages of
a map count as the process's own memory until the system takes them back; and a file that was cut short is an error, not a
signal. An archive's member lies in one piece where it was stored and not compressed (numpy.savez does, savez_compressed not).
"""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from robustbench_ext.errors import DataError
from robustbench_ext.fingerprint import Rows

_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
_LOCAL_HEADER = 30  # bytes before the name in a member's own header


class StoredArray:
    """An array in C order in a file, read row by row (along the first axis).

    Args:
        file: holds it; it must not change while the process lives.
        offset: where its bytes start.
        axes: the order in which its axes are shown, the first one first: (0, 3, 1, 2) shows (N, H, W, C) as (N, C, H, W).

    Raises:
        DataError: the file is shorter than the array; when rows are read: it is not the file that it was.
    """

    def __init__(
        self,
        file: Path,
        dtype: np.dtype[Any],
        shape: tuple[int, ...],
        offset: int = 0,
        axes: tuple[int, ...] | None = None,
    ) -> None:
        self.file, self.dtype, self._offset, self._axes = file, dtype, offset, axes
        self._stored = shape
        self.shape = shape if axes is None else tuple(shape[axis] for axis in axes)
        self._row = dtype.itemsize * int(np.prod(shape[1:], dtype=np.int64))
        status = file.stat()
        self._stamp = (status.st_size, status.st_mtime_ns)
        if status.st_size < offset + shape[0] * self._row:
            raise DataError(f"{file}: {status.st_size} bytes, too few for {dtype} {shape}. Is the copy complete?")

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        return len(self) * self._row

    def reshape(self, *shape: int) -> StoredArray:
        """The same bytes as as many rows of another shape."""
        return StoredArray(self.file, self.dtype, shape, self._offset)

    def transpose(self, *axes: int) -> StoredArray:
        """The same rows with their axes in another order."""
        return StoredArray(self.file, self.dtype, self._stored, self._offset, axes)

    def __getitem__(self, index: slice | np.ndarray) -> np.ndarray:
        """Rows, by a slice or by int (n,) from 0 on: an array of its own."""
        rows = np.arange(*index.indices(len(self))) if isinstance(index, slice) else np.asarray(index)
        if len(rows) and not 0 <= rows.min() <= rows.max() < len(self):
            raise IndexError(f"rows {rows.min()} to {rows.max()} of {len(self)}")
        found = np.empty((len(rows), *self._stored[1:]), dtype=self.dtype)
        self._read(rows, found)
        return found if self._axes is None else found.transpose(self._axes)

    def _read(self, rows: np.ndarray, into: np.ndarray) -> None:
        """Each run of neighbouring rows with one call."""
        if not into.size:
            return
        starts = np.flatnonzero(np.append(True, np.diff(rows) != 1))
        buffer = into.reshape(-1).view(np.uint8).data
        with self.file.open("rb", buffering=0) as stream:
            status = os.fstat(stream.fileno())
            if (status.st_size, status.st_mtime_ns) != self._stamp:
                raise DataError(f"{self.file} changed while it was in use. Start again with the file as it is to stay.")
            for start, stop in zip(starts.tolist(), [*starts[1:].tolist(), len(rows)], strict=True):
                stream.seek(self._offset + int(rows[start]) * self._row)
                part = buffer[start * self._row : stop * self._row]
                while len(part):
                    part = part[_some(stream.readinto(part), self.file) :]


def _some(count: int | None, file: Path) -> int:
    if not count:
        raise DataError(f"{file}: it ends before its array does")
    return count


class SomeRows:
    """Rows of another array, in the given order, read when they are asked for."""

    def __init__(self, of: Rows, index: np.ndarray) -> None:
        self._of, self._index = of, index
        self.shape, self.dtype = (len(index), *of.shape[1:]), of.dtype

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: slice | np.ndarray) -> np.ndarray:
        return self._of[self._index[index]]


def npy(file: Path) -> StoredArray | None:
    """The array of a `.npy` file; None where it does not lie there row by row: of objects, in Fortran's order, without axes.

    Raises:
        DataError: it is no such file.
    """
    with file.open("rb") as stream:
        return _array_at(stream, file)


def member(archive: Path, name: str) -> StoredArray | None:
    """An array `name` of an `.npz` archive; None where it is compressed, or as for `npy`.

    Raises:
        DataError: it cannot be read.
    """
    with zipfile.ZipFile(archive) as found:
        info = found.getinfo(f"{name}.npy")
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        return None
    with archive.open("rb") as stream:
        # The member's own header: its name and extra field need not be as long as in the archive's list.
        stream.seek(info.header_offset)
        header = stream.read(_LOCAL_HEADER)
        lengths = np.frombuffer(header[26:30], dtype="<u2")
        stream.seek(info.header_offset + _LOCAL_HEADER + int(lengths.sum()))
        return _array_at(stream, archive)


def _array_at(stream: BinaryIO, file: Path) -> StoredArray | None:
    """The array whose header starts here."""
    try:
        version = np.lib.format.read_magic(stream)
        if version not in _HEADERS:
            return None
        shape, fortran, dtype = _HEADERS[version](stream)
    except ValueError as error:
        raise DataError(f"{file}: not an array of numpy's ({error})") from error
    if dtype.hasobject or fortran or not shape:
        return None
    return StoredArray(file, dtype, shape, stream.tell())
