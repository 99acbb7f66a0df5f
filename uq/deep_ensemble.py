"""Deep ensembles: networks that were trained from different starts (Lakshminarayanan et al., NeurIPS 2017, arXiv 1612.01474).

The mean of the members' probabilities; expected entropy and mutual information as in `uq.monte_carlo`. Adversarial training
of the members, which the paper adds, is a matter of how they were trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from robustbench_ext.errors import ConfigError
from robustbench_ext.models.observe import Observations
from robustbench_ext.randomness import SampleRandom
from uq.base import Estimator, Reading
from uq.monte_carlo import MemberPasses, checked_members, read_passes, sample_logits
from uq.monte_carlo_regression import Mixture, MonteCarloRegressor, sample_predictions
from uq.regression import Samples

E = TypeVar("E", bound="DeepEnsemble")
R = TypeVar("R", bound="DeepEnsembleRegressor")


def member_names(members: object, what: str) -> tuple[str, ...]:
    """The names of members, as a suite lists them."""
    if isinstance(members, str) or not isinstance(members, Sequence) or not members:
        raise ConfigError(
            f"{what}: members = {members!r}, expected a list of other models by name, such as [seed-1, seed-2]"
        )
    names = tuple(str(m) for m in members)
    if len(set(names)) < len(names):
        raise ConfigError(f"{what}: members = {', '.join(names)}: the same member twice adds nothing")
    return names


def no_members(what: str, names: Sequence[str]) -> ConfigError:
    """The error of an ensemble whose networks have not been handed over."""
    return ConfigError(
        f"{what}: the networks of {', '.join(names)} are not loaded: call with_members([...]) with one module each"
    )


class DeepEnsemble(Estimator):
    """The evaluated model and its `members`, each with equal weight.

    Args:
        members: names of the other models; their networks are handed over by `with_members`.
    Cost: one forward pass of each member and of the model.
    """

    name: ClassVar[str] = "deep-ensemble"
    reference: ClassVar[str] = "arXiv 1612.01474"
    needs_fit = False
    reads_inputs = True
    differentiable = False

    def __init__(self, members: Sequence[str]) -> None:
        self.members = member_names(members, self.name)
        self._modules: tuple[nn.Module, ...] = ()

    def parameters(self) -> dict[str, Any]:
        return {"members": list(self.members)}

    def with_members(self: E, members: list[nn.Module]) -> E:
        """Hand over the networks of `members`, in the same order; each takes the inputs that the model takes."""
        self._modules = checked_members(members, self.members, self.name)
        return self

    def _fit(self, held_out: Observations, model: nn.Module | None) -> None:
        pass

    def _read_inputs(
        self, model: nn.Module, x: Tensor, seen: Observations, random: SampleRandom, batch_size: int
    ) -> Reading:
        if not self._modules:
            raise no_members(self.name, self.members)
        others = sample_logits(MemberPasses(self._modules), model, x, random, len(self._modules), batch_size)
        own = seen.logits.double().log_softmax(dim=1)
        if others.shape[1:] != own.shape:
            raise ConfigError(f"{self.name}: members give {others.shape[2]} classes, the model {own.shape[1]}")
        return read_passes(torch.cat([own[None], others]))


class DeepEnsembleRegressor(MonteCarloRegressor):
    """The mean of the evaluated model and its `members`, their variance, and intervals (see `MonteCarloRegressor`).

    Args:
        members: names of the other models; their networks are handed over by `with_members`.
        intervals: "conformal" or "gaussian".
    """

    name: ClassVar[str] = "deep-ensemble"
    reference: ClassVar[str] = "arXiv 1612.01474"

    def __init__(self, members: Sequence[str], intervals: str = "conformal") -> None:
        super().__init__(intervals)
        self.members = member_names(members, self.name)
        self._modules: tuple[nn.Module, ...] = ()

    def parameters(self) -> dict[str, Any]:
        return {"members": list(self.members), "intervals": self.intervals}

    def with_members(self: R, members: list[nn.Module]) -> R:
        """Hand over the networks of `members`, in the same order; each takes float32 (N, d) in raw units."""
        self._modules = checked_members(members, self.members, self.name)
        return self

    def _passes(self, samples: Samples, model: nn.Module, seed: int) -> Mixture:
        if not self._modules:
            raise no_members(self.name, self.members)
        networks = MemberPasses(self._modules)
        others = sample_predictions(networks, model, samples, seed, self.name, len(self._modules))
        own = torch.from_numpy(samples.prediction).double()
        return Mixture(torch.cat([own[None], others]), own)
