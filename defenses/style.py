"""Style augmentation: modules that change the statistics of feature maps in training, placed in a network from outside.

The style of a feature map x (B, C, H, W) is the mean and the deviation of every channel of every sample,

    mu = mean_hw(x),   sigma = sqrt(Var_hw(x) + 1e-6)   (divisor HW - 1),      x_out = sigma' (x - mu) / sigma + mu',

and a method says what mu' and sigma' are (Zhou et al., MixStyle, ICLR 2021, arXiv 2104.02008). Modules hang on layers by hooks:
the network's own parameters, names and code stay as they are, and in evaluation mode nothing happens.

    styles = place_style(model, AdvStyleModule, ["conv1", "layer1", "layer2"])
    optimizer = SGD([*model.parameters(), *styles.parameters()], lr=...)

Draws come from torch's global generator, like those of dropout.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from defenses.base import Batch, Crafter, Defense, Loss, Task, bare
from robustbench_ext.attacks.threat import Threat
from robustbench_ext.catalog import DEFENSES
from robustbench_ext.errors import ConfigError, ModelError, unknown_name

EPS = 1e-6
INPUT = "input"
FEWEST = 4  # positions of a map that a default place needs: the deviation of fewer says little


def style_of(x: Tensor, eps: float = EPS) -> tuple[Tensor, Tensor]:
    """mu and sigma (B, C, 1, 1) of maps (B, C, H, W), in float32, with their gradient."""
    x = x.float()
    return x.mean(dim=(2, 3), keepdim=True), (x.var(dim=(2, 3), keepdim=True) + eps).sqrt()


def batch_deviation(statistic: Tensor) -> Tensor:
    """The deviation (1, C, 1, 1) of a statistic (B, C, 1, 1) over the batch, sqrt(Var_b + 1e-6)."""
    return (statistic.var(dim=0, keepdim=True) + EPS).sqrt()


def restyle(x: Tensor, mu: Tensor, sigma: Tensor, new_mu: Tensor, new_sigma: Tensor) -> Tensor:
    """Maps with another mean and deviation."""
    return (new_sigma * ((x.float() - mu) / sigma) + new_mu).to(x.dtype)


class StyleModule(nn.Module, ABC):
    """A change of style; the identity in evaluation mode, on single samples and on maps of one position."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) with other statistics."""
        if not self.training or x.ndim != 4 or len(x) < 2 or x.shape[2] * x.shape[3] < 2:
            return x
        return self._change(x)

    @abstractmethod
    def _change(self, x: Tensor) -> Tensor:
        """What training does to maps of at least two samples and two positions."""


class Styles(nn.ModuleDict):
    """The style modules of a network; `remove()` takes them off again."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        super().__init__({name.replace(".", "/"): module for name, module in modules.items()})
        self._handles: list[Any] = []

    def hang(self, model: nn.Module) -> None:
        """Put the modules on a network's layers; each works while its layer (for `input` the network) is in training mode."""
        layers = dict(model.named_modules())
        for key, module in self.items():
            name = key.replace("/", ".")
            if name == INPUT:
                self._handles.append(model.register_forward_pre_hook(_before(module)))
            else:
                self._handles.append(layers[name].register_forward_hook(_after(module)))

    def remove(self) -> None:
        """Leave the network as it was."""
        while self._handles:
            self._handles.pop().remove()


def _before(style: nn.Module) -> Callable[[nn.Module, tuple[Any, ...]], Any]:
    def hook(model: nn.Module, inputs: tuple[Any, ...]) -> Any:
        return (style(inputs[0]), *inputs[1:]) if model.training else None

    return hook


def _after(style: nn.Module) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Any]:
    def hook(layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Any:
        return style(output) if layer.training else None

    return hook


def make_styles(
    model: nn.Module,
    make: Callable[[int], StyleModule],
    layers: Sequence[str] = (),
    shape: tuple[int, int, int] | None = None,
) -> Styles:
    """One style module for each place, not yet on the network; see `place_style`."""
    model = bare(model)
    channels = _channels(model, shape)
    places = [_resolve(model, name, channels) for name in layers] if layers else _default_places(model, channels)
    return Styles({place: make(channels[place][0]) for place in places})


def place_style(
    model: nn.Module,
    make: Callable[[int], StyleModule],
    layers: Sequence[str] = (),
    shape: tuple[int, int, int] | None = None,
) -> Styles:
    """Place a style module behind layers of a network, by hooks. The network is otherwise left alone.

    Args:
        make: a style module from its number of channels: `AdvStyleModule`, or `functools.partial(MixStyleModule, p=0.3)`.
        layers: names of modules whose outputs are maps; `input` for the images themselves. By default the images and every
            child of the network that is a block or a batch norm and ends in maps of at least four positions.
        shape: (C, H, W) of an input, for the dry pass that finds the channels; 32x32 by default.

    Returns:
        The modules: give their parameters to the optimizer, keep their state_dict, take them off with `remove()`.

    Raises:
        ConfigError: no such layer.
        ModelError: the dry pass fails, or a layer's output is not a map.
    """
    styles = make_styles(model, make, layers, shape)
    styles.train(model.training)
    styles.hang(bare(model))
    return styles


def _channels(model: nn.Module, shape: tuple[int, int, int] | None) -> dict[str, tuple[int, int, int]]:
    """(C, H, W) of every module's output where that is a map, from a dry pass in evaluation mode."""
    found: dict[str, tuple[int, int, int]] = {}
    if shape is None:
        first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
        if first is None:
            raise ModelError("style: the network has no convolution, so it has no maps whose style could be changed")
        shape = (first.in_channels, 32, 32)

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.ndim == 4:
                found[name] = (output.shape[1], output.shape[2], output.shape[3])

        return hook

    handles = [m.register_forward_hook(watch(n)) for n, m in model.named_modules() if n]
    modes = [(m, m.training) for m in model.modules()]
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    try:
        model.eval()
        with torch.no_grad():
            model(torch.full((1, *shape), 0.5, device=device))
    except RuntimeError as error:
        raise ModelError(
            f"style: the network does not take inputs of shape {shape} ({error}); give place_style its shape="
        ) from error
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training
    return {INPUT: shape} | found


def _resolve(model: nn.Module, name: str, channels: Mapping[str, tuple[int, int, int]]) -> str:
    """A layer's full name; the part behind a wrapper's prefix will do where it is the only one."""
    names = [n for n, _ in model.named_modules() if n]
    if name == INPUT:
        return name
    matches = [name] if name in names else [n for n in names if n.endswith("." + name)]
    shortest = [n for n in matches if n.count(".") == min(m.count(".") for m in matches)]
    if len(shortest) != 1:
        raise ConfigError(f"style: {unknown_name('layer', name, [INPUT, *names])}")
    if shortest[0] not in channels:
        raise ModelError(f"style: the output of layer '{name}' is not a map (B, C, H, W)")
    return shortest[0]


def _default_places(model: nn.Module, channels: Mapping[str, tuple[int, int, int]]) -> list[str]:
    """The images, and the network's children that are blocks or batch norms, as long as their maps are not too small."""
    network, prefix = model, ""
    while True:  # through wrappers of a single network
        inner = [(n, m) for n, m in network.named_children() if any(True for _ in m.parameters())]
        if len(inner) != 1 or not list(inner[0][1].children()):
            break
        network, prefix = inner[0][1], f"{prefix}{inner[0][0]}."
    places = [INPUT]
    for name, module in network.named_children():
        _, h, w = channels.get(prefix + name, (0, 0, 0))
        block = any(True for _ in module.children()) or isinstance(module, nn.BatchNorm2d)
        if block and h * w >= FEWEST and any(True for _ in module.parameters()):
            places.append(prefix + name)
    return places


def convolutions(model: nn.Module) -> list[str]:
    """The names of all convolutions, where pAdaIN hangs."""
    return [name for name, module in bare(model).named_modules() if isinstance(module, nn.Conv2d)]


# Style methods as defenses ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class StyleDefense(Defense):
    """Another defense, on a network whose styles are augmented in training.

    Args:
        base: the defense inside: an instance, its name, or a mapping {name: trades, beta: 6}. The attack of an adversarial one
            meets the network in the recipe's attack mode, without style modules.
        layers: see `place_style`.
    """

    base: Any = "standard"
    layers: tuple[str, ...] = ()

    def _settle(self) -> None:
        object.__setattr__(self, "base", base_defense(self.base, self.name))
        if isinstance(self.base, StyleDefense):
            raise ConfigError(
                f"{self.name}: base is {self.base.name}, a style method too; give the defense inside it, and one of the two"
            )
        if isinstance(self.layers, str) or not all(isinstance(layer, str) for layer in self.layers):
            raise ConfigError(
                f"{self.name}: layers = {self.layers!r}, expected a list of names such as [conv1, layer1]"
            )
        object.__setattr__(self, "layers", tuple(self.layers))

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
        own = {k: v for k, v in vars(self).items() if k != "base"}
        return {"defense": self.name, "version": self.version, **own, "base": self.base.spec()}

    def attack(self, threat: Threat, steps: int, step_size: float | None) -> Crafter | None:
        crafter: Crafter | None = self.base.attack(threat, steps, step_size)
        return crafter

    def state(self, model: nn.Module, task: Task) -> nn.Module:
        layers = self.layers or self._places(model)
        return nn.ModuleDict(
            {"styles": make_styles(model, self._module, layers, task.shape), "base": self.base.state(model, task)}
        )

    def loss(self, model: nn.Module, batch: Batch, state: nn.Module | None = None) -> Loss:
        assert isinstance(state, nn.ModuleDict)  # noqa: S101 - the trainer hands over what `state` made
        with worn(model, state["styles"]):
            loss: Loss = self.base.loss(model, batch, state["base"])
        return loss

    @contextmanager
    def perturb(self, model: nn.Module, batch: Batch, state: nn.Module) -> Iterator[None]:
        assert isinstance(state, nn.ModuleDict)  # noqa: S101
        with self.base.perturb(model, batch, state["base"]):
            yield

    def _places(self, model: nn.Module) -> tuple[str, ...]:
        """Where the modules hang if `layers` does not say; () for the general default."""
        return ()

    @abstractmethod
    def _module(self, channels: int) -> StyleModule:
        """One style module."""


@contextmanager
def worn(model: nn.Module, styles: nn.Module) -> Iterator[None]:
    """The style modules on the network inside the block, in its mode; off again behind it."""
    assert isinstance(styles, Styles)  # noqa: S101
    styles.train(model.training)
    styles.hang(bare(model))
    try:
        yield
    finally:
        styles.remove()


def base_defense(base: Any, name: str) -> Defense:
    """A defense that is the inner one of another: an instance, a name, or a mapping with a name."""
    from robustbench_ext.attacks.base import build

    said = f"{name}: base = {base!r}, expected a defense such as standard or {{name: trades, beta: 6}}"
    if not isinstance(base, Defense):
        if not isinstance(base, str) and not (isinstance(base, Mapping) and isinstance(base.get("name"), str)):
            raise ConfigError(said)
        options = {"name": base} if isinstance(base, str) else dict(base)
        inner = str(options.pop("name"))
        base = build(DEFENSES.load(inner), f"{name}: base: {inner}", options)
    if not isinstance(base, Defense):
        raise ConfigError(said)
    return base
