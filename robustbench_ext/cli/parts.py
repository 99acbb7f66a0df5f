"""The end of `rbx run` for a run of several suites: the reports, the joint table in the terminal, the exit code."""

from __future__ import annotations

import typer

from robustbench_ext.callbacks import Callbacks
from robustbench_ext.cli.console import CHECK_FAILED, PARTIAL, paragraph, say
from robustbench_ext.parts import PartsSummary


def finish_parts(summary: PartsSummary, told: Callbacks) -> None:
    """Write the report of every part and the joint one, and say what the parts say together."""
    from reports import write_reports
    from reports.parts import write_joint_report

    for name, part in summary.parts.items():
        written = {"html": part.folder / "report.html", "markdown": part.folder / "report.md"}
        if part.computed or part.trained or not all(file.is_file() for file in written.values()):
            say(f"writing the report of {name}")
            write_reports(part.folder)
    written = write_joint_report(summary.folder)
    told.on_report(written)
    for answer in summary.results.answers:
        paragraph(f"{answer.question} {answer.text}")
    for failure in summary.failures:
        paragraph(f"failed: {failure.what}: {failure.error}")
    print(f"report: {written['html']}")
    if summary.failures:
        raise typer.Exit(PARTIAL)
    if summary.verdict == "fail":
        raise typer.Exit(CHECK_FAILED)
