"""Published corrupted images: the right rows for the right samples, checked labels, instructions where something is missing."""

import numpy as np
import pytest
import torch
from PIL import Image

from robustbench_ext.data import published
from robustbench_ext.data.base import ArraySplit, Subset
from robustbench_ext.data.published import cifar_c, imagenet_c, published_name
from robustbench_ext.errors import ConfigError, DataError

N = 12


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Five severities of a test set of twelve: pixel values say severity and place."""
    monkeypatch.setattr(published, "CIFAR_TEST", N)
    monkeypatch.setenv("RBX_DATA", str(tmp_path))
    home = tmp_path / "CIFAR-10-C"
    home.mkdir()
    pixels = np.zeros((5 * N, 32, 32, 3), dtype=np.uint8)
    pixels[..., 0] = (np.arange(5 * N) // N + 1)[:, None, None]  # red: the severity
    pixels[..., 1] = (np.arange(5 * N) % N)[:, None, None]  # green: the place in the test set
    pixels[:, 3, 5, 2] = 255
    np.save(home / "gaussian_noise.npy", pixels)
    np.save(home / "labels.npy", np.tile(np.arange(N) % 10, 5))
    return home


def samples(order, source="CIFAR10", part="test"):
    order = np.array(order)
    return ArraySplit(np.zeros((len(order), 3, 32, 32)), order % 10, [f"{source}:{part}:{i:06d}" for i in order])


@pytest.mark.parametrize("name", ["gaussian-noise", "gaussian_noise"])
@pytest.mark.parametrize("severity", [1, 3, 5])
def test_rows_follow_ids_and_severity(folder, name, severity):
    order = [7, 0, 11, 3]
    clean = samples(order)
    found = cifar_c(clean, name, severity)
    x = found.images(slice(None))
    assert x.shape == (4, 3, 32, 32) and x.dtype == torch.float32
    assert torch.equal((x[:, 0, 0, 0] * 255).round(), torch.full((4,), float(severity)))
    assert (x[:, 1, 0, 0] * 255).round().tolist() == order
    assert float(x[0, 2, 3, 5]) == 1 and float(x[0, 2, 5, 3]) == 0  # rows are rows
    assert found.ids.tolist() == clean.ids.tolist() and np.array_equal(found.labels, clean.labels)
    assert torch.equal(found.images(np.array([2, 1])), x[[2, 1]])
    # A prefix and a subset of the samples get theirs.
    assert torch.equal(cifar_c(Subset(clean, np.array([2])), name, severity).images(slice(None)), x[2:3])


def test_the_fingerprint_names_the_bytes(folder):
    clean = samples([7, 0])
    one, other = (cifar_c(clean, "gaussian-noise", s).fingerprint() for s in (1, 2))
    assert one != other and one == cifar_c(clean, "gaussian_noise", 1).fingerprint()
    assert one != cifar_c(samples([0, 7]), "gaussian-noise", 1).fingerprint()


def test_an_explicit_folder_and_cifar100(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("RBX_DATA", str(tmp_path / "elsewhere"))
    assert len(cifar_c(samples([1]), "gaussian-noise", 1, folder)) == 1
    with pytest.raises(DataError, match=r"elsewhere.CIFAR-10-C.*zenodo.2535967.*labels.npy.*RBX_DATA"):
        cifar_c(samples([1]), "gaussian-noise", 1)
    with pytest.raises(DataError, match=r"CIFAR-100-C.*zenodo.3555552"):
        cifar_c(samples([1], "CIFAR100"), "gaussian-noise", 1)


def test_wrong_samples_and_wrong_files_are_errors(folder):
    for bad in (samples([1], part="train"), samples([1], "MNIST"), samples([N]), samples([])):
        with pytest.raises(DataError, match="published corruptions"):
            cifar_c(bad, "gaussian-noise", 1)
    mixed = ArraySplit(np.zeros((2, 3, 32, 32)), [1, 1], ["CIFAR10:test:000001", "CIFAR100:test:000001"])
    with pytest.raises(DataError, match="CIFAR100:test:000001"):
        cifar_c(mixed, "gaussian-noise", 1)
    with pytest.raises(ConfigError, match="Did you mean 'gaussian-noise'"):
        cifar_c(samples([1]), "gausian-noise", 1)
    for severity in (0, 6, True):
        with pytest.raises(ConfigError, match="severity"):
            cifar_c(samples([1]), "gaussian-noise", severity)
    with pytest.raises(DataError, match=r"fog.npy: there is no such file"):
        cifar_c(samples([1]), "fog", 1)
    np.save(folder / "fog.npy", np.zeros((N, 32, 32, 3), dtype=np.uint8))  # one severity alone
    with pytest.raises(DataError, match=r"expected \(60, 32, 32, 3\)"):
        cifar_c(samples([1]), "fog", 1)
    np.save(folder / "snow.npy", np.zeros((5 * N, 32, 32, 3)))
    with pytest.raises(DataError, match="expected uint8"):
        cifar_c(samples([1]), "snow", 1)
    (folder / "frost.npy").write_bytes(b"cut off")
    with pytest.raises(DataError, match="cannot be read"):
        cifar_c(samples([1]), "frost", 1)
    whole = (folder / "gaussian_noise.npy").read_bytes()
    for end in (0, 100, len(whole) - 1):  # a download that broke off: nothing, within the header, within the pixels
        (folder / "frost.npy").write_bytes(whole[:end])
        with pytest.raises(DataError, match=r"frost.npy: cannot be read.*complete"):
            cifar_c(samples([1]), "frost", 1)
    with (folder / "frost.npy").open("wb") as file:
        np.savez(file, x=np.zeros(3))
    with pytest.raises(DataError, match="archive of arrays"):
        cifar_c(samples([1]), "frost", 1)


def test_labels_are_checked(folder):
    labels = np.load(folder / "labels.npy")
    labels[2 * N + 4] = 9  # at severity 3 alone
    np.save(folder / "labels.npy", labels)
    assert len(cifar_c(samples([3, 4]), "gaussian-noise", 2)) == 2
    with pytest.raises(DataError, match="1 of 2 labels differ.*CIFAR10:test:000004: 9, expected 4"):
        cifar_c(samples([3, 4]), "gaussian-noise", 3)


def test_labels_of_one_severity_or_of_another_kind_are_errors(folder):
    whole = np.load(folder / "labels.npy")
    np.save(folder / "labels.npy", whole.astype(np.uint8))  # as the authors' script writes them
    assert len(cifar_c(samples([3, 4]), "gaussian-noise", 5)) == 2
    np.save(folder / "labels.npy", whole[:N])
    with pytest.raises(DataError, match=r"labels.npy: shape \(12,\), expected \(60,\)"):
        cifar_c(samples([3, 4]), "gaussian-noise", 5)
    np.save(folder / "labels.npy", whole.astype(np.float64))
    with pytest.raises(DataError, match="dtype float64, expected integers"):
        cifar_c(samples([3, 4]), "gaussian-noise", 5)


def test_names_are_mapped():
    assert published_name("jpeg-compression") == published_name("jpeg_compression") == "jpeg_compression"


@pytest.fixture
def imagenet(tmp_path, monkeypatch):
    """Three classes of four 16x16 images: red says which class, green which severity."""
    monkeypatch.setattr(published, "IMAGENET_CLASSES", 3)
    monkeypatch.setattr(published, "IMAGENET_SIDE", 16)
    for severity in (2, 3):
        for k, wnid in enumerate(("n02", "n01", "n03")):
            place = tmp_path / "motion_blur" / str(severity) / wnid
            place.mkdir(parents=True)
            for i in range(4):
                Image.new("RGB", (16, 16), (60 * k, 40 * severity, 0)).save(place / f"val_{i}.JPEG", quality=100)
    return tmp_path


def test_imagenet_c_is_a_balanced_split(imagenet):
    split = imagenet_c("motion-blur", 2, imagenet)
    assert len(split) == 12 and set(split.ids[:3].tolist()) < {
        f"n0{k}/val_{i}.JPEG" for k in (1, 2, 3) for i in range(4)
    }
    assert sorted(split.labels[:3]) == sorted(split.labels[3:6]) == [0, 1, 2]
    other = imagenet_c("motion_blur", 3, imagenet)
    assert other.ids.tolist() == split.ids.tolist() and other.fingerprint() != split.fingerprint()
    x = split.images(slice(None))
    # n01 is label 0 and red 60; one step of JPEG.
    assert x.shape == (12, 3, 16, 16)
    assert np.abs(x[:, 0, 8, 8].numpy()[split.labels == 0] - 60 / 255).max() < 3 / 255
    turned = imagenet_c("motion-blur", 2, imagenet, classes=("n03", "n02", "n01"))
    place = dict(zip(turned.ids.tolist(), turned.labels.tolist(), strict=True))
    assert place["n03/val_0.JPEG"] == 0 and place["n01/val_0.JPEG"] == 2
    (imagenet / "blur").mkdir()
    (imagenet / "motion_blur").rename(imagenet / "blur" / "motion_blur")  # an archive in a folder of its own
    again = imagenet_c("motion-blur", 2, imagenet)
    assert again.ids.tolist() == split.ids.tolist() and again.fingerprint() == split.fingerprint()


def test_imagenet_c_reads_grey_files_as_rgb(imagenet):
    Image.new("L", (16, 16), 51).save(imagenet / "motion_blur" / "2" / "n01" / "val_0.JPEG", quality=100)
    split = imagenet_c("motion-blur", 2, imagenet)
    x = split.images(slice(None))[split.ids.tolist().index("n01/val_0.JPEG")]
    assert x.shape == (3, 16, 16) and float((x - 0.2).abs().max()) < 3 / 255


def test_what_is_wrong_with_a_copy_of_imagenet_c_is_said(imagenet):
    with pytest.raises(DataError, match="n03 are not among the 2 classes.*WordNet ids"):
        imagenet_c("motion-blur", 2, imagenet, classes=("n01", "n02"))
    with pytest.raises(DataError, match="no folder for 1 of 4 classes, n04 for one"):
        imagenet_c("motion-blur", 2, imagenet, classes=("n01", "n02", "n03", "n04"))
    with pytest.raises(DataError, match=r"motion_blur.4: there is no such folder.*zenodo.2235448"):
        imagenet_c("motion-blur", 4, imagenet)
    with pytest.raises(DataError, match=r"CORRUPTION/SEVERITY/WNID"):
        imagenet_c("motion-blur", 2, imagenet / "nowhere")
    twin = imagenet / "blur" / "motion_blur" / "2"
    twin.mkdir(parents=True)
    with pytest.raises(DataError, match="is there twice"):
        imagenet_c("motion-blur", 2, imagenet)
    twin.rmdir()
    place = imagenet / "motion_blur" / "3"
    Image.new("RGB", (64, 64)).save(place / "n01" / "val_0.JPEG")
    with pytest.raises(DataError, match="n01.val_0.JPEG: 64 x 64 pixels, expected 16 x 16.*Tiny ImageNet-C"):
        imagenet_c("motion-blur", 3, imagenet).images(slice(None))
    for file in (place / "n01").iterdir():
        file.unlink()
    with pytest.raises(DataError, match="n01: there are no images"):
        imagenet_c("motion-blur", 3, imagenet)
    (place / "n01").rmdir()  # labels of the others would move down by one, and nobody would see it
    with pytest.raises(DataError, match="2 folders of classes, expected 3"):
        imagenet_c("motion-blur", 3, imagenet)
