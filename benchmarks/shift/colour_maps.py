"""A shift that is style and nothing else: scikit-learn's digits in one colour map, tested in five others.

    python benchmarks/shift/colour_maps.py --seeds 4                              # about ten minutes on one core
    python benchmarks/shift/colour_maps.py --seeds 4 --epochs 75 --methods "advstyle, weight 0" advstyle

Every domain is an affine map of each colour channel, so domains differ by exactly what style augmentation perturbs. One of
them is inverted: only a deviation that changes its sign prepares for that, which takes intensities as large as the images'
own deviations, so an adversary has something to find that noise of fixed size does not. One domain is trained on, with a
slight jitter of gain and bias by image; no other is looked at before the test. By this package's modules and trainer: with
the gradient's sign wrong, or the modules in the wrong place, intensities would not grow and nobody would read inverted digits.

Written for each method: accuracy in %, mean over seeds and half of the 95 % interval (Student), paired differences to weight 0,
which is noise of the same form without an adversary, and the mean intensity |S_mu| of the module on the images in the chosen
epoch, which is what the adversary has done (weight 0: what it started from).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from domains import METHODS, SIZES, _cell, keep_intensities
from torch import Tensor

from defenses.trainer import Architecture, Recipe, train
from robustbench_ext.attacks.base import build
from robustbench_ext.catalog import DEFENSES
from robustbench_ext.data import load_dataset
from robustbench_ext.data.base import ArraySplit, Dataset
from robustbench_ext.models import load_model, observe
from robustbench_ext.provenance import environment
from robustbench_ext.randomness import SampleRandom

# x -> gain x + bias, for each colour channel.
MAPS: dict[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "source": ((1.0, 0.9, 0.8), (0.0, 0.0, 0.0)),
    "inverted": ((-0.9, -0.9, -0.9), (1.0, 1.0, 1.0)),
    "red": ((0.3, 1.0, 0.2), (0.6, 0.0, 0.3)),
    "low contrast": ((0.25, 0.25, 0.25), (0.3, 0.3, 0.3)),
    "bright": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "strong": ((2.5, 0.2, 1.5), (-0.5, 0.7, 0.0)),
}
UNSEEN = [name for name in MAPS if name != "source"]
NOISE = "advstyle, weight 0"
DEFAULT = (
    "erm",
    "mixstyle",
    "dsu",
    NOISE,
    "advstyle, weight 0.02",
    "advstyle",
    "advstyle, weight 1",
    "advstyle, two branches",
)


def coloured(x: Tensor, ids: np.ndarray, name: str) -> Tensor:
    """Grey digits (N, 1, 8, 8) in a domain's colours, (N, 3, 16, 16): each pixel four times; clipped to [0, 1]."""
    gain, bias = (torch.tensor(v).reshape(1, 3, 1, 1) for v in MAPS[name])
    random = SampleRandom.of(0, ids.tolist(), f"colour-maps/{name}")
    gain = gain + 0.1 * random.child("gain").normal((3, 1, 1))
    bias = bias + 0.05 * random.child("bias").normal((3, 1, 1))
    return (gain * x + bias).clamp(0, 1).repeat_interleave(2, 2).repeat_interleave(2, 3)


def domain(name: str) -> Dataset:
    base = load_dataset("digits")
    splits = {
        part: ArraySplit(coloured(split.images(slice(None)), split.ids, name), split.labels, split.ids)
        for part, split in base.splits.items()
    }
    return Dataset(f"colour-maps:{name}", splits, base.classes, (3, 16, 16), base.source)


def run(method: str, seed: int, epochs: int, network: str) -> dict[str, Any]:
    data = domain("source")
    options = dict(METHODS[method])
    defense = build(DEFENSES.load(options.pop("name")), method, options)
    recipe = Recipe(epochs=epochs, batch_size=64, lr=0.05, schedule="cosine", validation_n=None, energy_n=0)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "model"
        train(
            defense,
            Architecture(network, data.shape, 10),
            data,
            recipe,
            out,
            seed,
            on_epoch=lambda row: keep_intensities(out, row["epoch"]),
        )
        module = load_model(str(out)).module
        kept = out / SIZES
        size = float(torch.load(kept, weights_only=True)["input mu"].abs().mean()) if kept.is_file() else None
    right = {}
    for name in MAPS:
        test = domain(name)["test"]
        seen = observe(module, test.images(slice(None)), torch.from_numpy(test.labels))
        right[name] = [int((seen.logits.argmax(1) == seen.labels).sum()), len(test)]
    return {"method": method, "seed": seed, "network": network, "epochs": epochs, "right": right, "size": size}


def tables(rows: list[dict[str, Any]]) -> str:
    head = ["method", "seeds", *MAPS, "mean of the five", "minus weight 0", "mean intensity on images"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]

    def percent(row: dict[str, Any], name: str) -> float:
        return float(100 * row["right"][name][0] / row["right"][name][1])

    def mean(row: dict[str, Any]) -> float:
        return float(np.mean([percent(row, name) for name in UNSEEN]))

    noise = {r["seed"]: mean(r) for r in rows if r["method"] == NOISE}
    for method in dict.fromkeys(r["method"] for r in rows):
        mine = [r for r in rows if r["method"] == method]
        gains = [mean(r) - noise[r["seed"]] for r in mine if r["seed"] in noise]
        gain = _cell(gains, sign=True) if gains and method != NOISE else ""
        sizes = [r["size"] for r in mine if r["size"] is not None]
        size = f"{np.mean(sizes):.2f}" if sizes else ""
        cells = [_cell([percent(r, name) for r in mine]) for name in MAPS]
        cells += [_cell([mean(r) for r in mine]), gain, size]
        lines.append("| " + " | ".join([method, str(len(mine)), *cells]) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="*", default=list(DEFAULT), help=f"of {', '.join(METHODS)}")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--network", default="small-cnn")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/shift/results"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for seed in range(options.seeds):
        for method in options.methods:
            rows.append(run(method, seed, options.epochs, options.network))
            print(rows[-1], flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    content = {"environment": environment(), "maps": MAPS, "rows": rows}
    name = f"colour-maps-{options.network}-{options.epochs}-epochs"
    (options.out / f"{name}.json").write_text(json.dumps(content, indent=0))
    (options.out / f"{name}.md").write_text(tables(rows))
    print(tables(rows))


if __name__ == "__main__":
    main()
