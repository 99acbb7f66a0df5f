"""Known and unknown inputs for detectors that choose their parameters, made from the calibration split.

The first half of its samples (every second one) is for choosing; alarm thresholds of such a detector are set on the other
half (`held_out`), which it has not seen. Outliers are other samples of a set than those of the suite's own conditions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from robustbench_ext import fingerprint
from robustbench_ext.conditions import Condition, Outliers, UnderAttack, parse_conditions
from robustbench_ext.data.base import Dataset, Split, Subset
from robustbench_ext.errors import ConfigError

SPLIT = "calibration"


def chosen_on(n: int) -> np.ndarray:
    """Rows of n calibration samples that parameters are chosen on."""
    return np.arange(0, n, 2)


def held_out(n: int) -> np.ndarray:
    """The other rows."""
    return np.arange(1, n, 2)


def condition_of(entry: Mapping[str, Any]) -> Condition:
    """The condition that `validate` names: one attack with one budget, or one outlier set."""
    found = parse_conditions([dict(entry)])[1:]
    if len(found) != 1 or not isinstance(found[0], (UnderAttack, Outliers)):
        raise ConfigError(
            f"validate = {dict(entry)!r}: expected one attack, such as {{attack: fgsm, eps: 0.1}}, or one outlier set, such as "
            f"{{outliers: symbols}}"
        )
    if found[0].against is not None:
        raise ConfigError(f"validate = {dict(entry)!r}: an attack on a detector cannot be what detectors are fitted on")
    return found[0]


class ValidationData:
    """The samples of one `validate` entry.

    Args:
        conditions: of the suite; outliers are taken beyond those that they show.
    """

    def __init__(self, entry: Mapping[str, Any], data: Dataset, conditions: Iterable[Condition]) -> None:
        self.condition = condition_of(entry)
        self.known: Split = Subset(data[SPLIT], chosen_on(len(data[SPLIT])))
        self.unknown: Split | None = None
        if isinstance(self.condition, Outliers):
            mine = self.condition
            shown = max([c.n for c in conditions if isinstance(c, Outliers) and c.name == mine.name], default=0)
            more = Outliers(mine.label, mine.name, shown + mine.n).samples(data, SPLIT, None)
            self.unknown = Subset(more, np.arange(shown, shown + mine.n))

    def identity(self, seed: int, batch_size: int) -> dict[str, Any]:
        """All that the inputs depend on, besides the model."""
        unknown = self.unknown
        return {
            "condition": self.condition.spec(),
            "known": self.known.fingerprint(),
            "unknown": None if unknown is None else fingerprint.hash_strings([unknown.fingerprint(), *unknown.ids]),
            "seed": seed,
            "batch_size": batch_size if self.condition.batch_dependent else None,
        }

    def make(self, model: nn.Module, seed: int, batch_size: int) -> Any:
        """`detectors.Validation` for a model."""
        from detectors.validation import with_attack, with_outliers

        known = self.known.images(slice(None))
        if self.unknown is not None:
            return with_outliers(known, self.unknown.images(slice(None)), self.condition.label)
        assert isinstance(self.condition, UnderAttack)  # noqa: S101 - condition_of has seen to it
        labels = torch.from_numpy(self.known.labels)
        return with_attack(model, known, labels, self.condition.attack, self.known.ids, seed, batch_size=batch_size)
