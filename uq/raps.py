"""RAPS, regularised adaptive prediction sets (Angelopoulos, Bates, Malik, Jordan, ICLR 2021, arXiv 2009.14193).

    s(x, y) = rho(y) + u p_y + penalty max(0, o(y) - k_reg),  o(y) the rank of class y, 1 = most probable.

The penalty keeps the many improbable classes out of large sets. rho, u and what u costs: as in `uq.aps`.
The draw is not multiplied with the penalty, as in the paper's formula; in the authors' code it is.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from robustbench_ext.errors import ConfigError
from robustbench_ext.metrics.conformal import threshold
from robustbench_ext.numbers import parse_number
from uq.aps import APS, cumulative_scores

PENALTIES = (0.001, 0.01, 0.1, 0.2, 0.5)  # those that the authors choose among


class RAPS(APS):
    """APS with a penalty on every class beyond the k_reg-th, which keeps improbable classes out of large sets.

    Args:
        alpha, randomised, temperature, tune: as of `APS`.
        k_reg: whole number >= 0; None: the ceil((m + 1)(1 - alpha))-th smallest rank of the true class among m tuning samples.
        penalty: number >= 0; None: the one of `PENALTIES` with the smallest sets on the tuning samples, on ties the smallest.
    """

    name: ClassVar[str] = "raps"
    reference: ClassVar[str] = "arXiv 2009.14193"

    def __init__(
        self,
        alpha: float = 0.1,
        k_reg: int | None = None,
        penalty: float | None = None,
        randomised: bool = False,
        temperature: bool = False,
        tune: float = 0.2,
    ) -> None:
        super().__init__(alpha, randomised, temperature, tune)
        self.k_reg = None if k_reg is None else parse_number(k_reg, "raps: k_reg")
        self.penalty = None if penalty is None else parse_number(penalty, "raps: penalty")
        if self.k_reg is not None and (self.k_reg < 0 or self.k_reg != int(self.k_reg)):
            raise ConfigError(f"raps: k_reg = {k_reg!r}, expected a whole number >= 0, or none to choose it")
        if self.penalty is not None and self.penalty < 0:
            raise ConfigError(f"raps: penalty = {penalty!r}, expected a number >= 0, or none to choose it")
        self._tunes = self.k_reg is None or self.penalty is None
        self._rank, self._penalty = int(self.k_reg or 0), self.penalty or 0.0

    def parameters(self) -> dict[str, Any]:
        return {**super().parameters(), "k_reg": self.k_reg, "penalty": self.penalty}

    def _scores(self, p: Tensor, u: Tensor | None) -> Tensor:
        return cumulative_scores(p, u, self._penalty, self._rank)

    def _choose(self, p: Tensor, labels: Tensor, u: Tensor | None) -> None:
        if self.k_reg is None:
            true = p.gather(1, labels[:, None])
            ranks = 1 + (p > true).sum(dim=1)
            self._rank = int(min(threshold(ranks.double().numpy(), self.alpha), p.shape[1]))
        if self.penalty is None:
            sizes = {}
            for penalty in PENALTIES:
                scores = cumulative_scores(p, u, penalty, self._rank)
                q = threshold(scores.gather(1, labels[:, None])[:, 0].numpy(), self.alpha)
                sizes[penalty] = float((scores <= q).sum(dim=1).double().mean())
            self._penalty = min(sizes, key=lambda penalty: sizes[penalty])  # the first of equals

    def summary(self) -> dict[str, float]:
        return {**super().summary(), "k_reg": float(self._rank), "penalty": self._penalty}
