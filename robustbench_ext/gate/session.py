"""The `robustness` fixture: options of the session, calls, and what becomes of verdicts."""

from __future__ import annotations

import difflib
import os
import shlex
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from torch.utils.data import DataLoader, RandomSampler

from robustbench_ext.catalog import ATTACKS, REGRESSION_ATTACKS
from robustbench_ext.data.base import Dataset
from robustbench_ext.data.given import given_dataset
from robustbench_ext.errors import ConfigError, RobustBenchExtError, unknown_name
from robustbench_ext.evaluate import GIVEN, Context, Given
from robustbench_ext.fingerprint import key_of
from robustbench_ext.gate.baseline import file_name
from robustbench_ext.gate.expectation import Expectation, Outcome, Verdict
from robustbench_ext.gate.measurement import Measurement
from robustbench_ext.gate.packages import own_packages
from robustbench_ext.gate.run import MODEL, Measured, PreflightError, measure, seconds_of
from robustbench_ext.metrics.estimate import LEVEL, Estimate
from robustbench_ext.numbers import parse_number
from robustbench_ext.own import is_own
from robustbench_ext.pytest_plugin import (
    CACHE,
    FOLDER,
    ITEM,
    ROWS,
    RobustnessDoubt,
    RobustnessInconclusive,
    option_name,
)
from robustbench_ext.suite import load_suite, validate_suite

N = 500  # test samples where nobody says otherwise
CHUNK = 100  # samples per record: what is computed at a time, and what two workers share
# Keywords of a call that are not parameters of its attack.
KEYWORDS = (
    "attack",
    "corruption",
    "severity",
    "levels",
    "domain",
    "shift",
    "outliers",
    "outliers_n",
    "detector",
    "uq",
    "conditions",
    "suite",
    "n",
    "seed",
    "budget",
    "name",
    "mean",
    "std",
    "weights",
    "kwargs",
    "accept",
    "batch_size",
)


class Robustness:
    """Measures models. The fixture `robustness` is one of these.

        r = robustness(model, data, attack="apgd-ce", eps="8/255", n=500)

    Calling it measures what the keywords say, once in the session, and returns a `Measurement`. The same model, data and
    condition are never computed twice, in whichever test or xdist worker.

    Args of a call:
        model: an `nn.Module` in eval mode, or a specification such as `pkg.module:factory`; --robust-model by default.
        data: a `Dataset`, (x, y), a torch `Dataset` or `DataLoader` that does not shuffle, a mapping of splits to these, or a
            specification such as `digits` or `npz:PATH`; --robust-data by default. x: float (N, C, H, W) in [0, 1].
        attack: a name, or a list of them; `eps`, `norm`, `steps` and all other parameters of the attack beside it.
        corruption, severity, levels: names and severities 1 to 5, all five by default.
        domain, shift, outliers: as in suites; `outliers_n` inputs of each.
        detector: of unknown inputs, a name, a mapping with parameters, or a list of these; `energy` where there are outliers.
        uq: estimators, likewise.
        conditions: further conditions, as a suite has them.
        suite: a bundled suite, or the path of one, whose conditions, detectors, estimators, n and seed are taken.
        n: test samples, the first of an order in which every prefix is class-balanced; 500 by default.
        seed: of attacks and corruptions.
        budget: such as "60s": what is not done by then is said, and expectations of it are inconclusive.
        name: of the baseline's file; by default that of the test.
        mean, std, weights, kwargs: of the model, see `robustbench_ext.models.load_model`.
        accept: names of checks whose failure is to be a warning only.

    The marker `@pytest.mark.robustness(...)` gives keywords to start from.
    """

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.strict = bool(self._option("strict"))
        self.update = bool(self._option("update"))
        self.no_baseline = bool(self._option("no-baseline"))
        self.baseline_dir = config.rootpath / str(self._option("baseline-dir") or ".robustness")
        self.folder = self._folder()
        total = self._option("budget")
        self._left = None if total is None else seconds_of(total)
        self._memory: dict[str, Measured] = {}
        self._contexts: dict[str, Context] = {}  # of models and data by name: their factories are called once
        self._made: list[str] = []  # keys of the running test's measurements that were compared with baselines
        self._running: pytest.Item | None = None

    # Options ---------------------------------------------------------------------------------------------------------

    def _option(self, name: str) -> Any:
        """An option of the command line, else of the ini file, else None."""
        given = self._given(name)
        if given is not None:
            return given
        try:
            return self.config.getini(option_name(name)) or None
        except (ValueError, KeyError):
            return None  # not one of the ini file's

    def _given(self, name: str) -> Any:
        return self.config.getoption(option_name(name), None)

    def _folder(self) -> Path:
        kept = self._option("cache")
        if kept is not None:
            return self.config.rootpath / str(kept)
        shared = getattr(self.config, "workerinput", {}).get(CACHE)
        if shared is not None:
            Path(shared).mkdir(mode=0o700, parents=True, exist_ok=True)
            return Path(shared)
        if FOLDER not in self.config.stash:
            self.config.stash[FOLDER] = tempfile.mkdtemp(prefix="robustness-")
        return Path(self.config.stash[FOLDER])

    def confidence(self, asked: float | None = None) -> float:
        """The level that verdicts use."""
        found = self._given("confidence") or asked or self._option("confidence") or LEVEL
        level = parse_number(found, "confidence")
        if not 0.5 <= level < 1:
            raise ConfigError(f"confidence = {found}, expected a level such as 0.95 or 0.99")
        return level

    # Measuring -------------------------------------------------------------------------------------------------------

    def __call__(self, model: nn.Module | str | None = None, data: Any = None, /, **keywords: Any) -> Measurement:
        """Measure a model; see the class.

        Raises:
            PreflightError: a check of the model failed.
            ConfigError: a keyword, a name or a value is wrong.
        """
        __tracebackhide__ = True
        with own_packages():
            try:
                return self._measure(model, data, keywords)
            except (PreflightError, RobustBenchExtError) as error:
                raise error.with_traceback(
                    None
                ) from None  # where in our own code it was found is of no interest in a test

    def _measure(self, model: Any, data: Any, keywords: Mapping[str, Any]) -> Measurement:
        told = {**self._marked(), **keywords}
        named_model, named_data = told.pop("model", None), told.pop("data", None)
        model = next((m for m in (model, named_model, self._option("model")) if m is not None), None)
        data = next((d for d in (data, named_data, self._option("data")) if d is not None), None)
        if data is None and told.get("suite") is not None:
            data = load_suite(told["suite"]).data
        if model is None or data is None:
            what = "model" if model is None else "data"
            raise ConfigError(f"robustness(): no {what}; expected robustness(model, data, ...), or --robust-{what}")
        context = self.context(model, data, told)
        key = key_of([context.suite.model_dump(by_alias=True, mode="json"), *self._content(context)])
        accept = told.get("accept") or ()
        accept = (accept,) if isinstance(accept, str) else tuple(accept)
        measured = self._memory.get(key)
        if measured is None or measured.undone or measured.doubts or accept:
            began = time.monotonic()
            measured = measure(context, accept, self._deadline(told, began))
            if self._left is not None:
                self._left = max(0.0, self._left - (time.monotonic() - began))
            if key not in self._memory:
                for doubt in [*measured.doubts, *self._too_few(context, told)]:
                    warnings.warn(RobustnessDoubt(f"{_called(model)}: {doubt}"), stacklevel=4)
            self._memory[key] = measured
        return Measurement(self, measured, key, str(told.get("name") or ""), _called(model))

    def _too_few(self, context: Context, told: Mapping[str, Any]) -> list[str]:
        """What to say where more samples were asked for than there are; the default n is an upper bound, and asks for none."""
        asked, there = context.suite.n or 0, len(context.data["test"])
        wanted = any(n is not None for n in (told.get("n"), self._option("n")))
        if not wanted or asked <= there:
            return []
        return [
            f"n = {asked} test samples were asked for, and the test split has {there}. If the data is a file with x and y, it "
            f"was cut into train, calibration and test: name the arrays x_test and y_test where all of it is test data."
        ]

    def context(self, model: Any, data: Any, told: Mapping[str, Any]) -> Context:
        """The engine's context of a call: nothing is computed yet."""
        suite = self._suite(model, data, told)
        given = Given(
            {} if isinstance(model, str) else {MODEL: _module(model)},
            None if isinstance(data, str) else _dataset(data),
        )
        named = isinstance(model, str) and isinstance(data, str)
        key = key_of(suite) if named else ""
        if key in self._contexts:
            return self._contexts[key]
        context = Context(validate_suite(suite, "robustness()"), self.folder, given)
        if named:
            self._contexts[key] = context
        return context

    def _content(self, context: Context) -> list[Any]:
        return [context.model(MODEL).fingerprint, context.data.describe()]

    def _suite(self, model: Any, data: Any, told: Mapping[str, Any]) -> dict[str, Any]:
        base: dict[str, Any] = {"conditions": [], "detectors": [], "uq": []}
        if told.get("suite") is not None:
            own = load_suite(told["suite"])
            base = {k: list(getattr(own, k)) for k in ("conditions", "detectors", "uq")}
            base |= {"n": own.n, "seed": own.seed}
        conditions = [*base["conditions"], *self._conditions(told)]
        outliers = any(isinstance(c, Mapping) and "outliers" in c for c in conditions)
        detectors = [*base["detectors"], *_listed(told.get("detector"))]
        entry = {k: told[k] for k in ("mean", "std", "weights", "kwargs") if told.get(k) is not None}
        return {
            "schema": 1,
            "name": "robustness",
            "data": data if isinstance(data, str) else GIVEN,
            "n": self._whole("n", told, base.get("n") or N),
            "seed": self._whole("seed", told, base.get("seed") or 0),
            "models": [{"name": MODEL, "spec": model if isinstance(model, str) else GIVEN, **entry}],
            "conditions": conditions,
            "detectors": detectors or (["energy"] if outliers else []),
            "uq": [*base["uq"], *_listed(told.get("uq"))],
            "chunk_size": CHUNK,
            **({"batch_size": told["batch_size"]} if told.get("batch_size") is not None else {}),
        }

    def _whole(self, name: str, told: Mapping[str, Any], default: int) -> int:
        """A whole number: of the command line, the call, the ini file, or the default."""
        given = self._given(name)
        if given is None:
            given = told.get(name)
        if given is None:
            given = self._option(name)
        number = parse_number(default if given is None else given, name)
        if number != int(number) or number < 0:
            raise ConfigError(f"{name} = {given!r}, expected a whole number")
        return int(number)

    def _conditions(self, told: Mapping[str, Any]) -> list[dict[str, Any] | str]:
        """The conditions that a call's keywords spell."""
        rest = {k: v for k, v in told.items() if k not in KEYWORDS}
        if rest and told.get("attack") is None:
            name = next(iter(rest))
            close = difflib.get_close_matches(name, KEYWORDS, n=1, cutoff=0.5)
            hint = f"Did you mean '{close[0]}'?" if close else "Parameters of an attack go beside attack=."
            raise ConfigError(f"robustness(): unknown keyword '{name}'. {hint}")
        found: list[dict[str, Any] | str] = []
        for attack in _listed(told.get("attack")):
            entry = dict(attack) if isinstance(attack, Mapping) else {"attack": attack}
            name = ATTACKS.split(str(entry.get("attack")))[0]
            if name not in ATTACKS and name not in REGRESSION_ATTACKS and not is_own(name):
                raise ConfigError(f"robustness(): {unknown_name('attack', name, ATTACKS.names())}")
            found.append({**entry, **rest})
        levels = {k: told[k] for k in ("severity", "levels") if told.get(k) is not None}
        if levels and told.get("corruption") is None:
            raise ConfigError(f"robustness(): {next(iter(levels))}= belongs to corruption=, which is missing")
        if told.get("corruption") is not None:
            found.append({"corruption": told["corruption"], **levels})
        if told.get("domain") is not None:
            found.append({"domain": told["domain"]})
        for shift in _listed(told.get("shift")):
            found.append(dict(shift) if isinstance(shift, Mapping) else {"shift": shift})
        if told.get("outliers") is not None:
            n = {} if told.get("outliers_n") is None else {"n": told["outliers_n"]}
            found.append({"outliers": told["outliers"], **n})
        return [*found, *_listed(told.get("conditions"))]

    def _deadline(self, told: Mapping[str, Any], now: float) -> float | None:
        budgets = [] if told.get("budget") is None else [seconds_of(told["budget"])]
        if self._left is not None:
            budgets.append(self._left)
        return now + min(budgets) if budgets else None

    # The running test --------------------------------------------------------------------------------------------------

    @property
    def item(self) -> pytest.Item | None:
        """The test that is running."""
        return self.config.stash.get(ITEM, None)

    def _marked(self) -> dict[str, Any]:
        """Keywords of the test's markers, the nearest one last."""
        told: dict[str, Any] = {}
        for marker in reversed(list(self.item.iter_markers("robustness")) if self.item is not None else []):
            if marker.args:
                raise ConfigError(f"@pytest.mark.robustness{marker.args}: expected keywords, such as n=500")
            told |= marker.kwargs
        return told

    def baseline_name(self, measurement: Measurement) -> str:
        """What a measurement's baseline is called: as it was told, else after the test, numbered where it makes several."""
        if measurement.name:
            return measurement.name
        if self.item is None:
            raise ConfigError("a baseline belongs to a test: compare inside of one, or give the measurement a name=")
        if self.item is not self._running:
            self._running, self._made = self.item, []
        if measurement.key not in self._made:
            self._made.append(measurement.key)
        number = self._made.index(measurement.key)
        name = str(getattr(self.item, "baseline", self.item.nodeid))
        return name if number == 0 else f"{name} {number + 1}"

    def baseline_path(self, measurement: Measurement) -> Path:
        """The file of a measurement's baseline."""
        return self.baseline_dir / file_name(self.baseline_name(measurement))

    def relative(self, path: Path) -> str:
        """A path as it is said, from the root of the project."""
        try:
            return path.relative_to(self.config.rootpath).as_posix()
        except ValueError:
            return str(path)

    def command(self) -> str:
        """What runs the test again."""
        item = self.item
        words = ["python", "-m", "pytest"]
        own = getattr(item, "reproduced_by", None)
        if own is not None:
            words += own
        elif item is not None:
            file, colons, rest = item.nodeid.partition("::")
            where = os.path.relpath(self.config.rootpath / file, self.config.invocation_params.dir)
            words.append(where + colons + rest)
        for name in ("n", "seed", "budget", "confidence", "model", "data", "suite", "cache"):
            given = self._given(name)
            if given is not None:
                words.append(f"--robust-{name}={given}")
        return shlex.join([*words, *(["--robust-strict"] if self._given("strict") else [])])

    # Verdicts ----------------------------------------------------------------------------------------------------------

    def conclude(
        self,
        found: Expectation,
        outcome: Outcome,
        wanted: str,
        message: str,
        estimate: Estimate | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> Verdict:
        """Write a verdict down, and fail or warn accordingly.

        Raises:
            AssertionError: it is a failure, or inconclusive in strict mode.
        """
        __tracebackhide__ = True
        if outcome in ("fail", "inconclusive"):
            message = f"{message}\nreproduce: {self.command()}"
        row = found.row
        n = estimate.n if estimate is not None else 0
        said: dict[str, Any] = {
            "outcome": outcome,
            "metric": found.metric,
            "name": found.name,
            "title": found.measurement.title,
            "value": None if estimate is None or estimate.value != estimate.value else found.shown(estimate.value),
            "low": None if row is None or estimate is None else found.shown(estimate.ci_low),
            "high": None if row is None or estimate is None else found.shown(estimate.ci_high),
            "wanted": wanted,
            "n": n,
            "message": message,
            **(facts or {}),
        }
        item = self.item
        if item is not None:
            item.stash.setdefault(ROWS, []).append(said)
            item.user_properties.append((found.name, said["value"]))
            item.user_properties.append((f"{found.name} interval", f"{said['low']} {said['high']}"))
            item.user_properties.append((f"{found.name} {wanted}", outcome))
        if outcome == "fail":
            raise AssertionError(message)
        if outcome == "inconclusive":
            if self.strict:
                raise AssertionError(f"inconclusive, which --robust-strict does not let pass: {message}")
            warnings.warn(RobustnessInconclusive(message), stacklevel=4)
        return Verdict(outcome, message)


def _listed(value: Any) -> list[Any]:
    """A value or several of them, as a list."""
    if value is None:
        return []
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]


def _module(model: Any) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"robustness(): model is a {type(model).__name__}, expected a torch.nn.Module or a specification such as "
            f"pkg.module:factory"
        )
    return model


def _dataset(data: Any) -> Dataset:
    if isinstance(data, DataLoader) and isinstance(data.sampler, RandomSampler):
        raise ConfigError(
            "robustness(): the DataLoader shuffles, so that its samples are others at every run. Give one with "
            "shuffle=False, or its dataset."
        )
    return given_dataset(data)


def _called(model: Any) -> str:
    return model if isinstance(model, str) else type(model).__name__
