"""Detectors in suites: the ones that read inputs or choose parameters, thresholds, kinds of unknown inputs, comparisons."""

import shutil

import numpy as np
import pytest
import torch

from detectors import ODIN, Mahalanobis
from detectors.validation import with_attack
from reports import tables
from robustbench_ext import detection_rows
from robustbench_ext.attacks import build_attack
from robustbench_ext.axes import axes
from robustbench_ext.conditions import is_available, parse_conditions
from robustbench_ext.data import load_dataset
from robustbench_ext.engine import run_suite
from robustbench_ext.errors import ConfigError
from robustbench_ext.evaluate import Cell, Context
from robustbench_ext.probes import parse_probes, scorer
from robustbench_ext.suite import bundled_suites, load_suite, validate_suite
from robustbench_ext.validation import condition_of, held_out

MAHALANOBIS = {
    "name": "mahalanobis",
    "layers": ["relu_1", "penultimate"],
    "eps": [0.0, 0.005],
    "validate": {"attack": "fgsm", "eps": 0.2},
}


def suite_of():
    recipe = {"epochs": 4, "eps": 0.1, "validation_n": 50}
    return {
        "schema": 1,
        "name": "detected",
        "data": "digits",
        "n": 120,
        "chunk_size": 60,
        "models": [{"name": "standard", "train": {"defense": "standard", "recipe": recipe}}],
        "conditions": [
            {"attack": "pgd", "eps": 0.15, "steps": 10, "stop": "never"},
            {"corruption": "gaussian-noise", "severity": 5},
            {"outliers": ["symbols", "uniform-noise"], "n": 60},
            {"outliers": "letters", "n": 60, "distance": "far"},
        ],
        "detectors": ["msp", "odin", MAHALANOBIS, "pytorch-ood:MaxLogit"],
        "uq": [],
    }


@pytest.fixture(scope="module")
def detected(tmp_path_factory):
    folder, suite = tmp_path_factory.mktemp("detected"), suite_of()
    return folder, suite, run_suite(suite, folder)


def test_every_detector_has_every_row_under_every_condition(detected):
    _, _, summary = detected
    assert not summary.failures
    results = summary.results
    labels = ["msp", "odin", "mahalanobis", "pytorch-ood:MaxLogit"]
    conditions = [c["label"] for c in results.conditions if c["kind"] in ("attack", "corruption", "outliers")]
    assert len(conditions) == 5
    for probe in labels:
        assert len(results.find(condition="clean", probe=probe, metric="false_alarms")) == 1
        for condition in conditions:
            rows = {r.metric: r for r in results.find(condition=condition, probe=probe)}
            expected = {"auroc", "aupr_out", "aupr_in", "fpr95", "tnr95", "detection_accuracy", "alarms"}
            assert expected <= set(rows)
            assert ("auroc_gain" in rows) == ("auroc_gain_p" in rows) == (probe != "msp")
            if probe != "msp":
                base = results.find(condition=condition, probe="msp", metric="auroc")[0]
                assert rows["auroc_gain"].value == pytest.approx(rows["auroc"].value - base.value, abs=1e-12)
                assert rows["auroc_gain"].against == "msp"
                assert 0 <= rows["auroc_gain_p"].value <= 1
            assert ("aurc" in rows) == (not condition.startswith("outliers"))
    accuracy = results.find(condition="clean", metric="accuracy", group=None, probe="classifier")[0]
    for probe in labels:
        (found,) = results.find(condition="clean", probe=probe, metric="aurc")
        assert 0 <= found.value <= 1 and found.n == accuracy.n


def test_scores_in_records_equal_those_of_the_library(detected):
    """ODIN and the validated ensemble, fitted by hand on what the suite says."""
    folder, suite, _ = detected
    context = Context(validate_suite(suite), folder)
    model, data = context.model("standard").module, load_dataset("digits")
    x = data["test"].images(slice(0, 60))
    cell = Cell("standard", "clean", "test", 0)

    def stored(label, cell=cell):
        return context.store.load(context.probe_key(cell, context.probe(label)))["score"]

    np.testing.assert_allclose(stored("odin"), ODIN().score_inputs(model, x).numpy(), rtol=1e-6)
    calibration, train = data["calibration"], data["train"]
    rows = np.arange(0, len(calibration), 2)
    validation = with_attack(
        model,
        calibration.images(rows),
        torch.from_numpy(calibration.labels[rows]),
        build_attack("fgsm", eps=0.2),
        calibration.ids[rows],
    )
    options = {k: v for k, v in MAHALANOBIS.items() if k != "name"}
    detector = Mahalanobis(**options).fit(
        model, train.images(slice(None)), torch.from_numpy(train.labels), validation=validation
    )
    np.testing.assert_allclose(stored("mahalanobis"), detector.score(x).numpy(), rtol=1e-4, atol=1e-6)
    # Under attack it is the attacked inputs that were scored, though they are stored nowhere.
    attacked = Cell("standard", "pgd Linf 0.15", "test", 0)
    inputs = context._inputs(attacked, suite.get("batch_size", 250)).x
    np.testing.assert_allclose(stored("odin", attacked), ODIN().score_inputs(model, inputs).numpy(), rtol=1e-6)
    assert not np.allclose(stored("odin", attacked), stored("odin"))


def test_a_detector_that_reads_inputs_can_be_added_later(detected, tmp_path):
    folder, suite, first = detected
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    keys = {p.name for p in (copy / "records").glob("*.npz")}
    more = {**suite, "detectors": [*suite["detectors"], "feature-squeezing"]}
    again = run_suite(more, copy)
    assert not again.failures
    cells = [c for c in Context(validate_suite(more), copy).cells("standard") if c.split != "train"]
    assert len({p.name for p in (copy / "records").glob("*.npz")} - keys) == len(cells)  # its scores and nothing else
    for probe in ("odin", "mahalanobis"):
        assert first.results.find(probe=probe) == again.results.find(probe=probe)
    assert run_suite(more, copy).computed == 0


@pytest.mark.slow
def test_workers_give_the_same_numbers(detected, tmp_path):
    folder, suite, _ = detected
    run_suite(suite, tmp_path, executor="local", workers=2)
    assert (tmp_path / "results.json").read_bytes() == (folder / "results.json").read_bytes()


def test_keys_name_what_parameters_were_chosen_on(detected):
    folder, suite, _ = detected
    cell = Cell("standard", "clean", "test", 0)

    def key(detector, **changes):
        context = Context(validate_suite({**suite, **changes, "detectors": ["msp", detector]}), folder)
        return context.probe_key(cell, context.probes[1])

    base = key(MAHALANOBIS)
    assert key(MAHALANOBIS) == base
    assert key({**MAHALANOBIS, "validate": {"attack": "fgsm", "eps": 0.1}}) != base
    assert key({**MAHALANOBIS, "eps": [0.0, 0.01]}) != base
    assert key(MAHALANOBIS, seed=1) != base
    outliers = {**MAHALANOBIS, "validate": {"outliers": "letters", "n": 80}}
    assert key(outliers) != base
    # Letters are shown by a condition, so others are chosen on; which ones is part of the key.
    assert key(outliers) != key(outliers, conditions=[{"outliers": "letters", "n": 70}])
    context = Context(validate_suite({**suite, "detectors": [outliers]}), folder)
    chosen = context.validation(context.probes[0]).unknown
    shown = context.samples(context.conditions["outliers letters"], "test")
    assert len(chosen) == 80 and not set(chosen.ids) & set(shown.ids)


def test_what_it_was_fitted_on_is_said(detected):
    _, _, summary = detected
    assert any("mahalanobis: fitted on fgsm Linf 0.2" in note for note in summary.results.notes)
    (model,) = summary.results.models
    assert {"rank relu_1", "rank penultimate", "eps", "weight relu_1"} <= set(model["fitted"]["mahalanobis"])


def test_thresholds_are_set_on_samples_that_were_not_chosen_on(detected):
    from robustbench_ext.measured import Tables
    from robustbench_ext.metrics import conformal

    folder, suite, summary = detected
    context = Context(validate_suite(suite), folder)
    found = Tables(context)
    n = len(load_dataset("digits")["calibration"])
    assert len(found.calibration("standard", "msp")) == n
    assert len(found.calibration("standard", "mahalanobis")) == len(held_out(n))
    for probe in ("msp", "mahalanobis"):
        clean = found.probe("standard", "clean", probe)["score"]
        expected = conformal.alarms(found.calibration("standard", probe), clean)
        (row,) = summary.results.find(condition="clean", probe=probe, metric="false_alarms")
        assert row.value == expected.value
        # At most 5 % on average over calibration and test sets; 120 samples may show up to 14 %.
        assert row.value < 0.14


def test_near_far_attacked_and_corrupted_are_kept_apart(detected):
    _, _, summary = detected
    assert tables.families(summary.results) == {
        "near outliers": ["outliers symbols"],
        "far outliers": ["outliers uniform-noise", "outliers letters"],  # the suite says so of letters
        "attacked inputs": ["pgd Linf 0.15"],
        "corrupted inputs": ["gaussian-noise 5"],
    }
    found = tables.detection(summary.results)
    assert [t.caption.rpartition("against ")[2] for t in found] == list(tables.families(summary.results))
    assert [len(t.rows) for t in found] == [4, 8, 4, 4]
    assert tables.abstaining(summary.results).rows


def test_what_cannot_be_attacked_by_gradient_is_said_before_the_run(tiny_suite, tmp_path):
    tiny_suite["detectors"] = ["odin"]
    tiny_suite["conditions"] = [{"attack": "adaptive", "eps": 0.1, "against": "odin"}]
    with pytest.raises(ConfigError, match="'odin' has no gradient"):
        run_suite(tiny_suite, tmp_path)
    with pytest.raises(ConfigError, match="has no gradient"):
        scorer(Mahalanobis(eps=0.01))


def test_faults_of_detectors_in_a_suite(tiny_suite, tmp_path):
    def refused(detector, message, **changes):
        with pytest.raises(ConfigError, match=message):
            Context(validate_suite({**tiny_suite, **changes, "detectors": [detector]}), tmp_path).validate()

    refused({**MAHALANOBIS, "validate": {"corruption": "gaussian-noise"}}, "one attack")
    refused({**MAHALANOBIS, "validate": {"outliers": ["letters", "photos"]}}, "one outlier set")
    refused({**MAHALANOBIS, "validate": {"attack": "fgsm", "eps": [0.1, 0.2]}}, "one attack")
    refused({"name": "mahalanobis", "layer": "relu"}, "unknown parameter 'layer'")
    refused("pytorch-ood:KNM", "Did you mean 'KNN'")
    refused("pytorchood:KNN", "Did you mean 'pytorch-ood'")
    with pytest.raises(ConfigError, match="an attack on a detector"):
        condition_of({"attack": "adaptive", "eps": 0.1, "against": "msp"})
    assert [p.label for p in parse_probes(["pytorch-ood:KNN", {"name": "pytorch-ood:KNN", "label": "k9"}], [])] == [
        "pytorch-ood:KNN",
        "k9",
    ]


def test_another_dataset_as_outliers(tmp_path):
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, size=(60, 12, 10, 3), dtype=np.uint8)
    np.savez(tmp_path / "other.npz", x=x, y=np.arange(60) % 3)
    spec = f"npz:{tmp_path / 'other.npz'}"
    (condition,) = parse_conditions([{"outliers": spec, "n": 8, "distance": "near"}])[1:]
    assert condition.facts() == {"outliers": spec, "distance": "near"}
    split = condition.samples(load_dataset("digits"), "test", None)
    images = split.images(slice(None))
    assert images.shape == (8, 1, 8, 8) and float(images.min()) >= 0 and float(images.max()) <= 1
    assert (split.labels == -1).all() and len(set(split.ids)) == 8
    grey = load_dataset(spec)["test"].images(slice(0, 8))
    assert float(images.mean()) == pytest.approx(
        float((grey * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1).mean()), abs=0.02
    )
    wider = parse_conditions([{"outliers": spec, "n": 8}])[1].samples(type("D", (), {"shape": (3, 8, 8)}), "test", None)
    assert wider.fingerprint() != split.fingerprint()
    assert not is_available({"outliers": "npz:nowhere.npz", "optional": True})
    assert is_available({"outliers": spec, "optional": True})
    assert is_available({"outliers": "npz:nowhere.npz"})  # not optional: loading it will say what is wrong
    with pytest.raises(ConfigError, match="near or far"):
        parse_conditions([{"outliers": "letters", "distance": "close"}])


def test_bundled_suites_of_detection_are_valid():
    for name in ("ood", "ood-cifar10", "ood-cifar100", "ood-imagenet"):
        assert name in bundled_suites()
        suite = load_suite(name)
        parse_probes(suite.detectors, suite.uq)
        conditions = parse_conditions(suite.conditions)
        distances = {c.facts().get("distance") for c in conditions if c.kind == "outliers"}
        assert distances == {"near", "far"}
    assert {e.name for e in load_suite("ood").models} == {"standard", "trades"}


def test_gains_are_corrected_for_their_number():
    rng = np.random.default_rng(0)
    base, better = rng.normal(size=300), rng.normal(size=300)
    unknown = rng.normal(size=200) + 1
    scores = {
        "first": detection_rows.Scores(base, unknown, None),
        "second": detection_rows.Scores(better, unknown + 0.3, None),
        "third": detection_rows.Scores(base + rng.normal(size=300), unknown, None),
    }
    found = {(p, m): e for p, m, e, _ in detection_rows.separation(scores)}
    from robustbench_ext.metrics.paired import compare_auroc

    raw = [compare_auroc(s.clean, s.unknown, base, unknown).p_value for n, s in scores.items() if n != "first"]
    assert found["second", "auroc_gain_p"].value >= raw[0]
    assert max(found[n, "auroc_gain_p"].value for n in ("second", "third")) == pytest.approx(min(1.0, max(raw)))
    assert min(found[n, "auroc_gain_p"].value for n in ("second", "third")) == pytest.approx(2 * min(raw))
    assert ("first", "auroc_gain") not in found
    assert not any(m == "alarms" for _, m in found)  # without a calibration split there is no threshold


# Log-probabilities --------------------------------------------------------------------------------------------------------


def test_energies_of_log_probabilities_are_no_detector(tmp_path, digits_model):
    """They are 0 but for rounding, which an AUROC would rank all the same; other detectors and readings keep their rows."""
    suite = {
        "schema": 1,
        "name": "log-probabilities",
        "data": "digits",
        "n": 60,
        "models": [{"name": name, "spec": "given"} for name in ("logits", "logs")],
        "conditions": [{"outliers": "letters", "n": 30}],
        "detectors": ["energy", "msp", {"name": "energy", "label": "joint", "reading": "joint"}],
    }
    logs = torch.nn.Sequential(digits_model, torch.nn.LogSoftmax(1)).eval()
    done = run_suite(suite, tmp_path, models={"logits": digits_model, "logs": logs})
    assert not done.failures
    find = done.results.find
    void = find(model="logs", probe="energy")
    assert len(void) == len(find(model="logits", probe="energy")) > 8
    assert all(row.value is None and "log-probabilities" in row.reason for row in void)
    assert all(row.value is not None for row in find(model="logits", probe="energy"))
    assert all(row.value is not None for row in find(model="logs", probe="msp") if "gain" not in row.metric)
    gains = [row for row in find(model="logs", metric="auroc_gain") if row.probe in ("msp", "joint")]
    assert gains and all(row.value is None for row in gains)  # gains over what is no detector
    (mine,), (theirs,) = (find(model=m, probe="msp", metric="auroc") for m in ("logs", "logits"))
    # The softmax of log-probabilities is the same but for float32 rounding, which may swap neighbours in rank.
    assert mine.value == pytest.approx(theirs.value, abs=0.005)
    assert {c.probe for c in done.results.curves if c.model == "logs"} >= {"msp", "joint"}
    assert not [c for c in done.results.curves if c.model == "logs" and c.probe == "energy"]
    (axis,) = (a for a in axes(done.results) if a.metric == "auroc")
    assert axis.row(done.results, "logs").value is None  # the headline shows a dash, not an artefact
    assert not [c for c in done.results.comparisons if c.metric == "auroc"]
