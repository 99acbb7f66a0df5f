"""AWP: adversarial weight perturbation round another defense (Wu, Xia, Wang, NeurIPS 2020, arXiv 2004.05884).

    min_w max_{v: ||v_l|| <= gamma ||w_l||} L(w + v),   v_l = gamma ||w_l|| g_l / ||g_l||,   g = grad_w L(w),

one step of the inner problem, layer by layer. The gradient is taken at w + v and applied at w. Parameters of more than
one dimension whose name holds "weight" are perturbed. The pass that finds v leaves no trace in batch-norm statistics or
in the base's state (the published code uses a second network for it).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from defenses.base import Batch, Crafter, Defense, Loss, Task, at_least, bare, share
from robustbench_ext.attacks.threat import Threat
from robustbench_ext.catalog import DEFENSES
from robustbench_ext.errors import ConfigError
from robustbench_ext.numbers import read_numbers


def perturbed_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that AWP moves, by name."""
    return {n: p for n, p in model.named_parameters() if p.requires_grad and p.ndim > 1 and "weight" in n}


def perturbation(weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor], gamma: float) -> dict[str, Tensor]:
    """v_l = gamma ||w_l|| g_l / ||g_l||; zero where the gradient is."""
    out = {}
    for name, gradient in gradients.items():
        length = gradient.norm()
        out[name] = torch.where(length > 0, gamma * weights[name].norm() / length, 0.0) * gradient
    return out


@dataclass(frozen=True, kw_only=True)
class AWP(Defense):
    """Another defense, descended at adversarially perturbed weights.

    Args:
        base: the defense inside: an instance, its name, or a mapping {name: trades, beta: 6}.
        gamma: size of the perturbation relative to each layer's weights; published: 0.01 for AT-AWP, 0.005 for TRADES-AWP.
            0 is the base method.
        burn_in: share of the training without perturbation first; published: 0 for AT-AWP, epoch 10 of 200 for TRADES-AWP.
    """

    base: Any = "pgd-at"
    gamma: float = 0.01
    burn_in: float = 0.0

    name: ClassVar[str] = "awp"
    reference: ClassVar[str] = "arXiv 2004.05884"

    def __post_init__(self) -> None:
        read_numbers(self, "awp")
        at_least(self.gamma, 0, "awp: gamma")
        share(self.burn_in, "awp: burn_in")
        object.__setattr__(self, "base", _defense(self.base))

    @property
    def select_by(self) -> str:  # type: ignore[override]
        chosen: str = self.base.select_by
        return chosen

    @property
    def soft_targets(self) -> bool:  # type: ignore[override]
        return bool(self.base.soft_targets)

    @property
    def class_losses(self) -> bool:  # type: ignore[override]
        return bool(self.base.class_losses)

    def spec(self) -> dict[str, Any]:
        return {
            "defense": self.name,
            "version": self.version,
            "gamma": self.gamma,
            "burn_in": self.burn_in,
            "base": self.base.spec(),
        }

    def attack(self, threat: Threat, steps: int, step_size: float | None) -> Crafter | None:
        crafter: Crafter | None = self.base.attack(threat, steps, step_size)
        return crafter

    def state(self, model: nn.Module, task: Task) -> nn.Module:
        made: nn.Module = self.base.state(model, task)
        return made

    def loss(self, model: nn.Module, batch: Batch, state: nn.Module | None = None) -> Loss:
        loss: Loss = self.base.loss(model, batch, state)
        return loss

    @contextmanager
    def perturb(self, model: nn.Module, batch: Batch, state: nn.Module) -> Iterator[None]:
        if self.gamma == 0 or batch.progress < self.burn_in:
            yield
            return
        # The pass goes through the bare module: a distributed wrapper would wait for gradients that never come, and
        # every process has its own v, of its own samples, as in the published code under data parallelism.
        inner = bare(model)
        weights = perturbed_weights(inner)
        with _untouched(inner), _untouched(state):
            value = self.base.loss(inner, batch, state).value
            found = torch.autograd.grad(value, list(weights.values()), allow_unused=True)
        gradients = {n: g for n, g in zip(weights, found, strict=True) if g is not None}
        before = {n: weights[n].detach().clone() for n in gradients}
        with torch.no_grad():
            for name, v in perturbation(before, gradients, self.gamma).items():
                weights[name].add_(v)
        try:
            yield
        finally:
            # The very bytes of before: subtracting v again would leave rounding behind.
            with torch.no_grad():
                for name, value_before in before.items():
                    weights[name].copy_(value_before)


def _defense(base: Any) -> Defense:
    if isinstance(base, Defense):
        found = base
    else:
        if not isinstance(base, str) and not (isinstance(base, Mapping) and isinstance(base.get("name"), str)):
            raise ConfigError(f"awp: base = {base!r}, expected a defense such as pgd-at or {{name: trades, beta: 6}}")
        options = {"name": base} if isinstance(base, str) else dict(base)
        from robustbench_ext.attacks.base import build

        name = str(options.pop("name", None))
        made = build(DEFENSES.load(name), f"awp: base: {name}", options)
        if not isinstance(made, Defense):
            raise ConfigError(f"awp: base = {base!r}, expected a defense such as pgd-at or {{name: trades, beta: 6}}")
        found = made
    if isinstance(found, AWP):
        raise ConfigError("awp: base is awp itself; give the defense inside it once")
    return found


@contextmanager
def _untouched(module: nn.Module) -> Iterator[None]:
    """The module's buffers come back as they were."""
    buffers = [(b, b.detach().clone()) for b in module.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
