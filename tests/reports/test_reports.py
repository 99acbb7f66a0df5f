"""Reports: complete, self-contained, deterministic, harmless whatever the names."""

import json
import re
from html.parser import HTMLParser

import matplotlib
import pytest

from reports import figures, tables, write_reports
from reports.html import render_html
from reports.markdown import render_markdown
from robustbench_ext.results import RunResults

matplotlib.use("Agg")


@pytest.fixture(scope="module")
def run(finished):
    folder, _ = finished
    return (
        RunResults.read(folder / "results.json"),
        json.loads((folder / "run.json").read_text()),
        json.loads((folder / "gallery.json").read_text()),
    )


@pytest.fixture(scope="module")
def html(run):
    return render_html(*run)


class Balance(HTMLParser):
    """Tags that are opened are closed; ids are unique; nothing is loaded from outside."""

    VOID = {"meta", "img", "br", "link", "input", "hr"}

    def __init__(self):
        super().__init__()
        self.stack, self.ids, self.links, self.scripts = [], [], [], 0

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.stack.append(tag)
        self.scripts += tag == "script"
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name in ("src", "href", "xlink:href"):
                self.links.append(value)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.stack.pop()

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag


def parse(html):
    parser = Balance()
    parser.feed(html)
    assert parser.stack == []
    return parser


def test_html_is_whole_and_self_contained(html):
    page = parse(html)
    assert len(page.ids) == len(set(page.ids)), "ids must be unique across figures"
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in page.links)
    assert not re.search(r"url\((?!#)", html)
    for title in ("Headline", "Robustness to attacks", "Accuracy by class", "Corruptions", "Calibration", "Gallery"):
        assert title in html
    assert "var(--c1)" in html
    assert "#0072b2" not in html.partition("</style>")[2]  # figures follow the page's colours
    assert len(html) < 5e6
    for anchor in re.findall(r'href="#([^"]+)"', html.partition("<main>")[0]):
        assert anchor in page.ids


def test_same_results_same_bytes(run, html, finished):
    assert render_html(*run) == html
    assert render_markdown(run[0]) == render_markdown(run[0])
    folder, _ = finished
    first = {k: f.read_bytes() for k, f in write_reports(folder).items()}
    assert {k: f.read_bytes() for k, f in write_reports(folder).items()} == first


def test_hostile_names_do_no_harm(run):
    results, run_json, gallery = run
    evil = '<script>alert(1)</script>"|`*../../x $up^_'
    text = results.to_json().replace('"standard"', json.dumps(evil))
    hostile = RunResults.model_validate_json(text)
    pictures = json.loads(json.dumps(gallery).replace('"standard"', json.dumps(evil)))
    html = render_html(hostile, run_json, pictures)
    assert parse(html).scripts == 1  # ours
    assert "<script>alert" not in html
    markdown = render_markdown(hostile)
    assert "<script>" not in markdown
    assert any("alert(1)" in line for line in markdown.splitlines() if line.startswith("|"))
    assert_rectangular(markdown)  # a | in a name must not open a column


def test_gallery_images_from_elsewhere_are_left_out(run):
    results, run_json, gallery = run
    bad = [{**g, "images": ["https://example.org/x.png"] * 3} for g in gallery]
    assert "example.org" not in render_html(results, run_json, bad)


def test_empty_parts_do_not_appear(run):
    results, _, _ = run
    bare = results.model_copy(
        update={
            "conditions": [c for c in results.conditions if c["kind"] == "clean"],
            "results": [r for r in results.results if r.condition == "clean"],
            "curves": [c for c in results.curves if c.condition == "clean"],
            "probes": [],
            "cost": [],
        }
    )
    html = render_html(bare, None, [])
    parse(html)
    for title in ("Robustness to attacks", "Corruptions", "Unknown and attacked inputs", "Gallery", "Cost in passes"):
        assert title not in html
    assert "Headline" in html


def assert_rectangular(markdown):
    """Every row of a table has as many cells as its head."""
    width = None
    for line in markdown.splitlines():
        if line.startswith("|"):
            count = len(re.findall(r"(?<!\\)\|", line))
            width = width or count
            assert count == width, line
        else:
            width = None


def test_markdown_tables_are_rectangular_and_short(run):
    markdown = render_markdown(run[0])
    assert_rectangular(markdown)
    assert len(markdown) < 60_000


def test_headline_shows_values_of_results(run):
    results = run[0]
    table = tables.headline(results)
    clean = results.find(model="trades", condition="clean", probe="classifier", metric="accuracy", group=None)[0]
    cells = dict(table.rows)["trades"]
    assert cells[0].value == clean.value
    assert cells[0].text == f"{100 * clean.value:.1f} [{100 * clean.ci_low:.1f}, {100 * clean.ci_high:.1f}]"
    assert [c.title for c in table.columns][:3] == [
        "clean accuracy, % ↑",
        "robust Linf 0.1, % ↑",
        "worst class Linf 0.1, % ↑",
    ]


def test_undefined_is_a_dash_with_its_reason(run):
    results = run[0]
    row = results.results[0].model_copy(update={"value": None, "ci_low": None, "ci_high": None, "reason": "why"})
    assert tables.number(row, results) == tables.Cell("–", None, "why")


def test_figures_return_their_axes(run):
    results = run[0]
    curve = next(c for c in results.curves if c.kind == "reliability")
    for ax in (
        figures.robust_accuracy_curve(results, "Linf"),
        figures.corruption_curve(results, "gaussian-noise"),
        figures.per_class(results, "trades", ["clean"]),
        figures.reliability_diagram([curve], "x"),
        figures.roc([c for c in results.curves if c.kind == "roc"][:2], "x"),
        figures.score_histogram(next(c for c in results.curves if c.kind == "scores"), "x"),
        figures.training_curve(results.models[0]),
    ):
        assert ax.get_title() is not None
        assert ax.has_data()


def test_a_model_with_more_outputs_than_classes_can_be_shown(run):
    results, run_json, gallery = run
    odd = [{**g, "after": 99} for g in gallery]
    assert "#99" in render_html(results, run_json, odd)
