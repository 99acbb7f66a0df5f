"""How hard each sample is: scores from the predictions of several trainings, and slices of equal size by score.

    EL2N        E over runs of |softmax(z) - onehot(y)|_2, in [0, sqrt 2]        (Paul et al. 2021, arXiv 2107.07075)
    GraNd       E over runs of |gradient of the cross-entropy in all parameters|_2                     (same authors)
    forgetting  how often a sample goes from right to wrong during a training    (Toneva et al. 2019, arXiv 1812.05159)
    margin      E over runs of max (or sum) over wrong classes of p_j - p_y
    VoG         how much a logit's gradient moves during a training: `detectors.vog`

Scores belong to samples, not to the model that is judged: the networks that give them should be others, seen early in their
training, and several (the authors take ten or more at epoch 20 of 200). Before training there is nothing to see: what was
published for epoch 0 does not reproduce (Kirsch 2023, arXiv 2303.14753). Scores are kept with ids, never by position.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from scipy.special import softmax

from robustbench_ext.errors import ConfigError, DataError
from robustbench_ext.metrics.classification import accuracy
from robustbench_ext.metrics.estimate import Estimate

if TYPE_CHECKING:
    from torch import Tensor, nn

SLICES = 10
FILE = "difficulty.csv"  # in a run folder
HEADER = ("id", "label", "score", "slice")


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


def grand(
    runs: Sequence[nn.Module],
    x: Tensor,
    labels: Tensor,
    *,
    epoch: int,
    batch_size: int = 32,
    untrained: bool = False,
) -> np.ndarray:
    """GraNd of each sample, float64 (N,): the norm of its own gradient in all parameters, in evaluation mode (with the running
    statistics of batch norm). A batch takes as much memory as `batch_size` copies of the parameters.

    Args:
        runs: a network of each training, all after the same epoch; its parameters are all looked at, frozen or not.
        x: float32 (N, C, H, W) in [0, 1]; labels: int64 (N,).
        epoch: after which the networks were taken, from 1. 0, before any training, is refused: published results for it do not
            reproduce (arXiv 2303.14753).
        untrained: do it all the same.
    """
    from robustbench_ext.models.contract import check_images

    if not len(runs):
        raise DataError("difficulty: there are no runs; give the network of at least one")
    if epoch < 0 or (epoch == 0 and not untrained):
        raise ConfigError(
            f"grand: epoch = {epoch}, expected 1 or more. Before training the score says how large inputs are and not how "
            f"hard; untrained=True computes it all the same"
        )
    check_images(x)
    return np.asarray(sum(_gradient_norms(model, x, labels, batch_size) for model in runs) / len(runs))


def _gradient_norms(model: nn.Module, x: Tensor, labels: Tensor, batch_size: int) -> np.ndarray:
    import torch
    from torch.func import functional_call, grad, vmap
    from torch.nn.functional import cross_entropy

    from robustbench_ext import device as devices
    from robustbench_ext.models.contract import check_labels, frozen_eval, logits_of

    there = devices.of(model, x.device)
    fixed = {name: buffer.detach() for name, buffer in model.named_buffers()}
    trained = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], one: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(functional_call(model, (parameters, fixed), (one[None],)), y[None])

    def norm(one: Tensor, y: Tensor) -> Tensor:
        gradients = grad(loss)(trained, one, y).values()
        return torch.stack([g.double().square().sum() for g in gradients]).sum().sqrt()

    parts = [np.empty(0)]
    with frozen_eval(model), devices.float32(), torch.no_grad():
        for start in range(0, len(x), batch_size):
            part = x[start : start + batch_size].to(there)
            if start == 0:
                check_labels(labels, logits_of(model, part[:1]).shape[1], len(x))
            parts.append(vmap(norm)(part, labels[start : start + batch_size].to(there)).cpu().numpy())
    return np.concatenate(parts)


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
    scores = np.asarray(scores, dtype=np.float64)
    if len(scores) < count or np.isnan(scores).any() or len(ids) != len(scores):
        raise DataError(
            f"difficulty: {len(scores)} scores and {len(ids)} ids for {count} slices, expected as many and no NaN"
        )
    return [
        Slice(number, part, float(scores[part].min()), float(scores[part].max()))
        for number, part in enumerate(np.array_split(easiest_first(scores, ids), count), start=1)
    ]


def easiest_first(scores: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """The samples' positions by rising score, int (N,); equal scores are ordered by a hash of their ids."""
    from robustbench_ext.data.base import rank_of

    # Not by position: the order of a split is stratified by class.
    ties = np.fromiter((rank_of(f"difficulty|{i}") for i in ids), dtype=np.uint64, count=len(ids))
    return np.lexsort((ties, scores))


@dataclass(frozen=True)
class Scored:
    """Difficulty scores with what they belong to.

    Attributes:
        ids: str (N,); labels: int (N,); values: float64 (N,), higher = harder, perhaps infinite.
    """

    ids: np.ndarray
    labels: np.ndarray
    values: np.ndarray

    def slices(self, count: int = SLICES) -> list[Slice]:
        """See `slices`."""
        return slices(self.values, self.ids, count)

    def of(self, ids: np.ndarray) -> Scored:
        """The scores of these samples, in their order.

        Raises:
            DataError: one of them has none.
        """
        if np.array_equal(ids, self.ids):
            return self
        order = np.argsort(self.ids)
        place = np.searchsorted(self.ids, ids, sorter=order)
        index = order[np.minimum(place, len(order) - 1)]
        if not np.array_equal(self.ids[index], ids):
            lost = ids[self.ids[index] != ids]
            raise DataError(f"difficulty: {len(lost)} of {len(ids)} samples have no score, the first is {lost[0]}")
        return Scored(self.ids[index], self.labels[index], self.values[index])

    def write(self, file: Path, count: int = SLICES) -> None:
        """A table with the columns `HEADER`, a row per sample, in the order of the ids' data."""
        number = np.zeros(len(self.ids), dtype=int)
        for cut in self.slices(count):
            number[cut.index] = cut.number
        with file.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow(HEADER)
            writer.writerows(zip(self.ids, self.labels.tolist(), self.values.tolist(), number.tolist(), strict=True))


def read_scores(folder: str | Path) -> Scored:
    """The difficulty scores of a finished run, from its folder.

    Raises:
        ConfigError: the run's suite did not ask for any, or the file is damaged.
    """
    file = Path(folder) / FILE
    if not file.is_file():
        raise ConfigError(f"{folder}: there is no {FILE}; expected the folder of a run whose suite has difficulty:")
    with file.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.reader(stream))
    try:
        if tuple(rows[0]) != HEADER:
            raise ValueError(f"columns {rows[0]}")
        ids, labels, values = zip(*((r[0], int(r[1]), float(r[2])) for r in rows[1:]), strict=True)
    except (ValueError, IndexError) as error:
        raise ConfigError(f"{file}: damaged: {error}. Run the suite again into this folder.") from None
    return Scored(np.array(ids), np.array(labels), np.array(values))


def accuracy_by_slice(right: np.ndarray, cut: Sequence[Slice]) -> list[Estimate]:
    """The share of right answers in each slice, with Wilson's interval.

    Args:
        right: bool (N,), in the order of the scores that the slices were cut by (`Scored.of` gives them another order).
    """
    return [accuracy(right[part.index]) for part in cut]
