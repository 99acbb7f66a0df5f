"""APS, adaptive prediction sets (Romano, Sesia, Candes, NeurIPS 2020, arXiv 2006.02544): larger where the input is harder.

    s(x, y) = rho(y) + u p_y,  rho(y) the mass of the classes before y in the order of decreasing p.

u is 0 by default: sets are then functions of the logits, and never empty. The price is that every set holds the top class, so
coverage is at least the classifier's accuracy. Where that exceeds 1 - alpha, q is 0, the sets are the predictions and cover
more than was asked for, by the accuracy minus (1 - alpha); elsewhere nothing is lost, on average over inputs. With
`randomised`, u is uniform on [0, 1): no excess, and sets may be empty.

Other codes without draws put u = 1 into the calibration scores, which leaves the most confident inputs with empty sets, or add
one class to every set, which covers more than is asked for.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from robustbench_ext.errors import ConfigError
from uq.prediction_sets import PredictionSets


def cumulative_scores(p: Tensor, u: Tensor | None = None, penalty: float = 0.0, k_reg: int = 0) -> Tensor:
    """rho(y) + u p_y + penalty max(0, o(y) - k_reg) of every class: (N, K), of probabilities p (N, K) and u (N, 1)."""
    order = p.argsort(dim=1, descending=True, stable=True)
    ordered = p.gather(1, order)
    scores = torch.zeros_like(ordered)
    scores[:, 1:] = ordered.cumsum(dim=1)[:, :-1]
    if u is not None:
        scores = scores + u * ordered
    rank = torch.arange(1, p.shape[1] + 1, device=p.device)
    scores = scores + penalty * (rank - k_reg).clamp_min(0)
    return torch.empty_like(scores).scatter_(1, order, scores)


class APS(PredictionSets):
    """The most probable classes, until the mass before the next one exceeds q. Logits pass through.

    Args:
        alpha, temperature, tune: as of `LAC`.
        randomised: draw u per sample id. Reading then needs the inputs with their ids, as `predict` and `read_inputs` do.
    """

    name: ClassVar[str] = "aps"
    reference: ClassVar[str] = "arXiv 2006.02544"

    def __init__(
        self, alpha: float = 0.1, randomised: bool = False, temperature: bool = False, tune: float = 0.2
    ) -> None:
        super().__init__(alpha, temperature, tune)
        if not isinstance(randomised, bool):
            raise ConfigError(f"{self.name}: randomised = {randomised!r}, expected true or false")
        self.randomised = self.reads_inputs = randomised

    def parameters(self) -> dict[str, Any]:
        return {**super().parameters(), "randomised": self.randomised}

    def _scores(self, p: Tensor, u: Tensor | None) -> Tensor:
        return cumulative_scores(p, u)

    def warnings(self) -> list[str]:
        if self.threshold == 0:
            return [
                f"at least {100 * (1 - self.alpha):g} % of the calibration samples are classified correctly, so the sets are "
                f"the predictions: ask for a smaller alpha, or for randomised sets"
            ]
        return super().warnings()
