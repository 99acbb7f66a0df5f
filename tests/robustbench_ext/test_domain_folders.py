"""Domains from folders and from MNIST digits: labels by name, splits without leaks, sizes, angles, colours."""

import numpy as np
import pytest
import torch
from PIL import Image

from robustbench_ext.data import load_dataset
from robustbench_ext.data.base import SPLITS
from robustbench_ext.data.digits_dg import _mnist5k
from robustbench_ext.data.domains import domain_options
from robustbench_ext.errors import ConfigError, DataError

DOMAINS = {"art": 40, "photo": 120, "sketch": 200}  # and their red


def picture(place, red, blue, size=(20, 16), mode="RGB"):
    place.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (red, 0, blue)).convert(mode).save(place)


@pytest.fixture
def folder(tmp_path):
    """Three domains of two classes: red says the domain, blue the class. PNG keeps both."""
    for domain, red in DOMAINS.items():
        for k, label in enumerate(("dog", "cat")):
            for i in range(10):
                picture(tmp_path / domain / label / f"{i}.png", red, 100 + k)
    (tmp_path / "splits").mkdir()  # no domain: it has no folders
    (tmp_path / "splits" / "list.txt").write_text("x")
    return tmp_path


def seen(dataset):
    """Every sample's domain, red, blue, label."""
    rows = []
    for split in dataset.splits.values():
        x = (split.images(slice(None)) * 255).round()
        rows += zip(split.domains, x[:, 0, 0, 0].tolist(), x[:, 2, 0, 0].tolist(), split.labels.tolist(), strict=True)
    return rows


def test_domains_are_chosen_and_labels_are_names(folder):
    for options, names in {
        "": {"art", "photo", "sketch"},
        "#only=photo": {"photo"},
        "#only=photo+art": {"art", "photo"},
        "#without=photo": {"art", "sketch"},
        "#without=photo+art": {"sketch"},
    }.items():
        data = load_dataset(f"domains:{folder}{options}")
        assert data.classes == ("cat", "dog") and data.shape == (3, 16, 20)
        rows = seen(data)
        assert len(rows) == 20 * len(names) and {row[0] for row in rows} == names
        # cat is class 0 and has blue 101, dog class 1 and 100.
        assert all(red == DOMAINS[domain] and blue == 101 - label for domain, red, blue, label in rows)
        assert [len(data[s]) for s in SPLITS] == [12 * len(names), 4 * len(names), 4 * len(names)]
        for split in data.splits.values():
            assert np.bincount(split.labels).tolist() == [len(split) // 2] * 2
    assert all("/" in i and i.partition("/")[0] in names for i in data["test"].ids)
    alone, all_but = (load_dataset(f"domains:{folder}#{o}=sketch") for o in ("only", "without"))
    assert not {i for s in alone.splits.values() for i in s.ids} & {i for s in all_but.splits.values() for i in s.ids}


def test_sizes_and_modes_become_one(folder):
    picture(folder / "art" / "cat" / "grey.png", 200, 0, (64, 48), "L")
    with pytest.raises(DataError, match="#size=224"):
        seen(load_dataset(f"domains:{folder}#only=art"))
    data = load_dataset(f"domains:{folder}#only=art#size=8")
    assert data.shape == (3, 8, 8) and len(seen(data)) == 21
    part = next(s for s in data.splits.values() if "art/cat/grey.png" in s.ids)
    x = part.images(np.flatnonzero(part.ids == "art/cat/grey.png"))
    assert x.shape == (1, 3, 8, 8) and float(x.max() - x.min()) == 0  # grey in all channels: 0.299 * 200
    assert float(x.mean()) * 255 == pytest.approx(60, abs=1)
    other = load_dataset(f"domains:{folder}#only=art#size=16")
    assert other["test"].fingerprint() != data["test"].fingerprint()


def test_resizing_averages(tmp_path):
    stripes = np.zeros((32, 32, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    for label in ("a", "b"):
        for i in range(5):
            place = tmp_path / "one" / label / f"{i}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(stripes).save(place)
    x = load_dataset(f"domains:{tmp_path}#size=8")["train"].images(slice(0, 1))
    assert float((x[..., 1:-1] - 0.5).abs().max()) < 0.02  # without antialiasing: all black or all white


def test_split_folders_are_kept(tmp_path):
    for domain, red in (("syn", 10), ("svhn", 20)):
        for part, n in (("train", 8), ("val", 4)):
            for label in "01":
                for i in range(n):
                    picture(tmp_path / domain / part / label / f"{i}.jpg", red, 0)
    data = load_dataset(f"domains:{tmp_path}#only=syn#size=8")
    assert data.classes == ("0", "1")
    assert all(i.startswith("syn/val/") for i in data["calibration"].ids) and len(data["calibration"]) == 8
    # No test folder: a quarter of train.
    assert [len(data[s]) for s in ("train", "test")] == [12, 4]
    assert not set(data["train"].ids) & set(data["test"].ids)


def test_vlcs_has_its_own_names_for_splits(tmp_path):
    for part, n in (("train", 6), ("crossval", 2), ("test", 3), ("full", 11)):
        for label in ("bird", "car"):
            for i in range(n):
                picture(tmp_path / "CALTECH" / part / label / f"{part}{i}.png", 10, 0)
                picture(tmp_path / "SUN" / "full" / label / f"{part}{i}.png", 10, 0)
    data = load_dataset(f"domains:{tmp_path}#only=CALTECH")
    assert data.classes == ("bird", "car") and [len(data[s]) for s in SPLITS] == [12, 4, 6]
    assert all(i.startswith("CALTECH/crossval/") for i in data["calibration"].ids)
    assert not any("/full/" in i for split in data.splits.values() for i in split.ids)
    alone = load_dataset(f"domains:{tmp_path}#only=SUN")
    assert alone.classes == ("bird", "car") and sum(len(alone[s]) for s in SPLITS) == 2 * 22


def test_what_cannot_be_loaded_says_why(folder, tmp_path_factory):
    for argument, error, match in (
        ("#only=painting", ConfigError, "Known: art, photo, sketch"),
        ("#without=art+photo+sketch", ConfigError, "no domain is left"),
        ("#only=art#without=photo", ConfigError, "exclude each other"),
        ("#sise=224", ConfigError, "Did you mean 'size'"),
        ("#size=big", ConfigError, "#size=224"),
        ("#only=", ConfigError, "needs a value"),
        ("/nowhere", DataError, "there is no such folder"),
    ):
        with pytest.raises(error, match=match):
            load_dataset(f"domains:{folder}{argument}")
    with pytest.raises(DataError, match=r"DOMAIN/CLASS/IMAGE"):
        load_dataset(f"domains:{tmp_path_factory.mktemp('empty')}")
    with pytest.raises(ConfigError, match="expected domains:PATH"):
        load_dataset("domains")
    (folder / "odd" / "train" / "cat").mkdir(parents=True)
    with pytest.raises(DataError, match="odd.*holds no images"):
        load_dataset(f"domains:{folder}")
    (folder / "a#only=b").mkdir()
    assert domain_options(f"{folder}/a#only=b") == (folder / "a#only=b", {})


def test_an_edited_folder_is_read_again(folder):
    before = load_dataset(f"domains:{folder}#only=art")["train"].fingerprint()
    for file in (folder / "art").rglob("*.png"):
        picture(file, 41, 100, (20, 16))
    assert load_dataset(f"domains:{folder}#only=art")["train"].fingerprint() != before


# Rotated and coloured digits ------------------------------------------------------------------------------------------


def test_digits_are_turned_counter_clockwise():
    plain = _mnist5k()
    x = plain["test"].images(slice(0, 50))
    for angle, expected in (
        (0, x),
        (90, torch.rot90(x, 1, (2, 3))),
        (-90, torch.rot90(x, -1, (2, 3))),
        (180, x.flip(2, 3)),
    ):
        turned = load_dataset(f"rotated-mnist:{angle}")
        assert turned.shape == (1, 28, 28) and turned.classes == plain.classes
        assert torch.allclose(
            turned["test"].images(np.arange(len(turned["test"])))[_order(turned, plain)][:50], expected, atol=1e-6
        )
    from scipy.ndimage import rotate

    thirty = load_dataset("rotated-mnist:30")
    ours = thirty["test"].images(_order(thirty, plain)[:50]).numpy()
    theirs, inside = (rotate(a, 30, axes=(-2, -1), reshape=False, order=1) for a in (x.numpy(), np.ones((28, 28))))
    # Positive is counter-clockwise there too. Both are bilinear, rounded to 8 bits here; scipy cuts off hard at the border.
    assert (inside > 0).mean() > 0.8 and np.abs(ours - theirs)[..., inside > 0.5].max() < 0.6 / 255


def _order(turned, plain):
    """Where each of the plain samples is among the turned ones, whose ids have the domain in front."""
    place = {i.partition("/")[2]: k for k, i in enumerate(turned["test"].ids.tolist())}
    return np.array([place[i] for i in plain["test"].ids.tolist()])


def test_angles_share_digits_and_splits():
    data = load_dataset("rotated-mnist:0+45")
    assert len(data["test"]) == 2000 and set(data["test"].domains) == {"0", "45"}
    digits = {part: {i.partition("/")[2] for i in data[part].ids} for part in SPLITS}
    assert not digits["train"] & digits["test"] and not digits["calibration"] & digits["test"]


def test_colours_and_labels_are_as_likely_as_they_should_be():
    plain = _mnist5k()
    digit = {
        i: k for split in plain.splits.values() for i, k in zip(split.ids.tolist(), split.labels.tolist(), strict=True)
    }
    labels, wrong = {}, {}
    for p in (0.0, 0.1, 0.2, 0.9):
        data = load_dataset(f"coloured-mnist:{p}")
        assert data.classes == ("0-4", "5-9") and data.shape == (3, 28, 28)
        rows = []
        for split in data.splits.values():
            x = split.images(slice(None))
            assert float(x[:, 2].max()) == 0
            red, green = (x[:, c].amax(dim=(1, 2)) > 0 for c in (0, 1))
            assert bool((red ^ green).all())  # one colour, and some of it
            rows += zip((i.partition("/")[2] for i in split.ids), split.labels.tolist(), red.tolist(), strict=True)
        assert len(rows) == 5000
        labels[p] = {i: label for i, label, _ in rows}
        wrong[p] = {i for i, label, red in rows if red != bool(label)}
        # Four standard errors of a proportion of 5,000.
        assert len(wrong[p]) / 5000 == pytest.approx(p, abs=4 * (p * (1 - p) / 5000) ** 0.5)
        flipped = np.mean([label != (digit[i] >= 5) for i, label, _ in rows])
        assert flipped == pytest.approx(0.25, abs=4 * (0.25 * 0.75 / 5000) ** 0.5)
    assert labels[0.0] == labels[0.2] == labels[0.9] and wrong[0.1] < wrong[0.2] < wrong[0.9]
    joint = load_dataset("coloured-mnist:0.1+0.2")
    assert len(joint["train"]) == 6000 and set(joint["train"].domains) == {"0.1", "0.2"}


def test_numbers_out_of_range_are_errors():
    for spec, match in (
        ("rotated-mnist:200", "-180 to 180"),
        ("rotated-mnist:left", "degrees"),
        ("coloured-mnist:1.5", "a probability from 0 to 1"),
        ("coloured-mnist:0.1+nan", "'nan'"),
        ("coloured-mnist", "expected coloured-mnist:P"),
    ):
        with pytest.raises(ConfigError, match=match):
            load_dataset(spec)
