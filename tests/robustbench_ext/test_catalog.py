"""The catalogue: every entry loads, says what it is, and nothing is imported before it is asked for."""

import subprocess
import sys
from pathlib import Path

import pytest

from robustbench_ext.attacks.base import Targeted
from robustbench_ext.catalog import ALL, ATTACKS, DETECTORS, ESTIMATORS, REGRESSION_ESTIMATORS
from robustbench_ext.cli.list import _items, markdown
from robustbench_ext.errors import ConfigError
from robustbench_ext.registry import Entry, Registry
from robustbench_ext.suite import load_suite

ENTRIES = [pytest.param(kind, entry, id=f"{kind}-{entry.name}") for kind, registry in ALL.items() for entry in registry]


@pytest.mark.parametrize(("kind", "entry"), ENTRIES)
def test_every_entry_loads_and_is_described(kind, entry):
    thing = entry.load()
    assert thing.__doc__, "a method needs a docstring"
    assert entry.summary
    assert len(entry.summary) <= 100
    if hasattr(thing, "name"):
        assert thing.name == entry.name
    derived = {"targeted": lambda: issubclass(thing, Targeted), "minimum_norm": lambda: thing.keep == "norm"}
    for fact, value in entry.facts.items():
        found = derived[fact]() if fact in derived else getattr(thing, fact)
        assert found == value, f"{fact} in the catalogue and in the class differ"
    if kind in ("attacks", "defenses", "detectors", "uq") and entry.name != "standard":
        assert thing.reference


def test_attacks_declare_their_properties():
    declared = {"norms", "access", "stochastic", "targeted", "minimum_norm"}
    assert all(set(entry.facts) == declared for entry in ATTACKS)


def test_listing_imports_no_torch():
    code = (
        "import sys; from robustbench_ext.cli.main import app\n"
        "from robustbench_ext.catalog import ALL; [list(r) for r in ALL.values()]\n"
        "heavy = {'torch', 'numpy', 'matplotlib', 'pandas', 'sklearn'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_registry_errors():
    registry = Registry("thing", "things", (Entry("alpha", "json:dumps", "a"),))
    assert registry.load("alpha")({}) == "{}"
    with pytest.raises(ConfigError, match="Did you mean 'alpha'"):
        registry.get("alhpa")
    with pytest.raises(ConfigError, match="registered twice: json:dumps and x:y"):
        registry.add(Entry("alpha", "x:y", "b"))


def test_a_shadowed_package_is_named(tmp_path, monkeypatch):
    """A user's own detectors.py beside the script must not be mistaken for ours."""
    (tmp_path / "detectors.py").write_text("MSP = 1")
    (tmp_path / "script.py").write_text("from robustbench_ext.catalog import DETECTORS; DETECTORS.load('msp')")
    done = subprocess.run([sys.executable, tmp_path / "script.py"], capture_output=True, text=True)
    assert f"the name 'detectors' is taken by {tmp_path / 'detectors.py'}" in done.stderr


def test_another_file_below_the_same_folder_is_no_package_of_ours(monkeypatch):
    """A `tests/reports.py` of a checkout is as foreign as one beside a script."""
    from robustbench_ext import registry

    found = type(sys)("reports")
    found.__file__ = str(Path(registry.__file__).parent / "reports.py")
    monkeypatch.setitem(sys.modules, "reports", found)
    with pytest.raises(ConfigError, match="the name 'reports' is taken by"):
        registry._refuse_impostor("reports")
    found.__file__ = str(Path(registry.__file__).parents[1] / "reports" / "__init__.py")
    registry._refuse_impostor("reports")


@pytest.mark.parametrize("kind", ["attacks", "detectors"])
def test_the_documented_table_is_the_catalogue(kind):
    page = (Path(__file__).parents[2] / "docs" / f"{kind}.md").read_text()
    assert markdown(_items([kind])) in page, f"run: rbx list {kind} --markdown, and put it into docs/{kind}.md"


def test_detectors_declare_their_properties():
    assert all(set(entry.facts) == {"reads", "needs_fit", "differentiable"} for entry in DETECTORS)


def test_what_goes_on_where_a_name_ends_is_nearer_than_what_looks_alike():
    from robustbench_ext.errors import unknown_name

    assert "Did you mean 'apgd-t'" in unknown_name("attack", "apgd", ["pgd", "apgd-ce", "apgd-t"])
    assert "Did you mean 'steps'" in unknown_name("parameter", "step", ["step_size", "steps"])
    assert "Did you mean" not in unknown_name("attack", "", ["pgd"])


@pytest.mark.parametrize(
    ("suite", "registry"), [("oracle-outcomes", ESTIMATORS), ("oracle-regression", REGRESSION_ESTIMATORS)]
)
def test_every_estimator_is_held_against_the_truth(suite, registry):
    named = {probe if isinstance(probe, str) else probe["name"] for probe in load_suite(suite).uq}
    assert named == set(registry.names())
