"""The tables as LaTeX, one fragment a table: `\\input{headline}` in a paper. They need booktabs; long ones also longtable."""

from __future__ import annotations

import re
from collections.abc import Sequence

from reports.contents import sections
from reports.names import clean, safe_name, shorten
from reports.tables import Cell, Column, Table
from robustbench_ext.results import RunResults

WIDEST, LONGEST = 6, 45  # columns beside each other; rows on one page
_NUMBER = re.compile(r"([-+]?\d[\d.]*)(?: (\[[-+\d., ]+\]))?")
_BRACKETS = "Brackets are 95\\,\\% intervals."
_BOLD = "Bold: better than every other model beyond chance."

_SPECIAL = {
    "\\": "\\textbackslash{}",
    "{": "\\{",
    "}": "\\}",
    "$": "\\$",
    "&": "\\&",
    "#": "\\#",
    "_": "\\_",
    "%": "\\%",
    "~": "\\textasciitilde{}",
    "^": "\\textasciicircum{}",
    "<": "\\textless{}",
    ">": "\\textgreater{}",
    "|": "\\textbar{}",
    '"': "\\symbol{34}",
    "`": "\\symbol{96}",
    "[": "{[}",  # behind \\ a bracket would be its argument, and a star its variant
    "]": "{]}",
    "*": "{*}",
    "–": "--",
    "—": "---",
    "…": "\\dots{}",
    "·": "\\textperiodcentered{}",
    "↑": "$\\uparrow$",
    "↓": "$\\downarrow$",
    "→": "$\\to$",
    "−": "$-$",
    "×": "$\\times$",
    "±": "$\\pm$",
    "≤": "$\\leq$",
    "≥": "$\\geq$",
    "∞": "$\\infty$",
    "²": "$^2$",
    "Δ": "$\\Delta$",
    "α": "$\\alpha$",
    "β": "$\\beta$",
    "ε": "$\\varepsilon$",
    "κ": "$\\kappa$",
    "λ": "$\\lambda$",
    "μ": "$\\mu$",
    "σ": "$\\sigma$",
    "τ": "$\\tau$",
}


def render_latex(results: RunResults) -> dict[str, str]:
    """Fragments by name (`headline`, `robustness`, ...): each a float with caption and label, or a longtable where it is long.

    Tables of more than six columns are cut into several, one below the other.
    """
    prefix = f"tab:{_slug(safe_name(str(results.suite['name'])))}"
    about = f"{escape(str(results.data['name']))}, $n = {results.suite['n']}$ test samples."
    made = f"% {clean(results.generator['name'])} {clean(results.generator['version'])}"
    found: dict[str, str] = {}
    for section in sections(results):
        name = _slug(section.title)  # the project's own words
        said = [_sentence(section.table.caption), about, *_signs(section.table), escape(section.note)]
        tables = fragment(section.table, " ".join(said).rstrip(), f"{prefix}:{name}")
        needs = "booktabs, longtable" if len(section.table.rows) > LONGEST else "booktabs"
        found[name] = "\n".join([f"{made}; needs {needs}", *tables]) + "\n"
    return found


def fragment(table: Table, caption: str, label: str) -> list[str]:
    """A table as lines of LaTeX. `caption` is LaTeX already; `label` holds letters, digits, colons and hyphens."""
    starts = range(0, max(1, len(table.columns)), WIDEST)
    lines: list[str] = []
    for number, start in enumerate(starts):
        part = slice(start, start + WIDEST)
        columns, rows = table.columns[part], [(name, cells[part]) for name, cells in table.rows]
        more = f" Columns {start + 1} to {start + len(columns)} of {len(table.columns)}." if len(starts) > 1 else ""
        write = _long if len(rows) > LONGEST else _float
        lines += write(table.corner, columns, rows, caption + more, label + (f"-{number + 1}" if number else ""))
    return lines


def _float(
    corner: str, columns: list[Column], rows: list[tuple[str, list[Cell]]], caption: str, label: str
) -> list[str]:
    head = _row([escape(corner), *(escape(shorten(c.title)) for c in columns)])
    return [
        "\\begin{table}[tbp]",
        "\\centering\\small",
        f"\\caption{{{caption}}}",
        f"\\label{{{label}}}",
        f"\\begin{{tabular}}{{{_alignment(columns, rows)}}}",
        "\\toprule",
        head,
        "\\midrule",
        *(_row([escape(shorten(name)), *map(_cell, cells)]) for name, cells in rows),
        "\\bottomrule",
        "\\end{tabular}",
        "\\end{table}",
    ]


def _long(
    corner: str, columns: list[Column], rows: list[tuple[str, list[Cell]]], caption: str, label: str
) -> list[str]:
    head = _row([escape(corner), *(escape(shorten(c.title)) for c in columns)])
    return [
        "{\\small",
        f"\\begin{{longtable}}{{{_alignment(columns, rows)}}}",
        f"\\caption{{{caption}}}\\label{{{label}}}\\\\",
        "\\toprule",
        head,
        "\\midrule",
        "\\endfirsthead",
        "\\toprule",
        head,
        "\\midrule",
        "\\endhead",
        *(_row([escape(shorten(name)), *map(_cell, cells)]) for name, cells in rows),
        "\\bottomrule",
        "\\end{longtable}}",
    ]


def _alignment(columns: Sequence[Column], rows: Sequence[tuple[str, list[Cell]]]) -> str:
    """Numbers to the right, words to the left."""
    numeric = [any(cells[i].value is not None for _, cells in rows) for i in range(len(columns))]
    return "l" + "".join("r" if is_number else "l" for is_number in numeric)


def _row(cells: Sequence[str]) -> str:
    return " & ".join(cells) + " \\\\"


def _cell(cell: Cell) -> str:
    """`93.4 [91.8, 94.7]` with the interval in small type; a dash for what is undefined, without its reason."""
    found = _NUMBER.fullmatch(cell.text)
    if found is None:
        return f"\\textbf{{{escape(cell.text)}}}" if cell.best else escape(cell.text)
    value, interval = found[1], found[2]
    number = f"$\\mathbf{{{value}}}$" if cell.best else f"${value}$"
    return number + (f" {{\\scriptsize ${interval}$}}" if interval else "")


def _signs(table: Table) -> list[str]:
    """What brackets and bold mean, where there are any."""
    cells = [cell for _, row in table.rows for cell in row]
    said = [_BRACKETS] if any("[" in cell.text for cell in cells) and "brackets" not in table.caption else []
    return said + ([_BOLD] if any(cell.best for cell in cells) else [])


def _sentence(text: str) -> str:
    return escape(text).rstrip(".") + "."


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def escape(text: str) -> str:
    """Text for LaTeX: nothing in it is a command. What pdfLaTeX has no letter for is named by its number.

    >>> escape("50 % of $a_1$ [b]")
    '50 \\\\% of \\\\$a\\\\_1\\\\$ {[}b{]}'
    """
    return "".join(_character(c) for c in clean(text))


def _character(c: str) -> str:
    if c in _SPECIAL:
        return _SPECIAL[c]
    if c.isascii() or ("\u00c0" <= c <= "\u017e" and c.isalpha()):  # letters that the T1 and OT1 encodings have
        return c
    return f"{{[}}U+{ord(c):04X}{{]}}"
