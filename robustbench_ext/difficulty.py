"""How hard each sample is: scores from the predictions of several trainings, and slices of equal size by score.

    EL2N        E over runs of |softmax(z) - onehot(y)|_2, in [0, sqrt 2]        (Paul et al. 2021, arXiv 2107.07075)
    forgetting  how often a sample goes from right to wrong during a training    (Toneva et al. 2019, arXiv 1812.05159)
    margin      E over runs of max (or sum) over wrong classes of p_j - p_y

Scores belong to samples, not to the model that is judged: the networks that give them should be others, seen early in their
training, and several (the authors take ten or more at epoch 20 of 200). Before training there is nothing to see: what was
published for epoch 0 does not reproduce (Kirsch 2023, arXiv 2303.14753). Scores are kept with ids, never by position.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import softmax

from robustbench_ext.errors import DataError

SLICES = 10


def el2n(logits: Sequence[np.ndarray], labels: np.ndarray) -> np.ndarray:
    """EL2N of each sample, float64 (N,).

    Args:
        logits: of each run, (N, K).
        labels: int (N,).
    """
    return _over_runs(logits, labels, lambda p, y: np.sqrt(np.square(p - np.eye(p.shape[1])[y]).sum(axis=1)))


def margin_error(logits: Sequence[np.ndarray], labels: np.ndarray, how: str = "max") -> np.ndarray:
    """By how much wrong classes are more probable than the right one, float64 (N,): of the most probable one, or of all.

    Args:
        logits, labels: as for `el2n`.
        how: "max", in [-1, 1], or "sum".
    """
    if how not in ("max", "sum"):
        raise DataError(f"margin: how = {how!r}, expected max or sum")

    def score(p: np.ndarray, y: np.ndarray) -> np.ndarray:
        rows = np.arange(len(y))
        gaps = p - p[rows, y][:, None]
        if how == "sum":
            return np.asarray(gaps.sum(axis=1))  # the right class adds 0
        gaps[rows, y] = -np.inf
        return np.asarray(gaps.max(axis=1))

    return _over_runs(logits, labels, score)


def _over_runs(
    logits: Sequence[np.ndarray], labels: np.ndarray, score: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> np.ndarray:
    labels = np.asarray(labels)
    if not len(logits):
        raise DataError("difficulty: there are no runs; give the logits of at least one")
    total = np.zeros(len(labels))
    for z in logits:
        z = np.asarray(z)
        if z.ndim != 2 or len(z) != len(labels) or not np.isfinite(z).all():
            raise DataError(f"difficulty: logits {z.shape} for {len(labels)} labels, expected finite (N, K)")
        if len(labels) and not 0 <= labels.min() <= labels.max() < z.shape[1]:
            raise DataError(
                f"difficulty: labels span {labels.min()}..{labels.max()}, the logits have {z.shape[1]} classes"
            )
        total += score(softmax(z.astype(np.float64), axis=1), labels)
    return total / len(logits)


def forgetting(right: np.ndarray) -> np.ndarray:
    """How often each sample was forgotten, float64 (N,); infinite where it was never right.

    Args:
        right: bool (T, N), whether each sample was classified correctly at each of T checks, in their order.
    """
    right = np.asarray(right, dtype=bool)
    if right.ndim != 2 or not len(right):
        raise DataError(f"forgetting: got shape {right.shape}, expected (checks, samples) with at least one check")
    lost = (right[:-1] & ~right[1:]).sum(axis=0).astype(np.float64)
    return np.where(right.any(axis=0), lost, np.inf)


@dataclass(frozen=True)
class Slice:
    """Samples of similar difficulty.

    Attributes:
        number: from 1, the easiest.
        index: their positions, int (n,).
        low, high: the smallest and the largest score among them.
    """

    number: int
    index: np.ndarray
    low: float
    high: float


def slices(scores: np.ndarray, ids: np.ndarray, count: int = SLICES) -> list[Slice]:
    """The samples cut into parts of equal size by score, easiest first; equal scores are ordered by a hash of their ids.

    Raises:
        DataError: fewer samples than slices, or scores that are NaN.
    """
    from robustbench_ext.data.base import rank_of

    scores = np.asarray(scores, dtype=np.float64)
    if len(scores) < count or np.isnan(scores).any() or len(ids) != len(scores):
        raise DataError(
            f"difficulty: {len(scores)} scores and {len(ids)} ids for {count} slices, expected as many and no NaN"
        )
    # Not by position: the order of a split is stratified by class.
    ties = np.fromiter((rank_of(f"difficulty|{i}") for i in ids), dtype=np.uint64, count=len(ids))
    order = np.lexsort((ties, scores))
    return [
        Slice(number, part, float(scores[part].min()), float(scores[part].max()))
        for number, part in enumerate(np.array_split(order, count), start=1)
    ]
