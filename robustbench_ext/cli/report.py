"""`rbx report`: render a run's results again."""

from __future__ import annotations

from pathlib import Path

import typer

from robustbench_ext.errors import ConfigError


def report(folder: Path = typer.Argument(help="A run folder, as `rbx run --out` made it.")) -> None:
    """Write report.html and report.md of a finished run again, from its results.json."""
    if not (folder / "results.json").is_file():
        raise ConfigError(f"{folder}: there is no results.json; expected a folder that `rbx run` made")
    from reports import write_reports

    for kind, file in write_reports(folder).items():
        print(f"{kind}: {file}")
