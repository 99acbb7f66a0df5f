"""Losses that attacks maximise: (logits (N, K), labels (N,)) -> (N,), larger is nearer to a mistake.

Targeted losses take the target class as a third argument and grow as the target wins.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from robustbench_ext.errors import ConfigError, unknown_name
from robustbench_ext.models import energy

Loss = Callable[[Tensor, Tensor], Tensor]
TargetedLoss = Callable[[Tensor, Tensor, Tensor], Tensor]


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """-log p_y, natural logarithm."""
    return F.cross_entropy(logits, labels, reduction="none")


def _pick(logits: Tensor, classes: Tensor) -> Tensor:
    return logits.gather(1, classes[:, None])[:, 0]


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """The best wrong logit minus the true one: positive where the sample is misclassified."""
    return logits.scatter(1, labels[:, None], -torch.inf).amax(dim=1) - _pick(logits, labels)


def dlr(logits: Tensor, labels: Tensor) -> Tensor:
    """Difference of logits ratio, (max_{k != y} z_k - z_y) / (z_(1) - z_(3)) (Croce and Hein 2020).

    Blind to shifts and scales of the logits, so a saturated softmax does not hide its gradient. With two classes there
    is no third logit (the ratio would be constant), so this is the plain margin.
    """
    if logits.shape[1] < 3:
        return margin(logits, labels)
    top = logits.topk(3, dim=1).values
    return margin(logits, labels) / (top[:, 0] - top[:, 2]).clamp_min(1e-12)


def dlr_targeted(logits: Tensor, labels: Tensor, target: Tensor) -> Tensor:
    """(z_t - z_y) / (z_(1) - (z_(3) + z_(4)) / 2) (Croce and Hein 2020).

    The ratio needs four classes: with three, z_t and z_y can be z_(1) and z_(3), and with two they always are the only
    ones, so that the ratio is constant and its gradient zero. Below four classes this is the plain difference.
    """
    difference = _pick(logits, target) - _pick(logits, labels)
    if logits.shape[1] < 4:
        return difference
    top = logits.topk(4, dim=1).values
    return difference / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2).clamp_min(1e-12)


def margin_targeted(logits: Tensor, labels: Tensor, target: Tensor) -> Tensor:
    """z_t - z_y: positive where the target beats the true class."""
    return _pick(logits, target) - _pick(logits, labels)


def joint_energy(logits: Tensor, labels: Tensor) -> Tensor:
    """E(x, y) = -z_y: the true class's evidence, whatever the others do."""
    return energy.joint_energy(logits, labels)


def marginal_energy(logits: Tensor, labels: Tensor) -> Tensor:
    """E(x) = -logsumexp z: raised, the input looks unlike the training data, whatever its class.

    The third energy, E(x, y) - E(x), is the cross-entropy (see arXiv 2407.06315).
    """
    return energy.marginal_energy(logits)


def ce_targeted(logits: Tensor, labels: Tensor, target: Tensor) -> Tensor:
    """log p_t: the target's own cross-entropy, with the sign turned."""
    return -cross_entropy(logits, target)


def joint_energy_targeted(logits: Tensor, labels: Tensor, target: Tensor) -> Tensor:
    """-E(x, t) = z_t: the target's evidence, whatever the others do."""
    return _pick(logits, target)


LOSSES: dict[str, Loss] = {
    "ce": cross_entropy,
    "dlr": dlr,
    "margin": margin,
    "joint-energy": joint_energy,
    "marginal-energy": marginal_energy,
}
TARGETED_LOSSES: dict[str, TargetedLoss] = {
    "ce": ce_targeted,
    "dlr": dlr_targeted,
    "margin": margin_targeted,
    "joint-energy": joint_energy_targeted,
}


def get_loss(name: str) -> Loss:
    """The loss of that name."""
    if name not in LOSSES:
        raise ConfigError(unknown_name("attack loss", name, LOSSES))
    return LOSSES[name]


def get_targeted_loss(name: str) -> TargetedLoss:
    """The targeted loss of that name, which takes the target class as its third argument."""
    if name not in TARGETED_LOSSES:
        raise ConfigError(f"a targeted attack has no loss '{name}': expected one of {', '.join(TARGETED_LOSSES)}")
    return TARGETED_LOSSES[name]


def check_loss(name: str, target: str | int) -> None:
    """Raise ConfigError for a loss that does not exist or, where there is a target, has no targeted form."""
    get_loss(name)
    if target != "none":
        get_targeted_loss(name)


def rivals(clean_logits: Tensor, labels: Tensor, count: int) -> Tensor:
    """The `count` wrong classes with the highest logits, best first, (N, min(count, K - 1))."""
    others = clean_logits.scatter(1, labels[:, None], -torch.inf)
    return others.topk(min(count, clean_logits.shape[1] - 1), dim=1).indices
