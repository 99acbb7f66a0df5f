"""Two models on the same samples: by how much do they differ, could chance be behind it, how many samples would decide?

Pairing is what makes small differences visible: both models are right or wrong on mostly the same samples, and only the others
count. So models are compared only where they met the same inputs' origins under the same protocol; runs that measured something
else are refused, with the differences.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from robustbench_ext import __version__
from robustbench_ext.axes import CLEAN, Axis, axes, model_names, own_axes
from robustbench_ext.errors import ConfigError, DataError, unknown_name
from robustbench_ext.index import Index, Recorded, Stored
from robustbench_ext.metrics import decision, paired
from robustbench_ext.metrics.estimate import LEVEL
from robustbench_ext.per_sample import Area, Mean, Resampled, Share, Statistic, statistic
from robustbench_ext.results import Compared, RunResults, finite
from robustbench_ext.seeds import between_seeds
from robustbench_ext.three_axes import perspectives

Family = Literal["axis", "all"]


@dataclass(frozen=True)
class Side:
    """One model of one run, and how it is called beside others."""

    records: Recorded
    results: RunResults
    model: str
    name: str

    def statistic(self, axis: Axis) -> Statistic | None:
        """What the axis is made of, sample by sample; None where it was not measured."""
        row = axis.row(self.results, self.model)
        if row is None or row.value is None:
            return None
        group = None if axis.group is ... else axis.group
        return statistic(self.records, self.results, self.model, axis.condition, row.probe, axis.metric, group)


def compare_models(records: Recorded, results: RunResults) -> list[Compared]:
    """All pairs of a run's models on the axes of headline and opening figure, corrected for their number on each axis.

    Models that are trained several times are compared as such, between seeds; they are left out of the pairs among each other.
    """
    several = {str(m["name"]) for m in results.models if m.get("replicate_of")}
    sides = [Side(records, results, name, name) for name in model_names(results)]
    pairs = [(b, a) for a, b in combinations(sides, 2) if not {a.model, b.model} <= several]
    wanted = [*axes(results), *(p.question for p in perspectives(results)), *own_axes(results)]
    return [*compare(pairs, wanted, "axis"), *between_seeds(results, wanted)]


def compare(pairs: Sequence[tuple[Side, Side]], wanted: Iterable[Axis], family: Family) -> list[Compared]:
    """Compare the first of each pair with the second on every axis.

    Args:
        family: what Holm's correction runs over: the pairs on one "axis", or "all" comparisons together.
    """
    tested: list[tuple[Side, Side, Axis, paired.Comparison]] = []
    for axis in wanted:
        made: dict[int, Statistic | None] = {}
        for side in (side for pair in pairs for side in pair):
            if id(side) not in made:
                made[id(side)] = side.statistic(axis)
        for a, b in pairs:
            of_a, of_b = made[id(a)], made[id(b)]
            if of_a is not None and of_b is not None:
                tested.append((a, b, axis, test(of_a, of_b)))
    together: dict[Any, list[int]] = {}
    for i, (_, _, axis, _) in enumerate(tested):
        together.setdefault(None if family == "all" else id(axis), []).append(i)
    found: list[Compared | None] = [None] * len(tested)
    for members in together.values():
        adjusted = paired.holm([tested[i][3].p_value for i in members])
        for i, p in zip(members, adjusted, strict=True):
            found[i] = _compared(*tested[i], p, len(members))
    return [row for row in found if row is not None]


def test(a: Statistic, b: Statistic) -> paired.Comparison:
    """The difference a - b with its interval and the p-value of none, paired by sample.

    Raises:
        DataError: they are not of the same samples in the same order.
    """
    if not np.array_equal(a.ids, b.ids):
        raise DataError(
            f"a paired comparison needs the same samples in the same order, got {len(a.ids)} and {len(b.ids)}"
        )
    if isinstance(a, Share) and isinstance(b, Share):
        return paired.compare_proportions(a.right, b.right)
    if isinstance(a, Mean) and isinstance(b, Mean):
        return paired.compare_means(a.values, b.values)
    if isinstance(a, Resampled) and isinstance(b, Resampled):
        found = paired.compare_resampled(a.value, b.value, a.drawn, b.drawn, len(a.ids))
        return found if a.ends is None or b.ends is None else paired.widened(found, a.value, a.ends, b.value, b.ends)
    if isinstance(a, Area) and isinstance(b, Area):
        return paired.compare_auroc_models(a.clean, b.clean, a.unknown, b.unknown, a.unknown_ids, b.unknown_ids)
    raise DataError(f"cannot compare a {type(a).__name__} with a {type(b).__name__}")


def _compared(a: Side, b: Side, axis: Axis, comparison: paired.Comparison, adjusted: float, tests: int) -> Compared:
    higher, alpha = a.results.metrics[axis.metric]["higher_is_better"], 1 - LEVEL
    outcome: Any = "inconclusive"
    if higher is not None and adjusted == adjusted:
        outcome = decision.outcome(replace(comparison, p_value=adjusted), higher, alpha)
    needed = None if outcome != "inconclusive" else decision.samples_to_decide(comparison, alpha / max(1, tests))
    difference = comparison.difference
    return Compared(
        model=a.name,
        against=b.name,
        condition=axis.condition,
        probe=axis.probe_of(a.model),
        metric=axis.metric,
        group=None if axis.group is ... else axis.group,
        value=finite(difference.value),
        ci_low=finite(difference.ci_low),
        ci_high=finite(difference.ci_high),
        ci_level=difference.level,
        ci_method=difference.ci_method,
        test=comparison.test,
        p_value=finite(comparison.p_value),
        p_adjusted=finite(adjusted),
        outcome=outcome,
        n=difference.n,
        n_to_decide=needed,
        reason=difference.reason,
    )


# Several runs --------------------------------------------------------------------------------------------------------


class ComparedRuns(BaseModel):
    """What `rbx compare` writes as compare.json.

    Attributes:
        runs: folder and models of each; the first is what the others are compared with.
        metrics: as in results.json.
        notes: what was not compared, and which models are not to be trusted.
    """

    model_config = ConfigDict(extra="forbid")

    schema_version: Literal[1] = 1
    generator: dict[str, str]
    runs: list[dict[str, Any]]
    metrics: dict[str, dict[str, Any]]
    comparisons: list[Compared]
    notes: list[str] = []

    def to_json(self) -> str:
        """Stable JSON text."""
        return self.model_dump_json(indent=1) + "\n"


@dataclass(frozen=True)
class Run:
    """A finished run folder."""

    name: str
    results: RunResults
    records: Stored

    @classmethod
    def read(cls, folder: Path, name: str | None = None) -> Run:
        """Read a run folder.

        Raises:
            ConfigError: it is none.
        """
        if not (folder / "results.json").is_file():
            raise ConfigError(f"{folder}: there is no results.json; expected a folder that `rbx run` made")
        return cls(name or folder.resolve().name, RunResults.read(folder / "results.json"), Stored(folder))

    def side(self, model: str, named: str | None = None) -> Side:
        """One of its models."""
        names = model_names(self.results)
        if model not in names:
            raise ConfigError(f"run {self.name}: {unknown_name('model', model, names)}")
        return Side(self.records, self.results, model, named or f"{self.name}: {model}")


def compare_runs(
    folders: Sequence[Path], pairs: Sequence[tuple[str, str]] = (), *, everything: bool = False, common: bool = False
) -> ComparedRuns:
    """Compare the models of later runs with those of the first, on the samples that all have.

    Args:
        folders: one run, whose models are compared with its first or with the first of each pair; or several.
        pairs: (model of the first run, model of the later ones); by default models of the same name, or the only ones.
        everything: all that both measured and that can be compared, not only the headline's axes.
        common: leave out conditions that differ instead of refusing.

    Raises:
        ConfigError: the runs measured something else; the message lists the differences. Or records are missing or damaged.
    """
    first, *others = [Run.read(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]
    sides: list[tuple[Side, Side]] = []
    notes: list[str] = []
    left_out: set[str] = set()
    for run in others:
        differing, remarks = differences(first, run)
        for label, text in _unmeasured(first, run):
            differing.setdefault(label, []).append(text)
        if differing and (not common or "" in differing):
            told = "\n".join(f"  - {text}" for texts in differing.values() for text in texts)
            hint = "" if "" in differing else "\nTo compare the rest, leave these out with --common."
            raise ConfigError(f"{run.name} did not measure what {first.name} measured:\n{told}{hint}")
        left_out |= set(differing)
        notes += [*remarks, *(f"left out: {text}" for texts in differing.values() for text in texts)]
        sides += [(run.side(new), first.side(old)) for old, new in _matched(first, run, pairs)]
    if not others:
        names = model_names(first.results)
        chosen = pairs or [(names[0], name) for name in names[1:]]
        if not chosen:
            raise ConfigError(f"{first.name} has one model only: name a second run, or a run with several models")
        sides = [(first.side(new, new), first.side(old, old)) for old, new in chosen]
    asked = _everything(first.results) if everything else [*axes(first.results), *own_axes(first.results)]
    other_code = _other_code(first, others)
    notes += other_code.values()
    wanted = [a for a in asked if a.condition not in left_out and a.metric not in other_code]
    wanted = [a for a in wanted if not left_out & set(_over(first.results, a.condition))]
    for side in (side for pair in sides for side in pair):
        behind = {CLEAN, *(label for a in wanted for label in (a.condition, *_over(side.results, a.condition)))}
        if isinstance(side.records, Stored):
            side.records.check(side.model, behind, {a.probe_of(side.model).partition(" · ")[0] for a in wanted})
    return ComparedRuns(
        generator={"name": "robustbench-ext", "version": __version__},
        runs=[
            {"name": r.name, "suite": r.results.suite["name"], "models": model_names(r.results)}
            for r in (first, *others)
        ],
        metrics={axis.metric: first.results.metrics[axis.metric] for axis in wanted},
        comparisons=compare(sides, wanted, "all"),
        notes=[*dict.fromkeys(notes), *_distrusted(sides)],
    )


def _other_code(first: Run, others: Sequence[Run]) -> dict[str, str]:
    """Metrics of the user's own that are not the same in all runs, each with a note."""
    found: dict[str, str] = {}
    for name in (axis.metric for axis in own_axes(first.results)):
        for run in others:
            theirs = run.results.metrics.get(name)
            if theirs is None or theirs.get("version") != first.results.metrics[name].get("version"):
                why = "has it not" if theirs is None else "has it with another source"
                found[name] = f"metric {name}, not compared: {run.name} {why}"
    return found


def _names(folders: Sequence[Path]) -> list[str]:
    """The folders' own names, with as much of their paths as makes them differ."""
    paths = [folder.resolve() for folder in folders]
    for depth in range(1, max(len(p.parts) for p in paths) + 1):
        names = ["/".join(p.parts[-depth:]) for p in paths]
        if len(set(names)) == len(names):
            return names
    raise ConfigError(f"the same run was given twice: {', '.join(str(f) for f in folders)}")


def _matched(first: Run, run: Run, pairs: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    if pairs:
        return list(pairs)
    mine, theirs = model_names(first.results), model_names(run.results)
    same = [(name, name) for name in mine if name in theirs]
    if same:
        return same
    if len(mine) == len(theirs) == 1:
        return [(mine[0], theirs[0])]
    raise ConfigError(
        f"no model of {run.name} ({', '.join(theirs)}) is called like one of {first.name} ({', '.join(mine)}); say which "
        f"belong together with --pair {mine[0]}={theirs[0]}"
    )


def _everything(results: RunResults) -> list[Axis]:
    """Every question that some row answers, each once; those without a sample-by-sample form drop out later."""
    found: dict[tuple[Any, ...], Axis] = {}
    classes = {str(c) for c in results.data["classes"]}
    for row in results.results:
        if row.metric in ("accuracy", "robust_accuracy") and row.group in classes:
            continue  # hundreds of small comparisons, whose correction would hide the others
        alone = row.metric in ("worst_class_accuracy", "mean_accuracy", "worst_domain_accuracy")
        group = ... if alone else row.group
        key = (row.condition, row.probe, row.metric, None if alone else row.group)
        title = f"{row.metric}, {row.condition}"
        found.setdefault(key, Axis(title, row.metric, row.condition, row.probe, group))
    return list(found.values())


def _over(results: RunResults, label: str) -> list[str]:
    return next((list(c.get("over", [])) for c in results.conditions if c["label"] == label), [])


def _distrusted(pairs: Sequence[tuple[Side, Side]]) -> list[str]:
    """Models whose checks failed: their numbers are compared like any others, and mean as little."""
    found: dict[str, None] = {}
    for side in (side for pair in pairs for side in pair):
        failed = [f for f in side.results.suspicions if f.model == side.model and f.status == "fail"]
        found |= {f"{side.name} is not to be trusted: {f.name}: {f.message}": None for f in failed}
    return list(found)


def differences(a: Run, b: Run) -> tuple[dict[str, list[str]], list[str]]:
    """What b measured otherwise than a: by condition, under "" what concerns all of them; and what only one of them has."""
    found: dict[str, list[str]] = {}
    one, other = a.records.index, b.records.index

    def differs(condition: str, text: str) -> None:
        found.setdefault(condition, []).append(text)

    for what, value in (("name", "data"), ("task", "task")):
        if a.results.data.get(what) != b.results.data.get(what):
            differs("", f"{value}: {a.results.data.get(what)} / {b.results.data.get(what)}")
    if a.results.suite["n"] != b.results.suite["n"]:
        differs("", f"test samples: n = {a.results.suite['n']} / {b.results.suite['n']}")
    elif one.conditions[CLEAN].ids != other.conditions[CLEAN].ids:
        differs("", "test samples: other ones, or in another order")
    elif one.conditions[CLEAN].samples != other.conditions[CLEAN].samples:
        differs("", "test samples: the same ids with other content")
    if one.seed != other.seed:
        differs("", f"seed of attacks and corruptions: {one.seed} / {other.seed}")
    for label in (label for label in one.conditions if label in other.conditions and label != CLEAN):
        mine, theirs = one.conditions[label], other.conditions[label]
        for key, x, y in _entries(mine.spec, theirs.spec):
            differs(label, f"{label}: {key} {x} / {y}")
        if mine.spec == theirs.spec and (mine.ids, mine.samples) != (theirs.ids, theirs.samples):
            differs(label, f"{label}: other samples")
    for label in dict.fromkeys(c["label"] for c in a.results.conditions if "over" in c):
        over, others = _over(a.results, label), _over(b.results, label)
        if others and set(over) != set(others):
            only = ", ".join(sorted(set(over) ^ set(others)))
            differs(label, f"{label}: taken over {len(over)} / {len(others)} conditions; not in both: {only}")
    for label in (label for label in one.probes if label in other.probes):
        for key, x, y in _entries(one.probes[label], other.probes[label]):
            differs("", f"{label}: {key} {x} / {y}")
    return found, _only_one(a.name, one, b.name, other)


def _unmeasured(a: Run, b: Run) -> list[tuple[str, str]]:
    """Axes of a's headline that b lacks, by condition: another budget is another condition, and must not pass unseen."""
    return [
        (axis.condition, f"{axis.condition}: {a.results.metrics[axis.metric]['title']} was not measured in {b.name}")
        for axis in axes(a.results)
        if not b.results.find(condition=axis.condition, metric=axis.metric)
    ]


def _entries(a: dict[str, Any], b: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    missing = "not given"
    return [(k, a.get(k, missing), b.get(k, missing)) for k in dict.fromkeys([*a, *b]) if a.get(k) != b.get(k)]


def _only_one(a: str, one: Index, b: str, other: Index) -> list[str]:
    notes = []
    for name, mine, theirs in ((a, one, other), (b, other, one)):
        for what, has, lacks in (
            ("conditions", mine.conditions, theirs.conditions),
            ("probes", mine.probes, theirs.probes),
        ):
            if only := [label for label in has if label not in lacks]:
                notes.append(f"{what} of {name} alone, not compared: {', '.join(only)}")
    return notes
