"""Content keys: what a result depends on, as a short hash.

A key is the first 20 hexadecimal digits of the SHA-256 of a canonical JSON text. The texts are stored beside the
records, so that a key can always be explained.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np

KEY_DIGITS = 20
_BLOCK = 1 << 22  # bytes hashed at a time


class Rows(Protocol):
    """What is read like an array along its first axis: an array itself, or one in a file (`robustbench_ext.data.stored`)."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype[Any]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any, /) -> np.ndarray: ...


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces; equal values give equal texts. NaN is refused."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, default=_plain)


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"a key cannot hold {type(value).__name__}: {value!r}")


def key_of(value: Any) -> str:
    """The key of any JSON-like value."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:KEY_DIGITS]


def hash_arrays(arrays: Mapping[str, Rows]) -> str:
    """A key of named arrays: names, shapes, dtypes and bytes, whatever the order in which they are given.

    They are read block by block, so an array in a file needs no more memory than one in memory.
    """
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(f"{name}|{array.dtype.str}|{array.shape}|".encode())
        if array.dtype.kind in "US":
            digest.update(hash_strings(each_string(array)).encode())
        elif not array.shape:
            digest.update(np.asarray(array).tobytes())
        else:
            for block in _blocks(array):
                digest.update(np.ascontiguousarray(block).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()[:KEY_DIGITS]


def _blocks(array: Rows) -> Iterator[np.ndarray]:
    width = array.dtype.itemsize * int(np.prod(array.shape[1:]))
    rows = max(1, _BLOCK // max(1, width))
    for start in range(0, len(array), rows):
        yield array[start : start + rows]


def each_string(array: Rows) -> Iterator[str]:
    """The strings of an array one after the other, without a list of all of them."""
    for block in _blocks(array):
        yield from block.ravel().tolist()


def hash_strings(strings: Iterable[str]) -> str:
    """A key of a sequence of strings, order included."""
    digest = hashlib.sha256()
    for string in strings:
        encoded = string.encode()
        digest.update(len(encoded).to_bytes(4, "little") + encoded)
    return digest.hexdigest()[:KEY_DIGITS]
