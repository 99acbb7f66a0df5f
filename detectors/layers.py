"""From one score per layer to one score: fixed weights, or a logistic regression on validation data.

The regression (Lee et al. 2018) tells known from unknown inputs by their layer scores s_l:

    score = sum_l alpha_l (s_l - m_l) / sd_l + b,

the log-odds of "unknown", with m_l and sd_l of the validation scores. The published code does not standardise, so its
regularised fit depends on the layers' units; and it does not force signs, nor does this.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robustbench_ext.errors import DataError

FOLDS = 5
STRENGTHS = tuple(10.0**e for e in range(-4, 5))  # of the inverse penalty, scikit-learn's own grid


@dataclass(frozen=True)
class Combination:
    """score = s weights + offset, for layer scores s (n, L)."""

    weights: Tensor
    offset: float = 0.0

    def __call__(self, scores: Tensor) -> Tensor:
        """(n, L) to (n,), float64."""
        return scores.double() @ self.weights + self.offset


def logistic(known: Tensor, unknown: Tensor) -> Combination:
    """L2-penalised logistic regression of "unknown" on standardised layer scores, its strength by five-fold validation.

    Args:
        known, unknown: layer scores (n, L) and (m, L), at least five of each.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold

    if min(len(known), len(unknown)) < FOLDS:
        raise DataError(
            f"{len(known)} known and {len(unknown)} unknown inputs are too few for a regression in {FOLDS} folds"
        )
    scores = torch.cat([known, unknown]).double().numpy()
    mean, spread = scores.mean(axis=0), scores.std(axis=0)
    spread[spread == 0] = 1.0
    z, target = (scores - mean) / spread, np.repeat([0, 1], [len(known), len(unknown)])

    def fit(strength: float, rows: np.ndarray) -> Any:
        return LogisticRegression(C=strength, max_iter=2000, tol=1e-8).fit(z[rows], target[rows])

    folds = list(StratifiedKFold(FOLDS).split(z, target))
    likelihoods = [
        sum(
            -np.logaddexp(0, (1 - 2 * target[out]) * fit(c, rows).decision_function(z[out])).sum()
            for rows, out in folds
        )
        for c in STRENGTHS
    ]
    model = fit(STRENGTHS[int(np.argmax(likelihoods))], np.arange(len(z)))
    weights = model.coef_[0] / spread
    return Combination(torch.from_numpy(weights), float(model.intercept_[0] - weights @ mean))
