"""Splits: disjoint, stratified, stable; loaders; outliers; corruptions."""

import numpy as np
import pytest
import torch
from PIL import Image

from robustbench_ext.catalog import OUTLIERS
from robustbench_ext.data import load_dataset, split_dataset
from robustbench_ext.errors import ConfigError, DataError

# Fingerprints of the bundled splits: if one changes, every stored key changes with it.
FINGERPRINTS = {"digits": "0efb8df073753494f925", "mnist5k": "f7654c9d19ab04d88370"}


@pytest.mark.parametrize("name", ["digits", "mnist5k"])
def test_bundled_splits(name):
    data = load_dataset(name)
    ids = [set(split.ids.tolist()) for split in data.splits.values()]
    assert sum(map(len, ids)) == len(set.union(*ids)) == (1797 if name == "digits" else 5000)
    assert data["test"].fingerprint() == FINGERPRINTS[name]
    for split in data.splits.values():
        x = split.images(slice(None))
        assert x.dtype == torch.float32
        assert x.shape[1:] == data.shape
        assert float(x.min()) == 0.0
        assert float(x.max()) == 1.0
        share = np.bincount(split.labels, minlength=10) / len(split)
        assert abs(share - 0.1).max() < 0.01


def test_prefixes_are_stratified_and_nested(mnist):
    split = mnist["test"]
    for n in (10, 55, 100, 333):
        counts = np.bincount(split.take(n).labels, minlength=10)
        assert counts.max() - counts.min() <= 1
        assert split.take(n).ids.tolist() == split.ids[:n].tolist()
    assert split.take(None) is split
    assert split.take(50).fingerprint() != split.take(51).fingerprint()


def test_splits_follow_ids_not_positions():
    x, y = np.random.default_rng(0).random((60, 1, 8, 8), dtype=np.float32), np.arange(60) % 3
    ids = [f"s{i}" for i in range(60)]
    order = np.random.default_rng(1).permutation(60)
    first, second = split_dataset(x, y, ids), split_dataset(x[order], y[order], [ids[i] for i in order])
    for name, split in first.items():
        assert split.ids.tolist() == second[name].ids.tolist()
        assert torch.equal(split.images(slice(None)), second[name].images(slice(None)))


def test_npz_with_one_array_and_with_splits(tmp_path):
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (50, 9, 9), dtype=np.uint8), np.arange(50) % 5
    np.savez(tmp_path / "one.npz", x=x, y=y)
    data = load_dataset(f"npz:{tmp_path / 'one.npz'}")
    assert [len(s) for s in data.splits.values()] == [30, 10, 10]
    assert data.shape == (1, 9, 9)
    rgb = rng.random((40, 9, 9, 3))
    np.savez(tmp_path / "two.npz", x_train=rgb, y_train=y[:40], x_test=rgb[:10], y_test=y[:10])
    data = load_dataset(f"npz:{tmp_path / 'two.npz'}")
    assert [len(s) for s in data.splits.values()] == [30, 10, 10]
    assert data.shape == (3, 9, 9)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"a": np.zeros(3)}, "expected x and y"),
        ({"x": np.random.default_rng(0).normal(size=(4, 1, 8, 8)), "y": np.arange(4)}, "normalisation"),
        ({"x": np.zeros((4, 8)), "y": np.arange(4)}, "expected (N, H, W)"),
        ({"x": np.zeros((4, 8, 8), dtype=np.int64), "y": np.arange(4)}, "uint8"),
        ({"x": np.zeros((4, 8, 8)), "y": np.array([0.5, 1, 2, 3])}, "integers"),
        ({"x": np.zeros((4, 8, 8)), "y": np.array([-1, 0, 1, 1])}, "Renumber them from 0"),
        ({"x": np.zeros((6, 8, 8)), "y": np.arange(4)}, "6 inputs, 4 labels"),
        ({"x": np.zeros((4, 8, 8)), "y": np.eye(4)}, "argmax"),
        ({"x": np.zeros((4, 8, 8, 4)), "y": np.arange(4)}, "one or three channels"),
        ({"x": np.zeros((4, 8, 8)), "y": np.arange(4)}, "split is empty"),
        ({"x": np.zeros((30, 8, 8)), "y": np.arange(30) % 3, "classes": np.array(["a", "a", "b"])}, "must differ"),
    ],
)
def test_bad_npz_says_what_to_do(tmp_path, arrays, message):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(DataError, match=message.replace("(", r"\(").replace(")", r"\)")):
        load_dataset(f"npz:{tmp_path / 'bad.npz'}")


def test_npz_never_unpickles(tmp_path):
    np.savez(tmp_path / "objects.npz", x=np.array([{"a": 1}], dtype=object), y=np.arange(1))
    with pytest.raises(DataError, match="objects are not loaded"):
        load_dataset(f"npz:{tmp_path / 'objects.npz'}")


def _folder(root, names, n, size=(10, 10)):
    for k, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for i in range(n):
            Image.fromarray(np.full((*size, 3), 20 * k + i, dtype=np.uint8)).save(root / name / f"{i}.png")


def test_folder_with_and_without_splits(tmp_path):
    _folder(tmp_path / "plain", ("cat", "dog"), 10)
    data = load_dataset(f"folder:{tmp_path / 'plain'}")
    assert data.classes == ("cat", "dog")
    assert [len(s) for s in data.splits.values()] == [12, 4, 4]
    for split in ("train", "test"):
        _folder(tmp_path / "split" / split, ("cat", "dog"), 8)
    data = load_dataset(f"folder:{tmp_path / 'split'}")
    assert [len(s) for s in data.splits.values()] == [12, 4, 16]
    assert data["test"].images(slice(0, 3)).shape == (3, 3, 10, 10)


def test_folder_faults(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        load_dataset(f"folder:{tmp_path / 'none'}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no class folders"):
        load_dataset(f"folder:{tmp_path / 'empty'}")
    _folder(tmp_path / "sizes", ("a", "b"), 5)
    Image.fromarray(np.zeros((4, 4, 3), dtype=np.uint8)).save(tmp_path / "sizes" / "a" / "odd.png")
    split = load_dataset(f"folder:{tmp_path / 'sizes'}")
    with pytest.raises(DataError, match="one size"):
        for part in split.splits.values():
            part.images(slice(None))
    (tmp_path / "sizes" / "a" / "odd.png").write_text("not an image")
    with pytest.raises(DataError, match="cannot be read as an image"):
        for part in load_dataset(f"folder:{tmp_path / 'sizes'}").splits.values():
            part.images(slice(None))


def test_unknown_names_name_the_nearest():
    with pytest.raises(ConfigError, match="Did you mean 'mnist5k'"):
        load_dataset("mnist5")
    with pytest.raises(DataError, match="Did you mean 'CIFAR10'"):
        load_dataset("torchvision:CIFAR1O")
    with pytest.raises(DataError, match="RBX_DATA"):
        load_dataset("torchvision:FashionMNIST")
    with pytest.raises(ConfigError, match="expected npz:PATH"):
        load_dataset("npz")


@pytest.mark.parametrize("name", OUTLIERS.names())
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (1, 8, 8)])
def test_outliers(name, shape):
    split = OUTLIERS.load(name)(40, shape)
    x = split.images(slice(None))
    assert x.shape == (40, *shape)
    assert float(x.min()) >= 0.0
    assert float(x.max()) <= 1.0
    assert (split.labels == -1).all()
    assert len(torch.unique(x.flatten(1), dim=0)) == 40
    assert float(x.flatten(1).std(dim=1).min()) > 1e-3  # a patch of sky is smooth, but nothing is blank
    # A larger set contains a smaller one.
    assert torch.equal(OUTLIERS.load(name)(12, shape).images(slice(None)), x[:12])


def test_images_are_copies_so_that_no_model_can_change_the_data(digits):
    split = digits["test"]
    before = split.images(slice(0, 4)).clone()
    split.images(slice(0, 4)).mul_(0)
    split.images(np.arange(4)).mul_(0)
    assert torch.equal(split.images(slice(0, 4)), before)


def test_an_edited_file_is_read_again(tmp_path):
    file = tmp_path / "d.npz"
    np.savez(file, x=np.zeros((30, 8, 8)), y=np.arange(30) % 3)
    first = load_dataset(f"npz:{file}")["test"].fingerprint()
    assert load_dataset(f"npz:{file}")["test"].fingerprint() == first
    np.savez(file, x=np.ones((30, 8, 8)), y=np.arange(30) % 3)
    assert load_dataset(f"npz:{file}")["test"].fingerprint() != first


def test_sixteen_bit_images_keep_their_scale(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(5):
            ramp = np.linspace(0, 65535, 100).reshape(10, 10).astype(np.uint16)
            Image.fromarray(ramp).save(tmp_path / name / f"{i}.png")
    x = load_dataset(f"folder:{tmp_path}")["test"].images(slice(None))
    assert float(x.mean()) == pytest.approx(0.5, abs=1e-3)
    assert float(x.max()) == 1.0


def test_a_path_without_its_kind_is_explained(tmp_path, monkeypatch):
    np.savez(tmp_path / "mine.npz", x=np.zeros((30, 8, 8)), y=np.arange(30) % 3)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="npz:mine.npz"):
        load_dataset("mine.npz")
