"""The report's opening figure, its table and its ties."""

import re

import pytest

from reports.html import render_html
from reports.markdown import render_markdown
from reports.three_axes import opening, table
from robustbench_ext.results import Row
from robustbench_ext.three_axes import ATTACKS, SPREAD, UNSEEN, ahead, perspectives
from tests.reports.synthetic import difference, synthetic

WORST = "worst case Linf 8/255"


def with_axes(models=("a", "b"), compared=()):
    results = synthetic(list(models), corruptions=1, compared=False)
    results.conditions.append(
        {"label": "spatial", "kind": "attack", "norm": "spatial", "attack": "spatial", "eps": None}
    )
    for m, model in enumerate(models):
        common = {"model": model, "probe": "classifier", "ci_level": 0.95, "ci_method": "m", "n": 1000}
        for label, change in (("noise 0", -0.1), (WORST, -0.5), ("spatial", -0.3)):
            value = change - 0.05 * m
            ends = {"value": value, "ci_low": value - 0.02, "ci_high": value + 0.02}
            results.results.append(Row(condition=label, metric="relative_change", against="clean", **ends, **common))
        ends = {"value": 0.05, "ci_low": 0.03, "ci_high": 0.07}
        results.results.append(Row(condition="clean", metric="class_spread", **ends, **common))
    results.comparisons = list(compared)
    return results


def test_perspectives_are_what_was_measured():
    found = perspectives(with_axes())
    assert [(p.of, p.question.condition) for p in found] == [
        (SPREAD, "clean"),
        (UNSEEN, "noise 0"),
        (ATTACKS, WORST),
        (ATTACKS, "spatial"),
    ]
    assert perspectives(synthetic(["a"])) == []
    assert not opening(synthetic(["a"]))


def test_the_figure_opens_the_report():
    page = render_html(with_axes(), None, [])
    assert page.index('id="axes"') < page.index('id="choice"') < page.index('id="headline"')
    assert "Spread: accuracy by class" in page and "Attacks: change" in page
    assert "Three axes of robustness" in render_markdown(with_axes())
    assert 'id="axes"' not in render_html(synthetic(["a"]), None, [])


def test_ahead_or_tied():
    axis = perspectives(with_axes())[2].question
    assert ahead(with_axes(), axis) == ["a", "b"]
    won = difference("b", "a", WORST, "relative_change", -0.05)
    assert ahead(with_axes(compared=[won]), axis) == ["a"]
    decided = with_axes(("a", "b", "c"), [won, difference("c", "a", WORST, "relative_change", -0.1)])
    rows = dict(table(decided).rows)
    assert rows["ahead"][2].text == "a" and rows["a"][2].best
    assert rows["ahead"][0].text == "tie: a, b, c"
    # c is beaten by a alone, and b by nobody: a does not lead, and c is not in the tie.
    half = with_axes(("a", "b", "c"), [difference("c", "a", WORST, "relative_change", -0.1)])
    assert dict(table(half).rows)["ahead"][2].text == "tie: a, b"


def test_models_that_failed_lead_nobody():
    from robustbench_ext.results import Finding

    won = difference("b", "a", WORST, "relative_change", -0.05)
    results = with_axes(compared=[won])
    results.preflight = [Finding(model="a", name="range", status="fail", message="no")]
    assert ahead(results, perspectives(results)[2].question) == ["b"]


@pytest.mark.parametrize("count", [1, 6, 30])
def test_any_number_of_models(count):
    section = opening(with_axes([f"model {i}" for i in range(count)]))
    svg = section.figures[0].svg
    assert len(set(re.findall(r">(model \d+)<", svg))) == min(count, 6)
    assert len(section.tables[0].rows) == count


def test_trainings_of_one_entry_count_as_one():
    results = with_axes(("a seed 0", "a seed 1", "b seed 0", "b seed 1"))
    for model in results.models:
        model["replicate_of"] = str(model["name"])[0]
    axis = perspectives(results)[2].question
    assert ahead(results, axis) == ["a", "b"]
    results.comparisons = [difference("b", "a", WORST, "relative_change", -0.05)]
    assert ahead(results, axis) == ["a"]
