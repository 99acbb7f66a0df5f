"""The README's examples work as they stand."""

import re
from pathlib import Path

import pytest
import yaml

from robustbench_ext.conditions import parse_conditions
from robustbench_ext.probes import parse_probes
from robustbench_ext.suite import validate_suite

README = (Path(__file__).parent.parent / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def test_yaml_is_a_valid_suite():
    (text,) = blocks("yaml")
    suite = validate_suite({"name": "readme", **yaml.safe_load(text)})
    assert parse_conditions(suite.conditions)
    assert parse_probes(suite.detectors, suite.uq)


@pytest.mark.parametrize("code", [c for c in blocks("python") if c.startswith("import")])
def test_python_runs(code, capsys):
    exec(compile(code, "README.md", "exec"), {})
    assert "n = " in capsys.readouterr().out


def test_commands_exist():
    from robustbench_ext.cli.main import app

    known = {command.name for command in app.registered_commands}
    assert set(re.findall(r"^rbx ([a-z]+)", "\n".join(blocks("bash")), re.M)) <= known
