"""The pytest plugin: statements about robustness as tests, with intervals instead of bare numbers.

    def test_linf(robustness, model, test_data):
        r = robustness(model, test_data, attack="apgd-ce", eps="8/255", n=500)
        r.robust_accuracy.at_least(0.45)
        r.not_worse_than_baseline("robust_accuracy", margin=0.01)

This module is loaded in every pytest run of an environment that has the package, so it imports pytest and the standard
library alone, and has no assertions for pytest to rewrite (PYTEST_DONT_REWRITE). Everything else is in `robustbench_ext.gate`
and is imported when the fixture, a `*.rbx.yaml` file or `--robust-model` asks for it.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from robustbench_ext.gate.session import Robustness

YAML = ".rbx.yaml"
CACHE = "robustness_cache"  # how the controller of xdist tells its workers where results are shared


class RobustnessInconclusive(UserWarning):
    """The interval holds the threshold: more samples are needed to say yes or no. A failure with --robust-strict."""


class RobustnessDoubt(UserWarning):
    """A check of the model or of its results says that a number may mean less than it seems to."""


# Options: (name, ini type or None where there is only the option, metavar, help).
_OPTIONS: tuple[tuple[str, str | None, str | None, str], ...] = (
    ("strict", "bool", None, "inconclusive expectations fail instead of warning"),
    ("update", None, None, "write the baselines that tests compare with, and say what changed"),
    ("no-baseline", None, None, "skip comparisons with baselines"),
    ("baseline-dir", "string", "DIR", "folder of the baselines, from the root of the project (default: .robustness)"),
    (
        "n",
        "string",
        "N",
        "test samples of every measurement, whatever the test says (ini: where the test says nothing)",
    ),
    ("seed", "string", "SEED", "seed of attacks and corruptions, likewise"),
    ("budget", "string", "TIME", "time for all measurements of the session (of each worker), such as 300s, 10m, 1h"),
    ("confidence", "string", "LEVEL", "level of the intervals that decide (default: 0.95); 1 - 0.05 / k for k of them"),
    ("cache", "string", "DIR", "keep results here from session to session (default: for this session alone)"),
    (
        "model",
        "string",
        "SPEC",
        "the model of tests that name none, such as pkg.module:factory; alone, test it with a suite",
    ),
    ("data", "string", "SPEC", "the data of tests that name none, such as digits or npz:PATH"),
    ("suite", "string", "NAME", "with --robust-model: the suite to test it with (default: standard)"),
    ("report", "string", "FILE", "write a report of all expectations to this HTML file"),
)


def option_name(name: str) -> str:
    """The attribute of an option, and its name in the ini file: `robust_baseline_dir`."""
    return f"robust_{name.replace('-', '_')}"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Every option is a `--robust-...`; those that make sense for a whole project have an ini option of the same name."""
    group = parser.getgroup("robustness", "robustness and uncertainty (robustbench-ext)")
    for name, kind, metavar, text in _OPTIONS:
        dest = option_name(name)
        if metavar is None:
            group.addoption(f"--robust-{name}", action="store_true", default=None, dest=dest, help=text)
        else:
            group.addoption(f"--robust-{name}", metavar=metavar, default=None, dest=dest, help=text)
        if kind is not None:
            parser.addini(dest, f"{text} (--robust-{name})", type=kind, default=None)  # type: ignore[arg-type]


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker, and what gathers expectations."""
    config.addinivalue_line(
        "markers",
        "robustness(attack=..., eps=..., n=..., budget=...): what calls of the fixture in this test start from",
    )
    if config.getoption("robust_suite") is not None and config.getoption("robust_model") is None:
        raise pytest.UsageError(
            "--robust-suite names what a model is tested with: say which one with --robust-model=SPEC"
        )
    _check_values(config)
    if not hasattr(config, "workerinput"):  # the controller of xdist hears of all tests
        config.pluginmanager.register(_Gathered(), "robustness-summary")


def _check_values(config: pytest.Config) -> None:
    """Raise where an option has a value that nothing can be done with."""
    for name, kind, metavar, _ in _OPTIONS:
        option = config.getoption(option_name(name))
        try:
            ini = config.getini(option_name(name)) if kind is not None else None
        except (ValueError, pytest.UsageError) as error:  # a truth value that is none
            raise pytest.UsageError(
                f"{option_name(name)} in {config.inipath}: {error}, expected true or false"
            ) from None
        if metavar is None or (option is None and not ini):
            continue
        from robustbench_ext.gate.options import wrong

        given = [
            (f"--robust-{name}={option}", option),
            (f"{option_name(name)} = {ini} in {config.inipath}", ini or None),
        ]
        for said, value in given:
            expected = None if value is None else wrong(name, str(value), config.rootpath)
            if expected is not None:
                raise pytest.UsageError(f"{said}: expected {expected}")


# Where tests are -------------------------------------------------------------------------------------------------------

ITEM = pytest.StashKey[pytest.Item]()  # of the configuration: the test that is running
ROWS = pytest.StashKey["list[dict[str, Any]]"]()  # of a test: what it expected
ENGINE = pytest.StashKey["Robustness"]()
FOLDER = pytest.StashKey[str]()  # a cache for this session, which this process removes


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Remember which test is running: a measurement may be made by a fixture of a wider scope."""
    stash = item.config.stash
    stash[ITEM] = item
    try:
        return (yield)
    finally:
        del stash[ITEM]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Hand a test's expectations over with its report, which xdist carries to the controller."""
    report = yield
    rows = item.stash.get(ROWS, None)
    if rows:
        report.robustness = rows  # type: ignore[attr-defined]
        del item.stash[ROWS]
    return report


@pytest.fixture(scope="session")
def robustness(request: pytest.FixtureRequest) -> Robustness:
    """Measure a model and state what is expected of it: `robustness(model, data, attack="apgd-ce", eps="8/255", n=500)`.

    See `robustbench_ext.gate.session.Robustness`.
    """
    return engine(request.config)


def engine(config: pytest.Config) -> Robustness:
    """What measures in this session, made on first use; skips where torch is not installed."""
    if ENGINE not in config.stash:
        require_torch()
        from robustbench_ext.gate.packages import own_packages

        with own_packages():
            from robustbench_ext.gate.session import Robustness

            config.stash[ENGINE] = Robustness(config)
    return config.stash[ENGINE]


def require_torch() -> None:
    """Skip the test where torch cannot be imported, and say so."""
    try:
        import torch  # noqa: F401
    except ImportError as error:
        pytest.skip(f"robustness tests need torch, which cannot be imported here ({error}): pip install torch")


# Tests without Python ------------------------------------------------------------------------------------------------


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    """Collect `*.rbx.yaml` files."""
    if not file_path.name.endswith(YAML):
        return None
    from robustbench_ext.gate.collect import ExpectationFile

    collector: pytest.Collector = ExpectationFile.from_parent(parent, path=file_path)
    return collector


@pytest.hookimpl(tryfirst=True)  # before -k and -m choose
def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    """`--robust-model` with `--robust-suite`, or with no tests that could use it, makes tests of a suite."""
    model = config.getoption("robust_model")
    if model is not None and (config.getoption("robust_suite") is not None or not items):
        from robustbench_ext.gate.collect import suite_items

        items.extend(suite_items(session, str(model)))


# xdist ---------------------------------------------------------------------------------------------------------------


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """xdist: all workers share the results of this session in one folder. The controller names it and removes it in the end;
    the first worker that measures makes it, so that sessions which measure nothing leave nothing behind."""
    if FOLDER not in node.config.stash:
        import tempfile
        import uuid

        node.config.stash[FOLDER] = f"{tempfile.gettempdir()}/robustness-{uuid.uuid4().hex}"
    node.workerinput[CACHE] = node.config.stash[FOLDER]


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove the session's results, where they are not to be kept."""
    folder = config.stash.get(FOLDER, None)
    if folder is not None:
        import shutil

        shutil.rmtree(folder, ignore_errors=True)


# What is said at the end ---------------------------------------------------------------------------------------------


class _Gathered:
    """Expectations of all tests of a session, of this process or of xdist's workers."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Gather what came with a test's report."""
        rows = getattr(report, "robustness", None)
        if rows:
            self.rows.extend({**row, "test": report.nodeid} for row in rows)

    def pytest_terminal_summary(self, terminalreporter: Any, config: pytest.Config) -> None:
        """A table of all expectations; the same as Markdown for GitHub and, if asked for, as HTML."""
        if not self.rows and not (config.getoption("robust_report") or config.getini("robust_report")):
            return
        from robustbench_ext.gate.summary import conclude

        conclude(terminalreporter, config, self.rows)
