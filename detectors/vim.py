"""Virtual-logit matching (Wang, Li, Feng, Zhang, CVPR 2022, arXiv 2203.10807).

Features are centred at u = -W^+ b, where the last layer gives no evidence. P spans the D largest principal directions of
the training features about u; what is left of a feature is a logit of a class that does not exist:

    score = alpha |(I - P P^T)(f - u)| - logsumexp(logits),   alpha = mean max-logit / mean residual over training data.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from detectors.base import Detector
from detectors.head import head_of
from detectors.selection import numbers
from robustbench_ext.errors import ConfigError, DataError
from robustbench_ext.models.observe import PENULTIMATE, Observations


class ViM(Detector):
    """score = alpha |residual| - logsumexp(logits).

    Args:
        dim: D, of the principal space. Default: the paper's 1000 for at least 2048 features, 512 for at least 768, else half
            of them.
    """

    name: ClassVar[str] = "vim"
    taps = (PENULTIMATE,)
    needs_fit = True
    needs_model = True
    reference: ClassVar[str] = "arXiv 2203.10807"

    def __init__(self, dim: int | None = None) -> None:
        (number,) = numbers(1 if dim is None else dim, "vim: dim", 1.0)
        if number != int(number):
            raise ConfigError(f"vim: dim = {dim!r}, expected a whole number >= 1")
        self.dim = None if dim is None else int(number)

    def parameters(self) -> dict[str, Any]:
        return {"dim": self.dim}

    def _fit(self, train: Observations, model: nn.Module | None) -> None:
        head = head_of(model, train, self.name)
        self._origin = -(torch.linalg.pinv(head.weight) @ head.bias)
        features = train.features[PENULTIMATE]
        n, d = features.shape
        dim = self.dim if self.dim is not None else 1000 if d >= 2048 else 512 if d >= 768 else d // 2
        if dim >= d:
            raise DataError(f"vim: dim = {dim}, expected fewer than the {d} features, or nothing is left as residual")
        second = torch.zeros(d, d, dtype=torch.float64)
        for i in range(0, n, 4096):
            centred = features[i : i + 4096].double() - self._origin
            second.addmm_(centred.T, centred)
        _, vectors = torch.linalg.eigh(second / n)  # ascending
        self._rest = vectors[:, : d - dim].contiguous()
        residual = float(self._residual(features).mean())
        if residual <= 1e-9 * float(features.double().norm(dim=1).mean()):
            raise DataError(f"vim: training features have no variation outside {dim} directions; give a smaller dim")
        self.alpha = float(train.logits.double().amax(dim=1).mean()) / residual

    def _residual(self, features: Tensor) -> Tensor:
        if features.shape[1] != len(self._origin):
            raise DataError(
                f"vim: features have {features.shape[1]} dimensions, the training data's {len(self._origin)}"
            )
        rest: Tensor = ((features.double() - self._origin) @ self._rest).norm(dim=1)
        return rest

    def _score(self, seen: Observations) -> Tensor:
        residual = self._residual(seen.features[PENULTIMATE])
        return self.alpha * residual - torch.logsumexp(seen.logits.double(), dim=1)

    def summary(self) -> dict[str, float]:
        return {"alpha": self.alpha}
