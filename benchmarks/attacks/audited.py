"""`audited` against our own `standard` on Fashion-MNIST: cost, interval, coverage.

    RBX_DATA=... python benchmarks/attacks/audited.py --n 5000 --masked-n 2000

Two models: a small CNN trained with PGD-AT, and the same network behind a coarse quantisation of its input, which gives
gradient attacks nothing to follow. On each, every sample meets the screen and the standard ensemble; those verdicts are
saved, and the audit is repeated on them with 200 seeds to see how often its interval covers. On the first model the
audited ensemble is also run for real. Time is CPU seconds of one thread. Verdicts already saved are not computed again.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from defenses import PGDAT
from defenses.trainer import Architecture, Recipe, train, training_key
from robustbench_ext.attacks.audited import Audited, Screen
from robustbench_ext.attacks.ensemble import Standard
from robustbench_ext.attacks.losses import margin
from robustbench_ext.data import load_dataset
from robustbench_ext.metrics import audit
from robustbench_ext.metrics.intervals import wilson
from robustbench_ext.models import load_model
from robustbench_ext.provenance import environment
from robustbench_ext.randomness import SampleRandom

EPS, CHUNK, REPEATS = 0.15, 500, 200
RECIPE = {"epochs": 5, "eps": EPS, "attack_steps": 5}


class Quantised(nn.Module):
    """Rounds the input to a few levels first: robust or not, its gradients are zero."""

    def __init__(self, inner: nn.Module, levels: int = 6) -> None:
        super().__init__()
        self.inner, self.levels = inner, levels

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.inner((x * self.levels).round() / self.levels)
        return logits


def verdicts(model: nn.Module, x: Tensor, y: Tensor, ids: np.ndarray, file: Path) -> dict[str, np.ndarray]:
    """Screen and standard ensemble on every sample, chunk by chunk; what is in the file is taken from it."""
    found: dict[str, list[np.ndarray]] = {}
    for start in range(0, len(x), CHUNK):
        part = file.with_name(f"{file.stem}-{start}.npz")
        if not part.is_file():
            rows = slice(start, start + CHUNK)
            begun = time.process_time()
            screen = Screen(eps=EPS)(model, x[rows], y[rows], ids=ids[rows])
            middle = time.process_time()
            full = Standard(eps=EPS)(model, x[rows], y[rows], ids=ids[rows])
            columns = {
                "screen_broken": screen.broken.numpy(),
                "margin": margin(screen.logits, y[rows]).numpy(),
                "screen_passes": (screen.forwards + screen.backwards).numpy(),
                "broken": full.broken.numpy(),
                "broken_by": full.broken_by.numpy(),
                "passes": (full.forwards + full.backwards).numpy(),
                "screen_seconds": np.array([middle - begun]),
                "seconds": np.array([time.process_time() - middle]),
            }
            np.savez(part, **columns)
            print(
                f"{file.stem}: {start + len(screen.broken)} of {len(x)}, {time.process_time() - begun:.0f} s",
                flush=True,
            )
        with np.load(part) as saved:
            for name in saved.files:
                found.setdefault(name, []).append(saved[name])
    return {name: np.concatenate(parts) for name, parts in found.items()}


def simulate(seen: dict[str, np.ndarray], ids: np.ndarray, budget: audit.Budget, certain: float) -> dict[str, float]:
    """The audit on saved verdicts, with 200 seeds: how often the interval covers, how wide it is, what it would cost."""
    standing = ~seen["screen_broken"]
    broken = seen["broken"] & standing
    truth = float((standing & ~broken).mean())
    low, high = wilson(int((standing & ~broken).sum()), len(standing))
    covered, hidden, widths, costs, values = 0, 0, [], [], []
    for seed in range(REPEATS):
        lots = SampleRandom.of(seed, ids, "audit").uniform(()).numpy()
        code, found, level = audit.conduct(standing, seen["margin"], lots, lambda rows: broken[rows], budget, certain)
        counts = audit.count(code, seen["screen_broken"] | found, level)
        here, population = counts.here(), counts.population()
        covered += here.ci_low - 1e-12 <= truth <= here.ci_high + 1e-12
        audited = np.isin(code, (audit.TAKEN, audit.DRAWN))
        hidden += int((broken & audited & ~found).sum())
        widths.append((population.ci_high - population.ci_low) / (high - low))
        costs.append((seen["screen_passes"].sum() + seen["passes"][audited].sum()) / seen["passes"].sum())
        values.append(here.value)
    return {
        "repeats": REPEATS,
        "truth": truth,
        "mean_estimate": float(np.mean(values)),
        "covered": covered,
        "hidden_breaks": hidden,
        "mean_width_ratio": float(np.mean(widths)),
        "largest_width_ratio": float(np.max(widths)),
        "mean_cost_ratio": float(1 / np.mean(costs)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=5000)
    parser.add_argument("--masked-n", type=int, default=2000)
    parser.add_argument("--models", type=Path, default=Path("runs/benchmark-models"))
    parser.add_argument("--work", type=Path, default=Path("runs/audited"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/attacks/results"))
    parser.add_argument(
        "--only-real", action="store_true", help="keep the saved simulation, run the audited ensemble itself"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.work.mkdir(parents=True, exist_ok=True)
    options.out.mkdir(parents=True, exist_ok=True)
    data = load_dataset("torchvision:FashionMNIST")
    architecture, recipe = Architecture("small-cnn", data.shape, 10), Recipe(**RECIPE)
    folder = options.models / training_key(PGDAT(), architecture, data, recipe, 0)
    train(PGDAT(), architecture, data, recipe, folder, on_epoch=lambda row: print(row, flush=True))
    model = load_model(str(folder)).module.eval()
    report: dict[str, object] = {"environment": environment(), "eps": EPS}
    arrays: dict[str, np.ndarray] = {}
    networks = [("pgd-at", model, options.n), ("quantised", Quantised(model).eval(), options.masked_n)]
    if options.only_real:
        report |= json.loads((options.out / "audited.json").read_text())
        with np.load(options.out / "audited-verdicts.npz") as saved:
            arrays |= {name: saved[name] for name in saved.files}
        networks = []
    for name, network, n in networks:
        test = data["test"].take(n)
        x, y = test.images(slice(0, n)), torch.from_numpy(test.labels[:n])
        seen = verdicts(network, x, y, test.ids, options.work / f"{name}-{n}")
        standing = ~seen["screen_broken"]
        report[name] = {
            "n": n,
            "standard": {"robust": float((~seen["broken"]).mean()), "passes": int(seen["passes"].sum())},
            "screen": {"robust": float(standing.mean()), "passes": int(seen["screen_passes"].sum())},
            "protocol_breaks_after_screen": int((standing & seen["broken"]).sum()),
            "standard_seconds": float(seen["seconds"].sum()),
            "simulated": {
                "widening 1.3": simulate(seen, test.ids, audit.Budget(widening=1.3), Audited(eps=EPS).certain),
                "width 0.05": simulate(seen, test.ids, audit.Budget(width=0.05), Audited(eps=EPS).certain),
                "200 audited": simulate(seen, test.ids, audit.Budget(size=200), Audited(eps=EPS).certain),
            },
        }
        arrays |= {f"{name}/{k}": seen[k] for k in ("screen_broken", "broken")}
        arrays |= {f"{name}/margin": seen["margin"].astype(np.float32), f"{name}/ids": test.ids.astype(str)}
        write(options.out, report, arrays)
    test = data["test"].take(options.n)
    x, y = test.images(slice(0, options.n)), torch.from_numpy(test.labels[: options.n])
    begun = time.process_time()
    result = Audited(eps=EPS)(model, x, y, ids=test.ids)
    seconds = time.process_time() - begun
    counts = audit.count(result.extra["audit"].numpy(), result.broken.numpy(), float(result.extra["audit_level"][0]))
    found, here = counts.population(), counts.here()
    report["audited"] = {
        "what": audit.describe(counts),
        "robust": found.value,
        "interval": [found.ci_low, found.ci_high],
        "interval_here": [here.ci_low, here.ci_high],
        "passes": int(result.forwards.sum() + result.backwards.sum()),
        "seconds": seconds,
        "environment": environment(),
    }
    write(options.out, report, arrays)


def write(out: Path, report: dict[str, object], arrays: dict[str, np.ndarray]) -> None:
    (out / "audited.json").write_text(json.dumps(report, indent=1))
    np.savez_compressed(out / "audited-verdicts.npz", **arrays)
    print(json.dumps(report, indent=1), flush=True)


if __name__ == "__main__":
    main()
