"""A suite's loss landscapes: what is computed for each network and for each pair, under which key, and the cards it makes.

    landscape:
      - models: [a, b]                      every pair of them; an entry with `seeds` stands for all of its models
        loss: [clean, {attack: pgd, eps: 8/255}]
        phases: {loss: 0.5, sharpness: 50, connectivity: 0.05, cka: 0.9}

A unit of work is one network (loss, Hessian) or one pair (path), each with a record of its own; a network that is part of
several pairs is looked at once. A card is a pure function of the records of a pair and of its two networks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.special import ndtri, stdtrit

from robustbench_ext import device, fingerprint
from robustbench_ext.data.base import REGRESSION
from robustbench_ext.errors import ConfigError, DataError, RobustBenchExtError, unknown_name
from robustbench_ext.landscape import (
    LANDSCAPE_VERSION,
    Cuts,
    Hessian,
    Phase,
    Samples,
    Spent,
    Surface,
    along,
    cka_error,
    connectivity,
    linear_cka,
    path,
    phase,
    quadratic_forms,
    see,
    top_eigenvalue,
)
from robustbench_ext.metrics.estimate import LEVEL, Estimate
from robustbench_ext.metrics.resampling import resampled_mean
from robustbench_ext.results import Landscape, Quantity, finite
from robustbench_ext.suite import Landscapes

if TYPE_CHECKING:
    from robustbench_ext.evaluate import Context

STATISTICS_BATCH = 250  # images at a time that batch norms are measured on: part of what comes out


@dataclass(frozen=True)
class Unit:
    """One piece of work: a network, or the way from one to another.

    Attributes:
        models: one or two names.
        surface: which loss.
        told: the suite's entry.
    """

    models: tuple[str, ...]
    surface: Surface
    told: Landscapes

    @property
    def title(self) -> str:
        """What progress and failures call it; unique in a suite."""
        return f"landscape {' to '.join(self.models)} · {self.surface.label}"

    @cached_property
    def own(self) -> dict[str, Any]:
        """The settings that its record depends on."""
        if len(self.models) == 1:
            return {name: getattr(self.told, name) for name in ("n", "probes", "iterations", "tolerance")}
        return {name: getattr(self.told, name) for name in ("n", "points", "statistics_n")}


def units(context: Context) -> dict[str, Unit]:
    """All units of a suite by title, networks before pairs.

    Raises:
        ConfigError: two entries ask the same of a network or a pair, with different settings.
    """
    found: dict[str, Unit] = {}
    for told, surface in _surfaces(context):
        alone = [Unit((name,), surface, told) for name in told.models]
        for unit in (*alone, *(Unit(pair, surface, told) for pair in combinations(told.models, 2))):
            before = found.setdefault(unit.title, unit)
            other_phases = len(unit.models) == 2 and before.told.phases != told.phases
            if before.own != unit.own or before.surface != unit.surface or other_phases:
                raise ConfigError(
                    f"{unit.title}: two entries of the suite's landscape ask for it, with different settings. Give both the "
                    f"same n, points, statistics_n, probes, iterations, tolerance, loss and phases."
                )
    return dict(sorted(found.items(), key=lambda item: len(item[1].models)))


def _surfaces(context: Context) -> Iterator[tuple[Landscapes, Surface]]:
    for told in context.suite.landscape:
        for loss in told.losses:
            yield told, Surface.parse(loss)


def validate(context: Context) -> None:
    """Find out now what would fail later.

    Raises:
        ConfigError: data of another task, no train split, an unknown model or loss, a model without gradients.
    """
    if not context.suite.landscape:
        return
    if context.data.task == REGRESSION or "train" not in context.data.splits:
        raise ConfigError(
            f"landscape: it is that of classifiers on their training images, and {context.suite.data} has "
            + ("numbers as targets" if context.data.task == REGRESSION else "no train split")
        )
    for told in context.suite.landscape:
        path(told.points)
        if len({*told.models}) < len(told.models):
            raise ConfigError(f"landscape: models {list(told.models)}: one is named twice; expected different ones")
        if told.phases is not None:
            _cuts(told)
        for name in told.models:
            if name not in context.names:
                raise ConfigError(f"landscape: {unknown_name('model', name, context.names)}")
            if context.lacks(name):
                raise ConfigError(f"landscape: model '{name}' has no gradient in its weights; leave it out")
    units(context)


def _cuts(told: Landscapes) -> Cuts | None:
    if told.phases is None:
        return None
    given = dict(told.phases)
    known = tuple(Cuts.__dataclass_fields__)
    for name in given:
        if name not in known:
            raise ConfigError("landscape: phases: " + unknown_name("cut", name, known))
    if missing := [name for name in known if name not in given]:
        raise ConfigError(
            f"landscape: phases: missing {', '.join(missing)}. No cut-offs were published, so none is taken for granted: give "
            f"all of {', '.join(known)}, or leave phases out."
        )
    return Cuts(**given)


# Work ----------------------------------------------------------------------------------------------------------------


def key(context: Context, unit: Unit) -> str:
    """The key of a unit's record: all that it depends on."""
    train = context.data["train"]
    return fingerprint.key_of(
        {
            "kind": "landscape",
            "version": LANDSCAPE_VERSION,
            "models": [context.model(name).fingerprint for name in unit.models],
            "surface": unit.surface.spec(),
            "settings": unit.own,
            "train": train.fingerprint(),
            # Without an attack nothing is drawn along a way.
            "seed": context.suite.seed if len(unit.models) == 1 or unit.surface.eps else None,
        }
    )


def is_done(context: Context, unit: Unit) -> bool:
    """Whether the record is there."""
    return context.store.has(key(context, unit))


def compute(context: Context, title: str) -> dict[str, Any]:
    """Compute one unit, unless it is there; returns what a progress line says."""
    unit, started = units(context)[title], time.perf_counter()
    there = is_done(context, unit)
    if not there:
        with device.settled():
            columns = _network(context, unit) if len(unit.models) == 1 else _pair(context, unit)
        seconds = round(time.perf_counter() - started, 3)
        context.store.save(key(context, unit), columns, {"what": title, "settings": unit.own, "seconds": seconds})
    return {"seconds": time.perf_counter() - started, **({"reused": True} if there else {})}


def _samples(context: Context, n: int, batch_size: int | None = None) -> Samples:
    split = context.data["train"].take(n)
    labels = torch.from_numpy(split.labels)
    return Samples(split.images(slice(None)), labels, split.ids, batch_size or context.suite.batch_size)


def _network(context: Context, unit: Unit) -> dict[str, np.ndarray]:
    """Losses and outputs of the samples, the top eigenvalue, and quadratic forms whose mean is the trace."""
    told, seed, spent = unit.told, context.suite.seed, Spent()
    module, samples = context.placed(unit.models[0]), _samples(context, unit.told.n)
    seen = see(module, samples, unit.surface, seed, spent)
    hessian = Hessian(module, seen.x, samples.y, samples.batch_size, spent)
    there = hessian.device if device.has_float64(hessian.device) else "cpu"
    where: dict[str, Any] = {"seed": seed, "device": there}
    top = top_eigenvalue(hessian, hessian.dimension, iterations=told.iterations, tolerance=told.tolerance, **where)
    forms = quadratic_forms(hessian, hessian.dimension, probes=told.probes, **where)
    return {
        "loss": seen.losses,
        "logits": seen.logits.numpy(),
        "top": np.array([top.value, top.residual, top.iterations, top.converged], dtype=np.float64),
        "forms": forms,
        "passes": np.array([spent.forwards, spent.backwards]),
    }


def _pair(context: Context, unit: Unit) -> dict[str, np.ndarray]:
    """Losses of the samples along the way."""
    told, spent = unit.told, Spent()
    a, b = (context.placed(name) for name in unit.models)
    losses = along(
        a,
        b,
        _samples(context, told.n),
        unit.surface,
        points=told.points,
        statistics=_samples(context, told.statistics_n, STATISTICS_BATCH),
        seed=context.suite.seed,
        spent=spent,
    )
    return {"loss": losses, "passes": np.array([spent.forwards, spent.backwards])}


# Cards ---------------------------------------------------------------------------------------------------------------


def cards(context: Context) -> list[Landscape]:
    """One card for each pair and loss whose records are all there."""
    found: list[Landscape] = []
    every = units(context)
    for unit in every.values():
        if len(unit.models) < 2:
            continue
        parts = [every[Unit((name,), unit.surface, unit.told).title] for name in unit.models]
        if all(_there(context, part) for part in (*parts, unit)):
            alone = [context.store.load(key(context, part)) for part in parts]
            between = context.store.load(key(context, unit))
            found.append(card(unit, alone, between, _cuts(unit.told)))
    return found


def _there(context: Context, unit: Unit) -> bool:
    try:
        return is_done(context, unit)
    except RobustBenchExtError:  # a model that cannot be loaded: the run says so
        return False


def card(
    unit: Unit, alone: Sequence[Mapping[str, np.ndarray]], between: Mapping[str, np.ndarray], cuts: Cuts | None
) -> Landscape:
    """What the records of two networks and of the way between them say."""
    losses = between["loss"]
    curve = losses.mean(axis=1)
    mc, at = connectivity(curve)
    n, points = losses.shape[1], path(len(losses))
    # Paired by sample, at the point that was found; that it was sought does not widen the interval.
    linked = resampled_mean((losses[0] + losses[-1]) / 2 - losses[at])
    similar = _similarity(*(part["logits"] for part in alone))
    heights = [resampled_mean(part["loss"]) for part in alone]
    tops = [_eigenvalue(part, n) for part in alone]
    found = None
    if cuts is not None:
        if math.isnan(similar.value):
            found = Phase(None, similar.reason)
        else:
            found = phase([h.value for h in heights], [t.value for t in tops], mc, similar.value, cuts)
    ends = [resampled_mean(row) for row in losses]
    passes = np.sum([part["passes"] for part in (*alone, between)], axis=0)
    return Landscape(
        models=list(unit.models),
        loss=unit.surface.label,
        n=n,
        train_loss=[_quantity(h) for h in heights],
        top_eigenvalue=[_quantity(t) for t in tops],
        trace=[_quantity(_trace(part)) for part in alone],
        connectivity=_quantity(linked),
        at=float(points[at]),
        cka=_quantity(similar),
        phase=None if found is None else found.name,
        phase_reason="no cut-offs were given" if found is None else found.reason,
        cuts=None if cuts is None else dict(vars(cuts)),
        curve={
            "t": [float(t) for t in points],
            "loss": [e.value for e in ends],
            "low": [e.ci_low for e in ends],
            "high": [e.ci_high for e in ends],
        },
        forwards=int(passes[0]),
        backwards=int(passes[1]),
    )


def _eigenvalue(part: Mapping[str, np.ndarray], n: int) -> Estimate:
    """Of these very samples: what is uncertain is how far Lanczos has come."""
    value, residual, iterations, converged = (float(v) for v in part["top"])
    method = f"Lanczos, {iterations:.0f} steps, residual" + ("" if converged else " (not converged)")
    return Estimate(value, value - residual, value + residual, method, n)


def _trace(part: Mapping[str, np.ndarray]) -> Estimate:
    """Of these very samples: what is uncertain are the random probes."""
    forms = part["forms"]
    value, m = float(forms.mean()), len(forms)
    if m < 2:
        return Estimate(value, math.nan, math.nan, "none", m, "one probe has no standard error")
    half = float(stdtrit(m - 1, (1 + LEVEL) / 2)) * float(forms.std(ddof=1)) / math.sqrt(m)
    return Estimate(value, value - half, value + half, f"t over {m} probes", m)


def _similarity(x: np.ndarray, y: np.ndarray) -> Estimate:
    try:
        value = linear_cka(x, y)
        half = -float(ndtri((1 - LEVEL) / 2)) * cka_error(x, y)
    except DataError as error:
        return Estimate.undefined(len(x), str(error))
    return Estimate(value, max(0.0, value - half), min(1.0, value + half), "jackknife", len(x))


def _quantity(estimate: Estimate) -> Quantity:
    return Quantity(
        value=finite(estimate.value),
        ci_low=finite(estimate.ci_low),
        ci_high=finite(estimate.ci_high),
        ci_method=estimate.ci_method,
        n=estimate.n,
        reason=estimate.reason,
    )
