"""What every tracker is told of a run, and under which names; an adapter says how it is written down.

    training/MODEL/...          a row of the training curve, by epoch
    progress/done, failed       jobs, as they come in
    results/MODEL/AXIS/...      value, ci_low, ci_high and n of each axis of the report's headline
    rows/MODEL/CONDITION/PROBE/METRIC[/GROUP]/...    the same of all rows, where they are asked for

What is undefined is not sent. A run that is given again in the same folder goes on as the same entry of the tracker, as long
as its suite is the same; `trackers.json` in the run folder remembers which entry that is.
"""

from __future__ import annotations

import json
import re
import unicodedata
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from robustbench_ext.axes import axes, model_names
from robustbench_ext.callbacks import Callback
from robustbench_ext.files import write_atomically
from robustbench_ext.fingerprint import key_of
from robustbench_ext.results import Row, RunResults

if TYPE_CHECKING:
    from robustbench_ext.engine import RunSummary
    from robustbench_ext.suite import Suite

MEMORY = "trackers.json"  # in the run folder
FILES = ("results.json", "results.csv", "run.json")
LONGEST = 230  # characters of a name; MLflow allows 250, and /ci_high comes behind it
LONGEST_TEXT = 500  # of a parameter; old MLflow servers allow no more
NUMBERS = ("value", "ci_low", "ci_high", "n")


class Tracker(Callback):
    """Turns the events of a run into what trackers know: parameters, points of curves, results, tags, files, an end.

    Args:
        where: of this tracker: a server, a folder, a project; empty for its default.
        rows: "headline" or "all".
    """

    allowed = "_.-"  # what names may hold beside letters and digits

    def __init__(self, where: str = "", rows: str = "headline") -> None:
        self._where, self._rows = where, rows
        self._memory: _Memory | None = None
        self._ended = False

    # What a run tells ------------------------------------------------------------------------------------------------

    def on_run_start(self, suite: Suite, folder: Path) -> None:
        memory = _Memory(folder, f"{self.name}:{self._where}", key_of(suite.model_dump(by_alias=True, mode="json")))
        memory.entry = self._open(memory.entry, folder, parameters(suite), versions())
        memory.save()
        self._memory, self._ended = memory, False

    def on_cell(self, done: int, total: int, what: str, facts: Mapping[str, Any]) -> None:
        if self._memory is not None:
            self._memory.jobs["failed" if "error" in facts else "done"] += 1
            self._point("progress", dict(self._memory.jobs), sum(self._memory.jobs.values()))
            self._memory.save()

    def on_epoch(self, model: str, row: Mapping[str, Any]) -> None:
        if self._memory is not None:
            self._epoch(model, row, self._memory)
            self._memory.save()

    def on_run_end(self, summary: RunSummary) -> None:
        if self._memory is None:
            return
        results = summary.results
        # Epochs that were over between two looks at a training, and those of other processes.
        for model in results.models:
            curve = model.get("training", {}).get("curve", ())
            told = self._memory.epochs.get(str(model["name"]), [])
            first = next((row["epoch"] for row in curve if row["epoch"] not in told), None)
            for row in curve:
                if first is not None and row["epoch"] >= first:
                    self._epoch(str(model["name"]), row, self._memory)
        self._results(metrics(results, self._rows, self.clean))
        self._tag({"verdict": summary.verdict, "failures": str(len(summary.failures))})
        self._keep([summary.folder / name for name in FILES])
        self._memory.save()
        self._ended = True

    def on_report(self, files: Mapping[str, Path]) -> None:
        if self._memory is not None:
            self._keep(list(files.values()))

    def close(self) -> None:
        if self._memory is not None:
            self._memory = None
            self._close(self._ended)

    def _epoch(self, model: str, row: Mapping[str, Any], memory: _Memory) -> None:
        told = {k: float(v) for k, v in row.items() if isinstance(v, (int, float)) and k not in ("epoch", "epochs")}
        self._point(f"training/{self.clean(model)}", {self.clean(k): v for k, v in told.items()}, int(row["epoch"]))
        memory.epochs[model] = sorted({*memory.epochs.get(model, []), int(row["epoch"])})

    def clean(self, text: str) -> str:
        """A part of a name: Latin letters, digits and what this tracker allows, one underscore for all else."""
        latin = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
        return re.sub(f"[^A-Za-z0-9{re.escape(self.allowed)}]+", "_", latin).strip("_.-") or "unnamed"

    # What an adapter writes ------------------------------------------------------------------------------------------

    @abstractmethod
    def _open(
        self, known: str | None, folder: Path, told: Mapping[str, str | int], made_with: Mapping[str, str]
    ) -> str:
        """Begin an entry, or go on with the one called `known` where it is still there; returns what it is called.

        Args:
            told: parameters, which stay the same as long as the entry goes on; made_with: versions, which need not.
        """

    @abstractmethod
    def _point(self, family: str, values: Mapping[str, float], step: int) -> None:
        """A point of curves that are called `family/NAME`."""

    @abstractmethod
    def _results(self, values: Mapping[str, float]) -> None:
        """The final numbers, by name; they replace those of an earlier end of the same entry."""

    @abstractmethod
    def _tag(self, tags: Mapping[str, str]) -> None:
        """Words about the whole run."""

    @abstractmethod
    def _keep(self, files: Sequence[Path]) -> None:
        """Copies of files."""

    @abstractmethod
    def _close(self, finished: bool) -> None:
        """End the entry: the run came to its end, or was interrupted."""


class _Memory:
    """What is remembered of an entry in the run folder, so that a run that was killed goes on as the same entry."""

    def __init__(self, folder: Path, tracker: str, suite: str) -> None:
        self._file, self._tracker, self._suite = folder / MEMORY, tracker, suite
        mine = self._read().get(tracker, {})
        mine = mine if mine.get("suite") == suite else {}
        self.entry: str | None = mine.get("entry")
        self.jobs: dict[str, int] = {"done": 0, "failed": 0, **mine.get("jobs", {})}
        self.epochs: dict[str, list[int]] = mine.get("epochs", {})

    def save(self) -> None:
        mine = {"entry": self.entry, "suite": self._suite, "jobs": self.jobs, "epochs": self.epochs}
        text = json.dumps({**self._read(), self._tracker: mine}, indent=1)
        write_atomically(self._file, lambda file: file.write_text(text, encoding="utf-8"))

    def _read(self) -> dict[str, Any]:
        try:
            found = json.loads(self._file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) and all(isinstance(v, dict) for v in found.values()) else {}


def parameters(suite: Suite) -> dict[str, str | int]:
    """A suite as parameters: its numbers and words, and its lists as text."""
    told: dict[str, str | int] = {}
    for key, value in suite.model_dump(by_alias=True, mode="json").items():
        if key in ("schema", "title", "description") or value is None:
            continue
        if key == "models":
            value = [model["name"] for model in value if model["evaluate"]]
        if isinstance(value, (list, dict)):
            value = ", ".join(v if isinstance(v, str) else _flow(v) for v in value)
        told["suite" if key == "name" else key] = value if isinstance(value, int) else _short(str(value))
    return told


def _flow(entry: Any) -> str:
    return json.dumps(entry, ensure_ascii=False)


def _short(text: str) -> str:
    return text if len(text) <= LONGEST_TEXT else text[: LONGEST_TEXT - 1] + "…"


def versions() -> dict[str, str]:
    """Versions of packages, the commit of a checkout, the processor."""
    from robustbench_ext.provenance import environment

    found = environment()
    told = {f"version.{package}": str(version) for package, version in found["versions"].items()}
    return told | {
        k: str(v) for k, v in (("commit", found["commit"]), ("processor", found["hardware"].get("processor"))) if v
    }


def metrics(results: RunResults, rows: str, clean: Any) -> dict[str, float]:
    """The results by name; see the head of this module.

    Args:
        rows: "headline" or "all"; clean: makes a part of a name.
    """
    named: list[tuple[str, Row]] = []
    for axis in axes(results):
        for model in model_names(results):
            row = axis.row(results, model)
            if row is not None:
                named.append((f"results/{clean(model)}/{clean(axis.title)}", row))
    if rows == "all":
        for row in results.results:
            parts = [
                row.model,
                row.condition,
                row.probe,
                row.metric,
                row.group,
                row.against and f"against {row.against}",
            ]
            named.append(("/".join(["rows", *(clean(part) for part in parts if part)]), row))
    return {
        f"{name}/{number}": float(getattr(row, number))
        for name, (_, row) in zip(_distinct(name for name, _ in named), named, strict=True)
        for number in NUMBERS
        if getattr(row, number) is not None
    }


def _distinct(names: Iterable[str]) -> list[str]:
    """Names of at most `LONGEST` characters that differ: `a`, `a_2`, where cleaning or cutting made them equal."""
    taken: set[str] = set()
    out = []
    for name in names:
        found, number = name[:LONGEST], 1
        while found in taken:
            number += 1
            found = f"{name[: LONGEST - len(str(number)) - 1]}_{number}"
        taken.add(found)
        out.append(found)
    return out
