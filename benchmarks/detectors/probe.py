"""How many samples does a probe of frozen features need: naive Bayes against logistic regression, clean, corrupted, attacked.

    python benchmarks/detectors/probe.py --out benchmarks/detectors/results

Penultimate features (64) of two small CNNs on mnist5k: one that was trained on all ten digits, whose features separate them
by design, and one that knows 0 to 4 only, so that the probes have to do with features that were made for something else. Both
probes are fitted to 20 to all training samples (five draws of each size, the same for both) and asked about

    clean        the test images
    noise        Gaussian noise, severity 3 (of ImageNet-C)
    attacked     the first 500 of them, APGD-DLR, Linf 0.1, 50 steps, against the network with this very probe in the place of
                 its last layer; DLR since the logits of naive Bayes are so large that cross-entropy is flat

Written are mean accuracies over draws with their standard deviations, and where logistic regression overtakes: of the means,
and of single draws from the first to the last. About three minutes on one core.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from defenses import Standard
from defenses.trainer import Architecture, Recipe, train
from detectors.head import Head
from detectors.probe_curve import LOGISTIC, NAIVE_BAYES, probe_curves
from robustbench_ext.attacks import build_attack
from robustbench_ext.data import load_dataset
from robustbench_ext.data.base import ArraySplit, Dataset, Split
from robustbench_ext.data.corruptions import gaussian_noise
from robustbench_ext.models import load_model, observe
from robustbench_ext.provenance import environment
from robustbench_ext.randomness import SampleRandom

TAP = "penultimate"
SIZES = (20, 50, 100, 200, 500, 1000, 2000)
EPS, ATTACKED = 0.1, 500


def first_classes(data: Dataset, count: int) -> Dataset:
    """The dataset with the first classes only."""

    def part(split: Split) -> Split:
        rows = np.flatnonzero(split.labels < count)
        return ArraySplit(split.images(rows), split.labels[rows], split.ids[rows])

    splits = {name: part(split) for name, split in data.splits.items()}
    return Dataset(f"{data.name}-first-{count}", splits, data.classes[:count], data.shape, data.source)


def features(model: nn.Module, x: Tensor) -> Tensor:
    return observe(model, x, torch.zeros(len(x), dtype=torch.int64), (TAP,)).features[TAP].double()


def with_head(model: nn.Module, head: Head) -> nn.Module:
    """The network with another last layer."""
    changed = copy.deepcopy(model)
    layer = nn.Linear(head.weight.shape[1], head.weight.shape[0])
    layer.load_state_dict({"weight": head.weight.float(), "bias": head.bias.float()})
    changed.fc2 = layer
    return changed.eval()


def run(known: int, folder: Path, epochs: int, repeats: int) -> dict[str, Any]:
    data = load_dataset("mnist5k")
    out = folder / f"known-{known}"
    if not (out / "model.json").is_file():
        recipe = Recipe(epochs=epochs, eps=0.1, validation_n=100, validation_steps=1)
        train(Standard(), Architecture("small-cnn", data.shape, known), first_classes(data, known), recipe, out, 0)
    model = load_model(str(out)).module.eval()
    x, y = data["train"].images(slice(None)), torch.from_numpy(data["train"].labels)
    test = data["test"]
    clean, labels = test.images(slice(None)), torch.from_numpy(test.labels)
    f = features(model, x)
    noisy = gaussian_noise(clean, 3, SampleRandom.of(0, test.ids, "probe"), "imagenet-c")
    attack = build_attack("apgd-dlr", eps=EPS, steps=50)

    def attacked(head: Head) -> tuple[Tensor, Tensor]:
        """Features of inputs that were made against this probe."""
        some = slice(0, ATTACKED)
        found = attack(with_head(model, head), clean[some], labels[some], ids=test.ids[some])
        return features(model, found.x_adv), labels[some]

    seen = {name: (features(model, images), labels) for name, images in (("clean", clean), ("noise", noisy))}
    tests: dict[str, Any] = {**seen, "attacked": attacked}
    sizes = [*SIZES, len(y)]
    curves = probe_curves(f, y, tests, sizes, repeats)
    return {
        "known": known,
        "sizes": list(curves.sizes),
        "n": len(labels),
        "accuracy": {p: {t: rows.tolist() for t, rows in by.items()} for p, by in curves.accuracy.items()},
        "crossing": {t: _told(curves.crossing(t)) for t in tests},
        "crossings": {t: [_told(c) for c in curves.crossings(t)] for t in tests},
    }


def _told(value: float) -> float | str:
    return "never" if math.isinf(value) else value


def table(found: list[dict[str, Any]]) -> str:
    lines = []
    for one in found:
        tests = list(one["crossing"])
        what = f"accuracy in % of {one['n']} test images ({ATTACKED} attacked), NB / LR"
        lines += [f"Network that knows {one['known']} digits; {what}", ""]
        lines += ["| training samples | " + " | ".join(tests) + " |", "| ---: |" + " ---: |" * len(tests)]
        for row, size in enumerate(one["sizes"]):
            cells = []
            for test in tests:
                rows = [100 * np.array(one["accuracy"][p][test][row]) for p in (NAIVE_BAYES, LOGISTIC)]
                cells.append(" / ".join(f"{r.mean():.1f} ± {r.std(ddof=1):.1f}" for r in rows))
            lines.append(f"| {size} | " + " | ".join(cells) + " |")
        crossing = [f"{_number(one['crossing'][t])} ({_range(one['crossings'][t])})" for t in tests]
        lines += ["| **LR ahead from** (single draws) | " + " | ".join(crossing) + " |", ""]
    return "\n".join(lines)


def _number(value: float | str) -> str:
    return value if isinstance(value, str) else "the first" if value == 0 else f"{value:.0f}"


def _range(values: list[float | str]) -> str:
    ordered = sorted(values, key=lambda v: math.inf if isinstance(v, str) else v)
    return f"{_number(ordered[0])} to {_number(ordered[-1])}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--models", type=Path, default=Path("runs/detectors-probe"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/detectors/results"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = [run(known, options.models, options.epochs, options.repeats) for known in (10, 5)]
    print(table(found))
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "probe.json").write_text(json.dumps({"environment": environment(), "found": found}, indent=1) + "\n")
    (options.out / "probe.md").write_text(table(found))


if __name__ == "__main__":
    main()
