"""The README's examples work as they stand."""

import re
from pathlib import Path

import pytest
import yaml

from robustbench_ext.conditions import parse_conditions
from robustbench_ext.probes import parse_probes
from robustbench_ext.suite import load_suite, validate_suite

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


def test_models_and_data_in_python(digits_model, digits_test, tmp_path, monkeypatch, capsys):
    (code,) = [c for c in blocks("python") if "run_suite" in c]
    monkeypatch.chdir(tmp_path)
    x, y, _ = digits_test
    small = code.replace('run_suite("standard",', 'run_suite(load_suite("standard", settings=["n=4"]),')
    assert small != code
    scope = {"model": digits_model, "x": x, "y": y, "load_suite": load_suite}
    exec(compile(small, "README.md", "exec"), scope)
    assert "robust_accuracy" in capsys.readouterr().out
    assert not scope["done"].failures


def test_commands_exist():
    from robustbench_ext.cli.main import app

    known = {command.name for command in app.registered_commands}
    assert set(re.findall(r"^rbx ([a-z]+)", "\n".join(blocks("bash")), re.M)) <= known


DEFENSES = (Path(__file__).parent.parent / "docs" / "defenses.md").read_text()


def test_the_defense_of_the_documentation_trains(tmp_path):
    from defenses.trainer import Architecture, Recipe, train
    from robustbench_ext.data import load_dataset

    scope = {}
    (code,) = re.findall(r"```python\n(.*?)```", DEFENSES, re.S)
    exec(compile(code, "defenses.md", "exec"), scope)
    data = load_dataset("digits")
    recipe = Recipe(epochs=1, eps=0.1, attack_steps=1, validation_n=20, validation_steps=1, energy_n=0)
    train(scope["Mixed"](share=0.3), Architecture("small-cnn", data.shape, 10), data, recipe, tmp_path / "m")
    assert (tmp_path / "m" / "model.safetensors").is_file()


def test_models_of_the_documentation_are_valid():
    from defenses.recipes import plan

    (text,) = re.findall(r"```yaml\n(.*?)```", DEFENSES, re.S)
    suite = validate_suite({"schema": 1, "name": "docs", "data": "digits", **yaml.safe_load(text)})
    for model in suite.models:
        told = model.train
        plan(told.defense_name(), told.recipe, told.defense_options(), told.network, told.kwargs)
