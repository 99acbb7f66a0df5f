"""The joint report of a run in parts: the parts, what is trusted for what, every estimator against the truth, the parts'
headlines."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from reports import tables
from reports.html import TEMPLATES
from reports.markdown import escape, table_lines
from reports.names import clean, shorten
from reports.tables import Cell, Column, Table
from robustbench_ext.files import write_atomically
from robustbench_ext.parts import JointResults, PartResult
from robustbench_ext.results import RunResults
from robustbench_ext.trust import Range, Trusted, Versus

_VERDICTS = {"pass": "no doubts", "doubt": "doubts", "fail": "NOT TO BE TRUSTED"}
_TASKS = {"classification": "Classifiers", "regression": "Regressors"}
_NOTE = (
    "Ranges are over parts, of values (intervals are in each part's report). Closer and farther count paired comparisons of "
    "the divergence, corrected for their number (Holm)."
)


def write_joint_report(folder: str | Path) -> dict[str, Path]:
    """Write report.html and report.md of a run in parts from its parts.json and the parts' results.json.

    Returns:
        The files written, by kind: "html", "markdown".
    """
    folder = Path(folder)
    joint = JointResults.read(folder)
    results = {part.name: RunResults.read(folder / part.folder / "results.json") for part in joint.parts}
    files = {"html": folder / "report.html", "markdown": folder / "report.md"}
    page, text = _html(joint, results), render_markdown(joint, results)
    write_atomically(files["html"], lambda file: file.write_text(page, encoding="utf-8"))
    write_atomically(files["markdown"], lambda file: file.write_text(text, encoding="utf-8"))
    return files


# Tables --------------------------------------------------------------------------------------------------------------


def parts_table(joint: JointResults) -> Table:
    """What was run."""
    table = Table("Parts", "part", [Column("suite"), Column("data"), Column("n"), Column("checks")])
    for part in joint.parts:
        table.rows.append((part.name, [Cell(part.suite), Cell(part.data), Cell(str(part.n)), Cell(_said(part))]))
    return table


def _said(part: PartResult) -> str:
    failed = f"; {len(part.failures)} could not be computed" if part.failures else ""
    return _VERDICTS[part.verdict] + failed


def trust_tables(joint: JointResults) -> list[Table]:
    """Every estimator against the truth, one table for each task."""
    return [t for task in _TASKS if (t := _trust_table(task, [one for one in joint.trust if one.task == task])).rows]


def _trust_table(task: str, found: Sequence[Trusted]) -> Table:
    """Columns that no estimator has are left out."""
    columns = [
        (Column("KL to the truth ↓", "Divergence from the true law, clean."), lambda o: _range(o.kl, 3)),
        (Column("shifted ↓", "The same under all other conditions."), lambda o: _range(o.kl_shifted, 3)),
        (Column("RMS of p, points ↓", "Root of MSE_p, clean."), lambda o: _range(o.rms, 1, 100)),
        (Column("closer / farther, clean", "Paired, against what the notes name."), lambda o: _versus(o.versus)),
        (Column("shifted", "The same under all other conditions."), lambda o: _versus(o.versus_shifted)),
        (Column("promise"), lambda o: Cell(o.promised or "")),
        (Column("true coverage, %", "Clean."), lambda o: _range(o.coverage, 1, 100)),
        (Column("shifted, %", "Under all other conditions."), lambda o: _range(o.coverage_shifted, 1, 100)),
        (
            Column("at each input, points ↓", "Mean |true coverage - promise|; of sets the shortfall alone."),
            lambda o: _range(o.gap, 1, 100),
        ),
        (Column("rank: noise ↑", "Aleatoric part with the true noise."), lambda o: _range(o.noise, 2)),
        (
            Column("rank: distance ↑", "Epistemic part with the distance from the truth."),
            lambda o: _range(o.distance, 2),
        ),
        (Column("rank: epistemic ↑", "Epistemic part with the true one."), lambda o: _range(o.epistemic, 2)),
        (Column("good for"), lambda o: Cell(", ".join(o.good))),
        (Column("bad at"), lambda o: Cell(", ".join(o.bad))),
    ]
    cells = [[make(one) for one in found] for _, make in columns]
    kept = [i for i, column in enumerate(cells) if any(cell.text for cell in column)]
    table = Table(
        f"{_TASKS[task]}: every estimator against the truth", "model · estimator", [columns[i][0] for i in kept]
    )
    for row, one in enumerate(found):
        table.rows.append((f"{one.model} · {one.probe}", [cells[i][row] for i in kept]))
    return table


def _range(of: Range | None, digits: int, scale: float = 1.0) -> Cell:
    if of is None:
        return Cell("")
    low, high = f"{scale * of.low:.{digits}f}", f"{scale * of.high:.{digits}f}"
    return Cell(low if low == high else f"{low} to {high}", scale * of.low, f"{of.n} values")


def _versus(of: Versus | None) -> Cell:
    return Cell("") if of is None else Cell(f"{of.closer} / {of.farther} of {of.n}", None, f"against {of.against}")


# Renderers -----------------------------------------------------------------------------------------------------------


def render_markdown(joint: JointResults, results: dict[str, RunResults]) -> str:
    """report.md; equal results give equal bytes."""
    out = [f"# {escape(joint.title)}", "", *([escape(joint.description), ""] if joint.description else [])]
    out += ["## Parts", "", *table_lines(parts_table(joint)), ""]
    out += [f"- could not be run: {escape(f.what)}: {escape(f.error)}" for f in joint.failures]
    for task, title in _TASKS.items():
        answers = [a for a in joint.answers if a.task == task]
        if answers:
            out += [f"## {title}: what may be trusted for what", ""]
            out += [line for a in answers for line in (f"**{escape(a.question)}** {escape(a.text)}", "")]
    for table in trust_tables(joint):
        out += [f"## {escape(table.caption)}", "", escape(_NOTE), "", *table_lines(table), ""]
    out += ["## Headlines of the parts", ""]
    for part in joint.parts:
        out += [f"### {escape(part.title)}", "", *table_lines(tables.headline(results[part.name])), ""]
        out += [f"All of it: `{part.folder}/report.html`.", ""]
    generator = joint.generator
    return "\n".join([*out, escape(f"{generator['name']} {generator['version']}")]) + "\n"


def _html(joint: JointResults, results: dict[str, RunResults]) -> str:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: clean(value) if type(value) is str else value,
    )
    environment.filters["short"] = shorten
    page = environment.get_template("parts.html.j2").render(
        joint=joint,
        parts=parts_table(joint),
        tasks=[(title, [a for a in joint.answers if a.task == task]) for task, title in _TASKS.items()],
        trust=trust_tables(joint),
        note=_NOTE,
        headlines=[(part, tables.headline(results[part.name])) for part in joint.parts],
        css=Markup((TEMPLATES / "report.css").read_text(encoding="utf-8")),
    )
    return page + "\n"
