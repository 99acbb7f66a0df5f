"""Is it the method or the data? Single-source networks of `domains.py` under shifts of style alone, and domains without them.

    python benchmarks/shift/domains.py --methods erm mixstyle dsu advstyle     # first: trains, or takes what is there
    python benchmarks/shift/style_control.py --out benchmarks/shift/results    # then: minutes

Four questions, to the same networks:

1. What does a method gain where the shift is nothing but style? The domain's own test images under affine changes of each
   colour channel: contrast, brightness, colour casts; and, apart from these, inverted, which is a change of sign.
2. How much of the gap to other domains is style? Every image of another domain gets each channel's mean and deviation of an
   image of the training domain, drawn at random: what style augmentation prepares for is gone, the rest is not. The five
   styles are treated alike, as a check that this does remove a style. And with the sign of the contrast put right: where the
   training domain has light digits on black, images with a frame brighter than their inside are inverted.
3. How far apart are domains where the modules hang? The shift of each channel's mean statistics, in standard deviations
   over images of the training domain (ERM), median over channels.
4. What has the adversary learnt? The intensity over what it started from, median over channels, and the same shifts in
   intensities: below 1 or 2, the noise of training covers them. From the intensities that `domains.py` keeps beside AdvStyle
   models (models that it trained before it kept them have none).
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from domains import DOMAINS, MAIN, METHODS, SIZES, _cell
from torch import Tensor, nn

from defenses import DSUModule
from defenses.style import INPUT, make_styles, restyle, style_of
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
CLEAN, INVERTED = "unchanged", "inverted"
BLACK_GROUND = ("mnist", "optical")  # training domains whose contrast has one sign
FRAME = 3  # pixels


def styled(name: str) -> Callable[[Tensor], Tensor]:
    scale, shift = (torch.tensor(v).reshape(1, 3, 1, 1) for v in STYLES[name])
    return lambda x: (scale * x + shift).clamp(0, 1)


def in_style_of(x: Tensor, source: Tensor) -> Tensor:
    """Images with every channel's mean and deviation of a source image each, drawn at random with a fixed seed."""
    other = source[torch.randint(len(source), (len(x),), generator=torch.Generator().manual_seed(0))]
    return restyle(x, *style_of(x), *style_of(other)).clamp(0, 1)


def dark_ground(x: Tensor) -> Tensor:
    """Images, inverted where their frame is brighter than their inside; labels have no part in it."""
    grey, frame = x.mean(dim=1), torch.ones(x.shape[2:], dtype=torch.bool)
    frame[FRAME:-FRAME, FRAME:-FRAME] = False
    light = grey[:, frame].mean(dim=1) > grey[:, ~frame].mean(dim=1)
    return torch.where(light[:, None, None, None], 1 - x, x)


def place_statistics(module: nn.Module, x: Tensor, places: Sequence[str]) -> dict[str, Tensor]:
    """Means and deviations (N, C) of every channel of the maps at each place, by "PLACE mu" and "PLACE sigma"."""
    layers, maps = dict(module.named_modules()), {INPUT: x}

    def keep(place: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(_layer: nn.Module, _inputs: Any, output: Tensor) -> None:
            maps[place] = output

        return hook

    hooks = [layers[place].register_forward_hook(keep(place)) for place in places if place != INPUT]
    try:
        with torch.no_grad():
            module(x)
    finally:
        for hook in hooks:
            hook.remove()
    found = {}
    for place in places:
        mu, sigma = style_of(maps[place])
        found |= {f"{place} mu": mu[..., 0, 0], f"{place} sigma": sigma[..., 0, 0]}
    return found


def shifts(
    here: dict[str, Tensor], there: dict[str, Tensor], unit: dict[str, Tensor] | None = None
) -> dict[str, float]:
    """By place and statistic: how far its mean moved, in standard deviations over images or in `unit`; median over channels."""
    moved = {}
    for key, before in here.items():
        size = before.std(dim=0) if unit is None else unit[key].abs().flatten()
        seen = size > 1e-6
        moved[key] = float(((there[key].mean(0) - before.mean(0)).abs() / size)[seen].median())
    return moved


def evaluate(runs: Path, methods: list[str], seeds: int, network: str) -> list[dict[str, Any]]:
    rows = []
    tests = {d: load_dataset(f"digits-dg:{d}")["test"] for d in DOMAINS}
    images = {d: test.images(slice(None)) for d, test in tests.items()}
    labels = {d: torch.from_numpy(test.labels) for d, test in tests.items()}
    for domain, x in images.items():
        others = [d for d in DOMAINS if d != domain]
        y = labels[domain]
        seen = {CLEAN: (x, y), INVERTED: (1 - x, y)}
        for style in STYLES:
            seen[style] = (styled(style)(x), y)
            seen[f"{style}, own style"] = (in_style_of(styled(style)(x), x), y)
        for other in others:
            seen[other] = (images[other], labels[other])
            seen[f"{other}, own style"] = (in_style_of(images[other], x), labels[other])
            if domain in BLACK_GROUND:
                seen[f"{other}, dark ground"] = (dark_ground(images[other]), labels[other])
        for method in methods:
            for seed in range(seeds):
                name = f"single-source-{domain}-{method}-{seed}-{network}".replace(" ", "_").replace(",", "")
                module = load_model(str(runs / "models" / name)).module.eval()
                right = {
                    what: int((observe(module, v, t).logits.argmax(1) == t).sum()) for what, (v, t) in seen.items()
                }
                row: dict[str, Any] = {"domain": domain, "method": method, "seed": seed, "right": right}
                row["n"] = {what: len(t) for what, (_, t) in seen.items()}
                sizes = runs / "models" / name / SIZES
                if method == "erm" or sizes.is_file():
                    places = [place.replace("/", ".") for place in make_styles(module, DSUModule, (), x.shape[1:])]
                    here = place_statistics(module, x, places)
                    unit = torch.load(sizes, weights_only=True) if sizes.is_file() else None
                    moved = {what: place_statistics(module, seen[what][0], places) for what in (*STYLES, *others)}
                    row["shift"] = {what: shifts(here, there, unit) for what, there in moved.items()}
                    if unit is not None:
                        row["grown"] = {
                            key: float((unit[key].abs() / unit[key.replace(" ", " first ")]).median()) for key in here
                        }
                rows.append(row)
        print(domain, flush=True)
    return rows


def tables(rows: list[dict[str, Any]]) -> str:
    methods = [m for m in METHODS if any(r["method"] == m for r in rows)]
    seeds = sorted({r["seed"] for r in rows})

    def accuracies(
        method: str, names: Callable[[str], Sequence[str]], sources: Sequence[str] = tuple(DOMAINS)
    ) -> list[float]:
        """In percent by seed, mean over training domains and over what `names` names for each."""
        mine = [r for r in rows if r["method"] == method and r["domain"] in sources]
        return [
            statistics.mean(
                100 * r["right"][w] / r["n"][w] for r in mine if r["seed"] == seed for w in names(r["domain"])
            )
            for seed in seeds
        ]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cells) + " |"

    def table(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
        return [line(head), "|" + " --- |" * len(head), *map(line, body), ""]

    body = []
    erm = accuracies("erm", lambda _: list(STYLES))
    for method in methods:
        whole = accuracies(method, lambda _: list(STYLES))
        gain = "" if method == "erm" else _cell([a - b for a, b in zip(whole, erm, strict=True)], sign=True)
        columns = [accuracies(method, lambda _, s=s: [s]) for s in (CLEAN, *STYLES)]
        body.append([method, str(len(seeds)), *map(_cell, columns), _cell(whole), gain])
        body[-1].append(_cell(accuracies(method, lambda _: [INVERTED])))
    text = ["## Own domain, other style", ""]
    text += table(["method", "seeds", CLEAN, *STYLES, "mean of the five", "minus ERM", INVERTED], body)

    def others(suffix: str) -> Callable[[str], Sequence[str]]:
        return lambda domain: [d + suffix for d in DOMAINS if d != domain]

    own, dark = ", own style", ", dark ground"
    pairs = (
        (lambda _: list(STYLES), lambda _: [s + own for s in STYLES], tuple(DOMAINS)),
        (others(""), others(own), tuple(DOMAINS)),
        (others(""), others(dark), BLACK_GROUND),
    )
    body = []
    for method in methods:
        body.append([method])
        for before, after, sources in pairs:
            as_is, changed = accuracies(method, before, sources), accuracies(method, after, sources)
            body[-1] += [_cell(as_is), _cell([b - a for a, b in zip(as_is, changed, strict=True)], sign=True)]
    text += ["## How much of the gap is style", ""]
    text += table(
        [
            "method",
            "five styles",
            "in the training domain's style",
            "other domains",
            "in the training domain's style",
            f"others, from {' and '.join(BLACK_GROUND)}",
            "with the contrast's sign put right",
        ],
        body,
    )

    def medians(mine: list[dict[str, Any]], names: Sequence[str]) -> list[str]:
        keys = list(next(iter(mine[0]["shift"].values())))
        return [
            f"{statistics.median(r['shift'][w][k] for r in mine for w in names if w in r['shift']):.2f}" for k in keys
        ]

    for method in methods:
        mine = [r for r in rows if r["method"] == method and "shift" in r]
        if not mine:
            continue
        unit = "intensities" if "grown" in mine[0] else "standard deviations over images"
        body = [["five styles", *medians(mine, list(STYLES))], ["other domains", *medians(mine, list(DOMAINS))]]
        if "grown" in mine[0]:
            keys = list(mine[0]["grown"])
            grown = [f"{statistics.median(r['grown'][k] for r in mine):.2f}" for k in keys]
            body.append(["intensity over what it started from", *grown])
        text += [f"## Shift of statistics, {method}: {unit}, median of {len(mine)} networks", ""]
        text += table(["", *next(iter(mine[0]["shift"].values()))], body)
    return "\n".join(text)


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
