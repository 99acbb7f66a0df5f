"""Domain generalization on `digits-dg`: ERM, MixStyle, DSU and AdvStyle, leave-one-domain-out and single-source.

    python benchmarks/shift/domains.py --out benchmarks/shift/results            # all of it; interrupted, it goes on
    python benchmarks/shift/domains.py --part 1/2 & ... --part 2/2               # by two processes
    python benchmarks/shift/domains.py --table                                    # only write the tables
    python benchmarks/shift/domains.py --picture docs/figures/digits-dg.png       # only draw twenty images of each domain

Every training set is cut to the same number of images (--n), so that the two protocols and the domains do not differ in size.
The epoch is chosen on the training domains' own calibration images (training-domain validation of DomainBed); no image of an
unseen domain is looked at before the test. Same network, recipe and seeds for every method; options are the package's
defaults, which are the published ones but for AdvStyle's weight: the published product of learning rate and weight, 0.01, at
this recipe's rate of 0.05.

Written for each method: accuracy on every unseen domain, its mean and the worst over domains, as the mean over seeds with the
seeds' 95 % interval (Student), and paired differences to ERM over seeds. On one core about 15 seconds a training.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats

from defenses.trainer import CHECKPOINT_FILE, Architecture, Recipe, train
from robustbench_ext.attacks.base import build
from robustbench_ext.catalog import DEFENSES
from robustbench_ext.data import Dataset, load_dataset
from robustbench_ext.data.digits_dg import DOMAINS
from robustbench_ext.models import load_model, observe
from robustbench_ext.provenance import environment

METHODS: dict[str, dict[str, Any]] = {
    "erm": {"name": "erm"},
    "mixup": {"name": "mixup"},
    "padain": {"name": "padain"},
    "mixstyle": {"name": "mixstyle"},
    "dsu": {"name": "dsu"},
    "advstyle": {"name": "advstyle"},
    "advstyle, two branches": {"name": "advstyle", "branches": "two"},
    "advstyle, weight 0": {"name": "advstyle", "weight": 0.0},
    "advstyle, weight 0.02": {"name": "advstyle", "weight": 0.02},
    "advstyle, weight 1": {"name": "advstyle", "weight": 1.0},
}
MAIN = ("erm", "mixstyle", "dsu", "advstyle")
SIZES = "intensities.pt"  # beside an AdvStyle model: what its modules had learnt when it was chosen
PROTOCOLS = ("leave-one-out", "single-source")


@dataclass(frozen=True)
class Job:
    """One training: a method on the training domains of a protocol."""

    protocol: str
    domain: str  # the one left out, or the only one seen
    method: str
    seed: int

    @property
    def data(self) -> str:
        return f"digits-dg:{'without-' if self.protocol == 'leave-one-out' else ''}{self.domain}"

    @property
    def unseen(self) -> list[str]:
        return [d for d in DOMAINS if (d == self.domain) == (self.protocol == "leave-one-out")]


def jobs(methods: list[str], seeds: int, protocols: list[str]) -> Iterator[Job]:
    for seed in range(seeds):
        for protocol in protocols:
            for domain in DOMAINS:
                for method in methods:
                    yield Job(protocol, domain, method, seed)


def cut(data: Dataset, n: int) -> Dataset:
    return replace(data, splits={**data.splits, "train": data["train"].take(n)})


def keep_intensities(folder: Path, epoch: int) -> None:
    """If an epoch is the best so far, write what AdvStyle has learnt by then beside its model; nothing for other methods.

    (1, C, 1, 1) by "PLACE mu" and "PLACE sigma", and what they started from by "PLACE first mu" and so on. From the checkpoint
    that every epoch ends with.
    """
    content = torch.load(folder / CHECKPOINT_FILE, weights_only=True)
    found = {}
    for key, value in content["state"].items():
        place, _, what = key.removeprefix("styles.").rpartition(".")
        if what in ("scale_mu", "scale_sigma", "first_mu", "first_sigma"):
            found[f"{place} {what.removeprefix('scale_').replace('_', ' ')}"] = value
    if found and content["progress"]["best_epoch"] == epoch:
        torch.save(found, folder / SIZES)


def run(job: Job, n: int, epochs: int, network: str, folder: Path) -> dict[str, Any]:
    data = cut(load_dataset(job.data), n)
    options = dict(METHODS[job.method])
    defense = build(DEFENSES.load(options.pop("name")), job.method, options)
    recipe = Recipe(epochs=epochs, lr=0.05, validation_n=None, energy_n=0)
    name = f"{job.protocol}-{job.domain}-{job.method}-{job.seed}-{network}".replace(" ", "_").replace(",", "")
    train(
        defense,
        Architecture(network, data.shape, 10),
        data,
        recipe,
        folder / name,
        job.seed,
        on_epoch=lambda row: keep_intensities(folder / name, row["epoch"]),
    )
    model = load_model(str(folder / name)).module
    found = {}
    for domain in DOMAINS:
        test = load_dataset(f"digits-dg:{domain}")["test"]
        seen = observe(model, test.images(slice(None)), torch.from_numpy(test.labels))
        found[domain] = [int((seen.logits.argmax(1) == seen.labels).sum()), len(test)]
    return {**vars(job), "n": len(data["train"]), "epochs": epochs, "network": network, "right": found}


def student(values: list[float]) -> tuple[float, float]:
    """Mean and half of the 95 % interval over seeds."""
    if len(values) < 2:
        return statistics.mean(values), float("nan")
    half = float(stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    return statistics.mean(values), half


def accuracies(rows: list[dict[str, Any]]) -> dict[tuple[str, str, int], dict[str, float]]:
    """By (protocol, method, seed): accuracy on every (training, unseen) pair, in percent."""
    out: dict[tuple[str, str, int], dict[str, float]] = {}
    for row in rows:
        job = Job(row["protocol"], row["domain"], row["method"], row["seed"])
        pairs = out.setdefault((job.protocol, job.method, job.seed), {})
        for unseen in job.unseen:
            right, n = row["right"][unseen]
            pairs[unseen if job.protocol == "leave-one-out" else f"{job.domain} to {unseen}"] = 100 * right / n
        seen = [row["right"][d] for d in DOMAINS if d not in job.unseen]
        pairs.setdefault("seen", 0.0)
        pairs["seen"] += 100 * sum(r for r, _ in seen) / sum(n for _, n in seen) / len(DOMAINS)
    return out


def tables(rows: list[dict[str, Any]]) -> str:
    found = accuracies(rows)
    lines = []
    for protocol in PROTOCOLS:
        done = {k: v for k, v in found.items() if k[0] == protocol}
        full = max((len(v) for v in done.values()), default=0)
        methods = [m for m in METHODS if any(k[1] == m for k in done)]
        columns = [c for c in max(done.values(), key=len, default={}) if c != "seen"]
        lines += [f"## {protocol}", ""]
        head = ["method", "seeds", *columns, "mean of unseen", "worst of unseen", "mean minus ERM", "seen"]
        lines += ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
        for method in methods:
            runs = {k[2]: v for k, v in done.items() if k[1] == method and len(v) == full}
            if not runs:
                continue
            cells = [_cell([r[c] for r in runs.values()]) for c in columns]
            means = {s: statistics.mean(r[c] for c in columns) for s, r in runs.items()}
            worst = [min(r[c] for c in columns) for r in runs.values()]
            base = {k[2]: v for k, v in done.items() if k[1] == "erm" and len(v) == full}
            gains = [means[s] - statistics.mean(base[s][c] for c in columns) for s in means if s in base]
            gain = "" if method == "erm" or not gains else _cell(gains, sign=True)
            seen = _cell([r["seen"] for r in runs.values()])
            row = [method, str(len(runs)), *cells, _cell(list(means.values())), _cell(worst), gain, seen]
            lines.append("| " + " | ".join(row) + " |")
        lines.append("")
    return "\n".join(lines)


def _cell(values: list[float], sign: bool = False) -> str:
    mean, half = student(values)
    return f"{mean:{'+' if sign else ''}.1f} ± {half:.1f}" if np.isfinite(half) else f"{mean:.1f}"


def picture(file: Path, images: int = 20) -> None:
    """The first training images of every domain, one domain a row, twice their size."""
    from PIL import Image

    rows = [torch.cat(list(load_dataset(f"digits-dg:{d}")["train"].images(slice(0, images))), dim=2) for d in DOMAINS]
    pixels = (torch.cat(rows, dim=1).permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
    image = Image.fromarray(pixels)
    image.resize((2 * image.width, 2 * image.height), Image.Resampling.NEAREST).save(file, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="*", default=list(MAIN), help=f"of {', '.join(METHODS)}")
    parser.add_argument("--protocols", nargs="*", default=list(PROTOCOLS), choices=PROTOCOLS)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--n", type=int, default=1000, help="training images")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--network", default="small-cnn")
    parser.add_argument("--part", default="1/1", help="K/N: every N-th job, from the K-th on")
    parser.add_argument("--table", action="store_true", help="train nothing, write the tables")
    parser.add_argument("--runs", type=Path, default=Path("runs/shift-domains"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/shift/results"))
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    if options.picture is not None:
        picture(options.picture)
        return
    torch.set_num_threads(1)
    options.runs.mkdir(parents=True, exist_ok=True)
    part, parts = map(int, options.part.split("/"))
    done = _read(options.runs)
    keys = {(r["protocol"], r["domain"], r["method"], r["seed"], r["network"], r["n"], r["epochs"]) for r in done}
    todo = list(jobs(options.methods, options.seeds, options.protocols))[part - 1 :: parts]
    for number, job in enumerate(todo if not options.table else []):
        if (*vars(job).values(), options.network, options.n, options.epochs) in keys:
            continue
        row = run(job, options.n, options.epochs, options.network, options.runs / "models")
        with (options.runs / f"part-{part}-of-{parts}.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        unseen = {d: round(100 * row["right"][d][0] / row["right"][d][1], 1) for d in job.unseen}
        print(f"{number + 1}/{len(todo)} {job} {unseen}", flush=True)
    wanted = (options.network, options.n, options.epochs)
    rows = [r for r in _read(options.runs) if (r["network"], r["n"], r["epochs"]) == wanted]
    options.out.mkdir(parents=True, exist_ok=True)
    name = f"domains-{options.network}"
    content = {"environment": environment(), "methods": METHODS, "rows": rows}
    (options.out / f"{name}.json").write_text(json.dumps(content, indent=0))
    text = tables(rows)
    (options.out / f"{name}.md").write_text(text)
    print(text)


def _read(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for file in sorted(folder.glob("*.jsonl")) for line in file.read_text().splitlines()]


if __name__ == "__main__":
    main()
