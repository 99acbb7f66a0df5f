"""Uncertainty estimators of classifiers: calibration, abstaining, prediction sets and what their uncertainties see.

    python benchmarks/uq/classification.py

mnist5k (3,000 training, 1,000 calibration, 1,000 test images), small-cnn with dropout 0.3, ten epochs, three training seeds.
Every seed is a suite of its own: its model, and four further networks that serve as members of its ensemble alone, so that
the three ensembles share no network. Conditions: clean, gaussian noise (severities 1, 3, 5), PGD that runs to its end (Linf 0.1
and 0.2), letters and photographs. About four minutes of CPU time; the runs are ordinary suites, interrupted they go on
when the command is given again. runs/uq-classification/seed-S/report.html has all figures.

Sets are made at alpha = 0.01: the networks are right more often than 90 % or 95 %, and at these levels sets without draws would
be the predictions. This, the estimators' options and the network were fixed before results were seen.

Written: mean over seeds with a 95 % t-interval over seeds; each seed's value with its interval over test samples; of the
differences to the classifier itself, or to its maximum probability, how many seeds point the same way.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t as student

from reports import write_reports
from robustbench_ext.catalog import ESTIMATORS
from robustbench_ext.engine import Progress, run_suite
from robustbench_ext.metrics import METRICS
from robustbench_ext.provenance import environment
from robustbench_ext.results import RunResults

SEEDS, MEMBERS = (0, 1, 2), 4
ALPHA = 0.01
NETWORK = Path(__file__).with_name("dropout_cnn.py")
CLASSIFIER = "classifier"
# Label: what the suite says. Estimators that are not installed are left out.
UQ: dict[str, dict[str, Any]] = {
    "temperature": {},
    "vector-scaling": {},
    "mc-dropout": {"passes": 20},
    "deep-ensemble": {},
    "laplace": {},
    "split-point": {},
    "bias-variance-mix": {},
    "lac": {"alpha": ALPHA},
    "aps": {"alpha": ALPHA},
    "aps, randomised": {"name": "aps", "alpha": ALPHA, "randomised": True},
    "raps": {"alpha": ALPHA},
}
SETS = ("lac", "aps", "aps, randomised", "raps")
NOISE = {f"gaussian-noise {s}": f"noise {s}" for s in (1, 3, 5)}
PGD = {f"pgd Linf {e}": f"PGD {e}" for e in (0.1, 0.2)}
UNKNOWN = {f"outliers {o}": o for o in ("letters", "photos")}
LABELLED = {"clean": "clean", **NOISE, **PGD}
QUALITY = ("accuracy", "ece", "nll", "brier", "aurc", "e_aurc")
COVERAGE = ("set_coverage", "set_size", "set_empty")
PAPERS = """## Beside the papers

No figure of a paper is set beside these: the papers' networks and data are others (CIFAR and larger for scaling and sets,
language models for the bias-variance mix), and no published result on 5,000 MNIST digits is known to us. What the tables can
be held against is what the methods promise: temperature scaling leaves accuracy alone and minimises NLL on calibration data
alone; sets cover clean images on average over calibration sets; nothing is promised under noise, attack or for unknown images.
"""


def known() -> dict[str, dict[str, Any]]:
    return {label: options for label, options in UQ.items() if options.get("name", label) in ESTIMATORS}


def suite(seed: int) -> dict[str, Any]:
    def model(name: str, train_seed: int, evaluate: bool) -> dict[str, Any]:
        train = {
            "defense": "standard",
            "network": f"{NETWORK}:build",
            "seed": train_seed,
            # The least of the trainer's robustness checks: the epoch is chosen by clean accuracy.
            "recipe": {"epochs": 10, "validation_n": 50, "validation_steps": 1, "energy_n": 0},
        }
        return {"name": name, "train": train, "evaluate": evaluate}

    members = {f"member {m}": 100 * (seed + 1) + m for m in range(1, MEMBERS + 1)}
    uq = [{"name": label, "label": label, **options} for label, options in known().items()]
    for entry in uq:
        if entry["name"] == "deep-ensemble":
            entry["members"] = list(members)
    return {
        "schema": 1,
        "name": f"uq-classification-{seed}",
        "title": f"Uncertainty estimators on mnist5k, training seed {seed}",
        "data": "mnist5k",
        "n": 1000,
        "models": [model("model", seed, True), *(model(m, s, False) for m, s in members.items())],
        "conditions": [
            "clean",
            {"corruption": "gaussian-noise", "severity": [1, 3, 5], "levels": "imagenet-c"},
            {"attack": "pgd", "eps": [0.1, 0.2], "steps": 40, "step_size": 0.025, "stop": "never"},
            {"outliers": ["letters", "photos"], "n": 1000},
        ],
        "uq": uq,
    }


def over_seeds(values: list[float]) -> dict[str, Any]:
    """Mean and 95 % t-interval over seeds."""
    v = np.array(values)
    half = float(student.ppf(0.975, len(v) - 1) * v.std(ddof=1) / len(v) ** 0.5) if len(v) > 1 else float("nan")
    return {"mean": float(v.mean()), "low": float(v.mean()) - half, "high": float(v.mean()) + half, "seeds": len(v)}


def summarise(runs: list[RunResults]) -> list[dict[str, Any]]:
    """One row a condition, probe and metric; `better` and `worse`: seeds that differ from the baseline's value so."""
    rows = []
    found: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for run in runs:
        for r in run.results:
            if r.value is not None and (
                r.group is None or r.metric == "set_coverage"
            ):  # its group says what was promised
                each = {"value": r.value, "low": r.ci_low, "high": r.ci_high, "n": r.n, "n_unknown": r.n_unknown}
                found.setdefault((r.condition, r.probe, r.metric), []).append(each)
    wanted = [(c, p, m) for c in LABELLED for p in (CLASSIFIER, *known()) for m in (*QUALITY, *COVERAGE)]
    scores = [f"{CLASSIFIER} · msp", *(f"{p} · {part}" for p in known() for part in ("aleatoric", "epistemic"))]
    wanted += [(c, p, m) for c in (*LABELLED, *UNKNOWN) for p in scores for m in ("auroc", "e_aurc")]
    # An attack's verdict on the classifier is its robust accuracy.
    aliases = {(c, CLASSIFIER, "accuracy"): (c, CLASSIFIER, "robust_accuracy") for c in PGD}
    for key in wanted:
        each = found.get(aliases.get(key, key), [])
        if not each:
            continue
        condition, probe, metric = key
        row = {"condition": condition, "probe": probe, "metric": metric, **over_seeds([e["value"] for e in each])}
        baseline = (condition, scores[0] if "·" in probe else CLASSIFIER, metric)
        base = found.get(aliases.get(baseline, baseline), [])
        if len(base) == len(each):
            sign = 1 if METRICS[metric].higher_is_better else -1
            gains = [sign * (e["value"] - b["value"]) for e, b in zip(each, base, strict=True)]
            row |= {"better": sum(g > 0 for g in gains), "worse": sum(g < 0 for g in gains)}
        rows.append({**row, "each": each})
    return rows


def cell(rows: list[dict[str, Any]], condition: str, probe: str, metric: str, told: str = "") -> str:
    row = next((r for r in rows if (r["condition"], r["probe"], r["metric"]) == (condition, probe, metric)), None)
    if row is None:
        return "–"
    scale, digits = {"nll": (1, 3), "brier": (1, 3), "set_size": (1, 2)}.get(metric, (100, 1))
    if metric in ("aurc", "e_aurc"):
        digits = 2
    mean, low, high = (scale * row[k] for k in ("mean", "low", "high"))
    text = f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
    if told and row.get("better") is not None:
        text += f" {row['better']}/{row['worse']}"
    return text


def table(head: list[str], body: Iterable[tuple[str, list[str]]]) -> list[str]:
    lines = [f"| {' | '.join(head)} |", "| --- |" + " ---: |" * (len(head) - 1)]
    lines += [f"| {name} | {' | '.join(cells)} |" for name, cells in body if set(cells) != {"–"}]
    return [*lines, ""]


def markdown(rows: list[dict[str, Any]], found: dict[str, Any]) -> str:
    hardware, torch = found["hardware"], found["versions"]["torch"]
    lines = [
        "# Uncertainty estimators of classifiers on mnist5k",
        "",
        f"`python benchmarks/uq/classification.py`; {hardware.get('processor')}, {hardware.get('cores')} cores, torch {torch}, "
        f"CPU. Small-data results: 3,000 training, 1,000 calibration, n = 1,000 test images (1,000 of each unknown kind), "
        f"{len(SEEDS)} training seeds. Mean over seeds [95 % t-interval over seeds]; with three seeds they are wide. "
        f"The seeds share test images, calibration images and draws: what these add is in each seed's interval (JSON). "
        f"b/w: seeds of which the value is better/worse than the classifier's.",
        "",
        "## Probabilities",
        "",
        "Accuracy, ECE and AURC (of the maximum probability) in percent. PGD makes its inputs against the classifier, and "
        "samples that it misclassifies are left as they are; its own accuracy there is its robust accuracy.",
        "",
    ]
    probes = [CLASSIFIER, *(p for p in known() if p not in SETS)]
    for condition, title in LABELLED.items():
        head = [title, *(METRICS[m].title for m in QUALITY)]
        body = [(p, [cell(rows, condition, p, m, "b/w" if p != CLASSIFIER else "") for m in QUALITY]) for p in probes]
        lines += table(head, body)
    lines += [
        "## Uncertainties",
        "",
        "AUROC (percent) against clean test images; under PGD, of inputs that fooled the classifier.",
        "",
    ]
    scores = [f"{CLASSIFIER} · msp", *(f"{p} · {part}" for p in known() for part in ("aleatoric", "epistemic"))]
    places = {**UNKNOWN, **NOISE, **PGD}
    body = [(s, [cell(rows, c, s, "auroc", "" if "msp" in s else "b/w") for c in places]) for s in scores]
    lines += table(["score", *places.values()], body)
    lines += [
        "E-AURC (percent, 0 = mistakes last) of abstaining by the same scores; the mistakes are those of the estimator's own "
        "predictions.",
        "",
    ]
    body = [(s, [cell(rows, c, s, "e_aurc") for c in LABELLED]) for s in scores[1:]]
    lines += table(["score", *LABELLED.values()], body)
    lines += [
        "## Prediction sets",
        "",
        f"alpha = {ALPHA}: coverage (percent) is promised to be at least {100 * (1 - ALPHA):g} on average for clean images, "
        f"and nothing elsewhere. Size: mean number of classes of ten.",
        "",
    ]
    for metric in COVERAGE:
        body = [(p, [cell(rows, c, p, metric) for c in LABELLED]) for p in SETS]
        lines += table([METRICS[metric].title, *LABELLED.values()], body)
    return "\n".join([*lines, PAPERS])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/uq-classification"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/uq/results"))
    options = parser.parse_args()
    told = Progress(line=lambda i, total, what, facts: print(f"[{i}/{total}] {what}", flush=True))
    runs = []
    for seed in SEEDS:
        folder = options.runs / f"seed-{seed}"
        done = run_suite(suite(seed), folder, progress=told)
        if done.failures:
            raise SystemExit("\n".join(f"{f.what}: {f.error}" for f in done.failures))
        runs.append(done.results)
    rows, found = summarise(runs), environment()
    options.out.mkdir(parents=True, exist_ok=True)
    fitted = [run.models[0]["fitted"] for run in runs]
    content = {"environment": found, "suite": suite(SEEDS[0]), "seeds": SEEDS, "fitted": fitted, "rows": rows}
    (options.out / "classification.json").write_text(json.dumps(content, indent=1) + "\n")
    (options.out / "classification.md").write_text(markdown(rows, found))
    for seed in SEEDS:
        write_reports(options.runs / f"seed-{seed}")


if __name__ == "__main__":
    main()
