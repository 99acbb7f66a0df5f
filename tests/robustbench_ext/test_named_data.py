"""Published datasets by name: every layout, small made-up copies; ids, splits, checksums, and what errors say.

Numbers of images and checksums of the made-up copies are put in the places of the published ones.
"""

import gzip
import hashlib
import io
import json
import os
import pickle
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets, transforms

from robustbench_ext.cli.fetch import fetch
from robustbench_ext.cli.list import list_
from robustbench_ext.conditions import is_available, parse_conditions
from robustbench_ext.data import base, load_dataset, loading, published
from robustbench_ext.data.base import SPLITS, Dataset
from robustbench_ext.data.duplicates import check_duplicates, duplicates
from robustbench_ext.data.named import checking, idx, medmnist, stl10
from robustbench_ext.data.named.fetching import fetch_dataset
from robustbench_ext.data.named.imaging import Preparation
from robustbench_ext.errors import ConfigError, DataError, MissingExtraError
from robustbench_ext.named_data import NAMED, find, lacking

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
DEBIAN = Path("/usr/share/datasets/fashion-mnist")


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty $RBX_DATA and a cache of its own."""
    monkeypatch.setenv("RBX_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("RBX_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def sized(monkeypatch, name, images, classes=None):
    monkeypatch.setitem(NAMED, name, replace(NAMED[name], images=images, classes=classes or NAMED[name].classes))


def md5(content):
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def put(place, content):
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(content)
    return place


def picture(place, value, size=(32, 32), mode="RGB", **options):
    place.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, value if isinstance(value, tuple) else (value,) * 3).convert(mode).save(place, **options)


def disjoint(data):
    ids = [i for split in data.splits.values() for i in split.ids.tolist()]
    return len(ids) == len(set(ids))


# CIFAR ----------------------------------------------------------------------------------------------------------------

TRAIN, TEST = 100, 30


def cifar_arrays():
    rng = np.random.default_rng(0)
    parts = {}
    for part, n in (("train", TRAIN), ("test", TEST)):
        parts[part] = rng.integers(0, 256, (n, 3072), dtype=np.uint8), rng.permutation(np.arange(n) % 10)
    return parts


def cifar_files(monkeypatch):
    """The python version's files by name, with torchvision's tables told of their checksums."""
    parts, files = cifar_arrays(), {}
    for i in range(5):
        rows = slice(20 * i, 20 * (i + 1))
        x, y = (a[rows] for a in parts["train"])
        files[f"data_batch_{i + 1}"] = pickle.dumps({"data": x, "labels": y.tolist()})
    files["test_batch"] = pickle.dumps({"data": parts["test"][0], "labels": parts["test"][1].tolist()})
    files["batches.meta"] = pickle.dumps({"label_names": CLASSES})
    sums = {name: md5(content) for name, content in files.items()}
    monkeypatch.setattr(
        datasets.CIFAR10, "train_list", [[f"data_batch_{i}", sums[f"data_batch_{i}"]] for i in range(1, 6)]
    )
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    meta = {"filename": "batches.meta", "key": "label_names", "md5": sums["batches.meta"]}
    monkeypatch.setattr(datasets.CIFAR10, "meta", meta)
    sized(monkeypatch, "cifar10", {"train": TRAIN, "test": TEST})
    return files


@pytest.fixture
def cifar(home, monkeypatch):
    """The python version, unpacked where torchvision unpacks it."""
    for name, content in cifar_files(monkeypatch).items():
        put(home / "cifar-10-batches-py" / name, content)
    return home / "cifar-10-batches-py"


def frozen(data):
    """All that a run sees of a dataset, whatever happens to its files afterwards."""
    return {
        "classes": data.classes,
        "shape": data.shape,
        **{
            part: (s.ids.tolist(), s.labels.tolist(), s.images(slice(None)).numpy().tobytes(), s.fingerprint())
            for part, s in data.splits.items()
        },
    }


def same(one, other):
    one, other = (d if isinstance(d, dict) else frozen(d) for d in (one, other))
    assert list(one) == list(other)
    for key in one:
        assert one[key] == other[key], key


def test_cifar_is_torchvisions_under_a_shorter_name(cifar):
    data = load_dataset("cifar10")
    assert data.name == "cifar10" and data.classes == tuple(CLASSES) and data.shape == (3, 32, 32)
    assert [len(data[part]) for part in SPLITS] == [75, 25, 30] and disjoint(data)
    assert sorted(data["test"].ids.tolist())[7] == "CIFAR10:test:000007"
    x = data["test"].images(slice(0, 4))
    assert x.dtype == torch.float32 and 0 <= float(x.min()) < 0.05 and 0.95 < float(x.max()) <= 1
    same(data, load_dataset("torchvision:CIFAR10"))
    assert load_dataset("cifar10@exp:2")["test"].fingerprint() == data["test"].fingerprint()


def test_every_layout_of_cifar_is_the_same_data(home, monkeypatch):
    files, parts = cifar_files(monkeypatch), cifar_arrays()
    for name, content in files.items():
        put(home / "CIFAR-10" / name, content)  # in a folder of its own, however that is spelt
    first = load_dataset("cifar10")
    elsewhere = home.parent / "elsewhere"
    with io.BytesIO() as buffer:
        with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
            for name, content in files.items():
                member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        archive = buffer.getvalue()
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", md5(archive))
    put(elsewhere / "archive" / "cifar-10-python.tar.gz", archive)
    for name in files:
        rows = {"test_batch": parts["test"]}.get(name)
        if name.startswith("data_batch"):
            i = int(name[-1]) - 1
            rows = tuple(a[20 * i : 20 * i + 20] for a in parts["train"])
        if rows is not None:
            records = np.concatenate([rows[1].astype(np.uint8)[:, None], rows[0]], axis=1)
            put(elsewhere / "binary" / "cifar-10-batches-bin" / f"{name}.bin", records.tobytes())
    put(elsewhere / "binary" / "cifar-10-batches-bin" / "batches.meta.txt", ("\n".join(CLASSES) + "\n\n").encode())
    for folder, how in (("archive", "MD5 as published"), ("binary", "no checksums")):
        other = load_dataset(f"cifar10#root={elsewhere / folder}")
        assert how in other.source and other.name == "cifar10"
        same(first, other)
    with (elsewhere / "binary" / "cifar-10-batches-bin" / "test_batch.bin").open("ab") as file:
        file.write(b"x")
    with pytest.raises(DataError, match="no whole number of records"):
        load_dataset(f"cifar10#root={elsewhere / 'binary'}")


def test_cifar100_has_fine_labels(home, monkeypatch):
    rng = np.random.default_rng(1)
    files = {
        part: pickle.dumps(
            {
                "data": rng.integers(0, 256, (n, 3072), dtype=np.uint8),
                "fine_labels": (np.arange(n) % 100).tolist(),
                "coarse_labels": [0] * n,
            }
        )
        for part, n in (("train", 400), ("test", 100))
    }
    names = [f"c{k:02d}" for k in range(100)]
    files["meta"] = pickle.dumps({"fine_label_names": names, "coarse_label_names": ["coarse"]})
    for name, content in files.items():
        put(home / "cifar-100-python" / name, content)
    monkeypatch.setattr(datasets.CIFAR100, "train_list", [["train", md5(files["train"])]])
    monkeypatch.setattr(datasets.CIFAR100, "test_list", [["test", md5(files["test"])]])
    meta = {"filename": "meta", "key": "fine_label_names", "md5": md5(files["meta"])}
    monkeypatch.setattr(datasets.CIFAR100, "meta", meta)
    sized(monkeypatch, "cifar100", {"train": 400, "test": 100})
    data = load_dataset("cifar100")
    assert data.classes == tuple(names) and sorted(data["test"].labels.tolist()) == list(range(100))
    same(data, load_dataset("torchvision:CIFAR100"))


def test_published_corruptions_and_outliers_know_the_names(cifar, home, monkeypatch):
    monkeypatch.setattr(published, "CIFAR_TEST", TEST)
    pixels = np.broadcast_to(np.arange(5 * TEST, dtype=np.uint8)[:, None, None, None], (5 * TEST, 32, 32, 3))
    (home / "CIFAR-10-C").mkdir()
    np.save(home / "CIFAR-10-C" / "fog.npy", pixels)
    np.save(home / "CIFAR-10-C" / "labels.npy", np.tile(cifar_arrays()["test"][1], 5))
    data = load_dataset("cifar10")
    fog = parse_conditions([{"corruption": "cifar10c:fog", "severity": 2}])[1]
    seen = fog.samples(data, "test", 10)
    assert seen.ids.tolist() == data["test"].ids[:10].tolist()
    places = [int(i.rpartition(":")[2]) for i in seen.ids]
    assert (seen.images(slice(None))[:, 0, 0, 0] * 255).round().tolist() == [TEST + place for place in places]
    outliers = parse_conditions([{"outliers": "cifar10", "n": 12}])[1]
    assert outliers.samples(load_dataset("digits"), "test", None).images(slice(None)).shape == (12, 1, 8, 8)
    # Optional outliers that are not there are left out, those with a new name too.
    assert is_available({"outliers": "cifar10", "optional": True})
    assert not is_available({"outliers": ["cifar10", "svhn"], "optional": True})


def test_a_wrong_file_is_named_with_what_it_is(cifar):
    file = cifar / "test_batch"
    good = file.read_bytes()
    expected = md5(good)
    for content, said in (
        (bytes([good[0] ^ 1]) + good[1:], "cut short or changed"),
        (good[: len(good) // 2], "cut short"),
        (b"\n<!DOCTYPE html><html><body>Quota exceeded</body></html>", "a web page saved under this name"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
        (b"", "It is empty"),
    ):
        file.write_bytes(content)
        with pytest.raises(DataError, match=said) as caught:
            load_dataset("cifar10")
        assert str(file) in str(caught.value)
        assert f"MD5 {md5(content)}" in str(caught.value) and f"expected {expected}" in str(caught.value)
    file.write_bytes(good)
    assert len(load_dataset("cifar10")["test"]) == TEST


def test_a_pickle_that_runs_code_is_refused_whatever_its_checksum(cifar, monkeypatch):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(cifar / "ran"),)

    content = pickle.dumps({"data": Evil(), "labels": []})
    put(cifar / "test_batch", content)
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test_batch", md5(content)]])
    with pytest.raises(DataError, match="it names .*mkdir"):
        load_dataset("cifar10")
    assert not (cifar / "ran").exists()


def test_checksums_are_computed_once(cifar, monkeypatch):
    counted = []
    real = hashlib.md5

    def counting(*args, **options):
        counted.append(1)
        return real(*args, **options)

    monkeypatch.setattr(checking.hashlib, "md5", counting)
    for _ in range(2):
        checking.verify(cifar / "test_batch", datasets.CIFAR10.test_list[0][1], "it")
    assert len(counted) == 1
    os.utime(cifar / "test_batch", ns=(1, 1))  # changed, or so it looks
    checking.verify(cifar / "test_batch", datasets.CIFAR10.test_list[0][1], "it")
    assert len(counted) == 2
    # A cache that cannot be written is no reason to fail.
    put(cifar.parent / "file", b"")
    monkeypatch.setenv("RBX_CACHE", str(cifar.parent / "file"))
    for _ in range(2):
        checking.verify(cifar / "test_batch", datasets.CIFAR10.test_list[0][1], "it")
    assert len(counted) == 4


def test_what_is_missing_is_said(cifar, home, capsys):
    (cifar / "data_batch_3").unlink()
    with pytest.raises(DataError) as caught:
        load_dataset("cifar10")
    said = str(caught.value)
    assert f"incomplete: {cifar.resolve()} lacks data_batch_3\n" in said
    for part in (str(home / "cifar10"), "cifar-10-python.tar.gz", "rbx fetch cifar10", "RBX_DATA", "kriz/cifar"):
        assert part in said
    assert lacking(NAMED["cifar10"]).endswith("lacks data_batch_3")
    with pytest.raises(DataError, match="'stl10': not found in"):
        load_dataset("stl10")
    with pytest.raises(DataError, match="nowhere"):
        load_dataset("tiny-imagenet#root=nowhere")
    for name in NAMED:
        spec = f"{name}:photo" if name == "pacs" else f"{name}:art" if NAMED[name].argument else name
        with pytest.raises((DataError, ConfigError), match=name):
            load_dataset(spec)


def test_wrong_specifications_are_errors(home):
    for spec, match in (
        ("cifar10:train", "takes no argument"),
        ("cifar10#sise=3", "unknown option 'sise'.*Known: root"),
        ("imagenet#sise=3", "Did you mean 'size'"),
        ("imagenet#size=big", "whole number"),
        ("imagenet#size=224,resize=200", "smaller than"),
        ("imagenet#calibration=test", "Known: none, train, val"),
        ("imagenet#interpolation=nearest", "Known: bicubic, bilinear"),
        ("imagenet#size=", "needs a value"),
        ("pacs", "expected pacs:DOMAIN, of art_painting"),
        ("pacs:fotos", "Did you mean 'photo'"),
        ("medmnist", "expected medmnist:NAME"),
        ("medmnist:pathmnist#size=29", "28, 64, 128, 224"),
    ):
        with pytest.raises(ConfigError, match=match):
            load_dataset(spec)


# Folders of images ----------------------------------------------------------------------------------------------------


def test_cifar_as_folders_of_images(home, monkeypatch):
    sized(monkeypatch, "cifar10", {"train": 8, "test": 4}, classes=2)
    names = ("chat noir", "été")
    for part, n in (("train", 4), ("test", 2)):
        for k, name in enumerate(names):
            for i in range(n):
                picture(home / "cifar10" / part / name / f"{i}.png", 100 * k + i)
    data = load_dataset("cifar10")
    assert data.classes == names and [len(data[p]) for p in SPLITS] == [6, 2, 4] and disjoint(data)
    assert set(data["test"].ids.tolist()) == {f"test/{name}/{i}.png" for name in names for i in range(2)}
    value = {i: 100 * names.index(i.split("/")[1]) + int(i.split("/")[2][0]) for i in data["test"].ids.tolist()}
    x = data["test"].images(slice(None))
    assert (x[:, 2, 5, 5] * 255).round().tolist() == [value[i] for i in data["test"].ids.tolist()]
    with pytest.raises(DataError, match="published order"):  # which image of the test set it is, nobody knows
        published.cifar_c(data["test"], "fog", 1)
    (home / "cifar10" / "test" / "été" / "1.png").unlink()
    with pytest.raises(DataError, match="3 images, but CIFAR-10's test part has 4"):
        load_dataset("cifar10")
    picture(home / "cifar10" / "test" / "été" / "1.png", 1)
    picture(home / "cifar10" / "train" / "chien" / "1.png", 1)
    with pytest.raises(DataError, match="chien not among them"):
        load_dataset("cifar10")


def test_modes_are_converted_or_refused(home, monkeypatch):
    sized(monkeypatch, "cifar10", {"train": 4, "test": 5}, classes=1)
    for i in range(4):
        picture(home / "cifar10" / "train" / "a" / f"{i}.png", i)
    test = home / "cifar10" / "test" / "a"
    picture(test / "grey.png", 51, mode="L")
    picture(test / "palette.png", 51, mode="P")
    picture(test / "alpha.png", 51, mode="RGBA")
    picture(test / "print.tif", 51, mode="CMYK")
    rotated = Image.Exif()
    rotated[0x0112] = 6  # what torchvision does not look at is not looked at here
    picture(test / "turned.jpg", 51, exif=rotated)
    split = load_dataset("cifar10")["test"]
    x = split.images(slice(None))
    assert x.shape == (5, 3, 32, 32) and float((x - 0.2).abs().max()) < 1.5 / 255  # one step of JPEG and CMYK
    for content, said in (
        (b"<html>no</html>", "a web page"),
        ((test / "grey.png").read_bytes()[:60], "grey.png: cannot be read"),
        (b"", "it is empty"),
        (None, "mode I;16"),
        ("small", "16 x 32 pixels, expected 32 x 32"),
    ):
        if content is None:
            Image.fromarray(np.full((32, 32), 999, dtype=np.uint16)).save(test / "grey.png")
        elif content == "small":
            picture(test / "grey.png", 1, (16, 32))
        else:
            (test / "grey.png").write_bytes(content)
        with pytest.raises(DataError, match=said) as caught:
            split.images(slice(None))
        assert str(test / "grey.png") in str(caught.value)


def test_fingerprints_of_files_are_remembered(home, monkeypatch):
    sized(monkeypatch, "cifar10", {"train": 4, "test": 2}, classes=1)
    for part, n in (("train", 4), ("test", 2)):
        for i in range(n):
            picture(home / "cifar10" / part / "a" / f"{i}.png", i)
    first = load_dataset("cifar10")["test"].fingerprint()
    read = []
    monkeypatch.setattr(Path, "read_bytes", lambda self: read.append(self) or b"")
    loading._load.cache_clear()
    assert load_dataset("cifar10")["test"].fingerprint() == first and not read
    monkeypatch.undo()
    monkeypatch.setenv("RBX_DATA", str(home))
    monkeypatch.setenv("RBX_CACHE", str(home.parent / "cache"))
    sized(monkeypatch, "cifar10", {"train": 4, "test": 2}, classes=1)
    picture(home / "cifar10" / "test" / "a" / "1.png", 77)
    loading._load.cache_clear()
    changed = load_dataset("cifar10")["test"].fingerprint()
    assert changed != first
    monkeypatch.setenv("RBX_CACHE", str(home.parent / "another"))  # what was remembered and what is computed are equal
    loading._load.cache_clear()
    assert load_dataset("cifar10")["test"].fingerprint() == changed


# IDX, SVHN, STL-10 ----------------------------------------------------------------------------------------------------


def idx_files(monkeypatch, name):
    rng = np.random.default_rng(2)
    files = {}
    for part, n in (("train", 40), ("t10k", 20)):
        x, y = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8), (np.arange(n) % 10).astype(np.uint8)
        header = np.array([n, 28, 28], dtype=">u4").tobytes()
        files[f"{part}-images-idx3-ubyte"] = bytes((0, 0, 8, 3)) + header + x.tobytes()
        files[f"{part}-labels-idx1-ubyte"] = bytes((0, 0, 8, 1)) + header[:4] + y.tobytes()
    monkeypatch.setitem(idx.MD5, name, {key.rsplit("-", 2)[0]: md5(content) for key, content in files.items()})
    sized(monkeypatch, name, {"train": 40, "test": 20})
    return files


def test_idx_files_compressed_or_not(home, monkeypatch):
    files = idx_files(monkeypatch, "fashion-mnist")
    for name, content in files.items():
        put(home / "FashionMNIST" / "raw" / name, content)
        put(home.parent / "zipped" / f"{name}.gz", gzip.compress(content, compresslevel=1))
        put(home.parent / "kaggle" / name / name, content)  # a file in a folder of its name
        put(home.parent / "dotted" / name.replace("-idx", ".idx"), content)
    data = load_dataset("fashion-mnist")
    assert data.classes[0] == "T-shirt/top" and [len(data[p]) for p in SPLITS] == [30, 10, 20] and disjoint(data)
    same(data, load_dataset("torchvision:FashionMNIST"))
    for folder in ("zipped", "kaggle", "dotted"):
        same(data, load_dataset(f"fashion-mnist#root={home.parent / folder}"))
    with pytest.raises(DataError, match="MD5.*MNIST"):  # the other set's files under the same names
        load_dataset(f"mnist#root={home / 'FashionMNIST'}")
    zipped = home.parent / "zipped" / "t10k-labels-idx1-ubyte.gz"
    for content, said in (
        (b"<html></html>", "a web page"),
        (zipped.read_bytes()[:-9], "cannot be unpacked"),
        (gzip.compress(files["train-labels-idx1-ubyte"]), "what is in this file of Fashion-MNIST"),
    ):
        zipped.write_bytes(content)
        with pytest.raises(DataError, match=said):
            load_dataset(f"fashion-mnist#root={home.parent / 'zipped'}")


def test_mnist_as_folders_keeps_the_names_of_its_classes(home, monkeypatch):
    sized(monkeypatch, "mnist", {"train": 40, "test": 10})
    for part, n in (("training", 4), ("testing", 1)):
        for k in range(10):
            for i in range(n):
                picture(home / "mnist" / part / str(k) / f"{i}.png", 20 * k, (28, 28), "L")
    data = load_dataset("mnist")
    assert data.shape == (1, 28, 28) and data.classes == tuple(datasets.MNIST.classes)
    x = data["test"].images(slice(None))
    assert (x[:, 0, 3, 3] * 255).round().tolist() == [20.0 * k for k in data["test"].labels]


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="apt-get install dataset-fashion-mnist")
def test_real_fashion_mnist(home, monkeypatch):
    monkeypatch.setenv("RBX_DATA", str(DEBIAN.parent))
    data = load_dataset("fashion-mnist")
    assert [len(data[p]) for p in SPLITS] == [45_000, 15_000, 10_000] and disjoint(data)
    for part, n in zip(SPLITS, (4500, 1500, 1000), strict=True):
        assert np.bincount(data[part].labels).tolist() == [n] * 10
    x = data["test"].images(slice(0, 2000))
    # Mean and standard deviation that everybody normalises with: 0.2860 and 0.3530, of the 60,000 training images. Those of
    # 2,000 test images differ by sampling: the mean of an image has a deviation of about 0.16 over images.
    assert abs(float(x.mean()) - 0.286) < 4 * 0.16 / 2000**0.5 and abs(float(x.std()) - 0.353) < 0.02


def test_svhn(home, monkeypatch):
    from scipy.io import savemat

    rng = np.random.default_rng(3)
    table = {}
    for part, n in (("train", 40), ("test", 20)):
        file = home / f"{part}_32x32.mat"
        x = rng.integers(0, 256, (32, 32, 3, n), dtype=np.uint8)
        savemat(file, {"X": x, "y": (1 + np.arange(n) % 10).astype(np.uint8)[:, None]})
        table[part] = ["", file.name, md5(file.read_bytes())]
    monkeypatch.setattr(datasets.SVHN, "split_list", table)
    sized(monkeypatch, "svhn", {"train": 40, "test": 20})
    data = load_dataset("svhn")
    assert data.classes == tuple("0123456789") and [len(data[p]) for p in SPLITS] == [30, 10, 20]
    row = data["test"].ids.tolist().index("SVHN:test:000009")
    assert data["test"].labels[row] == 0  # 10 in the file
    assert torch.equal(data["test"].images(np.array([row]))[0] * 255, torch.tensor(x[..., 9]).permute(2, 0, 1).float())
    same(data, load_dataset("torchvision:SVHN"))


def test_stl10_is_read_from_its_files(home, monkeypatch):
    rng = np.random.default_rng(4)
    folder, sums = home / "stl10_binary", {}
    for part, n in (("train", 20), ("test", 10)):
        x, y = rng.integers(0, 256, (n, 3, 96, 96), dtype=np.uint8), (1 + np.arange(n) % 10).astype(np.uint8)
        for name, content in ((f"{part}_X.bin", x.tobytes()), (f"{part}_y.bin", y.tobytes())):
            sums[name] = md5(put(folder / name, content).read_bytes())
    put(folder / "unlabeled_X.bin", b"")
    put(folder / "class_names.txt", "\n".join(stl10.CLASSES).encode())
    monkeypatch.setattr(
        datasets.STL10,
        "train_list",
        [[name, sums[name]] for name in ("train_X.bin", "train_y.bin")] + [["unlabeled_X.bin", md5(b"")]],
    )
    monkeypatch.setattr(datasets.STL10, "test_list", [[name, sums[name]] for name in ("test_X.bin", "test_y.bin")])
    sized(monkeypatch, "stl10", {"train": 20, "test": 10})
    data = load_dataset("stl10")
    assert data.shape == (3, 96, 96) and sorted(data["test"].labels.tolist()) == list(range(10))
    same(data, load_dataset("torchvision:STL10"))


# ImageNet -------------------------------------------------------------------------------------------------------------


def test_resizing_is_torchvisions():
    rng = np.random.default_rng(5)
    # Of the longer sides some have a fraction above one half, and some leave an odd number of pixels around the crop.
    for size in ((300, 200), (200, 300), (256, 256), (500, 333), (97, 131), (101, 64), (64, 103), (90, 55), (63, 103)):
        image = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
        for name in ("bilinear", "bicubic"):
            mode = transforms.InterpolationMode(name)
            for crop in (56, 57):
                theirs = transforms.Compose([transforms.Resize(64, mode), transforms.CenterCrop(crop)])(image)
                ours = Preparation(crop, 64, interpolation=name)(image)
                assert np.array_equal(ours, np.asarray(theirs).transpose(2, 0, 1))
            whole = np.asarray(transforms.Resize((40, 40), mode)(image)).transpose(2, 0, 1)
            assert np.array_equal(Preparation(40, "square", interpolation=name)(image), whole)


WNIDS = [f"n0000000{k}" for k in range(4)]


def imagenet_files(monkeypatch, folder, train=8, val=5):
    """Four classes; red says the class. Validation images are numbered across classes, as the published ones are."""
    truth = []
    for k, wnid in enumerate(WNIDS):
        for i in range(train):
            picture(folder / "train" / wnid / f"{wnid}_{i}.JPEG", (60 * k, i, 0), (40, 30), quality=95)
    for number in range(1, 4 * val + 1):
        k = (number * 3) % 4
        truth.append(WNIDS[k])
        picture(folder / "val" / f"ILSVRC2012_val_{number:08d}.JPEG", (60 * k, 0, 5 * number), (40, 30), quality=95)
    sized(monkeypatch, "imagenet", {"train": 4 * train, "val": 4 * val}, classes=4)
    return truth


def test_imagenet_by_every_list_of_labels(home, monkeypatch):
    from scipy.io import savemat

    truth = imagenet_files(monkeypatch, home / "imagenet")
    spec = "imagenet#size=16,resize=20"
    with pytest.raises(DataError, match=r"LOC_val_solution.csv.*ILSVRC2012_devkit_t12.*meta.bin"):
        load_dataset(spec)
    lists = home / "imagenet"
    kaggle = "ImageId,PredictionString\n" + "".join(
        f"ILSVRC2012_val_{i:08d},{wnid} 1 2 3 4\n" for i, wnid in reversed(list(enumerate(truth, 1)))
    )
    devkit = lists / "ILSVRC2012_devkit_t12" / "data"
    first = None
    for number in range(4):
        if number == 0:
            put(lists / "LOC_val_solution.csv", kaggle.encode())
        elif number == 1:
            (lists / "LOC_val_solution.csv").unlink()
            torch.save((dict.fromkeys(WNIDS, ("name",)), truth), lists / "meta.bin")
        elif number == 2:
            (lists / "meta.bin").unlink()
            order = [2, 0, 3, 1]  # the kit numbers classes in its own way
            synsets = np.array(
                [(1 + i, WNIDS[k], "name") for i, k in enumerate(order)],
                dtype=[("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O")],
            )
            devkit.mkdir(parents=True)
            savemat(devkit / "meta.mat", {"synsets": synsets})
            numbers = [1 + order.index(WNIDS.index(wnid)) for wnid in truth]
            put(devkit / "ILSVRC2012_validation_ground_truth.txt", "\n".join(map(str, numbers)).encode())
        else:  # sorted, as torchvision does it
            for i, wnid in enumerate(truth, 1):
                file = lists / "val" / f"ILSVRC2012_val_{i:08d}.JPEG"
                file.parent.joinpath(wnid).mkdir(exist_ok=True)
                file.rename(file.parent / wnid / file.name)
        loading._load.cache_clear()
        data = load_dataset(spec)
        first = first or frozen(data)
        same(first, data)
    assert data.classes == tuple(WNIDS) and data.shape == (3, 16, 16) and disjoint(data)
    assert [len(data[p]) for p in SPLITS] == [24, 8, 20] and "test is the validation part" in data.source
    x = data["test"].images(slice(None))
    # Red says the class, within what JPEG changes.
    assert np.abs(x[:, 0, 8, 8].numpy() * 255 - 60 * data["test"].labels).max() < 8
    assert sorted(np.bincount(data["test"].labels)) == [5, 5, 5, 5]


def test_imagenet_without_training_images(home, monkeypatch):
    truth = imagenet_files(monkeypatch, home / "ILSVRC2012")
    for i, wnid in enumerate(truth, 1):
        file = home / "ILSVRC2012" / "val" / f"ILSVRC2012_val_{i:08d}.JPEG"
        file.parent.joinpath(wnid).mkdir(exist_ok=True)
        file.rename(file.parent / wnid / file.name)
    options = "size=16,resize=20"
    whole = load_dataset(f"imagenet#{options}")
    (home / "ILSVRC2012" / "train").rename(home / "ILSVRC2012" / "elsewhere")
    with pytest.raises(DataError, match=r"imagenet#calibration=val .*imagenet#calibration=none"):
        load_dataset(f"imagenet#{options},interpolation=bilinear")
    val = load_dataset(f"imagenet#{options},calibration=val")
    assert (
        list(val.splits) == ["calibration", "test"]
        and [len(s) for s in val.splits.values()] == [4, 16]
        and disjoint(val)
    )
    assert np.bincount(val["calibration"].labels).tolist() == [1] * 4 and "four fifths" in val.source
    none = load_dataset(f"imagenet#calibration=none#{options}")
    assert list(none.splits) == ["test"] and none["test"].ids.tolist() == whole["test"].ids.tolist()
    assert none["test"].fingerprint() == whole["test"].fingerprint() != val["test"].fingerprint()
    assert none.name == "imagenet#calibration=none,resize=20,size=16"
    other = load_dataset("imagenet#calibration=none,size=16,resize=24")["test"].fingerprint()
    assert other != none["test"].fingerprint()
    # The published corruptions of the same images, in the same order, and none that calibrates.
    monkeypatch.setattr(published, "IMAGENET_CLASSES", 4)
    monkeypatch.setattr(published, "IMAGENET_SIDE", 16)
    for i, wnid in enumerate(truth, 1):
        picture(home / "ImageNet-C" / "fog" / "3" / wnid / f"ILSVRC2012_val_{i:08d}.JPEG", i, (16, 16))
    fog = parse_conditions([{"corruption": "imagenet-c:fog", "severity": 3}])[1]
    for data in (val, none):
        assert fog.samples(data, "test", 10).ids.tolist() == data["test"].ids[:10].tolist()
    assert len(fog.samples(load_dataset("imagenet#calibration=val," + options), "test", None)) == 16
    (home / "ILSVRC2012" / "val" / WNIDS[0]).rename(home / "ILSVRC2012" / "val" / "dogs")
    loading._load.cache_clear()
    with pytest.raises(DataError, match="3 classes.*ImageNet.* has 4"):
        load_dataset(f"imagenet#{options},calibration=none")


def test_kaggles_tree_of_imagenet(home, monkeypatch):
    root = home / "imagenet-object-localization-challenge"
    truth = imagenet_files(monkeypatch, root / "ILSVRC" / "Data" / "CLS-LOC")
    rows = [f"ILSVRC2012_val_{i:08d},{wnid} 1 2 3 4" for i, wnid in enumerate(truth, 1)]
    put(root / "LOC_val_solution.csv", "\n".join(["ImageId,PredictionString", *rows]).encode())
    assert [len(s) for s in load_dataset("imagenet#size=16,resize=20").splits.values()] == [24, 8, 20]
    put(root / "LOC_val_solution.csv", "\n".join(["ImageId,PredictionString", *rows[:-1]]).encode())
    loading._load.cache_clear()
    with pytest.raises(DataError, match=r"00000020.JPEG: the list of labels does not name it"):
        load_dataset("imagenet#size=16,resize=20")


def test_tiny_imagenet(home, monkeypatch):
    sized(monkeypatch, "tiny-imagenet", {"train": 16, "val": 8}, classes=4)
    folder = home / "tiny-imagenet-200"
    annotations = []
    for k, wnid in enumerate(WNIDS):
        for i in range(4):
            picture(folder / "train" / wnid / "images" / f"{wnid}_{i}.JPEG", 60 * k, (64, 64), "RGB" if i else "L")
        for i in range(2):
            name = f"val_{2 * i + 7 * k}.JPEG"
            picture(folder / "val" / "images" / name, 60 * k, (64, 64))
            annotations.append(f"{name}\t{wnid}\t0\t0\t62\t62\n")
    put(folder / "val" / "val_annotations.txt", "".join(annotations).encode())
    put(folder / "test" / "images" / "test_0.JPEG", b"not read")
    data = load_dataset("tiny-imagenet")
    assert data.classes == tuple(WNIDS) and data.shape == (3, 64, 64) and disjoint(data)
    assert [len(data[p]) for p in SPLITS] == [12, 4, 8]
    x = data["test"].images(slice(None))
    assert np.abs(x[:, 0, 8, 8].numpy() * 255 - 60 * data["test"].labels).max() < 3
    assert load_dataset("tiny-imagenet#size=32")["train"].images(slice(0, 2)).shape == (2, 3, 32, 32)
    before = frozen(data)
    for line in annotations:
        name, wnid = line.split("\t")[:2]
        (folder / "val" / wnid).mkdir(exist_ok=True)
        (folder / "val" / "images" / name).rename(folder / "val" / wnid / name)
    (folder / "val" / "val_annotations.txt").unlink()
    (folder / "val" / "images").rmdir()
    loading._load.cache_clear()
    same(before, load_dataset("tiny-imagenet"))
    (folder / "train" / WNIDS[0] / "images" / f"{WNIDS[0]}_0.JPEG").unlink()
    loading._load.cache_clear()
    with pytest.raises(DataError, match="15 images, but Tiny ImageNet's train part has 16"):
        load_dataset("tiny-imagenet")


# Domains, MedMNIST ----------------------------------------------------------------------------------------------------


def test_pacs_and_office_home(home, monkeypatch):
    counts = {"art_painting": 20, "cartoon": 30, "photo": 40, "sketch": 50}
    sized(monkeypatch, "pacs", counts, classes=2)
    for domain, n in counts.items():
        for k, label in enumerate(("dog", "house")):
            for i in range(n // 2):
                picture(home / "PACS" / "kfold" / domain / label / f"{i}.png", (n, 100 * k, 0), (22, 20))
    data = load_dataset("pacs:photo+sketch#size=8")
    assert data.classes == ("dog", "house") and data.shape == (3, 8, 8) and disjoint(data)
    assert [len(data[p]) for p in SPLITS] == [54, 18, 18] and set(data["test"].domains) == {"photo", "sketch"}
    x = data["test"].images(slice(None)) * 255
    assert (x[:, 0, 0, 0]).round().tolist() == [float(counts[d]) for d in data["test"].domains]
    assert (x[:, 1, 0, 0] / 100).round().tolist() == data["test"].labels.tolist()
    # The same samples in the same splits as through the folder.
    plain = load_dataset(f"domains:{home / 'PACS' / 'kfold'}#only=photo+sketch#size=8")
    assert [plain[p].ids.tolist() for p in SPLITS] == [data[p].ids.tolist() for p in SPLITS]
    assert torch.equal(plain["test"].images(slice(None)), data["test"].images(slice(None)))
    assert set(load_dataset("pacs:without-photo")["test"].domains) == {"art_painting", "cartoon", "sketch"}
    (home / "PACS" / "kfold" / "photo" / "dog" / "0.png").unlink()
    loading._load.cache_clear()
    with pytest.raises(DataError, match="39 images, but PACS's domain photo has 40"):
        load_dataset("pacs:photo")
    sized(monkeypatch, "office-home", dict.fromkeys(NAMED["office-home"].images, 10), classes=1)
    for domain in ("Art", "Clipart", "Product", "Real World"):
        for i in range(10):
            picture(home / "OfficeHomeDataset_10072016" / domain / "Alarm_Clock" / f"{i}.jpg", 9 * i, (20 + i, 30))
    data = load_dataset("office-home:real-world")
    assert data.shape == (3, 224, 224) and data["test"].images(slice(0, 2)).shape == (2, 3, 224, 224)
    assert all(i.startswith("real-world/Alarm_Clock/") for i in data["test"].ids)


def med(file, channels=(), label_width=1, depth=(), n=(20, 10, 10)):
    rng = np.random.default_rng(6)
    arrays = {}
    for part, count in zip(("train", "val", "test"), n, strict=True):
        arrays[f"{part}_images"] = rng.integers(0, 256, (count, *depth, 28, 28, *channels), dtype=np.uint8)
        arrays[f"{part}_labels"] = (np.arange(count)[:, None] % 2).repeat(label_width, axis=1).astype(np.uint8)
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(file, **arrays)
    return md5(file.read_bytes())


def test_medmnist(home, monkeypatch):
    sums = {
        "pathmnist": med(home / "medmnist" / "pathmnist.npz", channels=(3,)),
        "chestmnist": med(home / "medmnist" / "chestmnist.npz", label_width=14),
        "organmnist3d": med(home / "medmnist" / "organmnist3d.npz", depth=(28,)),
    }
    monkeypatch.setattr(medmnist, "_info", lambda: None)
    data = load_dataset("medmnist:pathmnist")
    assert [len(data[p]) for p in SPLITS] == [20, 10, 10] and data.shape == (3, 28, 28) and disjoint(data)
    assert data.classes == ("0", "1") and "not checked" in data.source
    assert all(i.startswith("pathmnist:val:") for i in data["calibration"].ids)  # its own, not cut out of train
    about = {"task": "multi-class", "python_class": "X", "label": {"1": "b", "0": "a"}}
    about["n_samples"] = {"train": 20, "val": 10, "test": 10}
    info = {name: {**about, "MD5": total} for name, total in sums.items()}
    for known in (False, True):  # with the package and without it
        if known:
            info["chestmnist"]["task"] = "multi-label, binary-class"
            info["organmnist3d"]["python_class"] = "OrganMNIST3D"
            monkeypatch.setattr(medmnist, "_info", lambda: info)
        for name, said in (("chestmnist", "several labels"), ("organmnist3d", "volumes")):
            loading._load.cache_clear()
            with pytest.raises(DataError, match=said):
                load_dataset(f"medmnist:{name}")
    loading._load.cache_clear()
    named = load_dataset("medmnist:pathmnist")
    assert named.classes == ("a", "b") and "MD5 as published" in named.source
    assert named["test"].fingerprint() == data["test"].fingerprint()
    with pytest.raises(ConfigError, match="Did you mean 'pathmnist'"):
        load_dataset("medmnist:patmnist")
    with pytest.raises(DataError, match=r"no pathmnist_64.npz in .*medmnist.*rbx fetch medmnist:pathmnist"):
        info["pathmnist"]["MD5_64"] = ""
        load_dataset("medmnist:pathmnist#size=64")
    info["pathmnist"]["MD5"] = "0" * 32
    loading._load.cache_clear()
    with pytest.raises(DataError, match="expected 00000"):
        load_dataset("medmnist:pathmnist")


def test_the_package_medmnist_says_what_is_read_from_it():
    info = pytest.importorskip("medmnist.info").INFO
    about = info["pathmnist"]
    assert {"MD5", "MD5_64", "MD5_224", "task", "label", "n_samples", "python_class"} <= set(about)
    assert about["n_samples"] == {"train": 89996, "val": 10004, "test": 7180} and len(about["label"]) == 9
    assert "multi-label" in info["chestmnist"]["task"] and info["organmnist3d"]["python_class"].endswith("3D")


# The command line, duplicates -----------------------------------------------------------------------------------------


def test_the_list_says_what_is_here(cifar, capsys):
    list_("data", as_json=True, as_markdown=False)
    items = {item["name"]: item for item in json.loads(capsys.readouterr().out)}
    assert items["cifar10"]["here"] is True and "missing" not in items["cifar10"] and "here" not in items["digits"]
    assert items["svhn"]["here"] is False and items["svhn"]["missing"].startswith("not found in")
    list_("datasets", as_json=False, as_markdown=False)
    assert "[here]" in capsys.readouterr().out
    list_("datasets", as_json=False, as_markdown=True)
    assert "not found" not in capsys.readouterr().out  # a document is about no machine


def test_fetching_is_the_librarys(home, monkeypatch):
    asked = []

    class Fake:
        def __init__(self, **options):
            asked.append(options)

    monkeypatch.setattr(datasets, "CIFAR10", Fake)
    monkeypatch.setattr(datasets, "SVHN", Fake)
    assert fetch_dataset(NAMED["cifar10"]) == home
    fetch_dataset(NAMED["svhn"])
    root = {"root": str(home), "download": True}
    assert asked == [
        root | {"train": True},
        root | {"train": False},
        root | {"split": "train"},
        root | {"split": "test"},
    ]

    def offline(**options):
        raise OSError("no route to host")

    monkeypatch.setattr(datasets, "CIFAR10", offline)
    with pytest.raises(DataError, match=r"no route to host.*kriz/cifar.html[\s\S]*cifar-10-batches-py"):
        fetch_dataset(NAMED["cifar10"])
    monkeypatch.setitem(sys.modules, "medmnist", None)
    with pytest.raises(MissingExtraError, match=r"robustbench-ext\[medmnist\]"):
        fetch_dataset(NAMED["medmnist"], "pathmnist")


def test_the_command_refuses_what_no_library_downloads(home):
    for name, said in (
        ("imagenet", r"no library downloads ImageNet[\s\S]*LOC_val_solution"),
        ("cifar11", "Did you mean 'cifar10'"),
        ("medmnist", "expected medmnist:NAME"),
        ("mnist:test", "expected mnist"),
    ):
        with pytest.raises(ConfigError, match=said):
            fetch(name, size=28)


def test_duplicates_are_found(digits):
    rng = np.random.default_rng(7)
    x = rng.integers(0, 256, (60, 1, 8, 8), dtype=np.uint8)
    ids = [f"s{i:02d}" for i in range(60)]
    whole = Dataset("made", base.split_dataset(x, np.arange(60) % 3, ids), ("a", "b", "c"), (1, 8, 8))
    assert duplicates(whole) == [] and check_duplicates(whole).status == "pass"
    for part in ("train", "calibration"):
        mine, theirs = (int(whole[p].ids[3][1:]) for p in ("test", part))
        twins = x.copy()
        twins[theirs] = x[mine]
        data = Dataset("made", base.split_dataset(twins, np.arange(60) % 3, ids), ("a", "b", "c"), (1, 8, 8))
        assert duplicates(data) == [(f"s{mine:02d}", f"s{theirs:02d}")]
        found = check_duplicates(data)
        assert (
            found.status == "doubt" and f"s{mine:02d} and s{theirs:02d}" in found.message and "1 of 12" in found.message
        )
    assert duplicates(digits) == []


def test_too_much_data_is_looked_at_only_when_asked(monkeypatch, digits):
    monkeypatch.setattr("robustbench_ext.data.duplicates.QUICK", 1000)
    assert check_duplicates(digits) is None and check_duplicates(digits, always=True).status == "pass"
    alone = Dataset("one", {"test": digits["test"]}, digits.classes, digits.shape)
    assert check_duplicates(alone, always=True) is None


def test_the_table_is_complete():
    for name, named in NAMED.items():
        assert named.name == name and named.page and named.layouts and (named.images or name == "medmnist")
    with pytest.raises(DataError, match="not found"):
        find(NAMED["svhn"], Path("nowhere"))
