"""report.md: the tables, for a pull request. No dates and no timings, so equal results give equal bytes.

GitHub refuses comments of more than 65,536 characters. So the file has a budget: what matters comes first and keeps its space,
long tables are folded and lose rows, and what is left out is said, with the file that holds it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from reports import tables
from reports.contents import EVERYTHING, Section, sections
from reports.names import clean, clip, shorten
from robustbench_ext.results import RunResults

LIMIT = 60_000  # bytes
FOLDED = 15  # rows from which on a table is folded
_VERDICTS = {"pass": "no doubts", "doubt": "doubts", "fail": "NOT TO BE TRUSTED"}
_BOLD = "**Bold**: better than every other model beyond chance (same samples, corrected for the number of comparisons)."
_SENTENCE = 400  # characters of a finding or a note
_REASON = 80  # characters of the reason for a dash
_FOLD = 80  # bytes that folding adds


@dataclass(frozen=True)
class _Block:
    """A part that can lose items.

    Attributes:
        items: lines, in the order in which they are shown.
        ranks: of each item; where space is short, low ranks stay, and of equal ranks the first.
        top, head: lines above, and those directly on top of the items (a table's head); they count.
        fold: items from which on they are folded.
    """

    title: str
    noun: str
    items: list[str]
    ranks: list[int]
    weight: int
    file: str
    top: tuple[str, ...] = ()
    head: tuple[str, ...] = ()
    fold: int = FOLDED

    @cached_property
    def _order(self) -> list[int]:
        """Positions of the items, what stays longest first."""
        return sorted(range(len(self.items)), key=lambda i: (self.ranks[i], i))

    @cached_property
    def _sizes(self) -> list[int]:
        return [_size([item]) for item in self.items]

    def within(self, space: float) -> tuple[list[str], int]:
        """Lines that take at most so many bytes, and how many items are in them; nothing where not even one fits."""
        left = space - _size([*self.top, *self.head]) - _FOLD
        kept = []
        for at in self._order:
            left -= self._sizes[at]
            if left < 0:
                break
            kept.append(at)
        if not kept:
            return [], 0
        lines = [*self.head, *(self.items[at] for at in sorted(kept))]
        if len(kept) >= self.fold:
            lines = ["<details>", f"<summary>{len(kept)} {self.noun}</summary>", "", *lines, "", "</details>"]
        return [*self.top, *lines, ""], len(kept)


def render_markdown(results: RunResults, limit: int = LIMIT) -> str:
    """The report as GitHub-flavoured Markdown of at most `limit` bytes (20,000 or more), whatever the run."""
    above, below = _above(results), _below(results)
    shown = [*_checks(results), *(_table(section) for section in sections(results)), *_definitions(results)]
    space = float(limit)
    while True:
        parts = [block.within(space * block.weight) for block in shown]
        out = [*above, *(line for lines, _ in parts for line in lines), *_left_out(shown, parts, limit), *below]
        if _size(out) <= limit or space < 1:
            return "\n".join(out) + "\n"
        space *= 0.95


def _above(results: RunResults) -> list[str]:
    suite, names = results.suite, tables.suspected(results)
    verdict = _VERDICTS[results.verdict] + (f": {clip(names, 600)}" if names else "")
    data = f"Data: {clip(str(results.data['name']), 100)}, n = {suite['n']} test samples, seed {suite['seed']}."
    description = [_line(clip(str(suite["description"]), 800)), ""] if suite["description"] else []
    return [
        f"# {escape(clip(str(suite['title']), 120))}",
        "",
        f"**Checks: {escape(verdict)}**",
        "",
        *description,
        escape(data),
        "",
    ]


def _below(results: RunResults) -> list[str]:
    made = f"{results.generator['name']} {results.generator['version']}"
    return [
        "Figures and all tables: report.html. Every estimate: results.csv. Comparisons, seeds, checks and notes: results.json.",
        "",
        escape(clip(made, 100)),
    ]


def _checks(results: RunResults) -> list[_Block]:
    findings = [f"{f.status}: {shorten(f.model)}: {f.name}: {f.message} {f.hint}" for f in results.suspicions]
    failures = [f"could not be computed: {shorten(f.what)}: {f.error}" for f in results.failures]
    return [*_list("Checks that did not pass", "findings", findings, 4), *_list("Failures", "failures", failures, 2)]


def _definitions(results: RunResults) -> list[_Block]:
    definitions = []
    for metric in dict.fromkeys(row.metric for row in results.results):
        about = results.metrics[metric]
        methods = dict.fromkeys(r.ci_method for r in results.results if r.metric == metric and r.ci_method != "none")
        intervals = f" Intervals (95 %): {'; '.join(methods)}." if methods else ""
        definitions.append(f"- **{escape(about['title'])}**: {escape(clip(about['definition'] + intervals, 1000))}")
    metrics = _Block("Metrics", "metrics", definitions, [0] * len(definitions), 1, EVERYTHING, ("## Metrics", ""))
    return [*_list("Notes", "notes", results.notes, 1), *([metrics] if definitions else [])]


def _list(title: str, noun: str, texts: Sequence[str], weight: int) -> list[_Block]:
    items = [f"- {_line(clip(text, _SENTENCE))}" for text in texts]
    return [_Block(title, noun, items, [0] * len(items), weight, EVERYTHING, (f"## {title}", ""))] if items else []


def _table(section: Section) -> _Block:
    head, delimiter, *rows = table_lines(section.table)
    bold = _BOLD if any(cell.best for _, cells in section.table.rows for cell in cells) else ""
    notes = " ".join(note for note in (bold, escape(section.note)) if note)
    top = [f"## {escape(section.title)}", "", *([notes, ""] if notes else [])]
    names = [name for name, _ in section.table.rows]
    fold = FOLDED if section.weight < 4 else 10 * FOLDED
    ranks = _ranks(names, section.first)
    return _Block(section.title, "rows", rows, ranks, section.weight, section.file, tuple(top), (head, delimiter), fold)


def _ranks(names: Iterable[str], first: frozenset[str]) -> list[int]:
    """What matters first has rank 0; of the others, every model's first row comes before any model's second."""
    seen: dict[str, int] = {}
    ranks = []
    for name in names:
        model = name.partition(" · ")[0]
        seen[model] = seen.get(model, 0) + 1
        ranks.append(0 if name in first else seen[model])
    return ranks


def _left_out(shown: Sequence[_Block], parts: Sequence[tuple[list[str], int]], limit: int) -> list[str]:
    """What is missing of each part, and where it is."""
    missing = [
        f"- {escape(block.title)}: {len(block.items) - kept} of {len(block.items)} {block.noun} (all in {block.file})"
        for block, (_, kept) in zip(shown, parts, strict=True)
        if kept < len(block.items)
    ]
    why = f"This file is kept under {limit // 1000} kB, so that it fits into a comment. Not in it:"
    return ["## Left out", "", why, "", *missing, ""] if missing else []


def _size(lines: Iterable[str]) -> int:
    """Bytes of lines with their ends."""
    return sum(len(line.encode()) + 1 for line in lines)


# Tables and text -----------------------------------------------------------------------------------------------------


def table_lines(table: tables.Table) -> list[str]:
    """A table as lines of Markdown; long names are shortened, what is best is bold."""
    head = [table.corner, *(shorten(column.title) for column in table.columns)]
    lines = [_row(escape(cell) for cell in head), "| --- |" + " ---: |" * len(table.columns)]
    lines += [_row([escape(shorten(name)), *(_cell(cell) for cell in cells)]) for name, cells in table.rows]
    return lines


def _cell(cell: tables.Cell) -> str:
    """A dash says why it is one."""
    if cell.text == "–" and cell.note:
        return escape(f"– ({clip(cell.note, _REASON)})")
    return f"**{escape(cell.text)}**" if cell.best else escape(cell.text)


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "|": "&#124;", "$": "&#36;"}
_GAP = "&#8203;"  # a space of no width: what stands on its two sides is no longer one word to GitHub
_LINKED = (  # what GitHub makes of plain text: mentions, addresses of mail, issues, addresses, emoji
    r"(?<!\w)@(?=\w)|@(?=[\w-]+\.\w)|\#(?=\w)|\bGH(?=-\d)|:(?=//)|\bwww(?=\.)|:(?=[\w+-]+:)"
)
_SPECIAL = re.compile(
    r"(?P<interval>\[[-+]?[\d.]+, [-+]?[\d.]+\](?![(\[:]))"  # nobody's link: it stays readable
    r"|(?P<entity>[&<>|$])"
    r"|(?P<mark>[\\`*_\[\]~])"
    rf"|(?P<linked>{_LINKED})"
    r"|(?P<commit>\b(?=[0-9a-f]*[0-9])(?=[0-9a-f]*[a-f])[0-9a-f]{7,40}\b)",
    re.IGNORECASE,
)


def escape(text: str) -> str:
    """Names come from files: no markup, no breaks, and nothing that GitHub makes a link or a mention of by itself.

    >>> escape("a|b <i> @me #1")
    'a&#124;b &lt;i&gt; @&#8203;me #&#8203;1'
    """
    return _SPECIAL.sub(_harmless, clean(text))


def _harmless(found: re.Match[str]) -> str:
    text = found[0]
    if found["interval"]:
        return text
    if found["entity"]:
        return _ENTITIES[text]
    if found["mark"]:
        return f"\\{text}"
    if found["linked"]:
        return f"{text}{_GAP}"
    return _GAP.join(text[i : i + 6] for i in range(0, len(text), 6))  # seven digits would do for a commit


def _line(text: str) -> str:
    """Text at the beginning of a line: no list, no heading, no number of an item."""
    safe = re.sub(r"^(\d+)([.)])", r"\1\\\2", escape(text))
    return re.sub(r"^[#+=-]", r"\\\g<0>", safe)
