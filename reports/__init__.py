"""Rendering of results: tables, figures, HTML, Markdown. It knows the results' schema and computes nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["write_reports"]


def write_reports(folder: str | Path) -> dict[str, Path]:
    """Write report.html and report.md of a run folder from its results.json (and run.json, gallery.json).

    Returns:
        The files written, by kind: "html", "markdown".
    """
    from reports.html import render_html
    from reports.markdown import render_markdown
    from robustbench_ext.errors import ConfigError
    from robustbench_ext.files import write_atomically
    from robustbench_ext.results import RunResults

    folder = Path(folder)
    results = RunResults.read(folder / "results.json")

    def optional(name: str) -> Any:
        file = folder / name
        try:
            return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
        except ValueError as error:
            raise ConfigError(f"{file}: damaged: {error}. Delete it to go on without it.") from None

    html = render_html(results, run=optional("run.json"), gallery=optional("gallery.json") or [])
    files = {"html": folder / "report.html", "markdown": folder / "report.md"}
    write_atomically(files["html"], lambda file: file.write_text(html, encoding="utf-8"))
    markdown = render_markdown(results)
    write_atomically(files["markdown"], lambda file: file.write_text(markdown, encoding="utf-8"))
    return files
