"""Weights from files: tensors and nothing else, whatever they are wrapped in."""

import pickle

import pytest
import torch

from robustbench_ext.errors import ModelError
from robustbench_ext.models import load_model, weights

SHAPE = (1, 8, 8)


@pytest.fixture(scope="module")
def state():
    """Of a small CNN with other weights than a fresh one."""
    return load_model("small-cnn", shape=SHAPE, seed=4).module.state_dict()


@pytest.mark.parametrize(
    ("wrap", "note"),
    [
        (lambda s: s, ""),
        (lambda s: {"state_dict": s, "epoch": 3, "args": {"lr": 0.1}}, "taken from 'state_dict'"),
        (lambda s: {"model": s}, "taken from 'model'"),
        (lambda s: {f"module.{k}": v for k, v in s.items()}, "prefix 'module.'"),
        (lambda s: {"model": {f"_orig_mod.module.{k}": v for k, v in s.items()}}, "prefix '_orig_mod.'"),
        (lambda s: {"net": {f"module._orig_mod.{k}": v for k, v in s.items()}}, "taken from 'net'"),
    ],
)
def test_what_training_scripts_save(state, tmp_path, wrap, note):
    torch.save(wrap(dict(state)), tmp_path / "w.pt")
    loaded = load_model(f"small-cnn + {tmp_path / 'w.pt'}", shape=SHAPE)
    assert all(torch.equal(v, state[k]) for k, v in loaded.module.state_dict().items())
    assert note in " ".join(loaded.notes)
    assert bool(loaded.notes) == bool(note)


class Bomb:
    """Touches a file when it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return (open, (self.file, "w"))


def test_nothing_in_a_file_of_weights_is_run(state, tmp_path):
    torch.save({"state_dict": dict(state), "extra": Bomb(str(tmp_path / "run"))}, tmp_path / "w.pt")
    with pytest.raises(ModelError, match="can run code"):
        load_model(f"small-cnn + {tmp_path / 'w.pt'}", shape=SHAPE)
    assert not (tmp_path / "run").exists()
    (tmp_path / "p.pt").write_bytes(pickle.dumps(Bomb(str(tmp_path / "run"))))
    with pytest.raises(ModelError, match="can run code"):
        load_model(f"small-cnn + {tmp_path / 'p.pt'}", shape=SHAPE)
    assert not (tmp_path / "run").exists()
    torch.load(tmp_path / "w.pt", weights_only=False)  # the bomb is one
    assert (tmp_path / "run").exists()


def test_weights_that_are_none(state, tmp_path):
    torch.save({"epoch": 3, "best": torch.zeros(1)}, tmp_path / "w.pt")
    with pytest.raises(ModelError, match="hold a mapping with epoch, best, expected tensors by name"):
        load_model(f"small-cnn + {tmp_path / 'w.pt'}", shape=SHAPE)
    torch.save({k: v for k, v in state.items() if "fc2" not in k}, tmp_path / "w.pt")
    with pytest.raises(ModelError, match="2 missing"):
        load_model(f"small-cnn + {tmp_path / 'w.pt'}", shape=SHAPE)


def test_pytorch_whose_reader_is_not_safe_is_refused(state, tmp_path, monkeypatch):
    torch.save(dict(state), tmp_path / "w.pt")
    monkeypatch.setattr(weights.torch, "__version__", "2.5.1+cpu")
    with pytest.raises(ModelError, match=r"CVE-2025-32434.*torch >= 2.6"):
        load_model(f"small-cnn + {tmp_path / 'w.pt'}", shape=SHAPE)
    monkeypatch.setenv("RBX_ALLOW_UNSAFE_LOAD", "1")
    load_model(f"small-cnn + {tmp_path / 'w.pt'}", shape=SHAPE)
