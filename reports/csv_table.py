"""results.csv for spreadsheets: the same rows, and no cell that a spreadsheet would take for a formula."""

from __future__ import annotations

import csv
import io
from typing import Any

from robustbench_ext.results import Row, RunResults

_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what OWASP calls CSV injection: a model named =HYPERLINK(...)


def render_csv(results: RunResults) -> str:
    """All estimates. A text that begins like a formula gets an apostrophe in front; results.csv of a run has it as it is."""
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(Row.model_fields), lineterminator="\n")
    writer.writeheader()
    for row in results.results:
        writer.writerow({key: _cell(value) for key, value in row.model_dump().items()})
    return out.getvalue()


def _cell(value: Any) -> Any:
    if isinstance(value, str):
        value = value.replace(
            "\0", "\N{REPLACEMENT CHARACTER}"
        )  # Python 3.10 refuses to write it, and readers to read it
        return f"'{value}" if value.startswith(_FORMULA) else value
    return "" if value is None else value
