"""Module Robust Criticality (Zhu et al., ICCV 2023, arXiv 2308.02533): how far the robust loss rises when one weight
tensor moves a little.

    MRC_i = max { R(theta + d) - R(theta) :  d non-zero in module i only,  ||d||_2 <= eps_w ||theta_i||_2 }

R is the mean cross-entropy on adversarial inputs. As published it is relaxed: the inputs are made once, by PGD on theta,
and the maximum is sought by gradient ascent on mini-batches, with d scaled back onto the sphere. So what comes out is a
lower bound of the maximum for those fixed inputs. It bounds from above what fine-tuning module i inside its ball can cost on
them; a fresh attack on the tuned network may cost more.

Published text and published code differ in three places; each is an option here (`project`, `report`, `split`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cached_property, partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robustbench_ext.attacks.base import seeded
from robustbench_ext.attacks.inner import InnerAttack
from robustbench_ext.attacks.threat import Threat
from robustbench_ext.data.base import Dataset
from robustbench_ext.errors import ConfigError, ModelError, unknown_name
from robustbench_ext.fingerprint import hash_arrays
from robustbench_ext.models.contract import check_images, check_labels, check_logits, frozen_eval, refuse_probabilities
from robustbench_ext.numbers import read_numbers
from robustbench_ext.randomness import SampleRandom

CRITICALITY_VERSION = 1
_ATTACK_BATCH = 500


@dataclass(frozen=True, kw_only=True)
class CriticalityRecipe:
    """How criticality is measured. Defaults are the published values.

    Args:
        eps, norm: budget of the adversarial inputs, in units of [0, 1] pixels.
        attack_steps, step_size: of the PGD that makes them (uniform start); 2.5 eps / steps by default.
        split: whose samples are attacked, "train" or "calibration". The published script takes CIFAR's test data, which
            we never do: what is chosen on the test data flatters the result on it.
        n: the first n of them (a stratified sample); None for all.
        eps_w: radius of the ball, as a share of the norm of the module's weight.
        ascent_epochs, ascent_lr, ascent_batch: of the ascent (no momentum). An epoch is cut into equal batches of at most
            `ascent_batch`, always the same ones in the same order.
        project: when d is scaled back: after every "epoch" (published algorithm box and code; within an epoch d may leave
            the ball, the loss is read after scaling) or after every "step" (published text). They cost the same; "step"
            found the higher loss for each of the 30 modules in benchmarks/defenses/results/rift, and the least critical
            one can be another.
        report: "max", the largest loss after any epoch, the loss before the first included (code), so that no module's
            criticality is negative; or "final", the loss after the last epoch (paper), which is a forward pass over the
            data an epoch cheaper.
    """

    eps: float = 8 / 255
    norm: str = "Linf"
    attack_steps: int = 10
    step_size: float | None = None
    split: str = "train"
    n: int | None = None
    eps_w: float = 0.1
    ascent_epochs: int = 10
    ascent_lr: float = 1.0
    ascent_batch: int = 512
    project: Literal["epoch", "step"] = "epoch"
    report: Literal["max", "final"] = "max"

    def __post_init__(self) -> None:
        read_numbers(self, "rift")
        self.require_choice("project", ("epoch", "step"))
        self.require_choice("report", ("max", "final"))
        if self.split not in ("train", "calibration"):
            raise ConfigError(
                f"rift: split = {self.split!r}, expected 'train' or 'calibration'. Modules chosen on the test data would "
                f"flatter the result on it."
            )
        self.require_least(1, "attack_steps", "n", "ascent_epochs", "ascent_batch")
        self.require_least(0, "eps_w", "ascent_lr", "step_size")
        self.threat()

    def require_choice(self, name: str, choices: tuple[str, ...]) -> None:
        """Raise ConfigError unless the field is one of the choices."""
        if getattr(self, name) not in choices:
            raise ConfigError(f"rift: {name} = {getattr(self, name)!r}, expected one of {', '.join(choices)}")

    def require_least(self, least: int, *names: str) -> None:
        """Raise ConfigError unless every field is at least that, or None."""
        for name in names:
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"rift: {name} = {value}, expected at least {least}")

    def threat(self) -> Threat:
        """The threat model of all attacks of the method."""
        return Threat(self.norm, self.eps)

    def criticality_spec(self) -> dict[str, Any]:
        """All options that a criticality depends on, without those of a subclass."""
        values = {f.name: getattr(self, f.name) for f in fields(CriticalityRecipe)}
        return {"version": CRITICALITY_VERSION, **values}


@dataclass(frozen=True)
class AdversarialSet:
    """Adversarial inputs x, float32 (N, C, H, W), and labels y, int64 (N,), that stay as they are. Kept on the CPU."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def batch(self, rows: slice, device: torch.device) -> tuple[Tensor, Tensor]:
        """A batch on the device; always a copy, so that a model that works in place changes nothing here."""
        return self.x[rows].to(device, copy=True), self.y[rows].to(device)

    def batches(self, size: int) -> list[slice]:
        """Equal slices of at most `size` samples."""
        count = math.ceil(len(self) / size)
        return [slice(k * len(self) // count, (k + 1) * len(self) // count) for k in range(count)]

    @cached_property
    def checksum(self) -> str:
        """A key of all bytes, taken when first asked for."""
        return self.digest()

    def digest(self) -> str:
        """A key of all bytes as they are now."""
        return hash_arrays({"x": self.x.numpy(), "y": self.y.numpy()})


@dataclass(frozen=True)
class ModuleCriticality:
    """What was found for one module.

    Attributes:
        name: of its weight, as in `named_parameters`.
        kind: "Conv2d" or "Linear".
        shape: of the weight.
        norm: ||theta_i||_2.
        mrc: the criticality, in nats.
        losses: mean cross-entropy on the adversarial set before the ascent and at each look after it.
        accuracy: on the adversarial set, at the look that `mrc` was read from. Modules are ranked by loss: equal
            criticalities can cost different accuracies.
        change: ||d||_2 / ||theta_i||_2 at that look; at most eps_w.
        cut: epochs whose ascent stopped early because the next step was not finite.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    norm: float
    mrc: float
    losses: tuple[float, ...]
    accuracy: float
    change: float
    cut: int


@dataclass(frozen=True)
class Criticality:
    """The criticality of a network's modules, in the network's order.

    Attributes:
        split, n, checksum: the adversarial set.
        loss, accuracy: on it, of the network as it is.
        modules: one entry for each candidate asked for.
        unused: weights that no logit depends on; they are no candidates.
        parametrized: Conv2d and Linear layers whose weight is computed from other parameters (spectral norm, weight
            norm): there is no weight of their own to move, so they are no candidates either.
    """

    split: str
    n: int
    checksum: str
    loss: float
    accuracy: float
    modules: tuple[ModuleCriticality, ...]
    unused: tuple[str, ...]
    parametrized: tuple[str, ...]

    def least(self) -> ModuleCriticality:
        """The module of lowest criticality, the first of equals."""
        return min(self.modules, key=lambda m: m.mrc)


def candidates(model: nn.Module) -> tuple[dict[str, nn.Parameter], tuple[str, ...]]:
    """Weights of all Conv2d and Linear layers by parameter name, a shared one once, under its first name; and the layers
    whose weight is no parameter of its own.

    Raises:
        ModelError: there are none.
    """
    found: dict[str, nn.Parameter] = {}
    parametrized, seen = [], set()
    for path, module in model.named_modules():
        if not isinstance(module, (nn.Conv2d, nn.Linear)):
            continue
        name = f"{path}.weight" if path else "weight"
        weight = dict(module.named_parameters(recurse=False)).get("weight")
        if weight is None:
            parametrized.append(name)
        elif id(weight) not in seen:
            seen.add(id(weight))
            found[name] = weight
    if not found:
        raise ModelError(
            f"{type(model).__name__} has no Conv2d or Linear layer with a weight of its own, so there is no module to "
            f"choose. Scripted and traced modules hide their layers (give the original), and weights under spectral or "
            f"weight norm must be made plain first (torch.nn.utils.parametrize.remove_parametrizations)."
        )
    return found, tuple(parametrized)


def exact_name(name: str, known: Collection[str]) -> str:
    """The parameter that a user means: its name, or its layer's; nothing is matched in part ("1" is not "11").

    Raises:
        ConfigError: no candidate is called so; the message names the closest one.
    """
    for option in (name, f"{name}.weight"):
        if option in known:
            return option
    layers = [k.removesuffix(".weight") for k in known]
    raise ConfigError("rift: " + unknown_name("module", name.removesuffix(".weight"), layers))


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's parameters."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def adversarial_set(model: nn.Module, data: Dataset, recipe: CriticalityRecipe, seed: int = 0) -> AdversarialSet:
    """PGD inputs for the model in evaluation mode: the last iterate from a uniform start, for every sample.

    Raises:
        DataError, ModelError: data or logits break the contract.
    """
    split, device = data[recipe.split].take(recipe.n), device_of(model)
    attack = InnerAttack(recipe.threat(), recipe.attack_steps, recipe.step_size)
    made = []
    for start in range(0, len(split), _ATTACK_BATCH):
        rows = slice(start, min(start + _ATTACK_BATCH, len(split)))
        x, y = split.images(rows).to(device), torch.from_numpy(split.labels[rows]).to(device)
        check_images(x, f"{data.name}/{recipe.split}")
        with torch.no_grad(), frozen_eval(model):
            logits = check_logits(model(x.clone()), len(x))
        check_labels(y, logits.shape[1], len(x))
        refuse_probabilities(logits)
        made.append(attack(model, x, y, SampleRandom.of(seed, split.ids[rows], "criticality", device)).cpu())
    return AdversarialSet(torch.cat(made), torch.from_numpy(split.labels))


def robust_loss(model: nn.Module, inputs: AdversarialSet, batch: int = 512) -> tuple[float, float]:
    """Mean cross-entropy and accuracy on the set, in evaluation mode."""
    with frozen_eval(model):
        look = _look(model, inputs, batch)
    return look.loss, look.accuracy


def module_robust_criticality(
    model: nn.Module,
    data: Dataset,
    recipe: CriticalityRecipe | None = None,
    seed: int = 0,
    *,
    inputs: AdversarialSet | None = None,
    names: Collection[str] | None = None,
    finished: Mapping[str, ModuleCriticality] | None = None,
    on_epoch: Callable[[str, int, int], object] | None = None,
    on_module: Callable[[ModuleCriticality], object] | None = None,
) -> Criticality:
    """The criticality of every Conv2d and Linear weight of any network. The network comes back as it was, bit for bit.

    Cost in batches, for T epochs of B batches: a module takes T B - 1 backward passes, from the logits down to itself, and
    T (2 B - 1) forward passes for "max" or (T + 1) B - 1 for "final". What is known is not computed again: the loss before
    the ascent and all modules' first gradients come from B forward passes and one backward pass, and the batch that opens
    an epoch is also the first one of the look that closed the epoch before.

    Args:
        model: raw images in [0, 1] to logits, on any device.
        inputs: the adversarial set, if there is one already; made by `adversarial_set` otherwise.
        names: parameter or layer names, exact; all candidates by default.
        finished: modules that need not be computed, by parameter name.
        on_epoch: called with (name, modules before it, epoch) after every epoch of an ascent.
        on_module: called with every module that was computed.

    Raises:
        ConfigError: an unknown name.
        ModelError: no candidates, or none that the logits depend on; or the logits inside the ball are not finite.
    """
    recipe = recipe or CriticalityRecipe()
    weights, parametrized = candidates(model)
    if names is not None:
        chosen = {exact_name(n, weights) for n in names}
        weights = {n: w for n, w in weights.items() if n in chosen}
    inputs = inputs if inputs is not None else adversarial_set(model, data, recipe, seed)
    checksum, device = inputs.checksum, device_of(model)
    # Networks that draw at random while they are evaluated draw the same for every module.
    with frozen_eval(model), seeded(seed, device):
        start = _look(model, inputs, recipe.ascent_batch, list(weights.values()))
    found = dict(finished or {})
    opening = {n: g for n, g in zip(weights, start.gradients, strict=True) if g is not None}
    if names is None and not opening:
        raise ModelError(
            "no logit depends differentiably on any Conv2d or Linear weight. Does the model's forward run under "
            "torch.no_grad, or detach what it computes?"
        )
    for count, (name, gradient) in enumerate(opening.items()):
        if name in found:
            continue
        with frozen_eval(model), seeded(seed, device):
            ascent = _Ascent(model, name, weights[name], inputs, recipe)
            found[name] = ascent.run(start, gradient, partial(on_epoch, name, count) if on_epoch else None)
        if on_module is not None:
            on_module(found[name])
    if inputs.digest() != checksum:
        raise ModelError("the adversarial inputs changed while they were in use: the model writes into its inputs")
    order = candidates(model)[0]
    return Criticality(
        split=recipe.split,
        n=len(inputs),
        checksum=checksum,
        loss=start.loss,
        accuracy=start.accuracy,
        modules=tuple(found[n] for n in order if n in found),
        unused=tuple(n for n in weights if n not in opening),
        parametrized=parametrized,
    )


@dataclass(frozen=True)
class _Look:
    """Mean loss and accuracy on the whole set, and the gradients of the first batch's mean loss (None: not needed for it)."""

    loss: float
    accuracy: float
    gradients: tuple[Tensor | None, ...] = ()


def _look(model: nn.Module, inputs: AdversarialSet, size: int, weights: Sequence[nn.Parameter] = ()) -> _Look:
    """One pass over the set; with weights, one backward pass through its first batch as well."""
    total, correct, device = 0.0, 0, device_of(model)
    gradients: tuple[Tensor | None, ...] = ()
    for number, rows in enumerate(inputs.batches(size)):
        x, y = inputs.batch(rows, device)
        first = number == 0 and bool(weights)
        with _differentiable(weights if first else ()):
            logits = check_logits(model(x), len(x))
            loss = F.cross_entropy(logits, y, reduction="sum")
            if first:
                gradients = _gradients(loss / len(y), weights)
        total += float(loss.detach())
        correct += int((logits.argmax(dim=1) == y).sum())
    return _Look(total / len(inputs), correct / len(inputs), gradients)


def _gradients(loss: Tensor, weights: Sequence[nn.Parameter]) -> tuple[Tensor | None, ...]:
    if not loss.requires_grad:
        return (None,) * len(weights)
    return torch.autograd.grad(loss, list(weights), allow_unused=True)


@contextmanager
def _differentiable(weights: Sequence[nn.Parameter]) -> Iterator[None]:
    """Gradients for these weights alone: a backward pass ends at the lowest of them."""
    for weight in weights:
        weight.requires_grad_(True)
    try:
        with torch.set_grad_enabled(bool(weights)):
            yield
    finally:
        for weight in weights:
            weight.requires_grad_(False)


class _Ascent:
    """Gradient ascent on one weight of a frozen network."""

    def __init__(
        self, model: nn.Module, name: str, weight: nn.Parameter, inputs: AdversarialSet, recipe: CriticalityRecipe
    ) -> None:
        self.model, self.name, self.weight, self.inputs, self.recipe = model, name, weight, inputs, recipe
        self.origin = weight.detach().clone()
        self.norm = _norm(self.origin)

    def run(self, start: _Look, gradient: Tensor | None, on_epoch: Callable[[int], object] | None) -> ModuleCriticality:
        """Ascend from where the weight is, and put it back.

        Args:
            start: the look at the network as it is.
            gradient: of the first batch there.
        """
        recipe, device = self.recipe, self.weight.device
        looks, changes, cut = [start], [0.0], 0
        batches = self.inputs.batches(recipe.ascent_batch)
        try:
            for epoch in range(1, recipe.ascent_epochs + 1):
                for number, rows in enumerate(batches):
                    if number or gradient is None:
                        gradient = self._gradient(*self.inputs.batch(rows, device))
                    if not self._step(gradient):
                        cut += 1
                        break
                gradient = None
                self._move(scale_back(self.weight.detach(), self.origin, recipe.eps_w))
                last = epoch == recipe.ascent_epochs
                if recipe.report == "max" or last:
                    look = self._look(() if last else (self.weight,))
                    gradient = look.gradients[0] if look.gradients else None
                    looks.append(look)
                    changes.append(relative_change(self.weight, self.origin))
                if on_epoch is not None:
                    on_epoch(epoch)
        finally:
            self._move(self.origin)
        losses = [look.loss for look in looks]
        best = losses.index(max(losses)) if recipe.report == "max" else len(losses) - 1
        return ModuleCriticality(
            name=self.name,
            kind="Conv2d" if self.weight.ndim == 4 else "Linear",
            shape=tuple(self.weight.shape),
            norm=self.norm,
            mrc=losses[best] - start.loss,
            losses=tuple(losses),
            accuracy=looks[best].accuracy,
            change=changes[best],
            cut=cut,
        )

    def _gradient(self, x: Tensor, y: Tensor) -> Tensor:
        with _differentiable((self.weight,)):
            loss = F.cross_entropy(self.model(x).float(), y, reduction="sum") / len(y)
            gradient = _gradients(loss, (self.weight,))[0]
        return torch.zeros_like(self.origin) if gradient is None else gradient

    def _step(self, gradient: Tensor) -> bool:
        """One step uphill; False, and no step, where it would not be finite."""
        wanted = self.weight.detach() + self.recipe.ascent_lr * gradient
        if not bool(torch.isfinite(wanted).all()):
            return False
        if self.recipe.project == "step":
            wanted = scale_back(wanted, self.origin, self.recipe.eps_w)
        self._move(wanted)
        return True

    def _look(self, weights: Sequence[nn.Parameter]) -> _Look:
        try:
            return _look(self.model, self.inputs, self.recipe.ascent_batch, weights)
        except ModelError as error:
            raise ModelError(
                f"rift: with '{self.name}' changed by at most {self.recipe.eps_w:g} of its norm, {error} Lower eps_w."
            ) from error

    def _move(self, value: Tensor) -> None:
        with torch.no_grad():
            self.weight.copy_(value)


def _norm(weight: Tensor) -> float:
    # Summed in float64: an ascent that explodes squares beyond what float32 holds.
    return float(torch.linalg.vector_norm(weight.detach(), dtype=torch.float64))


def relative_change(weight: Tensor, origin: Tensor) -> float:
    """||weight - origin||_2 / ||origin||_2; 0 where nothing changed, infinite where the origin is zero and something did."""
    change, norm = _norm(weight.double() - origin.double()), _norm(origin)
    return change / norm if norm else math.inf if change else 0.0


def scale_back(weight: Tensor, origin: Tensor, eps_w: float) -> Tensor:
    """The weight, moved towards `origin` until it lies in the ball of radius eps_w ||origin||; itself if it does already.

    The radius is taken shorter by what rounding theta + d to the weight's precision may add, so the result is inside.
    """
    reach = _norm(origin)
    step = weight.double() - origin.double()
    length = _norm(step)
    if length <= eps_w * reach:
        return weight
    rounding = 0.5 * torch.finfo(weight.dtype).eps * (1 + eps_w) * reach
    inside: Tensor = origin.double() + step * (max(0.0, eps_w * reach - rounding) / length)
    return inside.to(weight.dtype)
