"""Split-point self-consistency of a classifier (SPC-UQ; Zhao, Chen 2025, arXiv 2509.13262): SDS and softmax correction.

With p_c a classifier's probability of class c, pi_c the true one and y_c in {0, 1}, the masked mean absolute residuals are

    A_c = E[(y_c - p_c)_+] = pi_c (1 - p_c),   B_c = E[(p_c - y_c)_+] = (1 - pi_c) p_c,   M_c = E|y_c - p_c| = A_c + B_c.

They are unconditional (0 on the other side), unlike the regressor's upper and lower MAR. Given the side, the residual is known
without any head: 1 - p_c or p_c. So M_c alone shows whether p_c is consistent,

    SDS = sum_c |2 p_c (1 - p_c) - M_c| = sum_c |(p_c - pi_c) (1 - 2 p_c)|,

and the three heads together say by how much p_c is wrong:

    pi_c - p_c = A_c - B_c = M_c - 2 B_c = 2 A_c - M_c.

Of heads that contradict each other by e = M - A - B the three are A - B, A - B + e and A - B - e. Hence their mean is A - B
itself, and their minimum, which the published code takes, is A - B - |e|: too small by |e| in every class, whichever way the
heads err. The plain difference had the smaller error in every seed of `benchmarks/uq/split_point.py`, so it is the default.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from robustbench_ext.errors import ConfigError
from robustbench_ext.models.observe import PENULTIMATE, Observations
from robustbench_ext.models.options import whole
from robustbench_ext.numbers import parse_number
from uq.base import Estimator, Reading
from uq.split_point_heads import Training, fit_heads

CORRECTIONS = ("difference", "minimum")

_FLOOR = 1e-6  # of a corrected probability, before the row is divided by its sum
_BLOCK = 1 << 22  # class entries read at once: bounds the temporaries, whatever N and K


def discrepancy(p: Tensor, total: Tensor) -> Tensor:
    """SDS (N,) of probabilities p and total MARs M, both (N, K). Blind where p = 1/2."""
    return (2 * p * (1 - p) - total).abs().sum(dim=1)


def corrections(total: Tensor, above: Tensor, below: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The three estimates of pi - p: A - B, M - 2 B and 2 A - M, in the shape of M, A and B."""
    return above - below, total - 2 * below, 2 * above - total


def corrected(
    p: Tensor, total: Tensor, above: Tensor, below: Tensor, correction: str = "difference", gate: float | None = None
) -> Tensor:
    """Probabilities (N, K) moved by the estimated pi - p, at least 1e-6 before each row is divided by its sum.

    Args:
        p, total, above, below: (N, K); M, A and B are `total`, `above` and `below`.
        correction: "difference" (A - B) or "minimum" (the smallest of the three, as published).
        gate: leave an entry alone where |A + B - M| is not below this; published is 0.05. None: move all.
    """
    estimates = corrections(total, above, below)
    delta = estimates[0] if correction == "difference" else torch.stack(estimates).amin(dim=0)
    if gate is not None:
        delta = torch.where((above + below - total).abs() < gate, delta, torch.zeros_like(delta))
    moved = (p + delta).clamp(_FLOOR, 1.0)
    return moved / moved.sum(dim=1, keepdim=True)


def entropy(p: Tensor) -> Tensor:
    """Entropy (N,) of positive probabilities (N, K), in nats."""
    return -(p * p.log()).sum(dim=1)


class SplitPointClassifier(Estimator):
    """Three branches of heads on frozen features, fitted to the masked residuals of the calibration split.

    Logits are log of the corrected probabilities; no temperature is involved. The most probable class may change. Epistemic is
    SDS of the uncorrected probabilities; aleatoric is the entropy of the corrected ones, in nats: the whole uncertainty of the
    prediction, of which SDS is no part.

    The heads must not be fitted to what the classifier was trained on: there it makes no mistakes to learn from.

    Args:
        tap: the features that the heads read.
        correction, gate: see `corrected`. As published: "minimum" with a gate of 0.05.
        width: hidden units of a branch; None: as many as features, as published.
        steps, batch_size, learning_rate, weight_decay: see `Training`.
        early_stopping: on by default. A few hundred calibration samples are soon learnt by heart; the number of steps
            is chosen on a fifth that is held back, and the heads are fitted again on all.
        seed: of initial weights, batches and the held-back samples.

    Heads start from the classes' mean residuals. Other estimators' data reach them so too: scikit-learn's probabilities as
    `Observations(log p, labels, {"penultimate": x})`.
    """

    name: ClassVar[str] = "split-point"
    reference: ClassVar[str] = "arXiv 2509.13262"

    def __init__(
        self,
        tap: str = PENULTIMATE,
        correction: str = "difference",
        gate: float | None = None,
        width: int | None = None,
        steps: int = 3000,
        batch_size: int = 128,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.0,
        early_stopping: bool = True,
        seed: int = 0,
    ) -> None:
        if correction not in CORRECTIONS:
            raise ConfigError(
                f"{self.name}: correction = {correction!r}, expected one of {', '.join(CORRECTIONS)} (the mean of the three "
                f"estimates is the difference itself)"
            )
        self.taps = (tap,)
        self.correction = correction
        self.gate = None if gate is None else parse_number(gate, f"{self.name}: gate")
        if self.gate is not None and not self.gate > 0:
            raise ConfigError(f"{self.name}: gate = {self.gate}, expected a number > 0, or null for none")
        self.width = None if width is None else whole(width, 1, f"{self.name}: width")
        training = Training(steps, batch_size, learning_rate, weight_decay, early_stopping)
        self.training = training.checked(self.name, least_batch=1)
        self.seed = whole(seed, 0, f"{self.name}: seed")
        self._notes: list[str] = []
        self._steps = 0

    def parameters(self) -> dict[str, Any]:
        named = {"tap": self.taps[0], "correction": self.correction, "gate": self.gate, "width": self.width}
        return named | vars(self.training) | {"seed": self.seed}

    def warnings(self) -> list[str]:
        return list(self._notes)

    def summary(self) -> dict[str, float]:
        return {"steps": float(self._steps)}

    def _fit(self, held_out: Observations, model: nn.Module | None) -> None:
        features, labels = held_out.features[self.taps[0]].float(), held_out.labels
        p = held_out.logits.double().softmax(dim=1).float()

        def residuals(index: Tensor) -> Tensor:
            """Targets (3, n, K): |y - p|, its part where y = 1, its part where y = 0."""
            below = p[index]
            rows, columns = torch.arange(len(index)), labels[index]
            above = torch.zeros_like(below)
            above[rows, columns] = 1 - below[rows, columns]
            below[rows, columns] = 0.0
            return torch.stack([above + below, above, below])

        def loss(out: Tensor, batch: Tensor) -> Tensor:
            return (out - residuals(batch)).square().mean(dim=(1, 2)).sum()

        size = max(1, _BLOCK // p.shape[1])
        start = torch.stack([residuals(block).sum(dim=1) for block in torch.arange(len(p)).split(size)]).sum(dim=0)
        width = self.width or features.shape[1]
        self._heads, self._steps = fit_heads(features, width, start / len(p), self.training, loss, loss, self.seed)
        missing = p.shape[1] - len(labels.unique())
        self._notes = (
            [f"{missing} of {p.shape[1]} classes have no calibration sample: for them only B is learnt"]
            if missing
            else []
        )

    def _moved(self, logits: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """Corrected probabilities (n, K) and SDS (n,)."""
        p = logits.double().softmax(dim=1)
        total, above, below = self._heads(features.float()).double()
        return corrected(p, total, above, below, self.correction, self.gate), discrepancy(p, total)

    def _calibrate(self, seen: Observations) -> Tensor:
        return self._moved(seen.logits, seen.features[self.taps[0]])[0].log()

    def _read(self, seen: Observations) -> Reading:
        size = max(1, _BLOCK // seen.logits.shape[1])
        parts = []
        for logits, features in zip(seen.logits.split(size), seen.features[self.taps[0]].split(size), strict=True):
            p, sds = self._moved(logits, features)
            parts.append((p.log(), entropy(p), sds))
        logits, aleatoric, epistemic = (torch.cat(column) for column in zip(*parts, strict=True))
        return Reading(logits, aleatoric=aleatoric, epistemic=epistemic)
