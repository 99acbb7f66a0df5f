"""Several random passes of one network, or one pass of several networks, and what their spread says.

Every pass is random per sample: its draws depend on (seed, pass, sample id) and on nothing else, so that results depend on
the batch size through rounding alone, and a sample may be read again without its neighbours. `nn.Dropout` cannot do that: it
draws from the global generator, in the order of the batch. So the network stays in evaluation mode (batch norm keeps its
statistics) and the output of every dropout layer is masked on its way out.

Classifiers, for S passes with probabilities p_s and their mean p:

    H(p) = mean_s H(p_s)  +  [H(p) - mean_s H(p_s)]         total = aleatoric + epistemic (mutual information), in nats.

Regressors, for S predictions of a mean m_s and a variance v_s (law of total variance):

    Var(Y) = mean_s v_s  +  Var_s(m_s)                      total = aleatoric + epistemic, in squared units.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from robustbench_ext import device as devices
from robustbench_ext.errors import ConfigError, ModelError
from robustbench_ext.models.contract import check_logits, frozen_eval
from robustbench_ext.randomness import SampleRandom
from uq.base import Reading

_SELU = (
    -1.7580993408473766
)  # -alpha lambda, where SELU saturates: what alpha dropout puts in the place of a dropped value
_ELEMENTS = (nn.Dropout, nn.AlphaDropout)
_CHANNELS = (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.FeatureAlphaDropout)
_ALPHA = (nn.AlphaDropout, nn.FeatureAlphaDropout)


def dropout_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The dropout layers that can be sampled, by name: of every kind that PyTorch has, with p > 0.

    Calls of `F.dropout` in a forward method, and dropout inside `nn.LSTM` or `nn.MultiheadAttention`, are no layers: they
    cannot be seen from outside and stay off.
    """
    return {n: m for n, m in model.named_modules() if isinstance(m, _ELEMENTS + _CHANNELS) and _rate(m) > 0}


def no_dropout(model: nn.Module) -> str:
    """What to tell a user whose network cannot be sampled."""
    return (
        f"{type(model).__name__} has no dropout layer (nn.Dropout and its kin with p > 0), so all its passes would be equal. "
        f"Give a network that was trained with dropout (calls of F.dropout must become nn.Dropout modules), or take "
        f"deep-ensemble, or bias-variance-mix with source: augment."
    )


@contextmanager
def sampled_dropout(model: nn.Module, random: SampleRandom, step: int) -> Iterator[None]:
    """Inside, dropout layers of a network in evaluation mode drop: sample i of the batch by the stream of sample i.

    Args:
        random: the streams of the batch's samples; a layer's masks also depend on its name and on how often it ran before.
        step: the pass.

    Raises:
        ConfigError: the network has no dropout layer, or none of them ran.
        ModelError: a layer's input does not have one row a sample.
    """
    layers = dropout_layers(model)
    if not layers:
        raise ConfigError(no_dropout(model))
    calls = dict.fromkeys(layers, 0)

    def masked(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            stream = random.child(f"{name}/{calls[name]}")
            calls[name] += 1
            return drop(layer, output, stream, step)

        return hook

    handles = [layer.register_forward_hook(masked(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    if not any(calls.values()):
        raise ConfigError(
            f"{type(model).__name__} has dropout layers ({', '.join(layers)}), but none of them ran: its forward pass does not "
            f"call them"
        )


def drop(layer: nn.Module, x: Tensor, random: SampleRandom, step: int) -> Tensor:
    """What `layer` would return in training mode, with one mask a sample, x (N, ...).

    Values are kept with probability 1 - p: single ones, or whole channels for the kinds that drop channels. Kept ones are
    divided by 1 - p; alpha dropout instead keeps mean 0 and variance 1.
    """
    if x.ndim < 2 or len(x) != len(random.keys):
        raise ModelError(
            f"dropout per sample: a {type(layer).__name__} got shape {tuple(x.shape)} for {len(random.keys)} samples; expected "
            f"(N, ...) with one row a sample. Put the samples first where the network folds or transposes them."
        )
    p = _rate(layer)
    shape = x.shape[1:] if isinstance(layer, _ELEMENTS) else (x.shape[1], *[1] * (x.ndim - 2))
    keep = random.uniform(shape, step=step) >= p
    if not isinstance(layer, _ALPHA):
        return torch.where(keep, x / (1 - p), 0.0) if p < 1 else torch.zeros_like(x)
    if p == 1:
        return torch.zeros_like(x)
    scale = 1 / math.sqrt((1 - p) * (1 + p * _SELU**2))
    return scale * torch.where(keep, x, _SELU) - scale * p * _SELU


def _rate(layer: nn.Module) -> float:
    return float(layer.p)  # type: ignore[arg-type]


# Where passes come from ----------------------------------------------------------------------------------------------


class Source(Protocol):
    """One random pass: outputs of a batch of inputs. `random` holds the batch's streams, `step` is the pass's number."""

    def __call__(self, model: nn.Module, x: Tensor, random: SampleRandom, step: int) -> Tensor: ...


@dataclass(frozen=True)
class DropoutPasses:
    """The network with its dropout on (Gal and Ghahramani, ICML 2016, arXiv 1506.02142)."""

    name: ClassVar[str] = "dropout"

    def __call__(self, model: nn.Module, x: Tensor, random: SampleRandom, step: int) -> Tensor:
        with sampled_dropout(model, random.child("dropout"), step):
            out: Tensor = model(x)
        return out


@dataclass(frozen=True)
class AugmentedPasses:
    """The network on images that are moved, mirrored or noisy.

    Attributes:
        shift: up to so many pixels in each direction, zeros come in.
        flip: mirror half of the images, left to right.
        noise: standard deviation of Gaussian noise; values are clipped to [0, 1].
    """

    shift: int = 1
    flip: bool = False
    noise: float = 0.0
    name: ClassVar[str] = "augment"

    def __post_init__(self) -> None:
        if self.shift < 0 or not 0 <= self.noise < math.inf or not (self.shift or self.flip or self.noise):
            raise ConfigError(
                f"augmentation: shift = {self.shift}, flip = {self.flip}, noise = {self.noise}; expected shift and noise >= 0 "
                f"and one of the three in use, or all passes would be equal"
            )

    def __call__(self, model: nn.Module, x: Tensor, random: SampleRandom, step: int) -> Tensor:
        out: Tensor = model(self.augmented(x, random, step))
        return out

    def augmented(self, x: Tensor, random: SampleRandom, step: int) -> Tensor:
        """The images (N, C, H, W) of a pass."""
        if x.ndim != 4:
            raise ConfigError(f"augmentation is for images (N, C, H, W), got inputs of shape {tuple(x.shape)}")
        if self.shift:
            places = random.child("shift").bits(2, step) % (2 * self.shift + 1)
            x = _moved(x, places[:, 0], places[:, 1], self.shift)
        if self.flip:
            mirror = random.child("flip").bits(1, step)[:, 0] % 2 == 1
            x = torch.where(mirror[:, None, None, None], x.flip(3), x)
        if self.noise:
            x = (x + self.noise * random.child("noise").normal(x.shape[1:], step)).clamp(0.0, 1.0)
        return x


def _moved(x: Tensor, down: Tensor, right: Tensor, reach: int) -> Tensor:
    """Windows of x (N, C, H, W), padded by `reach` zeros, whose corners lie at (down, right), each (N,)."""
    n, c, h, w = x.shape
    padded = nn.functional.pad(x, (reach, reach, reach, reach))
    rows = (down[:, None] + torch.arange(h, device=x.device))[:, None, :, None]
    columns = (right[:, None] + torch.arange(w, device=x.device))[:, None, None, :]
    samples = torch.arange(n, device=x.device)[:, None, None, None]
    channels = torch.arange(c, device=x.device)[None, :, None, None]
    return padded[samples, channels, rows, columns]


@dataclass(frozen=True)
class MemberPasses:
    """Pass s is member s of an ensemble; nothing is drawn (Lakshminarayanan et al., NeurIPS 2017, arXiv 1612.01474)."""

    members: tuple[nn.Module, ...]
    name: ClassVar[str] = "members"

    def __call__(self, model: nn.Module, x: Tensor, random: SampleRandom, step: int) -> Tensor:
        return devices.call(self.members[step], x)


def sample_outputs(
    source: Source, model: nn.Module, x: Tensor, random: SampleRandom, passes: int, batch_size: int = 250
) -> Tensor:
    """Outputs of `passes` passes, (S, N, ...), float64 on the CPU, without gradient.

    Args:
        x: inputs (N, ...); `random` holds one stream each.
    """
    device = devices.of(model, x.device)
    batches = []
    with ExitStack() as frozen, torch.no_grad(), devices.float32():
        for network in (model, *(source.members if isinstance(source, MemberPasses) else ())):
            frozen.enter_context(frozen_eval(network))
        for start in range(0, len(x), batch_size):
            rows = slice(start, start + batch_size)
            part = devices.send(x[rows], device)
            streams = SampleRandom(random.seed, random.keys[rows].to(device), random.purpose)
            outputs = [source(model, part.clone(), streams, step).cpu().double() for step in range(passes)]
            batches.append(torch.stack(outputs))
    return torch.cat(batches, dim=1)


def sample_logits(
    source: Source, model: nn.Module, x: Tensor, random: SampleRandom, passes: int, batch_size: int = 250
) -> Tensor:
    """log-probabilities of a classifier's passes, (S, N, K), float64."""
    logits = sample_outputs(source, model, x, random, passes, batch_size)
    for one in logits:
        check_logits(one, len(x))
    return logits.log_softmax(dim=2)


# What the spread says ------------------------------------------------------------------------------------------------


def entropy(log_p: Tensor) -> Tensor:
    """-sum p log p over the last dimension, in nats; 0 log 0 = 0."""
    p = log_p.exp()
    return -torch.where(p > 0, p * log_p, 0.0).sum(dim=-1)


def read_passes(log_p: Tensor, correct: bool = False) -> Reading:
    """Mean probabilities, expected entropy and mutual information of passes log_p (S, N, K).

    Args:
        correct: add the leading term of what a mean of S passes lacks in entropy, sum_k Var(p_k) / (2 S p_k), to the
            epistemic part. Without it the mutual information of few passes is too small (0 for one).

    Raises:
        ConfigError: `correct` and a single pass, which shows no variance.
    """
    s = len(log_p)
    if correct and s < 2:
        raise ConfigError("the correction of the entropy's bias needs at least 2 passes, got 1")
    mean = log_p.logsumexp(dim=0) - math.log(s)
    aleatoric = entropy(log_p).mean(dim=0)
    epistemic = (entropy(mean) - aleatoric).clamp_min(0.0)  # below 0 by rounding alone
    if correct:
        p = mean.exp()
        share = torch.where(p > 0, log_p.exp().var(dim=0) / torch.where(p > 0, p, 1.0), 0.0)
        epistemic = epistemic + share.sum(dim=1) / (2 * s)
    return Reading(mean, aleatoric, epistemic)


def total_variance(means: Tensor, variances: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, aleatoric and epistemic variance, each (N,), of S >= 2 passes with means (S, N) and, where predicted, variances.

    The epistemic part is the unbiased variance over passes.
    """
    if len(means) < 2:
        raise ConfigError(f"the variance over passes needs at least 2 of them, got {len(means)}")
    aleatoric = torch.zeros_like(means[0]) if variances is None else variances.mean(dim=0)
    return means.mean(dim=0), aleatoric, means.var(dim=0, correction=1)


def checked_passes(passes: object, what: str, least: int = 1) -> int:
    """A whole number of passes."""
    if isinstance(passes, bool) or not isinstance(passes, int) or passes < least:
        raise ConfigError(f"{what}: passes = {passes!r}, expected a whole number >= {least}")
    return passes


def checked_members(members: Sequence[nn.Module], names: Sequence[str], what: str) -> tuple[nn.Module, ...]:
    """Loaded members, one for each name."""
    if len(members) != len(names):
        raise ConfigError(f"{what}: {len(members)} networks for the members {', '.join(names) or '(none)'}")
    return tuple(members)
