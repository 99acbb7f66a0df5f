"""Is it the method or the data? Single-source networks of `domains.py` under shifts that are nothing but style.

    python benchmarks/shift/domains.py --methods erm mixstyle dsu advstyle     # first: trains, or takes what is there
    python benchmarks/shift/style_control.py --out benchmarks/shift/results    # then: minutes

Every network that was trained on one domain sees that domain's own test images under affine changes of each colour channel
(contrast, brightness, colour casts): the same shapes, other channel statistics, which is what AdvStyle, MixStyle and DSU
prepare for. Beside it stands, for the same networks and the other domains, how far the channel statistics of the images and
of the first two activations are from the training domain's, in standard deviations over that domain's own images.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from domains import DOMAINS, MAIN, METHODS, _cell
from torch import Tensor, nn

from robustbench_ext.data import load_dataset
from robustbench_ext.models import load_model, observe
from robustbench_ext.provenance import environment

# x -> scale x + shift, for each colour channel.
STYLES: dict[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "low contrast": ((0.3, 0.3, 0.3), (0.35, 0.35, 0.35)),
    "dark": ((0.35, 0.35, 0.35), (0.0, 0.0, 0.0)),
    "bright": ((0.4, 0.4, 0.4), (0.6, 0.6, 0.6)),
    "red cast": ((1.0, 0.3, 0.3), (0.0, 0.0, 0.0)),
    "blue haze": ((0.5, 0.5, 0.5), (0.0, 0.15, 0.5)),
}


def styled(name: str) -> Callable[[Tensor], Tensor]:
    scale, shift = (torch.tensor(v).reshape(1, 3, 1, 1) for v in STYLES[name])
    return lambda x: (scale * x + shift).clamp(0, 1)


def channel_statistics(module: nn.Module, x: Tensor) -> Tensor:
    """Means and standard deviations (N, d) of every channel of the images and of the first two activations' maps."""
    kept = [x]
    activations = [m for m in module.modules() if isinstance(m, nn.ReLU)][:2]
    hooks = [m.register_forward_hook(lambda _m, _i, out: kept.append(out)) for m in activations]
    try:
        with torch.no_grad():
            module(x)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.cat([part for maps in kept for part in (maps.mean((2, 3)), maps.std((2, 3)))], 1)


def distance(module: nn.Module, source: Tensor, other: Tensor) -> float:
    """Median over channels of how far the mean statistics moved, in standard deviations over the source's images."""
    here, there = channel_statistics(module, source), channel_statistics(module, other)
    moved = (there.mean(0) - here.mean(0)).abs() / here.std(0)
    return float(moved[here.std(0) > 1e-6].median())


def evaluate(runs: Path, methods: list[str], seeds: int, network: str) -> list[dict[str, Any]]:
    rows = []
    for domain in DOMAINS:
        test = load_dataset(f"digits-dg:{domain}")["test"]
        x, y = test.images(slice(None)), torch.from_numpy(test.labels)
        others = {d: load_dataset(f"digits-dg:{d}")["test"].images(slice(None)) for d in DOMAINS if d != domain}
        for method in methods:
            for seed in range(seeds):
                name = f"single-source-{domain}-{method}-{seed}-{network}".replace(" ", "_").replace(",", "")
                module = load_model(str(runs / "models" / name)).module.eval()
                right = {"clean": x, **{s: styled(s)(x) for s in STYLES}}
                accuracy = {s: int((observe(module, v, y).logits.argmax(1) == y).sum()) for s, v in right.items()}
                row = {"domain": domain, "method": method, "seed": seed, "n": len(y), "right": accuracy}
                if method == "erm":
                    row["distance"] = {s: distance(module, x, styled(s)(x)) for s in STYLES}
                    row["distance"] |= {d: distance(module, x, v) for d, v in others.items()}
                rows.append(row)
        print(domain, flush=True)
    return rows


def tables(rows: list[dict[str, Any]]) -> str:
    methods = [m for m in METHODS if any(r["method"] == m for r in rows)]
    seeds = sorted({r["seed"] for r in rows})

    def mean(method: str, seed: int, style: str | None) -> float:
        """Accuracy in percent, over domains, and over styles for None."""
        mine = [r for r in rows if (r["method"], r["seed"]) == (method, seed)]
        names = list(STYLES) if style is None else [style]
        return statistics.mean(100 * r["right"][s] / r["n"] for r in mine for s in names)

    head = ["method", "seeds", "unchanged", *STYLES, "mean of the five", "minus ERM"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for method in methods:
        whole = [mean(method, s, None) for s in seeds]
        gains = [a - mean("erm", s, None) for a, s in zip(whole, seeds, strict=True)]
        cells = [_cell([mean(method, s, style) for s in seeds]) for style in ("clean", *STYLES)]
        gain = "" if method == "erm" else _cell(gains, sign=True)
        lines.append("| " + " | ".join([method, str(len(seeds)), *cells, _cell(whole), gain]) + " |")
    found = [r["distance"] for r in rows if "distance" in r]
    lines += [
        "",
        "Distance of channel statistics (ERM networks; standard deviations over images of the training domain):",
        "",
    ]
    for what, names in (("styles", list(STYLES)), ("other domains", list(DOMAINS))):
        values = [d[n] for d in found for n in names if n in d]
        lines.append(f"- {what}: mean {np.mean(values):.2f}, from {np.min(values):.2f} to {np.max(values):.2f}")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="*", default=list(MAIN))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--network", default="small-cnn")
    parser.add_argument("--runs", type=Path, default=Path("runs/shift-domains"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/shift/results"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = evaluate(options.runs, options.methods, options.seeds, options.network)
    text = tables(rows)
    content = {"environment": environment(), "styles": STYLES, "rows": rows}
    (options.out / f"style-control-{options.network}.json").write_text(json.dumps(content, indent=0))
    (options.out / f"style-control-{options.network}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
