"""`rbx`: the command line. One file per subcommand; nothing heavy is imported until a command needs it."""

from __future__ import annotations

import sys
import traceback
from typing import Any

import typer
import typer.core

from robustbench_ext import __version__
from robustbench_ext.cli.check import check
from robustbench_ext.cli.compare import compare
from robustbench_ext.cli.console import PARTIAL, USAGE, complain, spare_stdout
from robustbench_ext.cli.doctor import doctor
from robustbench_ext.cli.export import export
from robustbench_ext.cli.fetch import fetch
from robustbench_ext.cli.leaderboard import leaderboard
from robustbench_ext.cli.list import list_
from robustbench_ext.cli.plan import plan
from robustbench_ext.cli.report import report
from robustbench_ext.cli.rift import rift
from robustbench_ext.cli.run import run as run_command
from robustbench_ext.cli.train import train
from robustbench_ext.cli.work import work
from robustbench_ext.errors import RobustBenchExtError, StoppedError


class _Commands(typer.core.TyperGroup):
    """The commands with the whole first paragraph of their help, not with as much of it as fits one line."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        first = {name: (command.help or "").split("\n\n")[0] for name, command in self.commands.items()}
        rows = [(name, " ".join(first[name].split())) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


app = typer.Typer(
    name="rbx",
    cls=_Commands,
    rich_markup_mode=None,  # tables leave 19 of 80 columns for what an option means
    help="May I trust this model, and how do I know? Attacks, corruptions, unknown inputs and calibration of a PyTorch "
    "model, measured on the same samples, with error bars.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    epilog="Start with: rbx run quickstart --out runs/quickstart",
)
app.command("run")(run_command)
app.command("plan")(plan)
app.command("train")(train)
app.command("rift")(rift)
app.command("check")(check)
app.command("list")(list_)
app.command("fetch")(fetch)
app.command("report")(report)
app.command("compare")(compare)
app.command("export")(export)
app.command("leaderboard")(leaderboard)
app.command("work")(work)
app.command("doctor")(doctor)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"robustbench-ext {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Show the version."),
) -> None:
    """Exit codes: 0 fine, 1 a check failed, 2 usage, 4 partial (some cells failed, or the run had to stop)."""


def run() -> None:
    """Entry point: errors that users cause are a sentence and exit code 2, not a traceback."""
    spare_stdout()
    try:
        app()
    except StoppedError as error:
        complain(str(error))
        sys.exit(PARTIAL)
    except RobustBenchExtError as error:
        complain(str(error))
        sys.exit(USAGE)
    except KeyboardInterrupt:
        complain("interrupted. What was computed is kept: run the same command again to go on.")
        sys.exit(130)
    except Exception:
        traceback.print_exc()
        complain("this is a defect of robustbench-ext, not of your input. Please report it with the lines above.")
        sys.exit(70)


if __name__ == "__main__":
    run()
