"""`rbx export`: badge, model-index, RobustBench, CSV; refusals; file names; equal bytes."""

import csv
import io
import json
import math
import re
import shutil
import xml.etree.ElementTree as ET

import pytest
import yaml
from typer.testing import CliRunner

from reports import badge
from reports.badge import render_badge
from reports.csv_table import render_csv
from reports.markdown import render_markdown
from reports.model_index import HUB, render_model_index
from reports.names import safe_name
from reports.robustbench import MEMBERS, PARAMETERS, render_robustbench
from robustbench_ext.cli.main import app
from robustbench_ext.engine import run_suite
from robustbench_ext.errors import ConfigError
from robustbench_ext.results import Finding, RunResults
from tests.reports.synthetic import EVIL, synthetic

HOSTILE = (
    "../../x",
    "/etc/passwd",
    "..",
    ".",
    "",
    "a/b",
    "a\\b",
    "CON",
    "nul.txt",
    "-rf",
    ".hidden",
    "a\x00b",
    "x" * 300,
    *EVIL,
)


def rbx(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture
def run(tmp_path):
    """A run folder with two models."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "results.json").write_text(synthetic(["a", "b"]).to_json())
    return folder


def cifar(norm="Linf", eps=8 / 255, n=10_000, **changed):
    """A run by RobustBench's protocol; `changed` are parameters of the attack."""
    results = synthetic(["a"], attacks=1, corruptions=0)
    results.data |= {
        "name": "torchvision:CIFAR10",
        "shape": [3, 32, 32],
        "splits": {"test": {"n": n, "fingerprint": "f"}},
    }
    results.suite["n"] = n
    label = f"standard {norm}"
    for condition in results.conditions:
        if condition["kind"] == "attack":
            old, condition["label"] = condition["label"], label
            condition |= {"attack": "standard", "norm": norm, "eps": eps, "members": list(MEMBERS)}
            condition["parameters"] = {**PARAMETERS, **changed}
    for row in results.results:
        row.n = n
        row.condition = label if row.condition == old else row.condition
    return results


class TestFileNames:
    @pytest.mark.parametrize("name", HOSTILE)
    def test_a_name_stays_in_its_folder(self, name, tmp_path):
        safe = safe_name(name)
        assert re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", safe), safe
        assert len(safe) <= 80
        assert not re.match(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\.|$)", safe)
        file = (tmp_path / safe).resolve()
        assert file.parent == tmp_path.resolve()
        file.write_text("x")

    def test_names_do_not_meet(self):
        names = [*HOSTILE, "a-b", "a b", "a_b", "A", "trades", "net.v2"]
        assert len({safe_name(name) for name in names}) == len(set(names))
        assert [safe_name(n) for n in ("trades", "net.v2", "a_b")] == ["trades", "net.v2", "a_b"]

    @pytest.mark.parametrize("name", HOSTILE)
    def test_no_export_leaves_the_folder_of_the_run(self, name, tmp_path):
        folder = tmp_path / "deep" / "run"
        folder.mkdir(parents=True)
        results = cifar()
        text = results.to_json().replace(': "a"', f": {json.dumps(name)}")
        (folder / "results.json").write_text(text)
        for to in ("badge", "model-index", "robustbench", "latex", "markdown", "csv"):
            done = rbx("export", folder, "--to", to)
            assert done.exit_code == 0, (done.output, done.exception)
        outside = [f for f in tmp_path.rglob("*") if f.is_file() and not f.is_relative_to(folder)]
        assert outside == []
        assert len(list((folder / "exports").glob("*.*"))) == 5


class TestBadge:
    def test_the_number_with_its_interval(self):
        svg = render_badge(synthetic(["a", "b"]), "a")
        root = ET.fromstring(svg)
        texts = [e.text for e in root.iter("{http://www.w3.org/2000/svg}text")]
        row = synthetic(["a", "b"]).find(model="a", condition="worst case Linf 8/255", metric="robust_accuracy")[0]
        value = f"{100 * row.value:.1f} % [{100 * row.ci_low:.1f}, {100 * row.ci_high:.1f}]"
        assert texts == ["robust accuracy Linf 8/255", value]
        title = root.find("{http://www.w3.org/2000/svg}title").text
        assert (
            title == root.get("aria-label") == f"robust accuracy Linf 8/255: {value} (a on mnist5k, n = 1000, Wilson)"
        )
        assert "http" not in svg.replace("http://www.w3.org/2000/svg", "")

    def test_another_axis(self):
        assert "clean accuracy" in render_badge(synthetic(["a"]), "a", "clean accuracy")
        with pytest.raises(ConfigError, match="Did you mean 'clean accuracy'"):
            render_badge(synthetic(["a"]), "a", "clean acuracy")

    def test_a_model_that_failed_has_no_number(self):
        results = synthetic(["a", "b"])
        results.doubts = [Finding(model="a", name="gradients", status="fail", message="zero")]
        failed, other = render_badge(results, "a"), render_badge(results, "b")
        assert "not to be trusted" in failed
        assert badge.GREY in failed and badge.SOUND not in failed
        assert " % [" not in failed
        assert badge.SOUND in other and "not to be trusted" not in other
        results.doubts[0].status = "doubt"
        doubted = render_badge(results, "a")
        assert " · doubts" in doubted and badge.DOUBTFUL in doubted and " % [" in doubted

    def test_what_is_undefined_is_inconclusive(self):
        results = synthetic(["a"])
        for row in results.results:
            row.value = row.ci_low = row.ci_high = None
        svg = render_badge(results, "a")
        assert "inconclusive" in svg and badge.GREY in svg

    @pytest.mark.parametrize("colour", [badge.LABEL, badge.SOUND, badge.DOUBTFUL, badge.GREY])
    def test_contrast(self, colour):
        def linear(part):
            c = int(part, 16) / 255
            return c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4

        r, g, b = (linear(colour[i : i + 2]) for i in (1, 3, 5))
        assert 1.05 / (0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05) >= 5.9  # white on it, WCAG 2

    @pytest.mark.parametrize("name", HOSTILE)
    def test_hostile_names(self, name):
        text = synthetic(["a"]).to_json().replace(': "a"', f": {json.dumps(name)}")
        root = ET.fromstring(render_badge(RunResults.model_validate_json(text), name))
        assert {e.tag.partition("}")[2] for e in root.iter()} == {"svg", "title", "clipPath", "rect", "g", "text"}


class TestModelIndex:
    def test_values_intervals_and_protocol(self):
        text, left = render_model_index(cifar(), "a")
        assert left == []
        (entry,) = yaml.safe_load(text)["model-index"]
        (result,) = entry["results"]
        assert entry["name"] == "a"
        assert result["task"]["type"] == "image-classification"
        assert {k: result["dataset"][k] for k in ("type", "config", "split")} == {
            "type": "uoft-cs/cifar10",
            "config": "plain_text",
            "split": "test",
        }
        assert result["dataset"]["args"]["samples"] == "the whole split"
        clean, robust = result["metrics"][:2]
        assert (clean["type"], clean["value"]) == ("accuracy", pytest.approx(0.9))
        assert (clean["args"]["ci_low"], clean["args"]["n"]) == (pytest.approx(0.87), 10_000)
        assert robust["type"] == "robust_accuracy"
        assert robust["args"]["norm"] == "Linf" and robust["args"]["eps"] == 8 / 255

    def test_the_hub_reads_it(self):
        hub = pytest.importorskip("huggingface_hub")
        text, _ = render_model_index(cifar(), "a")
        card = hub.ModelCard(f"---\n{text}---\n# a\n")
        assert card.data.model_name == "a"
        first = card.data.eval_results[0]
        assert isinstance(first, hub.EvalResult)
        assert (first.dataset_type, first.dataset_split, first.metric_type) == ("uoft-cs/cifar10", "test", "accuracy")
        assert first.metric_args["ci_level"] == 0.95
        again = hub.ModelCard(str(card)).data.eval_results  # what the Hub's own library would push
        assert again == card.data.eval_results

    def test_a_part_of_the_split_says_so(self):
        results = cifar(n=1000)
        results.data["splits"]["test"]["n"] = 10_000
        text, _ = render_model_index(results, "a")
        args = yaml.safe_load(text)["model-index"][0]["results"][0]["dataset"]["args"]
        assert args["n"] == 1000
        assert args["samples"].startswith("the first 1000 of 10000")

    def test_other_data_is_left_out(self):
        results = cifar()
        results.conditions.append({"label": "outliers letters", "kind": "outliers", "outliers": "letters"})
        like = results.results[0]
        results.results.append(
            like.model_copy(
                update={"condition": "outliers letters", "probe": "energy", "metric": "auroc", "value": 0.9}
            )
        )
        text, left = render_model_index(results, "a")
        assert left == ["AUROC letters (energy): it is about other data than CIFAR-10"]
        assert "roc_auc" not in text

    def test_refusals_list_every_difference(self):
        results = synthetic(["a"])
        results.doubts = [Finding(model="a", name="gradients", status="fail", message="zero")]
        results.data["task"] = "regression"
        with pytest.raises(ConfigError) as caught:
            render_model_index(results, "a")
        lines = str(caught.value).splitlines()
        assert [line.split(":")[0].strip() for line in lines[1:]] == ["- task", "- data", "- check gradients"]
        assert f"expected one of {', '.join(HUB)}, found mnist5k" in lines[2]

    def test_doubts_go_with_the_number(self):
        results = cifar()
        results.doubts = [Finding(model="a", name="still climbing", status="doubt", message="more steps")]
        metric = yaml.safe_load(render_model_index(results, "a")[0])["model-index"][0]["results"][0]["metrics"][0]
        assert metric["args"]["doubts"] == ["still climbing: more steps"]

    @pytest.mark.parametrize("name", HOSTILE)
    def test_hostile_names(self, name):
        text = cifar().to_json().replace(': "a"', f": {json.dumps(name)}")
        text, _ = render_model_index(RunResults.model_validate_json(text), name)
        read = yaml.safe_load(text)
        assert list(read) == ["model-index"]
        assert read["model-index"][0]["name"] == name


class TestRobustBench:
    FIELDS = (
        *(
            "link",
            "name",
            "authors",
            "additional_data",
            "number_forward_passes",
            "dataset",
            "venue",
            "architecture",
            "eps",
        ),
        *("clean_acc", "reported", "autoattack_acc", "unreliable"),
    )

    def test_an_entry_has_their_fields_in_their_form(self):
        about = {
            "link": "https://arxiv.org/abs/1",
            "authors": "A",
            "additional_data": False,
            "number_forward_passes": 1,
        }
        text, norm, unknown = render_robustbench(cifar(), "a", about=about)
        entry = json.loads(text)
        assert tuple(entry) == self.FIELDS
        assert norm == "Linf"
        assert (entry["dataset"], entry["eps"]) == ("cifar10", "8/255")
        assert (entry["clean_acc"], entry["autoattack_acc"]) == ("90.00", "89.80")
        assert entry["unreliable"] is False and entry["additional_data"] is False
        assert entry["venue"] is None and entry["reported"] is None
        assert unknown == ["name", "venue", "architecture", "reported"]

    def test_l2(self):
        text, norm, _ = render_robustbench(cifar("L2", 0.5), "a")
        assert (norm, json.loads(text)["eps"]) == ("L2", "0.5")

    def test_our_standard_ensemble_is_theirs(self):
        """The published version: four attacks, 100 steps, 9 targets, 5,000 queries, one restart each."""
        from robustbench_ext.catalog import ATTACKS
        from robustbench_ext.conditions import UnderAttack

        attack = ATTACKS.load("standard")(eps=8 / 255, norm="Linf")
        facts = UnderAttack("standard Linf", attack).facts()
        assert facts["members"] == MEMBERS
        assert facts["parameters"] == PARAMETERS
        ce, t, fab, square = attack.attacks
        assert (ce.steps, ce.restarts, ce.loss, ce.rho) == (100, 1, "ce", 0.75)
        assert (t.steps, t.restarts, t.targets, t.loss) == (100, 1, 9, "dlr")
        assert (fab.steps, fab.targets, fab.alpha_max, fab.eta, fab.beta) == (100, 9, 0.1, 1.05, 0.9)
        assert (square.queries, square.restarts, square.p_init) == (5000, 1, 0.8)

    @pytest.mark.parametrize(
        ("change", "told"),
        [
            (lambda r: r.suite.update(n=1000), "samples: expected 10000, found 1000"),
            (
                lambda r: r.data["splits"]["test"].update(n=9000),
                "test split: expected 10000 samples, found 9000 samples",
            ),
            (lambda r: r.data.update(name="npz:cifar.npz"), "found npz:cifar.npz"),
            (lambda r: r.data.update(name="folder:imagenet"), "its 5,000 images are a list of files"),
            (lambda r: attack(r).update(eps=4 / 255), "eps: expected 8/255, found 4/255"),
            (lambda r: attack(r).update(attack="audited"), "attack: expected standard Linf 8/255"),
            (lambda r: attack(r).update(members=["apgd-ce"]), "members of the attack: expected"),
            (lambda r: attack(r)["parameters"].update(steps=50), "attack, steps: expected 100, found 50"),
            (lambda r: attack(r)["parameters"].update(draws=2), "attack, draws: expected 1, found 2"),
            (lambda r: attack(r)["parameters"].pop("queries"), "attack, queries: expected 5000, found not given"),
            (lambda r: attack(r)["parameters"].update(new=1), "attack, new: expected not given, found 1"),
            (lambda r: finding(r, "determinism", "doubt"), "check determinism: expected pass, found doubt"),
            (lambda r: finding(r, "labels", "fail"), "check labels: expected pass, found fail"),
            (lambda r: [setattr(x, "n", 500) for x in r.results], "samples of clean: expected 10000, found 500"),
            (lambda r: [setattr(x, "value", None) for x in r.results], "clean: expected a value, found none"),
        ],
    )
    def test_any_difference_is_told(self, change, told):
        results = cifar()
        assert render_robustbench(results, "a")
        change(results)
        with pytest.raises(ConfigError, match="not RobustBench's protocol") as caught:
            render_robustbench(results, "a")
        assert any(line.startswith("  - ") and told in line for line in str(caught.value).splitlines()), caught.value

    def test_cifar100_has_no_l2_board(self):
        results = cifar("L2", 0.5)
        results.data["name"] = "torchvision:CIFAR100"
        with pytest.raises(ConfigError, match="norm: expected Linf, found L2"):
            render_robustbench(results, "a")

    def test_doubts_make_it_unreliable(self):
        results = cifar()
        finding(results, "still climbing", "doubt")
        entry = json.loads(render_robustbench(results, "a")[0])
        assert entry["unreliable"] is True
        assert entry["footnote"] == "still climbing: why"

    def test_unknown_fields_and_two_norms(self):
        with pytest.raises(ConfigError, match="Did you mean 'venue'"):
            render_robustbench(cifar(), "a", about={"venu": "x"})
        results = cifar()
        results.conditions.append({**attack(results), "label": "standard L2", "norm": "L2", "eps": 0.5})
        with pytest.raises(ConfigError, match="--norm"):
            render_robustbench(results, "a")
        assert render_robustbench(results, "a", "Linf")[1] == "Linf"


def attack(results):
    return next(c for c in results.conditions if c.get("attack") == "standard")


def finding(results, name, status):
    results.preflight.append(Finding(model="a", name=name, status=status, message="why"))


class TestCSV:
    def test_the_rows_of_results(self):
        results = synthetic(["a", "b"])
        rows = list(csv.DictReader(io.StringIO(render_csv(results))))
        assert len(rows) == len(results.results)
        assert all(math.isclose(float(r["value"]), x.value) for r, x in zip(rows, results.results, strict=True))

    @pytest.mark.parametrize("name", ["=HYPERLINK(1)", "+1", "-1", "@SUM(1)", "a,b", 'a"b', "a\nb"])
    def test_no_name_is_a_formula(self, name):
        rows = list(csv.reader(io.StringIO(render_csv(synthetic([name])))))
        assert {len(row) for row in rows} == {len(rows[0])}
        assert rows[1][0] == (f"'{name}" if name[0] in "=+-@" else name)
        assert not any(cell.startswith(("=", "@")) for row in rows for cell in row)


class TestCommand:
    def test_default_places(self, run):
        assert rbx("export", run, "--to", "badge", "--model", "a").output.strip() == str(
            run / "exports" / "badge-a.svg"
        )
        assert rbx("export", run, "--to", "latex").exit_code == 0
        assert (run / "exports" / "latex" / "headline.tex").is_file()

    def test_out(self, run, tmp_path):
        file = tmp_path / "new" / "b.svg"
        assert rbx("export", run / "results.json", "--to", "badge", "--model", "a", "--out", file).exit_code == 0
        assert ET.parse(file)
        assert rbx("export", run, "--to", "markdown", "--out", tmp_path).exit_code == 0
        assert (tmp_path / "report.md").read_text() == rbx("export", run, "--to", "markdown", "--out", "-").output
        assert rbx("export", run, "--to", "latex", "--out", file).exception.args[0].startswith("--out")

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("--to", "pdf"), "unknown format 'pdf'"),
            (("--to", "badge"), "name one with --model: a, b"),
            (("--to", "badge", "--model", "c"), "unknown model 'c'"),
            (("--to", "csv", "--model", "a"), "--model belongs to"),
            (("--to", "csv", "--axis", "x"), "--axis belongs to --to badge"),
            (("--to", "badge", "--set", "link=x"), "--set belongs to --to robustbench"),
            (("--to", "robustbench", "--model", "a"), "not RobustBench's protocol"),
            (("--to", "model-index", "--model", "a"), "no model-index can be written"),
        ],
    )
    def test_refusals(self, run, arguments, message):
        done = rbx("export", run, *arguments)
        assert isinstance(done.exception, ConfigError)  # exit code 2, by the entry point
        assert message in str(done.exception)
        assert not (run / "exports").exists()

    def test_exit_code_and_lines_of_a_refusal(self, run, monkeypatch, capsys):
        from robustbench_ext.cli.main import run as entry

        monkeypatch.setattr("sys.argv", ["rbx", "export", str(run), "--to", "robustbench", "--model", "a"])
        with pytest.raises(SystemExit) as caught:
            entry()
        assert caught.value.code == 2
        lines = capsys.readouterr().err.splitlines()
        assert sum(line.startswith("  - ") for line in lines) == 3  # data, samples, attack

    def test_a_folder_without_results(self, tmp_path):
        assert "no results.json" in str(rbx("export", tmp_path, "--to", "csv").exception)
        (tmp_path / "results.json").write_text('{"schema_version": 1}')
        assert "does not keep the schema" in str(rbx("export", tmp_path, "--to", "csv").exception)
        assert "needs a run folder" in str(rbx("export", "--to", "csv").exception)

    def test_what_a_run_cannot_know(self, tmp_path):
        (tmp_path / "results.json").write_text(cifar().to_json())
        done = rbx(
            "export", tmp_path, "--to", "robustbench", "--set", "link=https://x.example", "--set", "additional_data=no"
        )
        assert done.exit_code == 0
        entry = json.loads((tmp_path / "exports" / "robustbench-Linf-a.json").read_text())
        assert (entry["link"], entry["additional_data"]) == ("https://x.example", False)


def test_equal_records_give_equal_bytes(finished, tiny_suite, tmp_path):
    """Measured again from a copy of the records, and rendered again."""
    first, again = finished[0], tmp_path / "again"
    shutil.copytree(first, again)
    for name in ("results.json", "results.csv", "gallery.json", "index.json"):
        (again / name).unlink(missing_ok=True)
    run_suite(tiny_suite, again)
    for folder in (first, again):
        markdown = render_markdown(RunResults.read(folder / "results.json"))
        (tmp_path / f"{folder.name}.md").write_text(markdown)
        assert rbx("export", folder, "--to", "latex", "--out", tmp_path / "latex" / folder.name).exit_code == 0
    assert (tmp_path / f"{first.name}.md").read_bytes() == (tmp_path / "again.md").read_bytes()
    for name in ("results.csv", "results.json", "gallery.json", "index.json"):
        assert (first / name).read_bytes() == (again / name).read_bytes(), name
    one, other = (sorted((tmp_path / "latex" / folder.name).iterdir()) for folder in (first, again))
    assert [(f.name, f.read_bytes()) for f in one] == [(f.name, f.read_bytes()) for f in other]
