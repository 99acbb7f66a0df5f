"""What one training step of each defense costs, against the passes that it cannot avoid, in one run.

    python benchmarks/defenses/cost.py

The bound of a method is timed bare: its inner attack's forward and input-gradient passes on the frozen network, its outer
forward passes, and one backward pass through them (a second forward and backward for AWP; for DONE a forward pass, the input
gradient with its graph, and one double backward pass). Step and bound are timed in turns on the same batch of the same
network, CPU seconds of one thread, medians. Peak memory is what the step's tensors take beyond the network, by PyTorch's
own profiler, as a multiple of the outer pass's activations (natural and adversarial, whichever the method needs).
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from defenses import AWP, DONE, GAIRAT, MAIL, MART, PGDAT, SRAT, TRADES, WEAT, Standard
from defenses.base import Defense
from defenses.runtime import Runtime
from defenses.trainer import Architecture, Recipe, _Training
from robustbench_ext.attacks.inner import attacked_in
from robustbench_ext.data import load_dataset
from robustbench_ext.provenance import environment

STEPS, EPS = 7, 0.2
# defense: (natural outer pass, adversarial outer pass, what else)
METHODS: list[tuple[str, Defense, tuple[bool, bool, str]]] = [
    ("standard", Standard(), (True, False, "")),
    ("pgd-at", PGDAT(), (False, True, "")),
    ("trades", TRADES(), (True, True, "")),
    ("mart", MART(), (True, True, "")),
    ("awp(trades)", AWP(base="trades", gamma=0.005), (True, True, "twice")),
    ("gairat", GAIRAT(burn_in=0), (False, True, "")),
    ("mail(trades)", MAIL(base="trades", burn_in=0), (True, True, "")),
    ("weat", WEAT(), (True, True, "")),
    ("done", DONE(), (False, True, "double")),
    ("done, first order", DONE(implicit="none"), (False, True, "")),
    ("srat", SRAT(defer=0), (False, True, "")),
]


def bound(model: nn.Module, x: Tensor, y: Tensor, attack: bool, outer: tuple[bool, bool, str]) -> None:
    """The passes that a method cannot avoid, and nothing else."""
    natural, adversarial, more = outer
    if attack:
        with attacked_in(model, "eval"):
            if natural and adversarial and more != "ce":  # the divergence's fixed first argument
                with torch.no_grad():
                    model(x)
            for _ in range(STEPS):
                inputs = x.detach().requires_grad_(True)
                torch.autograd.grad(F.cross_entropy(model(inputs), y, reduction="sum"), inputs)
    model.zero_grad(set_to_none=True)
    for _ in range(2 if more == "twice" else 1):
        inputs = x.detach().requires_grad_(more == "double")
        losses = [F.cross_entropy(model(inputs), y) for wanted in (natural, adversarial) if wanted]
        value = torch.stack(losses).sum()
        if more == "double":
            (gradient,) = torch.autograd.grad(value, inputs, create_graph=True)
            value = value + gradient.sum()
        value.backward()  # type: ignore[no-untyped-call]


def cpu_seconds(work: Callable[[], None]) -> float:
    begun = time.process_time()
    work()
    return time.process_time() - begun


def peak_bytes(work: Callable[[], None]) -> int:
    """The most memory that tensors made in `work` took at one time, by the profiler's record of allocations."""
    from torch.profiler import ProfilerActivity, profile

    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        work()
    level = peak = 0
    for event in sorted(
        (e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()
    ):
        level += event.nbytes()
        peak = max(peak, level)
    return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--network", default="small-resnet")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/defenses/results"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = load_dataset("mnist5k")
    recipe = Recipe(epochs=1, batch_size=128, eps=EPS, attack_steps=STEPS, energy_n=0, lr=1e-6)
    index = np.arange(128)
    x, y = data["train"].images(index), torch.from_numpy(data["train"].labels[index])
    rows = []
    for name, defense, outer in METHODS:
        architecture = Architecture(options.network, data.shape, 10)
        run = _Training(defense, architecture, data, recipe, 0, Runtime("cpu"), "", Path(), 1e9)
        run.model.train()
        attack = run.attack is not None
        what = (*outer[:2], outer[2] or ("" if name.startswith(("trades", "mail", "weat", "awp")) else "ce"))

        def step(run: _Training = run) -> None:
            run.step(index, 0)

        def least(run: _Training = run, attack: bool = attack, what: tuple[bool, bool, str] = what) -> None:
            bound(run.bare, x, y, attack, what)
            run.optimizer.step()

        step(), least()
        times = [(cpu_seconds(step), cpu_seconds(least)) for _ in range(options.repeats)]
        ratio = statistics.median(a / b for a, b in times)
        plain = peak_bytes(lambda run=run, what=what: bound(run.bare, x, y, False, (*what[:2], "")))  # type: ignore[misc]
        row = {
            "method": name,
            "step_seconds": statistics.median(a for a, _ in times),
            "bound_seconds": statistics.median(b for _, b in times),
            "ratio": ratio,
            "memory_ratio": peak_bytes(step) / plain,
        }
        rows.append(row)
        print(
            f"{name:<18} step {1e3 * row['step_seconds']:7.1f} ms  bound {1e3 * row['bound_seconds']:7.1f} ms  "
            f"x{ratio:.3f}  memory x{row['memory_ratio']:.2f}",
            flush=True,
        )
    options.out.mkdir(parents=True, exist_ok=True)
    found = environment()
    report = {"network": options.network, "repeats": options.repeats, "batch": 128, "environment": found, "rows": rows}
    (options.out / f"cost-{options.network}.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
