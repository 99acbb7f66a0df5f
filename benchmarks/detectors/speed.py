"""Mahalanobis against the matrix products that it cannot avoid and against pytorch-ood; ECE and AUROC against torchmetrics.

    pip install pytorch-ood torchmetrics
    python benchmarks/detectors/speed.py --out benchmarks/detectors/results

One thread, in turns within one run, CPU seconds of the process; the median of the repeats counts. Features are a mixture of
C Gaussians in d dimensions with one covariance of condition 1,000, class means 1.5 standard deviations apart in every
direction, their common mean half a standard deviation from zero; 20,000 samples to fit to. With classes further apart
(--spread 4) or far from zero (--offset 3) digits would cancel, and what prevents it takes longer. Written for every size:

    fit          seconds of the fit (moments, factor), of theirs, and of the float64 sum of outer products alone
    score        seconds a sample, over the products f W (d x d) and z M (d x C) in the precision that scores were taken in
    error        largest relative error of a score against float64, over inputs like the training data and unlike it
    peak         bytes that fit and scoring held at most beyond their inputs, by torch's own profiler

Seconds for the small sizes; (2048, 1000) takes one to two minutes, most of it in the peer's loop over classes
(--peer-samples says on how many samples it is timed).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from detectors.distances import ClassDistances, batch_rows
from detectors.gaussian import TiedGaussian, whiten
from robustbench_ext.metrics.detection import auroc
from robustbench_ext.metrics.streaming import StreamingCalibration
from robustbench_ext.provenance import environment

SIZES = [(64, 10), (512, 100), (2048, 1000), (64, 1000), (2048, 10), (512, 10), (512, 1000), (64, 100), (2048, 100)]


def timed(functions: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median CPU seconds of each, called in turns."""
    spent: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            begun = time.process_time()
            function()
            spent[name].append(time.process_time() - begun)
    return {name: statistics.median(values) for name, values in spent.items()}


def features(d: int, classes: int, n: int, spread: float, offset: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    scale = torch.logspace(0, -1.5, d)
    turn = torch.linalg.qr(torch.randn(d, d, generator=g))[0]
    y = torch.arange(n) % classes
    means = spread * torch.randn(classes, d, generator=g)
    return ((torch.randn(n, d, generator=g) + means[y] + offset) * scale) @ turn, y


def fit(f: Tensor, y: Tensor, classes: int) -> ClassDistances:
    gaussian = TiedGaussian(classes)
    for start in range(0, len(f), 4096):
        gaussian.update(f[start : start + 4096], y[start : start + 4096])
    moments = gaussian.finish()
    return ClassDistances(moments.present(), whiten(moments.covariance, moments.noise))


def peak(function: Callable[[], Any]) -> int:
    """Most bytes allocated at once while the function runs."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, record_shapes=False) as record:
        function()
    level = most = 0
    for event in sorted(record.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            level += event.nbytes()
            most = max(most, level)
    return most


def case(
    d: int, classes: int, spread: float, offset: float, n_score: int, peer_samples: int, repeats: int
) -> dict[str, Any]:
    from pytorch_ood.detector import Mahalanobis as Peer

    n = max(20_000, 4 * d)
    f, y = features(d, classes, n, spread, offset)
    x = f[torch.arange(n_score) % n].clone()
    x[::2] += 0.1 * torch.randn(len(x[::2]), d, generator=torch.Generator().manual_seed(1))
    ours, peer = fit(f, y, classes), Peer(None).fit_features(f, y)
    matrix, means = ours.whitening.matrix.to(ours.dtype), ours._ms.T.contiguous()
    rows = batch_rows(d)
    blocks = [x[i : i + rows].to(ours.dtype) for i in range(0, len(x), rows)]
    few = x[:peer_samples]

    def bound() -> None:
        for block in blocks:
            (block @ matrix) @ means

    def outer() -> None:
        total = torch.zeros(d, d, dtype=torch.float64)
        for i in range(0, n, 4096):
            wide = f[i : i + 4096].double()
            total.addmm_(wide.T, wide)

    score = timed({"ours": lambda: ours.nearest(x), "bound": bound}, repeats)
    theirs = timed({"peer": lambda: peer.predict_features(few)}, 1 if d * classes > 1e5 else 3)["peer"]
    fits = {"ours": lambda: fit(f, y, classes), "peer": lambda: Peer(None).fit_features(f, y), "outer": outer}
    fitting = timed(fits, 3)
    exactly = ours.all(x).amin(dim=1)
    scored = ours.nearest(x).double()
    # Theirs is half of the distance under the sum of outer products instead of their mean.
    same = 2 * n * peer.predict_features(few).double()
    each = {"ours": score["ours"] / len(x), "bound": score["bound"] / len(x), "peer": theirs / len(few)}
    return {
        "d": d,
        "classes": classes,
        "n fit": n,
        "n score": len(x),
        "spread": spread,
        "offset": offset,
        "dtype": str(ours.dtype),
        "score seconds a sample": each,
        "score over bound": each["ours"] / each["bound"],
        "peer over score": each["peer"] / each["ours"],
        "fit seconds": fitting,
        "fit over peer": fitting["ours"] / fitting["peer"],
        "error": float(((scored - exactly) / exactly).abs().max()),
        "difference from peer": float(((same - exactly[: len(few)]) / exactly[: len(few)]).abs().max()),
        "peak score bytes": peak(lambda: ours.nearest(x)),
        "peak fit bytes": peak(lambda: fit(f, y, classes)),
        "bytes of d2 + C d + batch d, float64": 8 * (d * d + classes * d + rows * d),
    }


def metrics(n: int, repeats: int) -> dict[str, Any]:
    from torchmetrics.classification import BinaryAUROC, BinaryCalibrationError

    rng = np.random.default_rng(0)
    confidence = rng.random(n)
    correct = rng.random(n) < confidence**1.2
    c, y = torch.from_numpy(confidence), torch.from_numpy(correct).long()

    def theirs(metric: Any) -> float:
        for part in range(0, n, 100_000):
            metric.update(c[part : part + 100_000], y[part : part + 100_000])
        return float(metric.compute())

    def streamed() -> float:
        bins = StreamingCalibration()
        for part in range(0, n, 100_000):
            bins.update(confidence[part : part + 100_000], correct[part : part + 100_000])
        return bins.ece()

    seconds = timed(
        {
            "ece": streamed,
            "ece torchmetrics": lambda: theirs(BinaryCalibrationError(15)),
            "auroc with interval": lambda: auroc(confidence[~correct], confidence[correct]),
            "auroc torchmetrics": lambda: theirs(BinaryAUROC()),
        },
        repeats,
    )
    value = auroc(confidence[~correct], confidence[correct]).value
    return {
        "n": n,
        "seconds": seconds,
        "ece times as fast": seconds["ece torchmetrics"] / seconds["ece"],
        "auroc times as fast": seconds["auroc torchmetrics"] / seconds["auroc with interval"],
        "differences": [
            abs(streamed() - theirs(BinaryCalibrationError(15))),
            abs(value - theirs(BinaryAUROC())),
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="*", default=[f"{d}x{c}" for d, c in SIZES[:3]], help="such as 64x10 512x100")
    parser.add_argument("--spread", type=float, default=1.5, help="of class means, in within-class standard deviations")
    parser.add_argument("--offset", type=float, default=0.5, help="of their common mean from zero, in the same units")
    parser.add_argument("--score-samples", type=int, default=16384)
    parser.add_argument("--peer-samples", type=int, default=256, help="a sample's time does not depend on it")
    parser.add_argument("--metric-samples", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/detectors/results"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for size in options.sizes:
        d, classes = map(int, size.split("x"))
        found = case(
            d, classes, options.spread, options.offset, options.score_samples, options.peer_samples, options.repeats
        )
        print(json.dumps(found), flush=True)
        rows.append(found)
    counted = metrics(options.metric_samples, options.repeats)
    print(json.dumps(counted), flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    content = {"environment": environment(), "mahalanobis": rows, "metrics": counted}
    (options.out / "speed.json").write_text(json.dumps(content, indent=1) + "\n")
    (options.out / "speed.md").write_text(table(rows, counted))


def table(rows: list[dict[str, Any]], counted: dict[str, Any]) -> str:
    head = [
        "d",
        "C",
        "n fit",
        "µs a sample",
        "over BLAS",
        "peer over ours",
        "fit ours / peer, s",
        "error",
        "peak score, MB",
    ]
    lines = [f"| {' | '.join(head)} |", "|" + " ---: |" * len(head)]
    for r in rows:
        cells = [
            *(str(r[k]) for k in ("d", "classes", "n fit")),
            f"{1e6 * r['score seconds a sample']['ours']:.2f}",
            f"{r['score over bound']:.2f}",
            f"{r['peer over score']:.0f}",
            f"{r['fit seconds']['ours']:.4f} / {r['fit seconds']['peer']:.4f}",
            f"{r['error']:.1e}",
            f"{r['peak score bytes'] / 1e6:.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    times = f"ECE {counted['ece times as fast']:.1f}, AUROC {counted['auroc times as fast']:.1f}"
    return "\n".join(lines) + f"\n\nTimes as fast as torchmetrics at n = {counted['n']:,}: {times}.\n"


if __name__ == "__main__":
    main()
