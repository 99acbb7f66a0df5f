"""How much memory and time does a run take as its data grows?

    python benchmarks/scale/memory.py --n 1000 10000 100000 1000000 --out benchmarks/scale/results

For each n, in a process of its own: n test images of 3 x 32 x 32 in 8 bits (a million: 3 GB on disk, made in a temporary folder
and removed again) through linear models with `run_suite` on one core, to the end: clean and noisy conditions, accuracy,
calibration, all intervals, comparisons, the report. For each part of the run: seconds on the clock, seconds of the processor
(other work on the machine does not count in them), and the most memory that the process had (VmHWM; Linux only).

    --models 2      two models, so that all comparisons between them are made
    --conditions    of the suite, as YAML
    --detectors     such as msp

Seven minutes on one core for the four sizes, 4 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import yaml

SIDE, CLASSES, CALIBRATION = 32, 10, 500
CONDITIONS = (
    "[clean, {attack: random-noise, norm: Linf, eps: 8/255, tries: 1}, {corruption: gaussian-noise, severity: 3}]"
)
FACTORY = '''
import torch
from torch import nn


def make(seed: int) -> nn.Module:
    """The direction of every class, a little off for every seed."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randint(0, 2, ({classes}, {inputs}), generator=generator) * 2.0 - 1.0
    generator.manual_seed(1 + seed)
    linear = nn.Linear({inputs}, {classes})
    with torch.no_grad():
        linear.weight.copy_(0.1 * (directions + 0.2 * torch.randn(directions.shape, generator=generator)))
        linear.bias.copy_(-0.5 * linear.weight.sum(dim=1))
    return nn.Sequential(nn.Flatten(), linear)
'''


def write_data(folder: Path, n: int) -> None:
    """n test images and a few calibration images: noise with a faint pattern of their class; every tenth label is wrong."""
    import torch

    folder.mkdir(parents=True)
    inputs = 3 * SIDE * SIDE
    generator = torch.Generator().manual_seed(0)
    directions = (torch.randint(0, 2, (CLASSES, inputs), generator=generator) * 2 - 1).numpy().astype(np.int16)
    rng = np.random.default_rng(0)
    for split, size in (("calibration", CALIBRATION), ("test", n)):
        labels = np.arange(size) % CLASSES
        told = np.where(rng.random(size) < 0.1, rng.integers(0, CLASSES, size), labels)
        np.save(folder / f"y_{split}.npy", told)
        x = np.lib.format.open_memmap(folder / f"x_{split}.npy", "w+", np.uint8, (size, 3, SIDE, SIDE))
        for start in range(0, size, 10_000):
            block = labels[start : start + 10_000]
            noise = rng.integers(40, 216, (len(block), inputs), dtype=np.uint8)
            x[start : start + 10_000] = (noise + 3 * directions[block]).astype(np.uint8).reshape(-1, 3, SIDE, SIDE)
        x.flush()


def suite_of(data: Path, args: argparse.Namespace) -> dict[str, Any]:
    """The suite that is run."""
    factory = data.parent / "linear.py"
    factory.write_text(FACTORY.format(classes=CLASSES, inputs=3 * SIDE * SIDE))
    return {
        "schema": 1,
        "title": "Scale",
        "data": f"npz:{data}",
        "seed": 0,
        "models": [
            {"name": f"linear {i}", "spec": f"{factory}:make", "kwargs": {"seed": i}} for i in range(args.models)
        ],
        "conditions": yaml.safe_load(args.conditions),
        "detectors": args.detectors,
        "uq": args.uq,
    }


def measure(suite: Path, out: Path) -> dict[str, Any]:
    """Run the suite in this process; seconds and peak of every part, in MiB."""
    from reports import write_reports
    from robustbench_ext.callbacks import Callback
    from robustbench_ext.engine import run_suite

    parts: dict[str, dict[str, float]] = {}
    base = peak(reset=True)
    last = began = clocks()

    def end(name: str) -> None:
        nonlocal last
        now = clocks()
        parts[name] = since(last, now) | {"peak_mib": peak(reset=True)}
        last = now

    class Parts(Callback):
        """Notes where one part ends and another begins."""

        def on_run_start(self, *_: Any) -> None:
            end("loading")

        def on_cell(self, done: int, total: int, what: str, facts: Any) -> None:
            if done in (1, total):
                end("keys" if done == 1 else "cells")

        def on_run_end(self, summary: Any) -> None:
            end("results")

    summary = run_suite(suite, out, executor="serial", callbacks=[Parts()])
    write_reports(out)
    end("report")
    return {
        **since(began, last),
        "peak_mib": max(base, *(part["peak_mib"] for part in parts.values())),
        "imported_mib": base,
        "parts": parts,
        "rows": len(summary.results.results),
        "failures": [f"{f.what}: {f.error}" for f in summary.failures],
        "report_kib": round((out / "report.html").stat().st_size / 1024),
        "results_kib": round((out / "results.json").stat().st_size / 1024),
    }


def clocks() -> tuple[float, float]:
    """Seconds on the clock, and of the processor for this process."""
    return time.perf_counter(), time.process_time()


def since(then: tuple[float, float], now: tuple[float, float]) -> dict[str, float]:
    """What has passed."""
    return {"seconds": round(now[0] - then[0], 2), "processor_seconds": round(now[1] - then[1], 2)}


def peak(reset: bool = False) -> float:
    """The most memory of this process since the last reset, in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            found = round(int(line.split()[1]) / 1024, 1)
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--n", type=int, nargs="+", default=[1000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--models", type=int, default=1)
    parser.add_argument("--conditions", default=CONDITIONS)
    parser.add_argument("--detectors", nargs="*", default=[])
    parser.add_argument("--uq", nargs="*", default=[])
    parser.add_argument("--out", type=Path, help="folder for memory.json")
    parser.add_argument("--name", default="memory", help="of the file in that folder")
    parser.add_argument("--temp", type=Path, help="where the data is made; the system's temporary folder by default")
    parser.add_argument("--inside", nargs=2, type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        print(json.dumps(measure(*args.inside)))
        return
    found = []
    for n in args.n:
        with tempfile.TemporaryDirectory(dir=args.temp) as folder:
            write_data(Path(folder) / "data", n)
            suite = Path(folder) / "suite.yaml"
            suite.write_text(yaml.safe_dump(suite_of(Path(folder) / "data", args)))
            command = [sys.executable, __file__, "--inside", str(suite), str(Path(folder) / "run")]
            told = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        found.append({"n": n, **json.loads(told.splitlines()[-1])})
        print(table(found[-1:]), flush=True)
        if args.out:
            write(args, found)


def write(args: argparse.Namespace, found: list[dict[str, Any]]) -> None:
    """What was measured so far, as JSON."""
    from robustbench_ext.provenance import environment

    about = {key: getattr(args, key) for key in ("models", "conditions", "detectors", "uq")}
    args.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"suite": about, "environment": environment(), "runs": found}, indent=1)
    (args.out / f"{args.name}.json").write_text(text + "\n")


def table(found: list[dict[str, Any]]) -> str:
    """One line per part of every run."""
    lines = []
    for run in found:
        for name, part in {f"n = {run['n']:,}": run, **run["parts"]}.items():
            seconds = f"{part['seconds']:8.1f} s {part['processor_seconds']:8.1f} s of the processor"
            lines.append(f"{name:>16} {seconds} {part['peak_mib']:8.0f} MiB")
        lines += [f"  failed: {text}" for text in run["failures"]]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
