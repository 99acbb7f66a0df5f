"""Boards: which models of many runs may stand in one table, and which places the tests between them leave each of them.

Runs stand on one board where none of them measured anything otherwise than another (`compare.differences`): the same samples,
seed, attacks, corruptions and probes, as far as both have them. A question that only some of the runs asked has a column too;
its ranks are among the models that were asked.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from robustbench_ext.axes import Axis, axes
from robustbench_ext.checks import Status, verdict
from robustbench_ext.compare import Run, Side, compare, differences, test
from robustbench_ext.errors import ConfigError, RobustBenchExtError
from robustbench_ext.fingerprint import hash_strings
from robustbench_ext.metrics.ranks import rank_intervals
from robustbench_ext.per_sample import Statistic
from robustbench_ext.results import Compared, Finding, Row

FITTED_ON = ("train", "calibration")  # splits that probes are fitted on
UNREADABLE = (RobustBenchExtError, ValueError, OSError, LookupError, TypeError, AttributeError)
Key = tuple[Any, ...]


def key_of(axis: Axis) -> Key:
    """What makes two axes of different runs one question. A regressor's own estimator stands under "" in all runs."""
    anyone = axis.group is ...
    return axis.metric, axis.condition, axis.probe, None if anyone else axis.group, anyone


@dataclass(frozen=True, eq=False)
class Source:
    """A run: its folder, its results and records, the content of run.json (None where there is none), its headline's axes."""

    folder: Path
    run: Run
    made: dict[str, Any] | None
    axes: dict[Key, Axis]

    @property
    def name(self) -> str:
        return self.run.name

    def own(self, axis: Axis) -> Axis:
        """An axis of another run, as this run names its probes."""
        if key_of(axis) in self.axes:
            return self.axes[key_of(axis)]
        return replace(axis, probes=next((a.probes for a in self.axes.values() if a.probes), {}))


@dataclass(frozen=True)
class LeftOut:
    """What is not on any board, or not ranked, and why."""

    what: str
    reason: str


@dataclass(frozen=True)
class Answer:
    """What one run says of a model on an axis."""

    source: Source
    model: str
    row: Row


@dataclass(frozen=True, eq=False)
class Entry:
    """A model of a board.

    Attributes:
        label: unique on the board.
        places: the runs that it is in, and its name there.
    """

    label: str
    fingerprint: str
    places: tuple[tuple[Source, str], ...]

    @property
    def about(self) -> dict[str, Any]:
        """The entry of `results.models`, of its first run."""
        source, name = self.places[0]
        return next(m for m in source.run.results.models if m["name"] == name)

    @property
    def findings(self) -> list[tuple[str, Finding]]:
        """All its checks, with the runs that made them."""
        return [
            (source.name, f)
            for source, name in self.places
            for f in (*source.run.results.preflight, *source.run.results.doubts)
            if f.model == name
        ]

    @property
    def verdict(self) -> Status:
        """The worst status of its checks in any run."""
        return verdict(f for _, f in self.findings)

    def answers(self, axis: Axis) -> list[Answer]:
        """Its defined values on an axis in all runs, the one that counts first; else rows that say why there is none."""
        found = [
            Answer(source, name, row)
            for source, name in self.places
            if (row := source.own(axis).row(source.run.results, name)) is not None
        ]
        return [a for a in found if a.row.value is not None] or found


@dataclass
class Standing:
    """Who stands where on one axis.

    Attributes:
        answers: by entry; of those that were asked.
        ranks: lowest and highest place, by entry; empty where no direction is better or there is nobody to compare with.
        compared: every pair once.
        unranked: why an entry with a value has no rank.
    """

    axis: Axis
    answers: dict[str, Answer]
    ranks: dict[str, tuple[int, int]] = field(default_factory=dict)
    compared: list[Compared] = field(default_factory=list)
    unranked: dict[str, str] = field(default_factory=dict)

    def of(self, label: str) -> list[Compared]:
        """An entry compared with each other one, seen from its side."""
        return [c if c.model == label else turned(c) for c in self.compared if label in (c.model, c.against)]


@dataclass
class Board:
    """Models that were asked the same.

    Attributes:
        apart: what its runs measured otherwise than those of the nearest larger board over the same data.
        entries: the models that are ranked; failed: those that a check failed for, which are not.
        left_out: records that could not be read.
    """

    runs: list[Source]
    apart: list[str] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    failed: list[Entry] = field(default_factory=list)
    standings: list[Standing] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)


def turned(c: Compared) -> Compared:
    """The same comparison from the other side."""
    outcomes: dict[str, Any] = {"better": "worse", "worse": "better", "inconclusive": "inconclusive"}
    changed = {"model": c.against, "against": c.model, "outcome": outcomes[c.outcome]}
    values = {"value": _negative(c.value), "ci_low": _negative(c.ci_high), "ci_high": _negative(c.ci_low)}
    return c.model_copy(update={**changed, **values})


def _negative(value: float | None) -> float | None:
    return None if value is None else -value if value else 0.0


# Runs ----------------------------------------------------------------------------------------------------------------


def read_runs(folders: Sequence[Path]) -> tuple[list[Source], list[LeftOut]]:
    """The runs that can be read, those with most conditions first, and the others with the reason.

    A folder that is given twice counts once. The order of the folders does not matter.
    """
    unique = list({folder.resolve(): folder for folder in folders})
    sources, left_out = [], []
    for path, name in sorted(zip(unique, _names(unique), strict=True), key=lambda item: item[1]):
        try:
            sources.append(_read(path, name))
        except UNREADABLE as error:
            left_out.append(LeftOut(name, _reason(error, path, name)))
    return sorted(sources, key=lambda s: (-len(s.run.records.index.conditions), s.name)), left_out


def _read(folder: Path, name: str) -> Source:
    run = Run.read(folder, name)
    results = run.results
    found = {key_of(axis): axis for axis in axes(results)}
    if not results.models:
        told = "; ".join(f"{f.what}: {f.error}" for f in results.failures)
        raise ConfigError(
            f"it has results of no model{': ' + told if told else ''}. Mend that and run the suite again."
        )
    differences(run, run)  # whatever comparing needs is there
    return Source(folder, run, _optional(folder / "run.json"), found)


def _optional(file: Path) -> dict[str, Any] | None:
    """What run.json says of how a run was made; a broken one costs nothing but that."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _names(paths: Sequence[Path]) -> list[str]:
    """Each folder's own name, with as much of its path as makes it the only one of that name."""

    def name(path: Path, depth: int) -> str:
        return "/".join(path.parts[-depth:])

    found = []
    for path in paths:
        depths = range(1, len(path.parts) + 1)
        alone = (d for d in depths if sum(name(other, d) == name(path, d) for other in paths) == 1)
        found.append(name(path, next(alone)))
    return found


def _reason(error: BaseException, folder: Path, name: str) -> str:
    """An error in words for readers who do not know where the folder was."""
    if isinstance(error, (RobustBenchExtError, OSError)):
        return str(error).replace(str(folder), name).removeprefix(f"{name}: ")
    first = str(error).splitlines()[0] if str(error) else ""
    return (
        f"its files do not hold what a run folder holds ({type(error).__name__}: {first}). Run the suite again into it."
    )


# Boards --------------------------------------------------------------------------------------------------------------


def make_boards(sources: Sequence[Source]) -> list[Board]:
    """Boards of runs, the one with most models first.

    Raises:
        ConfigError: there is no model that could be ranked.
    """
    boards: list[Board] = []
    for source in sources:  # richest first: a run that asked little joins the board where most was asked
        fitting = (b for b in boards if not any(told_apart(other, source) for other in b.runs))
        board = next(fitting, None)
        if board is None:
            boards.append(board := Board([]))
        board.runs.append(source)
    for board in boards:
        board.runs.sort(key=lambda s: s.name)
        entries = _entries(board.runs)
        board.entries = [e for e in entries if e.verdict != "fail"]
        board.failed = [e for e in entries if e.verdict == "fail"]
    if not any(board.entries for board in boards):
        failed = [f"{e.label}: {', '.join(failures(e))}" for b in boards for e in b.failed]
        raise ConfigError(
            f"no model can be ranked. Expected at least one whose checks did not fail; got {'; '.join(failed) or 'none'}. "
            f"`rbx report RUN` shows what is wrong with them, and how to mend it."
        )
    boards.sort(key=lambda b: (-len(b.entries), b.runs[0].name))
    for i, board in enumerate(boards):
        board.apart = _why_apart(board, boards[:i])
    return boards


def failures(entry: Entry) -> list[str]:
    """The names of the checks that a model failed, each once."""
    return list(dict.fromkeys(f.name for _, f in entry.findings if f.status == "fail"))


def told_apart(a: Source, b: Source) -> dict[str, list[str]]:
    """What two runs measured otherwise, by condition; under "" what concerns all of them, and then nothing else.

    Empty where their models may stand in one table.
    """
    differing = dict(differences(a.run, b.run)[0])
    mine, theirs = (s.run.results.data.get("splits", {}) for s in (a, b))
    for split in (s for s in FITTED_ON if s in mine and s in theirs):
        if mine[split].get("fingerprint") != theirs[split].get("fingerprint"):
            differing.setdefault("", []).append(f"{split} samples: other ones")
    return {"": differing[""]} if "" in differing else differing


def _why_apart(board: Board, larger: Iterable[Board]) -> list[str]:
    """What keeps a board from the nearest larger one over the same data: the differences of the pair of runs with fewest."""
    data = board.runs[0].run.results.data["name"]
    others = [run for other in larger for run in other.runs if run.run.results.data["name"] == data]
    found = [told for other in others for run in board.runs if (told := told_apart(other, run))]
    nearest = min(found, key=lambda told: ("" in told, sum(map(len, told.values()))), default={})
    return [text for texts in nearest.values() for text in texts]


def _entries(runs: Iterable[Source]) -> list[Entry]:
    """The models of a board. Those of equal fingerprints are one; those of equal names get the name of their run."""
    found: dict[str, list[tuple[Source, str]]] = {}
    for source in runs:
        for model in source.run.results.models:
            print_ = str(model.get("fingerprint") or f"{source.name}: {model['name']}")
            found.setdefault(print_, []).append((source, str(model["name"])))
    firsts = [places[0][1] for places in found.values()]
    taken: set[str] = set()
    entries = []
    for print_, places in found.items():
        source, name = places[0]
        label = name if firsts.count(name) == 1 else f"{name} ({source.name})"
        while label in taken:
            label = f"{label} ({print_[:8]})"
        taken.add(label)
        entries.append(Entry(label, print_, tuple(places)))
    return entries


# Ranks ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Held(Side):
    """A model of which one statistic is known already."""

    held: Statistic

    def statistic(self, axis: Axis) -> Statistic:
        return self.held


def rank(board: Board) -> None:
    """Compare all pairs of a board's models on every axis, and give them their ranks.

    Every model's records are read once and forgotten; what the tests need is kept.
    """
    wanted: dict[Key, Axis] = {}
    for source in sorted(board.runs, key=lambda s: -len(s.axes)):
        wanted |= {key: axis for key, axis in source.axes.items() if key not in wanted}
    everyone = [*board.entries, *board.failed]
    board.standings = [
        Standing(axis, {e.label: found[0] for e in everyone if (found := e.answers(axis))}) for axis in wanted.values()
    ]
    held: dict[Key, dict[str, Statistic]] = {key: {} for key in wanted}
    damaged: dict[str, LeftOut] = {}
    for entry in board.entries:
        for standing in board.standings:
            if entry.label not in standing.answers:
                continue
            made, why = _statistic(entry, standing, damaged)
            if made is None:
                standing.unranked[entry.label] = why
            else:
                held[key_of(standing.axis)][entry.label] = made
        for source, _ in entry.places:
            source.run.records.observations.cache_clear()
            source.run.records.probe.cache_clear()
    for standing in board.standings:
        _rank(standing, board.entries, _comparable(held[key_of(standing.axis)], standing, damaged))
    board.left_out = list(damaged.values())


def _statistic(entry: Entry, standing: Standing, damaged: dict[str, LeftOut]) -> tuple[Statistic | None, str]:
    """What an axis is made of for one model, from the first run whose records can be read; or why there is none."""
    why = ""
    for answer in entry.answers(standing.axis):
        source, row = answer.source, answer.row
        if row.value is None:
            why = row.reason
            continue
        side = Side(source.run.records, source.run.results, answer.model, entry.label)
        try:
            found = side.statistic(source.own(standing.axis))
        except UNREADABLE as error:
            why = _unreadable(error, source)
            damaged.setdefault(why, LeftOut(f"{entry.label}: {standing.axis.title}", why))
            continue
        if found is not None:
            standing.answers[entry.label] = answer
            return found, ""
        why = "this estimate has no sample-by-sample form"
    return None, why


def _unreadable(error: BaseException, source: Source) -> str:
    if isinstance(error, (RobustBenchExtError, OSError)):
        return f"run {source.name}: {_reason(error, source.folder, source.name)}"
    return (
        f"run {source.name}: its index.json does not name the records, or they lack columns ({type(error).__name__}: {error}). "
        f"Run the suite again into it: what is there is reused."
    )


def _comparable(held: dict[str, Statistic], standing: Standing, damaged: dict[str, LeftOut]) -> dict[str, Statistic]:
    """Those that can be tested, over the same samples as most; they share one array of ids.

    The index promised as much of all. One that did not keep it must not cost the others their ranks.
    """
    kept: dict[str, Statistic] = {}
    kinds = {label: (type(found), hash_strings(found.ids.tolist())) for label, found in held.items()}
    usual = Counter(kinds.values()).most_common(1)[0][0] if kinds else None
    for label, found in held.items():
        why = "" if kinds[label] == usual else "they hold other samples"
        try:
            test(found, found)
        except UNREADABLE as error:
            why = str(error)
        if why:
            run = standing.answers[label].source.name
            why = f"run {run}: its records are not what its index says: {why}. Run the suite again."
            standing.unranked[label] = why
            damaged.setdefault(why, LeftOut(f"{label}: {standing.axis.title}", why))
        else:
            kept[label] = replace(found, ids=next(iter(kept.values()), found).ids)
    return kept


def _rank(standing: Standing, entries: Sequence[Entry], held: dict[str, Statistic]) -> None:
    sides = []
    for entry in entries:
        if entry.label in held:
            answer = standing.answers[entry.label]
            run = answer.source.run
            sides.append(_Held(run.records, run.results, answer.model, entry.label, held[entry.label]))
    if len(sides) < 2:
        return
    standing.compared = compare(list(combinations(sides, 2)), [standing.axis], "axis")
    if sides[0].results.metrics[standing.axis.metric]["higher_is_better"] is None:
        return
    index = {side.name: i for i, side in enumerate(sides)}
    better = np.zeros((len(sides), len(sides)), dtype=bool)
    for c in standing.compared:
        i, j = index[c.model], index[c.against]
        better[i, j], better[j, i] = c.outcome == "better", c.outcome == "worse"
    standing.ranks = dict(zip(index, rank_intervals(better), strict=True))
