"""KL matching (Hendrycks et al., ICML 2022, arXiv 1911.11132): how far is the prediction from every typical one?

    d_k = mean softmax over the samples that are predicted as class k,   score = min_k KL(p(x) || d_k).

The paper fits on held-out data. Here it is the training split, as for every detector, where networks are over-confident.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from detectors.base import Detector
from robustbench_ext.errors import DataError
from robustbench_ext.models.observe import Observations


def kl_to_nearest(log_p: Tensor, log_d: Tensor) -> Tensor:
    """min_k sum_j p_j (log p_j - log d_kj), shape (N,), for log-probabilities (N, K) and (M, K)."""
    p = log_p.exp()
    own = (p * log_p).sum(dim=1, keepdim=True)
    return (own - p @ log_d.T).amin(dim=1).clamp_min(0.0)


class KLMatching(Detector):
    """score = min_k KL(softmax(logits) || d_k), over classes that are predicted for some training sample."""

    name: ClassVar[str] = "kl-matching"
    needs_fit = True
    reference: ClassVar[str] = "arXiv 1911.11132"

    def _fit(self, train: Observations, model: nn.Module | None) -> None:
        log_p = torch.log_softmax(train.logits.double(), dim=1)
        predicted = log_p.argmax(dim=1)
        # Means in log space: a probability of 1e-400 is still one, and its logarithm is finite.
        means = []
        for k in predicted.unique().tolist():
            rows = log_p[predicted == k]
            means.append(torch.logsumexp(rows, dim=0) - torch.log(torch.tensor(float(len(rows)), dtype=torch.float64)))
        if not means:
            raise DataError("kl-matching: there is no training sample to take a typical prediction from")
        self._typical = torch.stack(means)

    def _score(self, seen: Observations) -> Tensor:
        if seen.logits.shape[1] != self._typical.shape[1]:
            raise DataError(
                f"kl-matching: {seen.logits.shape[1]} logits, but the training data had {self._typical.shape[1]}"
            )
        return kl_to_nearest(torch.log_softmax(seen.logits.double(), dim=1), self._typical)
