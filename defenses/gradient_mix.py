"""Mixed adversarial training: the gradient at PGD inputs, mixed with that at cheap ones (after BVPO, arXiv 2510.05095).

    L = alpha CE(f(x_pgd), y) + (1 - alpha) CE(f(x_cheap), y),      x_cheap: one FGSM step from x, or x itself.

The target is the gradient at the worst-case input (Danskin). The one at x_pgd is noisy, by its random start, and biased, as a
few steps do not find the worst; the one at x_cheap has no noise given the batch, and more bias. BVPO mixes two such estimators
with alpha = 1/2. Its optimal weight can be estimated here (`uq.mixing.against`): with m the gradient at the worst of several
long attacks, whose starts are independent of x_pgd's,

    alpha = <g_cheap - m, g_cheap - g_pgd> / |g_pgd - g_cheap|^2,

on a part of a training batch, numerator and denominator each a moving average.

What this is not. Mixing losses mixes gradients only as far as both passes see the same network: batch norm in training mode
normalises each pass by its own statistics, and its running statistics average over both kinds of inputs. And a mix that is
optimal for the gradient is optimal for an SGD step without momentum: Adam scales the mix, which is not mixing what it would
have scaled; momentum adds up mixes. A smaller error of the gradient is no promise of a more robust network.

What to expect (benchmarks/uq/mixing.py: small-cnn on mnist5k, a few epochs, three seeds). The estimate says 0.9 to 1: the noise
of PGD is small beside the bias of FGSM, so there is little to mix and `pgd-at` is cheaper. At eps = 0.2, where training
starts slowly, half FGSM starts more slowly still. Half clean inputs start much faster; but an estimate that turns to `pgd-at`
after one epoch of them ends at the same robustness, so that is a warm-up, not a better gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from defenses.base import (
    Batch,
    Crafter,
    Defense,
    Loss,
    Task,
    at_least,
    bare,
    batch_mean,
    cross_entropy,
    detached,
    one_of,
)
from robustbench_ext.attacks.inner import InnerAttack, attacked_in
from robustbench_ext.attacks.threat import Threat
from robustbench_ext.errors import ConfigError
from robustbench_ext.numbers import parse_number
from robustbench_ext.randomness import SampleRandom
from uq.mixing import Ratio, against

ESTIMATE = "estimate"


class Estimated(nn.Module):
    """The weight's numerator and denominator, moving averages, and how many estimates they hold."""

    numerator: Tensor
    denominator: Tensor
    estimates: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("numerator", torch.zeros((), dtype=torch.float64))
        self.register_buffer("denominator", torch.zeros((), dtype=torch.float64))
        self.register_buffer("estimates", torch.zeros((), dtype=torch.int64))

    def update(self, new: Ratio, rate: float) -> None:
        """One more estimate; the first is taken as it is."""
        mixed = Ratio(self.numerator, self.denominator).towards(new, rate if int(self.estimates) else 1.0)
        self.numerator.copy_(mixed.numerator)
        self.denominator.copy_(mixed.denominator)
        self.estimates += 1

    def weight(self, prior: float) -> float:
        """alpha; the prior before the first estimate."""
        return float(Ratio(self.numerator, self.denominator).weight(prior))


@dataclass(frozen=True, kw_only=True)
class GradientMix(Defense):
    """PGD adversarial training whose gradient is mixed with that at cheap inputs.

    Args:
        alpha: weight of the PGD inputs: a number in [0, 1] (1 is `pgd-at`), or "estimate".
        cheap: "fgsm" (one step of the full budget from x, along the gradient of the network in evaluation mode) or "clean".
        norm: of the FGSM step; must be the recipe's.
        prior: alpha until the first estimate; with 1 that part of the training is `pgd-at`.
        every: epochs between estimates; the first comes after so many, since the gradients of an untrained network say little.
        probe: samples of an estimate, the first of the batch.
        rate: of the moving averages; 1 keeps the latest estimate alone.
        reference_steps, restarts: of the reference attack.
    Cost: beside `pgd-at`, one more forward and backward pass a step, and another one for FGSM; an estimate costs
    reference_steps * restarts forward and backward passes on the probe.
    """

    alpha: float | str = 0.5
    cheap: str = "fgsm"
    norm: str = "Linf"
    prior: float = 0.5
    every: int = 1
    probe: int = 64
    rate: float = 0.5
    reference_steps: int = 20
    restarts: int = 5

    name: ClassVar[str] = "gradient-mix"
    soft_targets: ClassVar[bool] = True
    reference: ClassVar[str] = "arXiv 2510.05095"

    def __post_init__(self) -> None:
        if self.alpha != ESTIMATE:
            object.__setattr__(self, "alpha", parse_number(self.alpha, "gradient-mix: alpha (or 'estimate')"))
        for name in ("prior", "rate"):
            object.__setattr__(self, name, parse_number(getattr(self, name), f"gradient-mix: {name}"))
        _whole(self)
        one_of(self.cheap, ("fgsm", "clean"), "gradient-mix: cheap")
        one_of(self.norm, ("Linf", "L2"), "gradient-mix: norm")
        for name, least in {"every": 1, "probe": 2, "reference_steps": 1, "restarts": 1}.items():
            at_least(getattr(self, name), least, f"gradient-mix: {name}")
        given = 0.5 if isinstance(self.alpha, str) else self.alpha
        if not 0 <= given <= 1 or not 0 <= self.prior <= 1 or not 0 < self.rate <= 1:
            raise ConfigError(
                f"gradient-mix: alpha = {self.alpha}, prior = {self.prior}, rate = {self.rate}; expected alpha and prior in "
                f"[0, 1], rate in (0, 1]"
            )

    def attack(self, threat: Threat, steps: int, step_size: float | None) -> Crafter | None:
        if self.cheap == "fgsm" and threat.norm != self.norm:
            raise ConfigError(
                f"gradient-mix: norm = {self.norm}, but the recipe's budget is {threat}; give the same norm"
            )
        return InnerAttack(threat, steps, step_size) if self.alpha != 0 else None

    def state(self, model: nn.Module, task: Task) -> nn.Module:
        return Estimated()

    def loss(self, model: nn.Module, batch: Batch, state: nn.Module | None = None) -> Loss:
        if isinstance(self.alpha, str):
            if not isinstance(state, Estimated):
                raise ConfigError("gradient-mix: an estimated alpha needs the state that gradient_mix.state(...) made")
            # At the first batch of its epoch, unless a checkpoint says that it is done.
            if batch.epoch // self.every > int(state.estimates):
                state.update(self.estimate(bare(model), batch), self.rate)
            alpha = state.weight(self.prior)
        else:
            alpha = self.alpha
        # A part of weight 0 costs no pass and leaves no trace in batch norm.
        parts = {}
        if alpha < 1:
            parts["cheap_ce"] = cross_entropy(model(self.cheap_inputs(bare(model), batch)), batch).mean()
        if alpha > 0:
            parts["pgd_ce"] = cross_entropy(model(batch.x_adv), batch).mean()
        logs = detached(**parts, alpha=torch.tensor(alpha, device=batch.x.device))
        if len(parts) == 1:
            return Loss(next(iter(parts.values())), logs)
        return Loss(alpha * parts["pgd_ce"] + (1 - alpha) * parts["cheap_ce"], logs)

    def cheap_inputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """x_cheap (B, C, H, W)."""
        if self.cheap == "clean" or batch.eps == 0:
            return batch.x
        threat = Threat(self.norm, batch.eps)
        with attacked_in(model, "eval"):
            x = batch.x.detach().clone().requires_grad_(True)
            (gradient,) = torch.autograd.grad(cross_entropy(model(x).float(), batch).sum(), x)
        with torch.no_grad():
            return threat.project(batch.x + batch.eps * threat.steepest(gradient), batch.x)

    def estimate(self, model: nn.Module, batch: Batch) -> Ratio:
        """Numerator and denominator of alpha on the first `probe` samples; the model's buffers come back as they were."""
        part = _first(batch, self.probe)
        cheap = self.cheap_inputs(model, part)
        worst = self.worst_inputs(model, part)
        with _buffers_kept(model):
            m, t, e = (flat_gradient(model, part, x) for x in (worst, part.x_adv, cheap))
        found = against(m, t, e).pooled()
        # Over several processes the mean: each has a part of the batch.
        return Ratio(batch_mean(found.numerator[None]), batch_mean(found.denominator[None]))

    def worst_inputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """Of `restarts` long attacks the input of highest loss, per sample. Starts depend on epoch and place in the batch."""
        attack = InnerAttack(Threat(self.norm, batch.eps), self.reference_steps)
        random = SampleRandom.of(0, range(len(batch.x)), "gradient-mix/reference", batch.x.device)
        worst, highest = batch.x, torch.full_like(batch.y, -1, dtype=torch.float32)
        for restart in range(self.restarts):
            x = attack.craft(
                model, batch.x, batch.y, random, batch.epoch * self.restarts + restart, batch.targets
            ).x_adv
            with torch.no_grad(), attacked_in(model, "eval"):
                loss = cross_entropy(model(x).float(), batch)
            higher = loss > highest
            highest = torch.where(higher, loss, highest)
            worst = torch.where(higher[:, None, None, None], x, worst)
        return worst


def flat_gradient(model: nn.Module, batch: Batch, x: Tensor) -> Tensor:
    """The gradient of the mean loss at x in all parameters, float64 (d,), in the mode that the model is in."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    loss = cross_entropy(model(x).float(), batch).mean()
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return torch.cat([g.double().flatten() for g in found if g is not None])


def _first(batch: Batch, n: int) -> Batch:
    targets = None if batch.targets is None else batch.targets[:n]
    return Batch(batch.x[:n], batch.y[:n], batch.x_adv[:n], batch.eps, batch.epoch, batch.epochs, targets)


@contextmanager
def _buffers_kept(module: nn.Module) -> Iterator[None]:
    """The module's buffers, batch norm's statistics above all, come back as they were."""
    buffers = [(b, b.detach().clone()) for b in module.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


def _whole(defense: GradientMix) -> None:
    for name in ("every", "probe", "reference_steps", "restarts"):
        number = parse_number(getattr(defense, name), f"gradient-mix: {name}")
        if number != int(number):
            raise ConfigError(f"gradient-mix: {name} = {number}, expected a whole number")
        object.__setattr__(defense, name, int(number))
