"""The README's examples work as they stand. `tests/docs` looks at all pages alike; here is what runs fast."""

import pytest
import yaml

from robustbench_ext.conditions import parse_conditions
from robustbench_ext.probes import parse_probes
from robustbench_ext.suite import validate_suite
from tests.docs.blocks import ROOT, read, run

README = read(ROOT / "README.md")
DEFENSES = read(ROOT / "docs" / "defenses.md")


def of(language, blocks=README):
    return [block for block in blocks if block.language == language]


def test_yaml_is_a_valid_suite():
    (block,) = of("yaml")
    suite = validate_suite({"name": "readme", **yaml.safe_load(block.text)})
    assert parse_conditions(suite.conditions)
    assert parse_probes(suite.detectors, suite.uq)


@pytest.mark.parametrize("block", [b for b in of("python") if b.text.startswith("import")], ids=lambda b: b.where)
def test_python_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (ran,) = run([block], tmp_path)
    assert "n = " in ran.printed


def test_models_and_data_in_python(tmp_path, monkeypatch):
    (block,) = [b for b in of("python") if "run_suite" in b.text]
    monkeypatch.chdir(tmp_path)
    assert block.attributes["tiny"] == "n=4"
    (ran,) = run([block], tmp_path)
    assert "robust_accuracy" in ran.printed
    assert not (tmp_path / "runs" / "mine" / "failures.log").exists()


def test_the_defense_of_the_documentation_trains(tmp_path):
    from defenses.trainer import Architecture, Recipe, train
    from robustbench_ext.data import load_dataset

    scope = {}
    (block,) = of("python", DEFENSES)
    exec(compile(block.text, "defenses.md", "exec"), scope)
    data = load_dataset("digits")
    recipe = Recipe(epochs=1, eps=0.1, attack_steps=1, validation_n=20, validation_steps=1, energy_n=0)
    train(scope["Mixed"](share=0.3), Architecture("small-cnn", data.shape, 10), data, recipe, tmp_path / "m")
    assert (tmp_path / "m" / "model.safetensors").is_file()


def test_models_of_the_documentation_are_valid():
    from defenses.recipes import plan

    (block,) = of("yaml", DEFENSES)
    suite = validate_suite({"schema": 1, "name": "docs", "data": "digits", **yaml.safe_load(block.text)})
    for model in suite.models:
        told = model.train
        plan(told.defense_name(), told.recipe, told.defense_options(), told.network, told.kwargs)
