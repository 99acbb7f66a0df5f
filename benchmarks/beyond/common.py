"""What these experiments share: a suite's run, its means over seeds, and tables of them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reports import write_reports
from robustbench_ext.engine import Progress, run_suite
from robustbench_ext.provenance import environment
from robustbench_ext.results import Row, RunResults

SEEDS = (0, 1, 2)
N = 1000  # test samples
EPS = 0.2
NETWORK = "small-cnn"
# 40 steps of Auto-PGD with random starts; no ensemble: what counts here are differences between networks of one kind.
APGD = {"attack": "apgd-ce", "norm": "Linf", "eps": EPS, "steps": 40}
ROBUST = f"apgd-ce Linf {EPS}"
Column = tuple[str, str, str]  # title, condition, metric


def options(doc: str | None, name: str, **choices: list[str]) -> argparse.Namespace:
    """The command line of an experiment; what is chosen is part of its name."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/beyond/results"))
    parser.add_argument("--executor", default="serial", choices=["serial", "local"])
    for option, of in choices.items():
        parser.add_argument(f"--{option}", choices=of, default=of[0])
    chosen = parser.parse_args()
    chosen.name = "-".join([name, *(str(getattr(chosen, option)) for option in choices)])
    return chosen


def run(suite: Mapping[str, Any], chosen: argparse.Namespace) -> tuple[RunResults, Path]:
    """Run the suite, or what is missing of it, and write its report; its folder comes with the results."""
    folder = chosen.runs / f"beyond-{chosen.name}"
    told = Progress(line=lambda i, total, what, facts: print(f"[{i}/{total}] {what}", flush=True))
    summary = run_suite(suite, folder, executor=chosen.executor, progress=told)
    write_reports(folder)
    if summary.failures:
        raise SystemExit(f"{len(summary.failures)} parts could not be computed: see {folder}/failures.log")
    return summary.results, folder


def of_seeds(
    results: RunResults, name: str, condition: str, metric: str, group: str | None = None, probe: str = "classifier"
) -> Row | None:
    """The mean over seeds of an entry, with Student's 95 % interval over seeds."""
    wanted = (name, condition, probe, metric)
    rows = [r for r in results.replicates if (r.model, r.condition, r.probe, r.metric) == wanted]
    return next((r for r in rows if group is None or r.group == group), None)


def text(row: Row | None, results: RunResults) -> str:
    """`93.4 [91.8, 94.7]`, in percent where the metric is a proportion."""
    if row is None or row.value is None:
        return "–"
    scale, digits = (100, 1) if results.metrics[row.metric]["percent"] else (1, 3)
    ends = (
        ""
        if row.ci_low is None or row.ci_high is None
        else f" [{scale * row.ci_low:.{digits}f}, {scale * row.ci_high:.{digits}f}]"
    )
    return f"{scale * row.value:.{digits}f}{ends}"


def means(
    results: RunResults, names: Sequence[str], columns: Sequence[Column]
) -> tuple[list[str], list[dict[str, Any]]]:
    """A Markdown table of means over seeds, and its numbers."""
    lines = ["| model | " + " | ".join(title for title, _, _ in columns) + " |", "| --- |" + " ---: |" * len(columns)]
    rows = []
    for name in names:
        found = {title: of_seeds(results, name, condition, metric) for title, condition, metric in columns}
        lines.append(f"| {name} | " + " | ".join(text(row, results) for row in found.values()) + " |")
        rows += [{"title": title, **row.model_dump()} for title, row in found.items() if row is not None]
    return lines, rows


def write(chosen: argparse.Namespace, suite: Mapping[str, Any], lines: Sequence[str], found: Mapping[str, Any]) -> None:
    """The tables as Markdown, and everything as JSON."""
    chosen.out.mkdir(parents=True, exist_ok=True)
    about = environment()
    hardware: Any = about["hardware"]
    head = (
        f"{suite['data']}, n = {suite['n']} test images, {len(SEEDS)} seeds; mean over seeds [95 % t-interval over seeds], "
        f"percent where nothing else is said. {hardware.get('processor')}, {hardware.get('cores')} cores, CPU. Small-data "
        "results."
    )
    page = "\n".join([head, "", *lines]) + "\n"
    (chosen.out / f"{chosen.name}.md").write_text(page, encoding="utf-8")
    content = {"suite": suite, "environment": about, **found}
    (chosen.out / f"{chosen.name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(page)
