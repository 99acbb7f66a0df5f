"""The tail table and the energy section: there with their numbers, gone without, small with many models."""

import re

import matplotlib
import pytest

from reports import figures, tables
from reports.detection import energy
from reports.html import render_html
from reports.markdown import render_markdown
from reports.spotlight import MOST
from robustbench_ext.results import RunResults

matplotlib.use("Agg")

ENERGIES = {"energy_marginal", "energy_joint", "delta_energy", "abs_delta_energy", "delta_energy_joint"}
TAILS = {"tail30_accuracy", "balanced_accuracy"}


@pytest.fixture(scope="module")
def results(finished):
    folder, _ = finished
    return RunResults.read(folder / "results.json")


@pytest.fixture(scope="module")
def light(results):
    """One model, clean and under attack, with few other figures: quick to render."""
    kept = [c for c in results.conditions if c["kind"] in ("clean", "attack", "worst-case")]
    labels = {c["label"] for c in kept}
    return results.model_copy(
        update={
            "models": [{k: v for k, v in m.items() if k != "training"} for m in results.models[:1]],
            "conditions": kept,
            "results": [r for r in results.results if r.model == "standard" and r.condition in labels],
            "curves": [c for c in results.curves if (c.model, c.kind) == ("standard", "energies")],
            "probes": [],
        }
    )


def without(results, metrics, kinds=()):
    return results.model_copy(
        update={
            "results": [r for r in results.results if r.metric not in metrics],
            "curves": [c for c in results.curves if c.kind not in kinds],
        }
    )


def titles(html):
    return re.findall(r"<h2>(.*?)</h2>", html)


def test_sections_appear_with_their_numbers_and_go_without(light):
    html, markdown = render_html(light, None, []), render_markdown(light)
    assert "Energy" in titles(html)
    assert "## Energy" in markdown
    assert "## Classes" in markdown
    assert "cannot be compared" in html
    assert "stop: never" in html
    bare = without(light, ENERGIES, {"energies"})
    html, markdown = render_html(bare, None, []), render_markdown(bare)
    assert "Energy" not in titles(html)
    assert 'href="#energy"' not in html
    assert "## Energy" not in markdown
    clean_only = without(light, ENERGIES - {"energy_marginal", "energy_joint"}, {"energies"})
    assert tables.energies(clean_only) is None
    assert not energy(clean_only)
    assert tables.tails(without(light, TAILS)) is None
    assert "## Classes" not in render_markdown(without(light, TAILS))


def test_the_energy_table_shows_values_of_results(results):
    table = tables.energies(results)
    assert [c.title for c in table.columns] == ["goal", "E(x)", "ΔE(x)", "|ΔE(x)|", "E(x, y)", "ΔE(x, y)"]
    rows = dict(table.rows)
    assert list(rows)[:4] == [
        "standard · clean",
        "standard · clean, classified correctly",
        "standard · pgd Linf 0.05",
        "standard · pgd Linf 0.1",
    ]
    assert not any("apgd" in name for name in rows)  # it stops at the first mistake
    (row,) = results.find(model="trades", condition="pgd Linf 0.1", metric="delta_energy")
    assert rows["trades · pgd Linf 0.1"][2].value == row.value
    assert rows["trades · pgd Linf 0.1"][0].text == "any mistake"
    assert rows["trades · clean"][2].text == ""


def test_targeted_attacks_are_told_apart(results):
    marked = [
        {**c, "parameters": {**c["parameters"], "target": "least-likely"}} if c["label"] == "pgd Linf 0.05" else c
        for c in results.conditions
    ]
    rows = dict(tables.energies(results.model_copy(update={"conditions": marked})).rows)
    assert rows["standard · pgd Linf 0.05"][0].text == "target: least-likely"
    assert rows["standard · pgd Linf 0.1"][0].text == "any mistake"


def test_the_tail_table_shows_groups_where_there_are_any(results):
    plain = tables.tails(results)
    assert [c.title for c in plain.columns] == ["mean over classes, % ↑", "tail 30 %, % ↑", "worst class, % ↑"]
    rows = dict(plain.rows)
    assert list(rows)[:2] == ["standard · clean", "standard · worst case Linf 0.1"]
    (row,) = results.find(model="trades", condition="worst case Linf 0.1", metric="tail30_accuracy")
    cell = rows["trades · worst case Linf 0.1"][1]
    assert cell.value == row.value
    assert cell.note.startswith(f"{row.group}; n = {row.n}")
    assert row.group.startswith("3 classes: ")
    added = [
        r.model_copy(update={"metric": f"{group}_shot_accuracy", "group": f"{size} classes: a, b: c"})
        for r in results.find(metric="tail30_accuracy")
        for group, size in (("many", 4), ("few", 6))
    ]
    tailed = results.model_copy(update={"results": [*results.results, *added]})
    table = tables.tails(tailed)
    assert [c.title for c in table.columns][3:] == ["many shot (4 classes), % ↑", "few shot (6 classes), % ↑"]
    assert table.columns[3].definition.endswith("Here: a, b: c.")
    assert "medium" not in render_markdown(tailed).partition("## Metrics")[0]


def test_many_classes_have_the_table_and_no_bars(light):
    many = light.model_copy(update={"data": {**light.data, "classes": [str(k) for k in range(100)]}})
    html = render_html(many, None, [])
    assert "Accuracy by class" in titles(html)
    section = html.partition('<section id="classes">')[2].partition("</section>")[0]
    assert "<svg" not in section
    assert "tail 30 %" in section


def test_energy_figures_show_the_main_attack(results):
    curve = next(c for c in results.curves if c.kind == "energies")
    ax = figures.energy_histogram(curve, "a title")
    assert ax.get_title() == "a title"
    assert [t.get_text() for t in ax.get_legend().get_texts()] == [
        "natural, E(x)",
        "natural, E(x, y)",
        "attacked, E(x)",
        "attacked, E(x, y)",
    ]
    shown = [figure.svg for figure in energy(results).figures]
    assert len(shown) == 2
    assert "standard: pgd Linf 0.1" in shown[0]
    assert "trades: pgd Linf 0.1" in shown[1]


def test_twenty_models_still_make_a_small_section(results):
    names = [f"model-{i}" for i in range(20)]
    crowd = results.model_copy(
        update={
            "models": [{**results.models[0], "name": name} for name in names],
            "results": [
                r.model_copy(update={"model": name}) for name in names for r in results.results if r.model == "standard"
            ],
            "curves": [
                c.model_copy(update={"model": name})
                for name in names
                for c in results.curves
                if (c.model, c.kind) == ("standard", "energies")
            ],
            "conditions": [c for c in results.conditions if c["kind"] in ("clean", "attack")],
        }
    )
    section = energy(crowd)
    assert len(section.figures) == MOST
    assert f"drawn for {MOST} of 20" in section.text
    assert len(section.tables[0].rows) == 20 * 4
    assert sum(len(f.svg) for f in section.figures) < 400_000
