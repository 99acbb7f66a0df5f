"""Our `standard` ensemble and its members against the reference AutoAttack, on the same samples, in one run.

    pip install --no-deps pyautoattack
    python benchmarks/attacks/run.py --n 1000 --out benchmarks/attacks/results

Both work on the same model with one thread, in turns, chunk by chunk; time is CPU seconds of the process. Written for
every case: robust accuracies, samples on which the verdicts differ (per sample, in a CSV), seconds and their ratio.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from defenses import PGDAT, TRADES, Standard
from defenses.trainer import Architecture, Recipe, train, training_key
from robustbench_ext.attacks.apgd import APGDCE, APGDT
from robustbench_ext.attacks.ensemble import Standard as StandardEnsemble
from robustbench_ext.attacks.fab import FABT
from robustbench_ext.attacks.square import Square
from robustbench_ext.data import load_dataset
from robustbench_ext.metrics.intervals import wilson
from robustbench_ext.models import load_model
from robustbench_ext.provenance import environment

# The residual network is narrow (width 6 instead of 16): the reference needs hours for 1,000 samples of the wider one.
KWARGS = {"small-resnet": {"width": 6}}
CASES = {  # name: (defense, network, recipe, norm, eps)
    "standard small-cnn": (Standard(), "small-cnn", {"epochs": 10, "eps": 0.2}, "Linf", 0.2),
    "trades small-cnn": (TRADES(beta=6), "small-cnn", {"epochs": 20, "eps": 0.2, "attack_steps": 7}, "Linf", 0.2),
    "trades small-resnet": (TRADES(beta=6), "small-resnet", {"epochs": 15, "eps": 0.2, "attack_steps": 5}, "Linf", 0.2),
    "pgd-at small-cnn, L2": (
        PGDAT(),
        "small-cnn",
        {"epochs": 15, "eps": 1.5, "norm": "L2", "attack_steps": 7},
        "L2",
        1.5,
    ),
}
PARTS = ("standard", "apgd-ce", "apgd-t", "fab-t", "square")
MEMBERS = {"apgd-ce": APGDCE, "apgd-t": APGDT, "fab-t": FABT, "square": Square}


def ours(part: str, model: nn.Module, norm: str, eps: float) -> Callable[[Tensor, Tensor, np.ndarray], np.ndarray]:
    attack = StandardEnsemble(eps=eps, norm=norm) if part == "standard" else MEMBERS[part](eps=eps, norm=norm)
    return lambda x, y, ids: (~attack(model, x, y, ids=ids, batch_size=250).broken).numpy()


def reference(part: str, model: nn.Module, norm: str, eps: float) -> Callable[[Tensor, Tensor, np.ndarray], np.ndarray]:
    from pyautoattack import AutoAttack

    def run(x: Tensor, y: Tensor, ids: np.ndarray) -> np.ndarray:
        attack = AutoAttack(model, norm=norm, eps=eps, version="standard", device="cpu", seed=0)
        attack.verbose = False
        if part != "standard":
            attack.attacks_to_run = [part]
        x_adv, _ = attack.run_standard_evaluation(x, y, batch_size=250)
        with torch.no_grad():
            clean, adversarial = model(x).argmax(1) == y, model(x_adv).argmax(1) == y
        return (clean & adversarial).numpy()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--chunk", type=int, default=250)
    parser.add_argument("--cases", nargs="*", default=list(CASES))
    parser.add_argument("--parts", nargs="*", default=list(PARTS))
    parser.add_argument("--models", type=Path, default=Path("runs/benchmark-models"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/attacks/results"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = load_dataset("mnist5k")
    test = data["test"].take(options.n)
    options.out.mkdir(parents=True, exist_ok=True)
    rows, verdicts = [], {"id": test.ids.tolist()}
    for case in options.cases:
        defense, network, recipe, norm, eps = CASES[case]
        architecture = Architecture(network, data.shape, 10, kwargs=KWARGS.get(network))
        folder = options.models / training_key(defense, architecture, data, Recipe(**recipe), 0)
        train(defense, architecture, data, Recipe(**recipe), folder)
        model = load_model(str(folder)).module.eval()
        for part in options.parts:
            runs = {"ours": ours(part, model, norm, eps), "reference": reference(part, model, norm, eps)}
            robust, seconds = {k: [] for k in runs}, dict.fromkeys(runs, 0.0)
            for start in range(0, len(test), options.chunk):
                rows_here = slice(start, min(start + options.chunk, len(test)))
                x, y = test.images(rows_here), torch.from_numpy(test.labels[rows_here])
                for name, run in runs.items():
                    begun = time.process_time()
                    robust[name].append(run(x, y, test.ids[rows_here]))
                    seconds[name] += time.process_time() - begun
            a, b = (np.concatenate(robust[k]) for k in ("ours", "reference"))
            row = {
                "case": case,
                "attack": part,
                "norm": norm,
                "eps": eps,
                "n": len(a),
                "robust_ours": float(a.mean()),
                "ci_ours": wilson(int(a.sum()), len(a)),
                "robust_reference": float(b.mean()),
                "only_reference_breaks": int((a & ~b).sum()),
                "only_ours_breaks": int((~a & b).sum()),
                "seconds_ours": seconds["ours"],
                "seconds_reference": seconds["reference"],
                "speedup": seconds["reference"] / seconds["ours"],
            }
            rows.append(row)
            verdicts[f"{case} / {part} / ours"] = a.astype(int).tolist()
            verdicts[f"{case} / {part} / reference"] = b.astype(int).tolist()
            print(
                f"{case:<22} {part:<9} robust {row['robust_ours']:.3f} / {row['robust_reference']:.3f}  "
                f"missed {row['only_reference_breaks']:>2}  gained {row['only_ours_breaks']:>2}  "
                f"{row['seconds_ours']:7.1f} s / {row['seconds_reference']:7.1f} s = x{row['speedup']:.2f}",
                flush=True,
            )
            write(options.out, rows, verdicts)


def write(out: Path, rows: list[dict[str, object]], verdicts: dict[str, list[object]]) -> None:
    (out / "results.json").write_text(json.dumps({"environment": environment(), "rows": rows}, indent=1))
    with (out / "verdicts.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(verdicts)
        writer.writerows(zip(*verdicts.values(), strict=True))
    hardware = environment()["hardware"]
    lines = [
        f"mnist5k test, one thread, CPU seconds, {hardware.get('processor')}, torch {torch.__version__}. "
        "Missed: robust for us, broken by the reference. Gained: the other way round.",
        "",
        "| case | attack | n | robust, ours | robust, reference | missed | gained | s, ours | s, reference | speed-up |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for r in rows:
        low, high = r["ci_ours"]  # type: ignore[misc]
        lines.append(
            f"| {r['case']}, {r['norm']} {r['eps']} | {r['attack']} | {r['n']} "
            f"| {r['robust_ours']:.3f} [{low:.3f}, {high:.3f}] | {r['robust_reference']:.3f} | {r['only_reference_breaks']} "
            f"| {r['only_ours_breaks']} | {r['seconds_ours']:.1f} | {r['seconds_reference']:.1f} | {r['speedup']:.2f} |"
        )
    (out / "results.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
