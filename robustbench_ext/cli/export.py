"""`rbx export`: a finished run in the formats of others."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from robustbench_ext.cli.console import paragraph, settings
from robustbench_ext.errors import ConfigError, unknown_name

if TYPE_CHECKING:
    from robustbench_ext.results import RunResults

FORMATS = ("latex", "markdown", "csv", "schema", "badge", "model-index", "robustbench")
OF_A_MODEL = ("badge", "model-index", "robustbench")


def export(
    run: Path | None = typer.Argument(None, help="A run folder, or its results.json; --to schema needs none."),
    to: str = typer.Option(..., "--to", help=f"One of {', '.join(FORMATS)}."),
    model: str | None = typer.Option(None, help="Which model, for badge, model-index and robustbench."),
    out: Path | None = typer.Option(
        None, help="File, or folder, to write; - is standard output. By default the folder `exports` of the run."
    ),
    axis: str | None = typer.Option(None, help="badge: which axis of the headline, such as 'clean accuracy'."),
    norm: str | None = typer.Option(None, help="robustbench: Linf or L2, where the run has both."),
    set_: list[str] = typer.Option(
        [], "--set", help="robustbench: what a run cannot know, such as link=URL or authors='A. Author'."
    ),
) -> None:
    """Write a run's results as LaTeX tables, Markdown, CSV, a badge, metadata of a Hugging Face model card or an entry of
    RobustBench; or the JSON Schema of results.json. What would not be honest is refused, with the reasons.

    Example: rbx export runs/quickstart --to badge --model trades
    """
    if to not in FORMATS:
        raise ConfigError(unknown_name("format", to, FORMATS))
    for given, name, formats in ((axis, "--axis", ("badge",)), (norm, "--norm", ("robustbench",))):
        if given is not None and to not in formats:
            raise ConfigError(f"{name} belongs to --to {formats[0]}, not to --to {to}")
    if set_ and to != "robustbench":
        raise ConfigError(f"--set belongs to --to robustbench, not to --to {to}")
    if model is not None and to not in OF_A_MODEL:
        raise ConfigError(f"--model belongs to {', '.join(OF_A_MODEL)}; --to {to} holds all models of the run")
    if to == "schema":
        from reports.schema import render_schema

        _write({"results.schema.json": render_schema()}, out, Path())
        return
    if run is None:
        raise ConfigError(f"--to {to} needs a run folder, for example: rbx export runs/quickstart --to {to}")
    results = _read(run)
    folder = run if run.is_dir() else run.parent
    default = folder / "exports"
    if to == "latex":
        from reports.latex import render_latex

        _write({f"{name}.tex": text for name, text in render_latex(results).items()}, out, default / "latex")
    elif to in OF_A_MODEL:
        _write(_of_a_model(to, results, _model(results, model), axis, norm, set_), out, default)
    else:
        _write(_tables(to, results), out, default)


def _read(run: Path) -> RunResults:
    from robustbench_ext.results import RunResults

    file = run / "results.json" if run.is_dir() else run
    if not file.is_file():
        raise ConfigError(f"{run}: there is no results.json; expected a folder that `rbx run` made")
    return RunResults.read(file)


def _model(results: RunResults, model: str | None) -> str:
    from robustbench_ext.axes import model_names

    names = model_names(results)
    if model is None:
        if len(names) != 1:
            raise ConfigError(f"the run has {len(names)} models: name one with --model: {', '.join(names)}")
        return names[0]
    if model not in names:
        raise ConfigError(unknown_name("model", model, names))
    return model


def _tables(to: str, results: RunResults) -> dict[str, str]:
    from reports.csv_table import render_csv
    from reports.markdown import render_markdown

    made: dict[str, tuple[str, Callable[[RunResults], str]]] = {
        "markdown": ("report.md", render_markdown),
        "csv": ("results.csv", render_csv),
    }
    name, render = made[to]
    return {name: render(results)}


def _of_a_model(
    to: str, results: RunResults, model: str, axis: str | None, norm: str | None, about: list[str]
) -> dict[str, str]:
    """The text of a format that is about one model, under a file name that no model's name can lead elsewhere."""
    from reports.names import safe_name

    if to == "badge":
        from reports.badge import render_badge

        return {f"badge-{safe_name(model)}.svg": render_badge(results, model, axis)}
    if to == "model-index":
        from reports.model_index import render_model_index

        text, left = render_model_index(results, model)
        for sentence in left:
            paragraph(f"left out: {sentence}")
        return {f"model-index-{safe_name(model)}.yaml": text}
    from reports.robustbench import render_robustbench

    text, of_norm, unknown = render_robustbench(results, model, norm, settings(about))
    if unknown:
        paragraph(f"null, since a run cannot know them: {', '.join(unknown)}. Say them with --set FIELD=VALUE")
    return {f"robustbench-{of_norm}-{safe_name(model)}.json": text}


def _write(texts: dict[str, str], out: Path | None, default: Path) -> None:
    """Into a folder under their own names; one text also to a file of the user's name, or to standard output."""
    from robustbench_ext.files import write_atomically

    if str(out) == "-":
        sys.stdout.write("\n".join(texts.values()))
        return
    target = default if out is None else out
    if out is None or len(texts) > 1:
        if target.is_file():
            raise ConfigError(f"--out {target}: there are {len(texts)} files to write, and this is no folder")
        target.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        file = target / name if target.is_dir() else target
        write_atomically(file, lambda temporary, text=text: temporary.write_text(text, encoding="utf-8"))  # type: ignore[misc]
        print(file)
