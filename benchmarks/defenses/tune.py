"""Choose each defense's options for small data on the calibration split, never on test.

    python benchmarks/defenses/tune.py
    RBX_DATA=... python benchmarks/defenses/tune.py --data torchvision:FashionMNIST --methods pgd-at trades weat

One seed (100, which the experiments do not use), the same epochs, attack and network for all. Every candidate is judged on
the calibration samples (2,000 at most) by PGD with 20 steps of eps / 8; written are all candidates with their intervals, best
first. With 1,000 samples a difference of less than about 3 points is within the noise of one seed: the table says how flat the
choice is. What is trained already is not trained again.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from defenses.recipes import plan
from defenses.trainer import Architecture, train, training_key
from defenses.validation import validate
from robustbench_ext.data import load_dataset
from robustbench_ext.metrics.intervals import wilson
from robustbench_ext.models import load_model
from robustbench_ext.provenance import environment

SEED = 100
SHARED = {
    "mnist5k": {"epochs": 15, "lr": 0.2, "eps": 0.2, "attack_steps": 7, "energy_n": 0},
    "torchvision:FashionMNIST": {"epochs": 3, "lr": 0.1, "eps": 0.1, "attack_steps": 5, "energy_n": 0},
}
BASE = {"name": "trades", "beta": 6}
# method: candidates (defense options, recipe options); the learning rate is chosen for pgd-at and shared by the others,
# except WEAT, whose unnormalised weights make its gradient several times smaller.
GRIDS: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = {
    "pgd-at": [({}, {"lr": lr}) for lr in (0.1, 0.2, 0.4)],
    "trades": [({"beta": b}, {}) for b in (3, 6, 12)],
    "weat": [({"normalise": False}, {"lr": 0.2}), ({"normalise": False}, {"lr": 0.5}), ({"normalise": True}, {})],
    "mart": [({"lam": v}, {}) for v in (2, 5)],
    "awp": [({"base": BASE, "gamma": g}, {}) for g in (0.002, 0.005)],
    "gairat": [({"lam": v}, {}) for v in (-1, 1)],
    "mail": [({"base": "trades", "slope": s}, {}) for s in (1, 2)],
    "done": [({"r": r}, {}) for r in (1, 3)],
    "srat": [({"weights": "none", "lam": v}, {"lr": lr}) for v, lr in ((0.1, 0.2), (0.5, 0.2), (0.5, 0.1), (2, 0.1))],
}


FASHION: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = {
    "pgd-at": [({}, {"lr": lr}) for lr in (0.1, 0.2)],
    "trades": [({"beta": b}, {}) for b in (3, 6)],
    "weat": [({}, {"lr": lr}) for lr in (0.1, 0.3)],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="mnist5k", choices=list(SHARED))
    parser.add_argument("--methods", nargs="*", default=list(GRIDS), choices=list(GRIDS))
    parser.add_argument("--work", type=Path, default=Path("runs/tuning"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/defenses/results/tuning"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    data = load_dataset(options.data)
    split = data["calibration"].take(2000)
    grids = GRIDS if options.data == "mnist5k" else FASHION
    found: dict[str, list[dict[str, Any]]] = {}
    for method in options.methods:
        rows = []
        for defense, recipe in grids[method]:
            made = plan(method, {**SHARED[options.data], **recipe}, defense)
            network = Architecture(made.network, data.shape, len(data.classes))
            folder = options.work / training_key(made.defense, network, data, made.recipe, SEED)
            train(made.defense, network, data, made.recipe, folder, SEED)
            judge = replace(made.recipe, validation_n=None, validation_steps=20, step_size=None)
            measured = validate(load_model(str(folder)).module, split, judge, SEED + 1)
            n = len(split)
            rows.append(
                {
                    "defense": defense,
                    "recipe": recipe,
                    "clean": measured.clean,
                    "robust": measured.robust,
                    "robust_ci": wilson(round(measured.robust * n), n),
                }
            )
            print(
                f"{method:<8} {defense} {recipe}: clean {measured.clean:.3f}, robust {measured.robust:.3f}", flush=True
            )
        found[method] = sorted(rows, key=lambda row: -row["robust"])
        report = {
            "data": options.data,
            "n": len(split),
            "split": "calibration",
            "seed": SEED,
            "shared": SHARED[options.data],
            "candidates": found,
            "environment": environment(),
        }
        name = options.data.rpartition(":")[2].lower()
        (options.out / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
