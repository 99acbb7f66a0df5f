"""What is said at the end of a session: a table on the terminal, Markdown for GitHub, HTML where it is asked for."""

from __future__ import annotations

import html
import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from robustbench_ext.files import write_atomically

WIDTH = 80
LARGEST = 900_000  # bytes; GitHub refuses a step's summary above 1 MiB
ORDER = ("fail", "inconclusive", "skipped", "pass")
Rows = Sequence[dict[str, Any]]


def conclude(terminal: Any, config: pytest.Config, rows: Rows) -> None:
    """Say it everywhere."""
    if rows:
        terminal.write_sep("=", "robustness")
        for line in table(rows):
            terminal.write_line(line)
        github = os.environ.get("GITHUB_STEP_SUMMARY")
        if github:
            append_capped(Path(github), markdown(rows))
    wanted = config.getoption("robust_report") or config.getini("robust_report")
    if wanted:
        file = Path(str(wanted))
        file = file if file.is_absolute() else config.invocation_params.dir / file
        write_atomically(file, lambda path: path.write_text(page(rows), encoding="utf-8"))
        terminal.write_line(f"report: {file}")


def counts(rows: Rows) -> str:
    """`1 fail, 2 inconclusive, 12 pass`."""
    found = [(o, sum(row["outcome"] == o for row in rows)) for o in ORDER]
    return ", ".join(f"{n} {outcome}" for outcome, n in found if n)


def by_test(rows: Rows) -> dict[str, list[dict[str, Any]]]:
    """Rows of each test, in the order of the tests' names, which no number of workers changes."""
    tests: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        tests.setdefault(str(row.get("test", "")), []).append(row)
    return dict(sorted(tests.items()))


def number(row: dict[str, Any]) -> str:
    """`0.512 [0.468, 0.556]`."""
    if row["value"] is None:
        return "-"
    return f"{row['value']} [{row['low']}, {row['high']}]"


def table(rows: Rows) -> list[str]:
    """Lines of at most 80 columns."""
    lines = []
    for test, mine in by_test(rows).items():
        lines.append(_cut(test, WIDTH))
        for row in mine:
            right = f"{number(row)} {row['wanted']}  n={row['n']}"
            left = f"  {row['outcome']:<12} "
            room = WIDTH - len(left) - len(right) - 2
            if len(row["name"]) <= room:
                lines.append(f"{left}{row['name']:<{room}}  {right}")
            else:  # cut, two attacks would look alike
                lines += [_cut(f"{left}{row['name']}", WIDTH), _cut(f"{'':>15}{right}", WIDTH)]
    lines.append(counts(rows))
    written = list(dict.fromkeys(row["updated"] for row in rows if row.get("updated")))
    for text in written:
        lines += textwrap.wrap(f"baseline {text}", WIDTH, subsequent_indent="    ", break_long_words=False)
    return lines


def _cut(text: str, width: int) -> str:
    """Without its middle: names that are long mostly differ at their ends."""
    end = (width - 1) * 2 // 3
    return text if len(text) <= width else f"{text[: width - 1 - end]}…{text[-end:]}"


# Markdown ------------------------------------------------------------------------------------------------------------


def markdown(rows: Rows) -> str:
    """A table of all expectations, and the messages of those that do not pass."""
    lines = [f"### Robustness: {counts(rows)}", ""]
    lines += ["| verdict | test | metric | value [interval] | wanted | n |", "| --- | --- | --- | --- | --- | --- |"]
    lines += [
        f"| {row['outcome']} | {_cell(test)} | {_cell(row['name'])} | {number(row)} | {_cell(row['wanted'])} | {row['n']} |"
        for outcome in ORDER
        for test, mine in by_test(rows).items()
        for row in mine
        if row["outcome"] == outcome
    ]
    for test, mine in by_test(rows).items():
        for row in mine:
            if row["outcome"] in ("fail", "inconclusive"):
                lines += ["", f"**{_cell(test)}**", "", *("    " + line for line in row["message"].splitlines())]
    return "\n".join(lines) + "\n\n"


def _cell(text: str) -> str:
    return html.escape(text, quote=False).replace("|", "\\|").replace("\n", " ")


def append_capped(file: Path, text: str, largest: int = LARGEST) -> None:
    """Append to a step's summary as much as GitHub takes: whole lines, and a last one that says what is missing."""
    there = file.stat().st_size if file.is_file() else 0
    note = "\n(cut: GitHub takes no more)\n"
    room = largest - there - len(note)
    data = text.encode()
    if len(data) > room:
        data = data[: max(0, room)]
        data = data[: data.rfind(b"\n") + 1] + note.encode() if room > 0 else b""
    if data:
        with file.open("ab") as stream:
            stream.write(data)


# HTML ----------------------------------------------------------------------------------------------------------------

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 68rem; padding: 0 1rem }
body { color: #1a1a1a; background: #fff }
table { border-collapse: collapse; width: 100% }
th, td { text-align: left; padding: .3rem .6rem; border-bottom: 1px solid #ddd }
td.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
pre { white-space: pre-wrap; background: #f6f6f6; padding: .6rem } .fail { color: #a40000; font-weight: 600 }
.inconclusive { color: #7a4d00; font-weight: 600 } .skipped { color: #555 } .pass { color: #00600f }
@media (prefers-color-scheme: dark) { body { color: #e6e6e6; background: #161616 } pre { background: #222 }
th, td { border-color: #333 } .fail { color: #ff8a80 } .inconclusive { color: #ffc46b } .skipped { color: #aaa }
.pass { color: #7bd88f } }
"""


def page(rows: Rows) -> str:
    """A page that needs nothing else."""
    e = html.escape
    body = []
    for outcome in ORDER:
        for test, mine in by_test(rows).items():
            for row in mine:
                if row["outcome"] != outcome:
                    continue
                body.append(
                    f'<tr><td class="{outcome}">{outcome}</td><td>{e(test)}</td><td>{e(row["title"])}</td>'
                    f'<td>{e(row["name"])}</td><td class="n">{e(number(row))}</td><td>{e(row["wanted"])}</td>'
                    f'<td class="n">{row["n"]}</td></tr>'
                )
                if outcome in ("fail", "inconclusive"):
                    body.append(f'<tr><td></td><td colspan="6"><pre>{e(row["message"])}</pre></td></tr>')
    head = "".join(f"<th>{h}</th>" for h in ("verdict", "test", "model", "metric", "value [interval]", "wanted", "n"))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Robustness: {e(counts(rows) or 'no expectations')}</title><style>{_STYLE}</style></head><body>"
        f"<h1>Robustness</h1><p>{e(counts(rows) or 'No test stated an expectation.')}</p>"
        f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></body></html>\n"
    )
