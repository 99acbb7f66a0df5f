"""`rbx plan`: what a suite would cost, before anything runs."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import typer

from robustbench_ext.cli.console import numbers, say
from robustbench_ext.settings import DEVICE, UNSAFE, changed


def plan(
    suite: str = typer.Argument(help="A bundled suite (see `rbx list suites`) or a YAML file."),
    out: Path | None = typer.Option(None, help="Run folder, to see what is there already; runs/SUITE by default."),
    model: list[str] = typer.Option([], help="As in `rbx run`."),
    data: str | None = typer.Option(None, help="As in `rbx run`."),
    mean: str | None = typer.Option(None, help="As in `rbx run`."),
    std: str | None = typer.Option(None, help="As in `rbx run`."),
    set_: list[str] = typer.Option([], "--set", help="As in `rbx run`."),
    device: str | None = typer.Option(None, help="As in `rbx run`."),
    allow_unsafe_load: bool = typer.Option(False, "--allow-unsafe-load", help="As in `rbx run`."),
    as_json: bool = typer.Option(False, "--json", help="Machine-readable output."),
) -> None:
    """List the cells of a suite with their cost: passes per sample, and seconds from a measured warm-up. Nothing runs.

    Costs are upper bounds: they assume that no attack breaks a sample. Training comes on top.
    """
    from robustbench_ext.evaluate import Context
    from robustbench_ext.plan import plan as make_plan
    from robustbench_ext.suite import load_suite

    loaded = load_suite(
        suite, models=model, data=data, mean=numbers(mean, "--mean"), std=numbers(std, "--std"), settings=set_
    )
    with changed(**{DEVICE: device, UNSAFE: "1" if allow_unsafe_load else None}):
        context = Context(loaded, out or Path("runs") / loaded.name)
        context.validate()
        cells = make_plan(context)
    if as_json:
        print(json.dumps([asdict(cell) for cell in cells], indent=1))
        return
    print(f"{'model · condition':<42} {'n':>6} {'forward':>8} {'backward':>8} {'at most':>10}")
    for cell in cells:
        name = f"{cell.model} · {cell.condition}"
        name = name if len(name) <= 42 else name[:41] + "…"
        passes = ["?" if p is None else str(p) for p in (cell.forwards, cell.backwards)]
        when = "there" if cell.there == cell.n else "?" if cell.seconds is None else _duration(cell.seconds)
        print(f"{name:<42} {cell.n:>6} {passes[0]:>8} {passes[1]:>8} {when:>10}")
    for name in context.evaluated:
        for text in context.notes_of(name):
            say(text)
    known = sum(cell.seconds or 0.0 for cell in cells)
    unknown = sum(cell.seconds is None and cell.there < cell.n for cell in cells)
    print(f"{'all of it, one process':<42} {'':>6} {'':>8} {'':>8} {_duration(known):>10}")
    if unknown:
        say(f"{unknown} cells have no bound on their passes (?) and come on top")
    if context.training:
        missing = [name for name, training in context.training.items() if not training.is_done]
        if missing:
            say(f"training of {', '.join(missing)} comes on top")


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
