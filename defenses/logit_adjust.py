"""Post-hoc logit adjustment: a trained network's logits less what it owes to the class frequencies.

Menon et al., *Long-tail learning via logit adjustment*, ICLR 2021, arXiv 2007.07314: predict argmax z - tau log pi, pi the
classes' shares of the training data. It is a shift of the last layer's bias, so what is made is a network like any other,
that attacks, detectors and calibration meet as it is: an attack follows the adjusted logits.

The loss that is trained with log pi added instead is `class-prior` with balanced-softmax. Doing both corrects twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import nn

from defenses.balanced import log_priors
from defenses.base import at_least
from defenses.head_align import head_of
from defenses.making import Made, Maker
from robustbench_ext.data.base import Dataset
from robustbench_ext.errors import ConfigError
from robustbench_ext.numbers import read_numbers


@dataclass(frozen=True, kw_only=True)
class LogitAdjust(Maker):
    """A network with its logits adjusted to equally frequent classes.

    Args:
        tau: what the log prior is multiplied by; 1 is right for calibrated probabilities, 0 changes nothing.
    """

    name: ClassVar[str] = "logit-adjust"
    reference: ClassVar[str] = "arXiv 2007.07314"

    tau: float = 1.0

    def __post_init__(self) -> None:
        read_numbers(self, "logit-adjust")
        at_least(self.tau, 0, "logit-adjust: tau")

    def make(self, members: Mapping[str, nn.Module], data: Dataset, seed: int) -> Made:
        if len(members) > 1:
            raise ConfigError(f"logit-adjust: of {', '.join(members)}, expected one model")
        if "train" not in data.splits:
            raise ConfigError(f"logit-adjust: {data.name} has no train split to count classes in")
        (network,) = members.values()
        name, head = head_of(network, len(data.classes), data.shape, "logit-adjust")
        if head.bias is None:
            raise ConfigError(f"logit-adjust: the network's last layer '{name}' has no bias that could be shifted")
        shift = -self.tau * log_priors(np.bincount(data["train"].labels, minlength=len(data.classes)))
        state = {key: value.clone() for key, value in network.state_dict().items()}
        bias = state[f"{name}.bias"]
        bias += torch.from_numpy(shift).to(bias)
        return Made(state, {"tau": self.tau, "head": name, "shift": [float(f"{s:.6g}") for s in shift]})
