"""What a section of the report holds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

from reports.svg import draw
from reports.tables import Table

WIDEST = 6.5  # inches of a figure beside another


@dataclass(frozen=True)
class Figure:
    """An SVG with the sentence that stands in for it where it cannot be seen.

    Attributes:
        model: the one model that it is about, so that it can be hidden with it; empty for figures of several.
        wide: it needs a line of the page for itself.
    """

    svg: Markup
    alt: str
    model: str = ""
    wide: bool = False


@dataclass
class Section:
    """A section of the report; empty ones are left out.

    Attributes:
        figures: shown; `drawn`: behind a heading each.
        tables: shown, or behind a heading where `folded`; `more`: behind their captions.
    """

    id: str
    title: str
    text: str = ""
    figures: list[Figure] = field(default_factory=list)
    drawn: list[tuple[str, list[Figure]]] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    more: list[Table] = field(default_factory=list)
    folded: bool = False

    def __bool__(self) -> bool:
        return bool(self.figures or self.drawn or any(t.rows for t in (*self.tables, *self.more)))


def figure(name: str, alt: str, paint: Any, size: tuple[float, float] = (4.4, 3.1), model: str = "") -> Figure:
    """A figure for the page; the name is unique in it."""
    return Figure(Markup(draw(name, paint, size)), alt, model, wide=size[0] > WIDEST)
