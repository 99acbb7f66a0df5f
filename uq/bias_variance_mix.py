"""Mixing the mean of Monte-Carlo passes with the single deterministic pass (after BVPO, arXiv 2510.05095; see `uq.mixing`).

    p = alpha p_S + (1 - alpha) p_e

p_S, the mean of S random passes (dropout, augmentations, members of an ensemble), is noisy while S is small; p_e, the pass
without randomness, is biased against the mean of infinitely many. The weight is one number for all inputs, pooled over the
held-out ones: a prediction alone is far too little to estimate it from. It is

    "passes": towards infinitely many passes, B^2 / (B^2 + V / S) with B = |p_e - p_inf| and V the variance of one pass; labels
        are not looked at;
    "truth": towards the labels, by least squares: the weight of least Brier score, or squared error, on the held-out samples;
    a number: fixed.

Numerator and denominator are estimated from more passes than are mixed (`FIT_PASSES`), with the noise of S of them put back;
then the weight is shrunk to `prior`, as if `strength` further samples had said so.

What to expect (benchmarks/uq/mixing.py: dropout and moved images, digits and mnist5k, 1 to 20 passes, five seeds). On inputs
like the held-out ones the mix is rarely better than the single pass in Brier score, more often in NLL. "truth", shrunk to the
single pass by 100 samples, is the default: no case was clearly worse than the single pass, clean, noisy or moved, which cannot
be said of passes alone, of alpha = 1/2, or of "passes" (infinitely many passes may be worse than the single one). On moved
images more weight on the passes would have been better: held-out samples do not know that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from robustbench_ext.errors import ConfigError, DataError
from robustbench_ext.models.contract import check_images
from robustbench_ext.models.observe import Observations
from robustbench_ext.numbers import parse_number
from robustbench_ext.randomness import SampleRandom
from uq.base import Estimator, Reading
from uq.deep_ensemble import member_names, no_members
from uq.mixing import Ratio, Replicates, mix
from uq.monte_carlo import (
    AugmentedPasses,
    DropoutPasses,
    MemberPasses,
    Source,
    checked_members,
    checked_passes,
    entropy,
    read_passes,
    sample_logits,
)
from uq.monte_carlo_regression import Mixture, MonteCarloRegressor, sample_predictions
from uq.regression import Samples

C = TypeVar("C", bound="BiasVarianceMix")
R = TypeVar("R", bound="BiasVarianceMixRegressor")

FIT_PASSES = 20
RULES = ("passes", "truth")
NO_VARIANCES = ("entropy", "variance", "inverse-variance")  # what others weigh a single pass by


def mixing_ratio(passes: Tensor, single: Tensor, draws: int, target: Tensor | None = None) -> Ratio:
    """alpha* of the mean of `draws` passes, pooled over inputs and coordinates.

    Args:
        passes: R >= 2 passes (R, N, ...), as many or more than are mixed.
        single: the deterministic pass (N, ...).
        target: what is true (N, ...); without it, what infinitely many passes would give.
    """
    found = Replicates.of(passes, single[None]).pooled()
    if target is None:
        return found.ratio(draws)
    mean = passes.double().mean(dim=0)
    top = ((single - target) * (single - mean)).sum()
    return Ratio(top, found.bias_distance().clamp_min(0.0) + found.var_t / draws)


def shrunk(ratio: Ratio, samples: int, prior: float, strength: float) -> float:
    """The weight, shrunk as if to `samples` held-out ones came `strength` more whose optimum is `prior`."""
    return float(ratio.weight(prior, strength * ratio.denominator / samples))


def read_mixture(log_p: Tensor, log_single: Tensor, alpha: float) -> Reading:
    """The mixture of S passes (S, N, K), weights alpha / S, and the single pass (N, K), weight 1 - alpha; log-probabilities.

    Entropies split as for passes alone: aleatoric is the expected entropy under these weights, epistemic the rest of the
    entropy of the mixture (0 for alpha = 0).
    """
    reading = read_passes(log_p)
    if alpha == 1 or reading.aleatoric is None:
        return reading
    if alpha == 0:
        single = entropy(log_single)
        return Reading(log_single, single, torch.zeros_like(single))
    mixed = torch.logaddexp(math.log(alpha) + reading.logits, math.log1p(-alpha) + log_single)
    aleatoric = mix(reading.aleatoric, entropy(log_single), alpha)
    return Reading(mixed, aleatoric, (entropy(mixed) - aleatoric).clamp_min(0.0))


class _Options:
    """What both kinds have in common: the source of passes, the rule of the weight, and the members."""

    name: ClassVar[str]

    def __init__(
        self,
        source: str,
        sources: Sequence[str],
        passes: int,
        weight: str | float,
        prior: float,
        strength: float,
        members: Sequence[str],
    ) -> None:
        if source not in sources:
            raise ConfigError(f"{self.name}: source = {source!r}, expected one of {', '.join(sources)}")
        if members and source != "members":
            raise ConfigError(f"{self.name}: members are given, but source = {source!r}; give source: members")
        if weight in NO_VARIANCES:
            raise ConfigError(
                f"{self.name}: weight = {weight!r}: one pass shows no variance, and the entropy of its prediction is none (a "
                f"network can be sure and wrong). Take passes or truth; to weigh several estimators by held-out errors, see "
                f"uq.mixing.inverse_variance_weights"
            )
        self.source = source
        self.members = member_names(members, self.name) if source == "members" else ()
        self.passes = len(self.members) if source == "members" else checked_passes(passes, self.name)
        self.weight = weight if weight in RULES else parse_number(weight, f"{self.name}: weight")
        self.prior = parse_number(prior, f"{self.name}: prior")
        self.strength = parse_number(strength, f"{self.name}: strength")
        if isinstance(self.weight, float) and not 0 <= self.weight <= 1:
            raise ConfigError(
                f"{self.name}: weight = {weight!r}, expected a number in [0, 1] or one of {', '.join(RULES)}"
            )
        if not 0 <= self.prior <= 1 or self.strength < 0:
            raise ConfigError(
                f"{self.name}: prior = {self.prior}, strength = {self.strength}; expected [0, 1] and >= 0"
            )
        if source == "members" and self.passes < 2:
            raise ConfigError(f"{self.name}: one member shows no variance; give two or more")
        self._modules: tuple[nn.Module, ...] = ()

    def common(self) -> dict[str, Any]:
        """The constructor's arguments that both kinds have."""
        return {
            "source": self.source,
            "passes": self.passes,
            "weight": self.weight,
            "prior": self.prior,
            "strength": self.strength,
            "members": list(self.members),
        }

    @property
    def fit_passes(self) -> int:
        """How many passes the weight is estimated from."""
        return self.passes if self.source == "members" else max(self.passes, FIT_PASSES)

    def passes_from(self) -> Source:
        """Where passes come from, members loaded."""
        if self.source != "members":
            return DropoutPasses()
        if not self._modules:
            raise no_members(self.name, self.members)
        return MemberPasses(self._modules)

    def hand_over(self, members: list[nn.Module]) -> None:
        """Keep the networks of `members`."""
        self._modules = checked_members(members, self.members, self.name)


class BiasVarianceMix(Estimator, _Options):
    """Probabilities alpha p_S + (1 - alpha) p_e; alpha is fitted on held-out inputs, or given.

    Args:
        source: of the passes: "dropout", "augment" or "members".
        passes: S; as many as there are members with source: members.
        weight: "passes", "truth" or a number in [0, 1]: alpha.
        prior, strength: the weight that alpha is shrunk to, and how many samples that counts.
        members: names of other models, whose networks are handed over by `with_members`.
        shift, flip, noise: with source: augment (see `uq.monte_carlo.AugmentedPasses`).
    Fitting alpha needs the held-out inputs: `with_inputs(x)` before `fit_observations`.
    Cost: S + 1 forward passes.
    """

    name: ClassVar[str] = "bias-variance-mix"
    reference: ClassVar[str] = "arXiv 2510.05095"
    reads_inputs = True
    differentiable = False

    def __init__(
        self,
        source: str = "dropout",
        passes: int = 5,
        weight: str | float = "truth",
        prior: float = 0.0,
        strength: float = 100.0,
        members: Sequence[str] = (),
        shift: int = 1,
        flip: bool = False,
        noise: float = 0.0,
    ) -> None:
        _Options.__init__(self, source, ("dropout", "augment", "members"), passes, weight, prior, strength, members)
        self.augmentation = AugmentedPasses(shift, flip, noise)
        self.alpha = math.nan
        self._held_out: tuple[Tensor, SampleRandom] | None = None

    @property
    def needs_model(self) -> bool:  # type: ignore[override]
        return self.fits_inputs

    @property
    def needs_fit(self) -> bool:  # type: ignore[override]
        return self.weight == "truth"

    @property
    def fits_inputs(self) -> bool:
        """Whether fitting needs the held-out inputs, by `with_inputs`."""
        return isinstance(self.weight, str)

    def parameters(self) -> dict[str, Any]:
        a = self.augmentation
        return {**self.common(), **({"shift": a.shift, "flip": a.flip, "noise": a.noise} if self._augments else {})}

    @property
    def _augments(self) -> bool:
        return self.source == "augment"

    def with_members(self: C, members: list[nn.Module]) -> C:
        """Hand over the networks of `members`, in the same order."""
        self.hand_over(members)
        return self

    def with_inputs(self: C, x: Tensor, ids: Sequence[str] | np.ndarray | None = None, seed: int = 0) -> C:
        """Hand over the inputs, float32 (N, C, H, W) in [0, 1], that the observations of the next fit are of."""
        check_images(x)
        names = np.asarray(ids if ids is not None else [str(i) for i in range(len(x))], dtype=np.str_)
        self._held_out = x, SampleRandom.of(seed, names, f"uq/{self.name}")
        return self

    def passes_from(self) -> Source:
        return self.augmentation if self._augments else super().passes_from()

    def _fit(self, held_out: Observations, model: nn.Module | None) -> None:
        if not isinstance(self.weight, str):
            self.alpha = self.weight
            return
        if model is None or self._held_out is None:
            raise ConfigError(
                f"{self.name}: weight = '{self.weight}' is fitted by passes on the held-out inputs: call with_inputs(x, ids) "
                f"before fitting, or give weight: a number in [0, 1]"
            )
        x, random = self._held_out
        if len(x) != len(held_out):
            raise DataError(f"{self.name}: {len(x)} inputs for {len(held_out)} observations")
        p = sample_logits(self.passes_from(), model, x, random, self.fit_passes).exp()
        single = held_out.logits.double().softmax(dim=1)
        truth = None
        if self.weight == "truth":
            truth = nn.functional.one_hot(held_out.labels, single.shape[1]).double()
        self.alpha = shrunk(mixing_ratio(p, single, self.passes, truth), len(x), self.prior, self.strength)
        self._held_out = None

    def _read_inputs(
        self, model: nn.Module, x: Tensor, seen: Observations, random: SampleRandom, batch_size: int
    ) -> Reading:
        single = seen.logits.double().log_softmax(dim=1)
        return read_mixture(
            sample_logits(self.passes_from(), model, x, random, self.passes, batch_size), single, self.alpha
        )

    def summary(self) -> dict[str, float]:
        return {"alpha": self.alpha}


class BiasVarianceMixRegressor(MonteCarloRegressor, _Options):
    """Point alpha m_S + (1 - alpha) m_e, m_e the regressor's own prediction, and intervals (see `MonteCarloRegressor`).

    The epistemic variance is that of the mixture of S passes and the single one. alpha is fitted on the samples that fit the
    scale. A scalar has one coordinate, so alpha is pooled over samples, and nothing guarantees an improvement.

    Args:
        source: "dropout" or "members".
        passes, weight, prior, strength, members: as of `BiasVarianceMix`; S is at least 2.
        intervals: "conformal" or "gaussian".
    """

    name: ClassVar[str] = "bias-variance-mix"
    reference: ClassVar[str] = "arXiv 2510.05095"

    def __init__(
        self,
        source: str = "dropout",
        passes: int = 5,
        weight: str | float = "truth",
        prior: float = 0.0,
        strength: float = 100.0,
        members: Sequence[str] = (),
        intervals: str = "conformal",
    ) -> None:
        MonteCarloRegressor.__init__(self, intervals)
        checked_passes(passes, self.name, 2)
        _Options.__init__(self, source, ("dropout", "members"), passes, weight, prior, strength, members)
        self.alpha = math.nan

    def parameters(self) -> dict[str, Any]:
        return {**self.common(), "intervals": self.intervals}

    def with_members(self: R, members: list[nn.Module]) -> R:
        """Hand over the networks of `members`, in the same order."""
        self.hand_over(members)
        return self

    def _fit(self, train: Samples, calibration: Samples, model: nn.Module | None, seed: int) -> None:
        self.alpha = self.weight if isinstance(self.weight, float) else math.nan
        super()._fit(train, calibration, model, seed)

    def _passes(self, samples: Samples, model: nn.Module, seed: int) -> Mixture:
        passes = self.fit_passes if math.isnan(self.alpha) else self.passes  # no weight yet: these are to fit it
        found = sample_predictions(self.passes_from(), model, samples, seed, self.name, passes)
        return Mixture(found, torch.from_numpy(samples.prediction).double(), 1.0)

    def _learn(self, mixture: Mixture, y: Tensor) -> None:
        if isinstance(self.weight, str):
            truth = y if self.weight == "truth" else None
            ratio = mixing_ratio(mixture.passes, mixture.single, self.passes, truth)
            self.alpha = shrunk(ratio, len(y), self.prior, self.strength)

    def _mixed(self, mixture: Mixture) -> Mixture:
        return Mixture(mixture.passes[: self.passes], mixture.single, self.alpha)

    def summary(self) -> dict[str, float]:
        return {**super().summary(), "alpha": self.alpha}
