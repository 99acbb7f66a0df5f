"""The JSON Schema of results.json, made from the model that writes it, with the descriptions of its docstrings."""

from __future__ import annotations

import inspect
import json
import re
import textwrap
from typing import Any

from pydantic import BaseModel

from robustbench_ext import results
from robustbench_ext.results import RunResults

# Fields whose docstrings say nothing of their own, because their names do.
_SAID = {
    "RunResults": {
        "schema_version": "Version of this schema; readers refuse others.",
        "generator": "Name and version of the program, and of its checks.",
        "suite": "The suite's name, title, description, number of test samples n and seed.",
        "data": "The dataset: name, source, shape of an input, class names, sizes and fingerprints of its splits; of "
        "regression data also task, target and features.",
        "models": "One entry per model: name, specification, fingerprint of weights and code, number of parameters, training.",
        "conditions": "One entry per condition: label, kind, and what defines it (attack, norm, eps and parameters; corruption "
        "and severity; the conditions that a summary is taken over).",
        "probes": "One entry per probe: label, kind, the splits that it was fitted on, name and parameters.",
        "metrics": "Definition, title, better direction and unit of every metric by name; `percent`: a proportion.",
        "preflight": "Checks of the models before the run.",
        "results": "One row per estimate; results.csv has the same rows.",
        "curves": "Numbers behind the figures.",
        "cost": "What attacks cost, in passes.",
        "failures": "Parts that could not be computed.",
        "notes": "What a reader should know: what was left out and why, warnings of fits.",
        "doubts": "Checks of the results after the run.",
    },
    "Row": {
        "ci_level": "Confidence level of the interval, such as 0.95.",
        "ci_method": "How the interval was made; none where there is none.",
        "reason": "Why value or interval is null.",
    },
    "Curve": {
        "model": "Name of the model.",
        "condition": "Label of the condition.",
        "probe": "As in a row.",
        "data": "Lists of equal length by name.",
    },
    "Compared": {
        "model": "The first model.",
        "against": "The second model.",
        "ci_level": "Confidence level of the interval.",
        "ci_method": "How the interval was made.",
        "reason": "Why a value is null.",
    },
    "Cost": {
        "model": "Name of the model.",
        "condition": "Label of the condition.",
        "n": "Samples attacked.",
        "forwards": "Forward passes, in samples.",
        "backwards": "Backward passes, in samples.",
    },
    "Finding": {
        "model": "Name of the model.",
        "name": "Name of the check.",
        "status": "pass; doubt: read the message before the numbers; fail: the model's numbers are not to be trusted.",
        "message": "What was found.",
        "hint": "What to do about it.",
    },
    "Failed": {"what": "Model and part.", "error": "The error's message."},
}


def results_schema() -> dict[str, Any]:
    """The schema (draft 2020-12). Fields with defaults may be missing: files of older minor versions lack the newest."""
    version = RunResults.model_fields["schema_version"].default
    made = RunResults.model_json_schema()
    models: list[type[BaseModel]] = [RunResults, *(getattr(results, name) for name in made["$defs"])]
    for model in models:
        part = made if model is RunResults else made["$defs"][model.__name__]
        summary, attributes = _docstring(model)
        part["description"] = summary
        said = {**_SAID.get(model.__name__, {}), **attributes}
        for field, about in part["properties"].items():
            about["description"] = said[field]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:robustbench-ext:results:{version}",
        "version": str(version),
        **made,
        "title": "results.json of robustbench-ext",
    }


def render_schema() -> str:
    """The file docs/results.schema.json."""
    return json.dumps(results_schema(), indent=2, ensure_ascii=False) + "\n"


def _docstring(model: type[BaseModel]) -> tuple[str, dict[str, str]]:
    """The text before "Attributes:" and the description of every field that is told there.

    An entry is `name: text` or `a, b, c: text`; `a: text; b: text` on one line are two.
    """
    text, _, attributes = inspect.cleandoc(model.__doc__ or "").partition("Attributes:")
    names = "|".join(sorted(model.model_fields, key=len, reverse=True))
    lead = re.compile(rf"(?:^|(?<=; )|(?<=\. ))((?:{names})(?:, (?:{names}))*): ")
    found: dict[str, str] = {}
    for entry in re.split(r"\n(?=\w)", textwrap.dedent(attributes.strip("\n"))):
        pieces = lead.split(" ".join(entry.split()))
        for fields, said in zip(pieces[1::2], pieces[2::2], strict=True):
            said = said.strip().rstrip(";").rstrip(".") + "."
            said = said[0].upper() + said[1:]
            found |= dict.fromkeys(fields.split(", "), said)
    return " ".join(text.split()), found
