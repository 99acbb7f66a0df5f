"""What `import robustbench_ext` and the first words of `rbx` cost, beside a bare interpreter, alternating in one run.

    python benchmarks/install/import_time.py --repeats 20 --out benchmarks/install/results/import_time.json

Processor time of the child process counts, user and system together, since other programs may be running; wall time is given
beside it. Every command starts an interpreter of its own, and every ratio is to the bare interpreter of the same round.
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

LIMIT_MS = 50.0
RBX = "import sys; sys.argv = ['rbx', *{arguments!r}]; from robustbench_ext.cli.main import run; run()"
COMMANDS = {
    "python -c pass": "pass",
    "import robustbench_ext": "import robustbench_ext",
    "rbx --help": RBX.format(arguments=["--help"]),
    "rbx list": RBX.format(arguments=["list"]),
    "import torch": "import torch",
}


def start(code: str, folder: str) -> tuple[float, float]:
    """Processor and wall milliseconds of a new interpreter that runs `code`."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return 1000 * cpu, 1000 * wall


def main() -> None:
    """Measure, print, and write if asked to; exit status 1 where importing the package costs more than the limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    cpu: dict[str, list[float]] = {name: [] for name in COMMANDS}
    wall: dict[str, list[float]] = {name: [] for name in COMMANDS}
    with tempfile.TemporaryDirectory() as folder:
        for code in COMMANDS.values():
            start(code, folder)  # the first ones write bytecode and fill the disk's cache
        for _ in range(options.repeats):
            for name, code in COMMANDS.items():
                spent = start(code, folder)
                cpu[name].append(spent[0])
                wall[name].append(spent[1])
    bare, ours = cpu["python -c pass"], cpu["import robustbench_ext"]
    added = statistics.median(a - b for a, b in zip(ours, bare, strict=True))
    found = {
        "repeats": options.repeats,
        "commands": {
            name: {
                "cpu_ms": round(statistics.median(cpu[name]), 1),
                "wall_ms": round(statistics.median(wall[name]), 1),
                "ratio_to_bare": round(statistics.median(a / b for a, b in zip(cpu[name], bare, strict=True)), 2),
            }
            for name in COMMANDS
        },
        "import_adds_ms": round(added, 1),
        "limit_ms": LIMIT_MS,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
    }
    for name, row in found["commands"].items():
        print(
            f"{name:<24} {row['cpu_ms']:>8.1f} ms processor {row['wall_ms']:>8.1f} ms wall {row['ratio_to_bare']:>7.2f} x"
        )
    print(f"import robustbench_ext adds {added:.1f} ms to a bare interpreter (limit {LIMIT_MS:.0f} ms)")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    sys.exit(added > LIMIT_MS)


if __name__ == "__main__":
    main()
