"""Results by difficulty in a run: what is computed, what it is computed from, and what it leaves alone."""

import copy
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from detectors.vog import class_normalised, vog
from reports import difficulty, write_reports
from robustbench_ext.difficulty import el2n, forgetting, margin_error, read_scores
from robustbench_ext.engine import run_suite
from robustbench_ext.errors import ConfigError
from robustbench_ext.evaluate import Context
from robustbench_ext.metrics import METRICS
from robustbench_ext.models import checkpoints, load_model, observe
from robustbench_ext.results import RunResults
from robustbench_ext.suite import validate_suite

DEDICATED = {name for name in METRICS if name.endswith("_by_difficulty")} | {"difficulty_of_mistakes"}
N, BINS = 70, 3


def training(**more):
    recipe = {
        "epochs": 3,
        "batch_size": 300,
        "eps": 0.1,
        "attack_steps": 2,
        "validation_n": 20,
        "validation_steps": 1,
        "energy_n": 0,
    }
    return {"defense": "standard", "recipe": recipe, **more}


def suite(**difficulty):
    return {
        "schema": 1,
        "name": "hard",
        "data": "digits",
        "n": N,
        "chunk_size": 40,
        "batch_size": 16,
        "models": [
            {"name": "scorer", "evaluate": False, "train": training(seeds=[7, 8])},
            {"name": "net", "train": training(seeds=2, keep="all")},
        ],
        "conditions": [
            {"attack": "pgd", "eps": 0.1, "steps": 3},
            {"corruption": "gaussian-noise", "severity": 3},
            {"outliers": "letters", "n": 40},
        ],
        "detectors": ["msp", {"name": "vog", "only": ["net seed 1"]}],
        "difficulty": {"score": "el2n", "models": ["scorer"], "epoch": 1, "bins": BINS, "hardest": 4, **difficulty},
    }


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hard")
    return folder, run_suite(suite(), folder)


@pytest.fixture
def copied(done, tmp_path):
    """A copy of the run's folder, for runs that change it."""
    return shutil.copytree(done[0], tmp_path / "copied")


@pytest.fixture
def again(copied):
    """The run again, in a copy of its folder, with other difficulty."""

    def again(**difficulty):
        content = suite()
        content["difficulty"] = {"models": ["scorer"], "bins": BINS, "hardest": 4, **difficulty}
        return run_suite(content, copied)

    return again


def of(context, names, epoch=None):
    """Logits of the test samples, straight from the weights: by model."""
    split = context.data["test"].take(N)
    x, y = split.images(slice(None)), torch.from_numpy(split.labels)
    found = []
    for name in names:
        folder = context.training[name].folder
        network = checkpoints.load_checkpoint(folder, epoch) if epoch else load_model(str(folder))
        found.append(observe(network.module, x, y).logits.numpy())
    return found, split


SCORERS = ["scorer seed 7", "scorer seed 8"]


def test_scores_are_those_of_the_kept_epoch_with_the_ids_of_the_samples(done):
    folder, summary = done
    assert not summary.failures
    context = Context(validate_suite(suite()), folder)
    logits, split = of(context, SCORERS, 1)
    scored = read_scores(folder)
    np.testing.assert_array_equal(scored.ids, split.ids)
    np.testing.assert_array_equal(scored.labels, split.labels)
    # Batches of 16 in chunks of 40 instead of one: logits differ by float32 rounding.
    np.testing.assert_allclose(scored.values, el2n(logits, split.labels), atol=1e-5)
    published, _ = of(context, SCORERS)
    assert np.abs(scored.values - el2n(published, split.labels)).max() > 0.01
    about = summary.results.difficulty
    assert about.models == {name: [1] for name in SCORERS}
    assert [s.group for s in about.slices] == [f"slice {k} of {BINS}" for k in (1, 2, 3)]
    assert sum(s.n for s in about.slices) == N
    order = np.argsort(-scored.values, kind="stable")
    assert [h.id for h in about.hardest] == scored.ids[order[:4]].tolist()
    assert set(about.hardest[0].predictions) == {"net seed 0", "net seed 1"}


def test_slices_add_up_to_the_whole(done):
    results = done[1].results
    pairs = {"clean": "accuracy", "gaussian-noise 3": "accuracy", "pgd Linf 0.1": "robust_accuracy"}
    pairs["worst case Linf 0.1"] = "robust_accuracy"
    labels = {c["label"] for c in results.conditions}
    assert set(pairs) <= labels, labels
    for model in ("net seed 0", "net seed 1"):
        for condition, metric in pairs.items():
            query = {"model": model, "condition": condition, "probe": "classifier"}
            whole = results.find(**query, metric=metric, group=None)[0]
            parts = results.find(**query, metric=f"{metric}_by_difficulty")
            assert [row.group for row in parts] == [s.group for s in results.difficulty.slices]
            assert sum(row.value * row.n for row in parts) == pytest.approx(whole.value * whole.n, abs=1e-9)
            assert {row.ci_method for row in parts} == {"Wilson"}
            briers = results.find(**query, metric="brier_by_difficulty")
            if condition != "worst case Linf 0.1":
                brier = results.find(**query, metric="brier", group=None)[0]
                assert sum(r.value * r.n for r in briers) == pytest.approx(brier.value * brier.n, rel=1e-9)
            if condition != "clean":
                change = results.find(**query, metric="change_by_difficulty")
                clean = results.find(model=model, condition="clean", metric="accuracy_by_difficulty")
                for gap, now, before in zip(change, parts, clean, strict=True):
                    assert gap.value == pytest.approx(now.value - before.value, abs=1e-12)
                    assert gap.ci_low <= gap.value <= gap.ci_high


def test_detectors_by_slice(done):
    results = done[1].results
    slices = {s.group: s.n for s in results.difficulty.slices}
    rows = results.find(metric="auroc_by_difficulty", model="net seed 1", probe="vog", condition="outliers letters")
    assert [row.group for row in rows] == list(slices)
    for row in rows:
        assert row.n_unknown == 40 and row.n == 40 + slices[row.group] and 0 <= row.value <= 1
    for row in results.find(metric="auroc_by_difficulty", condition="gaussian-noise 3", probe="msp"):
        assert row.n_unknown == slices[row.group]  # the same samples, noisy
    assert not results.find(probe="vog", model="net seed 0")
    attacked = results.find(metric="auroc_by_difficulty", condition="pgd Linf 0.1", probe="msp")
    fooled = results.find(metric="auroc", condition="pgd Linf 0.1", probe="msp")
    for model in ("net seed 0", "net seed 1"):
        mine = [row for row in attacked if row.model == model]
        assert sum(row.n_unknown for row in mine) == next(r.n_unknown for r in fooled if r.model == model)
        assert all((row.value is None) == (row.n_unknown < 10) for row in mine)


def test_nothing_else_changes(done, copied):
    """No other row is there, or differs, and no table finds rows by slice that asks for rows by class."""
    _, summary = done
    content = suite()
    del content["difficulty"]
    plain = run_suite(content, copied)
    assert (plain.trained, plain.computed) == (0, 0)
    assert plain.results.difficulty is None and not (copied / "difficulty.csv").exists()
    rest = [row for row in summary.results.results if row.metric not in DEDICATED]
    assert rest == plain.results.results
    assert {r.metric for r in summary.results.results} - {r.metric for r in rest} == DEDICATED
    assert plain.results.comparisons == summary.results.comparisons


def test_running_again_computes_nothing(done):
    folder, first = done
    before = (folder / "results.json").read_bytes(), (folder / "difficulty.csv").read_bytes()
    second = run_suite(suite(), folder)
    assert (second.trained, second.computed) == (0, 0)
    assert second.reused >= first.computed
    assert ((folder / "results.json").read_bytes(), (folder / "difficulty.csv").read_bytes()) == before
    assert RunResults.read(folder / "results.json") == first.results


def test_other_scores_of_the_same_outputs_cost_nothing(copied, again):
    found = again(score="margin", epoch=1)
    assert (found.trained, found.computed) == (0, 0)
    logits, split = of(Context(validate_suite(suite()), copied), SCORERS, 1)
    np.testing.assert_allclose(read_scores(copied).values, margin_error(logits, split.labels), atol=1e-5)


def test_forgetting_and_vog_are_read_off_kept_epochs(copied, again):
    found = again(score="forgetting", epochs="all")
    assert found.trained == 2  # the scorers are trained again, as far as the epochs that are missing
    assert found.computed == 2 * 2
    assert found.results.difficulty.models == {name: [1, 2, 3] for name in SCORERS}
    context = Context(validate_suite(suite()), copied)
    seen = [of(context, SCORERS, epoch) for epoch in (1, 2, 3)]
    y = seen[0][1].labels
    right = [np.stack([logits[k].argmax(1) == y for logits, _ in seen]) for k in (0, 1)]
    np.testing.assert_array_equal(read_scores(copied).values, np.mean([forgetting(r) for r in right], axis=0))
    assert any("samples have the same score" in note for note in found.results.notes)
    assert "∞" in difficulty.accuracies(found.results)[0].rows[-1][1][0].text  # some were never right
    found = again(score="vog", epochs=[1, 3])
    assert (found.trained, found.computed) == (0, 2 * 2)
    split = context.data["test"].take(N)
    x, labels = split.images(slice(None)), torch.from_numpy(split.labels)
    raw = [
        vog([checkpoints.load_checkpoint(context.training[name].folder, e).module for e in (1, 3)], x, labels).numpy()
        for name in SCORERS
    ]
    expected = np.mean([class_normalised(v, y) for v in raw], axis=0)
    np.testing.assert_allclose(read_scores(copied).values, expected, atol=1e-3)


def test_scorers_that_are_judged_are_named(done, again):
    notes = again(models=["net", "scorer"], score="el2n").results.notes
    told = [note for note in notes if "slices that it helped to make" in note]
    assert [note.split()[1] + note.split()[3] for note in told] == ["net0", "net1"]
    assert not any("helped" in note for note in done[1].results.notes)


def test_the_report_shows_it(done):
    folder, summary = done
    html = write_reports(folder)["html"].read_text()
    text = html[html.index('id="difficulty"') :]
    text = text[: text.index("</section>")]
    assert "EL2N" in text and "after epoch 1" in text and "scorer seed 7" in text
    assert "Accuracy by difficulty, clean" in text and "slice 3 of 3" in text and "net, 2 seeds" in text
    assert summary.results.difficulty.hardest[0].id in text
    assert "<image" in text  # the hardest samples
    markdown = (folder / "report.md").read_text()
    assert "Hardest samples" in markdown and "slice 3 of 3" in markdown


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["difficulty"].update(models=["scorrer"]), "Did you mean"),
        (lambda d: d["difficulty"].update(epoch=0), "at difficulty.epoch: Input should be greater than or equal to 1"),
        (lambda d: d["difficulty"].update(epochs=[1, 2]), "instead of epochs"),
        (lambda d: d["difficulty"].update(score="vog"), "instead of epoch"),
        (lambda d: d["difficulty"].update(score="vog", epoch=None), "epochs: all"),
        (lambda d: d["difficulty"].update(score="vog", epoch=None, epochs=[2]), "two epochs at least"),
        (lambda d: d["difficulty"].update(score="grand"), "score"),
        (lambda d: d["difficulty"].update(bin=4), "bins"),
        (lambda d: d["models"].__setitem__(0, {"name": "scorer", "spec": "small-cnn"}), "not trained"),
        (lambda d: d["models"][1]["train"].update(keep=[0]), r"\[0\], expected epochs from 1"),
        (lambda d: d["models"][1]["train"].update(keep=2), "expected epochs from 1"),
        (lambda d: d["models"][0]["train"].update(keep="some"), "expected epochs from 1"),
    ],
)
def test_suites_that_make_no_sense_are_refused(change, message):
    content = copy.deepcopy(suite())
    change(content)
    with pytest.raises(ConfigError, match=message):
        validate_suite(content)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["difficulty"].update(epoch=4), "its training has 3 epochs"),
        (lambda d: d.update(n=2), "2 test samples for 3 slices"),
        (lambda d: d["models"][1]["train"].pop("keep"), "detector 'vog' looks at epochs all"),
        (lambda d: d["models"][1]["train"].update(keep=[1]), "'net seed 1' the run keeps 1: give"),
    ],
)
def test_what_would_fail_later_is_refused_before_anything_runs(change, message, tmp_path):
    content = copy.deepcopy(suite())
    change(content)
    with pytest.raises(ConfigError, match=message):
        run_suite(content, tmp_path)


def test_a_scorer_that_cannot_be_trained_takes_nothing_else_with_it(done, tmp_path):
    content = suite()
    content["models"] = [
        {"name": "scorer", "evaluate": False, "train": {"defense": "standard", "recipe": {"epochs": 1, "lr": 1e30}}},
        {"name": "net", "spec": str(Context(validate_suite(suite()), done[0]).training["net seed 1"].folder)},
    ]
    content["conditions"], content["detectors"] = [], []
    found = run_suite(content, tmp_path)
    assert any("difficulty" in failure.what for failure in found.failures)
    assert found.results.difficulty is None
    assert any("no results by difficulty" in note for note in found.results.notes)
    assert found.results.find(model="net", metric="accuracy")


def test_what_keeps_weights_has_the_folder_of_what_does_not():
    """`keep` is in no key, so that old runs are found again."""
    with_keep, content = validate_suite(suite()), copy.deepcopy(suite())
    del content["difficulty"]
    for model in content["models"]:
        model["train"].pop("keep", None)
    content["detectors"] = ["msp"]
    folders = [
        [t.folder for t in Context(s, Path("nowhere")).training.values()] for s in (with_keep, validate_suite(content))
    ]
    assert folders[0] == folders[1]
