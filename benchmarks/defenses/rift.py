"""RiFT on small networks trained with PGD-AT: criticality of the modules, the way from the base to the tuned network, and
what is left of it on test data.

    python benchmarks/defenses/rift.py --out benchmarks/defenses/results/rift

For every seed one small CNN is trained. Its criticality is measured with both published ways of staying in the ball,
and read off both published ways (largest loss, final loss). Then the least and the most critical module are tuned at two
learning rates, and the least critical one once with batch norm in training mode; alpha is chosen on the calibration split.
Test data are looked at for alpha = 0, the chosen alpha and alpha = 1: clean accuracy and PGD-20, worst of three restarts.
The bound is checked too: on the fixed adversarial inputs the tuned network may lose at most the module's criticality, as
long as its weight stays in the ball and batch norm in evaluation mode. About eight minutes of one core, two of them for
digits; seeds that are in the file already are not computed again.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from defenses import PGDAT
from defenses.criticality import Criticality, adversarial_set, module_robust_criticality, robust_loss
from defenses.rift import (
    RiFTRecipe,
    State,
    best_alpha,
    fine_tune,
    interpolate,
    interpolation_search,
    load_state,
    restored,
    state_of,
)
from defenses.trainer import Architecture, Recipe, train, training_key
from robustbench_ext.attacks.pgd import PGD
from robustbench_ext.data import Dataset, load_dataset
from robustbench_ext.metrics.intervals import wilson
from robustbench_ext.models import load_model
from robustbench_ext.provenance import environment

CASES: dict[str, tuple[float, dict[str, Any], int | None]] = {  # budget, training, calibration samples to attack
    "digits": (0.15, {"epochs": 40, "attack_steps": 7}, None),
    "mnist5k": (0.2, {"epochs": 10, "attack_steps": 7}, 300),
}
TUNINGS = [
    ("least", "eval", 0.001),
    ("least", "eval", 0.01),
    ("least", "train", 0.001),
    ("most", "eval", 0.001),
    ("most", "eval", 0.01),
]


def base_network(data: Dataset, eps: float, recipe: dict[str, Any], seed: int, models: Path) -> nn.Module:
    defense, architecture = PGDAT(), Architecture("small-cnn", data.shape, len(data.classes))
    options = Recipe(eps=eps, **recipe)
    folder = models / training_key(defense, architecture, data, options, seed)
    train(defense, architecture, data, options, folder, seed)
    return load_model(str(folder)).module.eval()


def on_test(model: nn.Module, state: State, data: Dataset, eps: float) -> dict[str, Any]:
    """Clean and robust accuracy on test data, with Wilson's intervals."""
    test = data["test"]
    x, y = test.images(slice(None)), torch.from_numpy(test.labels)
    with restored(model):
        load_state(model, state)
        with torch.no_grad():
            clean = int((model(x).argmax(1) == y).sum())
        robust = int((~PGD(eps=eps, steps=20, restarts=3)(model, x, y, ids=test.ids).broken).sum())
    shares = {"clean": clean / len(y), "robust": robust / len(y)}
    return {**shares, "clean_ci": wilson(clean, len(y)), "robust_ci": wilson(robust, len(y)), "n": len(y)}


def measures(found: Criticality) -> dict[str, dict[str, float]]:
    """Criticality by module: the largest loss and the final one."""
    return {
        "max": {m.name: max(m.losses) - m.losses[0] for m in found.modules},
        "final": {m.name: m.losses[-1] - m.losses[0] for m in found.modules},
    }


def one_seed(
    data: Dataset, eps: float, recipe: dict[str, Any], search_n: int | None, seed: int, models: Path
) -> dict[str, Any]:
    model = base_network(data, eps, recipe, seed, models)
    begun = time.process_time()
    inputs = adversarial_set(model, data, RiFTRecipe(eps=eps), seed)
    criticality, seconds = {}, {}
    for project in ("epoch", "step"):
        options = RiFTRecipe(eps=eps, project=project)
        started = time.process_time()
        found = module_robust_criticality(model, data, options, seed, inputs=inputs)
        seconds[project] = time.process_time() - started
        criticality[project] = measures(found)
    mrc = criticality["epoch"]["max"]
    chosen = {"least": min(mrc, key=mrc.__getitem__), "most": max(mrc, key=mrc.__getitem__)}
    base = state_of(model)
    before, _ = robust_loss(model, inputs)
    at_base = on_test(model, base, data, eps)
    rows = []
    for which, bn, lr in TUNINGS:
        options, name = RiFTRecipe(eps=eps, bn=bn, lr=lr, search_n=search_n), chosen[which]
        tuned = fine_tune(model, data, name, options, seed)
        alphas = interpolation_search(model, data, name, base, tuned.state, options, seed)
        kept = best_alpha(alphas)
        test = {0.0: at_base}
        for alpha in (kept.alpha, 1.0):
            if alpha not in test:
                test[alpha] = on_test(model, interpolate(base, tuned.state, alpha), data, eps)
        with restored(model):
            load_state(model, tuned.state)
            after, _ = robust_loss(model, inputs)
        rows.append(
            {
                "module": which,
                "name": name,
                "bn": bn,
                "lr": lr,
                "epoch": tuned.epoch,
                "alphas": [asdict(a) for a in alphas],
                "alpha": kept.alpha,
                "change": alphas[-1].change,
                "loss_rise": after - before,
                "criticality": {project: criticality[project]["max"][name] for project in criticality},
                "test": {"base": test[0.0], "kept": test[kept.alpha], "tuned": test[1.0]},
            }
        )
        print(f"  {line(rows[-1])}", flush=True)
    return {
        "seed": seed,
        "adversarial_set": {"split": "train", "n": len(inputs), "loss": before},
        "criticality": criticality,
        "criticality_seconds": seconds,
        "rows": rows,
        "seconds": time.process_time() - begun,
    }


def line(row: dict[str, Any]) -> str:
    test = {k: f"{100 * v['clean']:5.1f} / {100 * v['robust']:5.1f}" for k, v in row["test"].items()}
    return (
        f"{row['module']:<5} {row['name']:<13} bn={row['bn']:<5} lr={row['lr']:<5g} alpha {row['alpha']:3.1f}  "
        f"test base {test['base']}  kept {test['kept']}  tuned {test['tuned']}  change {row['change']:.4f}  "
        f"loss {row['loss_rise']:+.4f} (criticality {row['criticality']['epoch']:.3f})"
    )


def spread(values: list[float]) -> str:
    return f"{np.mean(values):+.2f} ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else f"{values[0]:+.2f}"


def report(data: str, eps: float, seeds: list[dict[str, Any]]) -> str:
    """Tables in Markdown: differences to the base in percentage points, mean and standard deviation over the seeds."""
    first = seeds[0]["rows"][0]["test"]["base"]
    base = {k: [100 * s["rows"][0]["test"]["base"][k] for s in seeds] for k in ("clean", "robust")}
    out = [
        f"{data}, small-cnn, PGD-AT, Linf {eps:g}; seeds {', '.join(str(s['seed']) for s in seeds)}; test n = {first['n']}, "
        f"calibration n = {len(load_dataset(data)['calibration'])} ({CASES[data][2] or 'all'} attacked), "
        f"adversarial set n = {seeds[0]['adversarial_set']['n']} "
        f"(train). Base on test: clean {np.mean(base['clean']):.2f} %, PGD-20 {np.mean(base['robust']):.2f} %.",
        "",
        "Criticality (nats) by seed, largest loss, scaled back once an epoch / at every step:",
        "",
        "| module | " + " | ".join(f"seed {s['seed']}" for s in seeds) + " |",
        "| --- |" + " ---: |" * len(seeds),
    ]
    for name in seeds[0]["criticality"]["epoch"]["max"]:
        cells = [" / ".join(f"{s['criticality'][p]['max'][name]:.3f}" for p in ("epoch", "step")) for s in seeds]
        out.append(f"| {name.removesuffix('.weight')} | " + " | ".join(cells) + " |")
    ratios = []
    for s in seeds:
        found = [list(s["criticality"][p]["max"].values()) for p in ("epoch", "step")]
        ratios.append(" / ".join(f"{max(values) / min(values):.1f}" for values in found))
    out.append("| largest / smallest | " + " | ".join(ratios) + " |")
    out += [
        "",
        "Differences to the base on test data, percentage points, mean ± standard deviation over the seeds:",
        "",
        "| module | bn | lr | alpha | clean, kept | robust, kept | clean, alpha = 1 | robust, alpha = 1 | change of the weight "
        "| loss rise on D_adv |",
        "| --- | --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for k, (which, bn, lr) in enumerate(TUNINGS):
        rows = [s["rows"][k] for s in seeds]
        gains = [
            spread([100 * (r["test"][at][what] - r["test"]["base"][what]) for r in rows])
            for at in ("kept", "tuned")
            for what in ("clean", "robust")
        ]
        alphas = ", ".join(f"{r['alpha']:g}" for r in rows)
        change, rise = np.mean([r["change"] for r in rows]), f"{np.mean([r['loss_rise'] for r in rows]):+.4f}"
        out.append(f"| {which} | {bn} | {lr:g} | {alphas} | " + " | ".join(gains) + f" | {change:.4f} | {rise} |")
    grid = [a["alpha"] for a in seeds[0]["rows"][0]["alphas"]]
    out += [
        "",
        "Clean / robust accuracy on the calibration split along the way, differences to alpha = 0, percentage points, "
        "mean over the seeds:",
        "",
        "| module | bn | lr | " + " | ".join(f"{a:g}" for a in grid[1:]) + " |",
        "| --- | --- | ---: |" + " ---: |" * (len(grid) - 1),
    ]
    for k, (which, bn, lr) in enumerate(TUNINGS):
        ways = [s["rows"][k]["alphas"] for s in seeds]
        cells = []
        for i in range(1, len(grid)):
            lost = (
                np.mean([100 * (way[i][f"{what}_accuracy"] - way[0][f"{what}_accuracy"]) for way in ways])
                for what in ("clean", "robust")
            )
            cells.append(" / ".join(f"{v:+.2f}" for v in lost))
        out.append(f"| {which} | {bn} | {lr:g} | " + " | ".join(cells) + " |")
    return "\n".join(out) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--models", type=Path, default=Path("runs/benchmark-models"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/defenses/results/rift"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    for data in options.data:
        eps, recipe, search_n = CASES[data]
        made_with = {
            "data": data,
            "eps": eps,
            "recipe": recipe,
            "search_n": search_n,
            "tunings": [list(t) for t in TUNINGS],
        }
        file = options.out / f"{data}.json"
        kept = json.loads(file.read_text()) if file.is_file() else {}
        known = {s["seed"]: s for s in kept["seeds"]} if kept.get("made_with") == made_with else {}
        seeds = []
        for seed in options.seeds:
            if seed not in known:
                print(f"{data}, seed {seed}", flush=True)
                known[seed] = one_seed(load_dataset(data), eps, recipe, search_n, seed, options.models)
            seeds.append(known[seed])
            content = {"environment": environment(), "made_with": made_with, "seeds": seeds}
            file.write_text(json.dumps(content, indent=1))
            (options.out / f"{data}.md").write_text(report(data, eps, seeds))
        print(report(data, eps, seeds))


if __name__ == "__main__":
    main()
