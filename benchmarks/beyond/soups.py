"""Soups of networks that were fine-tuned against attacks from one start: does an average beat its best ingredient?

    python benchmarks/beyond/soups.py --start clean
    python benchmarks/beyond/soups.py --start robust

For each of three seeds: a network is trained on clean images, or by PGD-AT, then fine-tuned from there in six ways (PGD-AT and
TRADES with several options). Of these six: the uniform soup, and greedy ones that are judged on the calibration split by clean
accuracy, by robust accuracy, and by both. The best ingredient is the one that the robust judge likes most alone, so it is
chosen on the same samples as the soup. `from different starts` averages the three seeds' fine-tuned networks, which are no
soup.

The clean start came first. Its fine-tuned networks turned out not to be connected, so that no soup could help; the robust start
was added after that was seen. In the first runs batch norms were measured on clean images alone, which took the robustness of
every soup; that is now the row `clean statistics`.

Compared on the same test samples within each seed (paired, exact McNemar), and over seeds.
"""

from __future__ import annotations

from typing import Any

from common import APGD, EPS, NETWORK, ROBUST, SEEDS, Column, N, means, options, run, write

from robustbench_ext.axes import Axis
from robustbench_ext.compare import Run, compare
from robustbench_ext.results import RunResults

STARTS: dict[str, dict[str, Any]] = {
    "clean": {"defense": "standard", "recipe": {"epochs": 6, "lr": 0.1}},
    "robust": {"defense": "pgd-at", "recipe": {"epochs": 12, "lr": 0.2, "eps": EPS, "attack_steps": 7}},
}
FINE = {"epochs": 6, "eps": EPS, "attack_steps": 7}
INGREDIENTS: dict[str, dict[str, Any]] = {
    "pgd-at, lr 0.05": {"defense": "pgd-at", "recipe": {**FINE, "lr": 0.05}},
    "pgd-at, lr 0.1": {"defense": "pgd-at", "recipe": {**FINE, "lr": 0.1}},
    "trades 3, lr 0.05": {"defense": {"name": "trades", "beta": 3}, "recipe": {**FINE, "lr": 0.05}},
    "trades 3, lr 0.1": {"defense": {"name": "trades", "beta": 3}, "recipe": {**FINE, "lr": 0.1}},
    "trades 6, lr 0.05": {"defense": {"name": "trades", "beta": 6}, "recipe": {**FINE, "lr": 0.05}},
    "trades 6, lr 0.1": {"defense": {"name": "trades", "beta": 6}, "recipe": {**FINE, "lr": 0.1}},
}
THREAT = {"eps": EPS, "steps": 10, "statistics_n": 1000}
JUDGE = {**THREAT, "judge_n": 500}
SOUPS: dict[str, dict[str, Any]] = {
    "uniform soup": {"how": "uniform", **THREAT},
    "uniform soup, clean statistics": {"how": "uniform"},
    "greedy soup, clean": {"how": "greedy", "judge_n": 500, **THREAT},
    "greedy soup, robust": {"how": "greedy", "clean": 0, **JUDGE},
    "greedy soup, both": {"how": "greedy", "clean": 0.5, **JUDGE},
}
APART = "from different starts"
COLUMNS: list[Column] = [
    ("clean", "clean", "accuracy"),
    ("robust", ROBUST, "robust_accuracy"),
    ("corruptions", "all corruptions", "mean_accuracy"),
    ("clean ECE", "clean", "ece"),
    ("ECE under attack", ROBUST, "ece"),
]


def suite(kind: str) -> dict[str, Any]:
    """Start, ingredients and soups of every seed."""
    models: list[dict[str, Any]] = []
    for seed in SEEDS:
        start = f"start #{seed}"
        train = {**STARTS[kind], "network": NETWORK, "seed": seed}
        models.append({"name": start, "train": train, "replicate_of": "start"})
        for number, (label, how) in enumerate(INGREDIENTS.items()):
            train = {**how, "start": start, "seed": 100 * seed + number}
            models.append({"name": f"{label} #{seed}", "train": train, "replicate_of": label})
        of = [f"{label} #{seed}" for label in INGREDIENTS]
        for label, how in SOUPS.items():
            make = {"name": "soup", "of": of, "seed": seed, **how}
            models.append({"name": f"{label} #{seed}", "make": make, "replicate_of": label})
    for number, label in enumerate(list(INGREDIENTS)[:3]):
        make = {"name": "soup", "of": [f"{label} #{seed}" for seed in SEEDS], **THREAT}
        models.append({"name": f"{APART} #{number}", "make": make, "replicate_of": APART})
    conditions = ["clean", APGD, {"corruption": "fifteen", "severity": 3}]
    about = {
        "title": f"Robust soups from a {kind} start",
        "description": "Averages of fine-tuned networks against their ingredients.",
    }
    return {
        "schema": 1,
        "name": f"soups-{kind}",
        **about,
        "data": "mnist5k",
        "n": N,
        "models": models,
        "conditions": conditions,
    }


def against_best(results: RunResults, folder: Any) -> tuple[list[str], list[dict[str, Any]]]:
    """Each soup against the best ingredient of its seed, on the same samples."""
    made = {str(m["name"]): m["made"]["report"] for m in results.models if "made" in m}
    best = {
        seed: max(made[f"greedy soup, robust #{seed}"]["path"], key=lambda step: step["alone"])["model"]
        for seed in SEEDS
    }
    finished = Run.read(folder)
    wanted = [Axis("clean", "accuracy", "clean"), Axis("robust", "robust_accuracy", ROBUST)]
    pairs = [
        (finished.side(f"{label} #{seed}", f"{label} #{seed}"), finished.side(best[seed], best[seed]))
        for label in SOUPS
        for seed in SEEDS
    ]
    lines = ["| soup | best ingredient | axis | difference, points | p (Holm) |", "| --- | --- | --- | ---: | ---: |"]
    found = compare(pairs, wanted, "axis")
    for c in found:
        difference = f"{100 * (c.value or 0):+.1f} [{100 * (c.ci_low or 0):+.1f}, {100 * (c.ci_high or 0):+.1f}]"
        p = "–" if c.p_adjusted is None else f"{c.p_adjusted:.2g}"
        lines.append(
            f"| {c.model} | {c.against} | {'clean' if c.metric == 'accuracy' else 'robust'} | {difference} | {p} |"
        )
    return lines, [c.model_dump() for c in found]


def main() -> None:
    """Run, compare, write."""
    chosen = options(__doc__, "soups", start=list(STARTS))
    asked = suite(chosen.start)
    results, folder = run(asked, chosen)
    lines, rows = means(results, ["start", *INGREDIENTS, *SOUPS, APART], COLUMNS)
    compared, pairs = against_best(results, folder)
    ingredients = {m["name"]: m["made"]["report"]["ingredients"] for m in results.models if "made" in m}
    chosen_lines = [f"- {name}: {', '.join(of)}" for name, of in ingredients.items() if "greedy" in name]
    about = f"Robust: {ROBUST}, 40 steps. Corruptions: fifteen at severity 3."
    page = [
        about,
        "",
        *lines,
        "",
        "Against the best ingredient:",
        "",
        *compared,
        "",
        "What is in them:",
        "",
        *chosen_lines,
    ]
    write(chosen, asked, page, {"means": rows, "comparisons": pairs, "ingredients": ingredients})


if __name__ == "__main__":
    main()
