"""How often does a robustness test fail by mistake, and how often does it see a real drop?

    python benchmarks/plugin/false_alarms.py --out benchmarks/plugin/results

1. Simulated CI runs, each with n samples of its own: a model whose true robust accuracy is exactly the threshold (the worst
   case for false alarms), and a model retrained without gain or loss (some samples won, as many lost) against its baseline.
2. The same with a true drop: how many runs fail, how many are inconclusive.
3. The model of examples/ci, unchanged, attacked from other random starts in every run: real verdicts, against a threshold at
   its mean over all runs, and against the run of seed 0 as the baseline. The plugin itself refuses a baseline of another
   seed; here it is compared nevertheless, to see what the attack's randomness alone does.

Verdicts are those of the plugin (`robustbench_ext.gate.expectation`). About two minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from robustbench_ext.gate.expectation import judge_difference, judge_range
from robustbench_ext.metrics import paired
from robustbench_ext.metrics.intervals import proportion, wilson
from robustbench_ext.provenance import environment

EXAMPLE = Path(__file__).parents[2] / "examples" / "ci"
CHURN = 0.03  # of samples that a retraining wins, and as many that it loses


def threshold(right: np.ndarray, at: float) -> str:
    return judge_range(proportion(right), at, np.inf)[0]


def baseline(now: np.ndarray, before: np.ndarray, margin: float) -> str:
    return judge_difference(paired.compare_proportions(now, before), True, margin)[0]


def retrained(rng: np.random.Generator, n: int, accuracy: float, drop: float) -> tuple[np.ndarray, np.ndarray]:
    """(now, before): verdicts of the baseline, and of a model that loses `CHURN + drop` of all samples and wins `CHURN`."""
    u = rng.random(n)
    before = u < accuracy
    lost, won = u < CHURN + drop, u > 1 - CHURN
    return (before & ~lost) | won, before


def simulated(runs: int, n: int, accuracy: float, drop: float, seed: int = 0) -> dict[str, Counter[str]]:
    rng = np.random.default_rng(seed)
    found: dict[str, Counter[str]] = {"threshold": Counter(), "baseline": Counter(), "baseline, margin 0.02": Counter()}
    for _ in range(runs):
        now, before = retrained(rng, n, accuracy, drop)
        found["threshold"][threshold(rng.random(n) < accuracy - drop, accuracy)] += 1
        found["baseline"][baseline(now, before, 0.0)] += 1
        found["baseline, margin 0.02"][baseline(now, before, 0.02)] += 1
    return found


def real(runs: int, n: int) -> tuple[dict[str, Counter[str]], float]:
    """Verdicts of the example's model from other random starts, and their mean."""
    import torch

    from robustbench_ext.attacks import PGD

    sys.path.insert(0, str(EXAMPLE))
    from digitnet import build, split

    torch.set_num_threads(1)
    x, y = split()["test"]
    model, attack = build(), PGD(eps=0.1, steps=5)
    ids = np.arange(len(y)).astype(str)
    verdicts = np.stack([~attack(model, x[:n], y[:n], ids=ids[:n], seed=s).broken.numpy() for s in range(runs)])
    mean, found = float(verdicts.mean()), {"threshold": Counter(), "baseline": Counter()}
    for row in verdicts[1:]:
        found["threshold"][threshold(row, mean)] += 1
        found["baseline"][baseline(row, verdicts[0], 0.0)] += 1
    return found, mean


def line(what: str, counts: Counter[str]) -> str:
    total = sum(counts.values())
    low, high = wilson(counts["fail"], total)
    share = f"{100 * counts['fail'] / total:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
    return f"| {what} | {total} | {share} | {100 * counts['inconclusive'] / total:.1f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=300)
    parser.add_argument("--simulated", type=int, default=5000)
    parser.add_argument("--n", type=int, default=500)
    parser.add_argument("--accuracy", type=float, default=0.6)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/plugin/results"))
    options = parser.parse_args()
    n, accuracy = options.n, options.accuracy
    lines = ["| case | runs | failed, % [95 %] | inconclusive, % |", "| --- | ---: | ---: | ---: |"]
    content: dict[str, Any] = {"environment": environment(), "options": {k: str(v) for k, v in vars(options).items()}}
    for drop in (0.0, 0.02, 0.05, 0.08):
        what = "no change" if not drop else f"a drop of {100 * drop:g} points"
        for kind, counts in simulated(options.simulated, n, accuracy, drop).items():
            lines.append(line(f"simulated, n = {n}, {what}: {kind}", counts))
            content[f"{what}: {kind}"] = dict(counts)
    found, mean = real(options.runs + 1, n)
    for kind, counts in found.items():
        lines.append(line(f"examples/ci, PGD from other starts (mean {mean:.3f}), no change: {kind}", counts))
        content[f"examples/ci: {kind}"] = dict(counts)
    text = "\n".join(lines) + "\n"
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "false_alarms.md").write_text(text)
    (options.out / "false_alarms.json").write_text(json.dumps(content, indent=1))
    print(text)


if __name__ == "__main__":
    main()
