"""When does mixing a noisy and a biased estimator help? Three studies, one file of results each.

    python benchmarks/uq/mixing.py shrinkage      (seconds)
    python benchmarks/uq/mixing.py passes         (two minutes of one core)
    python benchmarks/uq/mixing.py gradients      (eight minutes of one core)

`shrinkage`: normal replicates of known truth, the estimated weight against the best one and against no mixing.

`passes`: networks with dropout on digits and mnist5k; the mean of S passes, the single pass without dropout, and their mix by
each rule of the weight. Weights are fitted on the clean calibration split; Brier score and NLL are of the test split, clean
and under noise and shifts. Intervals: differences to the single pass, mean over seeds with a 95 % t-interval over seeds.

`gradients`: short adversarial trainings, `gradient-mix` against both of its ends, accuracy under PGD-40 and the passes that
training cost. The budget 0.1 was added after the first runs at 0.2 had shown that so short a training there measures how soon
it leaves its first plateau, above all.

Each writes benchmarks/uq/results/mixing-NAME.json and .md; one thread.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import t as student
from torch import Tensor, nn
from torch.nn import functional as F

from defenses import PGDAT, GradientMix
from defenses.base import Defense
from defenses.trainer import Architecture, Recipe, train
from robustbench_ext.attacks.pgd import PGD
from robustbench_ext.data import Dataset, load_dataset
from robustbench_ext.data.corruptions import gaussian_noise
from robustbench_ext.models import load_model, observe
from robustbench_ext.provenance import environment
from robustbench_ext.randomness import SampleRandom
from uq.bias_variance_mix import FIT_PASSES, mixing_ratio, shrunk
from uq.mixing import Replicates, james_stein, mix
from uq.monte_carlo import AugmentedPasses, DropoutPasses, sample_logits

RESULTS = Path("benchmarks/uq/results")


def over_seeds(values: list[float]) -> dict[str, float]:
    """Mean and 95 % t-interval over seeds."""
    mean, n = float(np.mean(values)), len(values)
    half = float(student.ppf(0.975, n - 1) * np.std(values, ddof=1) / np.sqrt(n)) if n > 1 else float("nan")
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": n}


# Shrinkage -----------------------------------------------------------------------------------------------------------

CASES = [(1, 0), (1, 3), (3, 0), (3, 3), (4, 3), (10, 0), (10, 3), (100, 0), (100, 3)]
DRAWS = 4


def shrinkage_case(d: int, distance: float, repeats: int, seed: int = 0) -> dict[str, dict[str, float]]:
    """Total squared error of the mixed mean of K = 4 normal draws of variance 1, e a constant at that distance of mu = 0.

    Returns mean and standard error over repeats, by weight: "mean of t", "plug-in", "james-stein" and "oracle".
    """
    g = torch.Generator().manual_seed(seed)
    t = torch.randn(DRAWS, repeats, d, generator=g, dtype=torch.float64)
    e = torch.zeros(repeats, d, dtype=torch.float64)
    e[:, 0] = distance
    mean, freedom = t.mean(dim=0), d * (DRAWS - 1)
    rows = torch.arange(repeats)[:, None].expand(repeats, d)
    found = Replicates.of(t, e[None]).pooled(rows)
    weights = {
        "mean of t": torch.ones(repeats, dtype=torch.float64),
        "plug-in": found.ratio().weight(),
        "oracle": torch.full((repeats,), distance**2 / (distance**2 + d / DRAWS), dtype=torch.float64),
    }
    if d >= 3:
        pairs = zip(found.squared.tolist(), (found.var_t / d).tolist(), strict=True)
        weights["james-stein"] = torch.tensor([james_stein(q, v, d, DRAWS, freedom) for q, v in pairs]).double()
    out = {}
    for name, alpha in weights.items():
        errors = mix(mean, e, alpha[:, None]).square().sum(dim=1)
        out[name] = {"mse": float(errors.mean()), "se": float(errors.std() / repeats**0.5)}
    return out


def shrinkage() -> dict[str, Any]:
    rows = []
    for d, distance in CASES:
        repeats = 200_000 if d <= 10 else 20_000
        rows.append({"d": d, "distance": distance, "repeats": repeats, **shrinkage_case(d, distance, repeats, seed=d)})
    return {"draws": DRAWS, "rows": rows}


def shrinkage_table(found: dict[str, Any]) -> str:
    names = ("mean of t", "plug-in", "james-stein", "oracle")
    lines = [
        f"Squared error of the mixed mean of K = {found['draws']} draws (standard error). "
        f"Bold: larger than that of the mean of t by more than two standard errors.",
        "",
        "| d | distance | repeats | " + " | ".join(names) + " |",
        "| ---: | ---: | ---: |" + " ---: |" * len(names),
    ]
    for row in found["rows"]:
        cells = []
        for name in names:
            if name not in row:
                cells.append("not defined")
                continue
            worse = row[name]["mse"] - row["d"] / DRAWS > 2 * row[name]["se"] and name != "mean of t"
            text = f"{row[name]['mse']:.4f} ({row[name]['se']:.4f})"
            cells.append(f"**{text}**" if worse else text)
        lines.append(f"| {row['d']} | {row['distance']} | {row['repeats']:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


# Passes --------------------------------------------------------------------------------------------------------------

SEEDS = range(5)
PASSES = (1, 2, 5, 20)


def mlp(shape: tuple[int, int, int]) -> nn.Module:
    width = 128
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(int(np.prod(shape)), width),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Linear(width, 10),
    )


def cnn(shape: tuple[int, int, int]) -> nn.Module:
    side = (shape[1] + 3) // 4
    return nn.Sequential(
        nn.Conv2d(shape[0], 16, 3, 2, 1),
        nn.ReLU(),
        nn.Dropout2d(0.1),
        nn.Conv2d(16, 32, 3, 2, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(32 * side * side, 64),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Linear(64, 10),
    )


NETWORKS: dict[str, Callable[[tuple[int, int, int]], nn.Module]] = {"mlp": mlp, "cnn": cnn}
SOURCES = {"dropout": DropoutPasses(), "augment": AugmentedPasses(shift=1)}


def fitted(network: str, data: Dataset, seed: int, epochs: int = 20) -> nn.Module:
    """Adam, cross-entropy; plain, as the point is what happens afterwards."""
    torch.manual_seed(seed)
    model = NETWORKS[network](data.shape)
    x, y = data["train"].images(slice(None)), torch.from_numpy(data["train"].labels)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(epochs):
        for part in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(x[part]), y[part]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return model.eval()


def shifted_inputs(data: Dataset, seed: int) -> dict[str, Tensor]:
    """The test images: clean, with Gaussian noise, moved by up to two pixels."""
    test = data["test"]
    x, random = test.images(slice(None)), SampleRandom.of(seed, test.ids, "benchmark/shift")
    moved = AugmentedPasses(shift=max(1, data.shape[1] // 10)).augmented(x, random, 0)
    return {"clean": x, "noise 3": gaussian_noise(x, 3, random), "moved": moved}


# name: (target, prior, strength as a share of the held-out samples or a number)
RULES: dict[str, tuple[str, float, float]] = {
    "passes": ("passes", 0.5, 0),
    "truth": ("truth", 0.5, 0),
    "truth, to 0 by 100": ("truth", 0.0, 100),
    "truth, to 1/2 by 100": ("truth", 0.5, 100),
    "truth, to 0 by 1000": ("truth", 0.0, 1000),
}


def scores(log_p: Tensor, y: Tensor) -> dict[str, float]:
    p = log_p.exp()
    brier = (p - F.one_hot(y, p.shape[1])).square().sum(dim=1).mean()
    return {"brier": float(brier), "nll": float(F.nll_loss(log_p, y))}


def passes_case(data: Dataset, network: str, source: str, seed: int) -> list[dict[str, Any]]:
    """One network: every S, condition and rule."""
    model, make = fitted(network, data, seed), SOURCES[source]
    held = data["calibration"]
    x, y = held.images(slice(None)), torch.from_numpy(held.labels)
    single = observe(model, x, y).logits.double().softmax(dim=1)
    p = sample_logits(make, model, x, SampleRandom.of(seed, held.ids, "fit"), FIT_PASSES).exp()
    truth = F.one_hot(y, 10).double()
    rows, y_test = [], torch.from_numpy(data["test"].labels)
    for condition, inputs in shifted_inputs(data, seed).items():
        random = SampleRandom.of(seed, data["test"].ids, "read")
        log_p = sample_logits(make, model, inputs, random, max(PASSES))
        log_e = observe(model, inputs, y_test).logits.double().log_softmax(dim=1)
        for s in PASSES:
            log_t = log_p[:s].logsumexp(dim=0) - float(np.log(s))
            weights = {"single": 0.0, "passes alone": 1.0, "1/2": 0.5}
            for rule, (target, prior, strength) in RULES.items():
                ratio = mixing_ratio(p, single, s, truth if target == "truth" else None)
                weights[rule] = shrunk(ratio, len(y), prior, strength)
            for rule, alpha in weights.items():
                mixed = mix(log_t.exp(), log_e.exp(), alpha).clamp_min(1e-300).log()
                log = log_t if alpha == 1 else log_e if alpha == 0 else mixed
                row = {"data": data.name, "network": network, "source": source, "seed": seed, "s": s}
                rows.append({**row, "condition": condition, "rule": rule, "alpha": alpha, **scores(log, y_test)})
    return rows


def passes() -> dict[str, Any]:
    rows = []
    cases = [("digits", "mlp", "dropout"), ("mnist5k", "mlp", "dropout"), ("mnist5k", "cnn", "dropout")]
    cases += [("mnist5k", "cnn", "augment")]
    for name, network, source in cases:
        data = load_dataset(name)
        for seed in SEEDS:
            rows += passes_case(data, network, source, seed)
        print(name, network, source, f"{time.process_time():.0f} s", flush=True)
    return {"seeds": len(SEEDS), "fit_passes": FIT_PASSES, "summary": summarised(rows)}


def summarised(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Over seeds: alpha, scores, and differences to the single pass."""
    names = ("data", "network", "source", "condition", "s", "rule")
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[n] for n in names), []).append(row)
    out = []
    for key, members in groups.items():
        base = {r["seed"]: r for r in groups[(*key[:-1], "single")]}
        entry: dict[str, Any] = dict(zip(names, key, strict=True))
        entry["alpha"] = [round(r["alpha"], 3) for r in members]
        for score in ("brier", "nll"):
            entry[score] = over_seeds([r[score] for r in members])
            entry[f"{score}_gain"] = over_seeds([base[r["seed"]][score] - r[score] for r in members])
        out.append(entry)
    return out


SHOWN = ("passes alone", "1/2", "passes", "truth, to 0 by 100")  # of the rules; all are in the JSON file


def passes_table(found: dict[str, Any]) -> str:
    lines = [
        f"Gain over the single pass without randomness, Brier score and NLL, each times 1000 (positive: better); mean over "
        f"{found['seeds']} seeds [95 % t-interval]. Weights fitted on the clean calibration split (359 digits, 1,000 "
        f"of mnist5k), scores of the test split (360; 1,000).",
        "",
        *worst_table(found["summary"]),
    ]
    for case in dict.fromkeys((r["data"], r["network"], r["source"]) for r in found["summary"]):
        lines += ["", f"## {case[0]}, {case[1]}, {case[2]}", ""]
        lines += [
            "| condition | S | rule | mean alpha | Brier gain | NLL gain |",
            "| --- | ---: | --- | ---: | ---: | ---: |",
        ]
        for r in found["summary"]:
            if (r["data"], r["network"], r["source"]) != case or r["s"] == 2:
                continue
            start = f"| {r['condition']} | {r['s']} |"
            if r["rule"] == "single" and r["s"] == 1:
                scores_of = ", ".join(f"{1e3 * r[k]['mean']:.1f}" for k in ("brier", "nll"))
                lines.append(f"| {r['condition']} | | single: {scores_of} | 0 | | |")
            elif r["rule"] in SHOWN:
                cells = [_interval(r[f"{score}_gain"], 1e3) for score in ("brier", "nll")]
                lines.append(f"{start} {r['rule']} | {np.mean(r['alpha']):.2f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def worst_table(summary: list[dict[str, Any]]) -> list[str]:
    """By rule, over all networks and S: how often it clearly helps and clearly hurts, its mean and its worst."""
    head = [f"{score}: {what}" for score in ("Brier", "NLL") for what in ("better", "worse", "mean", "worst")]
    lines = ["| rule | condition | cases | " + " | ".join(head) + " |", "| --- | --- | ---: |" + " ---: |" * len(head)]
    conditions = list(dict.fromkeys(r["condition"] for r in summary))
    for rule in list(dict.fromkeys(r["rule"] for r in summary))[1:]:
        for condition in conditions:
            mine = [r for r in summary if r["rule"] == rule and r["condition"] == condition]
            cells = []
            for score in ("brier_gain", "nll_gain"):
                gains = [r[score] for r in mine]
                means = [1e3 * g["mean"] for g in gains]
                cells += [str(sum(g["low"] > 0 for g in gains)), str(sum(g["high"] < 0 for g in gains))]
                cells += [f"{np.mean(means):.2f}", f"{min(means):.2f}"]
            lines.append(f"| {rule} | {condition} | {len(mine)} | " + " | ".join(cells) + " |")
    return [*lines, "", "Better, worse: the interval over seeds excludes 0. Mean and worst of the cases' mean gains."]


def _interval(found: dict[str, float], scale: float = 1.0) -> str:
    return f"{scale * found['mean']:.1f} [{scale * found['low']:.1f}, {scale * found['high']:.1f}]"


# Gradients -----------------------------------------------------------------------------------------------------------

STEPS = 7
BUDGETS = {0.1: 4, 0.2: 6}  # eps: epochs
DEFENSES: dict[str, Defense] = {
    "pgd-at": PGDAT(),
    "fgsm-at": GradientMix(alpha=0),
    "1/2": GradientMix(alpha=0.5),
    "estimated": GradientMix(alpha="estimate"),
    "1/2, clean": GradientMix(alpha=0.5, cheap="clean"),
    "estimated, clean": GradientMix(alpha="estimate", cheap="clean"),
}


def training_passes(defense: Defense, batches: int, epochs: int) -> float:
    """Forward passes (each with its backward pass) of one training, in passes over the training data."""
    if isinstance(defense, PGDAT):
        return epochs * (STEPS + 1)
    assert isinstance(defense, GradientMix)
    attack = 0 if defense.alpha == 0 else STEPS + 1
    cheap = 2 if defense.cheap == "fgsm" else 1
    estimate = 0.0
    if defense.alpha == "estimate":  # of the probe: reference, its losses (forward alone: half), FGSM, three gradients
        each = defense.restarts * (defense.reference_steps + 0.5) + cheap + 2
        estimate = (epochs - 1) // defense.every * each * defense.probe / (batches * 128)
    return epochs * (attack + cheap) + estimate


def gradients() -> dict[str, Any]:
    data, rows = load_dataset("mnist5k"), []
    test = data["test"].take(500)
    x, y = test.images(slice(None)), torch.from_numpy(test.labels)
    for eps, epochs in BUDGETS.items():
        options = {"epochs": epochs, "batch_size": 128, "lr": 0.2, "eps": eps, "attack_steps": STEPS}
        recipe = Recipe(**options, validation_n=100, validation_steps=5, energy_n=0)
        for name, defense in DEFENSES.items():
            for seed in range(3):
                with tempfile.TemporaryDirectory() as folder:
                    begun = time.process_time()
                    train(defense, Architecture("small-cnn", data.shape, 10), data, recipe, Path(folder) / "m", seed)
                    seconds = time.process_time() - begun
                    model = load_model(str(Path(folder) / "m")).module.eval()
                    curve = json.loads((Path(folder) / "m" / "model.json").read_text())["curve"]
                with torch.no_grad():
                    clean = float((model(x).argmax(1) == y).double().mean())
                attack = PGD(eps=eps, steps=40, step_size=eps / 8)
                robust = float((~attack(model, x, y, ids=test.ids).broken).double().mean())
                row = {
                    "eps": eps,
                    "training": name,
                    "seed": seed,
                    "clean": clean,
                    "robust": robust,
                    "cpu_seconds": seconds,
                }
                row["alpha"] = [round(epoch["alpha"], 3) for epoch in curve if "alpha" in epoch]
                row["passes"] = training_passes(defense, -(-len(data["train"]) // 128), epochs)
                rows.append(row)
                print(row, flush=True)
    return {"budgets": BUDGETS, "steps": STEPS, "n": len(y), "rows": rows, "summary": by_training(rows)}


def by_training(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Over seeds; robust accuracy also against pgd-at of the same seed."""
    base = {(r["eps"], r["seed"]): r["robust"] for r in rows if r["training"] == "pgd-at"}
    out = []
    for eps, name in dict.fromkeys((r["eps"], r["training"]) for r in rows):
        mine = [r for r in rows if (r["eps"], r["training"]) == (eps, name)]
        entry = {"eps": eps, "training": name, "passes": mine[0]["passes"], "alpha": [r["alpha"] for r in mine]}
        entry |= {k: over_seeds([r[k] for r in mine]) for k in ("clean", "robust", "cpu_seconds")}
        entry["against_pgd_at"] = over_seeds([r["robust"] - base[eps, r["seed"]] for r in mine])
        out.append(entry)
    return out


def gradients_table(found: dict[str, Any]) -> str:
    budgets = " and ".join(f"{epochs} epochs at {eps}" for eps, epochs in found["budgets"].items())
    lines = [
        f"small-cnn, mnist5k, Linf, {budgets}, {found['steps']} attack steps; n = {found['n']} test images, mean over 3 seeds "
        f"[95 % t-interval over seeds] and each seed's value, percent. Passes: forward with backward, over the training data, "
        f"without validation. Alpha: of the last epoch.",
        "",
        "| eps | training | clean | robust, PGD-40 | each seed | against pgd-at | alpha | passes |",
        "| ---: | --- | ---: | ---: | --- | ---: | ---: | ---: |",
    ]
    for r in found["summary"]:
        last = [a[-1] for a in r["alpha"] if a]
        clean, robust, against = (_interval(r[k], 100) for k in ("clean", "robust", "against_pgd_at"))
        each = ", ".join(
            f"{100 * q['robust']:.1f}" for q in found["rows"] if (q["eps"], q["training"]) == (r["eps"], r["training"])
        )
        alpha = f"{np.mean(last):.2f}" if last else ""
        lines.append(
            f"| {r['eps']} | {r['training']} | {clean} | {robust} | {each} | {against} | {alpha} | {r['passes']:.1f} |"
        )
    return "\n".join(lines)


STUDIES: dict[str, tuple[Callable[[], dict[str, Any]], Callable[[dict[str, Any]], str]]] = {
    "shrinkage": (shrinkage, shrinkage_table),
    "passes": (passes, passes_table),
    "gradients": (gradients, gradients_table),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=list(STUDIES), nargs="+")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    for study in options.study:
        run, table = STUDIES[study]
        begun = time.process_time()
        found = {**run(), "cpu_seconds": time.process_time() - begun, "environment": environment()}
        (options.out / f"mixing-{study}.json").write_text(json.dumps(found, indent=1) + "\n")
        hardware = found["environment"]["hardware"]
        machine = f"{hardware.get('processor', '')}, {hardware['cores']} cores, torch {torch.__version__}, one thread."
        text = f"{table(found)}\n\n{machine}\n"
        (options.out / f"mixing-{study}.md").write_text(text)
        print(text)


if __name__ == "__main__":
    main()
