"""A table as the page shows it: of a very long one a part, with a sentence that says so; rows and columns know their model."""

from __future__ import annotations

from dataclasses import dataclass

from reports.names import shorten
from reports.tables import Cell, Table
from reports.uncertainty_tables import strongest
from robustbench_ext.axes import CLEAN, model_names, of_kind
from robustbench_ext.results import RunResults

MOST_ROWS = 240


@dataclass(frozen=True)
class Head:
    """A column's heading; `model` is its place in the suite where the column is one model's."""

    title: str
    about: str
    model: int | None


@dataclass(frozen=True)
class Line:
    """A row. Of `cells` the notes are empty where all of the column have the same: then it is in the heading."""

    name: str
    full: str
    model: int | None
    cells: list[Cell]


@dataclass(frozen=True)
class View:
    """What the template needs of a table.

    Attributes:
        rows: how many the table has; `lines` are those that are shown.
        left_out: a sentence where they are not all; otherwise empty.
    """

    caption: str
    corner: str
    heads: list[Head]
    lines: list[Line]
    rows: int
    left_out: str


def view(table: Table, results: RunResults, most: int = MOST_ROWS) -> View:
    """Of more than `most` rows, as many of every model: first what is clean, most severe or unknown, then the rest."""
    place = {name: i for i, name in enumerate(model_names(results))}
    kept = _most_telling(table, place, results, most)
    common = [_common([cells[k].note for _, cells in kept]) for k in range(len(table.columns))]
    heads = [
        Head(shorten(c.title), "; ".join(t for t in (c.definition, note) if t), place.get(c.title))
        for c, note in zip(table.columns, common, strict=True)
    ]
    lines = []
    for name, cells in kept:
        own = [Cell(c.text, c.value, "" if note else c.note, c.best) for c, note in zip(cells, common, strict=True)]
        short = shorten(name)
        lines.append(Line(short, "" if short == name else name, _model_of(name, place), own))
    left_out = ""
    if len(kept) < len(table.rows):
        left_out = f"Shown are {len(kept)} of {len(table.rows):,} rows, as many of every model; all are in results.csv."
    return View(table.caption, table.corner, heads, lines, len(table.rows), left_out)


def _model_of(name: str, place: dict[str, int]) -> int | None:
    """The place of the model that a row is about; names may hold ` · ` themselves."""
    parts = name.split(" · ")
    return next((place[m] for k in range(len(parts), 0, -1) if (m := " · ".join(parts[:k])) in place), None)


def _common(notes: list[str]) -> str:
    return notes[0] if len(notes) > 1 and len(set(notes)) == 1 else ""


def _most_telling(table: Table, place: dict[str, int], results: RunResults, most: int) -> list[tuple[str, list[Cell]]]:
    if len(table.rows) <= most:
        return table.rows
    main = {CLEAN, *strongest(results), *(str(c["label"]) for c in of_kind(results, "outliers"))}
    ranked: dict[int | None, list[tuple[bool, int]]] = {}
    for at, (name, _) in enumerate(table.rows):
        ranked.setdefault(_model_of(name, place), []).append((main.isdisjoint(name.split(" · ")), at))
    share = max(1, most // len(ranked))
    chosen = sorted(at for rows in ranked.values() for _, at in sorted(rows)[:share])
    return [table.rows[at] for at in chosen]
