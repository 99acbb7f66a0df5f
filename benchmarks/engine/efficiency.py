"""What two worker processes gain over one: `rbx run standard` on 1,000 samples, serial and local, on the same trained models.

    python benchmarks/engine/efficiency.py --out benchmarks/engine/results/efficiency.json

Wall time of the whole command counts, with start, preflight, results and report. The ideal of k workers is a k-th of the serial
time. Serial runs first and last, so that a machine that gets slower or faster meanwhile shows. Nothing else may run beside it;
the load before the start is written down. Training is left out: models train side by side, and one alone cannot be shared out.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from robustbench_ext.files import write_atomically


def rbx(*arguments: str) -> float:
    """Wall seconds of a command."""
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "robustbench_ext.cli.main", "run", *arguments], check=False)
    if done.returncode not in (0, 1):  # 1: a check of a model failed, which costs nothing
        sys.exit(done.returncode)
    return time.perf_counter() - began


def main() -> None:
    """Measure, print, and write if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", default="standard")
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        few = [options.suite, "--set", "n=10", "--set", "conditions=[]", "--set", "detectors=[]", "--set", "uq=[]"]
        rbx(*few, "--out", str(root / "trained"), "--executor", "local", "--workers", str(options.workers))
        seconds: dict[str, list[float]] = {"serial": [], "local": []}
        for i, executor in enumerate(("serial", "local", "serial")):
            folder = root / f"{executor}-{i}"
            shutil.copytree(root / "trained" / "models", folder / "models")
            how = [options.suite, "--set", f"n={options.n}", "--out", str(folder), "--executor", executor]
            seconds[executor].append(rbx(*how, *(["--workers", str(options.workers)] if executor == "local" else [])))
        same = (root / "serial-0/results.json").read_bytes() == (root / "local-1/results.json").read_bytes()
    serial = sum(seconds["serial"]) / len(seconds["serial"])
    found = {
        "suite": options.suite,
        "n": options.n,
        "workers": options.workers,
        "seconds": {executor: [round(s, 1) for s in each] for executor, each in seconds.items()},
        "efficiency": round(serial / (options.workers * seconds["local"][0]), 3),
        "same_results": same,
        "load_before": load,
        "machine": f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}, torch {torch.__version__}, CPU",
    }
    print(json.dumps(found, indent=1))
    if options.out:
        text = json.dumps(found, indent=1) + "\n"
        write_atomically(options.out, lambda file: file.write_text(text, encoding="utf-8"))


if __name__ == "__main__":
    main()
