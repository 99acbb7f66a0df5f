"""`rbx leaderboard`: many runs as one static site, with ranks that say how sure they are."""

from __future__ import annotations

from pathlib import Path

import typer

from robustbench_ext.cli.console import PARTIAL, complain
from robustbench_ext.errors import ConfigError


def leaderboard(
    runs: list[Path] = typer.Argument(help="Run folders, as `rbx run --out` made them."),
    out: Path = typer.Option(..., help="Folder of the site; open its index.html."),
    title: str = typer.Option("Leaderboard", help="The site's title."),
    with_reports: bool = typer.Option(False, "--with-reports", help="Copy each run's report.html into the site."),
) -> None:
    """Rank the models of many runs: a static site with a table for each group of comparable runs and a page for each model.

    Models are tested in pairs on the same samples; ranks are intervals, and no winner is named within chance. Runs that
    measured something else get a table of their own. What cannot be read is listed as left out, and the exit code is 4.

    Example: rbx leaderboard runs/* --out site
    """
    from reports.leaderboard import write_site

    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out}: a file is in the way; expected a folder, which is made if it is not there")
    site = write_site(runs, out, title, with_reports)
    for item in site.left_out:
        complain(f"left out: {item.what}: {item.reason}")
    print(f"{site.models} models on {site.boards} board{'' if site.boards == 1 else 's'}: {site.index}")
    if site.left_out:
        raise typer.Exit(PARTIAL)
