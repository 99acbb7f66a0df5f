"""Trackers: what they are told of a run is what results.json says, and what each of them can read back."""

import importlib.util
import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from robustbench_ext.callbacks import Callback
from robustbench_ext.catalog import TRACKERS
from robustbench_ext.engine import RunSummary, run_suite
from robustbench_ext.errors import ConfigError, MissingExtraError
from robustbench_ext.results import Failed, Row, RunResults
from robustbench_ext.suite import load_suite
from robustbench_ext.trackers import tracker
from robustbench_ext.trackers.base import LONGEST, MEMORY, Tracker, metrics

_spec = importlib.util.spec_from_file_location("synthetic", Path(__file__).parents[2] / "reports" / "synthetic.py")
synthetic_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(synthetic_module)

SUITE = {
    "schema": 1,
    "name": "small",
    "data": "digits",
    "n": 20,
    "models": [
        {"name": "plain", "train": {"defense": "standard", "recipe": {"epochs": 2, "eps": 0.1, "validation_n": 20}}}
    ],
    "conditions": [{"attack": "fgsm", "eps": 0.1}],
}
CURVE = [{"epoch": e, "epochs": 3, "loss": 1 / e, "clean_accuracy": 0.1 * e} for e in (1, 2, 3)]


class Kept(Tracker):
    """A tracker that keeps what it is told."""

    name = "kept"

    def __init__(self, where="", rows="headline"):
        super().__init__(where, rows)
        self.points, self.results, self.tags, self.files, self.ends, self.opened = [], {}, {}, [], [], []

    def _open(self, known, folder, told, made_with):
        self.opened.append(known)
        self.told, self.made_with = told, made_with
        return known or f"entry {id(self)}"

    def _point(self, family, values, step):
        self.points.append((family, values, step))

    def _results(self, values):
        self.results = values

    def _tag(self, tags):
        self.tags |= tags

    def _keep(self, files):
        self.files += [file.name for file in files]

    def _close(self, finished):
        self.ends.append(finished)


def results_of(models=("plain", "tr/ades 8%"), **more):
    results = synthetic_module.synthetic(list(models), **more)
    results.models[0]["training"] = {"curve": CURVE}
    return results


@pytest.fixture
def finished(tmp_path):
    """A folder with the files of a finished run, its suite and summary."""
    folder = tmp_path / "first run"
    folder.mkdir()
    results = results_of()
    (folder / "results.json").write_text(results.to_json())
    (folder / "results.csv").write_text("model\n")
    (folder / "run.json").write_text("{}")
    (folder / "report.md").write_text("# Report\n\nAll is well.\n")
    (folder / "report.html").write_text("<h1>Report</h1>")
    summary = RunSummary(folder, results, 1, 0, 1, 1.0, [Failed(what="x", error="y")])
    return folder, load_suite(SUITE), summary


def play(told, finished, end=True):
    """All events of a run, in their order."""
    folder, suite, summary = finished
    told.on_run_start(suite, folder)
    told.on_epoch("plain", CURVE[0])
    told.on_cell(1, 2, "plain · training", {"epochs": 3, "seconds": 1.0})
    told.on_cell(2, 2, "plain · clean", {"error": "ValueError: no"})
    if end:
        told.on_run_end(summary)
        told.on_report({"html": folder / "report.html", "markdown": folder / "report.md"})
    told.close()


def expected(finished, model="plain", axis="clean_accuracy", metric="accuracy", condition="clean"):
    """The numbers of one axis, read from results.json, by their names in a tracker."""
    results = RunResults.read(finished[0] / "results.json")
    (row,) = results.find(model=model, condition=condition, metric=metric, group=None)
    return {f"results/{model}/{axis}/{k}": getattr(row, k) for k in ("value", "ci_low", "ci_high", "n")}


# What is told ----------------------------------------------------------------------------------------------------------


def test_what_trackers_are_told(finished):
    told = Kept()
    play(told, finished)
    assert told.results.items() >= expected(finished).items()
    assert told.results["results/tr_ades_8/robust_Linf_8_255/value"] == pytest.approx(0.9 - 0.01 - 0.002 * 6)
    assert told.told.items() >= {"suite": "small", "data": "digits", "n": 20, "seed": 0, "models": "plain"}.items()
    assert told.told["conditions"] == '{"attack": "fgsm", "eps": 0.1}'
    assert told.made_with["version.torch"]
    assert told.tags == {"verdict": "pass", "failures": "1"}
    assert told.files == ["results.json", "results.csv", "run.json", "report.html", "report.md"]
    assert told.ends == [True]


def test_curves_are_whole_and_jobs_are_counted(finished):
    told = Kept()
    play(told, finished)
    curve = [(step, values) for family, values, step in told.points if family == "training/plain"]
    assert curve == [(row["epoch"], {k: row[k] for k in ("loss", "clean_accuracy")}) for row in CURVE]
    progress = [(step, values) for family, values, step in told.points if family == "progress"]
    assert progress == [(1, {"done": 1, "failed": 0}), (2, {"done": 1, "failed": 1})]


def test_missed_epochs_are_told_in_order(finished):
    """A look at a training that came late saw epoch 2 alone: the curve is told again from the first one missed."""
    told, (folder, suite, summary) = Kept(), finished
    told.on_run_start(suite, folder)
    told.on_epoch("plain", CURVE[1])
    told.on_run_end(summary)
    assert [step for family, _, step in told.points if family == "training/plain"] == [2, 1, 2, 3]


def test_a_run_that_was_killed_goes_on_as_the_same_entry(finished):
    first, second, third = Kept(), Kept(), Kept()
    play(first, finished, end=False)
    assert first.ends == [False]
    play(second, finished)
    play(third, finished)
    entry = f"entry {id(first)}"
    assert [t.opened for t in (first, second, third)] == [[None], [entry], [entry]]
    assert [step for family, _, step in second.points if family == "progress"] == [3, 4]
    # What was told before the end is not told again, but for what happens again.
    assert [step for family, _, step in third.points if family == "training/plain"] == [1]


def test_another_suite_or_server_is_another_entry(finished):
    folder, suite, summary = finished
    play(Kept(), finished)
    for told, of in ((Kept(), load_suite({**SUITE, "n": 40})), (Kept("elsewhere"), suite)):
        play(told, (folder, of, summary))
        assert told.opened == [None]


def test_a_damaged_memory_is_no_obstacle(finished):
    for text in ("{", "[]", '{"kept:": 3}'):
        (finished[0] / MEMORY).write_text(text)
        told = Kept()
        play(told, finished)
        assert told.opened == [None]


def test_nothing_is_told_of_a_run_that_did_not_start(finished):
    told = Kept()
    told.on_cell(1, 1, "x", {})
    told.on_report({})
    told.close()
    assert (told.points, told.ends) == ([], [])


def test_undefined_numbers_are_left_out_and_names_differ():
    results = results_of(["a/b", "a b", "é", "猫", "犬"])
    for row in results.results:
        if row.model == "é":
            row.value = row.ci_low = row.ci_high = None
    found = metrics(results, "headline", Kept().clean)
    about_accuracy = [name.removeprefix("results/") for name in found if "/clean_accuracy" in name]
    whole = ("value", "ci_low", "ci_high", "n")
    assert about_accuracy == [
        *(f"a_b/clean_accuracy/{k}" for k in whole),
        *(f"a_b/clean_accuracy_2/{k}" for k in whole),
        "e/clean_accuracy/n",
        *(f"unnamed/clean_accuracy/{k}" for k in whole),
        *(f"unnamed/clean_accuracy_2/{k}" for k in whole),
    ]


def test_all_rows_have_names_of_their_own():
    results = results_of(["m" * 300, "plain"])
    found = metrics(results, "all", Kept().clean)
    rows = [name for name in found if name.startswith("rows/")]
    assert len(rows) == 4 * len(results.results)
    assert max(map(len, found)) <= LONGEST + len("/ci_high") <= 250
    assert "rows/plain/noise_1/energy/auroc/against_clean/value" in found
    assert "rows/plain/clean/classifier/accuracy/class_3/value" in found


def test_one_model_that_was_not_measured_leaves_no_trace():
    results = results_of(["a", "b"])
    results.results = [row for row in results.results if row.model == "a"]
    assert {name.split("/")[1] for name in metrics(results, "headline", str)} == {"a"}
    assert isinstance(results.results[0], Row)


# By name ---------------------------------------------------------------------------------------------------------------


def test_importing_them_imports_none_of_their_packages():
    code = (
        "import sys; from robustbench_ext.trackers import mlflow, tensorboard, wandb\n"
        "found = {'mlflow', 'wandb', 'tensorboard', 'torch'} & set(sys.modules); assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", TRACKERS.names())
def test_a_missing_package_is_one_line(name, monkeypatch):
    for module in ("mlflow", "wandb", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError) as caught:
        tracker(name)
    assert str(caught.value) == f"tracker {name}: pip install 'robustbench-ext[{name}]'"


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("mflow", "unknown tracker 'mflow'. Did you mean 'mlflow'?"),
        ("mlflow:x?rows=some", "rows = 'some', expected headline or all"),
        ("nowhere.py:Mine", "there is no file"),
        ("json:dumps", "importing|dumps"),
    ],
)
def test_wrong_names(spec, said):
    with pytest.raises((ConfigError, TypeError), match=said.replace("?", r"\?")):
        tracker(spec)


def test_one_of_your_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(
        "from robustbench_ext.callbacks import Callback\n"
        "class Mine(Callback):\n    name = 'mine'\n\n"
        "def make():\n    return Mine()\n\n"
        "def wrong():\n    return 3\n"
    )
    assert isinstance(tracker("mine.py:Mine"), Callback)
    assert tracker("mine.py:make").name == "mine"
    with pytest.raises(
        ConfigError, match="mine.py:wrong' gave int, expected .* derives from robustbench_ext.callbacks.Callback"
    ):
        tracker("mine.py:wrong")


# The three -------------------------------------------------------------------------------------------------------------


def test_tensorboard(finished, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = finished[0]
    play(tracker("tensorboard"), finished, end=False)
    read = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert _texts(read, "status") == ["running", "interrupted"]
    play(tracker("tensorboard?rows=all"), finished)
    assert [f.name for f in folder.iterdir() if f.name.startswith("tensorboard")] == ["tensorboard"]
    read = EventAccumulator(str(folder / "tensorboard")).Reload()
    for name, value in expected(finished).items():
        (point,) = read.Scalars(name)
        assert point.value == pytest.approx(value, rel=1e-6)  # it keeps float32
    assert "rows/plain/clean/classifier/ece/value" in read.Tags()["scalars"]
    # The second time it began where the first was cut off: epoch 1 was told twice, 2 and 3 at the end.
    assert [point.step for point in read.Scalars("training/plain/loss")] == [1, 1, 2, 3]
    assert [point.value for point in read.Scalars("progress/failed")] == [0, 1, 1, 2]
    assert _texts(read, "status") == ["running", "interrupted", "running", "finished"]
    assert _texts(read, "report") == ["# Report\n\nAll is well.\n"]
    assert _texts(read, "verdict") == ["pass"]
    assert "| n | 20 |" in _texts(read, "parameters")[0]
    assert "_hparams_/session_start_info" in read.summary_metadata


def test_tensorboard_in_a_folder_of_many_runs(finished, tmp_path):
    pytest.importorskip("tensorboard")
    logs = tmp_path / "logs"
    play(tracker(f"tensorboard:{logs}"), finished)
    play(tracker(f"tensorboard:{logs}"), finished)
    folder, _, summary = finished
    play(tracker(f"tensorboard:{logs}"), (folder, load_suite({**SUITE, "seed": 1}), summary))
    assert sorted(f.name for f in logs.iterdir()) == ["first run", "first run-2"]


def _texts(read, name):
    return [e.tensor_proto.string_val[0].decode() for e in read.Tensors(f"{name}/text_summary")]


def test_wandb_offline(finished, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("WANDB_DIR", raising=False)
    folder = finished[0]
    play(tracker("wandb:team/mine"), finished, end=False)
    play(tracker("wandb:team/mine"), finished)
    wandb.teardown()  # what happens when a process ends: files are complete
    first, second = (_records(file) for file in sorted(folder.glob("wandb/offline-run-*/*.wandb")))
    ids = [next(r.run.run_id for r in records if r.HasField("run")) for records in (first, second)]
    assert len({*ids, json.loads((folder / MEMORY).read_text())["wandb:team/mine"]["entry"]}) == 1
    runs = [r.run for r in second if r.HasField("run")]
    assert (runs[0].project, runs[0].entity, runs[0].display_name) == ("mine", "team", "first run")
    config = {u.key: json.loads(u.value_json) for r in second if r.HasField("config") for u in r.config.update}
    assert (config["n"], config["suite"]) == (20, "small")
    assert config["version.torch"]
    told = {u.key: json.loads(u.value_json) for r in second if r.HasField("summary") for u in r.summary.update if u.key}
    assert told.items() >= expected(finished).items()
    assert told["verdict"] == "pass"
    history = [{"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in r.history.item} for r in second]
    losses = [
        (row["training/plain/step"], row["training/plain/loss"]) for row in history if "training/plain/loss" in row
    ]
    assert losses == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3))]
    artifacts = {r.artifact.name for r in second if r.HasField("artifact")}
    assert artifacts == {
        f"{ids[0]}-{name}" for name in ("results.json", "results.csv", "run.json", "report.html", "report.md")
    }
    assert [next(r.exit.exit_code for r in records if r.HasField("exit")) for records in (first, second)] == [1, 0]


def _records(file):
    """The records of an offline run: LevelDB's log format, blocks of 32 KiB behind a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    raw, at, part, found = file.read_bytes(), 7, b"", []
    while at + 7 <= len(raw):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", raw[at : at + 7])
        part += raw[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(part)
            found.append(record)
            part = b""
    return found


def _mlflow_says(client, experiment, finished):
    """What MLflow's own client reads back of a run that was cut off and went on."""
    (run,) = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "first run"
    assert run.data.metrics.items() >= expected(finished).items()
    assert run.data.params["n"] == "20"
    assert run.data.params["data"] == "digits"
    assert run.data.tags["verdict"] == "pass"
    assert run.data.tags["version.torch"]
    losses = [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "training/plain/loss")]
    assert sorted(set(losses)) == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    files = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert files == {"results.json", "results.csv", "run.json", "report.html", "report.md"}
    kept = client.download_artifacts(run.info.run_id, "results.json")
    assert Path(kept).read_text() == (finished[0] / "results.json").read_text()


@pytest.mark.slow  # MLflow makes its tables in five seconds
def test_mlflow_in_a_folder(finished, tmp_path):
    mlflow = pytest.importorskip("mlflow")
    logs = tmp_path / "logs"
    play(tracker(f"mlflow:{logs}"), finished, end=False)
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{logs / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("small").experiment_id])
    assert run.info.status == "KILLED"
    play(tracker(f"mlflow:{logs}?rows=all"), finished)
    _mlflow_says(client, "small", finished)
    # Deleted there: a new entry, not an error.
    client.delete_run(run.info.run_id)
    play(tracker(f"mlflow:{logs}"), finished)
    (other,) = client.search_runs([client.get_experiment_by_name("small").experiment_id])
    assert other.info.run_id != run.info.run_id


def test_mlflow_by_uri_and_experiment(finished, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    uri = (tmp_path / "mlruns").as_uri()
    play(tracker(f"mlflow:{uri}"), finished)
    _mlflow_says(mlflow.MlflowClient(tracking_uri=uri), "mine", finished)


def test_a_real_run(tmp_path):
    """Headline numbers as results.json has them, the whole training curve, and one entry for a run and its repetition."""
    told = Kept()
    done = run_suite(SUITE, tmp_path, callbacks=[told])
    results = RunResults.read(tmp_path / "results.json")
    assert told.results == metrics(results, "headline", told.clean)
    (row,) = results.find(metric="robust_accuracy", group=None, condition="worst case Linf 0.1")
    assert told.results["results/plain/robust_Linf_0.1/value"] == row.value
    curve = {step: values["loss"] for family, values, step in told.points if family == "training/plain"}
    assert curve == {row["epoch"]: row["loss"] for row in results.models[0]["training"]["curve"]}
    jobs = done.trained + done.computed + 1  # the preflight
    assert max(step for family, _, step in told.points if family == "progress") == jobs
    again = Kept()
    run_suite(SUITE, tmp_path, callbacks=[again])
    assert again.opened == [f"entry {id(told)}"]
    assert (told.ends, again.ends) == ([True], [True])


def test_an_error_in_the_run_is_an_interruption(tmp_path, monkeypatch):
    told = Kept()

    def fails(*_):
        raise KeyboardInterrupt

    told.on_cell = fails
    with pytest.raises(KeyboardInterrupt):
        run_suite(SUITE, tmp_path, callbacks=[told])
    assert told.ends == [False]
