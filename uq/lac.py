"""LAC, least ambiguous set-valued classifier (Sadinle, Lei, Wasserman 2019, arXiv 1609.00451): a threshold on p_y.

    s(x, y) = 1 - p_y,  p the softmax.

The smallest sets on average of all with their coverage, were p the truth. Sets are empty where no class is plausible enough.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from uq.prediction_sets import PredictionSets


class LAC(PredictionSets):
    """All classes with p_y >= 1 - q. Logits pass through.

    Args:
        alpha: sets miss the class of at most this share of samples.
        temperature: scale the logits by a temperature first.
        tune: share of the calibration samples that the temperature is fitted on.
    """

    name: ClassVar[str] = "lac"
    reference: ClassVar[str] = "arXiv 1609.00451"

    def _scores(self, p: Tensor, u: Tensor | None) -> Tensor:
        return 1 - p
