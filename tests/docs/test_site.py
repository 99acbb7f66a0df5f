"""The documentation's site: generated pages hold all there is, links and navigation lead somewhere, notebooks run."""

import ast
import importlib.util
import json
import os
import posixpath
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from robustbench_ext.catalog import ALL
from tests.docs.blocks import ROOT, Block, pages, problems_of_python

DOCS = ROOT / "docs"
NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.ipynb"))


class _Loader(yaml.SafeLoader):
    """mkdocs.yml may hold tags of Python's; what they name does not matter here."""


_Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: None)
SITE = yaml.load((ROOT / "mkdocs.yml").read_text(), _Loader)


@pytest.fixture(scope="module")
def generated():
    """The hook's module."""
    spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "_generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def made(generated):
    return generated.pages()


def entry_of(text, name):
    """The part of a page about one method."""
    found = re.search(rf"^##+ `{re.escape(name)}`$(.*?)(?=^##+ |\Z)", text, re.M | re.S)
    assert found is not None, name
    return found[1]


METHODS = {
    "attacks": "attacks", "regression-attacks": "attacks", "defenses": "defenses", "makers": "defenses",
    "regression-defenses": "defenses",
    "detectors": "detectors", "uq": "uncertainty", "intervals": "uncertainty", "corruptions": "shift", "shifts": "shift",
    "datasets": "data", "outliers": "data", "models": "models", "sources": "models", "regressors": "models",
    "trackers": "trackers",
}  # fmt: skip


def test_every_kind_has_a_page():
    assert set(ALL) == set(METHODS)


@pytest.mark.parametrize("kind", ALL)
def test_every_method_has_its_entry_with_words_of_its_own(kind, made):
    page = made[f"methods/{METHODS[kind]}.md"]
    for entry in ALL[kind]:
        text = entry_of(page, entry.name)
        summary, *rest = [part for part in text.strip().split("\n\n") if part]
        assert summary.startswith("**")
        assert len(" ".join(rest)) > 40, entry.name
        if kind in ("attacks", "defenses", "detectors", "uq", "intervals") and entry.name not in ("standard",):
            assert "Reference:" in text, entry.name


def test_parameters_have_defaults_and_meanings(made):
    pgd = entry_of(made["methods/attacks.md"], "pgd")
    assert re.search(r"^\| `steps` \| `20` \| gradient steps of one run\. \|$", pgd, re.M)
    assert "| `eps` |" not in pgd  # told once, for all attacks
    assert re.search(r"^\| `eps` \| \*needed\* \| budget", made["methods/attacks.md"], re.M)
    trades = entry_of(made["methods/defenses.md"], "trades")
    assert "arXiv 1901.08573](https://arxiv.org/abs/1901.08573)" in trades
    assert re.search(r"^\| `beta` \| `6\.0` \| ", trades, re.M)


def test_nearly_every_parameter_of_an_attack_is_explained(made):
    rows = re.findall(r"^\| `(\w+)` \| .*? \| (.*) \|$", made["methods/attacks.md"], re.M)
    silent = [name for name, meaning in rows if not meaning.strip()]
    assert len(rows) > 60
    assert len(silent) <= len(rows) // 10, silent


def test_command_line_is_complete(made):
    import typer.main

    from robustbench_ext.cli.main import app

    text = made["reference/cli.md"]
    for name, command in typer.main.get_command(app).commands.items():
        part = entry_of(text, f"rbx {name}")
        for parameter in command.params:
            for option in parameter.opts:
                assert option == "--help" or not option.startswith("-") or option in part, (name, option)


def test_suites_and_results_are_complete(made):
    from robustbench_ext.metrics.estimate import METRICS
    from robustbench_ext.results import RunResults
    from robustbench_ext.suite import Suite, Training, bundled_suites

    suites = made["reference/suites.md"]
    for cls in (Suite, Training):
        assert all(f"| `{field.alias or name}` |" in suites for name, field in cls.model_fields.items())
    assert all(f"### `{name}`" in suites for name in bundled_suites())
    results = made["reference/results.md"]
    assert all(f"| `{name}` |" in results for name in RunResults.model_fields)
    assert not re.findall(r"^\| `\w+` \| .*? \|  \|$", results, re.M)  # every field has a description
    assert all(f"| `{name}` |" in made["methods/metrics.md"] for name in METRICS)


def test_public_names_are_in_the_api(made):
    import defenses
    import detectors
    import robustbench_ext
    import uq

    for page, package in (
        ("robustbench_ext", robustbench_ext),
        ("defenses", defenses),
        ("detectors", detectors),
        ("uq", uq),
    ):
        missing = {n for n in package.__all__ if n != "__version__"} - set(
            re.findall(r'"(\w+)"', made[f"api/{page}.md"])
        )
        assert not missing, page


@pytest.mark.parametrize(
    ("text", "markdown"),
    [
        ("x <- P(x + a d), |z|", r"x &lt;- P(x + a d), \|z\|"),
        ("`a|b` of [0, 1] * 2", r"`a|b` of \[0, 1\] \* 2"),
        ("x_adv and _private", r"x_adv and \_private"),
    ],
)
def test_docstrings_are_no_markup(text, markdown, generated):
    assert generated._escape(text) == markdown


def test_args_are_read_with_their_continuations(generated):
    text, sections = generated.read_docstring(
        "What.\n\nArgs:\n    a, b: of it,\n        and more: still a, b.\n    c: the third.\nCost: much."
    )
    assert text == "What."
    assert generated.described(sections["Args"]) == {
        "a": "of it, and more: still a, b.",
        "b": "of it, and more: still a, b.",
        "c": "the third.",
    }
    assert sections["Cost"] == "much."


# Navigation and links


def nav_pages(entry):
    if isinstance(entry, str):
        return [entry]
    return [page for part in (entry.values() if isinstance(entry, dict) else entry) for page in nav_pages(part)]


def test_navigation_has_every_page_once(made):
    listed = nav_pages(SITE["nav"])
    written = {str(p.relative_to(DOCS)) for p in pages() if p.is_relative_to(DOCS)}
    assert sorted(listed) == sorted({*written, *made})


def _anchor(heading):
    text = (
        re.sub(r"`([^`]*)`", r"\1", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)).replace("\\", "").replace("*", "")
    )
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", text.lower()).strip())


@pytest.mark.parametrize("page", [p for p in pages() if p.is_relative_to(DOCS)], ids=lambda p: str(p.relative_to(DOCS)))
def test_links_lead_somewhere(page, made):
    texts = {str(p.relative_to(DOCS)): p.read_text() for p in pages() if p.is_relative_to(DOCS)} | made
    here = posixpath.dirname(str(page.relative_to(DOCS)))
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    dead = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        whole = posixpath.normpath(posixpath.join(here, path)) if path else str(page.relative_to(DOCS))
        if whole in texts:
            anchors = {
                _anchor(h) for h in re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", texts[whole], flags=re.S), re.M)
            }
            if anchor and anchor not in anchors:
                dead.append(target)
        elif not (DOCS / whole).exists():
            dead.append(target)
    assert dead == []


def test_nothing_is_loaded_from_elsewhere():
    assert SITE["theme"]["font"] is False
    assert not SITE.get("extra_javascript")
    assert not any(str(css).startswith("http") for css in SITE.get("extra_css", ()))
    assert "offline" not in str(SITE["plugins"])  # it would add a script from a content network


@pytest.mark.slow
def test_the_site_builds_strictly_and_loads_nothing_from_elsewhere(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    for file in (tmp_path / "site").rglob("*.html"):
        html = file.read_text()
        foreign = re.findall(
            r'<(?:script|img|iframe)[^>]*\ssrc="(?:https?:)?//[^"]*"|<link[^>]*rel="(?:stylesheet|preconnect|icon)"[^>]*href="(?:https?:)?//[^"]*"',
            html,
        )
        assert not foreign, (file.name, foreign)


# Notebooks


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda f: f.stem)
def test_notebooks_are_clean_and_their_names_exist(file):
    cells = json.loads(file.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code)
    assert cells[0]["cell_type"] == "markdown"
    assert "".join(cells[0]["source"]).startswith("# ")
    blocks = [Block(file.name, i, "python", {}, frozenset(), "".join(cell["source"])) for i, cell in enumerate(code)]
    assert problems_of_python(blocks) == []
    assert all(ast.parse(block.text).body for block in blocks)


@pytest.mark.slow
@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda f: f.stem)
def test_notebooks_run(file, tmp_path):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(file, as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = sum(bool(cell.get("outputs")) for cell in notebook.cells if cell.cell_type == "code")
    assert printed >= 1


def test_there_are_notebooks():
    told = (DOCS / "howto" / "notebooks.md").read_text()
    assert len(NOTEBOOKS) >= 3
    assert all(f"../notebooks/{Path(file).name}" in told for file in NOTEBOOKS)
