"""Weights of epochs that a training keeps: they are those of the training, and nothing else depends on them."""

import json

import pytest
import torch
from safetensors.torch import load_file

from defenses import Standard
from defenses.trainer import Architecture, Recipe, train
from robustbench_ext.errors import ConfigError, ModelError
from robustbench_ext.models import checkpoints

QUICK = {"epochs": 3, "batch_size": 200, "eps": 0.1, "validation_n": 20, "validation_steps": 1, "energy_n": 0}


class Stop(Exception):
    """What a killed run looks like from inside."""


@pytest.fixture
def run(digits, tmp_path):
    """Trains into a folder of that name."""

    def run(name, keep=(), recipe=None, **options):
        network = Architecture("small-cnn", digits.shape, 10)
        return train(
            Standard(), network, digits, Recipe(**{**QUICK, **(recipe or {})}), tmp_path / name, keep=keep, **options
        )

    return run


def described(folder):
    return json.loads((folder / "model.json").read_text())


def files(folder):
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}


def test_keeping_changes_nothing(run):
    plain, kept = run("plain"), run("kept", keep="all")
    assert "kept" not in described(plain)
    assert sorted(files(plain)) == ["model.safetensors"]
    assert sorted(files(kept)) == [checkpoints.file_of(e) for e in (1, 2, 3)] + ["model.safetensors"]
    assert files(plain)["model.safetensors"] == files(kept)["model.safetensors"]
    assert {k: v for k, v in described(kept).items() if k != "kept"} == described(plain)
    assert list(checkpoints.kept(kept)) == [1, 2, 3]
    # The published weights are those of the best epoch, and epochs differ.
    best = described(kept)["selected"]["epoch"]
    tensors = [load_file(kept / checkpoints.file_of(e)) for e in (1, 2, 3)]
    published = load_file(kept / "model.safetensors")
    assert all(torch.equal(tensors[best - 1][k], v) for k, v in published.items())
    assert any(not torch.equal(tensors[0][k], tensors[2][k]) for k in published)
    loaded = checkpoints.load_checkpoint(kept, 1).module.state_dict()
    assert all(torch.equal(loaded[k], v) for k, v in tensors[0].items())


def test_weights_are_kept_as_they_would_have_been_published(run):
    folder = run("averaged", keep="all", recipe={"average": "ema", "average_decay": 0.5})
    best = described(folder)["selected"]["epoch"]
    published, kept = load_file(folder / "model.safetensors"), load_file(folder / checkpoints.file_of(best))
    assert all(torch.equal(kept[k], v) for k, v in published.items())


def test_a_finished_training_is_done_again_up_to_the_epoch_that_it_lacks(run):
    expected, folder = files(run("whole", keep="all")), run("later")
    before, model = described(folder), files(folder)["model.safetensors"]
    seen = []
    run("later", keep=[2], on_epoch=lambda row: seen.append(row["epoch"]))
    assert seen == [1, 2]
    assert files(folder) == {"model.safetensors": model, checkpoints.file_of(2): expected[checkpoints.file_of(2)]}
    assert {k: v for k, v in described(folder).items() if k != "kept"} == before
    assert "another" not in described(folder)["kept"]["2"]
    run("later", keep=[2], on_epoch=lambda row: seen.append("again"))
    run("later", keep=[1, 2], on_epoch=lambda row: seen.append(row["epoch"]))
    assert seen == [1, 2, 1]
    assert list(checkpoints.kept(folder)) == [1, 2]
    assert files(folder)[checkpoints.file_of(1)] == expected[checkpoints.file_of(1)]
    assert not (folder / "checkpoint.pt").exists()


def test_a_replay_that_differs_says_so(run):
    folder = run("elsewhere")
    told = described(folder)
    told["curve"][0]["loss"] += 1e-3  # as if another machine had trained it
    (folder / "model.json").write_text(json.dumps(told))
    run("elsewhere", keep=[1])
    assert checkpoints.kept(folder)[1]["another"] is True


def test_killed_on_the_way_the_same_weights_are_kept(run):
    expected = files(run("whole", keep="all"))

    def stop_at(epoch, batch):
        def on_batch(e, b, _):
            if (e, b) == (epoch, batch):
                raise Stop

        return on_batch

    with pytest.raises(Stop):
        run("cut", keep="all", on_batch=stop_at(1, 3), checkpoint_seconds=0)
    assert files(run("cut", keep="all")) == expected
    # Asked for while it is on its way, past the epoch that is wanted.
    with pytest.raises(Stop):
        run("late", on_batch=stop_at(2, 2), checkpoint_seconds=0)
    folder = run("late", keep=[1])
    assert files(folder) == {k: expected[k] for k in ("model.safetensors", checkpoints.file_of(1))}
    # Killed while it is done again, and other epochs are wanted then.
    with pytest.raises(Stop):
        run("late", keep=[3], on_batch=stop_at(2, 2), checkpoint_seconds=0)
    assert files(run("late", keep=[2, 3])) == expected


def test_a_damaged_checkpoint_is_missing(run):
    folder = run("damaged", keep=[1, 2])
    whole = files(folder)
    (folder / checkpoints.file_of(1)).write_bytes(b"rust")
    assert checkpoints.missing(folder, (1, 2)) == [1]
    with pytest.raises(ModelError, match=r"after epoch 1 are not kept \(there are: 2\)"):
        checkpoints.load_checkpoint(folder, 1)
    run("damaged", keep=[1, 2])
    assert files(folder) == whole


def test_epochs_that_a_training_does_not_come_to_are_not_missed(run):
    folder = run("early", keep="all", recipe={"epochs": 6, "patience": 1, "lr": 1e-9, "schedule": "constant"})
    reached = checkpoints.epochs_of(folder)
    assert reached < 6
    assert list(checkpoints.kept(folder)) == list(range(1, reached + 1))
    assert checkpoints.missing(folder, range(1, 7)) == []


@pytest.mark.parametrize("keep", [[0], [4], ["1"]])
def test_epochs_that_are_none_are_refused(run, keep):
    with pytest.raises(ConfigError, match="expected epochs from 1 to 3"):
        run("none", keep=keep)
