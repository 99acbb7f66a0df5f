"""Class-incremental run: a network that knows five digits of mnist5k, the other five added one by one, nothing retrained.

    python benchmarks/detectors/incremental.py --out benchmarks/detectors/results

The network is trained on classes 0 to 4 and then frozen; classifiers read its penultimate features. On every step a class is
added from its training samples alone:

    gaussian, paper      argmin_c d_c, covariance averaged over classes (Lee et al. 2018, algorithm 2)
    gaussian, weighted   the same, averaged over samples: equals the fit on all data
    ... shrunk           with a shrinkage of 0.01 instead of the pseudo-inverse
    euclidean            nearest class mean
    softmax, memory      a linear softmax layer, trained on the new class and on exemplars: (learned classes + 512) old images
    softmax, all data    the same with every old image kept: what nothing incremental can see

Written for every step: accuracy on the test samples of all classes so far, of the five first and of the added ones, with
Wilson's 95 % intervals, and over seeds their mean. About 20 seconds a seed on one core.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from defenses import Standard
from defenses.trainer import Architecture, Recipe, train
from detectors import IncrementalGaussian
from robustbench_ext.data import load_dataset
from robustbench_ext.data.base import ArraySplit, Dataset, Split
from robustbench_ext.metrics.intervals import proportion
from robustbench_ext.models import load_model, observe
from robustbench_ext.provenance import environment

BASE, MEMORY = 5, 512
TAP = "penultimate"


def known_classes(data: Dataset) -> Dataset:
    """The dataset with the first classes only."""

    def part(split: Split) -> Split:
        rows = np.flatnonzero(split.labels < BASE)
        return ArraySplit(split.images(rows), split.labels[rows], split.ids[rows])

    splits = {name: part(split) for name, split in data.splits.items()}
    return Dataset(f"{data.name}-first-{BASE}", splits, data.classes[:BASE], data.shape, data.source)


def softmax(features: np.ndarray, labels: np.ndarray) -> Any:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)).fit(features, labels)


def run(seed: int, folder: Path, epochs: int) -> list[dict[str, Any]]:
    data = load_dataset("mnist5k")
    recipe = Recipe(epochs=epochs, eps=0.1, validation_n=100, validation_steps=1)
    out = folder / f"seed-{seed}"
    if not (out / "model.json").is_file():
        train(Standard(), Architecture("small-cnn", data.shape, BASE), known_classes(data), recipe, out, seed)
    model = load_model(str(out)).module

    def features(split: Split) -> tuple[Tensor, Tensor]:
        y = torch.from_numpy(split.labels)
        return observe(model, split.images(slice(None)), torch.zeros_like(y), (TAP,)).features[TAP].double(), y

    (f, y), (x, labels) = features(data["train"]), features(data["test"])
    gaussians = {
        "gaussian, paper": IncrementalGaussian("paper"),
        "gaussian, weighted": IncrementalGaussian("weighted"),
        "gaussian, paper, shrunk": IncrementalGaussian("paper", "shrinkage", 0.01),
        "gaussian, weighted, shrunk": IncrementalGaussian("weighted", "shrinkage", 0.01),
    }
    rng = np.random.Generator(np.random.Philox(seed))
    memory = np.empty(0, dtype=np.int64)
    rows = []
    for label in range(len(data.classes)):
        new = np.flatnonzero((y == label).numpy())
        for gaussian in gaussians.values():
            gaussian.add_class(label, f[new])
        if label + 1 < BASE:
            memory = np.concatenate([memory, new])
            continue
        learned = label + 1
        seen = np.flatnonzero((labels < learned).numpy())
        predictions = {name: g.predict(x[seen]).numpy() for name, g in gaussians.items()}
        means = torch.stack([f[y == c].mean(0) for c in range(learned)])
        predictions["euclidean"] = torch.cdist(x[seen], means).argmin(1).numpy()
        if learned > BASE:
            # The old images that are kept: as many of each class, by chance.
            budget = learned - 1 + MEMORY
            kept = [
                rng.permutation(memory[y[memory].numpy() == c])[: budget // (learned - 1)] for c in range(learned - 1)
            ]
            memory = np.concatenate(kept)
        memory = np.concatenate([memory, new])
        everything = np.flatnonzero((y < learned).numpy())
        for name, rows_kept in (("softmax, memory", memory), ("softmax, all data", everything)):
            predictions[name] = softmax(f[rows_kept].numpy(), y[rows_kept].numpy()).predict(x[seen].numpy())
        target = labels[seen].numpy()
        for name, predicted in predictions.items():
            right = predicted == target
            found = {"all": right, "base": right[target < BASE], "added": right[target >= BASE]}
            row: dict[str, Any] = {"seed": seed, "classes": learned, "classifier": name}
            for group, hits in found.items():
                e = proportion(hits) if len(hits) else None
                row[group] = None if e is None else [e.value, e.ci_low, e.ci_high, e.n]
            rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    steps = sorted({r["classes"] for r in rows})
    names = list(dict.fromkeys(r["classifier"] for r in rows))
    head = ["classifier", *(f"{s} classes" for s in steps), f"first {BASE} at the end", "added at the end"]
    lines = [f"| {' | '.join(head)} |", "| --- |" + " ---: |" * (len(head) - 1)]

    def mean(name: str, step: int, group: str) -> str:
        values = [r[group][0] for r in rows if r["classifier"] == name and r["classes"] == step and r[group]]
        return f"{100 * np.mean(values):.1f}" + (f" ± {100 * np.std(values, ddof=1):.1f}" if len(values) > 1 else "")

    for name in names:
        cells = [
            name,
            *(mean(name, s, "all") for s in steps),
            mean(name, steps[-1], "base"),
            mean(name, steps[-1], "added"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--models", type=Path, default=Path("runs/detectors-incremental"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/detectors/results"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row for seed in range(options.seeds) for row in run(seed, options.models, options.epochs)]
    print(table(rows))
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "incremental.json").write_text(
        json.dumps({"environment": environment(), "rows": rows}, indent=1) + "\n"
    )
    (options.out / "incremental.md").write_text(table(rows))


if __name__ == "__main__":
    main()
