"""Folders of images: how they are turned, what becomes of alpha, what a file that cannot be read is called, stable ids."""

import unicodedata

import numpy as np
import pytest
import torch
from PIL import Image

from robustbench_ext.data import load_dataset
from robustbench_ext.errors import DataError

TURN = 0x0112


def saved(place, pixels, mode="L", **options):
    place.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, dtype=np.uint8), mode).save(place, **options)


def ramp(i=0):
    """Every pixel another value, so that each turn shows; (4, 4) uint8."""
    return (np.arange(16).reshape(4, 4) * 15 + i).astype(np.uint8)


def folder(root, count=4, **options):
    for label in "ab":
        for i in range(count):
            saved(root / "test" / label / f"{i}.png", ramp(i), **options)
    return root


def by_id(spec):
    """Images by id, of all splits."""
    data = load_dataset(spec)
    return {
        name: x for split in data.splits.values() for name, x in zip(split.ids, split.images(slice(None)), strict=True)
    }


# EXIF -------------------------------------------------------------------------------------------------------------------

# What the tag says of the stored image, by the standard: how to turn it so that it is upright.
UPRIGHT = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: np.transpose,
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).T,
    8: np.rot90,
}


@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp"])
@pytest.mark.parametrize("turn", UPRIGHT)
def test_images_are_turned_as_every_viewer_turns_them(tmp_path, turn, suffix):
    exif = Image.Exif()
    exif[TURN] = turn
    options = {"exif": exif, **({"lossless": True} if suffix == ".webp" else {})}
    grey = ramp()
    pixels, mode = (np.stack([grey] * 3, axis=-1), "RGB") if suffix == ".webp" else (grey, "L")
    for label in "ab":
        for i in range(2):
            saved(tmp_path / "test" / label / f"{i}{suffix}", pixels, mode, **options)
    for x in by_id(f"folder:{tmp_path}").values():
        assert np.array_equal((x[0].numpy() * 255).round(), UPRIGHT[turn](grey))


def test_a_turned_image_has_another_key_and_one_that_is_not_has_its_old_one(tmp_path):
    """Earlier versions read it as it lies: their records must not be taken for its."""
    import hashlib

    from robustbench_ext.data.files import _digest

    exif = Image.Exif()
    saved(tmp_path / "plain.png", ramp())
    exif[TURN] = 1
    saved(tmp_path / "upright.png", ramp(), exif=exif)
    exif[TURN] = 6
    saved(tmp_path / "turned.png", ramp(), exif=exif)
    old = {
        name: hashlib.sha256((tmp_path / f"{name}.png").read_bytes()).hexdigest()
        for name in ("plain", "upright", "turned")
    }
    new = {name: _digest(tmp_path / f"{name}.png", upright=True) for name in old}
    assert new == {**old, "turned": f"{old['turned']} turned 6"}
    assert _digest(tmp_path / "turned.png", upright=False) == old["turned"]


def test_published_domains_are_read_as_they_lie(tmp_path):
    exif = Image.Exif()
    exif[TURN] = 6
    for domain in ("one", "two"):
        for label in "ab":
            for i in range(5):
                saved(tmp_path / domain / label / f"{i}.png", ramp(i), exif=exif)
    found = by_id(f"domains:{tmp_path}")
    for name, x in found.items():
        i = int(name.rpartition("/")[2][0])
        assert np.array_equal((x[0].numpy() * 255).round(), ramp(i))


# Alpha ------------------------------------------------------------------------------------------------------------------


def test_alpha_is_dropped_as_torchvision_drops_it_and_said(tmp_path):
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import ToTensor

    rgba = np.random.default_rng(0).integers(0, 256, (4, 4, 4)).astype(np.uint8)
    for label in "ab":
        for i in range(2):
            saved(tmp_path / "test" / label / f"{i}.png", rgba, "RGBA")
    theirs, _ = ImageFolder(tmp_path / "test", ToTensor())[0]
    for x in by_id(f"folder:{tmp_path}").values():
        assert torch.equal(x, theirs)
    assert "alpha channel; those are dropped" in load_dataset(f"folder:{tmp_path}").notes[0]


def test_without_alpha_nothing_is_said(tmp_path):
    assert load_dataset(f"folder:{folder(tmp_path)}").notes == ()


# Files that are wrong -----------------------------------------------------------------------------------------------------


def test_grey_and_colour_together_are_said_by_mode(tmp_path):
    folder(tmp_path)
    saved(tmp_path / "test" / "b" / "9.png", np.zeros((4, 4, 3)), "RGB")
    with pytest.raises(
        DataError, match=r"(in colour \(mode RGB\).*grey \(mode L\)|grey \(mode L\).*in colour \(mode RGB\))"
    ):
        by_id(f"folder:{tmp_path}")


def test_sizes_are_said_as_before(tmp_path):
    folder(tmp_path)
    saved(tmp_path / "test" / "b" / "9.png", np.zeros((4, 5)))
    with pytest.raises(DataError, match=r"All images of a folder must have one size"):
        by_id(f"folder:{tmp_path}")


def test_a_broken_png_is_named(tmp_path):
    """Pillow raises a SyntaxError where a chunk is not what it says it is."""
    folder(tmp_path)
    file = tmp_path / "test" / "a" / "1.png"
    raw = bytearray(file.read_bytes())
    place = raw.index(b"IDAT")
    raw[place - 8 : place - 8 + 4] = b"\x00\x01\x02\x03"
    file.write_bytes(bytes(raw))
    with pytest.raises((SyntaxError, OSError)), Image.open(file) as image:
        image.load()
    with pytest.raises(DataError, match=r"1\.png: cannot be read as an image"):
        by_id(f"folder:{tmp_path}")


@pytest.mark.parametrize("error", [SyntaxError("broken PNG file"), ValueError("x"), EOFError("x"), OSError("x")])
def test_whatever_pillow_raises_names_the_file(tmp_path, monkeypatch, error):
    from robustbench_ext.data.files import opened

    saved(tmp_path / "x.png", ramp())
    monkeypatch.setattr(Image, "open", lambda *args, **kwargs: (_ for _ in ()).throw(error))
    with pytest.raises(DataError, match=r"x\.png: cannot be read as an image"), opened(tmp_path / "x.png", True):
        pass


# Names --------------------------------------------------------------------------------------------------------------------


def test_ids_and_classes_do_not_depend_on_how_accents_are_written(tmp_path):
    ids, prints, classes = [], [], []
    for form in ("NFC", "NFD"):
        root = tmp_path / form
        for label in ("été", "ouvert"):
            for i, name in enumerate(("à", "b", "ç", "d")):
                place = root / "test" / unicodedata.normalize(form, label) / f"{unicodedata.normalize(form, name)}.png"
                saved(place, ramp(i))
        data = load_dataset(f"folder:{root}")
        ids.append({name: split.ids.tolist() for name, split in data.splits.items()})
        prints.append({name: split.fingerprint() for name, split in data.splits.items()})
        classes.append(data.classes)
    if len({*(p.name for p in (tmp_path / "NFD" / "test").iterdir())} & {"été"}):
        pytest.skip("this file system normalises names itself")
    assert ids[0] == ids[1]
    assert prints[0] == prints[1]
    assert classes[0] == classes[1] == ("ouvert", "été")
    assert all(name == unicodedata.normalize("NFC", name) for split in ids[1].values() for name in split)


def test_two_names_that_are_the_same_text_are_refused(tmp_path):
    folder(tmp_path)
    for form in ("NFC", "NFD"):
        saved(tmp_path / "test" / "a" / f"{unicodedata.normalize(form, 'é')}.png", ramp())
    if len(list((tmp_path / "test" / "a").iterdir())) < 6:
        pytest.skip("this file system keeps one of them")
    with pytest.raises(DataError, match="two files whose names are the same text"):
        load_dataset(f"folder:{tmp_path}")
