"""What the attacks cost around the model: PGD against torchattacks', two processes against two threads, peak memory.

    python benchmarks/attacks/engine.py

On the TRADES small CNN of `run.py` (trained into runs/benchmark-models if it is not there). PGD: the same steps on the same
samples in turns, CPU seconds of one thread, once to the end and once leaving broken samples. Processes: `standard` with 1,000
queries, wall time, two processes of one thread (each with half of the samples) and one process of two threads, in turns, on an
otherwise idle machine. Memory: the largest resident set of a process that attacks n samples chunk by chunk as the engine
does, for growing n.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from defenses import TRADES
from defenses.trainer import Architecture, Recipe, train, training_key
from robustbench_ext.attacks.ensemble import Standard
from robustbench_ext.attacks.pgd import PGD
from robustbench_ext.data import load_dataset
from robustbench_ext.models import load_model
from robustbench_ext.provenance import environment

EPS, STEPS, CHUNK = 0.2, 40, 250
RECIPE = {"epochs": 20, "eps": EPS, "attack_steps": 7}


def model_folder(root: Path) -> Path:
    data = load_dataset("mnist5k")
    network, recipe = Architecture("small-cnn", data.shape, 10), Recipe(**RECIPE)
    folder = root / training_key(TRADES(beta=6), network, data, recipe, 0)
    return train(TRADES(beta=6), network, data, recipe, folder)


def pgd(folder: Path, n: int, repeats: int) -> list[dict[str, Any]]:
    import torchattacks

    torch.set_num_threads(1)
    test = load_dataset("mnist5k")["test"].take(n)
    model = load_model(str(folder)).module.eval()
    x, y = test.images(slice(None)), torch.from_numpy(test.labels)
    rows = []
    for stop in ("never", "broken"):
        ours = PGD(eps=EPS, steps=STEPS, step_size=EPS / 10, stop=stop)
        theirs = torchattacks.PGD(model, eps=EPS, alpha=EPS / 10, steps=STEPS)
        seconds: dict[str, list[float]] = {"ours": [], "torchattacks": []}
        broken = {}
        for _ in range(repeats):
            begun = time.process_time()
            broken["ours"] = float(ours(model, x, y, ids=test.ids, batch_size=CHUNK).broken.float().mean())
            middle = time.process_time()
            found = [theirs(x[i : i + CHUNK], y[i : i + CHUNK]) for i in range(0, n, CHUNK)]
            seconds["ours"].append(middle - begun)
            seconds["torchattacks"].append(time.process_time() - middle)
            with torch.no_grad():
                broken["torchattacks"] = float((model(torch.cat(found)).argmax(1) != y).float().mean())
        ratio = median(b / a for a, b in zip(seconds["ours"], seconds["torchattacks"], strict=True))
        rows.append({"stop": stop, "n": n, "steps": STEPS, "broken": broken, "seconds": seconds, "speedup": ratio})
        print(f"PGD-{STEPS}, stop: {stop}: x{ratio:.2f}, broken {broken}", flush=True)
    return rows


def worker(folder: Path, rows: slice, threads: int) -> None:
    """Attack some of the samples; says when it begins and how long that took."""
    torch.set_num_threads(threads)
    test = load_dataset("mnist5k")["test"]
    model = load_model(str(folder)).module.eval()
    x, y = test.images(rows), torch.from_numpy(test.labels[rows])
    PGD(eps=EPS, steps=2)(model, x[:50], y[:50])  # warm
    print("ready", flush=True)
    sys.stdin.readline()
    Standard(eps=EPS, queries=1000)(model, x, y, ids=test.ids[rows], batch_size=CHUNK)
    print("done", flush=True)


def processes(folder: Path, n: int, repeats: int) -> dict[str, Any]:
    """Wall seconds of both ways, in turns."""
    command = [sys.executable, __file__, "--models", str(folder)]
    seconds: dict[str, list[float]] = {"one process, two threads": [], "two processes, one thread": []}
    half = n // 2
    for _ in range(repeats):
        for name, parts, threads in (
            ("one process, two threads", [(0, n)], 2),
            ("two processes, one thread", [(0, half), (half, n)], 1),
        ):
            environ = {**os.environ, "OMP_NUM_THREADS": str(threads)}
            jobs = [
                subprocess.Popen(
                    [*command, "--worker", str(a), str(b), str(threads)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    env=environ,
                )
                for a, b in parts
            ]
            for job in jobs:
                job.stdout.readline()  # type: ignore[union-attr]
            begun = time.perf_counter()
            for job in jobs:
                job.stdin.write("go\n")  # type: ignore[union-attr]
                job.stdin.flush()  # type: ignore[union-attr]
            for job in jobs:
                job.stdout.readline()  # type: ignore[union-attr]
            seconds[name].append(time.perf_counter() - begun)
            for job in jobs:
                job.communicate()
    one, two = (median(v) for v in seconds.values())
    print(f"two processes of one thread: x{one / two:.2f} the throughput of one process of two threads", flush=True)
    return {"n": n, "queries": 1000, "seconds": seconds, "throughput_ratio": one / two}


def memory(folder: Path) -> list[dict[str, Any]]:
    """Peak resident set for growing n, in processes of their own."""
    rows = []
    for n in (500, 2000, 8000):
        command = [sys.executable, __file__, "--models", str(folder), "--memory", str(n)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        rows.append({"n": n, "peak_mib": float(done.stdout.split()[-1])})
        print(f"memory, n = {n}: {rows[-1]['peak_mib']:.0f} MiB", flush=True)
    return rows


def remember(folder: Path, n: int) -> None:
    """Attack n samples (the test images again and again) chunk by chunk, keeping verdicts only."""
    torch.set_num_threads(1)
    test = load_dataset("mnist5k")["test"]
    model = load_model(str(folder)).module.eval()
    attack, verdicts = Standard(eps=EPS, steps=5, targets=2, queries=50), []
    for start in range(0, n, 500):
        rows = np.arange(start, start + 500) % len(test)
        found = attack(model, test.images(rows), torch.from_numpy(test.labels[rows]), batch_size=CHUNK)
        verdicts.append(found.broken)
    print(len(torch.cat(verdicts)), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--models", type=Path, default=Path("runs/benchmark-models"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/attacks/results"))
    parser.add_argument("--worker", type=int, nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--memory", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        start, stop, threads = options.worker
        worker(options.models, slice(start, stop), threads)
        return
    if options.memory:
        remember(options.models, options.memory)
        return
    folder = model_folder(options.models)
    report = {
        "environment": environment(),
        "pgd": pgd(folder, options.n, options.repeats),
        "processes": processes(folder, options.n, options.repeats),
        "memory": memory(folder),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "engine.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
