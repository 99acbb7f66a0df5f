"""What a suite would cost, before anything runs: its cells, their passes, and a time from a measured warm-up.

The time is an upper bound: it assumes that no attack breaks any sample. On a model that is not robust most samples leave
after a few steps, and the run takes a fraction of it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import nn

from robustbench_ext import device as devices
from robustbench_ext.errors import RobustBenchExtError
from robustbench_ext.evaluate import Context
from robustbench_ext.models import LoadedModel, frozen_eval

WARM_UP = 3


@dataclass(frozen=True)
class PlannedCell:
    """One (model, condition).

    Attributes:
        n: samples; `there` of them have records already.
        forwards, backwards: most passes per sample, those of reading it included: one for all probes, more for estimators that
            make passes of their own (each member of an ensemble counts as one of the model); None where unknown.
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
    """Time a few batches with one thread, as a run would; the best of them counts. Without a gradient both are one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        there = devices.of(model, x.device)
        with frozen_eval(model), devices.settled():
            batch = x[:batch_size].to(there)
            forward, both = [], []
            for _ in range(WARM_UP):
                begun = time.perf_counter()
                with torch.no_grad():
                    model(batch)
                devices.synchronize(there)  # a GPU is still at it when the call returns
                forward.append(time.perf_counter() - begun)
                begun = time.perf_counter()
                leaf = batch.clone().requires_grad_(True)
                total = model(leaf).sum()
                if total.requires_grad:
                    torch.autograd.grad(total, leaf)
                devices.synchronize(there)
                both.append(time.perf_counter() - begun)
    finally:
        torch.set_num_threads(threads)
    return Speed(min(forward) / len(batch), min(both) / len(batch))


def plan(context: Context) -> list[PlannedCell]:
    """Every (model, condition) of a suite. Models that are still to be trained are timed with fresh weights."""
    cells = []
    clean = context.conditions["clean"]
    x = context.task.inputs(context.samples(clean, "test"), slice(0, context.suite.batch_size))
    for name in context.evaluated:
        loaded = _trained_or_loaded(context, name)
        network = context.placed(name) if loaded else context.training[name].fresh().to(devices.current())
        with torch.no_grad(), frozen_eval(network):
            out = devices.call(network, x[:2])
        outputs = out.shape[1] if out.ndim == 2 else 1
        speed = measure_speed(network, x, context.suite.batch_size)
        reading = 1 + sum(probe.forwards for probe in context.probes_of(name))
        for label, condition in context.conditions_of(name).items():
            samples = context.samples(condition, "test")
            there = 0
            if loaded is not None:
                mine = [c for c in context.cells(name) if c.condition == label and c.split == "test"]
                there = sum(len(samples.labels[context.rows(c)]) for c in mine if context.is_done(c))
            passes = condition.cost(outputs)
            forwards, backwards, seconds = None, None, None
            if passes is not None:
                forwards, backwards = passes.forwards + reading, passes.backwards
                each = max(0, forwards - backwards) * speed.forward + backwards * speed.both
                seconds = each * (len(samples) - there)
            cells.append(PlannedCell(name, label, len(samples), there, forwards, backwards, seconds))
    return cells


def _trained_or_loaded(context: Context, name: str) -> LoadedModel | None:
    """The model, or None where it is still to be trained."""
    try:
        return context.model(name)
    except RobustBenchExtError:
        if name in context.training:
            return None
        raise
