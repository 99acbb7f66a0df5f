"""All defenses with equal budgets on small real data, three seeds, judged by the audited standard ensemble.

    python benchmarks/defenses/run.py balanced
    python benchmarks/defenses/run.py long-tailed

`balanced`: mnist5k, the options that `tune.py` chose on the calibration split (recipe mnist5k-small-cnn). `long-tailed`: the
same data with classes 5 to 9 cut to a tenth, SRAT and DONE against PGD-AT and TRADES. Every model is trained by the same
trainer on the same batches and judged on the same 500 test images, so methods differ in their objective alone. The runs are
ordinary suites: interrupted, they go on when the command is given again; `runs/defenses-NAME/report.html` has all figures.

Written: one row a method and metric, mean over seeds with a 95 % t-interval over seeds, and each seed's value with the
interval over its test samples.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t as student

from reports import write_reports
from robustbench_ext.engine import Progress, run_suite
from robustbench_ext.provenance import environment
from robustbench_ext.results import RunResults

SEEDS = (0, 1, 2)
N = 500  # test samples, the first of a stratified order
EPS = 0.2
PGD, AUDIT, WORST = f"pgd Linf {EPS}", f"audited Linf {EPS}", f"worst case Linf {EPS}"
CONDITIONS = [
    "clean",
    {"attack": "pgd", "eps": EPS, "steps": 40, "step_size": 0.025, "stop": "never"},
    {"attack": "audited", "eps": EPS, "widening": 2},
]
PRESET = "mnist5k-small-cnn"


def named(*methods: str) -> dict[str, dict[str, Any]]:
    return {name: {"defense": name, "recipe": PRESET} for name in methods}


def variant(method: str, **options: Any) -> dict[str, Any]:
    kwargs, recipe = options.pop("kwargs", {}), options.pop("recipe", PRESET)
    return {"defense": {"name": method, **options}, "recipe": recipe, "kwargs": kwargs}


EXPERIMENTS: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {
    "balanced": (
        "mnist5k",
        {
            **named("standard", "pgd-at", "trades", "mart", "awp", "gairat", "mail", "weat"),
            "weat, normalised": variant("weat", recipe={"name": PRESET, "lr": 0.2}, normalise=True),
            **named("done"),
            "done, first order": variant("done", implicit="none"),
            "srat": variant("srat", weights="none"),
        },
    ),
    "long-tailed": (
        "mnist5k@step:10",
        {
            **named("pgd-at", "trades"),
            "weights only": variant("srat", lam=0, weights="inverse", defer=0.8),
            "separation only": variant("srat", weights="none"),
            "srat, ce": variant("srat", weights="inverse", defer=0.8),
            "srat, ldam": variant(
                "srat", base="ldam", margin=15, scale=1, weights="inverse", defer=0.8, kwargs={"cosine_head": True}
            ),
            "done, r = 3": variant("done", r=3),
            "done, r = 1": variant("done", r=1),
            "done, r = 1, first order": variant("done", r=1, implicit="none"),
        },
    ),
}
# title: (condition, metric, group of rows by classes, percent)
METRICS = {
    "clean": ("clean", "accuracy"),
    "robust": (AUDIT, "robust_accuracy"),
    "robust, PGD-40": (PGD, "robust_accuracy"),
    "worst class": (WORST, "worst_class_accuracy"),
    "tail 30 %": (WORST, "tail30_accuracy"),
    "mean E(x)": ("clean", "energy_marginal"),
    "mean E(x) - E(x*)": (PGD, "delta_energy"),
}
TAIL = ("5", "6", "7", "8", "9")


def suite(name: str) -> dict[str, Any]:
    data, methods = EXPERIMENTS[name]
    models = [
        {"name": f"{label} #{seed}", "train": {**train, "seed": seed}}
        for label, train in methods.items()
        for seed in SEEDS
    ]
    title = f"Defenses compared, {name}"
    return {
        "schema": 1,
        "name": name,
        "title": title,
        "data": data,
        "n": 1000,
        "models": models,
        "conditions": CONDITIONS,
    }


def value_of(results: RunResults, model: str, condition: str, metric: str) -> dict[str, Any] | None:
    rows = results.find(model=model, condition=condition, metric=metric, probe="classifier")
    named = metric in ("worst_class_accuracy", "tail30_accuracy")  # their group says which classes these are
    rows = [row for row in rows if named or row.group is None]
    if not rows or rows[0].value is None:
        return None
    return {"value": rows[0].value, "low": rows[0].ci_low, "high": rows[0].ci_high, "n": rows[0].n}


def tail_of(results: RunResults, model: str) -> dict[str, Any] | None:
    """Mean robust accuracy over the classes that were cut."""
    rows = [
        row
        for row in results.find(model=model, condition=WORST, metric="robust_accuracy", probe="classifier")
        if row.group in TAIL
    ]
    return {"value": float(np.mean([row.value for row in rows])), "n": sum(row.n for row in rows)} if rows else None


def over_seeds(values: list[float]) -> dict[str, float]:
    """Mean and 95 % t-interval over seeds."""
    v = np.array(values)
    half = float(student.ppf(0.975, len(v) - 1) * v.std(ddof=1) / len(v) ** 0.5) if len(v) > 1 else float("nan")
    return {"mean": float(v.mean()), "low": float(v.mean()) - half, "high": float(v.mean()) + half, "seeds": len(v)}


def summarise(name: str, results: RunResults) -> list[dict[str, Any]]:
    metrics: dict[str, Any] = dict(METRICS)
    if name == "long-tailed":
        metrics["cut classes, robust"] = None
    rows = []
    for label in EXPERIMENTS[name][1]:
        for title, place in metrics.items():
            found = [
                tail_of(results, f"{label} #{s}") if place is None else value_of(results, f"{label} #{s}", *place)
                for s in SEEDS
            ]
            kept = [f for f in found if f is not None]
            if kept:
                rows.append({"method": label, "metric": title, **over_seeds([f["value"] for f in kept]), "each": kept})
    return rows


def markdown(rows: list[dict[str, Any]], n: int, hardware: dict[str, Any]) -> str:
    titles = list(dict.fromkeys(row["metric"] for row in rows))
    lines = [
        f"n = {n} test images, {len(SEEDS)} seeds, Linf {EPS}; mean over seeds [95 % t-interval over seeds], percent except "
        f"energies. {hardware.get('processor')}, {hardware.get('cores')} cores.",
        "",
        "| method | " + " | ".join(titles) + " |",
        "| --- |" + " ---: |" * len(titles),
    ]
    for method in dict.fromkeys(row["method"] for row in rows):
        cells = []
        for title in titles:
            row = next((r for r in rows if r["method"] == method and r["metric"] == title), None)
            if row is None:
                cells.append("–")
                continue
            scale, digits = (1, 2) if title.startswith("mean E") else (100, 1)
            cells.append(
                f"{scale * row['mean']:.{digits}f} [{scale * row['low']:.{digits}f}, {scale * row['high']:.{digits}f}]"
            )
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=list(EXPERIMENTS))
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/defenses/results"))
    parser.add_argument("--executor", default="serial", choices=["serial", "local"])
    options = parser.parse_args()
    name = options.experiment
    summary = run_suite(
        suite(name),
        options.runs / f"defenses-{name}",
        executor=options.executor,
        progress=Progress(line=lambda i, total, what, facts: print(f"[{i}/{total}] {what}", flush=True)),
    )
    write_reports(options.runs / f"defenses-{name}")
    rows = summarise(name, summary.results)
    options.out.mkdir(parents=True, exist_ok=True)
    found = environment()
    report = {"experiment": name, "n": N, "seeds": SEEDS, "eps": EPS, "environment": found, "rows": rows}
    (options.out / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    text = markdown(rows, N, found["hardware"])  # type: ignore[arg-type]
    (options.out / f"{name}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
