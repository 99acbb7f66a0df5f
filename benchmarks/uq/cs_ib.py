"""CS-IB against least squares on small tables: RMSE clean and attacked, for several weights of the bottleneck.

    python benchmarks/uq/cs_ib.py
    python benchmarks/uq/cs_ib.py --tables bayes-linear:known-noise     # any other regression data that is bundled

autompg, diabetes (packaged with mlxtend and scikit-learn) and friedman (synthetic), three seeds, the published network (four
hidden layers of 128) and batches of 128 for all, the epoch of least held-out squared error. `wide`: the bandwidth of the inputs
is sqrt(d) instead of the published 1, so that samples have neighbours. Attacked: every number within eps standard deviations of
the training column, in the box of the training range widened by a tenth, by one step of the sign of the gradient (FGSM) and by
20 steps with a restart (PGD), up and down. Runs are ordinary suites; interrupted, they go on.

Written: one row for each table, model and condition: mean RMSE over seeds with a 95 % t-interval, and the mean of the ratios to
least squares of the same seed.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t as student

from robustbench_ext.data import load_dataset
from robustbench_ext.engine import Progress, run_suite
from robustbench_ext.provenance import environment
from robustbench_ext.results import RunResults

SEEDS = (0, 1, 2)
TABLES = ("autompg", "diabetes", "friedman")
BETAS = (0.0, 1e-3, 1e-2, 1e-1)
EPS = (0.1, 0.3)
BASE = "least squares"
RECIPE = {"epochs": 200, "batch_size": 128, "lr": 1e-3, "patience": 40, "weight_decay": 0}
NETWORK = {"hidden": [128, 128, 128, 128]}
CONDITIONS = [
    *({"attack": "pgd", "eps": e, "steps": 1, "restarts": 1, "label": f"FGSM {e}"} for e in EPS),
    *({"attack": "pgd", "eps": e, "label": f"PGD {e}"} for e in EPS),
]
SHOWN = ("clean", *(str(c["label"]) for c in CONDITIONS))


def methods(table: str) -> dict[str, dict[str, Any] | None]:
    """label: the defense, None for least squares."""
    wide = math.sqrt(load_dataset(table).shape[0])
    published = {f"cs-ib, beta {b:g}": {"name": "cs-ib", "beta": b} for b in BETAS}
    return {BASE: None, **published, "cs-ib, beta 0.01, wide": {"name": "cs-ib", "beta": 1e-2, "sigma_x": wide}}


def suite(table: str) -> dict[str, Any]:
    models = []
    for label, defense in methods(table).items():
        for seed in SEEDS:
            train = {"recipe": RECIPE, "kwargs": NETWORK, "seed": seed}
            models.append({"name": f"{label} #{seed}", "train": train | ({"defense": defense} if defense else {})})
    said = {"schema": 1, "name": f"cs-ib-{table}", "title": f"CS-IB, {table}", "data": table}
    return {**said, "models": models, "conditions": CONDITIONS}


def over_seeds(values: np.ndarray) -> dict[str, Any]:
    half = float(student.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5)
    mean = float(values.mean())
    return {"mean": mean, "low": mean - half, "high": mean + half, "each": [float(v) for v in values]}


def summarise(table: str, results: RunResults) -> list[dict[str, Any]]:
    def values(label: str, condition: str) -> np.ndarray:
        rows = [
            results.find(model=f"{label} #{s}", condition=condition, metric="rmse", probe="regressor", group=None)[0]
            for s in SEEDS
        ]
        return np.array([row.value for row in rows], dtype=np.float64)

    found = []
    for label in methods(table):
        for condition in SHOWN:
            mine, base = values(label, condition), values(BASE, condition)
            place = {"table": table, "model": label, "condition": condition, "n": results.suite["n"]}
            found.append({**place, **over_seeds(mine), "ratio": over_seeds(mine / base)})
    return found


def markdown(rows: list[dict[str, Any]], hardware: dict[str, Any]) -> str:
    lines = [
        f"RMSE, mean over {len(SEEDS)} seeds [95 % t-interval over seeds]; below it the ratio to least squares of the same "
        f"seed. {hardware.get('processor')}, {hardware.get('cores')} cores."
    ]
    for table in dict.fromkeys(row["table"] for row in rows):
        mine = [row for row in rows if row["table"] == table]
        lines += ["", f"### {table}, {mine[0]['n']} test rows", "", "| model | " + " | ".join(SHOWN) + " |"]
        lines.append("| --- |" + " ---: |" * len(SHOWN))
        for label in dict.fromkeys(row["model"] for row in mine):
            cells = []
            for condition in SHOWN:
                row = next(r for r in mine if (r["model"], r["condition"]) == (label, condition))
                ratio = row["ratio"]
                text = f"{row['mean']:.3g} [{row['low']:.3g}, {row['high']:.3g}]"
                if label != BASE:
                    text += f"<br>{ratio['mean']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]"
                cells.append(text)
            lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", nargs="+", default=list(TABLES))
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/uq/results"))
    options = parser.parse_args()
    progress = Progress(line=lambda i, total, what, facts: print(f"[{i}/{total}] {what}", flush=True))
    rows = []
    for table in options.tables:
        results = run_suite(suite(table), options.runs / f"cs-ib-{table}".replace(":", "-"), progress=progress).results
        rows += summarise(table, results)
    found = environment()
    options.out.mkdir(parents=True, exist_ok=True)
    report = {"seeds": SEEDS, "recipe": RECIPE, "network": NETWORK, "environment": found, "rows": rows}
    (options.out / "cs-ib.json").write_text(json.dumps(report, indent=1) + "\n")
    text = markdown(rows, found["hardware"])
    (options.out / "cs-ib.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
