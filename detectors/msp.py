"""Maximum softmax probability (Hendrycks and Gimpel, ICLR 2017, arXiv 1610.02136): the baseline of all detectors."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from detectors.base import Detector
from robustbench_ext.models.observe import Observations


def msp_score(logits: Tensor) -> Tensor:
    """1 - max_k p_k, in [0, 1 - 1/K], shape (N,).

    Computed as the sum of the other classes' probabilities, in float64: 1 - p would round to 0 for every confident
    sample, and the order of the samples would then decide their ranking.
    """
    shifted = logits.double() - logits.double().amax(dim=1, keepdim=True)
    others = shifted.exp().scatter(1, shifted.argmax(dim=1, keepdim=True), 0.0).sum(dim=1)
    return others / (1.0 + others)


class MSP(Detector):
    """score = 1 - max_k softmax(logits)_k."""

    name: ClassVar[str] = "msp"
    reference: ClassVar[str] = "arXiv 1610.02136"

    def _score(self, seen: Observations) -> Tensor:
        return msp_score(seen.logits)
