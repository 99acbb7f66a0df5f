"""Split-point self-consistency where the truth is known, and what it costs.

    python benchmarks/uq/split_point.py                       # about half an hour of one core
    python benchmarks/uq/split_point.py --only cost classes   # some of the parts; the others keep their last results

cubic    y = x^3 + noise on [-4, 4], tested on [-6, 6], ten seeds: lognormal(1.5, 1), N(0, 8) and triangular(0, 0, 60), each
         centred. The triangular noise's published parameters are unknown, these are ours. Inputs are flagged where SDS is
         above its mean on the calibration samples.
truth    y = 2 sin(1.5 x) + s(x) e, s = 0.1 + 0.1 (x + 4), on [-4, -1] and [1, 4]: aleatoric against the true E|y - f| of both
         sides, epistemic against the distance from the data, on [-7, 7]; options compared, five seeds.
classes  two normal inputs, three classes of known probabilities, logits twice too large: the corrections compared, three seeds.
cost     CPU time of reading logits, uncertainties and heads, over that of the model's forward pass alone.

Intervals are 95 % t-intervals over training seeds. Written: results/split-point.json and .md, docs/figures/split-point.png.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr, t
from torch import Tensor, nn

from robustbench_ext.metrics import calibration
from robustbench_ext.metrics.detection import auroc
from robustbench_ext.models import Observations, load_model, observe
from robustbench_ext.provenance import environment
from uq import TemperatureScaling
from uq.regression import NOMINAL, Samples
from uq.split_point import SplitPointRegressor, samples_of, side_coverage
from uq.split_point_classifier import SplitPointClassifier

PUBLISHED = {"residuals": "train", "steps": 5000, "batch_size": 1 << 20}
TAP = "penultimate"


def mean_interval(values: list[float], bounds: tuple[float, float] = (-np.inf, np.inf)) -> list[float]:
    """Mean and 95 % t-interval over seeds, cut to what the value can be."""
    n, centre = len(values), statistics.mean(values)
    half = float(t.ppf(0.975, n - 1)) * statistics.stdev(values) / n**0.5
    return [round(float(v), 4) for v in (centre, max(bounds[0], centre - half), min(bounds[1], centre + half))]


def geometric_interval(values: list[float]) -> list[float]:
    """Geometric mean and its t-interval, for what differs by orders of magnitude between seeds."""
    return [round(float(np.exp(v)), 5) for v in mean_interval([float(np.log(v)) for v in values])]


def network(x: np.ndarray, y: np.ndarray, seed: int, steps: int) -> nn.Module:
    """64-64 ReLU, MSE, Adam 1e-3 with decay 1e-4 on all samples, as published."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(1, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
    adam = torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=1e-4)
    inputs, targets = torch.from_numpy(x).float(), torch.from_numpy(y).float()[:, None]
    for _ in range(steps):
        adam.zero_grad()
        (model(inputs) - targets).square().mean().backward()
        adam.step()
    return model


# The cubic toy ---------------------------------------------------------------------------------------------------------

NOISE: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "lognormal": lambda rng, n: rng.lognormal(1.5, 1, n) - np.exp(2),
    "gaussian": lambda rng, n: rng.normal(0, 8, n),
    "triangular": lambda rng, n: rng.triangular(0, 0, 60, n) - 20,
}
CUBIC: dict[str, dict[str, Any]] = {
    "default": {},
    "default, calibrated": {"calibrate": True},
    "training residuals": {"residuals": "train"},
    "as published": PUBLISHED,
}


def cubic(seeds: int) -> list[dict[str, Any]]:
    rows: dict[tuple[str, str], list[dict[str, float]]] = {}
    for noise, draw in NOISE.items():
        for seed in range(seeds):
            rng = np.random.default_rng(seed)

            def sample(n: int, end: float, rng: np.random.Generator = rng, draw: Any = draw) -> Any:
                x = rng.uniform(-end, end, (n, 1))
                return x, x[:, 0] ** 3 + draw(rng, n)

            (x, y), held, test = sample(2000, 4), sample(2000, 4), sample(1000, 6)
            model = network(x, y, seed, 5000)
            train, held_out, met = (samples_of(model, *part, tap=TAP) for part in ((x, y), held, test))
            for label, options in CUBIC.items():
                kind = SplitPointRegressor(**options).fit(train, held_out, seed=seed)
                rows.setdefault((noise, label), []).append(_cubic_row(kind, held_out, met))
    return [_cubic_mean(noise, label, found) for (noise, label), found in rows.items()]


def _cubic_mean(noise: str, label: str, found: list[dict[str, float]]) -> dict[str, Any]:
    shares = ("coverage", "above", "below", "flagged inside", "flagged outside")
    row: dict[str, Any] = {"noise": noise, "options": label, "seeds": len(found)}
    for name in found[0]:
        row[name] = mean_interval([f[name] for f in found], (0.0, 1.0 if name in shares else np.inf))
    ratios = [round(f["uncertain / certain RMSE"], 2) for f in found]
    return row | {"seeds below 1.5": sum(r < 1.5 for r in ratios), "ratios": ratios}


def _cubic_row(kind: SplitPointRegressor, held_out: Samples, met: Samples) -> dict[str, float]:
    made, r = kind.predict(met), targets(met) - met.prediction
    inside = np.abs(met.x[:, 0]) <= 4
    flagged = made.epistemic > kind.predict(held_out).epistemic.mean()
    up, down = made.high[:, -1] - made.point, made.point - made.low[:, -1]
    above, below, total = side_coverage(r[inside], up[inside], down[inside])
    rmse = [float(np.sqrt(np.square(r[group]).mean())) for group in (flagged, ~flagged)]
    return {
        "coverage": total,
        "above": above,
        "below": below,
        "width": float((up + down)[inside].mean()),
        "up": float(up[inside].mean()),
        "down": float(down[inside].mean()),
        "RMSE inside": float(np.sqrt(np.square(r[inside]).mean())),
        "uncertain / certain RMSE": rmse[0] / rmse[1],
        "flagged inside": float(flagged[inside].mean()),
        "flagged outside": float(flagged[~inside].mean()),
    }


def targets(samples: Samples) -> np.ndarray:
    assert samples.y is not None
    return samples.y


# Known truth -----------------------------------------------------------------------------------------------------------

TRUTH: dict[str, dict[str, Any]] = {
    "default": {},
    "pinball": {"loss": "pinball"},
    "early stopping": {"early_stopping": True},
    "all samples a step": {"batch_size": 1 << 20},
    "training residuals": {"residuals": "train"},
}
SHARES = ("coverage 0.95", "AUROC gap", "AUROC outside")
RINGS = (0.0, 0.5, 1.0, 2.0, 3.0)
GRID = np.linspace(-7, 7, 561)


def signal(x: np.ndarray) -> np.ndarray:
    return np.asarray(2 * np.sin(1.5 * x))


def spread(x: np.ndarray) -> np.ndarray:
    return np.asarray(0.1 + 0.1 * (x + 4))


def distance(x: np.ndarray) -> np.ndarray:
    """From the training inputs' range, [-4, -1] and [1, 4]."""
    return np.maximum(np.maximum(1 - np.abs(x), np.abs(x) - 4), 0)


def truth(seeds: int) -> dict[str, Any]:
    found: dict[tuple[int, str], list[dict[str, Any]]] = {}
    drawn: dict[str, Any] = {}
    for n in (1000, 200):
        for seed in range(seeds):
            rng = np.random.default_rng(seed)

            def sample(size: int, rng: np.random.Generator = rng) -> tuple[np.ndarray, np.ndarray]:
                x = rng.choice([-1, 1], size) * rng.uniform(1, 4, size)
                return x[:, None], signal(x) + spread(x) * rng.normal(size=size)

            x, y = sample(1000)
            model = network(x, y, seed, 2000)
            train, held, test = (samples_of(model, *d, tap=TAP) for d in ((x, y), sample(n), sample(4000)))
            grid = samples_of(model, GRID[:, None], tap=TAP)
            for label, options in TRUTH.items():
                kind = SplitPointRegressor(**options).fit(train, held, seed=seed)
                row, curve = _truth_row(kind, test, grid)
                found.setdefault((n, label), []).append(row)
                if (n, label) == (1000, "default"):
                    drawn.setdefault("curves", []).append(curve)
                    drawn.setdefault("data", (train.x[:, 0], targets(train)))
    return {"rows": [_truth_mean(n, label, rows) for (n, label), rows in found.items()], "drawn": drawn}


def _truth_row(kind: SplitPointRegressor, test: Samples, grid: Samples) -> tuple[dict[str, Any], dict[str, Any]]:
    made, wide = kind.predict(test), kind.predict(grid)
    x, y, true = test.x[:, 0], targets(test), 2 * np.sqrt(2 / np.pi) * spread(test.x[:, 0])
    tenth = np.argsort(np.argsort(x)) * 10 // len(x)
    local = []
    for i, nominal in enumerate(NOMINAL):
        inside = (made.low[:, i] <= y) & (y <= made.high[:, i])
        local.append(float(np.mean([abs(inside[tenth == b].mean() - nominal) for b in range(10)])))
    low, high, alpha = made.low[:, -1], made.high[:, -1], 1 - NOMINAL[-1]
    score = (high - low + 2 / alpha * (np.maximum(low - y, 0) + np.maximum(y - high, 0))).mean()
    far, sds = distance(GRID), wide.epistemic
    gap, outside = np.abs(GRID) < 1, np.abs(GRID) > 4
    known = sds[far == 0]
    rings = {"0": float(known.mean())}
    for near, end in pairwise(RINGS):
        for place, where in (("gap", gap), ("outside", outside)):
            ring = where & (far > near) & (far <= end)
            if ring.any():
                rings[f"{place} {near:g}-{end:g}"] = float(sds[ring].mean())
    row = {
        "correlation": float(np.corrcoef(made.aleatoric, true)[0, 1]),
        "slope": float(np.polyfit(true, made.aleatoric, 1)[0]),
        "local coverage error": float(np.mean(local)),
        "coverage 0.95": float(((low <= y) & (y <= high)).mean()),
        "interval score 0.95": float(score),
        "AUROC gap": auroc(known, sds[gap]).value,
        "AUROC outside": auroc(known, sds[outside]).value,
        "rank correlation with distance": float(spearmanr(sds, far)[0]),
        "rank correlation outside": float(spearmanr(sds[outside], far[outside])[0]),
        "rings": rings,
        "tenths": [[float(true[tenth == b].mean()), float(made.aleatoric[tenth == b].mean())] for b in range(10)],
    }
    curve = {
        "sds": sds,
        "aleatoric": wide.aleatoric,
        "point": wide.point,
        "low": wide.low[:, -1],
        "high": wide.high[:, -1],
    }
    return row, curve


def _truth_mean(n: int, label: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    plain = {}
    for name in rows[0]:
        if name not in ("rings", "tenths"):
            bounds = (0.0, 1.0) if name in SHARES else (-1.0, 1.0) if "correlation" in name else (-np.inf, np.inf)
            plain[name] = mean_interval([r[name] for r in rows], bounds)
    rings = {k: geometric_interval([r["rings"][k] for r in rows]) for k in rows[0]["rings"]}
    tenths = [[*mean_interval([r["tenths"][b][i] for r in rows])] for b in range(10) for i in (0, 1)]
    return {"calibration n": n, "options": label, "seeds": len(rows), **plain, "rings": rings, "tenths": tenths}


def figure(drawn: dict[str, Any], row: dict[str, Any], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    one = drawn["curves"][0]
    fig, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.1), layout="constrained")
    for axis in (left, right):
        for begin, end in ((-4, -1), (1, 4)):
            axis.axvspan(begin, end, color="#e8edf3", lw=0)
        axis.set(xlabel="x", xlim=(-7, 7))
    left.plot(*drawn["data"], ".", ms=1.5, color="#7a8794")
    left.plot(GRID, one["point"], color="#1f4e79", lw=1.2)
    left.fill_between(GRID, one["low"], one["high"], color="#1f4e79", alpha=0.2, lw=0)
    left.set(title="prediction, interval 0.95 (seed 0)", ylabel="y", ylim=(-7, 7))
    tenths = np.array(row["tenths"]).reshape(10, 2, 3)
    middle.errorbar(
        tenths[:, 0, 0],
        tenths[:, 1, 0],
        yerr=[tenths[:, 1, 0] - tenths[:, 1, 1], tenths[:, 1, 2] - tenths[:, 1, 0]],
        fmt="o",
        ms=4,
        color="#1f4e79",
        capsize=2,
    )
    ends = [0, 1.05 * tenths[:, 0, 0].max()]
    middle.plot(ends, ends, color="#7a8794", lw=0.8)
    middle.set(title="aleatoric, tenths of the inputs", xlabel="true U + D", ylabel="estimated U + D")
    for curve in drawn["curves"]:
        right.semilogy(GRID, np.maximum(curve["sds"], 1e-6), lw=0.7, alpha=0.7)
    right.set(title="epistemic (SDS), each seed", ylim=(1e-5, None))
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=90, metadata={"Software": None})


# Classes of known probabilities ----------------------------------------------------------------------------------------


def class_data(n: int, g: torch.Generator) -> tuple[Observations, Tensor]:
    x = torch.randn(n, 2, generator=g)
    true = torch.stack([1.2 * x[:, 0], 1.2 * x[:, 1], 0.3 * x[:, 1] - x[:, 0]], dim=1)
    y = torch.multinomial(true.softmax(dim=1), 1, generator=g)[:, 0]
    return Observations(2 * true, y, {TAP: x}), true.double().softmax(dim=1)


def classes(seeds: int) -> list[dict[str, Any]]:
    found: dict[tuple[int, str], list[list[float]]] = {}
    for n in (3000, 200):
        for seed in range(seeds):
            g = torch.Generator().manual_seed(seed)
            (fit, _), (test, true) = class_data(n, g), class_data(3000, g)

            def note(label: str, logits: Tensor, n: int = n, test: Any = test, true: Any = true) -> None:
                z, y = logits.double().numpy(), test.labels.numpy()
                ece = calibration.ece(*calibration.confidence_and_correctness(z, y)).value
                error = float((logits.double().softmax(dim=1) - true).abs().mean())
                found.setdefault((n, label), []).append([ece, error, calibration.brier(z, y).value])

            note("over-confident p", test.logits)
            for stop in (False, True):
                # 24 batches an epoch, 150 epochs.
                kind = SplitPointClassifier(width=64, steps=3600, early_stopping=stop, seed=seed).fit_observations(fit)
                for correction, gate in (("minimum", None), ("minimum", 0.05), ("difference", None)):
                    kind.correction, kind.gate = correction, gate
                    how = correction + (f", gate {gate}" if gate else "") + (", early stopping" if stop else "")
                    note(how, kind.read(test).logits)
            note("temperature", TemperatureScaling().fit_observations(fit).calibrate(test))
            note("true probabilities", true.log())
    names = ("ECE", "mean absolute error", "Brier")
    return [
        {"calibration n": n, "probabilities": label}
        | {name: [round(v[i], 4) for v in values] for i, name in enumerate(names)}
        for (n, label), values in found.items()
    ]


# Cost ------------------------------------------------------------------------------------------------------------------


def cost(repeats: int) -> list[dict[str, Any]]:
    rows = []
    model = load_model("small-resnet", shape=(1, 28, 28)).module.eval()
    g = torch.Generator().manual_seed(0)
    x = torch.rand(500, 1, 28, 28, generator=g)
    labels = torch.arange(500) % 10
    kind = SplitPointClassifier(steps=10).fit(model, x, labels)
    for batch in (250, 32, 1):
        part, known = x[:batch], labels[:batch]
        spent: dict[str, list[float]] = {"plain": [], "heads": []}

        def plain(part: Tensor = part, known: Tensor = known, batch: int = batch) -> None:
            observe(model, part, known, (), batch)

        def heads(part: Tensor = part, known: Tensor = known, batch: int = batch) -> None:
            kind.read(observe(model, part, known, kind.taps, batch))

        for i in range(repeats + 3):
            for name, function in (("plain", plain), ("heads", heads)):
                begun = time.process_time()
                function()
                if i >= 3:
                    spent[name].append(time.process_time() - begun)
        ratios = sorted(b / a for a, b in zip(spent["plain"], spent["heads"], strict=True))
        middle = {name: statistics.median(values) for name, values in spent.items()}
        rows.append(
            {
                "batch": batch,
                "repeats": repeats,
                "plain ms": round(1e3 * middle["plain"], 3),
                "with split-point ms": round(1e3 * middle["heads"], 3),
                "overhead %": round(100 * (statistics.median(ratios) - 1), 2),
                "quartiles %": [round(100 * (ratios[int(q * len(ratios))] - 1), 2) for q in (0.25, 0.75)],
            }
        )
    return rows


# Report ----------------------------------------------------------------------------------------------------------------


def told(value: Any) -> str:
    if isinstance(value, list) and len(value) == 3 and all(isinstance(v, float) for v in value):
        return f"{value[0]:.3g} [{value[1]:.3g}, {value[2]:.3g}]"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def table(rows: list[dict[str, Any]], plain: tuple[str, ...] = ()) -> str:
    columns = [k for k in rows[0] if k not in ("rings", "tenths", "ratios")]
    lines = ["| " + " | ".join(columns) + " |", "| --- " * len(columns) + "|"]
    for row in rows:
        cells = [", ".join(f"{v:.3f}" for v in row[k]) if k in plain else told(row[k]) for k in columns]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def markdown(content: dict[str, Any]) -> str:
    parts = [
        "# Split-point self-consistency\n\nWritten by `python benchmarks/uq/split_point.py`, which says what each part is.\n"
    ]
    if "cubic" in content:
        parts.append(
            "## Cubic toy, nominal 0.95\n\nMean [95 % t-interval over seeds]; each seed's ratio is in the JSON.\n"
        )
        parts.append(table(content["cubic"]))
    if "truth" in content:
        parts.append(
            "## Known truth\n\nMean [95 % t-interval over seeds]; local coverage error: mean over levels and tenths.\n"
        )
        parts.append(table(content["truth"]))
        rings = content["truth"][0]["rings"]
        parts.append(
            "SDS by distance from the data, default options, calibration n = 1,000; geometric mean over seeds [t-interval]:\n"
        )
        parts.append(table([{"distance": k, "SDS": v} for k, v in rings.items()]))
    if "classes" in content:
        parts.append("## Classes of known probabilities\n\nOne value a seed, 3,000 test samples.\n")
        parts.append(table(content["classes"], ("ECE", "mean absolute error", "Brier")))
    if "cost" in content:
        parts.append("## Cost beside a small-resnet's forward pass, 28x28 inputs, one thread\n")
        parts.append(table(content["cost"]))
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=("cubic", "truth", "classes", "cost"), default=None)
    parser.add_argument("--repeats", type=int, default=61)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/uq/results"))
    parser.add_argument("--figures", type=Path, default=Path("docs/figures"))
    options = parser.parse_args()
    wanted = options.only or ["cost", "classes", "truth", "cubic"]
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # Adam's averages of dead units become denormal, and steps ten times slower
    kept = options.out / "split-point.json"
    content: dict[str, Any] = json.loads(kept.read_text()) if kept.is_file() else {}
    content["environment"] = environment()
    for part in wanted:
        if part == "truth":
            found = truth(5)
            content["truth"] = found["rows"]
            figure(found["drawn"], found["rows"][0], options.figures / "split-point.png")
        else:
            content[part] = {
                "cubic": lambda: cubic(10),
                "classes": lambda: classes(3),
                "cost": lambda: cost(options.repeats),
            }[part]()
        print(f"{part} done", flush=True)
        options.out.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(content, indent=1) + "\n")
        (options.out / "split-point.md").write_text(markdown(content))


if __name__ == "__main__":
    main()
