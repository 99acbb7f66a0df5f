"""report.md: the tables, for a pull request. No dates and no timings, so equal results give equal bytes."""

from __future__ import annotations

from reports import tables
from reports import uncertainty_tables as made
from robustbench_ext import axes
from robustbench_ext.results import RunResults

_VERDICTS = {"pass": "no doubts", "doubt": "doubts", "fail": "NOT TO BE TRUSTED"}


def render_markdown(results: RunResults) -> str:
    """The whole report as GitHub-flavoured Markdown."""
    suite = results.suite
    out = [f"# {escape(str(suite['title']))}", "", _verdict(results), ""]
    if suite["description"]:
        out += [escape(str(suite["description"])), ""]
    out += [f"Data: {escape(str(results.data['name']))}, n = {suite['n']} test samples, seed {suite['seed']}.", ""]
    for title, table in _regression(results) if axes.is_regression(results) else _classification(results):
        if table is not None and table.rows:
            out += [f"## {title}", "", *table_lines(table), ""]
    out += ["## Metrics", ""]
    used = dict.fromkeys(row.metric for row in results.results)
    for metric in used:
        about = results.metrics[metric]
        methods = dict.fromkeys(r.ci_method for r in results.results if r.metric == metric and r.ci_method != "none")
        intervals = f" Intervals (95 %): {'; '.join(methods)}." if methods else ""
        out.append(f"- **{about['title']}**: {escape(about['definition'] + intervals)}")
    out += ["", f"{results.generator['name']} {results.generator['version']}"]
    return "\n".join(out) + "\n"


def _classification(results: RunResults) -> list[tuple[str, tables.Table | None]]:
    """The tables under their headings; long ones of uncertainty are in the HTML report and in results.csv alone."""
    shown = [axes.CLEAN, *made.strongest(results)]
    with_estimators = bool(axes.estimators(results))
    return [
        ("Headline", tables.headline(results)),
        ("Robustness", tables.robustness(results)),
        ("Distances", tables.distances(results)),
        ("Targeted attacks", tables.targeted(results)),
        ("Classes", tables.tails(results)),
        ("Corruptions", tables.corruptions(results)),
        ("Calibration, clean", made.calibration_clean(results) if with_estimators else None),
        ("Calibration", tables.calibration(results)),
        ("Prediction sets", made.sets(results, shown)),
        ("Uncertainty: mistakes, clean", made.mistakes(results, [axes.CLEAN])),
        ("Uncertainty: other inputs", made.telling_apart(results)[0]),
        ("Energy", tables.energies(results)),
        *((t.caption.replace(": clean test inputs against", ":"), t) for t in tables.detection(results)),
        ("Abstaining", tables.abstaining(results)),
    ]


def _regression(results: RunResults) -> list[tuple[str, tables.Table | None]]:
    return [
        ("Headline", tables.headline(results)),
        ("Errors", made.errors(results)),
        ("Prediction intervals, clean", made.intervals(results)),
        *((f"Prediction intervals: {t.caption}", t) for t in made.intervals_shifted(results)),
        ("Uncertainty: errors, clean", made.rankings(results, [axes.CLEAN])),
        ("Uncertainty: other inputs", made.telling_apart(results)[0]),
    ]


def _verdict(results: RunResults) -> str:
    findings, names = results.suspicions, tables.suspected(results)
    lines = [f"**Checks: {_VERDICTS[results.verdict]}{escape(f': {names}' if names else '')}**"]
    lines += [f"- {escape(f'{f.status}: {f.model}: {f.name}: {f.message} {f.hint}'.strip())}" for f in findings]
    lines += [f"- {escape(f'could not be computed: {f.what}: {f.error}')}" for f in results.failures]
    lines += [f"- {escape(note)}" for note in results.notes]
    return "\n".join(lines)


def table_lines(table: tables.Table) -> list[str]:
    """A table as lines of Markdown."""
    head = [table.corner, *(column.title for column in table.columns)]
    lines = [_row(head), "|" + " --- |" * 1 + " ---: |" * len(table.columns)]
    lines += [_row([name, *(_text(cell) for cell in cells)]) for name, cells in table.rows]
    return lines


def _text(cell: tables.Cell) -> str:
    """A dash says why it is one."""
    return f"{cell.text} ({cell.note})" if cell.text == "–" and cell.note else cell.text


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(escape(cell) for cell in cells) + " |"


def escape(text: str) -> str:
    """Names come from files: no markup, no table breaks, no line breaks."""
    for character, safe in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("|", "\\|"), ("`", "\\`"), ("*", "\\*")):
        text = text.replace(character, safe)
    return " ".join(text.split())
