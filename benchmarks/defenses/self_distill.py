"""Self-distillation step by step on small real data: accuracy, calibration, robust accuracy, with three weights of the labels.

    python benchmarks/defenses/self_distill.py
    python benchmarks/defenses/self_distill.py --tune     # the learning rate, on the calibration split with another seed

mnist5k (3,000 training images), small CNN, the recipe mnist5k-small-cnn, three seeds, two steps behind the first. alpha is the
weight of the labels: 0 (the teacher alone), 0.6 (published), and what `best_alpha` says of the step with alpha = 0, on the
calibration split, for each seed. `standard` is cross-entropy with its own recipe. Nothing here is adversarially trained, so the
budgets of PGD are small. The run is an ordinary suite; interrupted, it goes on when the command is given again.

Written: one row for each model and metric, mean over seeds with a 95 % t-interval, and the difference to the first step, paired
by seed.
"""

from __future__ import annotations

import argparse
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import t as student

from defenses.self_distill import best_alpha
from robustbench_ext.data import load_dataset
from robustbench_ext.engine import Progress, run_suite
from robustbench_ext.models import load_model
from robustbench_ext.provenance import environment
from robustbench_ext.results import RunResults

SEEDS, TUNING_SEED = (0, 1, 2), 9
ALPHAS = (0.0, 0.6)
N = 1000
LINF = (0.05, 0.1)
CONDITIONS = [{"attack": "pgd", "eps": list(LINF), "steps": 20, "restarts": 2}]
PRESET = "mnist5k-small-cnn"
# Whatever is measured after an epoch but clean accuracy chooses nothing here.
FAST = {"validation_n": 10, "validation_steps": 1, "energy_n": 0}
METRICS = {
    "clean, %": ("clean", "accuracy", 100),
    "ECE, %": ("clean", "ece", 100),
    "NLL": ("clean", "nll", 1),
    "Brier": ("clean", "brier", 1),
    **{f"PGD {eps}, %": (f"pgd Linf {eps}", "robust_accuracy", 100) for eps in LINF},
}


def training(seed: int, **options: Any) -> dict[str, Any]:
    return {"defense": {"name": "self-distill", **options}, "recipe": {"name": PRESET, **FAST}, "seed": seed}


def chain(label: str, seed: int, alpha: float) -> list[dict[str, Any]]:
    """Two steps behind the first."""
    names = [f"first #{seed}", f"{label}, step 2 #{seed}", f"{label}, step 3 #{seed}"]
    return [{"name": name, "train": training(seed, alpha=alpha, teacher=teacher)} for teacher, name in pairwise(names)]


def suite(best: dict[int, float]) -> dict[str, Any]:
    """Everything, but for the chains of the best alpha where that is not known yet."""
    models: list[dict[str, Any]] = []
    for seed in SEEDS:
        standard = {"defense": "standard", "recipe": {"name": PRESET, **FAST}, "seed": seed}
        models += [
            {"name": f"standard #{seed}", "train": standard},
            {"name": f"first #{seed}", "train": training(seed)},
        ]
        for alpha in ALPHAS:
            models += chain(f"alpha {alpha:g}", seed, alpha)
        if seed in best:
            models += chain("alpha*", seed, best[seed])
    said = {"schema": 1, "name": "self-distill", "title": "Self-distillation, step by step", "data": "mnist5k", "n": N}
    return {**said, "models": models, "conditions": CONDITIONS}


def probabilities(folder: Path) -> np.ndarray:
    """Of the calibration split."""
    split = load_dataset("mnist5k")["calibration"]
    with torch.no_grad():
        return load_model(str(folder)).module.eval()(split.images(slice(None))).softmax(1).double().numpy()


def estimate(folder: Path) -> dict[int, float]:
    """best_alpha of every seed, not clipped, from the first step and the step behind it that has no labels."""
    labels = load_dataset("mnist5k")["calibration"].labels
    found: dict[tuple[int, bool], Path] = {}
    keys: dict[str, int] = {}
    for file in (folder / "models").glob("*/model.json"):
        told = json.loads(file.read_text(encoding="utf-8"))
        if told["defense"]["defense"] == "self-distill" and told["defense"]["teacher"] is None:
            found[told["seed"], False] = file.parent
            keys[told["key"]] = told["seed"]
    for file in (folder / "models").glob("*/model.json"):
        told = json.loads(file.read_text(encoding="utf-8"))["defense"]
        if told.get("alpha") == 0 and told["teacher"] in keys:
            found[keys[told["teacher"]], True] = file.parent
    onehot = np.eye(10)[labels]
    return {
        s: best_alpha(onehot, probabilities(found[s, True]), probabilities(found[s, False]), clip=False) for s in SEEDS
    }


def over_seeds(values: np.ndarray) -> dict[str, Any]:
    half = float(student.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5)
    mean = float(values.mean())
    return {"mean": mean, "low": mean - half, "high": mean + half, "each": [float(v) for v in values]}


def summarise(results: RunResults) -> list[dict[str, Any]]:
    labels = list(dict.fromkeys(str(m["name"]).rpartition(" #")[0] for m in results.models))

    def values(label: str, condition: str, metric: str) -> np.ndarray:
        found = [
            results.find(model=f"{label} #{s}", condition=condition, metric=metric, probe="classifier", group=None)[0]
            for s in SEEDS
        ]
        return np.array([row.value for row in found], dtype=np.float64)

    rows = []
    for label in labels:
        for title, (condition, metric, scale) in METRICS.items():
            mine, first = (scale * values(name, condition, metric) for name in (label, "first"))
            rows.append({"model": label, "metric": title, **over_seeds(mine), "to first": over_seeds(mine - first)})
    return rows


def markdown(rows: list[dict[str, Any]], best: dict[int, float], hardware: dict[str, Any]) -> str:
    titles = list(METRICS)
    alphas = ", ".join(f"{a:.2f}" for a in best.values())
    lines = [
        f"n = {N} test images, {len(SEEDS)} seeds; mean over seeds [95 % t-interval over seeds]. alpha*, unclipped: {alphas}. "
        f"{hardware.get('processor')}, {hardware.get('cores')} cores.",
    ]
    for what, place in (("", None), ("Differences to the first step, paired by seed", "to first")):
        lines += ["", *([what, ""] if what else []), "| model | " + " | ".join(titles) + " |"]
        lines.append("| --- |" + " ---: |" * len(titles))
        for label in dict.fromkeys(row["model"] for row in rows):
            cells = []
            for title in titles:
                row = next(r for r in rows if (r["model"], r["metric"]) == (label, title))
                shown, digits = row if place is None else row[place], 2 if "%" in title else 4
                cells.append(f"{shown['mean']:.{digits}f} [{shown['low']:.{digits}f}, {shown['high']:.{digits}f}]")
            if place is None or label != "first":
                lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def tune(runs: Path) -> None:
    """Accuracy on the calibration split of the first step, by optimizer and rate."""
    for options in (
        *({"optimizer": "adamw", "lr": lr, "weight_decay": 1e-4} for lr in (5e-4, 1e-3, 2e-3, 5e-3)),
        *({"optimizer": "sgd", "lr": lr, "weight_decay": 5e-4} for lr in (0.2, 1.0)),
    ):
        told = training(TUNING_SEED)
        told["recipe"] |= options
        one = {"name": "tune", "data": "mnist5k", "n": 10, "models": [{"name": "first", "train": told}]}
        curve = run_suite(one, runs / "self-distill-tuning").results.models[0]["training"]["curve"]
        print(options, f"{max(row['clean_accuracy'] for row in curve):.4f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/defenses/results"))
    options = parser.parse_args()
    if options.tune:
        tune(options.runs)
        return
    progress = Progress(line=lambda i, total, what, facts: print(f"[{i}/{total}] {what}", flush=True))
    folder = options.runs / "self-distill"
    run_suite(suite({}), folder, progress=progress)
    best = estimate(folder)
    clipped = {seed: round(min(1.0, max(0.0, alpha)), 4) for seed, alpha in best.items()}
    results = run_suite(suite(clipped), folder, progress=progress).results
    rows, found = summarise(results), environment()
    options.out.mkdir(parents=True, exist_ok=True)
    report = {"n": N, "seeds": SEEDS, "alpha*": best, "environment": found, "rows": rows}
    (options.out / "self-distill.json").write_text(json.dumps(report, indent=1) + "\n")
    text = markdown(rows, best, found["hardware"])
    (options.out / "self-distill.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
