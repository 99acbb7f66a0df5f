"""`rbx compare`: which of two models is better, on the same samples, beyond chance?"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from robustbench_ext.cli.console import CHECK_FAILED, paragraph
from robustbench_ext.errors import ConfigError

if TYPE_CHECKING:
    from reports.tables import Table


def compare(
    runs: list[Path] = typer.Argument(help="Run folders; later ones are compared with the first. One: its own models."),
    pair: list[str] = typer.Option(
        [],
        help="OLD=NEW: compare model NEW of the later runs with OLD of the first. By default those of the same name.",
    ),
    all_: bool = typer.Option(False, "--all", help="Everything that both measured, not only the axes of the headline."),
    common: bool = typer.Option(
        False, help="Leave out conditions that the runs define differently, instead of refusing."
    ),
    out: Path | None = typer.Option(None, help="Folder for compare.json and compare.md."),
    fail_on_worse: bool = typer.Option(False, "--fail-on-worse", help="Exit with 1 where something is worse."),
) -> None:
    """Compare models on the same samples: paired tests, corrected for their number.

    Runs that measured something else (data, samples, budgets, steps, seeds) are refused with the differences.

    Example: rbx compare runs/before runs/after
    """
    from reports.comparison import pairs as pairs_of
    from reports.comparison import table
    from robustbench_ext.compare import compare_runs

    if out is not None and out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out}: a file is in the way; expected a folder, which is made if it is not there")
    found = compare_runs(runs, [_pair(text) for text in pair], everything=all_, common=common)
    for note in found.notes:
        paragraph(f"note: {note}")
    tables = [table(*names, found.comparisons, found.metrics) for names in pairs_of(found.comparisons)]
    if not tables:
        paragraph("there is nothing that both measured and that can be compared sample by sample")
    for content in tables:
        _print(content)
    if found.comparisons:
        print(f"p-values are corrected for all {len(found.comparisons)} comparisons above (Holm)")
    if out is not None:
        from reports.comparison import to_markdown
        from robustbench_ext.files import write_atomically

        out.mkdir(parents=True, exist_ok=True)
        text = to_markdown(tables, found.notes)
        write_atomically(out / "compare.json", lambda file: file.write_text(found.to_json(), encoding="utf-8"))
        write_atomically(out / "compare.md", lambda file: file.write_text(text, encoding="utf-8"))
        print(f"comparison: {out / 'compare.md'}")
    if fail_on_worse and any(c.outcome == "worse" for c in found.comparisons):
        raise typer.Exit(CHECK_FAILED)


def _pair(text: str) -> tuple[str, str]:
    old, equals, new = text.partition("=")
    if not (old and equals and new):
        raise ConfigError(f"--pair {text}: expected OLD=NEW, for example --pair standard=trades")
    return old, new


def _print(content: Table) -> None:
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    console = Console(width=None if sys.stdout.isatty() else 80)
    made = RichTable(title=Text(content.caption), title_justify="left")
    made.add_column("", overflow="fold")
    for i, column in enumerate(content.columns):
        made.add_column(column.title, justify="right" if i < len(content.columns) - 1 else "left")
    for name, cells in content.rows:
        made.add_row(Text(name), *[Text(cell.text) for cell in cells])
    console.print(made)
