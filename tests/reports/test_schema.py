"""docs/results.schema.json: up to date, described, and kept by real results."""

import json
from pathlib import Path

import pydantic
import pytest
from packaging.version import Version

from reports.schema import render_schema, results_schema
from robustbench_ext.results import Compared, RunResults
from tests.reports.synthetic import synthetic

FILE = Path(__file__).parents[2] / "docs" / "results.schema.json"


@pytest.mark.skipif(
    Version(pydantic.VERSION) < Version("2.11"),
    reason="older pydantic leaves out additionalProperties where they are allowed",
)
def test_the_published_schema_is_up_to_date():
    message = "write it again: rbx export --to schema --out docs/results.schema.json"
    assert FILE.read_text(encoding="utf-8") == render_schema(), message


def test_identity_and_version():
    schema = results_schema()
    assert schema["$id"] == "urn:robustbench-ext:results:1"
    assert schema["version"] == "1"
    assert schema["properties"]["schema_version"]["const"] == 1


def test_every_field_is_described():
    schema = results_schema()
    parts = [schema, *schema["$defs"].values()]
    assert len(parts) == 12
    for part in parts:
        assert part["description"]
        for name, about in part["properties"].items():
            assert len(about["description"]) > 10, (part["title"], name)


def test_descriptions_are_those_of_the_docstrings():
    compared = results_schema()["$defs"]["Compared"]["properties"]
    assert compared["p_value"]["description"] == "Two-sided, of no difference."
    assert compared["test"]["description"] == "How the p-value was made."
    assert compared["ci_low"]["description"] == compared["value"]["description"]
    assert set(compared) == set(Compared.model_fields)


@pytest.fixture(scope="module")
def validator():
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads(FILE.read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


class TestValidation:
    def test_real_results(self, validator, finished):
        folder, _ = finished
        results = json.loads((folder / "results.json").read_text())
        assert list(validator.iter_errors(results)) == []
        older = {k: v for k, v in results.items() if k not in ("comparisons", "replicates", "notes", "doubts")}
        assert list(validator.iter_errors(older)) == []

    @pytest.mark.parametrize(
        "change",
        [
            lambda d: d.update(schema_version=2),
            lambda d: d.update(extra=1),
            lambda d: d.pop("results"),
            lambda d: d["results"][0].update(value="0.9"),
            lambda d: d["results"][0].pop("n"),
            lambda d: d["comparisons"][0].update(outcome="maybe"),
        ],
    )
    def test_what_is_wrong_is_found(self, validator, change):
        results = json.loads(synthetic(["a", "b"]).to_json())
        assert list(validator.iter_errors(results)) == []
        change(results)
        assert list(validator.iter_errors(results))
        with pytest.raises(ValueError):  # and pydantic agrees
            RunResults.model_validate_json(json.dumps(results), strict=True)
