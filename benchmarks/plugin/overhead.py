"""What the pytest plugin costs a project that does not use it: `pytest --collect-only` with and without it, alternating.

    python benchmarks/plugin/overhead.py --pairs 20 --out benchmarks/plugin/results/overhead.json

Processor time of the child process counts, user and system together, since other programs may be running; wall time is given
beside it. Both orders occur equally often. The interval is that of the median difference (sign test, 95 %).
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LIMIT_MS = 30.0
TEST = "def test_{i}():\n    assert True\n"


def collect(folder: Path, *options: str) -> tuple[float, float]:
    """Processor and wall seconds of collecting the project's tests."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *options]
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return cpu, wall


def median_interval(values: list[float]) -> tuple[float, float]:
    """Order statistics around the median whose binomial probability is at least 95 %."""
    from scipy.stats import binom

    ordered, n = sorted(values), len(values)
    k = int(binom.ppf(0.025, n, 0.5))
    return ordered[max(0, k - 1)], ordered[min(n - 1, n - k)]


def main() -> None:
    """Measure, print, and write if asked to; exit status 1 where the cost is above the limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    differences, walls, without = [], [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "pytest.ini").write_text("[pytest]\n")
        (folder / "test_project.py").write_text("\n".join(TEST.format(i=i) for i in range(50)))
        off = ("-p", "no:robustness")
        collect(folder), collect(folder, *off)  # the first ones write bytecode
        for pair in range(options.pairs):
            if pair % 2:
                (b, wall_b), (a, wall_a) = collect(folder, *off), collect(folder)
            else:
                (a, wall_a), (b, wall_b) = collect(folder), collect(folder, *off)
            differences.append(1000 * (a - b))
            walls.append(1000 * (wall_a - wall_b))
            without.append(1000 * b)
    low, high = median_interval(differences)
    found = {
        "pairs": options.pairs,
        "without_ms": round(statistics.median(without), 1),
        "difference_ms": round(statistics.median(differences), 1),
        "difference_ms_interval": [round(low, 1), round(high, 1)],
        "ratio": round(1 + statistics.median(differences) / statistics.median(without), 4),
        "wall_difference_ms": round(statistics.median(walls), 1),
        "limit_ms": LIMIT_MS,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }
    print(json.dumps(found, indent=1))
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    sys.exit(found["difference_ms"] > LIMIT_MS)


if __name__ == "__main__":
    main()
