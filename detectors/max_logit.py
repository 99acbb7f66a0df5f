"""Maximum logit (Hendrycks et al., ICML 2022, arXiv 1911.11132): unlike a probability, it keeps the logits' size."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from detectors.base import Detector
from robustbench_ext.models.observe import Observations


class MaxLogit(Detector):
    """score = -max_k f_k, which is also the joint energy E(x, y) of the predicted class."""

    name: ClassVar[str] = "max-logit"
    reference: ClassVar[str] = "arXiv 1911.11132"

    def _score(self, seen: Observations) -> Tensor:
        return -seen.logits.double().amax(dim=1)
