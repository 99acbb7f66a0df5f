"""Leaderboards: what is compared was asked the same, ranks are those of the tests, names are harmless, nothing is lost, and the
same runs give the same bytes."""

import html
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from typer.testing import CliRunner

from reports.leaderboard import write_site
from reports.leaderboard_boards import key_of, make_boards, rank, read_runs
from robustbench_ext.cli.main import app
from robustbench_ext.compare import Side
from robustbench_ext.engine import run_suite
from robustbench_ext.errors import ConfigError
from robustbench_ext.records import RecordStore

N = 100
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOSTILE = ["<script>alert(1)</script>", "../../x", "x" * 200, "a/b", "a?b", "A?B", "‮gpj.exe", "CON", "..", " "]


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """Two models on digits, attacked, corrupted and shown letters."""

    def model(name, defense):
        recipe = {"epochs": 2, "eps": 0.1, "attack_steps": 1, "validation_n": 50}
        return {"name": name, "train": {"defense": defense, "recipe": recipe}}

    suite = {
        "schema": 1,
        "name": "small",
        "data": "digits",
        "n": N,
        "models": [model("standard", "standard"), model("at", "pgd-at")],
        "conditions": [
            {"attack": "pgd", "eps": 0.1, "steps": 2},
            {"corruption": "contrast", "severity": 3},
            {"outliers": "letters", "n": 30},
        ],
        "detectors": ["energy"],
    }
    folder = tmp_path_factory.mktemp("real") / "first"
    run_suite(suite, folder)
    (folder / "report.html").write_text("<p>the report</p>", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """Two forests of one name, each with an estimator of its own; the second run also met a larger shift."""
    root = tmp_path_factory.mktemp("tables")
    forest = {"network": "sklearn:ensemble.RandomForestRegressor", "kwargs": {"n_estimators": 4}}
    for name, seed, uq, size in (("one", 0, "split-conformal", 1), ("two", 1, "quantile-regression", [1, 2])):
        suite = {
            "schema": 1,
            "name": "tables",
            "data": "diabetes",
            "n": 60,
            "models": [{"name": "forest", "train": {**forest, "seed": seed}}],
            "conditions": [{"shift": "feature-noise", "size": size}],
            "uq": [uq],
        }
        run_suite(suite, root / name)
    return root


@pytest.fixture
def clone(real, tmp_path):
    """A run that differs from the real one by what an edit makes of its results and its index."""

    def make(name, edit=None, rename=None, new_weights=True):
        folder = tmp_path / name
        shutil.copytree(real, folder)
        results, index = (json.loads((folder / f).read_text()) for f in ("results.json", "index.json"))
        called = rename or {}
        for model in results["models"]:
            model["name"] = called.get(model["name"], model["name"])
            if new_weights:
                model["fingerprint"] = f"{name}-{model['fingerprint']}"
        for part in ("preflight", "doubts", "results", "curves", "cost"):
            for item in results[part]:
                item["model"] = called.get(item["model"], item["model"])
        results["comparisons"] = []
        index["models"] = {called.get(key, key): value for key, value in index["models"].items()}
        if edit:
            edit(results, index)
        (folder / "results.json").write_text(json.dumps(results))
        (folder / "index.json").write_text(json.dumps(index))
        return folder

    return make


def files(site):
    return {str(f.relative_to(site)): f.read_bytes() for f in sorted(site.rglob("*")) if f.is_file()}


def boards_of(*folders):
    boards = make_boards(read_runs(folders)[0])
    for board in boards:
        rank(board)
    return boards


def standing(board, metric, condition="clean"):
    return next(s for s in board.standings if (s.axis.metric, s.axis.condition) == (metric, condition))


class Page(HTMLParser):
    """Tags with their attributes, and the text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text.append(data)

    def links(self):
        return [attrs["href"] for tag, attrs in self.tags if tag == "a" and "href" in attrs]


def page_of(file):
    return Page(file.read_text(encoding="utf-8"))


# Boards --------------------------------------------------------------------------------------------------------------


def test_comparable_runs_share_a_board_and_others_have_one_of_their_own(real, clone):
    def stronger(results, index):
        for spec in (c["spec"] for label, c in index["conditions"].items() if label.startswith("pgd")):
            spec["steps"] = 7

    def other_samples(results, index):
        index["conditions"]["clean"]["ids"] = "0" * 20

    def other_training(results, index):
        results["data"]["splits"]["calibration"]["fingerprint"] = "0" * 20

    edits = {"stronger": stronger, "elsewhere": other_samples, "recalibrated": other_training}
    boards = boards_of(real, clone("same"), *(clone(name, edit) for name, edit in edits.items()))
    assert [s.name for s in boards[0].runs] == ["first", "same"]
    told = {board.runs[0].name: board.apart for board in boards[1:]}
    assert told == {
        "stronger": ["pgd Linf 0.1: steps 2 / 7"],
        "elsewhere": ["test samples: other ones, or in another order"],
        "recalibrated": ["calibration samples: other ones"],
    }
    for board in boards:
        names = {e.label for e in board.entries}
        assert all({c.model, c.against} <= names for s in board.standings for c in s.compared)
    assert [len(board.entries) for board in boards] == [4, 2, 2, 2]


def _without(*labels):
    """An edit that takes conditions away, and all that is taken over them."""

    def edit(results, index):
        gone = {c["label"] for c in results["conditions"] if {c["label"], *c.get("over", [])} & set(labels)}
        results["results"] = [r for r in results["results"] if r["condition"] not in gone]
        results["conditions"] = [c for c in results["conditions"] if c["label"] not in gone]
        index["conditions"] = {label: c for label, c in index["conditions"].items() if label not in gone}

    return edit


def test_a_run_that_fits_two_boards_joins_the_one_where_more_was_asked(real, clone):
    def other_steps(results, index):
        _without("contrast 3")(results, index)
        index["conditions"]["pgd Linf 0.1"]["spec"]["steps"] = 7

    runs = [clone("another", other_steps), real, clone("little", _without("contrast 3", "pgd Linf 0.1"))]
    for order in (runs, runs[::-1]):
        assert [[s.name for s in board.runs] for board in boards_of(*order)] == [["first", "little"], ["another"]]


def test_what_only_some_runs_measured_is_ranked_among_these(real, clone):
    (board,) = boards_of(clone("fewer", _without("contrast 3")), real)
    assert len(standing(board, "accuracy").ranks) == 4
    assert set(standing(board, "accuracy", "contrast 3").ranks) == {"at (first)", "standard (first)"}


def test_equal_weights_are_one_model_and_equal_names_are_told_apart(real, clone):
    again = clone("again", rename={"standard": "renamed"}, new_weights=False)
    other = clone("other")
    (board,) = boards_of(real, again, other)
    assert {e.label for e in board.entries} == {"renamed", "at (again)", "standard", "at (other)"}
    assert {e.label: [s.name for s, _ in e.places] for e in board.entries}["renamed"] == ["again", "first"]
    assert len(boards_of(real, real)[0].entries) == 2


def test_every_model_on_every_axis_is_read_once(real, clone, monkeypatch):
    asked = []
    own = Side.statistic
    monkeypatch.setattr(
        Side, "statistic", lambda self, axis: asked.append((self.name, key_of(axis))) or own(self, axis)
    )
    (board,) = boards_of(real, clone("b"), clone("c"))
    assert len(asked) == len(set(asked)) == 6 * len(board.standings)


def test_ranks_are_those_that_tests_of_all_pairs_leave(real, clone):
    """Four models whose mistakes are known, against McNemar's test and Holm's correction of statsmodels.

    m3 has eight mistakes that m0 has not, and m0 one: p = 0.04, which the correction for six pairs does not let pass.
    """
    folder = clone("made", rename={"standard": "m0", "at": "m1"})
    second = clone("made-too", rename={"standard": "m2", "at": "m3"})
    wrong = {"m0": range(2), "m1": range(30), "m2": range(20, 45), "m3": range(1, 10)}
    for run in (folder, second):
        index = json.loads((run / "index.json").read_text())
        store = RecordStore(run / "records")
        for name, model in index["models"].items():
            (key,) = model["observations"]["clean"]
            columns = store.load(key)
            answer = columns["label"].copy()
            answer[list(wrong[name])] = (answer[list(wrong[name])] + 1) % 10
            columns["logits"] = np.eye(10, dtype=np.float32)[answer]
            model["observations"]["clean"] = [f"made-{name}"]
            store.save(f"made-{name}", columns, {})
        (run / "index.json").write_text(json.dumps(index))
    (board,) = boards_of(folder, second)
    found = standing(board, "accuracy")
    right = {name: np.isin(np.arange(N), list(bad), invert=True) for name, bad in wrong.items()}
    pairs = list(combinations(right, 2))
    table = [
        [[(right[a] & right[b]).sum(), (right[a] & ~right[b]).sum()], [(~right[a] & right[b]).sum(), 0]]
        for a, b in pairs
    ]
    rejected = multipletests([mcnemar(t, exact=True).pvalue for t in table], 0.05, "holm")[0]
    better = dict.fromkeys(right, 0)
    worse = dict.fromkeys(right, 0)
    for (a, b), surely in zip(pairs, rejected, strict=True):
        winner, loser = (a, b) if right[a].mean() > right[b].mean() else (b, a)
        worse[loser] += int(surely)
        better[winner] += int(surely)
    assert found.ranks == {name: (1 + worse[name], 4 - better[name]) for name in right}
    assert found.ranks == {"m0": (1, 2), "m3": (1, 2), "m1": (3, 4), "m2": (3, 4)}  # two groups; no order within chance
    for c in found.of("m1"):
        assert c.model == "m1"
        assert c.value == pytest.approx(right["m1"].mean() - right[c.against].mean())
        assert c.ci_low <= c.value <= c.ci_high
        assert c.outcome == ("worse" if c.against in ("m0", "m3") else "inconclusive")


def test_failed_models_are_listed_apart_with_the_reason(real, clone, tmp_path):
    def fail(results, index):
        finding = next(f for f in results["preflight"] if f["model"] == "at")
        finding |= {"name": "input range", "status": "fail", "message": "reads normalised data", "hint": "Wrap it."}

    folder = clone("broken", fail)
    (board,) = boards_of(real, folder)
    assert [e.label for e in board.failed] == ["at (broken)"]
    assert all("at (broken)" not in {*s.ranks, *(c.model for c in s.compared)} for s in board.standings)
    write_site([real, folder], tmp_path / "site")
    text = " ".join(page_of(tmp_path / "site" / "index.html").text)
    assert "Not ranked: a check failed" in text
    assert "input range" in text
    page = next(f for f in (tmp_path / "site").glob("*/*.html") if "reads normalised data" in f.read_text())
    assert "Not ranked, not to be trusted: input range" in page.read_text()


def test_regressors_are_compared_by_the_first_estimator_of_each(tables, tmp_path):
    (board,) = boards_of(tables / "one", tables / "two")
    assert {e.label for e in board.entries} == {"forest (one)", "forest (two)"}
    for condition in ("clean", "feature-noise 1"):  # the latter is on one headline alone, and both measured it
        coverage = standing(board, "coverage", condition)
        assert {a.row.probe for a in coverage.answers.values()} == {"split-conformal", "quantile-regression"}
        assert len(coverage.compared) == 1
        assert not coverage.ranks  # no direction of coverage is better
    assert len(standing(board, "rmse").ranks) == 2
    write_site([tables / "one", tables / "two"], tmp_path / "site")
    for file in (tmp_path / "site").glob("*/*.html"):
        text = " ".join(page_of(file).text)
        assert "No direction of this metric is better." in text
        assert "clean coverage at 90 %: forest" in text  # the difference is there all the same


# Errors --------------------------------------------------------------------------------------------------------------


def test_what_cannot_be_read_is_left_out_and_the_others_go_on(real, clone, tmp_path):
    broken = {"no-results": clone("no-results"), "no-index": clone("no-index"), "garbage": clone("garbage")}
    (broken["no-results"] / "results.json").unlink()
    (broken["no-index"] / "index.json").unlink()
    (broken["garbage"] / "results.json").write_bytes(b"\xff\x00{")
    broken["odd"] = clone("odd", lambda results, index: results["suite"].pop("n"))
    broken["nowhere"] = tmp_path / "nowhere"
    damaged = clone("damaged", rename={"at": "hurt"})
    index = json.loads((damaged / "index.json").read_text())
    label = next(label for label in index["conditions"] if label.startswith("pgd"))
    record = damaged / "records" / f"{index['models']['hurt']['observations'][label][0]}.npz"
    record.write_bytes(record.read_bytes()[:100])
    site = tmp_path / "site"
    result = CliRunner().invoke(app, ["leaderboard", *map(str, [real, damaged, *broken.values()]), "--out", str(site)])
    assert result.exit_code == 4, result.output
    text = " ".join(page_of(site / "index.html").text)
    for name in (*broken, "damaged"):
        assert name in text
    assert "there is no index.json" in text
    assert "is missing or damaged in damaged/records" in text
    assert not any(str(tmp_path).encode() in content for content in files(site).values())
    (board,) = boards_of(real, damaged)
    attacked = next(s for s in board.standings if s.axis.metric == "robust_accuracy")
    assert set(attacked.ranks) == {"at", "standard (first)", "standard (damaged)"}
    assert attacked.answers["hurt"].row.value is not None  # the value is shown, without a rank
    assert "damaged" in attacked.unranked["hurt"]
    assert "hurt" in standing(board, "accuracy").ranks


def test_scores_that_cannot_be_compared_cost_no_other_model_its_rank(real, clone):
    folder = clone("nan", rename={"at": "nan"})
    index = json.loads((folder / "index.json").read_text())
    store = RecordStore(folder / "records")
    (key,) = index["models"]["nan"]["probes"]["energy"]["outliers letters"]
    columns = store.load(key)
    store.save("undefined", {name: np.full_like(column, np.nan) for name, column in columns.items()}, {})
    index["models"]["nan"]["probes"]["energy"]["outliers letters"] = ["undefined"]
    (folder / "index.json").write_text(json.dumps(index))
    (board,) = boards_of(folder, real)
    found = standing(board, "auroc", "outliers letters")
    assert set(found.ranks) == {"at", "standard (first)", "standard (nan)"}
    assert "not what its index says" in found.unranked["nan"]


def test_records_of_other_samples_than_the_index_says_are_not_ranked(real, clone):
    folder = clone("before-the-others", rename={"at": "shuffled"})
    index = json.loads((folder / "index.json").read_text())
    store = RecordStore(folder / "records")
    (key,) = index["models"]["shuffled"]["observations"]["clean"]
    store.save("turned", {name: column[::-1] for name, column in store.load(key).items()}, {})
    index["models"]["shuffled"]["observations"]["clean"] = ["turned"]
    (folder / "index.json").write_text(json.dumps(index))
    (board,) = boards_of(real, folder)
    assert "they hold other samples" in standing(board, "accuracy").unranked["shuffled"]
    assert len(standing(board, "accuracy").ranks) == 3
    assert any("before-the-others" in item.reason for item in board.left_out)


def test_nothing_to_rank_is_an_error_that_says_what_to_do(real, clone, tmp_path):
    def fail(results, index):
        for finding in results["preflight"]:
            finding["status"] = "fail"

    with pytest.raises(ConfigError, match="no model can be ranked.*rbx report"):
        write_site([clone("all-failed", fail)], tmp_path / "site")
    with pytest.raises(ConfigError, match=r"none of the 1 folders(.|\n)*results\.json"):
        write_site([tmp_path / "missing"], tmp_path / "site")
    assert not (tmp_path / "site").exists()
    with pytest.raises(ConfigError, match="folder of its own"):
        write_site([real], real)
    (tmp_path / "blog").mkdir()
    (tmp_path / "blog" / "index.html").write_text("mine")
    with pytest.raises(ConfigError, match="no leaderboard's"):
        write_site([real], tmp_path / "blog")
    assert (tmp_path / "blog" / "index.html").read_text() == "mine"


# Pages ---------------------------------------------------------------------------------------------------------------


def test_the_same_runs_give_the_same_bytes_in_any_order(real, clone, tmp_path):
    runs = [real, clone("b"), clone("c", lambda results, index: index.update(seed=5))]
    missing = [tmp_path / "gone", tmp_path / "away"]
    write_site([*runs, *missing], tmp_path / "one", "Ours")
    write_site([*runs, *missing][::-1], tmp_path / "two", "Ours")
    assert files(tmp_path / "one") == files(tmp_path / "two")
    for run in runs:
        (run / "run.json").rename(run / "run.away")
    write_site(runs, tmp_path / "three", "Ours")
    (real / "run.away").rename(real / "run.json")
    assert not any(re.search(rb"20\d\d-\d\d-\d\d", content) for content in files(tmp_path / "three").values())


def test_pages_of_an_earlier_leaderboard_go_and_other_files_stay(real, clone, tmp_path):
    site = tmp_path / "site"
    write_site([real, clone("b", lambda results, index: index.update(seed=5))], site)
    assert len(list(site.glob("*/*.html"))) == 4
    (site / "own.html").write_text("mine")
    manifest = json.loads((site / "leaderboard.json").read_text())
    (tmp_path / "outside.html").write_text("mine")
    (site / "leaderboard.json").write_text(json.dumps({"files": [*manifest["files"], "../outside.html", "own.txt"]}))
    write_site([real], site)
    assert len(list(site.glob("*/*.html"))) == 2
    assert (site / "own.html").exists()
    assert (tmp_path / "outside.html").exists()


def test_hostile_names_are_harmless(real, clone, tmp_path):
    runs = [real]
    for i, (a, b) in enumerate(zip(HOSTILE[::2], HOSTILE[1::2], strict=True)):
        runs.append(clone(f"h{i}", rename={"standard": a, "at": b}))
    site = tmp_path / "site"
    written = write_site(runs, site, "<b>title</b>")
    pages = [f.relative_to(site) for f in site.rglob("*.html")]
    assert len(pages) == 1 + written.models == 1 + 12
    assert len({str(p).lower() for p in pages}) == len(pages)
    assert all(re.fullmatch(r"[A-Za-z0-9._-]{1,90}", part) for p in pages for part in p.parts)
    for page in pages:
        text = (site / page).read_text(encoding="utf-8")
        assert "<script>alert" not in text
        assert "‮" not in text
        for link in page_of(site / page).links():
            target, _, _ = link.partition("#")
            if target and not target.endswith("/report.html"):
                assert ((site / page).parent / target).resolve() in {(site / p).resolve() for p in pages}, link
    assert html.escape("<b>title</b>") in (site / "index.html").read_text(encoding="utf-8")


def test_pages_are_whole_without_scripts_and_without_a_network(real, clone, tmp_path):
    site = tmp_path / "site"
    write_site([real, clone("b")], site)
    index = page_of(site / "index.html")
    (form,) = [attrs for tag, attrs in index.tags if tag == "form"]
    assert "hidden" in form  # a filter that would do nothing is not shown
    sorts = [attrs["aria-sort"] for tag, attrs in index.tags if "aria-sort" in attrs]
    assert sorts == ["descending"]
    assert sum(tag == "tr" for tag, _ in index.tags) == 5
    text = " ".join(index.text)
    for name in ("standard (first)", "at (b)", "How to read this", "No winner is named", "rank 1", "steps 2"):
        assert name in text
    for file in site.rglob("*.html"):
        content = file.read_text(encoding="utf-8")
        assert not re.search(r"""(src|href)=["']?(https?:|//)|@import|url\(""", content)
        assert "default-src 'none'" in content
    script = re.search(r"<script>(.*?)</script>", (site / "index.html").read_text(), re.S).group(1)
    assert len(script) < 5000


def test_every_class_of_the_pages_is_styled(real, clone, tmp_path):
    """The pages use the report's style sheet and their own; a class that is renamed in one of them is found here."""
    unstyled = {"sides", "failed", "board"}  # hooks of scripts, and of rules that need nothing of their own
    write_site([real, clone("b", lambda results, index: index.update(seed=5)), tmp_path / "gone"], tmp_path / "site")
    for file in (tmp_path / "site").rglob("*.html"):
        page = page_of(file)
        css = re.search(r"<style>(.*?)</style>", file.read_text(encoding="utf-8"), re.S).group(1)
        used = {name for _, attrs in page.tags for name in (attrs.get("class") or "").split()}
        assert not {name for name in used - unstyled if f".{name}" not in css}


def test_reports_are_linked_where_they_lie_and_copied_on_request(real, tmp_path):
    beside = real.parent / "site"
    write_site([real], beside)
    (page, *_) = sorted(beside.glob("*/*.html"))
    link = next(link for link in page_of(page).links() if link.endswith("report.html"))
    assert (page.parent / link).resolve() == (real / "report.html").resolve()
    assert not write_site([real, beside], beside).left_out  # `runs/*` holds the site too
    write_site([real], tmp_path / "far")
    assert not any("report" in link for f in (tmp_path / "far").rglob("*.html") for link in page_of(f).links())
    write_site([real], tmp_path / "far", with_reports=True)
    assert (tmp_path / "far" / "reports" / "first.html").read_text() == "<p>the report</p>"
    assert any("reports/first.html" in link for f in (tmp_path / "far").glob("*/*.html") for link in page_of(f).links())


def _in_browser(file, script, tmp_path):
    """The page's DOM after a script."""
    page = tmp_path / "driven.html"
    text = file.read_text(encoding="utf-8").replace("</body>", f"<script>{script}</script></body>")
    page.write_text(text, encoding="utf-8")
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--virtual-time-budget=4000",
    ]
    command = [CHROMIUM, *flags, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_tables_sort_and_filter_in_a_browser(real, clone, tmp_path):
    site = tmp_path / "site"
    write_site([real, clone("unattacked", _without("pgd Linf 0.1"))], site)
    script = """
      const heads = [...document.querySelectorAll('.ranking thead th')];
      const column = heads.findIndex((h) => h.textContent.startsWith('clean ECE'));
      const values = () => [...document.querySelectorAll('.ranking tbody tr')].map((r) => r.cells[column].dataset.value);
      const shown = () => [...document.querySelectorAll('.ranking tbody tr')].filter((r) => !r.hidden).length;
      const out = {};
      heads[column].querySelector('button').click();
      out.up = values().map(Number); out.sort = heads[column].getAttribute('aria-sort');
      heads[column].querySelector('button').click();
      out.down = values().map(Number); out.said = document.getElementById('said').textContent;
      const robust = heads.findIndex((h) => h.dataset.threat === 'Linf 0.1');
      heads[robust].querySelector('button').click(); heads[robust].querySelector('button').click();
      out.last = [...document.querySelectorAll('.ranking tbody tr')].map((r) => r.cells[robust].dataset.value !== undefined);
      const set = (id, value, kind) => { const e = document.getElementById(id); e.value = value;
        e.dispatchEvent(new Event(kind, {bubbles: true})); };
      set('text', 'UNATTACKED stand', 'input'); out.text = shown();
      set('text', '', 'input'); set('threat', 'Linf 0.1', 'change'); out.threat = shown();
      out.count = document.getElementById('shown').textContent;
      document.body.innerHTML = '<pre>' + JSON.stringify(out) + '</pre>';
    """
    dom = _in_browser(site / "index.html", script, tmp_path)
    out = json.loads(html.unescape(re.search(r"<pre>(.*?)</pre>", dom, re.S).group(1)))
    assert out["sort"] == "ascending"  # of what is better low, the best first
    assert out["up"] == sorted(out["up"])
    assert out["down"] == sorted(out["down"], reverse=True)
    assert out["said"].startswith("sorted by clean ECE")
    assert out["said"].endswith("descending")
    assert out["last"] == [True, True, False, False]  # what was not measured is last in both directions
    assert (out["text"], out["threat"], out["count"]) == (1, 2, "2 of 4 models")


def _axe():
    found = [Path(os.environ[k]) for k in ("RBX_AXE",) if k in os.environ]
    found.append(Path(__file__).parents[2] / "node_modules" / "axe-core" / "axe.min.js")
    return next((file for file in found if file.is_file()), None)


@pytest.mark.skipif(CHROMIUM is None or _axe() is None, reason="needs chromium and axe-core (RBX_AXE)")
def test_axe_finds_nothing(real, clone, tmp_path):
    site = tmp_path / "site"
    write_site([real, clone("b", lambda results, index: index.update(seed=5)), tmp_path / "missing"], site)
    run = "axe.run().then((r) => { document.body.innerHTML = '<pre>' + JSON.stringify(r.violations.map((v) => [v.id, v.nodes.map((n) => n.html)])).replace(/</g, '&lt;') + '</pre>'; });"  # noqa: E501
    for file in (site / "index.html", sorted(site.glob("*/*.html"))[0]):
        dom = _in_browser(
            file, _axe().read_text(encoding="utf-8").replace("</script", "<\\/script") + ";" + run, tmp_path
        )
        assert json.loads(html.unescape(re.search(r"<pre>(.*?)</pre>", dom, re.S).group(1))) == [], file
