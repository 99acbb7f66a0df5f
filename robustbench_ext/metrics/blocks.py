"""Numbers of each sample from its row of logits, a block of rows at a time.

What goes through here needs the memory of one block beside its result, whatever the number of samples, and takes rows that
are still in files (anything with a shape, a length and slices) like an array.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from robustbench_ext.fingerprint import Rows

ENTRIES = 1 << 20  # of a block: 8 MiB as float64


def blocks(rows: Rows) -> Iterator[tuple[slice, np.ndarray]]:
    """The rows in order, and where each block of them lies."""
    size = max(1, ENTRIES // max(1, int(np.prod(rows.shape[1:]))))
    for start in range(0, len(rows), size):
        here = slice(start, min(start + size, len(rows)))
        yield here, rows[here]


def each(function: Callable[..., tuple[np.ndarray, ...]], rows: Rows, *others: np.ndarray) -> list[np.ndarray]:
    """What a function of rows (n, ...) and of others (n,) gives for all of them: each of its results (n,), joined.

    >>> each(lambda z, y: (z.max(axis=1), z.argmax(axis=1) == y), np.eye(3), np.array([0, 1, 0]))
    [array([1., 1., 1.]), array([ True,  True, False])]
    """
    found = [function(block, *(other[here] for other in others)) for here, block in blocks(rows)]
    return [np.concatenate(parts) for parts in zip(*found, strict=True)]
