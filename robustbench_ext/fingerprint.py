"""Content keys: what a result depends on, as a short hash.

A key is the first 20 hexadecimal digits of the SHA-256 of a canonical JSON text. The texts are stored beside the
records, so that a key can always be explained.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

KEY_DIGITS = 20


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


def hash_arrays(arrays: Mapping[str, np.ndarray]) -> str:
    """A key of named arrays: names, shapes, dtypes and bytes, whatever the order in which they are given."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name}|{array.dtype.str}|{array.shape}|".encode())
        if array.dtype.kind in "US":
            digest.update(hash_strings(array.ravel().tolist()).encode())
        else:
            digest.update(array.tobytes())
    return digest.hexdigest()[:KEY_DIGITS]


def hash_strings(strings: Iterable[str]) -> str:
    """A key of a sequence of strings, order included."""
    digest = hashlib.sha256()
    for string in strings:
        encoded = string.encode()
        digest.update(len(encoded).to_bytes(4, "little") + encoded)
    return digest.hexdigest()[:KEY_DIGITS]
