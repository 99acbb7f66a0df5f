"""Ranks with their uncertainty: the places in a table that pairwise tests leave a model (Mogstad, Romano, Shaikh, Wilhelm,
Review of Economic Studies 91, 2024).

Where all pairs are tested with a family-wise error of alpha, every model's true rank lies in its interval with probability
1 - alpha, for all models at once: models that are surely better stand above it, models that are surely worse below.
"""

from __future__ import annotations

import numpy as np

from robustbench_ext.errors import DataError


def rank_intervals(better: np.ndarray) -> list[tuple[int, int]]:
    """The lowest and the highest place of each of M models; rank 1 is the best.

    Args:
        better: bool (M, M); better[i, j] says that i is better than j, significantly after correction for all pairs.

    Raises:
        DataError: not a square table, or two models each better than the other (or one than itself).

    >>> rank_intervals(np.array([[0, 0, 1], [0, 0, 1], [0, 0, 0]], dtype=bool))
    [(1, 2), (1, 2), (3, 3)]
    """
    better = np.asarray(better, dtype=bool)
    if better.ndim != 2 or better.shape[0] != better.shape[1]:
        raise DataError(f"rank intervals: a table of shape {better.shape}, expected (M, M)")
    both = np.argwhere(better & better.T)
    if len(both):
        i, j = (int(v) for v in both[0])
        raise DataError(f"rank intervals: models {i} and {j} are each said to be better than the other")
    low, high = 1 + better.sum(axis=0), len(better) - better.sum(axis=1)
    return [(int(a), int(b)) for a, b in zip(low, high, strict=True)]
