"""Every uncertainty estimator against the truth: the bundled run `oracle`, and two studies beside it.

    python benchmarks/oracle/oracle.py estimators --out runs/oracle   (about ten minutes of one core)
    python benchmarks/oracle/oracle.py metrics --out runs/oracle      (seconds, after the first)
    python benchmarks/oracle/oracle.py dials                          (a minute of one core)

`estimators`: `rbx run oracle`, serially; its parts.json and report.md become results/estimators.json and .md. A run that is
there already is resumed, so nothing is computed twice.

`metrics`: which metric orders estimators as their distance from the truth does? Rank correlation of each metric with MSE_p over
all classifiers and estimators of a part, clean; mean over the parts with a 95 % t-interval over parts.

`dials`: exact linear tasks, 40 of each setting: what a right posterior, wrong ones and plain methods lose against it (KL of
normal laws, nats) with few and many samples, and on test inputs twice as long as the training inputs. 95 % t-intervals over
tasks.

Each writes benchmarks/oracle/results/NAME.json and .md; one thread.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from scipy.stats import t as student

from reports import write_reports
from reports.parts import write_joint_report
from robustbench_ext.axes import CLEAN
from robustbench_ext.data import load_dataset
from robustbench_ext.data.bayes_linear import KnownNoise
from robustbench_ext.engine import Progress
from robustbench_ext.measure_truth import number_terms
from robustbench_ext.parts import JointResults, run_parts
from robustbench_ext.provenance import environment
from robustbench_ext.results import RunResults
from uq.oracles import BayesLinear
from uq.regression import LEVELS, Prediction, RegressionEstimator, Samples, from_quantiles
from uq.split_conformal import SplitConformal

RESULTS = Path("benchmarks/oracle/results")
COMPARED = ("brier", "nll", "kl_p", "ece", "ece_equal_mass", "mce", "ks_error", "aurc", "error_auroc", "accuracy")
TASKS = 40


def interval(values: list[float]) -> dict[str, float]:
    """Mean with a 95 % t-interval."""
    n, mean = len(values), float(np.mean(values))
    half = float(student.ppf(0.975, n - 1) * np.std(values, ddof=1) / np.sqrt(n))
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": n}


def told(of: dict[str, float], digits: int = 2) -> str:
    """`0.93 [0.90, 0.96]`."""
    return f"{of['mean']:.{digits}f} [{of['low']:.{digits}f}, {of['high']:.{digits}f}]"


def save(name: str, content: dict[str, Any], lines: list[str]) -> None:
    """The results as JSON and as Markdown."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"environment": environment(), **content}, indent=1)
    (RESULTS / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    (RESULTS / f"{name}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def estimators(out: Path) -> None:
    """The bundled run."""
    summary = run_parts("oracle", out, progress=Progress(message=print))
    for part in summary.parts.values():
        if part.computed or part.trained or not (part.folder / "report.html").is_file():
            write_reports(part.folder)
    written = write_joint_report(out)
    if summary.failures:
        raise SystemExit(f"not written: {[f'{f.what}: {f.error}' for f in summary.failures]}")
    save("estimators", summary.results.model_dump(), written["markdown"].read_text(encoding="utf-8").splitlines())


def metrics(out: Path) -> None:
    """Which metrics follow the truth."""
    joint = JointResults.read(out)
    found: dict[str, dict[str, float]] = {}
    for part in joint.parts:
        results = RunResults.read(out / part.folder / "results.json")
        rows = [r for r in results.find(condition=CLEAN, metric="mse_p") if r.probe != "oracle"]
        if not rows:
            continue
        for metric in COMPARED:
            values = [
                results.find(model=r.model, condition=CLEAN, probe=r.probe, metric=metric, group=None) for r in rows
            ]
            pairs = [(r.value, v[0].value) for r, v in zip(rows, values, strict=True) if v and v[0].value is not None]
            if len({value for _, value in pairs}) > 1:  # all equal: there is no order
                found.setdefault(metric, {})[part.name] = float(spearmanr(*zip(*pairs, strict=True)).statistic)
    lines = ["| metric | " + " | ".join(next(iter(found.values()))) + " | mean [95 % over parts] |"]
    lines += ["| --- |" + " ---: |" * (len(next(iter(found.values()))) + 1)]
    for metric, values in found.items():
        cells = [f"{values[part]:.2f}" if part in values else "–" for part in next(iter(found.values()))]
        lines.append(f"| {metric} | {' | '.join(cells)} | {told(interval(list(values.values())))} |")
    save("metrics", {"spearman with MSE_p": found}, lines)


# Dials ---------------------------------------------------------------------------------------------------------------


class _PlugIn(RegressionEstimator):
    """Least squares with the residuals' standard deviation as the only uncertainty: the noise without the parameters' part."""

    name = "plug-in"

    def _fit(self, train: Samples, calibration: Samples, model: Any, seed: int) -> None:
        assert train.y is not None
        self.w, *_ = np.linalg.lstsq(train.x, train.y, rcond=None)
        free = max(1, len(train) - train.x.shape[1])
        self.s = float(np.sqrt(((train.y - train.x @ self.w) ** 2).sum() / free))

    def _predict(self, samples: Samples, model: Any, seed: int) -> Prediction:
        z = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(LEVELS, dtype=torch.float64)).numpy()
        return from_quantiles((samples.x @ self.w)[:, None] + self.s * z)


METHODS: dict[str, Callable[[], RegressionEstimator]] = {
    "bayes-linear": BayesLinear,
    "prior three times too wide": lambda: BayesLinear(prior=3.0),
    "noise twice too large": lambda: BayesLinear(noise=2.0),
    "noise unknown (normal-inverse-gamma)": lambda: BayesLinear(kind="normal-inverse-gamma"),
    "least squares and its residuals": _PlugIn,
    "split-conformal on the posterior mean": SplitConformal,
}


def dials() -> None:
    """n and the length of the test inputs."""
    found: dict[str, dict[str, list[float]]] = {}
    for n in (10, 30, 100, 300):
        for scale in (1, 2):
            for seed in range(TASKS):
                data = load_dataset(f"bayes-linear:known-noise#n={n},test=500,scale={scale},seed={seed}")
                law = data.truth
                assert isinstance(law, KnownNoise)

                def samples(split: str, law: KnownNoise = law, data: Any = data) -> Samples:
                    x = data[split].inputs(slice(None)).numpy().astype(np.float64)
                    return Samples(x, law.mean(x), data[split].labels, ids=data[split].ids)

                train, calibration, test = (samples(split) for split in ("train", "calibration", "test"))
                for name, make in METHODS.items():
                    read = vars(make().fit(train, calibration).predict(test))
                    kl = number_terms(law, test.x, np.asarray(test.y), read)["kl_normal", None].mean()
                    found.setdefault(name, {}).setdefault(
                        f"n = {n}" + (", twice as long" if scale == 2 else ""), []
                    ).append(float(kl))
    summary = {name: {setting: interval(v) for setting, v in of.items()} for name, of in found.items()}
    settings = list(next(iter(summary.values())))
    lines = [
        "| KL to the exact posterior, nats | " + " | ".join(settings) + " |",
        "| --- |" + " ---: |" * len(settings),
    ]
    lines += [f"| {name} | " + " | ".join(told(of[s], 3) for s in settings) + " |" for name, of in summary.items()]
    save("dials", {"tasks": TASKS, "kl": summary}, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=("estimators", "metrics", "dials"))
    parser.add_argument("--out", type=Path, default=Path("runs/oracle"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.study == "dials":
        dials()
    else:
        {"estimators": estimators, "metrics": metrics}[given.study](given.out)


if __name__ == "__main__":
    main()
