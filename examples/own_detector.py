"""A detector of your own, in one file, named in a suite as `examples/own_detector.py:LogitPrototype`.

    rbx check --detector examples/own_detector.py:LogitPrototype
    rbx run examples/own_suite.yaml --out runs/own

A detector is fitted on the train split, never on test data, and then read under every condition. Higher = more unlike the
training data. What it reads here are logits alone; `taps` names features where it reads those.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from detectors.base import Detector
from robustbench_ext.models.observe import Observations


class LogitPrototype(Detector):
    """score = min_k ||z / |z| - c_k||, c_k the mean of the normalised logits z / |z| of training samples of class k.

    Args:
        p: of the norm ||.||.
    """

    name: ClassVar[str] = "logit-prototype"
    needs_fit = True

    def __init__(self, p: float = 2.0) -> None:
        self.p = float(p)
        self._centres = torch.empty(0)

    def parameters(self) -> dict[str, Any]:
        """What scores depend on, so that another p is another detector."""
        return {"p": self.p}

    def _fit(self, train: Observations, model: nn.Module | None) -> None:
        z = nn.functional.normalize(train.logits.double())
        classes = train.labels.unique()
        self._centres = torch.stack([z[train.labels == k].mean(dim=0) for k in classes])

    def _score(self, seen: Observations) -> Tensor:
        z = nn.functional.normalize(seen.logits.double())
        return torch.cdist(z, self._centres, p=self.p).amin(dim=1)
