"""Corruptions and domains in a run: conditions, records, summaries, the report."""

import numpy as np
import pytest
import torch
from torch import nn

from reports import tables
from robustbench_ext.conditions import parse_conditions
from robustbench_ext.data import load_dataset
from robustbench_ext.data.base import ArraySplit
from robustbench_ext.data.corruptions.levels import FIFTEEN
from robustbench_ext.engine import run_suite
from robustbench_ext.errors import ConfigError
from robustbench_ext.measure import CORRUPTIONS, DOMAINS
from robustbench_ext.results import RunResults

NET = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(3 * 8 * 8, 10))
"""


@pytest.fixture(scope="module")
def shifted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shifted")
    (folder / "net.py").write_text(NET)
    suite = {
        "schema": 1,
        "name": "shifted",
        "data": "digits-dg:optical",
        "n": 80,
        "chunk_size": 60,
        "models": [{"name": "net", "spec": f"{folder / 'net.py'}:build"}],
        "conditions": [
            {"domain": ["digits-dg:mnist", "digits-dg:fonts"]},
            {"corruption": ["contrast", "pixelate"], "severity": [1, 5]},
        ],
        "detectors": ["msp"],
        "uq": ["temperature"],
    }
    return folder, suite, run_suite(suite, folder / "run")


def accuracy(spec, n, folder):
    namespace = {}
    exec(NET, namespace)
    split = load_dataset(spec)["test"].take(n)
    with torch.no_grad():
        logits = namespace["build"]().eval()(split.images(slice(None)))
    return (logits.argmax(1).numpy() == split.labels).astype(float)


def test_domains_are_measured_on_their_own_samples(shifted):
    folder, _, summary = shifted
    assert not summary.failures
    for spec in ("digits-dg:mnist", "digits-dg:fonts"):
        (row,) = summary.results.find(condition=f"domain {spec}", metric="accuracy", probe="classifier", group=None)
        assert row.value == pytest.approx(accuracy(spec, 80, folder).mean()) and row.n == 80
        assert summary.results.find(condition=f"domain {spec}", metric="ece", probe="temperature")
        assert summary.results.find(condition=f"domain {spec}", metric="auroc", probe="msp")


def test_means_and_the_worst_are_over_conditions(shifted):
    _, _, summary = shifted

    def value(condition, metric="accuracy"):
        rows = summary.results.find(condition=condition, metric=metric, probe="classifier")
        return next(row for row in rows if metric != "accuracy" or row.group is None)

    domains = [value(f"domain digits-dg:{d}").value for d in ("mnist", "fonts")]
    assert value(DOMAINS, "mean_accuracy").value == pytest.approx(np.mean(domains))
    worst = value(DOMAINS, "worst_domain_accuracy")
    assert worst.value == pytest.approx(min(domains))
    assert worst.group == f"domain digits-dg:{('mnist', 'fonts')[int(np.argmin(domains))]}"
    corrupted = [value(f"{c} {s}").value for c in ("contrast", "pixelate") for s in (1, 5)]
    mean = value(CORRUPTIONS, "mean_accuracy")
    assert mean.value == pytest.approx(np.mean(corrupted)) and mean.ci_low < mean.value < mean.ci_high and mean.n == 80


def test_the_report_has_a_table_of_each(shifted):
    from reports import tables, write_reports

    folder, _, _ = shifted
    write_reports(folder / "run")
    page = (folder / "run" / "report.html").read_text()
    assert "Accuracy on other domains" in page and "Trade-offs" in page
    assert "all domains: worst domain" in page and "all corruptions: mean accuracy" in page
    results = RunResults.read(folder / "run" / "results.json")
    headline = tables.headline(results)
    heads = [column.title for column in headline.columns]
    ((_, cells),) = headline.rows
    for title in ("4 corruptions, % ↑", "2 domains, % ↑", "worst domain, % ↑"):
        assert cells[heads.index(title)].value is not None, title


def test_labels_levels_and_sets():
    found = parse_conditions(
        [{"corruption": "fifteen", "severity": [2, 4]}, {"corruption": "spatter", "levels": "cifar-c"}]
    )
    assert len(found) == 1 + 30 + 5 and found[1].label == "gaussian-noise 2" and found[-1].spec()["levels"] == "cifar-c"
    small, large = (
        parse_conditions([{"corruption": "fog", "severity": 1, "levels": v}])[1] for v in ("cifar-c", "imagenet-c")
    )
    assert small.spec() != large.spec()
    x = torch.full((1, 1, 28, 28), 0.5)
    given = (nn.Identity(), x, torch.zeros(1, dtype=torch.long), np.array(["a"]), 0, None, 1)
    assert not torch.equal(small.apply(*given).x, large.apply(*given).x)
    for entry, said in (
        ({"corruption": "fog", "levels": "mnist-c"}, "imagenet-c, cifar-c"),
        ({"corruption": ["fog", "mist"]}, "unknown corruption 'mist'"),
        ({"domain": "digits-dg:fonts", "severity": 1}, "severity"),
    ):
        with pytest.raises(ConfigError, match=said):
            parse_conditions([entry])


def test_a_domain_of_other_classes_is_refused(shifted, tmp_path):
    _, suite, _ = shifted
    with pytest.raises(ConfigError, match="same classes in the same order"):
        run_suite({**suite, "conditions": [{"domain": "mnist5k"}]}, tmp_path)


def test_published_folders_are_conditions(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    folder = tmp_path / "CIFAR-10-C"
    folder.mkdir()
    images = rng.integers(0, 256, (50_000, 32, 32, 3), dtype=np.uint8)
    labels = np.tile(np.arange(10_000) % 10, 5)
    np.save(folder / "fog.npy", images)
    np.save(folder / "labels.npy", labels)
    monkeypatch.setenv("RBX_DATA", str(tmp_path))
    index = [7, 3, 9999]
    ids = [f"CIFAR10:test:{i:06d}" for i in index]
    clean = ArraySplit(np.zeros((3, 3, 32, 32), np.float32), np.array(index) % 10, ids)
    (condition,) = parse_conditions([{"corruption": "cifar10c:fog", "severity": 2}])[1:]
    split = condition.samples({"test": clean}, "test", 2)
    assert split.ids.tolist() == ids[:2] and condition.label == "fog 2" and condition.kind == "corruption"
    expected = torch.from_numpy(images[[10_007, 10_003]]).permute(0, 3, 1, 2) / 255
    assert torch.allclose(split.images(slice(None)), expected)
    with pytest.raises(ConfigError, match="cifar10c"):
        parse_conditions([{"corruption": "cifar10-c:fog"}])


def test_all_fifteen_give_the_mean_corruption_error_and_baselines(shifted, tmp_path):
    folder, suite, _ = shifted
    (folder / "other.py").write_text(NET.replace("manual_seed(0)", "manual_seed(1)"))
    few = {**suite, "n": 20, "conditions": [{"corruption": "fifteen"}], "detectors": [], "uq": []}
    few["models"] = [*suite["models"], {"name": "other", "spec": f"{folder / 'other.py'}:build"}]
    results = run_suite({**few, "baseline": "net"}, tmp_path).results
    # AlexNet's errors are known for ImageNet-C only; the named baseline's are those of its own cells.
    assert {row.against for row in results.find(metric="corruption_mce")} == {"net"}
    for model in ("net", "other"):
        one = {m: results.find(model=model, metric=m)[0] for m in ("mean_corruption_error", "mean_accuracy")}
        assert one["mean_corruption_error"].value == pytest.approx(1 - one["mean_accuracy"].value)
        clean = results.find(model=model, condition="clean", metric="accuracy", group=None)[0].value
        (drop,) = results.find(model=model, metric="accuracy_drop")
        assert drop.value == pytest.approx(clean - one["mean_accuracy"].value)
    (mine,) = results.find(model="net", metric="corruption_mce")
    assert mine.value == 1.0
    errors = {
        m: [
            sum(
                1 - results.find(model=m, condition=f"{c} {s}", metric="accuracy", group=None)[0].value
                for s in range(1, 6)
            )
            for c in FIFTEEN
        ]
        for m in ("net", "other")
    }
    (other,) = results.find(model="other", metric="corruption_mce")
    assert other.value == pytest.approx(np.mean(np.array(errors["other"]) / errors["net"]))
    table = tables.corruptions(results)
    assert [name for name, _ in table.rows if "against net" in name][0] == "all corruptions: mCE against net"
    with pytest.raises(ConfigError, match="baseline 'nobody'"):
        run_suite({**few, "baseline": "nobody"}, tmp_path)
