"""report.md: small whatever the run, whole, harmless, and honest about what is missing."""

import json
import re

import pytest

from reports.contents import comparisons, replicates, sections
from reports.markdown import LIMIT, escape, render_markdown
from reports.names import clean, clip, shorten
from reports.tables import Cell, Column, Table
from robustbench_ext.results import RunResults
from tests.reports.synthetic import EVIL, difference, synthetic


def rectangular(markdown):
    """Every row of a table has as many cells as its head; returns the number of tables."""
    width, found = None, 0
    for line in markdown.splitlines():
        if line.startswith("|"):
            count = len(re.findall(r"(?<!\\)\|", line))
            found += width is None
            width = width or count
            assert count == width, line
        else:
            width = None
    return found


def tokens(markdown):
    """What GitHub's dialect makes of it; tables and strikethrough are its own, the rest is CommonMark."""
    reader = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable(["table", "strikethrough"])
    for token in reader.parse(markdown):
        yield token
        yield from token.children or ()


def harmless(markdown):
    """No link, no picture, no HTML but the folding, and no word that GitHub turns into a link or a mention by itself."""
    allowed = re.compile(r"(</?details>|<summary>\d+ \w+</summary>)(\n(</?details>|<summary>\d+ \w+</summary>))*\n?")
    for token in tokens(markdown):
        assert token.type not in ("link_open", "image", "html_inline", "code_inline", "fence", "code_block", "s_open")
        if token.type == "html_block":
            assert allowed.fullmatch(token.content), token.content
        if token.type == "text":
            for bad in (
                r"(?<!\w)@\w",
                r"\w@[\w-]+\.\w",
                r"#\w",
                r"https?://",
                r"www\.",
                r"GH-\d",
                r":\w+:",
                r"\b(?=\w*\d)[0-9a-f]*[a-f][0-9a-f]{6,}",
            ):
                assert not re.search(bad, token.content), (bad, token.content)
    assert "\u202e" not in markdown


class TestBudget:
    long = [f"network-{i:02d}-" + "x" * 190 for i in range(20)]

    @pytest.mark.parametrize(
        "options",
        [
            {"models": [f"m{i}" for i in range(20)], "attacks": 30, "corruptions": 30},
            {"models": long, "attacks": 30, "corruptions": 30, "notes": 1000, "classes": 300, "findings": 200},
            {"models": ["a"], "attacks": 400, "corruptions": 400, "notes": 2000},
            {"models": ["&" * 200, "漢" * 200], "attacks": 60, "corruptions": 0, "findings": 500},
            {"models": ["a", "b"]},
        ],
    )
    def test_any_run_fits_into_a_comment(self, options):
        results = synthetic(**options)
        markdown = render_markdown(results)
        assert len(markdown.encode()) <= LIMIT
        assert rectangular(markdown) >= 4
        harmless(markdown)
        opened, closed = markdown.count("<details>"), markdown.count("</details>")
        assert opened == closed
        assert markdown == render_markdown(results)

    @pytest.mark.parametrize("limit", [20_000, 60_000, 1_000_000])
    def test_any_limit_is_kept(self, limit):
        names = [f"@<|{i:02d}" + "&漢" * 99 for i in range(20)]
        results = synthetic(names, 30, 30, notes=1000, classes=300, findings=400)
        results.suite["description"] = "&" * 5000
        markdown = render_markdown(results, limit)
        assert len(markdown.encode()) <= limit
        assert "## Headline" in markdown
        harmless(markdown)

    def test_a_large_run_uses_its_space_and_keeps_what_matters(self):
        results = synthetic([f"m{i}" for i in range(20)], 30, 30, notes=1000, findings=40)
        markdown = render_markdown(results)
        assert len(markdown.encode()) > 0.85 * LIMIT
        headline = markdown.partition("## Headline")[2].partition("\n## ")[0]
        assert all(f"\n| m{i} |" in headline for i in range(20))
        robustness = markdown.partition("## Robustness")[2].partition("\n## ")[0]
        assert "| worst case Linf 8/255 |" in robustness  # the last row of the table, and the first to be kept
        assert "| clean |" in robustness
        order = [markdown.index(f"## {t}\n") for t in ("Headline", "Comparisons", "Robustness", "Notes", "Left out")]
        assert order == sorted(order)

    def test_what_is_left_out_is_counted_and_located(self):
        results = synthetic(["a", "b"], 200, 200, notes=1000)
        markdown = render_markdown(results)
        told = markdown.partition("## Left out")[2]
        for section in sections(results):
            text = markdown.partition(f"\n## {section.title}\n")[2].partition("\n## ")[0]
            shown = max(0, sum(line.startswith("|") for line in text.splitlines()) - 2)
            all_ = len(section.table.rows)
            missing = f"- {section.title}: {all_ - shown} of {all_} rows (all in {section.file})"
            assert (missing in told) == (shown < all_), (section.title, shown, all_)
        shown = sum(line.startswith("- note ") for line in markdown.splitlines())
        assert f"- Notes: {1000 - shown} of 1000 notes (all in results.json)" in told

    def test_a_small_run_is_whole(self):
        markdown = render_markdown(synthetic(["a", "b"]))
        assert "## Left out" not in markdown
        assert "report.html" in markdown

    def test_every_model_keeps_rows_of_a_long_table(self):
        results = synthetic([f"m{i}" for i in range(5)], 100, 60)
        calibration = render_markdown(results).partition("## Calibration\n")[2].partition("\n## ")[0]
        kept = [len(re.findall(rf"\n\| m{i} · ", calibration)) for i in range(5)]
        assert min(kept) > 0
        assert max(kept) - min(kept) <= 1

    def test_long_tables_are_folded_and_the_headline_is_not(self):
        markdown = render_markdown(synthetic([f"m{i}" for i in range(20)], 20, 20))
        headline = markdown.partition("## Headline")[2].partition("\n## ")[0]
        assert "<details>" not in headline
        folded = re.findall(r"<details>\n<summary>(\d+) rows</summary>\n\n((?:\|.*\n)+)\n</details>\n", markdown)
        assert folded
        for number, table in folded:
            assert len(table.splitlines()) == int(number) + 2


class TestHostileNames:
    @pytest.mark.parametrize("evil", EVIL)
    def test_everywhere(self, evil):
        base = synthetic(["a", "b"], findings=4, notes=2)
        text = base.to_json()
        for name in ("a", "class 9", "energy", "pgd 0 Linf 8/255", "Title", "About.", "mnist5k", "check 0", "s"):
            text = text.replace(f": {json.dumps(name)}", f": {json.dumps(evil)}")
        results = RunResults.model_validate_json(text)
        results.notes = [evil, f"see {evil}"]
        markdown = render_markdown(results)
        assert rectangular(markdown) == rectangular(render_markdown(base))
        harmless(markdown)
        headings = [line for line in markdown.splitlines() if line.startswith("#")]
        ours = {section.title for section in sections(results)} | {"Checks that did not pass", "Notes", "Metrics"}
        assert {line.removeprefix("## ") for line in headings[1:]} == ours

    @pytest.mark.parametrize("evil", EVIL)
    def test_a_reader_sees_the_name_as_it_is(self, evil):
        seen = "".join(t.content for t in tokens(escape(evil)) if t.type == "text" and not t.children)
        seen += "".join(t.content for t in tokens(escape(evil)) if t.type == "text_special")
        wanted = clean(evil)
        assert sorted(seen.replace("\u200b", "")) == sorted(wanted)

    def test_a_line_cannot_become_a_list_or_a_heading(self):
        results = synthetic(["a"])
        for text in ("- x", "# x", "1. x", "+ x", "---", "===", "> x", "| a | b |", "    x", "* x"):
            results.suite["description"] = text
            results.notes = [text]
            plain = [t.type for t in tokens(render_markdown(synthetic(["a"], notes=1)))]
            assert [t.type for t in tokens(render_markdown(results))] == plain, text


class TestNames:
    def test_long_names_stay_apart(self):
        names = ["x" * 100 + str(i) for i in range(50)]
        short = [shorten(name) for name in names]
        assert len(set(short)) == 50
        assert {len(s) for s in short} == {64}

    def test_parts_are_shortened_each(self):
        assert shorten("net · " + "c" * 90 + " · ece").startswith("net · cc")
        assert shorten("net · " + "c" * 90 + " · ece").endswith(" · ece")
        assert shorten("short · names") == "short · names"

    def test_invisible_characters_go(self):
        assert clean("a\x00b\u200bc\ud800d\te") == "a bcd e"
        assert clip("a" * 10, 5) == "aaaa…"


class TestSections:
    def test_the_best_is_bold_and_said(self):
        results = synthetic(["a", "b"])
        markdown = render_markdown(results)
        row = next(line for line in markdown.splitlines() if line.startswith("| a |"))
        assert row.startswith("| a | **90.0 [87.0, 93.0]** |")
        assert markdown.count("**Bold**: better than every other model beyond chance") == 1
        none = synthetic(["a", "b"], compared=False)
        assert "**Bold**" not in render_markdown(none)

    def test_few_pairs_are_told_with_difference_p_and_outcome(self):
        results = synthetic(["a", "b"])
        unsure = difference("b", "a", "clean", "ece", 0.002, "inconclusive", n_to_decide=51_527)
        results.comparisons.append(unsure)
        text = render_markdown(results).partition("## Comparisons")[2].partition("\n## ")[0]
        assert "| b · a · accuracy, clean, % ↑ | -1.0 [-3.0, +1.0] | 0.020 | worse |" in text
        assert (
            "| b · a · ECE, clean, % ↓ | +0.2 [-1.8, +2.2] | 0.020 | inconclusive; about 52,000 samples would decide |"
            in text
        )
        assert "corrected for the number of comparisons" in text

    def test_many_pairs_are_counted(self):
        results = synthetic(["a", "b", "c", "d"])
        results.comparisons[0].outcome = "inconclusive"  # b against a, clean
        counts, pairs = comparisons(results)
        rows = {name: [cell.text for cell in cells] for name, cells in counts.table.rows}
        # The synthetic outcome is "worse" for the later model; a is better than all others.
        assert rows == {
            "b": ["2 / 0 / 1", "2 / 1 / 0"],
            "a": ["2 / 0 / 1", "3 / 0 / 0"],
            "c": ["1 / 2 / 0", "1 / 2 / 0"],
            "d": ["0 / 3 / 0", "0 / 3 / 0"],
        }
        assert len(pairs.table.rows) == 12

    def test_seeds(self):
        results = synthetic(["net seed 0", "net seed 1"])
        assert replicates(results) is None
        for model in results.models:
            model["replicate_of"] = "net"
        like = results.find(model="net seed 0", condition="clean", metric="accuracy", group=None)[0]
        results.replicates = [
            like.model_copy(update={"model": "net", "value": 0.5, "ci_low": 0.4, "ci_high": 0.6, "n": 2})
        ]
        table = replicates(results)
        (name, cells) = table.rows[0]
        assert name == "net"
        assert [cell.text for cell in cells[:2]] == ["2", "50.0 [40.0, 60.0]"]
        assert table.columns[1].title == "clean accuracy, % ↑"
        assert "| net | 2 | 50.0 [40.0, 60.0] |" in render_markdown(results)


def test_a_dash_says_why_and_briefly():
    from reports.markdown import table_lines

    table = Table("c", "model", [Column("x")], [("a", [Cell("–", None, "because " * 40)])])
    (line,) = table_lines(table)[2:]
    assert line.startswith("| a | – (because because")
    assert len(line) < 110


def test_a_real_run_is_whole_and_harmless(finished):
    folder, _ = finished
    results = RunResults.read(folder / "results.json")
    markdown = render_markdown(results)
    assert len(markdown.encode()) <= LIMIT
    assert rectangular(markdown) == len(sections(results))
    harmless(markdown)
