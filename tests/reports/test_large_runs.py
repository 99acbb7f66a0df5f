"""Large runs stay small, and say what they leave out; comparisons, seeds and the choice of a model say what they may."""

import re

import matplotlib
import pytest

from reports import figures, pairs, tables
from reports.figures import drawing
from reports.html import render_html
from reports.spotlight import MOST, ahead, spotlight
from reports.summary import summary
from reports.svg import themed
from reports.tables import Cell, Column, Table
from reports.view import MOST_ROWS, view
from robustbench_ext.axes import axes, best
from robustbench_ext.results import Compared
from tests.reports.big_run import HOSTILE, big_run

matplotlib.use("Agg")


@pytest.fixture(scope="module")
def crowd():
    return big_run()


@pytest.fixture(scope="module")
def page(crowd):
    return render_html(crowd, None, [])


def section(page, name):
    return re.search(rf'<section id="{name}">.*?</section>', page, re.S)[0]


class TestTwentyModels:
    def test_they_fit(self, page):
        assert len(page.encode()) < 5e6
        assert page.count("<svg") < 150

    def test_what_is_left_out_is_said(self, page, crowd):
        said = re.findall(r"Shown are (\d+) of ([\d,]+) rows, as many of every model; all are in results.csv", page)
        assert said and all(int(shown) <= MOST_ROWS < int(of.replace(",", "")) for shown, of in said)
        rows = max(len(t.rows) for t in tables.detection(crowd))
        assert f"of {rows:,} rows" in page
        for name in ("calibration", "detection", "training", "abstaining", "energy"):
            assert f"drawn for {MOST} of 20" in section(page, name)
        assert "results.json under comparisons" in section(page, "comparisons")

    def test_every_model_is_in_the_headline_and_in_the_matrices(self, page, crowd):
        for name in ("headline", "classes", "corruptions", "comparisons"):
            for model in crowd.models:
                assert model["name"] in section(page, name)

    def test_models_that_failed_or_are_in_doubt_are_marked_in_the_headline(self, page):
        rows = re.findall(r"<tr[^>]*>.*?</tr>", section(page, "headline"), re.S)
        marked = {
            re.search(r"model \d\d", row)[0]: mark for row in rows for mark in re.findall(r'class="mark (\w+)"', row)
        }
        assert marked == {"model 19": "fail", "model 01": "doubt"}

    def test_the_spotlight_is_on_leaders_then_on_the_first(self, crowd):
        shown = spotlight(crowd)
        leaders = {ahead(crowd, axis) for axis in axes(crowd)} - {None}
        assert len(shown) == MOST and leaders <= set(shown)
        assert {best(crowd, axis) for axis in axes(crowd)} - {None} <= leaders
        first = [str(m["name"]) for m in crowd.models if m["name"] not in leaders][: MOST - len(leaders)]
        assert sorted(shown) == sorted([*leaders, *first])


class TestLongTables:
    def long(self, crowd, per_model):
        table = Table("caption", "model · condition · probe", [Column("x")])
        for model in crowd.models:
            for label in ["frost 3"] * (per_model - 2) + ["clean", "outliers letters"]:
                table.rows.append((f"{model['name']} · {label} · p", [Cell("1", 1.0, "n = 1")]))
        return table

    def test_as_many_rows_of_every_model_and_what_matters_first(self, crowd):
        shown = view(self.long(crowd, 100), crowd)
        assert (len(shown.lines), shown.rows) == (MOST_ROWS, 2000)
        for model in range(20):
            mine = [line.name for line in shown.lines if line.model == model]
            assert len(mine) == MOST_ROWS // 20
            assert [name.split(" · ")[1] for name in mine][-2:] == ["clean", "outliers letters"]

    def test_short_tables_are_whole(self, crowd):
        shown = view(self.long(crowd, 12), crowd)
        assert len(shown.lines) == shown.rows == 240 and not shown.left_out

    def test_a_note_that_all_cells_share_is_in_the_heading(self, crowd):
        table = Table("c", "model", [Column("x", "about"), Column("y")])
        table.rows.extend(
            [
                ("a", [Cell("1", 1, "n = 5"), Cell("1", 1, "u")]),
                ("b", [Cell("2", 2, "n = 5"), Cell("1", 1, "v")]),
            ]
        )
        shown = view(table, crowd)
        assert [h.about for h in shown.heads] == ["about; n = 5", ""]
        assert [[c.note for c in line.cells] for line in shown.lines] == [["", "u"], ["", "v"]]

    def test_models_are_known_by_their_names_whatever_these_hold(self, crowd):
        odd = crowd.model_copy(update={"models": [{"name": "a"}, {"name": "a · b"}]})
        table = Table("c", "model · probe", [Column("a · b")], [("a · b · p", []), ("a · c", []), ("x", [])])
        shown = view(Table("c", "m", table.columns, [(n, [Cell("1")]) for n, _ in table.rows]), odd)
        assert [line.model for line in shown.lines] == [1, 0, None]
        assert shown.heads[0].model == 1


def compared(model, against, outcome, metric="accuracy", condition="clean", value=0.1):
    ends = {"ci_low": value - 0.05, "ci_high": value + 0.05, "ci_level": 0.95, "ci_method": "c", "test": "t", "n": 10}
    where = {"condition": condition, "probe": "classifier", "metric": metric}
    return Compared(
        model=model, against=against, **where, value=value, **ends, p_value=0.01, p_adjusted=0.01, outcome=outcome
    )


def of(names, comparisons, failed=(), groups=None):
    results = big_run(
        models=len(names), severities=(5,), classes=2, corruptions=1, budgets=3, troubles=False, pairs=False
    )
    for model, name in zip(results.models, names, strict=True):
        model["name"] = name
        if groups:
            model["replicate_of"] = groups[name]
    results.preflight = [
        f.model_copy(update={"model": n, "status": "fail"}) for n in failed for f in results.preflight[:1]
    ]
    results.comparisons = comparisons
    return results


ROBUST = {"metric": "robust_accuracy", "condition": "worst case Linf 8/255"}


class TestChoice:
    def test_a_model_that_beats_all_is_named(self):
        found = summary(
            of("abc", [compared("b", "a", "better"), compared("c", "b", "worse"), compared("c", "a", "worse")])
        )
        assert (found.choice, found.beaten) == (["b"], ["a", "c"])
        assert found.leads == [("clean accuracy", "b")]
        assert "clean accuracy" not in found.open and "clean ECE" in found.open

    def test_a_trade_off_leaves_the_choice(self):
        found = summary(of("ab", [compared("b", "a", "better"), compared("b", "a", "worse", **ROBUST)]))
        assert (found.choice, found.beaten) == (["a", "b"], [])
        assert found.leads == [("clean accuracy", "b"), ("robust Linf 8/255", "a")]

    def test_chance_chooses_nothing(self):
        found = summary(of("ab", [compared("b", "a", "inconclusive")]))
        assert (found.choice, found.beaten, found.leads) == (["a", "b"], [], [])
        page = render_html(of("ab", [compared("b", "a", "inconclusive")]), None, [])
        assert "No model is told apart from all others on any axis" in page
        assert "No value is marked as best" in page and 'class="best"' not in page

    def test_a_model_that_failed_a_check_neither_wins_nor_beats(self):
        found = summary(of("ab", [compared("b", "a", "better")], failed="b"))
        assert (found.choice, found.beaten, found.failed, found.leads) == (["a"], [], ["b"], [])
        assert "clean accuracy" not in found.open

    def test_several_trainings_are_one_model(self):
        groups = {"a 0": "a", "a 1": "a", "b 0": "b", "b 1": "b"}
        found = summary(of(list(groups), [compared("b", "a", "better")], groups=groups))
        assert (found.choice, found.beaten, found.leads) == (["b"], ["a"], [("clean accuracy", "b")])

    def test_without_comparisons_nothing_is_said(self):
        assert summary(of("ab", [])).compared is False
        assert "were not compared in pairs" in render_html(of("ab", []), None, [])
        assert summary(of("a", [])) is None
        assert "Which model?" not in render_html(of("a", []), None, [])


class TestComparisons:
    def test_two_models_have_a_table_and_a_figure(self):
        made = pairs.comparisons(
            of("ab", [compared("b", "a", "better"), compared("b", "a", "worse", "ece", value=-0.1)])
        )
        assert [t.caption for t in made.tables] == ["b compared with a"]
        assert len(made.figures) == 1

    def test_the_other_side_of_a_comparison(self):
        turned = pairs.seen_from(compared("b", "a", "better", value=0.1), "a")
        assert (turned.model, turned.against, turned.outcome) == ("a", "b", "worse")
        assert (turned.value, turned.ci_low, turned.ci_high) == pytest.approx((-0.1, -0.15, -0.05))
        assert pairs.seen_from(turned, "a") is turned

    def test_of_many_everyone_is_compared_with_the_leader(self, crowd):
        made = pairs.comparisons(crowd)
        table = made.tables[0]
        rows = dict(table.rows)
        for k, axis in enumerate(axes(crowd)):
            leader = ahead(crowd, axis)
            assert table.columns[k].definition == f"Leader: {leader}."
            assert rows[leader][k].text == "leader"
            for c in crowd.compared(axis.metric, axis.condition):
                if leader in (c.model, c.against):
                    other = c.against if c.model == leader else c.model
                    cell = rows[other][k]
                    assert abs(cell.value) == pytest.approx(abs(c.value))
                    assert cell.text.endswith("undecided") == (c.outcome == "inconclusive")

    def test_matrices_hold_every_outcome_twice(self, crowd):
        made = pairs.comparisons(crowd)
        matrices = [t for t in made.more if t.caption.startswith("All pairs, ")]
        text = [cell.text for t in matrices for _, cells in t.rows for cell in cells]
        decided = sum(c.outcome != "inconclusive" for c in crowd.comparisons)
        undecided = len(crowd.comparisons) - decided
        counts = [sum(t.startswith(mark) for t in text) for mark in "▲▼·"]
        assert counts == [decided, decided, 2 * undecided]

    def test_a_few_models_have_all_pairs_in_one_table(self):
        made = pairs.comparisons(big_run(models=4, severities=(5,), classes=2, corruptions=1, budgets=3))
        assert made.more[0].caption == "All pairs of models"
        assert len(made.more[0].rows) == 6 * len(made.tables[0].columns)

    def test_seeds_have_a_table_of_their_own(self):
        results = big_run(models=2, severities=(5,), classes=2, corruptions=1, budgets=3, seeds=2)
        table = pairs.seeds(results).tables[0]
        assert [name for name, _ in table.rows] == ["model 00", "model 01"]
        assert not pairs.seeds(big_run(models=2, severities=(5,), classes=2, corruptions=1, budgets=3))


class TestFigures:
    def test_new_ones_return_their_axes(self, crowd):
        rows = crowd.comparisons[:5]
        for ax in (
            figures.tradeoffs(crowd),
            figures.clean_against_robust(crowd),
            figures.robust_against_calibration(crowd),
            figures.forest(crowd, rows, "title"),
            figures.corruption_matrix(crowd),
            figures.class_matrix(crowd, "clean"),
        ):
            assert ax.get_title() and ax.has_data()

    def test_more_models_than_colours_are_grey_and_counted(self, crowd):
        ax = figures.tradeoffs(crowd)
        labels = [text.get_text() for text in ax.get_legend().get_texts()]
        assert set(labels) == {*spotlight(crowd), "14 others"}

    def test_a_forest_is_named_by_what_differs(self, crowd):
        def ticks(rows):
            return [text.get_text() for text in figures.forest(crowd, rows, "t").get_yticklabels()]

        assert ticks([compared("b", "a", "better"), compared("b", "a", "worse", **ROBUST)])[0] == "accuracy, clean"
        assert ticks([compared("b", "a", "better"), compared("c", "a", "worse")]) == ["b", "c"]
        assert ticks([compared("b", "a", "better"), compared("a", "c", "worse")]) == ["b − a", "a − c"]

    def test_intervals_are_the_bars(self, crowd):
        ax = figures.forest(crowd, [compared("b", "a", "better", value=0.1)], "t")
        (segment,) = ax.containers[0].lines[2][0].get_segments()
        assert segment[:, 0] == pytest.approx([0.05, 0.15])

    def test_hostile_names_are_short_and_clean(self):
        results = big_run(models=2, severities=(5,), classes=2, corruptions=1, budgets=3, hostile=True)
        for name in (*HOSTILE, "a\nb", "\x00"):
            assert len(drawing.short_name(name)) <= drawing.LONGEST
            assert drawing.short_name(name).isprintable()
        labels = [t.get_text() for t in figures.tradeoffs(results).get_legend().get_texts()]
        assert all(len(label) <= drawing.LONGEST for label in labels)


def test_svg_is_rounded_in_tags_and_not_in_text():
    path = '<path d="M 1.23456 -7.00001&#10;L 2 3" style="opacity: 0.178"/>'
    svg = f'<?xml?><svg width="1pt">\n {path}\n <text x="1.239">1.23456</text></svg>'
    short = themed(svg)
    assert 'd="M 1.2 -7' in short and "opacity:0.18" in short
    assert '<text x="1.24">1.23456</text>' in short
    assert ">\n" not in short


def test_names_are_harmless_on_the_page():
    results = big_run(models=2, severities=(5,), classes=2, corruptions=1, budgets=3, hostile=True)
    page = render_html(results, None, [])
    assert page.count("<script") == 1 and "<img" not in page
    assert not re.search("[\u202a-\u202e\u2066-\u2069\u200f\x00]", page)
    assert "49" not in section(page, "headline").partition("<tbody>")[0]  # nothing was evaluated
