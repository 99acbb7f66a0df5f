"""WEAT: weighted energy adversarial training (Mirza et al., ECCV 2024, arXiv 2407.06315).

    w_i = 1 / log(1 + exp(|E(x_i)|)),   E(x) = -logsumexp f(x),
    WEAT_NAT: L = mean( w_i [ CE(f(x_i), y_i)  + beta KL(p(x_i) || p(x*_i)) ] )
    WEAT_ADV: L = mean( w_i [ CE(f(x*_i), y_i) + beta KL(p(x_i) || p(x*_i)) ] )

The weight is of the natural input, from the logits of the loss itself, detached; it multiplies both terms and is not
normalised over the batch. The attack is that of TRADES, without weights. Samples of high energy (E near 0) weigh most.

Two things to know before crediting the weights. They depend on a constant added to all logits, which changes no
prediction, so centring the logits changes the method. And they are smaller than one half on trained networks (0.2 at
E = -5), so the gradient is several times smaller than that of TRADES while weight decay is not: `normalise` keeps the
shape of the weights and takes that effect away.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from defenses.base import (
    Batch,
    Crafter,
    Defense,
    Loss,
    at_least,
    batch_mean,
    cross_entropy,
    detached,
    one_of,
    read_booleans,
)
from defenses.trades import energy_terms, kl_natural_adversarial
from robustbench_ext.attacks.inner import InnerAttack
from robustbench_ext.attacks.threat import Threat
from robustbench_ext.models.energy import marginal_energy
from robustbench_ext.numbers import read_numbers

VARIANTS = ("adv", "nat")


def energy_weights(energy: Tensor) -> Tensor:
    """1 / log(1 + exp|E|), (B,), in (0, 1 / log 2]: even in E, strictly falling in |E|, about 1 / |E| for large ones.

    By softplus, which does not overflow; the literal formula gives 0 for |E| > 88.7 in float32.
    """
    return 1 / F.softplus(energy.abs())


@dataclass(frozen=True, kw_only=True)
class WEAT(Defense):
    """TRADES with every sample weighted by its energy.

    Args:
        variant: "adv" (cross-entropy on x*, the stronger one in the paper) or "nat" (on x).
        beta: weight of the divergence; 6 in the published script (the function's own default for "adv" is 7; which was
            used for which table is not known).
        normalise: divide the weights by their mean in the batch; not in the paper, see the module.
    """

    variant: str = "adv"
    beta: float = 6.0
    normalise: bool = False

    name: ClassVar[str] = "weat"
    class_losses: ClassVar[bool] = True
    soft_targets: ClassVar[bool] = True
    reference: ClassVar[str] = "arXiv 2407.06315"

    def __post_init__(self) -> None:
        read_numbers(self, "weat")
        read_booleans(self, "weat")
        one_of(self.variant, VARIANTS, "weat: variant")
        at_least(self.beta, 0, "weat: beta")

    def attack(self, threat: Threat, steps: int, step_size: float | None) -> Crafter:
        return InnerAttack(threat, steps, step_size, objective="kl", start="gaussian")

    def loss(self, model: nn.Module, batch: Batch, state: nn.Module | None = None) -> Loss:
        logits, logits_adv = model(batch.x), model(batch.x_adv)
        weights = energy_weights(marginal_energy(logits.detach()))
        if self.normalise:
            weights = weights / batch_mean(weights)
        labelled = cross_entropy(logits_adv if self.variant == "adv" else logits, batch)
        divergence = kl_natural_adversarial(logits, logits_adv)
        value = (weights * (labelled + self.beta * divergence)).mean()
        terms = energy_terms(logits.detach(), logits_adv.detach(), batch.y)
        return Loss(value, detached(ce=labelled, kl=divergence, weight=weights, **terms))
