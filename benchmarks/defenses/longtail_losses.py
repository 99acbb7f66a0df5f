"""Class-prior losses and corrections on a long-tailed data set, clean and adversarially trained, three seeds.

    python benchmarks/defenses/longtail_losses.py standard
    python benchmarks/defenses/longtail_losses.py pgd-at

mnist5k@exp:100: 740 training images, 300 of class 0 down to 3 of class 9; groups of classes by the survey's thresholds
(more than 100, 20 to 100, fewer than 20 training images). Balanced counterparts for relative accuracies: 740 images, 74 a
class. One recipe for all methods of a base; nothing was tuned but the learning rate of pgd-at, for CE (0.1 instead of 0.05,
on the calibration split, seed 9). Every model keeps its best epoch on the calibration split, which is balanced and larger
than the training data: real life may not have it. The run is an ordinary suite: interrupted, it goes on when the command is
given again.

Written: one row a method, base and metric: mean over seeds with a 95 % t-interval over seeds, and each seed's value with its
interval over test samples.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from reports import write_reports
from robustbench_ext.engine import Progress, run_suite
from robustbench_ext.metrics.intervals import seed_spread
from robustbench_ext.provenance import environment
from robustbench_ext.results import RunResults

SEEDS = (0, 1, 2)
DATA, BALANCED = "mnist5k@exp:100", "mnist5k@balanced:exp:100"
N, EPS = 500, 0.1
WORST = f"worst case Linf {EPS}"
_COMMON = {"eps": EPS, "attack_steps": 5, "validation_n": 300, "validation_steps": 5, "energy_n": 0}
RECIPES: dict[str, dict[str, Any]] = {
    "standard": {"epochs": 20, "lr": 0.05, **_COMMON},
    "pgd-at": {"epochs": 24, "lr": 0.1, **_COMMON},
}
ATTACKS = [
    {"attack": "pgd", "eps": EPS, "steps": 20, "stop": "never"},
    {"attack": "apgd-t", "eps": EPS, "steps": 5},
]
LOSSES = {
    "CE": {"method": "ce"},
    "effective number": {"method": "effective-number"},
    "balanced softmax": {"method": "balanced-softmax"},
    "LDAM-DRW": {"method": "ldam"},
}
MAKERS = {"CE + logit adjustment": "logit-adjust", "CE + weight aligning": "weight-align"}
RELATIVE = ("CE", "balanced softmax", "CE + logit adjustment")  # the last one's method on balanced data is CE itself
SHOTS = {"many": "many_shot_accuracy", "medium": "medium_shot_accuracy", "few": "few_shot_accuracy"}


def label(method: str, base: str, seed: int, balanced: bool = False) -> str:
    return f"{method}, {base}{', balanced' if balanced else ''} #{seed}"


def suite(base: str) -> dict[str, Any]:
    models: list[dict[str, Any]] = []
    relative = []
    for seed in SEEDS:
        for method, told in LOSSES.items():
            train: dict[str, Any] = {
                "defense": {"name": "class-prior", "base": base, **told},
                "recipe": RECIPES[base],
                "seed": seed,
            }
            if method == "LDAM-DRW":
                train["kwargs"] = {"cosine_head": True}
            models.append({"name": label(method, base, seed), "train": train})
            if method in RELATIVE:
                models.append({"name": label(method, base, seed, True), "train": {**train, "data": BALANCED}})
        for method, maker in MAKERS.items():
            models.append({"name": label(method, base, seed), "make": {"name": maker, "of": [label("CE", base, seed)]}})
        plain = label("CE", base, seed, True)
        for method in RELATIVE:
            same = label(method, base, seed, True) if method in LOSSES else plain
            relative.append({"model": label(method, base, seed), "plain": plain, "same": same})
    return {
        "schema": 1,
        "name": f"longtail-losses-{base}",
        "title": f"Class-prior losses on {DATA}, {base}",
        "data": DATA,
        "n": N,
        "models": models,
        "relative": relative,
        # Standard training is not meant to resist, and is judged clean.
        "conditions": ["clean", *(ATTACKS if base == "pgd-at" else [])],
    }


def wanted() -> dict[str, tuple[str, str]]:
    """Title: condition and metric."""
    found = {"clean": ("clean", "accuracy")} | {f"clean, {k}": ("clean", m) for k, m in SHOTS.items()}
    found |= {"robust": (WORST, "robust_accuracy")} | {f"robust, {k}": (WORST, m) for k, m in SHOTS.items()}
    found |= {"harmonic": ("clean", "harmonic_accuracy"), "worst class": ("clean", "worst_class_accuracy")}
    found |= {"relative": ("clean", "relative_accuracy"), "robust relative": (WORST, "robust_relative_accuracy")}
    return found


def value_of(results: RunResults, model: str, condition: str, metric: str) -> dict[str, Any] | None:
    rows = results.find(model=model, condition=condition, metric=metric, probe="classifier")
    rows = [row for row in rows if row.group is None or metric not in ("accuracy", "robust_accuracy")]
    if not rows or rows[0].value is None:
        return None
    return {"value": rows[0].value, "low": rows[0].ci_low, "high": rows[0].ci_high, "n": rows[0].n}


def summarise(results: RunResults, base: str) -> list[dict[str, Any]]:
    rows = []
    for method in (*LOSSES, *MAKERS, *(f"{name}, balanced data" for name in RELATIVE if name in LOSSES)):
        plain = method.removesuffix(", balanced data")
        for title, place in wanted().items():
            names = [label(plain, base, seed, plain != method) for seed in SEEDS]
            found = [f for name in names if (f := value_of(results, name, *place)) is not None]
            if len(found) == len(SEEDS):
                spread = seed_spread(np.array([f["value"] for f in found]))
                mean = {"mean": spread.value, "low": spread.ci_low, "high": spread.ci_high}
                rows.append({"method": method, "metric": title, **mean, "each": found})
    return rows


def markdown(rows: list[dict[str, Any]], base: str, hardware: dict[str, Any]) -> str:
    attack = f" Robust: worst case of PGD-20 and targeted APGD-5 at Linf {EPS}." if base == "pgd-at" else ""
    lines = [
        f"{DATA}, {base}, small-cnn, n = {N} test images, {len(SEEDS)} seeds; mean over seeds [95 % t-interval over seeds], "
        f"percent.{attack} {hardware.get('processor')}, {hardware.get('cores')} cores.",
    ]
    for titles in (
        ("clean", "clean, many", "clean, medium", "clean, few", "harmonic", "worst class", "relative"),
        ("robust", "robust, many", "robust, medium", "robust, few", "robust relative"),
    ):
        if not any(row["metric"] == titles[0] for row in rows):
            continue
        lines += ["", "| method | " + " | ".join(titles) + " |", "| --- |" + " ---: |" * len(titles)]
        for method in dict.fromkeys(row["method"] for row in rows):
            by_title = {row["metric"]: row for row in rows if row["method"] == method}
            cells = [
                f"{100 * r['mean']:.1f} [{100 * r['low']:.1f}, {100 * r['high']:.1f}]" if r is not None else "–"
                for r in (by_title.get(title) for title in titles)
            ]
            lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", choices=list(RECIPES))
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/defenses/results"))
    options = parser.parse_args()
    base, name = options.base, f"longtail-losses-{options.base}"
    summary = run_suite(
        suite(base),
        options.runs / name,
        executor="serial",
        progress=Progress(line=lambda i, total, what, facts: print(f"[{i}/{total}] {what}", flush=True)),
    )
    write_reports(options.runs / name)
    rows, found = summarise(summary.results, base), environment()
    options.out.mkdir(parents=True, exist_ok=True)
    report = {"data": DATA, "base": base, "n": N, "seeds": SEEDS, "eps": EPS, "environment": found, "rows": rows}
    (options.out / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    text = markdown(rows, base, found["hardware"])  # type: ignore[arg-type]
    (options.out / f"{name}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
