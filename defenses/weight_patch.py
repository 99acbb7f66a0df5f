"""Robust weight signatures: what training on a corruption adds to the weights, as a patch that can be put on and taken off.

Robust Weight Signatures, arXiv 2302.12480. With theta_pre (before training), theta_std (trained on clean images) and theta_c
(trained on corruption c), both from theta_pre, per layer:

    d = theta_c - theta_pre,  u = theta_std - theta_pre,  RWS_c = d - (<d, u> / <u, u>) u
    theta = theta_target + sum_c alpha_c RWS_c

What clean training would have done as well is removed by the projection, so <RWS_c, u> = 0. alpha is applied once; the
published code applies it twice, so that its alpha = 0.5 acts as 0.25. Its `quantization` counts levels, and so does `levels`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from defenses.base import at_least, one_of
from defenses.making import Made, Maker, State, batches_of, recompute_statistics, with_state
from robustbench_ext.data.base import Dataset
from robustbench_ext.errors import ConfigError, unknown_name
from robustbench_ext.numbers import parse_number


@dataclass(frozen=True)
class Signature:
    """What is added to the weights of some layers.

    Attributes:
        layers: by the name of the parameter, in the weights' dtype.
    """

    layers: State

    @classmethod
    def extract(cls, pre: State, clean: State, robust: State, names: Sequence[str]) -> Signature:
        """Of three states of one network; computed in float64.

        Args:
            pre, clean, robust: before training, after training on clean and on corrupted images.
            names: the parameters that it is of.
        """
        layers = {}
        for name in names:
            d = robust[name].double() - pre[name].double()
            u = clean[name].double() - pre[name].double()
            length = (u * u).sum()
            along = (d * u).sum() / length if length > 0 else torch.zeros((), dtype=torch.float64)
            layers[name] = (d - along * u).to(pre[name].dtype)
        return cls(layers)

    def scaled(self, alpha: float) -> Signature:
        """alpha times this one."""
        return Signature({name: (alpha * value.double()).to(value.dtype) for name, value in self.layers.items()})

    def __add__(self, other: Signature) -> Signature:
        """Both; layers that only one has are that one's."""
        names = {**self.layers, **other.layers}
        return Signature(
            {
                name: sum((s.layers[name] for s in (self, other) if name in s.layers), torch.zeros_like(value))
                for name, value in names.items()
            }
        )

    def quantised(self, levels: int) -> Signature:
        """Each layer on so many equally spaced values, from its smallest to its largest.

        Args:
            levels: at least 2; 16 fit into four bits.
        """
        if levels < 2:
            raise ConfigError(f"signature: levels = {levels}, expected at least 2")
        layers = {}
        for name, value in self.layers.items():
            low, high = value.min().double(), value.max().double()
            step = (high - low) / (levels - 1)
            codes = (
                torch.zeros_like(value, dtype=torch.float64) if step == 0 else ((value.double() - low) / step).round()
            )
            layers[name] = (low + codes * step).to(value.dtype)
        return Signature(layers)

    def patch(self, state: State, alpha: float = 1.0) -> State:
        """A copy of `state` with alpha times this signature on it. A negative alpha takes it off again, up to rounding."""
        unknown = [name for name in self.layers if name not in state]
        if unknown:
            raise ConfigError(f"signature: {unknown_name('layer', unknown[0], state)}")
        patched = {name: value.clone() for name, value in state.items()}
        if alpha:
            for name, value in self.layers.items():
                patched[name] = (state[name].double() + alpha * value.double()).to(state[name].dtype)
        return patched

    def bits(self, levels: int | None = None) -> int:
        """Its size: so many bits a weight, and two float32 a layer where it is quantised."""
        each = 32 if levels is None else math.ceil(math.log2(levels))
        ends = 0 if levels is None else 64
        return sum(each * value.numel() + ends for value in self.layers.values())


def convolutions(network: nn.Module, count: int | None = None) -> list[str]:
    """Names of the weights of a network's first convolutions, in the order in which they are defined; all for None."""
    names = [f"{name}.weight" for name, part in network.named_modules() if isinstance(part, nn.Conv2d)]
    return names[:count]


@dataclass(frozen=True, kw_only=True)
class WeightSignature(Maker):
    """The signatures of corruptions, put on a network.

    In a suite, `of` names all networks; those that are neither pre, clean nor target were trained on corrupted images, one
    signature each: `{name: weight-signature, of: [base, clean, fog, noise], pre: base, clean: clean}`.

    Args:
        pre: the start of all of them; clean: trained from it on clean images.
        target: the network to patch; by default `clean`.
        alpha: of every signature, or a list with one for each; 0 leaves the network as it is, negative ones take off.
        layers: how many of the first convolutions are patched (published: 7 of VGG-16's 13), or names of parameters; None for
            all convolutions.
        levels: of quantised signatures, 2 or more; None for none.
        norms: of everything that batch norms hold: "keep" the network's own, "blend": moved by the sum of the alphas, at most
            all the way, towards the mean of the corrupted networks' (the published code), or "recompute" their statistics on
            clean training images. A network that was trained against attacks needs "keep": statistics of clean images can
            take much of its robustness away (see `defenses.soups`).
        statistics_n: training samples for "recompute".
    """

    name: ClassVar[str] = "weight-signature"
    least: ClassVar[int] = 3
    reference: ClassVar[str] = "arXiv 2302.12480"

    pre: str = ""
    clean: str = ""
    target: str | None = None
    alpha: float | tuple[float, ...] = 1.0
    layers: int | tuple[str, ...] | None = None
    levels: int | None = None
    norms: Literal["keep", "blend", "recompute"] = "blend"
    statistics_n: int = 2000

    def __post_init__(self) -> None:
        several = isinstance(self.alpha, (list, tuple))
        alphas = tuple(parse_number(a, "signature: alpha") for a in (self.alpha if several else [self.alpha]))  # type: ignore[union-attr]
        object.__setattr__(self, "alpha", alphas if several else alphas[0])
        if isinstance(self.layers, (list, tuple)):
            object.__setattr__(self, "layers", tuple(map(str, self.layers)))
        elif self.layers is not None:
            at_least(self.layers, 1, "signature: layers")
        if self.levels is not None:
            at_least(self.levels, 2, "signature: levels")
        one_of(self.norms, ("keep", "blend", "recompute"), "signature: norms")
        at_least(self.statistics_n, 1, "signature: statistics_n")

    def make(self, members: Mapping[str, nn.Module], data: Dataset, seed: int) -> Made:
        pre, clean, target = self.pre, self.clean, self.target or self.clean
        for role, name in (("pre", pre), ("clean", clean), ("target", target)):
            if name not in members:
                raise ConfigError(f"signature: {role}: {unknown_name('model', name, members)}")
        corrupted = [name for name in members if name not in (pre, clean, target)]
        if not corrupted:
            raise ConfigError(f"signature: none of {', '.join(members)} was trained on corrupted images")
        states = {name: module.state_dict() for name, module in members.items()}
        names = self._names(members[target])
        alphas = self.alpha if isinstance(self.alpha, tuple) else (self.alpha,) * len(corrupted)
        if len(alphas) != len(corrupted):
            raise ConfigError(
                f"signature: {len(alphas)} alphas for {len(corrupted)} corrupted networks ({', '.join(corrupted)})"
            )
        state: State = {name: value.clone() for name, value in states[target].items()}
        report: dict[str, Any] = {"layers": names, "signatures": {}}
        for name, alpha in zip(corrupted, alphas, strict=True):
            signature = Signature.extract(states[pre], states[clean], states[name], names)
            if self.levels is not None:
                signature = signature.quantised(self.levels)
            state = signature.patch(state, alpha)
            report["signatures"][name] = {
                "alpha": alpha,
                "norm": float(torch.stack([v.double().square().sum() for v in signature.layers.values()]).sum().sqrt()),
                "kilobytes": round(signature.bits(self.levels) / 8000, 1),
            }
        report["kilobytes of the whole network"] = round(sum(v.numel() * 4 for v in states[target].values()) / 1000, 1)
        return Made(self._norms(state, members[target], [states[m] for m in corrupted], sum(alphas), data), report)

    def _names(self, network: nn.Module) -> list[str]:
        if isinstance(self.layers, tuple):
            known = [name for name, _ in network.named_parameters()]
            for name in self.layers:
                if name not in known:
                    raise ConfigError(f"signature: {unknown_name('layer', name, known)}")
            return list(self.layers)
        names = convolutions(network, self.layers)
        if not names:
            raise ConfigError("signature: the network has no convolutions; name its layers: layers: [fc1.weight]")
        return names

    def _norms(
        self, state: State, network: nn.Module, corrupted: Sequence[State], alpha: float, data: Dataset
    ) -> State:
        norms = [n for n, m in network.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        inside = [name for name in state if name.rpartition(".")[0] in norms and state[name].is_floating_point()]
        if self.norms == "blend" and inside:
            share = min(max(alpha, 0.0), 1.0)
            for name in inside:
                mean = torch.stack([theirs[name].double() for theirs in corrupted]).mean(0)
                state[name] = ((1 - share) * state[name].double() + share * mean).to(state[name].dtype)
        if self.norms == "recompute" and norms:
            if "train" not in data.splits:
                raise ConfigError(f"signature: norms: recompute needs a train split, which {data.name} lacks")
            patched = with_state(network, state)
            recompute_statistics(patched, batches_of(data, self.statistics_n, 250))
            return {name: value.clone() for name, value in patched.state_dict().items()}
        return state
