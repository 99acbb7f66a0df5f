"""Two-tier ensembles: what learnt weights of families are worth, and what attacking one member hides.

    python benchmarks/uq/ensembles.py --out benchmarks/uq/results

mnist5k; three families of three networks each, trained from different starts without a defense: small CNNs, small residual
networks (width 8), and small CNNs of width 2 after two epochs, which are worse on purpose. Weights are fitted on the
calibration split, all numbers are of the 1,000 test images:

    single       the member that is best on the calibration split
    uniform      equal weights for families; since they are of one size, for all members: the estimator `deep-ensemble`
    inverse      one over every family's Brier score (uq.mixing.inverse_variance_weights)
    learned      by likelihood

Accuracy with Wilson's interval, NLL and Brier score, clean and under Gaussian noise (severity 3 of ImageNet-C); and accuracy of
the first 250 images under APGD-CE (Linf 0.1, 20 steps) that goes against one member (the best on the calibration split),
against every member in turn (a sample counts if it survives all of these inputs), and against the ensemble itself. Also the
members' disagreement within and across families, clean and under the attack on one. Repeated for other starts with --repeats. A
few minutes a repeat on one core.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from defenses import Standard
from defenses.trainer import Architecture, Recipe, train
from robustbench_ext.attacks import build_attack
from robustbench_ext.data import load_dataset
from robustbench_ext.data.corruptions import gaussian_noise
from robustbench_ext.metrics.intervals import proportion
from robustbench_ext.models import load_model
from robustbench_ext.provenance import environment
from robustbench_ext.randomness import SampleRandom
from uq.ensembles import disagreement, log_probabilities, make_ensemble, mean_nll

FAMILIES: dict[str, tuple[str, dict[str, Any], int]] = {  # network, its options, epochs
    "cnn": ("small-cnn", {}, 6),
    "resnet": ("small-resnet", {"width": 8}, 6),
    "weak": ("small-cnn", {"width": 2}, 2),
}
MEMBERS, STEPS, ATTACKED = 3, 20, 250
BUDGETS = (0.1,)


def trained(data: Any, folder: Path, repeat: int) -> dict[str, nn.Module]:
    found = {}
    for family, (network, options, epochs) in FAMILIES.items():
        for member in range(MEMBERS):
            seed = MEMBERS * repeat + member
            out = folder / f"{family}-{seed}"
            if not (out / "model.json").is_file():
                recipe = Recipe(epochs=epochs, eps=0.1, validation_n=100, validation_steps=1)
                train(
                    Standard(), Architecture(network, data.shape, 10, kwargs=options or None), data, recipe, out, seed
                )
            found[f"{family} {member}"] = load_model(str(out)).module.eval()
    return found


def attacked(model: nn.Module, x: Tensor, y: Tensor, ids: np.ndarray, eps: float) -> Tensor:
    attack = build_attack("apgd-ce", eps=eps, steps=STEPS)
    parts = [slice(i, i + 250) for i in range(0, len(x), 250)]
    return torch.cat([attack(model, x[p], y[p], ids=ids[p]).x_adv for p in parts])


def run(repeat: int, folder: Path) -> dict[str, Any]:
    data = load_dataset("mnist5k")
    members = trained(data, folder, repeat)
    names = list(members)
    families = {family: [name for name in names if name.startswith(family)] for family in FAMILIES}
    places = [[names.index(name) for name in family] for family in families.values()]
    held = data["calibration"]
    hx, hy = held.images(slice(None)), torch.from_numpy(held.labels)
    test = data["test"]
    x, y, ids = test.images(slice(None)), torch.from_numpy(test.labels), test.ids
    single = min(names, key=lambda name: mean_nll(log_probabilities([members[name]], hx)[0], hy))
    models: dict[str, nn.Module] = {"single": members[single]}
    reports = {}
    for name, rule in (("uniform", "uniform"), ("inverse", "inverse-variance"), ("learned", "learned")):
        model, reports[name] = make_ensemble(members, hx, hy, families, rule)
        models[name] = model.eval()
    inputs = {"clean": x, "noise": gaussian_noise(x, 3, SampleRandom.of(0, ids, "ensembles"), "imagenet-c")}
    out: dict[str, Any] = {"repeat": repeat, "single": single, "n": len(y)}
    out["weights"] = {name: {f: v["weight"] for f, v in r["families"].items()} for name, r in reports.items()}
    out["scores"] = {
        inputs_name: {name: scores(model, images, y) for name, model in models.items()}
        for inputs_name, images in inputs.items()
    }
    out["attacks"] = {}
    seen = {"clean": x}
    x, y, ids = x[:ATTACKED], y[:ATTACKED], ids[:ATTACKED]
    for eps in BUDGETS:
        made = {name: attacked(member, x, y, ids, eps) for name, member in members.items()}
        seen[f"one, {eps}"] = made[single]
        rows: dict[str, Any] = {}
        for name, model in models.items():
            own = right(model, attacked(model, x, y, ids, eps), y)
            of_members = [right(model, images, y) for images in made.values()]
            rows[name] = {
                "one": share(right(model, made[single], y)),
                "every member": share(np.logical_and.reduce(of_members)),
                "itself": share(own & right(model, x, y)),
            }
        out["attacks"][str(eps)] = rows
    out["disagreement"] = {}
    for name, images in seen.items():
        found = disagreement(log_probabilities(list(members.values()), images), places)
        out["disagreement"][name] = {**dict(zip(families, found.within, strict=True)), "across": found.across}
    return out


def right(model: nn.Module, x: Tensor, y: Tensor) -> np.ndarray:
    return np.asarray(log_probabilities([model], x)[0].argmax(1) == y)


def share(hits: np.ndarray) -> list[float]:
    e = proportion(hits)
    return [e.value, e.ci_low, e.ci_high]


def scores(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Any]:
    log_p = log_probabilities([model], x)[0]
    target = nn.functional.one_hot(y, log_p.shape[1])
    return {
        "accuracy": share(np.asarray(log_p.argmax(1) == y)),
        "nll": mean_nll(log_p, y),
        "brier": float((log_p.exp() - target).square().sum(1).mean()),
    }


def table(found: list[dict[str, Any]]) -> str:
    kinds = list(found[0]["scores"]["clean"])
    inputs, budgets, shown = (list(found[0][part]) for part in ("scores", "attacks", "disagreement"))

    def mean(*path: Any, percent: bool = False) -> str:
        """What lies at a path of every repeat; of an estimate with its interval, the estimate."""
        values = np.array([_at(one, path) for one in found]) * (100 if percent else 1)
        digits = 1 if percent else 3
        spread = f" ± {values.std(ddof=1):.{digits}f}" if len(values) > 1 else ""
        return f"{values.mean():.{digits}f}{spread}"

    def lines_of(title: str, corner: str, columns: list[str], rows: dict[str, list[str]]) -> list[str]:
        head = [title, "", f"| {corner} | " + " | ".join(columns) + " |", "| --- |" + " ---: |" * len(columns)]
        return [*head, *(f"| {name} | " + " | ".join(cells) + " |" for name, cells in rows.items()), ""]

    metrics = ("accuracy", "nll", "brier")
    rows = {}
    for kind in kinds:
        weights = [mean("weights", kind, f, percent=True) for f in FAMILIES if kind in found[0]["weights"]]
        scores = [mean("scores", i, kind, m, percent=m == "accuracy") for i in inputs for m in metrics]
        rows[kind] = [" / ".join(weights) or "–", *scores]
    columns = [
        f"weights {' / '.join(FAMILIES)}, %",
        *(f"{i}: {m}" for i in inputs for m in ("accuracy, %", "NLL", "Brier")),
    ]
    title = f"Means over {len(found)} repeat(s), n = {found[0]['n']} test images"
    out = lines_of(title, "ensemble", columns, rows)
    goals = ("one", "every member", "itself")
    rows = {k: [mean("attacks", e, k, g, percent=True) for e in budgets for g in goals] for k in kinds}
    title = f"Accuracy in % of {ATTACKED} images under APGD-CE that goes against"
    out += lines_of(title, "ensemble", [f"{g}, eps {e}" for e in budgets for g in goals], rows)
    rows = {p: [mean("disagreement", i, p, percent=True) for i in shown] for p in (*FAMILIES, "across")}
    out += lines_of("Disagreement in % of samples, mean over pairs of members", "pairs", shown, rows)
    return "\n".join(out)


def _at(one: Any, path: tuple[Any, ...]) -> float:
    for key in path:
        one = one[key]
    return float(one[0] if isinstance(one, list) else one)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--models", type=Path, default=Path("runs/uq-ensembles"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/uq/results"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = []
    for repeat in range(options.repeats):
        found.append(run(repeat, options.models))
        print(table(found), flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "ensembles.json").write_text(
        json.dumps({"environment": environment(), "found": found}, indent=1) + "\n"
    )
    (options.out / "ensembles.md").write_text(table(found))


if __name__ == "__main__":
    main()
