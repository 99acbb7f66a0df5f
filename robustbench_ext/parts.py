"""Several suites as one run: parts, run one after the other, each into a folder of its own, and what they say together.

A suite has one dataset. A file with `parts` in the place of `data` and `models` names suites and what they are run on:

    schema: 1
    title: Uncertainty against the truth
    description: ...
    parts:
      - {name: linear, suite: oracle-outcomes, data: "outcomes:linear"}
      - {name: small, suite: mine.yaml, set: {n: 200}}

Each part is a run like any other (`OUT/NAME/`): it is resumed, compared and exported like one, and the joint results are made
of the parts' own. `parts.json` holds what they say together; `results.csv` has all rows, with the part's name in front.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from robustbench_ext import __version__
from robustbench_ext.callbacks import Callback
from robustbench_ext.checks import Status, verdict
from robustbench_ext.compare import Run
from robustbench_ext.engine import Progress, RunSummary, run_suite
from robustbench_ext.errors import ConfigError, RobustBenchExtError, StoppedError
from robustbench_ext.files import write_atomically
from robustbench_ext.results import Failed, Row
from robustbench_ext.suite import Suite, bundled_parts, load_suite, read_yaml
from robustbench_ext.trust import Answer, Trusted, judge

JOINT, TABLE = "parts.json", "results.csv"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class Part(_Strict):
    """One run.

    Attributes:
        name: of its folder; letters, digits and hyphens.
        suite: a bundled name, a YAML file (relative to where `rbx` runs) or a mapping.
        data: instead of the suite's.
        set: overrides, by dotted key: {n: 200, "models.0.train.seed": 1}.
        shifted: whether the test inputs are unlike the training inputs as they are, so that the joint answers count all of the
            part's conditions, clean too, among the shifted ones.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9.-]*$")
    suite: str | dict[str, Any]
    data: str | None = None
    set: dict[str, Any] = Field(default_factory=dict)
    shifted: bool = False

    def load(self, settings: Sequence[str] = ()) -> Suite:
        """The validated suite."""
        own = [f"{key}={json.dumps(value)}" for key, value in self.set.items()]
        suite = self.suite if isinstance(self.suite, str) else {"name": self.name, **self.suite}
        return load_suite(suite, data=self.data, settings=[*own, *settings])


class Parts(_Strict):
    """What a file with `parts` says."""

    schema_version: Literal[1] = Field(1, alias="schema")
    name: str
    title: str = ""
    description: str = ""
    parts: tuple[Part, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _names_differ(self) -> Parts:
        names = [part.name.lower() for part in self.parts]  # some file systems do not tell a from A
        if len({*names}) < len(names):
            raise ValueError(f"names of parts must differ, also in lower case, got {', '.join(names)}")
        return self


class PartResult(_Strict):
    """A finished part: `folder` is relative to the joint one."""

    name: str
    title: str
    suite: str
    data: str
    n: int
    folder: str
    verdict: Status
    failures: tuple[Failed, ...] = ()


class JointResults(_Strict):
    """parts.json; without a clock, like results.json.

    Attributes:
        failures: parts that could not be run.
        trust, answers: every uncertainty estimator against the truth, where the parts' data knows it; else empty.
    """

    schema_version: Literal[1] = 1
    generator: dict[str, str]
    name: str
    title: str
    description: str
    parts: tuple[PartResult, ...]
    failures: tuple[Failed, ...]
    trust: tuple[Trusted, ...] = ()
    answers: tuple[Answer, ...] = ()

    @classmethod
    def read(cls, folder: Path) -> JointResults:
        """Read parts.json of a folder.

        Raises:
            ConfigError: it is not there, or damaged.
        """
        file = folder / JOINT
        try:
            return cls.model_validate_json(file.read_text(encoding="utf-8"))
        except OSError:
            raise ConfigError(f"{folder}: there is no {JOINT}; expected the folder of a run in parts") from None
        except ValidationError as error:
            raise ConfigError(f"{file} does not keep its schema: {error.errors()[0]['msg']}") from None


@dataclass
class PartsSummary:
    """How a run in parts went."""

    folder: Path
    results: JointResults
    parts: dict[str, RunSummary] = field(default_factory=dict)

    @property
    def failures(self) -> list[Failed]:
        """Of the parts as a whole, and inside them."""
        inside = [
            Failed(what=f"{name}: {f.what}", error=f.error) for name, part in self.parts.items() for f in part.failures
        ]
        return [*self.results.failures, *inside]

    @property
    def verdict(self) -> str:
        """The worst status of all checks of all parts."""
        order = ("pass", "doubt", "fail")
        return max((part.verdict for part in self.parts.values()), key=order.index, default="pass")


def read_parts(source: str | Path | Mapping[str, Any]) -> Parts | None:
    """A file with `parts`, by bundled name or path, or a mapping; None for anything else, which `load_suite` is to read.

    Raises:
        ConfigError: there are `parts`, and something about them is wrong.
    """
    if isinstance(source, Mapping):
        content, what = dict(source), "suite"
    else:
        file = bundled_parts().get(str(source)) or Path(source)
        if not file.is_file():
            return None
        content, what = read_yaml(file), str(source)
        content.setdefault("name", file.stem)
    if "parts" not in content:
        return None
    try:
        return Parts.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "top level"
        raise ConfigError(f"{what}: at {where}: {first.get('ctx', {}).get('error') or first['msg']}") from None


def run_parts(
    source: Parts | str | Path | Mapping[str, Any],
    out: str | Path,
    *,
    settings: Sequence[str] = (),
    executor: str | Executor = "serial",
    workers: int | None = None,
    executor_options: Mapping[str, str] | None = None,
    callbacks: Sequence[Callback] = (),
    progress: Progress | None = None,
) -> PartsSummary:
    """Run all parts into folders of `out`. Running it again computes what is missing and nothing else.

    Args:
        source: `Parts`, a bundled name, a YAML file or a mapping.
        settings: `key=value`, for the suite of every part, such as n=200.
        executor, workers, executor_options, callbacks, progress: as of `run_suite`, for each part.

    A part that cannot be run is a failure of its own; the others go on.

    Raises:
        ConfigError: one of the suites is wrong; nothing has been run.
        StoppedError: no part could go on (the disk is full); what was computed is kept.
    """
    read = source if isinstance(source, Parts) else read_parts(source)
    if read is None:
        raise ConfigError(f"{source}: there are no parts in it; run_suite runs a suite")
    folder, hooks = Path(out), progress or Progress()
    suites = {part.name: part.load(settings) for part in read.parts}
    done: dict[str, RunSummary] = {}
    failures: list[Failed] = []
    for number, (name, suite) in enumerate(suites.items(), 1):
        hooks.message(f"part {number} of {len(suites)}: {name}")
        try:
            done[name] = run_suite(
                suite,
                folder / name,
                executor=executor,
                workers=workers,
                executor_options=executor_options,
                callbacks=callbacks,
                progress=progress,
            )
        except StoppedError:
            raise
        except RobustBenchExtError as error:
            failures.append(Failed(what=f"part {name}", error=str(error)))
    results = join(read, folder, {name: suites[name] for name in done}, failures)
    return PartsSummary(folder, results, done)


def join(parts: Parts, folder: Path, suites: Mapping[str, Suite], failures: Sequence[Failed] = ()) -> JointResults:
    """What finished parts say together, from their folders alone; writes parts.json and results.csv."""
    runs = {name: Run.read(folder / name, name) for name in suites}
    trust, answers = judge(list(runs.values()), {part.name for part in parts.parts if part.shifted})
    joint = JointResults(
        generator={"name": "robustbench-ext", "version": __version__},
        name=parts.name,
        title=parts.title or parts.name,
        description=parts.description,
        parts=tuple(_part(run, suites[name]) for name, run in runs.items()),
        failures=tuple(failures),
        trust=tuple(trust),
        answers=tuple(answers),
    )
    text = json.dumps(joint.model_dump(), indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    write_atomically(folder / JOINT, lambda file: file.write_text(text, encoding="utf-8"))
    table = _csv({name: run.results.results for name, run in runs.items()})
    write_atomically(folder / TABLE, lambda file: file.write_text(table, encoding="utf-8"))
    return joint


def _part(run: Run, suite: Suite) -> PartResult:
    said = run.results
    return PartResult(
        name=run.name,
        title=str(said.suite["title"]),
        suite=suite.name,
        data=str(said.data["name"]),
        n=int(said.suite["n"]),
        folder=run.name,
        verdict=verdict((*said.preflight, *said.doubts)),
        failures=tuple(said.failures),
    )


def _csv(found: Mapping[str, Sequence[Row]]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=["part", *Row.model_fields], lineterminator="\n")
    writer.writeheader()
    for name, rows in found.items():
        for row in rows:
            writer.writerow({"part": name} | {k: "" if v is None else v for k, v in row.model_dump().items()})
    return out.getvalue()
