"""Detectors on real data, three training seeds: unknown inputs, FGSM, PGD and C&W, and attackers who know of the detector.

    python benchmarks/detectors/real.py --out benchmarks/detectors/results              # known: mnist5k, embedded
    RBX_DATA=... python benchmarks/detectors/real.py --data torchvision:FashionMNIST --outliers torchvision:MNIST

As in Lee et al. 2018: Mahalanobis on the last layer, and an ensemble of all layers whose weights (and step, in a second
version) are validated with FGSM inputs alone, against MSP and ODIN; ODIN's temperature and step are chosen on the same FGSM
inputs. The adaptive attacks break the prediction and bring the named detector's score down. Less than a minute a seed for
n = 100 on one core, six for n = 1,000, most of it C&W; records are kept in --runs, so a run that is cut off goes on.

Written: the mean over seeds of AUROC, TNR at 95 % TPR and detection accuracy with the seeds' standard deviation; of the
differences to MSP, how many of the seeds show a significant one (paired DeLong, Holm).
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from robustbench_ext.engine import Progress, run_suite
from robustbench_ext.provenance import environment
from robustbench_ext.results import RunResults

LAYERS = ["relu", "relu_1", "relu_2", "penultimate"]  # of small-cnn: behind each block
METRICS = ("auroc", "tnr95", "detection_accuracy")


def suite(options: argparse.Namespace) -> dict[str, Any]:
    eps, n = options.eps, options.n
    fgsm = {"attack": "fgsm", "eps": eps}
    near = [{"outliers": o, "n": n, "distance": "near"} for o in ("letters", "symbols")]
    far = [{"outliers": o, "n": n, "distance": "far"} for o in ("photos", "uniform-noise", *options.outliers)]
    recipe = {"epochs": options.epochs, "eps": eps}
    return {
        "schema": 1,
        "name": "detectors-real",
        "data": options.data,
        "n": n,
        "models": [
            {"name": f"seed {s}", "train": {"defense": "standard", "network": "small-cnn", "seed": s, "recipe": recipe}}
            for s in range(options.seeds)
        ],
        "conditions": [
            *near,
            *far,
            {"attack": "fgsm", "eps": eps, "stop": "never"},
            {"attack": "pgd", "eps": eps, "steps": 40, "step_size": eps / 8, "stop": "never"},
            {"attack": "cw"},
            {"attack": "adaptive", "eps": eps, "steps": 100, "against": ["msp", "mahalanobis", "ensemble"]},
            {"corruption": "gaussian-noise", "severity": [3], "levels": "imagenet-c"},
        ],
        "detectors": [
            "msp",
            {"name": "odin", "temperature": [1, 10, 100, 1000], "eps": [0, 0.0014, 0.005, 0.02], "validate": fgsm},
            "energy",
            {"name": "energy", "label": "energy-low", "suspect": "low", "temperature": [0.1, 1, 10], "validate": fgsm},
            "mahalanobis",
            "relative-mahalanobis",
            {"name": "mahalanobis", "label": "ensemble", "layers": LAYERS, "validate": fgsm},
            {
                "name": "mahalanobis",
                "label": "ensemble-step",
                "layers": LAYERS,
                "eps": [0.0, 0.0005, 0.001, 0.0014, 0.002, 0.005, 0.01],
                "validate": fgsm,
            },
            "knn",
            "vim",
            "feature-squeezing",
        ],
    }


def summary(results: RunResults) -> list[dict[str, Any]]:
    models = [m["name"] for m in results.models]
    rows = []
    for condition in [c["label"] for c in results.conditions if c["kind"] in ("outliers", "attack", "corruption")]:
        for probe in [p["label"] for p in results.probes]:
            row: dict[str, Any] = {"condition": condition, "detector": probe}
            for metric in METRICS:
                found = [results.find(model=m, condition=condition, probe=probe, metric=metric) for m in models]
                values = [f[0].value for f in found if f and f[0].value is not None]
                row[metric] = values
            tests = [results.find(model=m, condition=condition, probe=probe, metric="auroc_gain_p") for m in models]
            gains = [results.find(model=m, condition=condition, probe=probe, metric="auroc_gain") for m in models]
            clear = [
                (g[0].value or 0.0) > 0 for g, t in zip(gains, tests, strict=True) if t and (t[0].value or 1.0) < 0.05
            ]
            row["better than msp"], row["worse than msp"] = sum(clear), len(clear) - sum(clear)
            sizes = [
                results.find(model=m, condition=condition, probe=probe, metric="auroc")[0].n_unknown for m in models
            ]
            row["n unknown"] = sizes
            rows.append(row)
    return rows


def table(rows: list[dict[str, Any]], seeds: int) -> str:
    def told(values: list[float]) -> str:
        if not values:
            return "–"
        spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
        return f"{100 * statistics.mean(values):.1f}{spread}"

    head = [
        "inputs",
        "detector",
        "AUROC",
        "TNR@95",
        "detection accuracy",
        f"better / worse than MSP, of {seeds}",
        "n unknown",
    ]
    lines = [f"| {' | '.join(head)} |", "| --- | --- |" + " ---: |" * 5]
    for row in rows:
        against = "" if row["detector"] == "msp" else f"{row['better than msp']} / {row['worse than msp']}"
        sizes = ", ".join(map(str, row["n unknown"]))
        cells = [row["condition"], row["detector"], *(told(row[m]) for m in METRICS), against, sizes]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="mnist5k")
    parser.add_argument("--outliers", nargs="*", default=[], help="further far outliers, such as torchvision:MNIST")
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--eps", type=float, default=0.2)
    parser.add_argument("--runs", type=Path, default=Path("runs/detectors-real"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/detectors/results"))
    options = parser.parse_args()
    told = Progress(line=lambda i, total, what, facts: print(f"{i}/{total} {what}", flush=True))
    done = run_suite(suite(options), options.runs, progress=told)
    if done.failures:
        raise SystemExit("\n".join(f"{f.what}: {f.error}" for f in done.failures))
    rows = summary(done.results)
    options.out.mkdir(parents=True, exist_ok=True)
    content = {
        "environment": environment(),
        "suite": suite(options),
        "accuracy": [r.value for r in done.results.find(condition="clean", metric="accuracy", group=None)],
        "fitted": {m["name"]: m["fitted"] for m in done.results.models},
        "rows": rows,
    }
    (options.out / "real.json").write_text(json.dumps(content, indent=1) + "\n")
    (options.out / "real.md").write_text(table(rows, options.seeds))


if __name__ == "__main__":
    main()
