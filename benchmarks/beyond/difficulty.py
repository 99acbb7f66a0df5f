"""Accuracy, robust accuracy and calibration by difficulty: whom does training against attacks help?

    python benchmarks/beyond/difficulty.py

Test samples are scored by EL2N of ten other networks after epoch 3 of 15 (Paul et al. 2021, arXiv 2107.07075), and cut into ten
slices of 100. Judged are `standard`, `pgd-at`, `trades`, `weat`, `done` and, as a control of the latter two, `reweight`
(LinUpper), three seeds each, with the options of the recipe mnist5k-small-cnn (those of `reweight` are the published ones).
"""

from __future__ import annotations

from typing import Any

from common import APGD, NETWORK, ROBUST, SEEDS, N, means, of_seeds, options, run, text, write

from robustbench_ext.results import RunResults

PRESET = "mnist5k-small-cnn"
METHODS = ("standard", "pgd-at", "trades", "weat", "done", "reweight")
SCORERS, EPOCH, BINS = 10, 3, 10
TABLES = {
    "Clean accuracy": ("clean", "accuracy_by_difficulty"),
    "Robust accuracy": (ROBUST, "robust_accuracy_by_difficulty"),
    "Robust minus clean accuracy, points": (ROBUST, "change_by_difficulty"),
    "Calibration error (root of the debiased squared error), clean": ("clean", "rmsce_by_difficulty"),
    "AUROC of energy, clean inputs of the slice against letters": ("outliers letters", "auroc_by_difficulty"),
}


def suite() -> dict[str, Any]:
    """Ten scorers that are not judged, every method with three seeds."""
    scorer = {"defense": "standard", "network": NETWORK, "seeds": [1000 + i for i in range(SCORERS)]}
    models: list[dict[str, Any]] = [{"name": "scorer", "evaluate": False, "train": {**scorer, "recipe": PRESET}}]
    for method in METHODS:
        models.append({"name": method, "train": {"defense": method, "seeds": list(SEEDS), "recipe": PRESET}})
    return {
        "schema": 1,
        "name": "by-difficulty",
        "title": "By difficulty",
        "description": "Slices of test samples by EL2N of other networks.",
        "data": "mnist5k",
        "n": N,
        "models": models,
        "conditions": ["clean", APGD, {"outliers": "letters", "n": 500}],
        "detectors": ["energy"],
        "difficulty": {"score": "el2n", "models": ["scorer"], "epoch": EPOCH, "bins": BINS},
    }


def table(results: RunResults, condition: str, metric: str) -> tuple[list[str], list[dict[str, Any]]]:
    """A row per slice, a column per method."""
    probe = "energy" if metric.startswith("auroc") else "classifier"
    lines = ["| slice | " + " | ".join(METHODS) + " |", "| --- |" + " ---: |" * len(METHODS)]
    rows = []
    for number in range(1, BINS + 1):
        group = f"slice {number} of {BINS}"
        found = [of_seeds(results, method, condition, metric, group, probe) for method in METHODS]
        name = {1: "1 (easiest)", BINS: f"{BINS} (hardest)"}.get(number, str(number))
        lines.append(f"| {name} | " + " | ".join(text(row, results) for row in found) + " |")
        rows += [row.model_dump() for row in found if row is not None]
    return lines, rows


def main() -> None:
    """Run and write."""
    chosen = options(__doc__, "difficulty")
    results, _ = run(suite(), chosen)
    page = [f"Robust: {ROBUST}, 40 steps. Slices of {N // BINS} by EL2N of {SCORERS} networks after epoch {EPOCH}."]
    whole, rows = means(results, METHODS, [("clean", "clean", "accuracy"), ("robust", ROBUST, "robust_accuracy")])
    page += [
        "",
        "Over all samples:",
        "",
        *whole,
        "",
        "Robust accuracy compared between seeds (Welch, p after Holm):",
        "",
    ]
    compared = results.compared("robust_accuracy", f"worst case Linf {APGD['eps']}")
    page += [f"- {c.model} against {c.against}: {c.outcome}, p = {c.p_adjusted:.2g}" for c in compared]
    for title, (condition, metric) in TABLES.items():
        lines, found = table(results, condition, metric)
        page += ["", f"{title}:", "", *lines]
        rows += found
    mistakes = [of_seeds(results, m, c, "difficulty_of_mistakes") for m in METHODS for c in ("clean", ROBUST)]
    page += ["", "How well difficulty tells mistakes from right answers (AUROC):", ""]
    page += [f"- {row.model}, {row.condition}: {text(row, results)}" for row in mistakes if row is not None]
    rows += [row.model_dump() for row in mistakes if row is not None]
    write(chosen, suite(), page, {"rows": rows})


if __name__ == "__main__":
    main()
