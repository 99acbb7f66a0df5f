"""Every code block of the documentation: checked on every test run without running it; run, page by page, by the slow tests."""

import os
import re

import pytest

from tests.docs import blocks as pages_of
from tests.docs.blocks import ROOT, Block, difference, read, run

PAGES = pages_of.pages()
LANGUAGES = {"python", "bash", "console", "powershell", "yaml", "text", "toml", "json", "pycon"}


def name(page):
    return str(page.relative_to(ROOT))


def of(language):
    return [pytest.param(b, id=b.where) for page in PAGES for b in read(page) if b.language == language]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_python_names_and_keywords_exist(page):
    assert pages_of.problems_of_python(read(page)) == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_and_options_exist(page):
    assert [p for b in read(page) if b.language in ("bash", "console") for p in pages_of.problems_of_commands(b)] == []


@pytest.mark.parametrize("block", of("yaml"))
def test_yaml_is_a_valid_suite(block):
    import yaml

    from robustbench_ext.conditions import parse_conditions
    from robustbench_ext.data import load_dataset
    from robustbench_ext.gate.collect import read_expectations
    from robustbench_ext.parts import read_parts
    from robustbench_ext.probes import EstimatorProbe, IntervalProbe, parse_probes
    from robustbench_ext.regression_conditions import parse_regression_conditions
    from robustbench_ext.suite import validate_suite

    content = yaml.safe_load(block.text)
    if "expect" in content:  # a measurement of the pytest plugin
        assert read_expectations(content["expect"])
        return
    if "parts" in content:  # several suites as one run
        assert [part.load() for part in read_parts({"name": "page", **content}).parts]
        return
    suite = validate_suite(pages_of.suite_of(block.text), block.where)
    conditions = [c for c in suite.conditions if not _of_a_file(c)]
    tables = any("shift" in c for c in conditions if isinstance(c, dict))
    if tables:
        assert parse_regression_conditions(conditions, load_dataset("toy-cubic"))
    else:
        assert parse_conditions(conditions)
    probe = IntervalProbe if tables else EstimatorProbe
    detectors = [d for d in suite.detectors if not _of_a_file(d)]
    assert len(parse_probes(detectors, suite.uq, probe)) == len(detectors) + len(suite.uq)


def _of_a_file(entry):
    """Named by a file of the page's own, which exists when the page is run."""
    return ".py:" in str(entry)


def test_blocks_say_their_language_and_what_is_not_run_says_why():
    untold, unknown = [], []
    for page in PAGES:
        for block in read(page):
            if block.language not in LANGUAGES:
                unknown.append(f"{block.where}: '{block.language}'")
            if not block.runs and not block.attributes.get("reason"):
                untold.append(block.where)
    assert untold == []
    assert unknown == []


def test_what_is_not_run_is_listed(record_property):
    reasons = [f"{b.where}: {b.attributes['reason']}" for page in PAGES for b in read(page) if not b.runs]
    record_property("not run", "; ".join(reasons))
    print("\n".join(reasons))
    runnable = [b for page in PAGES for b in read(page) if b.language in ("python", "bash", "console")]
    # Most of the documentation runs; a reason is the exception.
    assert len(reasons) <= 0.35 * len(runnable), reasons


def test_what_a_reader_brings_is_known():
    told = {n for page in PAGES for b in read(page) for n in b.given}
    assert told <= set(pages_of.GIVEN)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=name)
def test_page_runs_and_prints_what_it_shows(page, tmp_path, monkeypatch):
    blocks = read(page)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    wrong = [
        f"{ran.block.where}: {problem}"
        for ran in run(blocks, tmp_path)
        if ran.shown is not None and (problem := difference(ran.shown.text, ran.printed))
    ]
    os.chdir(ROOT)
    assert wrong == []


# The checks themselves can fail.


def planted(language, text, **attributes):
    return Block("planted.md", 1, language, attributes, frozenset(), text)


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("from robustbench_ext import load_datasets", "has no load_datasets"),
        ("from robustbench_ext.attacks import PGD\nPGD(eps=0.1, stepz=3)", "takes no stepz"),
        ("print(undefined)", "undefined is not defined"),
        ("def f(:", "invalid syntax"),
    ],
)
def test_wrong_python_is_found(code, says):
    (problem, *_) = pages_of.problems_of_python([planted("python", code)])
    assert says in problem


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("rbx runn quickstart", "no command runn"),
        ("rbx run quickstart --no-such-option 3", "no-such-option"),
        ("RBX_DEVICE=cpu rbx check --mode net.py:build", "--mode"),
        ("python benchmarks/attacks/no_such.py", "there is no benchmarks/attacks/no_such.py"),
        ("python benchmarks/attacks/run.py --fast", "takes no --fast"),
        ("make nothing", "no target nothing"),
        ("pytest --robust-nothing", "no option --robust-nothing"),
    ],
)
def test_wrong_commands_are_found(command, says):
    (problem,) = pages_of.problems_of_commands(planted("bash", command))
    assert says in problem


def test_names_of_one_page_go_on_to_its_next_block():
    first, second = planted("python", "a = 1"), planted("python", "print(a)")
    assert pages_of.problems_of_python([first, second]) == []
    assert pages_of.problems_of_python([second, first]) != []


@pytest.mark.parametrize(
    ("shown", "printed", "same"),
    [
        ("a 71.6 % [67.5, 75.4]  n = 500", "a 70.8 % [66.7, 74.6]  n = 500", True),
        ("a 71.6 % [67.5, 75.4]  n = 500", "a 53.0 % [48.6, 57.3]  n = 500", False),
        ("in 12 s", "in 2 min", True),
        ("verdict: pass", "verdict: doubt", False),
        ("a\nb", "a", False),
        ("a", "a\nb", False),
        ("a\n...\nz", "a\nb\nc\nz", True),
        ("...\nz", "a\nb", False),
    ],
)
def test_outputs_are_compared(shown, printed, same):
    assert (difference(shown, printed) is None) == same


def test_a_block_that_raises_fails_its_page(tmp_path):
    with pytest.raises(ZeroDivisionError):
        list(run([planted("python", "1 / 0")], tmp_path))
    with pytest.raises(AssertionError, match="exit code 3, expected 0"):
        list(run([planted("bash", "exit 3")], tmp_path))
    os.chdir(ROOT)


def test_fences_are_read(tmp_path):
    page = tmp_path / "page.md"
    indented = '    ```bash {.norun reason="no GPU here" tiny="n=3"}\n    rbx list\n    ```\n'
    page.write_text(f'a\n\n{indented}\n```python title="net.py"\nx = 1\n```\n')
    first, second = read(page)
    assert (first.language, first.runs, first.attributes["reason"], first.text) == (
        "bash",
        False,
        "no GPU here",
        "rbx list\n",
    )
    assert second.attributes == {"title": "net.py"}
    assert re.search(r"page.md:4", first.where)
