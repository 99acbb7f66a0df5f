"""Comparisons as tables, for every renderer: the difference with its interval, what it means, and what would decide."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from reports.tables import Cell, Column, Table
from robustbench_ext.results import Compared

DIFFERENCE = Column("difference", "The first model's value minus the second's, on the same samples; percent as points.")
P_VALUE = Column("p", "Two-sided p-value of no difference, corrected by Holm's method for the number of comparisons.")
OUTCOME = Column(
    "outcome",
    "Better or worse where the corrected p-value is below 0.05, and inconclusive otherwise; then the number of samples at "
    "which a true difference of this size would be found with a probability of 80 %.",
)


def title(compared: Compared, metrics: Mapping[str, Mapping[str, Any]]) -> str:
    """What is compared: `robust accuracy, pgd Linf 0.1`, with probe and group where these say something."""
    about = str(metrics[compared.metric]["title"]) + (f" at {compared.group}" if compared.group else "")
    probe = "" if compared.probe in ("classifier", "regressor", "") else compared.probe
    return ", ".join(part for part in (about, compared.condition, probe) if part)


def difference(compared: Compared, metrics: Mapping[str, Mapping[str, Any]]) -> Cell:
    """`+1.2 [-0.3, +2.7]`: points where the metric is a percentage."""
    if compared.value is None:
        return Cell("–", None, compared.reason)
    percent = metrics[compared.metric]["percent"]
    scale, digits = (100.0, 1) if percent else (1.0, 3)
    text = f"{scale * compared.value:+.{digits}f}"
    if compared.ci_low is not None and compared.ci_high is not None:
        text += f" [{scale * compared.ci_low:+.{digits}f}, {scale * compared.ci_high:+.{digits}f}]"
    return Cell(text, compared.value, f"n = {compared.n}; {compared.ci_method}; {compared.test}")


def p_value(compared: Compared) -> Cell:
    """The corrected p-value."""
    p = compared.p_adjusted
    if p is None:
        return Cell("–", None, compared.reason or "no test")
    return Cell("< 0.001" if p < 0.001 else f"{p:.3f}", p, f"uncorrected: {compared.p_value:.3g}")


def outcome(compared: Compared) -> Cell:
    """In words, with what would decide."""
    if compared.outcome == "inconclusive" and compared.n_to_decide:
        return Cell(f"inconclusive; {_about(compared.n_to_decide)} would decide")
    return Cell(compared.outcome)


def _about(n: int) -> str:
    """A sample size to two digits: `about 4300 samples`."""
    if n >= 10_000_000:
        return "more than ten million samples"
    digits = max(0, len(str(n)) - 2)
    return f"about {round(n, -digits):,} samples"


def pairs(compared: Sequence[Compared]) -> list[tuple[str, str]]:
    """Who is compared with whom, in order."""
    return list(dict.fromkeys((c.model, c.against) for c in compared))


def table(model: str, against: str, compared: Sequence[Compared], metrics: Mapping[str, Mapping[str, Any]]) -> Table:
    """All comparisons of one pair."""
    made = Table(f"{model} compared with {against}", "axis", [DIFFERENCE, P_VALUE, OUTCOME])
    for c in compared:
        if (c.model, c.against) == (model, against):
            arrow = {True: " ↑", False: " ↓", None: ""}[metrics[c.metric]["higher_is_better"]]
            unit = ", %" if metrics[c.metric]["percent"] else ""
            made.rows.append((f"{title(c, metrics)}{unit}{arrow}", [difference(c, metrics), p_value(c), outcome(c)]))
    return made


def to_markdown(tables: Sequence[Table], notes: Sequence[str]) -> str:
    """compare.md: a heading and a table for each pair."""
    from reports.markdown import escape, table_lines

    out = ["# Comparison", "", *(f"- {escape(note)}" for note in notes), *([""] if notes else [])]
    for content in tables:
        out += [f"## {escape(content.caption)}", "", *table_lines(content), ""]
    return "\n".join(out)
