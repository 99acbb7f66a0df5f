"""Weight aligning: the rows of a biased head brought to one length, after training and without data.

Zhao et al., *Maintaining Discrimination and Fairness in Class Incremental Learning*, CVPR 2020, arXiv 1911.07053. A network
that has seen some classes more often gives them longer rows in its last layer, and so larger logits:

    gamma = mean |w_k| over the other classes / mean |w_k| over the favoured ones;   logits of the favoured ones times gamma

There the favoured classes are those learnt last. Here they are those with the most training samples. The authors also keep the
head without bias and its weights at 0 or above, by clamping them after every step of training, and distil old classes: that is
training, and not done here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from defenses.base import read_booleans
from defenses.making import Made, Maker
from robustbench_ext.data.base import Dataset
from robustbench_ext.errors import ConfigError
from robustbench_ext.models.contract import frozen_eval


def alignment(weight: Tensor, favoured: Sequence[int], norm: int = 2, cap: bool = True) -> float:
    """gamma for a head's weight (K, d).

    Args:
        favoured: classes whose logits are to be scaled.
        norm: 1 (the authors' code) or 2 (the paper's text and ports of it).
        cap: at most 1, as in the authors' code: favoured classes are never made stronger.
    """
    rows = torch.zeros(len(weight), dtype=torch.bool)
    rows[list(favoured)] = True
    if rows.all() or not rows.any():
        raise ConfigError(
            f"weight-align: {int(rows.sum())} of {len(rows)} classes are favoured; each group needs a class"
        )
    lengths = weight.double().norm(p=norm, dim=1)
    gamma = float(lengths[~rows].mean() / lengths[rows].mean())
    return min(gamma, 1.0) if cap else gamma


def head_of(
    network: nn.Module, classes: int, shape: Sequence[int] | None = None, what: str = "weight-align"
) -> tuple[str, nn.Linear]:
    """The last linear layer that gives as many outputs as there are classes, with its name.

    Args:
        shape: of an input; with it, what the layer gives must be the network's logits as they are.
        what: asks, for the message.

    Raises:
        ConfigError: there is none, or something follows it.
    """
    found = [
        (name, part)
        for name, part in network.named_modules()
        if isinstance(part, nn.Linear) and part.out_features == classes
    ]
    if not found:
        raise ConfigError(f"{what}: the network has no linear layer of {classes} outputs to correct")
    if shape is not None and not _is_last(network, found[-1][1], shape):
        raise ConfigError(
            f"{what}: what the network's last linear layer '{found[-1][0]}' gives is not its logits yet (a head of cosines, a "
            f"temperature), so that correcting the layer would not correct them"
        )
    return found[-1]


@torch.no_grad()
def _is_last(network: nn.Module, head: nn.Linear, shape: Sequence[int]) -> bool:
    given: list[Tensor] = []
    handle = head.register_forward_hook(lambda _, __, output: given.append(output.clone()))
    try:
        with frozen_eval(network):
            logits = network(torch.linspace(0, 1, math.prod(shape), device=head.weight.device).reshape(1, *shape))
    finally:
        handle.remove()
    return len(given) == 1 and torch.equal(given[0], logits)


@dataclass(frozen=True, kw_only=True)
class WeightAlign(Maker):
    """A network with its head aligned.

    Args:
        favoured: classes by number; none for those with more training samples than the mean over classes.
        norm: of the rows, 2 or 1.
        cap: gamma at most 1.
        bias: whether the bias of favoured classes is scaled too. Scaling logits, as the authors do, scales it; ports of their
            code leave it.
    """

    name: ClassVar[str] = "weight-align"
    reference: ClassVar[str] = "arXiv 1911.07053"

    favoured: tuple[int, ...] = ()
    norm: int = 2
    cap: bool = True
    bias: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "favoured", tuple(self.favoured))
        read_booleans(self, "weight-align")
        if self.norm not in (1, 2):
            raise ConfigError(f"weight-align: norm = {self.norm}, expected 1 or 2")

    def make(self, members: Mapping[str, nn.Module], data: Dataset, seed: int) -> Made:
        if len(members) > 1:
            raise ConfigError(f"weight-align: of {', '.join(members)}, expected one model")
        (network,) = members.values()
        favoured = self.favoured or self._frequent(data)
        name, head = head_of(network, len(data.classes), data.shape)
        gamma = alignment(head.weight.detach(), favoured, self.norm, self.cap)
        state = {key: value.clone() for key, value in network.state_dict().items()}
        for key in ("weight", "bias") if self.bias else ("weight",):
            if f"{name}.{key}" in state:
                state[f"{name}.{key}"][list(favoured)] *= gamma
        return Made(state, {"gamma": gamma, "head": name, "favoured": [data.classes[k] for k in favoured]})

    @staticmethod
    def _frequent(data: Dataset) -> tuple[int, ...]:
        if "train" not in data.splits:
            raise ConfigError(
                f"weight-align: {data.name} has no train split to count classes in; name them: favoured: [0, 1]"
            )
        counts = np.bincount(data["train"].labels, minlength=len(data.classes))
        favoured = np.flatnonzero(counts > counts.mean())
        if not len(favoured):
            raise ConfigError(
                f"weight-align: all classes of {data.name} have as many training samples; there is nothing to align"
            )
        return tuple(int(k) for k in favoured)
