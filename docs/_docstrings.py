"""Docstrings for the API pages: doctests in a fence, so that their brackets and stars are not read as Markdown."""

from __future__ import annotations

import re
from typing import Any

import griffe


class Doctests(griffe.Extension):
    """Every paragraph that begins with `>>>` becomes a code block."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for every object that was read."""
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)


def fenced(text: str) -> str:
    """`text` with fences round its doctests."""
    return re.sub(r"(^>>>.*?)(?=\n[ \t]*\n|\Z)", r"```pycon\n\1\n```", text, flags=re.M | re.S)
