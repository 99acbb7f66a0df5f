"""AdvStyle: adversarial style augmentation (Zhang, Deng, Li, Jia, Zhang 2023, arXiv 2301.12643).

    mu' = mu + e_mu R(S_mu),   sigma' = sigma + e_sigma R(S_sigma),      e ~ N(0, 1) per sample and channel,

where S (1, C, 1, 1) are learnt with the network and R is the identity whose gradient is multiplied by -weight: in the same
step the network descends and S ascends,   min_theta max_S E_e CE(f_theta(x; S, e), y).   S starts as the deviation of mu and
sigma over the first batch that meets it.

Another method of the same short name (NeurIPS 2022, urban scenes) perturbs the statistics of images; this is not it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from defenses.base import Batch, at_least, one_of, read_booleans
from defenses.style import StyleDefense, StyleModule, Styles, batch_deviation, restyle, style_of, worn
from robustbench_ext.numbers import read_numbers

# What a call does, with equal probability.
BRANCHES = {
    "published": ("identity", "adversarial", "batch"),
    "two": ("identity", "adversarial"),
    "always": ("adversarial",),
}
FORMS = ("free", "direction")
INITIAL = 0.1


class _Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: float) -> Tensor:
        ctx.weight = weight
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return -ctx.weight * gradients[0], None


def reverse_gradient(x: Tensor, weight: float) -> Tensor:
    """x itself; its gradient is multiplied by -weight (Ganin, Lempitsky, ICML 2015, arXiv 1409.7495)."""
    reversed_: Tensor = _Reverse.apply(x, weight)
    return reversed_


def _several_processes() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


class AdvStyleModule(StyleModule):
    """AdvStyle for one layer.

    Args:
        channels: C.
        weight: of the reversed gradient. What counts is the learning rate times it: published recipes have 0.01 (10 at a rate
            of 0.001); ten times that, and S can grow without end until the network learns nothing.
        branches: what a call draws from with equal probability. "published": identity, AdvStyle, or noise as large as the
            batch's own deviation (which is DSU); "two" leaves that out; "always" is AdvStyle alone.
        form: "free" lets S grow; "direction" (the released re-identification code) takes S for a direction, and the length from
            the batch's own deviation.
        cap: |S| of a channel at most so many times what it started from; None for no limit, as published.
        positive: keep sigma' at 1e-6 or more. Published code lets it become negative, which mirrors the map.
    """

    def __init__(
        self,
        channels: int,
        weight: float = 0.2,
        branches: str = "published",
        form: str = "free",
        cap: float | None = None,
        positive: bool = False,
    ) -> None:
        super().__init__()
        self.weight, self.branches, self.form, self.cap, self.positive = weight, branches, form, cap, positive
        self.scale_mu = nn.Parameter(torch.full((1, channels, 1, 1), INITIAL))
        self.scale_sigma = nn.Parameter(torch.full((1, channels, 1, 1), INITIAL))
        # Buffers: a checkpoint from before the first batch must not start again behind it, one from later must not start twice.
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))
        self.register_buffer("first_mu", torch.full((1, channels, 1, 1), INITIAL))
        self.register_buffer("first_sigma", torch.full((1, channels, 1, 1), INITIAL))
        self.started: Tensor
        self.first_mu: Tensor
        self.first_sigma: Tensor

    def _change(self, x: Tensor) -> Tensor:
        branch = self._branch(x.device)
        if branch == "identity":
            return x
        mu, sigma = style_of(x)
        # On the CPU's generator whatever the device, so that a step's draws are the same everywhere.
        noise_mu, noise_sigma = (torch.randn(mu.shape).to(mu.device) for _ in range(2))
        if branch == "batch":
            return restyle(
                x, mu, sigma, mu + noise_mu * batch_deviation(mu), sigma + noise_sigma * batch_deviation(sigma)
            )
        return self.perturbed(x, mu, sigma, noise_mu, noise_sigma)

    def _branch(self, device: torch.device) -> str:
        """What this call does; the same on all processes, as they start S together and average its gradient."""
        choices = BRANCHES[self.branches]
        if len(choices) == 1:
            return choices[0]
        drawn = torch.randint(len(choices), ())
        if _several_processes():
            drawn = drawn.to(device)
            torch.distributed.broadcast(drawn, 0)
        return choices[int(drawn)]

    def perturbed(self, x: Tensor, mu: Tensor, sigma: Tensor, noise_mu: Tensor, noise_sigma: Tensor) -> Tensor:
        """The adversarial branch with given noise (B, C, 1, 1)."""
        if not bool(self.started):
            self._start(mu.detach(), sigma.detach())
        size_mu, size_sigma = self._size(self.scale_mu, mu), self._size(self.scale_sigma, sigma)
        new_sigma = sigma + noise_sigma * size_sigma
        if self.positive:
            new_sigma = new_sigma.clamp_min(1e-6)
        return restyle(x, mu, sigma, mu + noise_mu * size_mu, new_sigma)

    def _size(self, scale: Tensor, statistic: Tensor) -> Tensor:
        size = reverse_gradient(scale, self.weight)
        if self.form == "direction":
            size = size / size.norm().clamp_min(1e-12) * batch_deviation(statistic).norm()
        return size

    @torch.no_grad()
    def _start(self, mu: Tensor, sigma: Tensor) -> None:
        for scale, first, statistic in (
            (self.scale_mu, self.first_mu, mu),
            (self.scale_sigma, self.first_sigma, sigma),
        ):
            start = batch_deviation(statistic)
            if _several_processes():
                torch.distributed.broadcast(start, 0)
            scale.copy_(start)
            first.copy_(start)
        self.started.fill_(True)

    @torch.no_grad()
    def limit(self) -> None:
        """Bring S back within the cap; nothing where there is none."""
        if self.cap is not None:
            for scale, first in ((self.scale_mu, self.first_mu), (self.scale_sigma, self.first_sigma)):
                scale.clamp_(-self.cap * first, self.cap * first)


@dataclass(frozen=True, kw_only=True)
class AdvStyle(StyleDefense):
    """Another defense on a network with AdvStyle.

    Args:
        weight, branches, form, cap, positive: see `AdvStyleModule`. The default weight is for learning rates about 0.05.
        inner_steps: 0 for the joint step (the released default); otherwise S makes so many ascent steps of `inner_lr` on each
            batch before the network's step, which then leaves S alone (the released alternating trainer has 3).
    """

    weight: float = 0.2
    branches: str = "published"
    form: str = "free"
    cap: float | None = None
    positive: bool = False
    inner_steps: int = 0
    inner_lr: float = 0.05

    name: ClassVar[str] = "advstyle"
    version: ClassVar[int] = (
        2  # 2: the batch's deviation in form "direction" keeps its gradient; the cap holds in inner steps
    )
    reference: ClassVar[str] = "arXiv 2301.12643"

    def __post_init__(self) -> None:
        self._settle()
        read_numbers(self, "advstyle")
        read_booleans(self, "advstyle")
        one_of(self.branches, tuple(BRANCHES), "advstyle: branches")
        one_of(self.form, FORMS, "advstyle: form")
        at_least(self.weight, 0, "advstyle: weight")
        at_least(self.inner_steps, 0, "advstyle: inner_steps")
        at_least(self.inner_lr, 0, "advstyle: inner_lr")
        if self.cap is not None:
            at_least(self.cap, 0, "advstyle: cap")

    def _module(self, channels: int) -> StyleModule:
        return AdvStyleModule(channels, self.weight, self.branches, self.form, self.cap, self.positive)

    @contextmanager
    def perturb(self, model: nn.Module, batch: Batch, state: nn.Module) -> Iterator[None]:
        assert isinstance(state, nn.ModuleDict)  # noqa: S101 - the trainer hands over what `state` made
        styles = state["styles"]
        assert isinstance(styles, Styles)  # noqa: S101
        _limit(styles)
        scales = list(styles.parameters())
        for _ in range(self.inner_steps):
            with worn(model, styles):
                value = self.base.loss(model, batch, state["base"]).value
            # Gradients of S alone are taken, so nothing of this reaches the network's own.
            found = torch.autograd.grad(value, scales, allow_unused=True)
            with torch.no_grad():
                for scale, gradient in zip(scales, found, strict=True):
                    if gradient is not None:
                        if _several_processes():
                            torch.distributed.all_reduce(gradient)
                            gradient /= torch.distributed.get_world_size()
                        scale.sub_(self.inner_lr * gradient)
            _limit(styles)
        with super().perturb(model, batch, state):
            yield
        if self.inner_steps:
            for scale in scales:
                scale.grad = None


def _limit(styles: Styles) -> None:
    for module in styles.values():
        if isinstance(module, AdvStyleModule):
            module.limit()
