"""Tests without Python: files `*.rbx.yaml`, one test for each expectation, and `--robust-model` with a suite.

    # tests/model.rbx.yaml
    model: mypackage.models:factory      # or file.py:factory, beside this file
    data: npz:test_data.npz
    n: 500
    attack: apgd-ce                      # all keywords of the fixture `robustness`
    eps: 8/255
    expect:
      - accuracy >= 0.9
      - robust_accuracy >= 0.45
      - {metric: ece, at_most: 0.05}
      - {metric: robust_accuracy, not_worse_than_baseline: {margin: 0.01}}

Nothing heavy is imported to collect a file; its model is loaded when its first test runs.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from robustbench_ext.errors import RobustBenchExtError, unknown_name
from robustbench_ext.gate.packages import own_packages
from robustbench_ext.named_code import split_named, split_source
from robustbench_ext.pytest_plugin import engine, require_torch

STANDARD = "standard"
_PLACE = ("condition", "probe", "group")
_STATEMENTS = ("at_least", "at_most", "between", "not_worse_than_baseline")
_SHORT = re.compile(r"\s*([\w]+)\s*(?:\[(.*)\])?\s*(>=|<=)\s*(\S+)\s*$")
_FILES = ("npz", "folder", "csv", "domains")  # sources whose argument is a path


@dataclass(frozen=True)
class Stated:
    """One expectation as it is written: a metric, where, one statement about it with its keywords."""

    metric: str
    statement: str
    values: tuple[Any, ...] = ()
    keywords: Mapping[str, Any] = field(default_factory=dict)
    place: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The test's name."""
        where = "[" + ", ".join(self.place.values()) + "]" if self.place else ""
        texts = [str(v) for v in self.values] + [f"{k}={v}" for k, v in self.keywords.items()]
        words = {"at_least": ">=", "at_most": "<=", "between": "between"}
        word = words.get(self.statement, self.statement)
        return f"{self.metric}{where} {word} {' '.join(texts)}".strip()


def read_expectations(content: Any) -> list[Stated]:
    """The expectations of a file, each `metric >= number`, `metric[condition] <= number`, or a mapping.

    Raises:
        ValueError: what is wrong with which of them.
    """
    if not isinstance(content, list) or not content:
        raise ValueError("expect: expected a list such as [robust_accuracy >= 0.45]")
    return [stated for entry in content for stated in _read(entry)]


def _read(entry: Any) -> list[Stated]:
    if isinstance(entry, str):
        short = _SHORT.match(entry)
        if short is not None:
            metric, where, sign, number = short.groups()
            statement = "at_least" if sign == ">=" else "at_most"
            return [Stated(metric, statement, (number,), place={"condition": where.strip()} if where else {})]
    if not isinstance(entry, Mapping):
        raise ValueError(
            f"expect: {entry!r}, expected `metric >= number`, or a mapping with metric: and at_least: or the like"
        )
    if "metric" not in entry and len(entry) == 1:
        ((metric, said),) = entry.items()
        if not isinstance(said, Mapping):
            raise ValueError(f"expect: {metric}: {said!r}, expected a mapping such as {{at_least: 0.45}}")
        entry = {"metric": metric, **said}
    known = ("metric", *_PLACE, *_STATEMENTS, "confidence")
    for key in entry:
        if key not in known:
            raise ValueError(f"expect: {unknown_name('key', str(key), known)}")
    if "metric" not in entry:
        raise ValueError(f"expect: {dict(entry)!r} names no metric")
    place = {k: str(entry[k]) for k in _PLACE if k in entry}
    level = {"confidence": entry["confidence"]} if "confidence" in entry else {}
    found = []
    for statement in _STATEMENTS:
        if statement not in entry:
            continue
        said = entry[statement]
        values: tuple[Any, ...] = (said,)
        keywords: dict[str, Any] = dict(level)
        if statement == "between":
            if not isinstance(said, (list, tuple)) or len(said) != 2:
                raise ValueError(f"expect: {entry['metric']}: between: {said!r}, expected [low, high]")
            values = tuple(said)
        elif statement == "not_worse_than_baseline":
            if isinstance(said, Mapping):
                keywords |= said
            elif said not in (True, None):
                raise ValueError(f"expect: {entry['metric']}: {statement}: {said!r}, expected true or {{margin: 0.01}}")
            values = ()
        found.append(Stated(str(entry["metric"]), statement, values, keywords, place))
    if not found:
        raise ValueError(f"expect: {entry['metric']}: nothing is expected of it; say one of {', '.join(_STATEMENTS)}")
    return found


# Files ---------------------------------------------------------------------------------------------------------------


class ExpectationFile(pytest.File):
    """A `*.rbx.yaml` file."""

    def collect(self) -> Iterator[pytest.Item]:
        """One test for each expectation."""
        import yaml

        try:
            content = yaml.safe_load(self.path.read_text(encoding="utf-8"))
            if not isinstance(content, dict):
                raise ValueError("expected a mapping with model:, data: and expect:")
            expected = read_expectations(content.pop("expect", None))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise self.CollectError(f"{self.path.name}: {error}") from None
        names: dict[str, int] = {}
        for stated in expected:
            count = names[stated.name] = names.get(stated.name, 0) + 1
            name = stated.name if count == 1 else f"{stated.name} ({count})"
            yield ExpectationItem.from_parent(self, name=name, stated=stated, keywords_=content)


class _Item(pytest.Item):
    """A test of ours: errors that we raise on purpose are shown as their message."""

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """Messages instead of tracebacks of our own code."""
        if isinstance(excinfo.value, (AssertionError, RobustBenchExtError)):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)


class ExpectationItem(_Item):
    """One expectation of a file."""

    def __init__(self, *, stated: Stated, keywords_: Mapping[str, Any], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.stated, self._keywords = stated, keywords_
        self.baseline = self.parent.nodeid if self.parent is not None else self.nodeid  # one for the whole file

    def runtest(self) -> None:
        """Measure and judge."""
        told = {k: _beside(self.path.parent, k, v) for k, v in self._keywords.items()}
        robustness = engine(self.config)
        with _importable(self.config.rootpath):
            measured = robustness(**told)
        found = measured.metric(self.stated.metric, **self.stated.place)
        getattr(found, self.stated.statement)(*self.stated.values, **self.stated.keywords)

    def reportinfo(self) -> tuple[Path, int | None, str]:
        """Where it is."""
        return self.path, None, self.name


def _beside(folder: Path, key: str, value: Any) -> Any:
    """Paths in a file are relative to it, where they are there."""
    if isinstance(value, list):
        return [_beside(folder, key, each) for each in value]
    if not isinstance(value, str):
        return value
    where, name = split_named(value)
    if where.endswith(".py") and (folder / where).is_file():  # of a model, data, an attack, ... of one's own
        return f"{folder / where}:{name}" if name else str(folder / where)
    if key == "model" and not name and (folder / where).exists():
        return str(folder / where)
    if key == "data":
        source, path = split_source(value)
        if source in _FILES and (folder / path.partition("#")[0]).exists():
            return f"{source}:{folder / path}"
    if key in ("weights", "suite") and (folder / value).is_file():
        return str(folder / value)
    return value


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """`pkg.module:factory` is looked for in the root of the project, too, after all other places."""
    sys.path.append(str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


# A suite -------------------------------------------------------------------------------------------------------------


class SuiteItem(_Item):
    """One number of a suite: compared with the baseline, or measured and reported where there is none yet."""

    def __init__(self, *, suite: str, model: str, wanted: tuple[str, str, str | None] | None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._suite, self._model, self._wanted = suite, model, wanted
        self.baseline = f"suite {suite} of {model}"
        self.reproduced_by = ["-k", f"'{self.name}'"] if wanted else []

    def runtest(self) -> None:
        """Measure and compare."""
        robustness = engine(self.config)
        with _importable(self.config.rootpath):
            measured = robustness(self._model, suite=self._suite)
        if self._wanted is None:
            return
        found = measured.metric(*self._wanted)
        path = robustness.baseline_path(measured)
        if path.is_file() or robustness.update or robustness.no_baseline:
            found.not_worse_than_baseline()
            return
        text = f"measured, and compared with nothing: {robustness.relative(path)} is not there yet, --robust-update writes it"
        if robustness.strict:  # otherwise a run that compares nothing at all would be green
            robustness.conclude(found, "fail", "baseline", text, found.estimate)
        robustness.conclude(found, "skipped", "baseline", text, found.estimate)
        pytest.skip(text)

    def reportinfo(self) -> tuple[Path, int | None, str]:
        """Where it is."""
        return self.path, None, f"robustness::{self.name}"


def suite_items(session: pytest.Session, model: str) -> list[pytest.Item]:
    """The tests of `--robust-model`: the checks of the model, then every headline number of the suite.

    Raises:
        pytest.UsageError: the suite or its data are not there.
    """
    suite = str(session.config.getoption("robust_suite") or session.config.getini("robust_suite") or STANDARD)

    def item(name: str, wanted: tuple[str, str, str | None] | None) -> pytest.Item:
        made: pytest.Item = SuiteItem.from_parent(
            session, name=name, nodeid=f"robustness::{name}", suite=suite, model=model, wanted=wanted
        )
        return made

    found = [item("checks", None)]
    try:
        require_torch()
    except pytest.skip.Exception:
        return found  # it will say so
    robustness = engine(session.config)
    try:
        with own_packages():
            from robustbench_ext.suite import load_suite

            data = session.config.getoption("robust_data") or load_suite(suite).data
            context = robustness.context(model, data, {"suite": suite})
    except RobustBenchExtError as error:
        raise pytest.UsageError(f"--robust-suite={suite}: {error}") from None
    return found + [item(name, wanted) for name, wanted in _headline(context).items()]


def _headline(context: Any) -> dict[str, tuple[str, str, str | None]]:
    """Metric, condition and probe of every number that a suite is judged by, by name."""
    regression = context.data.task == "regression"
    accuracy = "rmse" if regression else "accuracy"
    found: dict[str, tuple[str, str, str | None]] = {accuracy: (accuracy, "clean", None)}
    if not regression:
        found["ece"] = ("ece", "clean", None)
    for kind, summary in (("corruption", "all corruptions"), ("domain", "all domains")):
        labels = [c.label for c in context.conditions.values() if c.kind == kind]
        if len(labels) > 1:
            found[f"mean_accuracy, {summary}"] = ("mean_accuracy", summary, None)
        elif labels:
            found[f"accuracy, {labels[0]}"] = ("accuracy", labels[0], None)
    for c in context.conditions.values():
        if c.kind == "attack" and not c.facts().get("minimum_norm"):
            metric = accuracy if regression else "robust_accuracy"
            found[f"{metric}, {c.label}"] = (metric, c.label, None)
        elif c.kind == "shift":
            found[f"{accuracy}, {c.label}"] = (accuracy, c.label, None)
        elif c.kind == "outliers":
            for probe in (p for p in context.probes if p.kind == "detector"):
                found[f"auroc, {c.label}, {probe.label}"] = ("auroc", c.label, probe.label)
    return found
