"""Ensembles as models of a suite: several trained networks made into one, which every attack then goes against.

    models:
      - {name: cnn, evaluate: false, train: {defense: standard, network: small-cnn, seeds: 3}}
      - {name: resnet, evaluate: false, train: {defense: standard, network: small-resnet, seeds: 3}}
      - {name: ensemble, make: {name: ensemble, of: [cnn, resnet]}}

Equal weights within a family, learnt ones over families: see `uq.ensembles`. The estimator `deep-ensemble` is read off a model
that the attack goes against alone; it shows what averaging does to inputs that were made for one member.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from defenses.base import at_least, one_of
from defenses.making import Made, Maker
from robustbench_ext.data.base import Dataset
from robustbench_ext.errors import ConfigError
from uq.ensembles import RULES, check_families, make_ensemble


@dataclass(frozen=True, kw_only=True)
class TwoTierEnsemble(Maker):
    """The weighted mean probability of its members, as one network.

    Args:
        families: names of members by the name of their family; by default one family for each structure.
        weights: of families: "learned" by the likelihood of the calibration split, "uniform", or "inverse-variance", one over
            every family's Brier score there.
        batch_size: of passes.
    An ensemble has no last linear layer of its own, so what reads `penultimate` features is left out for it; layers of its
    members can be named (`members.0.fc1`).
    """

    name: ClassVar[str] = "ensemble"
    least: ClassVar[int] = 2
    alike: ClassVar[bool] = False
    reference: ClassVar[str] = "arXiv 2505.00312"

    families: Mapping[str, Sequence[str]] | None = None
    weights: str = "learned"
    batch_size: int = 250

    def __post_init__(self) -> None:
        one_of(self.weights, RULES, "ensemble: weights")
        at_least(self.batch_size, 1, "ensemble: batch_size")
        if self.families is not None:
            told = self.families if isinstance(self.families, Mapping) else {}
            if not told or not all(isinstance(family, (list, tuple)) for family in told.values()):
                raise ConfigError(
                    f"ensemble: families = {self.families!r}, expected lists of members by name: {{cnn: [a, b], resnet: [c]}}"
                )
            object.__setattr__(self, "families", {str(name): list(map(str, f)) for name, f in told.items()})

    def architecture(self, members: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
        if self.families is not None:
            check_families(self.families, list(members))
        first = next(iter(members.values()))
        return {
            "spec": "ensemble",
            "shape": first["shape"],
            "num_classes": first["num_classes"],
            "mean": None,
            "std": None,
            "kwargs": {"members": list(members.values())},
        }

    def make(self, members: Mapping[str, nn.Module], data: Dataset, seed: int) -> Made:
        if "calibration" not in data.splits:
            raise ConfigError(
                f"ensemble: its weights are fitted, and its members compared, on the calibration split, which {data.name} lacks"
            )
        held_out = data["calibration"]
        x, labels = held_out.images(slice(None)), torch.from_numpy(held_out.labels)
        network, report = make_ensemble(members, x, labels, self.families, self.weights, self.batch_size)
        return Made(network.state_dict(), report)
