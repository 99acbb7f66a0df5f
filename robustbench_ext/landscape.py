"""The loss landscape round trained networks: how high, how sharp, and whether two of them are connected.

Yang et al., *Taxonomizing local versus global structure in neural network loss landscapes*, NeurIPS 2021, arXiv 2107.11228, and
the zoos of networks that are built on it, arXiv 2504.18072. Of two networks a and b:

    loss          of each, the mean cross-entropy on training samples
    sharpness     of each, the largest eigenvalue (Lanczos) and the trace (Hutchinson) of the loss's Hessian
    connectivity  mc = (l(0) + l(1)) / 2 - l(t*),  l(t) the loss at (1 - t) a + t b,  t* where it is farthest from that mean
    similarity    linear CKA of their logits

mc is negative where a barrier lies between them. Here the path is the straight line, which needs no training (the zoos train a
Bezier curve); batch norms are measured again at each of its points. A soup of two networks stands on the middle of this line.

    phase   I      high, sharp, mc < 0          II    high, sharp, mc > 0
            III    low, flat, mc < 0            IV-A  low, flat, mc near 0, unlike logits    IV-B  the same, like logits

No cut-offs between high and low, sharp and flat were published: they are arguments without defaults (`Cuts`).

All of it can be asked of the *adversarial* loss: every sample is attacked anew at the weights in question.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from robustbench_ext.attacks.inner import InnerAttack
from robustbench_ext.attacks.threat import Threat
from robustbench_ext.errors import ConfigError, DataError, unknown_name
from robustbench_ext.models.contract import frozen_eval, logits_of
from robustbench_ext.numbers import format_number, read_numbers
from robustbench_ext.randomness import SampleRandom

LANDSCAPE_VERSION = 1
Product = Callable[[Tensor], Tensor]

# Which loss ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Surface:
    """A loss as a function of weights: the mean cross-entropy of samples as they are (eps = 0), or of attacked ones.

    The attack is projected gradient ascent on the cross-entropy for a fixed number of steps from a uniform start, in evaluation
    mode, on every sample: also on those that are misclassified as they are, which attacks that count verdicts leave alone.

    Args:
        eps, norm: the budget; eps = 0 for clean samples.
        steps, step_size: of the attack; 2.5 eps / steps by default.
    """

    eps: float = 0.0
    norm: str = "Linf"
    steps: int = 10
    step_size: float | None = None

    def __post_init__(self) -> None:
        read_numbers(self, "landscape: loss")
        threat = Threat(self.norm, self.eps)
        if not threat.eps < math.inf or self.steps < 1 or (self.step_size is not None and not self.step_size > 0):
            raise ConfigError(f"landscape: loss {asdict(self)}: expected a finite eps, steps >= 1 and step_size > 0")

    @classmethod
    def parse(cls, told: Any) -> Surface:
        """`clean`, or a mapping {attack: pgd, eps: 8/255, norm: Linf, steps: 10, step_size: 2/255}.

        Raises:
            ConfigError: another attack, or an unknown parameter.
        """
        if told == "clean":
            return cls()
        if not isinstance(told, Mapping) or told.get("attack") != "pgd":
            raise ConfigError(
                f"landscape: loss {told!r}, expected clean or {{attack: pgd, eps: 8/255, steps: 10}}. Other attacks look for "
                f"verdicts and leave samples alone that are misclassified already: they give no loss at given weights."
            )
        options = {k: v for k, v in told.items() if k != "attack"}
        for name in options:
            if name not in cls.__dataclass_fields__:
                raise ConfigError("landscape: loss: " + unknown_name("parameter", str(name), cls.__dataclass_fields__))
        if "eps" not in options:
            raise ConfigError("landscape: loss: missing eps, for example {attack: pgd, eps: 8/255}")
        return cls(**options)

    @property
    def label(self) -> str:
        """`clean`, `pgd Linf 8/255, 10 steps`."""
        if not self.eps:
            return "clean"
        size = "" if self.step_size is None else f" of {format_number(self.step_size)}"
        return f"pgd {self.norm} {format_number(self.eps)}, {self.steps} steps{size}"

    def spec(self) -> dict[str, Any]:
        """All that the loss depends on here."""
        return asdict(self) if self.eps else {"eps": 0.0}


@dataclass
class Samples:
    """The training samples that a loss is taken over, on the CPU, and how many go through a network at a time.

    Attributes:
        x, y: float32 (N, C, H, W) in [0, 1], int64 (N,).
        ids: (N,), of the draws of attacks.
    """

    x: Tensor
    y: Tensor
    ids: np.ndarray
    batch_size: int = 250

    def __len__(self) -> int:
        return len(self.y)


@dataclass
class Spent:
    """Passes so far, in samples: one forward pass of a batch of 250 counts 250."""

    forwards: int = 0
    backwards: int = 0


@dataclass(frozen=True)
class Seen:
    """What a network says of the samples that a loss is taken over.

    Attributes:
        x: the inputs, attacked where the surface says so, (N, C, H, W), on the CPU.
        logits: float32 (N, K), on the CPU.
        losses: cross-entropies, float64 (N,).
    """

    x: Tensor
    logits: Tensor
    losses: np.ndarray


def see(model: nn.Module, samples: Samples, surface: Surface, seed: int = 0, spent: Spent | None = None) -> Seen:
    """Every sample's cross-entropy at a network's weights, in evaluation mode; the network comes back as it was."""
    spent, device = spent or Spent(), _device(model)
    attack = InnerAttack(Threat(surface.norm, surface.eps), surface.steps, surface.step_size)
    random = SampleRandom.of(seed, samples.ids, "landscape/attack", device)
    inputs, logits = [], []
    for start in range(0, len(samples), samples.batch_size):
        rows = torch.arange(start, min(start + samples.batch_size, len(samples)))
        x, y = samples.x[rows].to(device), samples.y[rows].to(device)
        if surface.eps:
            x = attack.craft(model, x, y, random.select(rows.to(device))).x_adv
            spent.forwards += surface.steps * len(rows)
            spent.backwards += surface.steps * len(rows)
        with torch.no_grad(), frozen_eval(model):
            logits.append(logits_of(model, x).cpu())
        spent.forwards += len(rows)
        inputs.append(x.cpu())
    z = torch.cat(logits)
    losses = F.cross_entropy(z.double(), samples.y, reduction="none").numpy()
    return Seen(torch.cat(inputs), z, losses)


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


# Sharpness -----------------------------------------------------------------------------------------------------------


class Hessian:
    """The Hessian of the mean cross-entropy in all parameters of a network, as a function of vectors; evaluation mode.

    Attacked inputs are held fixed: of the adversarial loss this is its curvature at the attack that was found, without what the
    attack's own response to other weights would add.

    A product costs a forward and two backward passes of every sample, the second of them through the first.

    Args:
        model: its parameters, modes and flags are left alone.
        x, y: inputs and labels.
        batch_size: inputs at a time; the sum over batches is exact.
    """

    def __init__(
        self, model: nn.Module, x: Tensor, y: Tensor, batch_size: int = 250, spent: Spent | None = None
    ) -> None:
        self._model, self._x, self._y, self._batch_size = model, x, y, batch_size
        self._parameters = {name: p.detach() for name, p in model.named_parameters()}
        if not self._parameters:
            raise ConfigError("landscape: the model has no parameters, so there is no landscape round it")
        self.spent = spent or Spent()
        self.device = _device(model)
        self.dimension = sum(p.numel() for p in self._parameters.values())

    def __call__(self, vector: Tensor) -> Tensor:
        """H v, for v (P,) in the order of `named_parameters`, flattened; of v's type."""
        pieces = vector.split([p.numel() for p in self._parameters.values()])
        direction = [piece.view_as(p).to(p) for piece, p in zip(pieces, self._parameters.values(), strict=True)]
        total = torch.zeros_like(vector)
        with frozen_eval(self._model):
            for start in range(0, len(self._x), self._batch_size):
                rows = slice(start, start + self._batch_size)
                x, y = self._x[rows].to(self.device), self._y[rows].to(self.device)
                total += self._product(x, y, direction).to(total)
                self.spent.forwards += len(x)
                self.spent.backwards += 2 * len(x)
        return total / len(self._x)

    def _product(self, x: Tensor, y: Tensor, direction: Sequence[Tensor]) -> Tensor:
        leaves = {name: p.clone().requires_grad_(True) for name, p in self._parameters.items()}
        with torch.enable_grad():
            loss = F.cross_entropy(functional_call(self._model, leaves, (x,)), y, reduction="sum")
            gradient = torch.autograd.grad(loss, list(leaves.values()), create_graph=True, allow_unused=True)
            along = sum(((g * v).sum() for g, v in zip(gradient, direction, strict=True) if g is not None), loss * 0.0)
            second = torch.autograd.grad(along, list(leaves.values()), allow_unused=True)
        filled = [torch.zeros_like(p) if h is None else h for h, p in zip(second, leaves.values(), strict=True)]
        return torch.cat([h.reshape(-1) for h in filled])


@dataclass(frozen=True)
class TopEigenvalue:
    """The largest eigenvalue of a symmetric operator, by Lanczos.

    Attributes:
        value: the largest Ritz value, which is no larger than the eigenvalue (but for rounding).
        residual: some eigenvalue lies this near to it.
        iterations: products.
        converged: the residual is within the tolerance.
    """

    value: float
    residual: float
    iterations: int
    converged: bool


def top_eigenvalue(
    product: Product,
    dimension: int,
    *,
    iterations: int = 100,
    tolerance: float = 1e-3,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> TopEigenvalue:
    """The largest (not the largest in size) eigenvalue of a symmetric operator, by Lanczos from a random start.

    Vectors are not kept and not made orthogonal again, so memory is three of them; the largest Ritz value does not suffer from
    that (Paige 1971), it may appear several times.

    Args:
        product: v (P,) float64 to A v.
        dimension: P.
        iterations: products at most.
        tolerance: of the residual, relative to the largest Ritz value in size.
        seed: of the start.
    """
    start = SampleRandom.of(seed, ["start"], "landscape/lanczos", device).normal((dimension,))[0].double()
    vector, previous, beta = start / torch.linalg.vector_norm(start), torch.zeros_like(start), 0.0
    alphas: list[float] = []
    betas: list[float] = []
    value, residual, converged = math.nan, math.inf, False
    for step in range(1, iterations + 1):
        image = product(vector).double()
        alpha = float(vector @ image)
        image = image - alpha * vector - beta * previous
        beta = float(torch.linalg.vector_norm(image))
        alphas.append(alpha)
        values, vectors = np.linalg.eigh(np.diag(alphas) + np.diag(betas, 1) + np.diag(betas, -1))
        scale = float(np.abs(values).max())
        value, residual = float(values[-1]), beta * abs(float(vectors[-1, -1]))
        converged = residual <= tolerance * scale
        if converged or step >= dimension:
            break
        betas.append(beta)
        previous, vector = vector, image / beta
    return TopEigenvalue(value, residual, len(alphas), converged)


def quadratic_forms(
    product: Product, dimension: int, *, probes: int = 20, seed: int = 0, device: torch.device | str = "cpu"
) -> np.ndarray:
    """v'Av for random signs v: (probes,) float64, each with the trace of A as its mean (Hutchinson 1990).

    Their mean estimates the trace; its standard error is their standard deviation over sqrt(probes).
    """
    random = SampleRandom.of(seed, ["signs"], "landscape/hutchinson", device)
    found = []
    for probe in range(probes):
        signs = (random.bits(dimension, step=probe)[0] & 1).double() * 2 - 1
        found.append(float(signs @ product(signs).double()))
    return np.array(found)


# Connectivity --------------------------------------------------------------------------------------------------------


def path(points: int) -> np.ndarray:
    """t of the points of a path, (points,), from 0 to 1; symmetric, so that a path from b to a has the same points."""
    if points < 3:
        raise ConfigError(f"landscape: points = {points}, expected at least 3: two ends and one between")
    return np.arange(points) / (points - 1)


def along(
    a: nn.Module,
    b: nn.Module,
    samples: Samples,
    surface: Surface,
    *,
    points: int = 11,
    statistics: Samples | None = None,
    seed: int = 0,
    spent: Spent | None = None,
) -> np.ndarray:
    """Every sample's cross-entropy at equally spaced points of the straight line from a to b: (points, N) float64.

    Args:
        a, b: of one architecture; they are left as they are.
        points: both ends among them.
        statistics: training images on which batch norms are measured again at every point, the ends included, in batches
            of its `batch_size`; where there are no batch norms nothing happens to them. For an adversarial loss they are
            attacked first, at the point in question with interpolated statistics: those of clean images alone can
            take much of a robust network's robustness (see `defenses.soups`).
        seed: of the attack's starts, which are the same at every point.

    Raises:
        ModelError: the networks differ in their tensors.
        DataError: there are batch norms, and nothing to measure them on.
    """
    from defenses.making import check_alike, has_batch_statistics, recompute_statistics, with_state
    from defenses.soups import average

    check_alike({"a": a, "b": b})
    if has_batch_statistics(a) and (statistics is None or not len(statistics)):
        raise DataError(
            "landscape: these networks have batch norms, whose statistics belong to nobody between the two. Give training "
            "images: statistics=Samples(x, y, ids)"
        )
    spent, device = spent or Spent(), _device(a)
    ends = a.state_dict(), b.state_dict()
    found = []
    for k in range(len(path(points))):
        # Weights k / (points - 1) on both sides: from the other end they are the same numbers.
        between = with_state(a, average(ends, [(points - 1 - k) / (points - 1), k / (points - 1)]))
        if statistics is not None and has_batch_statistics(between):
            x = see(between, statistics, surface, seed, spent).x if surface.eps else statistics.x
            recompute_statistics(between, (batch.to(device) for batch in x.split(statistics.batch_size)))
            spent.forwards += len(statistics)
        found.append(see(between, samples, surface, seed, spent).losses)
    return np.stack(found)


def connectivity(losses: Sequence[float] | np.ndarray) -> tuple[float, int]:
    """Mode connectivity of the losses along a path, and the position of t*: negative where there is a barrier.

    t* is sought between the ends. The ends are equally far from their own mean, on both sides of it: with them, rounding
    would decide the sign of a path without a barrier, and the other direction of the path would give another one. Of a peak
    and a valley of the same size the peak counts.

    Args:
        losses: at the points of a path, (points,), at least 3.
    """
    values = np.asarray(losses, dtype=np.float64)
    if values.ndim != 1 or len(values) < 3 or not np.isfinite(values).all():
        raise DataError(f"connectivity: losses {values.shape}, expected at least 3 finite numbers")
    apart = values - (values[0] + values[-1]) / 2
    at = max(range(1, len(values) - 1), key=lambda k: (abs(apart[k]), apart[k]))
    return 0.0 - float(apart[at]), at  # no -0.0


# Similarity ----------------------------------------------------------------------------------------------------------


def linear_cka(x: np.ndarray, y: np.ndarray) -> float:
    """Linear centred kernel alignment |X'Y|^2 / (|X'X| |Y'Y|) of outputs on the same samples, in [0, 1].

    Kornblith et al. 2019, arXiv 1905.00414. 1 where one is the other turned, scaled and moved. With few samples beside many
    columns it is biased upwards; the zoos average it over batches, here all samples count at once.

    Args:
        x, y: (N, d) and (N, e).

    Raises:
        DataError: shapes that do not fit, or outputs that are the same for all samples.
    """
    x, y = (np.asarray(v, dtype=np.float64) for v in (x, y))
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y) or len(x) < 2:
        raise DataError(f"cka: outputs {x.shape} and {y.shape}, expected (N, d) and (N, e) with N >= 2")
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    return _alignment(x.T @ y, x.T @ x, y.T @ y)


def _alignment(xy: np.ndarray, xx: np.ndarray, yy: np.ndarray) -> float:
    size = float(np.linalg.norm(xx) * np.linalg.norm(yy))
    if not size > 0:
        raise DataError("cka: the outputs of a network are the same for all samples, so they have no similarity")
    return min(1.0, float((xy**2).sum()) / size)


def cka_error(x: np.ndarray, y: np.ndarray) -> float:
    """The jackknife's standard error of `linear_cka`: from its values without each of the samples."""
    x, y = (np.asarray(v, dtype=np.float64) for v in (x, y))
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    n, (xy, xx, yy) = len(x), (x.T @ y, x.T @ x, y.T @ y)
    # Of centred columns, leaving out row i takes n / (n - 1) times its outer product away.
    left = n / (n - 1)
    values = [
        _alignment(xy - left * np.outer(p, q), xx - left * np.outer(p, p), yy - left * np.outer(q, q))
        for p, q in zip(x, y, strict=True)
    ]
    return math.sqrt((n - 1) * float(np.var(values)))


# Phases --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Cuts:
    """Where high begins, and sharp, and unlike. None was published, so none has a default.

    Args:
        loss: high above it.
        sharpness: of the top eigenvalue; sharp above it.
        connectivity: mc counts as 0 within this much of it.
        cka: like at or above it, in [0, 1].
    """

    loss: float
    sharpness: float
    connectivity: float
    cka: float

    def __post_init__(self) -> None:
        read_numbers(self, "landscape: phases")
        if self.connectivity < 0 or not 0 <= self.cka <= 1:
            raise ConfigError(f"landscape: phases {asdict(self)}: expected connectivity >= 0 and cka in [0, 1]")


@dataclass(frozen=True)
class Phase:
    """A phase (I, II, III, IV-A, IV-B), or None with the reason why it is none of them."""

    name: str | None
    reason: str = ""


def phase(losses: Sequence[float], sharpness: Sequence[float], mc: float, cka: float, cuts: Cuts) -> Phase:
    """The phase of two (or more) networks.

    Args:
        losses, sharpness: of each network. They must be on one side of the cut: a mean of a sharp and of a flat one is neither.
        mc, cka: of the pair.
    """
    high, sharp = ({value > cut for value in v} for v, cut in ((losses, cuts.loss), (sharpness, cuts.sharpness)))
    if len(high) > 1 or len(sharp) > 1:
        what = "loss" if len(high) > 1 else "sharpness"
        return Phase(None, f"the networks lie on both sides of the cut of {what}")
    if high != sharp:
        return Phase(None, "high and flat" if high == {True} else "low and sharp")
    if high == {True}:
        if abs(mc) <= cuts.connectivity:
            return Phase(None, "high and sharp, and mc is near 0: between I and II")
        return Phase("I" if mc < 0 else "II")
    if mc < -cuts.connectivity:
        return Phase("III")
    if mc > cuts.connectivity:
        return Phase(None, "low and flat, and a valley lies between the networks")
    return Phase("IV-B" if cka >= cuts.cka else "IV-A")
