"""What a suite would cost, before anything runs: its cells, their passes, and a time from a measured warm-up.

The time is an upper bound: it assumes that no attack breaks any sample. On a model that is not robust most samples leave
after a few steps, and the run takes a fraction of it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import nn

from robustbench_ext.conditions import UnderAttack
from robustbench_ext.errors import RobustBenchExtError
from robustbench_ext.evaluate import Context
from robustbench_ext.models import LoadedModel, frozen_eval

WARM_UP = 3


@dataclass(frozen=True)
class PlannedCell:
    """One (model, condition).

    Attributes:
        n: samples; `there` of them have records already.
        forwards, backwards: most passes per sample, the pass that reads the probes included; None where unknown.
        seconds: upper bound of what is missing, one process; None where unknown.
    """

    model: str
    condition: str
    n: int
    there: int
    forwards: int | None
    backwards: int | None
    seconds: float | None


@dataclass(frozen=True)
class Speed:
    """Seconds that one sample takes in a forward pass, and in a forward and a backward pass together."""

    forward: float
    both: float


def measure_speed(model: nn.Module, x: torch.Tensor, batch_size: int) -> Speed:
    """Time a few batches with one thread, as a run would; the best of them counts."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with frozen_eval(model):
            batch = x[:batch_size]
            forward, both = [], []
            for _ in range(WARM_UP):
                begun = time.perf_counter()
                with torch.no_grad():
                    model(batch)
                forward.append(time.perf_counter() - begun)
                begun = time.perf_counter()
                leaf = batch.clone().requires_grad_(True)
                torch.autograd.grad(model(leaf).sum(), leaf)
                both.append(time.perf_counter() - begun)
    finally:
        torch.set_num_threads(threads)
    return Speed(min(forward) / len(batch), min(both) / len(batch))


def plan(context: Context) -> list[PlannedCell]:
    """Every (model, condition) of a suite. Models that are still to be trained are timed with fresh weights."""
    cells = []
    clean = context.conditions["clean"]
    x = context.samples(clean, "test").images(slice(0, context.suite.batch_size))
    for entry in context.suite.models:
        loaded = _trained_or_loaded(context, entry.name)
        network = loaded.module if loaded else context.training[entry.name][1].build(0)
        with torch.no_grad(), frozen_eval(network):
            num_classes = network(x[:2]).shape[1]
        speed = measure_speed(network, x, context.suite.batch_size)
        for label, condition in context.conditions.items():
            samples = context.samples(condition, "test")
            there = 0
            if loaded is not None:
                mine = [c for c in context.cells(entry.name) if c.condition == label and c.split == "test"]
                there = sum(len(samples.labels[context.rows(c)]) for c in mine if context.is_done(c))
            forwards: int | None = 1
            backwards: int | None = 0
            if isinstance(condition, UnderAttack):
                passes = condition.attack.cost(num_classes)
                forwards, backwards = (passes.forwards + 1, passes.backwards) if passes else (None, None)
            seconds = None
            if forwards is not None and backwards is not None:
                each = max(0, forwards - backwards) * speed.forward + backwards * speed.both
                seconds = each * (len(samples) - there)
            cells.append(PlannedCell(entry.name, label, len(samples), there, forwards, backwards, seconds))
    return cells


def _trained_or_loaded(context: Context, name: str) -> LoadedModel | None:
    """The model, or None where it is still to be trained."""
    try:
        return context.model(name)
    except RobustBenchExtError:
        if name in context.training:
            return None
        raise
