"""A leaderboard of many runs as a static site: one sortable table a board, one page a model, no server and no network.

Every page is self-contained and readable without JavaScript. No winner is named where chance could be behind the lead: what
counts are the intervals of ranks that tests between all pairs leave (`reports.leaderboard_boards`). The same runs give the same
bytes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from reports import comparison
from reports.leaderboard_boards import (
    Board,
    Entry,
    LeftOut,
    Source,
    Standing,
    failures,
    key_of,
    make_boards,
    rank,
    read_runs,
)
from reports.names import clean, clip, safe_name, shorten
from reports.tables import Cell, Column, Table, heading, number
from robustbench_ext import __version__
from robustbench_ext.axes import CLASSIFIER, CLEAN, REGRESSOR, Axis, threat_name
from robustbench_ext.errors import ConfigError
from robustbench_ext.files import write_atomically

TEMPLATES = Path(__file__).parent / "templates"
MANIFEST = "leaderboard.json"  # which files of the folder are the site's
LONGEST = 80  # characters of a model's name in a table
Files = dict[str, str]


@dataclass
class Site:
    """What was written.

    Attributes:
        index: the file to open.
        boards, models: how many there are.
        left_out: runs that are on no board, and records that could not be read.
    """

    index: Path
    boards: int
    models: int
    left_out: list[LeftOut] = field(default_factory=list)


def write_site(
    folders: Sequence[str | Path], out: str | Path, title: str = "Leaderboard", with_reports: bool = False
) -> Site:
    """Write a leaderboard of run folders.

    Args:
        folders: as `rbx run` made them, in any order.
        out: the site's folder; files of an earlier leaderboard in it are replaced.
        with_reports: copy each run's report.html into the site. Else it is linked where the run lies beside the site.

    Raises:
        ConfigError: no run can be read, no model can be ranked, or `out` holds a run or another site.
    """
    out = Path(out)
    if (out / "results.json").exists():
        raise ConfigError(f"{out}: this is a run folder; give the site a folder of its own, such as --out site")
    if (out / "index.html").exists() and not (out / MANIFEST).exists():
        raise ConfigError(f"{out}: holds an index.html that is no leaderboard's; give the site a folder of its own")
    # `runs/*` may hold the site itself.
    sources, left_out = read_runs([Path(f) for f in folders if Path(f).resolve() != out.resolve()])
    if not sources:
        told = "".join(f"\n  - {item.what}: {item.reason}" for item in left_out)
        raise ConfigError(f"none of the {len(left_out)} folders is a run that can be ranked:{told}")
    boards = make_boards(sources)
    for board in boards:
        rank(board)
        left_out += board.left_out
    left_out = [LeftOut(clean(item.what), clean(item.reason)) for item in left_out]
    files: Files = {}
    reports = _reports(sources, out, files, with_reports)
    views = _views(boards, reports)
    shared = {"title": clean(title) or "Leaderboard", "version": __version__, **_assets()}
    page = _environment().get_template
    files["index.html"] = page("leaderboard.html.j2").render(
        boards=views,
        left_out=left_out,
        threats=list(dict.fromkeys(c.threat for view in views for c in view.columns if c.threat)),
        runs=len(sources),
        **shared,
    )
    for view in views:
        for model in view.models:
            files[model.file] = page("leaderboard_model.html.j2").render(board=view, model=model, **shared)
    _write(out, files)
    return Site(out / "index.html", len(boards), sum(len(view.models) for view in views), left_out)


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["clip"] = clip
    return environment


def _assets() -> dict[str, Markup]:
    css = "".join((TEMPLATES / name).read_text(encoding="utf-8") for name in ("report.css", "leaderboard.css"))
    return {"css": Markup(css), "js": Markup((TEMPLATES / "leaderboard.js").read_text(encoding="utf-8"))}


# Files ---------------------------------------------------------------------------------------------------------------


def _write(out: Path, files: Files) -> None:
    """All files, each whole or not there; then those of an earlier leaderboard that are no longer part of it go."""
    earlier = _earlier(out)
    for name, text in files.items():
        _put(out / name, text)
    listed = json.dumps({"generator": "robustbench-ext", "files": sorted([*files, MANIFEST])}, indent=1)
    _put(out / MANIFEST, listed + "\n")
    for name in earlier - {*files, MANIFEST}:
        (out / name).unlink(missing_ok=True)
        if (out / name).parent != out and not any((out / name).parent.iterdir()):
            (out / name).parent.rmdir()


def _put(file: Path, text: str) -> None:
    write_atomically(file, lambda part: part.write_text(text, encoding="utf-8", newline="\n"))


def _earlier(out: Path) -> set[str]:
    """Pages of the leaderboard that the folder holds; nothing outside it, and nothing that is not a page."""
    try:
        names = json.loads((out / MANIFEST).read_text(encoding="utf-8"))["files"]
        paths = [PurePosixPath(name) for name in names]
    except (OSError, ValueError, KeyError, TypeError):
        return set()
    return {
        str(p)
        for p in paths
        if p.suffix == ".html" and ".." not in p.parts and not p.is_absolute() and len(p.parts) < 3
    }


def _reports(sources: Iterable[Source], out: Path, files: Files, copied: bool) -> dict[str, str]:
    """Where each run's report is, from the site's root; copies are added to the files."""
    found: dict[str, str] = {}
    for source in sources:
        report = source.folder / "report.html"
        if not report.is_file():
            continue
        if copied:
            name = _unique(f"reports/{safe_name(source.name)}", files)
            files[name] = report.read_text(encoding="utf-8", errors="replace")
            found[source.name] = name
        elif out.resolve().parent in report.parents:  # beside the site: the link stays right where both are moved
            found[source.name] = quote(Path(os.path.relpath(report, out.resolve())).as_posix())
    return found


def _unique(name: str, taken: Iterable[str]) -> str:
    """A page's name that no other has, on file systems that know no upper case either."""
    lower = {other.lower() for other in taken}
    tries = (f"{name}{'' if i == 1 else f'-{i}'}.html" for i in range(1, len(lower) + 2))
    return next(found for found in tries if found.lower() not in lower)


# What the pages show -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Heading:
    """A column of a board."""

    title: str
    definition: str
    threat: str  # "Linf 0.1", or empty
    higher: bool | None
    key: str  # unique on the page


@dataclass(frozen=True)
class Place:
    """A model on one axis: its value, its rank's interval among so many, and both in percent of the way from first to last."""

    cell: Cell
    rank: str = ""
    among: int = 0
    first: bool = False  # it may be the best one, which not all of them may
    left: float = 0.0
    width: float = 0.0
    why: str = ""  # without a rank


@dataclass
class Page:
    """A model.

    Attributes:
        file: its page, from the site's root.
        text: what the filter looks through.
        places: one per column.
        relations: for each column with comparisons the models (name, page) that it is better than, worse than, or neither, and
            all differences as a table.
        reports: (run, file); twins: (board, page) of the same weights on other boards.
    """

    entry: Entry
    file: str
    text: str
    places: list[Place]
    relations: list[tuple[Heading, dict[str, list[tuple[str, str]]], Table]] = field(default_factory=list)
    reports: list[tuple[str, str]] = field(default_factory=list)
    twins: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def label(self) -> str:
        return shorten(self.entry.label, LONGEST)

    @property
    def runs(self) -> str:
        return ", ".join(dict.fromkeys(source.name for source, _ in self.entry.places))

    @property
    def verdict(self) -> str:
        return self.entry.verdict

    @property
    def failures(self) -> str:
        return ", ".join(failures(self.entry))

    @property
    def provenance(self) -> list[tuple[str, str]]:
        return _provenance(self.entry)

    @property
    def trained(self) -> str:
        """The objective that it was trained with, where a run trained it."""
        return str(self.entry.about.get("training", {}).get("defense", {}).get("defense", ""))


@dataclass
class View:
    """A board."""

    id: str
    title: str
    board: Board
    columns: list[Heading]
    sorted_by: int  # the column that the rows are sorted by
    ranked: list[Page]
    failed: list[Page]
    conditions: list[tuple[str, str]]
    notes: list[str]

    @property
    def models(self) -> list[Page]:
        return [*self.ranked, *self.failed]

    @property
    def results(self) -> Any:
        return self.board.runs[0].run.results


def _views(boards: Sequence[Board], reports: dict[str, str]) -> list[View]:
    views: list[View] = []
    names: list[str] = []
    titles: list[str] = []
    for board in boards:
        results = board.runs[0].run.results
        plain = clean(f"{results.data['name']}, n = {results.suite['n']}")
        names.append(_unique(safe_name(f"{results.data['name']}-n{results.suite['n']}"), names))
        titles.append(plain)
        again = titles.count(plain)
        title = plain if again == 1 else f"{plain} · protocol {again}"
        views.append(_view(board, names[-1].removesuffix(".html"), title, reports))
    for view in views:
        for page in view.models:
            page.twins = [
                (other.title, twin.file)
                for other in views
                for twin in other.models
                if other is not view and twin.entry.fingerprint == page.entry.fingerprint
            ]
    return views


def _view(board: Board, id_: str, title: str, reports: dict[str, str]) -> View:
    columns = [_heading(s.axis, board, i) for i, s in enumerate(board.standings)]
    files: list[str] = []
    pages: dict[str, Page] = {}
    for entry in [*board.entries, *board.failed]:
        files.append(_unique(f"{id_}/{safe_name(entry.places[0][1])}", files))
        places = [_place(s, entry.label) for s in board.standings]
        page = Page(entry, files[-1], "", places, notes=_notes(entry, board))
        words = [entry.label, *_called(entry), page.runs, str(entry.about["spec"]), page.trained, entry.fingerprint]
        page.text = clean(" ".join(words))
        page.reports = [(s.name, reports[s.name]) for s, _ in dict.fromkeys(entry.places) if s.name in reports]
        pages[entry.label] = page
    for page in pages.values():
        for column, standing in zip(columns, board.standings, strict=True):
            if standing.of(page.entry.label):
                page.relations.append((column, *_relations(standing, page.entry.label, pages)))
    by = _main(board)
    ranked = [pages[entry.label] for entry in board.entries]
    if columns:
        sign = -1 if columns[by].higher else 1

        def order(page: Page) -> tuple[bool, float, str]:
            value = page.places[by].cell.value
            return value is None, sign * (value or 0.0), page.label

        ranked.sort(key=order)
    failed = [pages[entry.label] for entry in board.failed]
    return View(id_, title, board, columns, by, ranked, failed, _conditions(board), _board_notes(board))


def _main(board: Board) -> int:
    """The axis that a board is sorted by at first: the first one under attack, else the first with a better direction."""
    metrics = [s.axis.metric for s in board.standings]
    ranked = [i for i, s in enumerate(board.standings) if s.ranks]
    attacked = [i for i in ranked if metrics[i] == "robust_accuracy"]
    return next(iter([*attacked, *ranked]), 0)


def _heading(axis: Axis, board: Board, i: int) -> Heading:
    source = next(s for s in board.runs if axis.metric in s.run.results.metrics)
    results = source.run.results
    about = heading(axis.metric, results)
    facts = next((c for s in board.runs for c in s.run.results.conditions if c["label"] == axis.condition), {})
    threat = threat_name(facts) if facts.get("norm") and facts.get("eps") is not None else ""
    unit = about.title.removeprefix(results.metrics[axis.metric]["title"])  # ", % ↑", on one line
    title = axis.title + unit.replace(" ", "\N{NO-BREAK SPACE}")
    return Heading(title, about.definition, threat, results.metrics[axis.metric]["higher_is_better"], f"c{i}")


def _place(standing: Standing, label: str) -> Place:
    answer = standing.answers.get(label)
    if answer is None:
        return Place(Cell("–", None, "not measured"))
    cell = number(answer.row, answer.source.run.results)
    about = [answer.row.group or "", "" if answer.row.probe in (CLASSIFIER, REGRESSOR) else answer.row.probe, cell.note]
    cell = Cell(cell.text, cell.value, "; ".join(part for part in about if part))
    if label not in standing.ranks:
        return Place(cell, why=standing.unranked.get(label, ""))
    (low, high), among = standing.ranks[label], len(standing.ranks)
    said = f"{low}" if low == high else f"{low}–{high}"
    some = any(other > 1 for other, _ in standing.ranks.values())  # else everybody may be the first, which says nothing
    return Place(cell, said, among, some and low == 1, 100 * (low - 1) / among, 100 * (high - low + 1) / among)


def _relations(
    standing: Standing, label: str, pages: dict[str, Page]
) -> tuple[dict[str, list[tuple[str, str]]], Table]:
    """The models that this one is better than, worse than, and neither, with their pages; and the differences as a table.

    Where no direction is better there are differences only.
    """
    metrics = standing.answers[label].source.run.results.metrics
    about = metrics[standing.axis.metric]
    sides: dict[str, list[tuple[str, str]]] = {"better": [], "worse": [], "inconclusive": []}
    difference = Column("difference" + (" in points" if about["percent"] else ""), comparison.DIFFERENCE.definition)
    outcome = [comparison.OUTCOME] if standing.ranks else []
    caption = f"{standing.axis.title}: {pages[label].label} minus each other model"
    table = Table(caption, "against", [difference, comparison.P_VALUE, *outcome])
    for c in standing.of(label):
        other = pages[c.against]
        cells = [comparison.difference(c, metrics), comparison.p_value(c)]
        if standing.ranks:
            sides[c.outcome].append((other.label, other.file))
            cells.append(comparison.outcome(c))
        table.rows.append((other.label, cells))
    return sides, table


def _called(entry: Entry) -> list[str]:
    return list(dict.fromkeys(name for _, name in entry.places))


def _notes(entry: Entry, board: Board) -> list[str]:
    """What a reader should know of where an entry's numbers come from."""
    notes = []
    if len(entry.places) > 1:
        where = ", ".join(f"{source.name} ({name})" for source, name in entry.places)
        notes.append(
            f"The same weights are in {len(entry.places)} places and count as one model: {where}. The first counts."
        )
    for standing in board.standings:
        values = {a.source.name: a.row.value for a in entry.answers(standing.axis) if a.row.value is not None}
        if len(set(values.values())) > 1:
            told = ", ".join(f"{value:.6g} ({name})" for name, value in values.items())
            notes.append(f"{standing.axis.title} differs between its runs: {told}.")
        if why := standing.unranked.get(entry.label):
            notes.append(f"No rank by {standing.axis.title}: {why}")
    if entry.about.get("replicate_of"):
        notes.append(
            f"One of several training seeds of {entry.about['replicate_of']}. Each is a model of its own here; what another "
            f"seed would give is in the run's report."
        )
    return [clean(note) for note in notes]


def _provenance(entry: Entry) -> list[tuple[str, str]]:
    """Where a model comes from, and how its runs were made, as terms with their texts."""
    about = entry.about
    training = about.get("training") or {}
    found = [
        ("name", entry.label),
        ("fingerprint", entry.fingerprint),
        ("specification", str(about.get("spec", ""))),
        ("parameters", f"{about['parameters']:,}" if isinstance(about.get("parameters"), int) else ""),
        ("objective", _spec(training.get("defense", {}))),
        (
            "recipe",
            _spec(training["recipe"]) if isinstance(training.get("recipe"), dict) else str(training.get("recipe", "")),
        ),
        ("training seed", str(training.get("seed", ""))),
        ("epoch kept", _spec(training.get("selected") or {})),
        *((f"fitted: {label}", _spec(numbers)) for label, numbers in about.get("fitted", {}).items()),
        *(("note", str(note)) for note in about.get("notes", [])),
    ]
    for source, name in entry.places:
        suite = source.run.results.suite
        called = "" if name == entry.label else f", where it is called {name}"
        found.append((f"run {source.name}", f"{suite['title']}{called}"))
        made = source.made or {}
        environment = made.get("environment") or {}
        history = made.get("history") or [{}]
        found += [
            ("versions", _spec(environment.get("versions") or {})),
            ("hardware", _spec(environment.get("hardware") or {})),
            ("commit", str(environment.get("commit") or "")),
            ("last run", str(history[-1].get("at", ""))),
        ]
    return [(clean(term), clean(text)) for term, text in found if text]


def _board_notes(board: Board) -> list[str]:
    notes = [
        f"{s.name}: could not be computed: {f.what}: {f.error}" for s in board.runs for f in s.run.results.failures
    ]
    merged = [e for e in board.entries if len(e.places) > 1]
    if merged:
        names = ", ".join(shorten(e.label, LONGEST) for e in merged)
        notes.append(f"Models of equal fingerprints are one entry, whatever their names and runs: {names}.")
    return [clean(note) for note in notes]


def _conditions(board: Board) -> list[tuple[str, str]]:
    """What the board's columns were measured under: every condition and probe with all its parameters."""
    found: dict[str, str] = {}
    for standing in board.standings:
        axis = standing.axis
        source = next(s for s in board.runs if key_of(axis) in s.axes)
        facts = next((c for c in source.run.results.conditions if c["label"] == axis.condition), {})
        over = [str(label) for label in facts.get("over", [])]
        if over:
            found.setdefault(axis.condition, f"taken over {', '.join(over)}")
        conditions = source.run.records.index.conditions
        for label in [*over, axis.condition]:
            if label in conditions and label != CLEAN:
                found.setdefault(label, _spec({k: v for k, v in conditions[label].spec.items() if k != "condition"}))
        for answer in standing.answers.values():
            probes = answer.source.run.records.index.probes
            if answer.row.probe in probes:
                found.setdefault(answer.row.probe, _spec(probes[answer.row.probe]))
    return list(found.items())


def _spec(spec: dict[str, Any]) -> str:
    return ", ".join(f"{key} {_plain(value)}" for key, value in spec.items())


def _plain(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return "(" + _spec(value) + ")"
    if isinstance(value, (list, tuple)):
        return ", ".join(_plain(v) for v in value) or "none"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
