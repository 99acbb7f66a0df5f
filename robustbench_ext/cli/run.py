"""`rbx run`: run a suite and write its report."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from robustbench_ext.callbacks import Callback, Callbacks
from robustbench_ext.cli.console import CHECK_FAILED, INTERRUPTED, PARTIAL, numbers, paragraph, percent, say
from robustbench_ext.errors import ConfigError
from robustbench_ext.settings import DETERMINISTIC, DEVICE, UNSAFE, changed

if TYPE_CHECKING:
    from robustbench_ext.engine import RunSummary

WIDTH = 46


def run(
    suite: str = typer.Argument(help="A bundled suite (see `rbx list suites`) or a YAML file."),
    out: Path | None = typer.Option(None, help="Run folder; runs/SUITE by default. The same folder resumes a run."),
    model: list[str] = typer.Option(
        [],
        help="Model to evaluate instead of the suite's: pkg.module:factory, file.py:factory, SOURCE:NAME (torchvision, timm, "
        "hf, onnx, sklearn, ...; see `rbx list models`), ARCHITECTURE + weights.safetensors, a checkpoint folder; #key=value "
        "behind it sets options. NAME=SPEC names it. Repeatable.",
    ),
    data: str | None = typer.Option(None, help="Data instead of the suite's: digits, npz:PATH, folder:PATH, ..."),
    mean: str | None = typer.Option(
        None, help="With --model: normalisation inside the model, such as 0.485,0.456,0.406."
    ),
    std: str | None = typer.Option(None, help="With --model: see --mean."),
    executor: str = typer.Option(
        "auto",
        help="serial; local: one process per core or GPU; auto: local where it helps; dask, dask://HOST:PORT; slurm; ray, "
        "ray://HOST:PORT; queue: workers started by `rbx work`.",
    ),
    workers: int | None = typer.Option(
        None, min=1, help="Workers that the executor starts; one per core or GPU by default."
    ),
    executor_option: list[str] = typer.Option(
        [], help="key=value for dask, slurm or ray, such as slurm_partition=gpu. Repeatable."
    ),
    device: str | None = typer.Option(None, help="auto, cpu, cuda, cuda:1, mps; by default $RBX_DEVICE, or auto."),
    deterministic: bool = typer.Option(
        False, "--deterministic", help="On a GPU: only algorithms that repeat bit by bit."
    ),
    track: list[str] = typer.Option(
        [], help="mlflow, wandb or tensorboard, with :URI, :PROJECT or :FOLDER; or file.py:factory. Repeatable."
    ),
    allow_unsafe_load: bool = typer.Option(
        False,
        "--allow-unsafe-load",
        help="Load model files that can run code (pickle:, pt2:). Only files that you trust.",
    ),
    set_: list[str] = typer.Option([], "--set", help="Override: key=value, such as n=200. Repeatable."),
) -> None:
    """Run a suite: train what it trains, attack, measure, and write report.html, report.md and results.json.

    Example: rbx run quickstart --out runs/quickstart
    """
    from robustbench_ext.cli.parts import finish_parts
    from robustbench_ext.engine import Progress, run_suite
    from robustbench_ext.parts import Parts, read_parts, run_parts
    from robustbench_ext.suite import load_suite

    if (mean or std) and not model:
        raise ConfigError(
            "--mean and --std belong to --model; in a suite, write mean: and std: beside the model's spec"
        )
    several = read_parts(suite)
    if several is not None and (model or data is not None):
        raise ConfigError(f"'{suite}' is several suites with data of their own: --model and --data belong to one suite")
    loaded = several or load_suite(
        suite, models=model, data=data, mean=numbers(mean, "--mean"), std=numbers(std, "--std"), settings=set_
    )
    folder = out or Path("runs") / loaded.name
    lines = _Lines()
    progress = Progress(line=lines.cell, epoch=lines.epoch, running=lines.running, message=lines.message)
    trackers = _trackers(track)
    chosen = {
        DEVICE: device,
        DETERMINISTIC: "1" if deterministic else None,
        UNSAFE: "1" if allow_unsafe_load else None,
    }
    told = _StaysOpen(trackers, lines.message)
    try:
        where: dict[str, Any] = {
            "executor": executor,
            "workers": workers,
            "executor_options": _options(executor_option),
            "callbacks": [told],
            "progress": progress,
        }
        with changed(**chosen):
            if isinstance(loaded, Parts):
                joint = run_parts(loaded, folder, settings=set_, **where)
                lines.clear()
                finish_parts(joint, told)
                return
            summary = run_suite(loaded, folder, **where)
            lines.clear()
            _finish(summary, folder, told)
    except KeyboardInterrupt:
        lines.clear()
        paragraph("interrupted. What was computed is kept: run the same command again to go on.")
        raise typer.Exit(INTERRUPTED) from None
    finally:
        lines.clear()
        told.end()


def _is_newer(file: Path, source: Path) -> bool:
    """Whether a file is there and was made after its source."""
    return file.is_file() and file.stat().st_mtime_ns >= source.stat().st_mtime_ns


def _finish(summary: RunSummary, folder: Path, told: Callbacks) -> None:
    """The report, what the terminal says of the results, and the exit code."""
    from reports import write_reports

    # A model that the preflight refused has no cells: then nothing was reused either, and "nothing to do" would mislead.
    idle = summary.computed == summary.trained == 0 and summary.reused > 0 and not summary.failures
    if idle:
        say(f"nothing to compute: all {summary.reused} cells were there already")
    else:
        say(
            f"trained {summary.trained}, computed {summary.computed}, reused {summary.reused} in {summary.seconds:.0f} s"
        )
    written = {"html": folder / "report.html", "markdown": folder / "report.md"}
    if not (idle and all(_is_newer(file, folder / "results.json") for file in written.values())):
        say("writing the report")
        written = write_reports(folder)
    told.on_report(written)
    if summary.results.results:
        _print_summary(summary)
    for finding in summary.results.suspicions:
        paragraph(f"{finding.status}: {finding.model}: {finding.name}: {finding.message}. {finding.hint}")
    for failure in summary.failures:
        paragraph(f"failed: {failure.what}: {failure.error}")
    if summary.failures:
        paragraph(
            f"{len(summary.failures)} parts failed (tracebacks: {folder / 'failures.log'}); the rest is in the report"
        )
    print(f"report: {written['html']}")
    if summary.failures:
        raise typer.Exit(PARTIAL)
    if summary.verdict == "fail":
        raise typer.Exit(CHECK_FAILED)


class _StaysOpen(Callbacks):
    """Trackers that outlive `run_suite`: the report comes after it."""

    def close(self) -> None:
        """Not yet."""

    def end(self) -> None:
        """Now."""
        super().close()


def _trackers(specs: list[str]) -> list[Callback]:
    if not specs:
        return []
    from robustbench_ext.trackers import tracker

    return [tracker(spec) for spec in specs]


def _options(given: list[str]) -> dict[str, str]:
    options = {}
    for option in given:
        name, equals, value = option.partition("=")
        if not equals:
            raise ConfigError(f"--executor-option {option}: expected key=value, such as slurm_partition=gpu")
        options[name] = value
    return options


class _Lines:
    """One line per cell; on a terminal also a line that says what is running."""

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()
        self._shown = ""
        self._epochs: dict[str, Mapping[str, Any]] = {}
        self._said: dict[str, float] = {}

    def clear(self) -> None:
        """Wipe the live line."""
        if self._shown:
            print("\r" + " " * len(self._shown) + "\r", end="", file=sys.stderr, flush=True)
            self._shown = ""

    def message(self, text: str) -> None:
        """A line of its own."""
        self.clear()
        say(text)

    def cell(self, i: int, total: int, what: str, facts: Mapping[str, Any]) -> None:
        """A cell, a check or a training run is done."""
        self.clear()
        name = what if len(what) <= WIDTH else what[: WIDTH - 1] + "…"
        head = f"[{i:>{len(str(total))}}/{total}] {name:<{WIDTH}}"
        if "error" in facts:
            say(f"{head} FAILED")
            return
        if facts.get("correct") is not None:
            result = percent(facts["correct"] / facts["n"])
        elif "rmse" in facts:
            result = f"rmse {facts['rmse']:.3g}"
        elif facts.get("epochs"):
            result = f"{facts['epochs']} epochs"
        else:
            result = str(facts.get("status", ""))
        say(f"{head} {result:>8} {facts['seconds']:7.1f} s")

    def epoch(self, model: str, row: Mapping[str, Any]) -> None:
        """A training run finished an epoch somewhere; said once a minute where there is no terminal."""
        self._epochs[model] = row
        now = time.monotonic()
        if not self._live and now - self._said.setdefault(model, now) >= 60:
            self._said[model] = now
            say(f"        {self._training(model)}")

    def running(self, jobs: list[str]) -> None:
        """Jobs in flight."""
        if not self._live:
            return
        names = [self._training(j.partition(" · ")[0]) if j.endswith("· training") else j for j in jobs]
        more = f" (+{len(names) - 2} more)" if len(names) > 2 else ""
        text = (f"… {'; '.join(names[:2])}"[: 78 - len(more)] + more) if names else ""
        if text != self._shown:
            self.clear()
            print(text, end="\r", file=sys.stderr, flush=True)
            self._shown = text

    def _training(self, model: str) -> str:
        row = self._epochs.get(model)
        if row is None:
            return f"training {model}"
        text = f"training {model}: epoch {row['epoch']}/{row['epochs']}"
        if "clean_accuracy" not in row:
            return f"{text}, loss {row['loss']:.3g}"
        return f"{text}, clean {100 * row['clean_accuracy']:.0f} %, robust {100 * row['robust_accuracy']:.0f} %"


def _print_summary(summary: RunSummary) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from reports.tables import headline

    content = headline(summary.results)
    console = Console(width=None if sys.stdout.isatty() else 80)
    # Axes down, models across: a column of "96.8 [95.5, 97.7]" for three models fits 80 characters.
    for start in range(0, len(content.rows), 3):
        some = content.rows[start : start + 3]
        title = f"{summary.results.suite['title']}: percent, 95 % intervals, n = {summary.results.suite['n']}"
        table = Table(title=title, title_justify="left")
        table.add_column("")
        for name, _ in some:
            table.add_column(Text(name), justify="right", overflow="fold")
        for i, column in enumerate(content.columns):
            table.add_row(Text(column.title), *[Text(cells[i].text) for _, cells in some])
        console.print(table)
