"""What methods for imbalanced data share: class weights and the losses that take them.

n_c is the number of training samples of class c. Weights are 1 for the largest class of a balanced data set.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from defenses.base import batch_mean
from robustbench_ext.errors import DataError


def _counts(counts: np.ndarray) -> np.ndarray:
    if not len(counts) or counts.min() < 1:
        empty = np.flatnonzero(np.asarray(counts) < 1).tolist()
        raise DataError(
            f"classes {empty} have no training samples, so they cannot be weighted; leave them out of the data"
        )
    return np.asarray(counts, dtype=np.float64)


def inverse_weights(counts: np.ndarray) -> np.ndarray:
    """w_c = n_max / n_c, float64 (K,): 1 for the largest class."""
    n = _counts(counts)
    weights: np.ndarray = n.max() / n
    return weights


def effective_number_weights(counts: np.ndarray, b: float) -> np.ndarray:
    """w_c = (1 - b^n_max) / (1 - b^n_c), float64 (K,) (Cui et al., CVPR 2019): 1 for b = 0, inverse for b -> 1."""
    n = _counts(counts)
    if b == 0:
        return np.ones_like(n)
    weights: np.ndarray = np.expm1(n.max() * np.log(b)) / np.expm1(n * np.log(b))
    return weights


def ldam_margins(counts: np.ndarray, largest: float) -> np.ndarray:
    """m_c proportional to n_c^(-1/4), with the rarest class at `largest`, float64 (K,) (Cao et al., NeurIPS 2019)."""
    rarity = _counts(counts) ** -0.25
    margins: np.ndarray = largest * rarity / rarity.max()
    return margins


def weighted_cross_entropy(logits: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    """sum_i w_{y_i} CE_i / sum_i w_{y_i}: the scale of the weights cancels."""
    w = weights.to(logits.dtype)[y]
    return (w * F.cross_entropy(logits, y, reduction="none")).mean() / batch_mean(w)


def focal(logits: Tensor, y: Tensor, weights: Tensor, gamma: float, inside: bool) -> Tensor:
    """Focal loss (Lin et al., ICCV 2017), a mean over B.

    Args:
        inside: the weight belongs to the modulating factor, (1 - exp(-w CE))^gamma w CE, as in the code of LDAM-DRW;
            otherwise the textbook's w (1 - p_y)^gamma CE.
    """
    w, ce = weights.to(logits.dtype)[y], F.cross_entropy(logits, y, reduction="none")
    modulation = -torch.expm1(-(w * ce if inside else ce))
    modulation = modulation.clamp_min(torch.finfo(ce.dtype).tiny)  # 0 ** gamma has no gradient for gamma < 1
    return (modulation.pow(gamma) * w * ce).mean()


def ldam(logits: Tensor, y: Tensor, weights: Tensor, margins: Tensor, scale: float) -> Tensor:
    """Weighted cross-entropy of scale * (f_y - m_y) against scale * f_k."""
    shifted = logits - F.one_hot(y, logits.shape[1]) * margins.to(logits.dtype)[y][:, None]
    return weighted_cross_entropy(scale * shifted, y, weights)
