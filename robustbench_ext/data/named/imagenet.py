"""ImageNet (Russakovsky et al.: *ImageNet large scale visual recognition challenge*, IJCV 2015, arXiv 1409.0575) and
Tiny ImageNet.

Labels of the published test images are not public, so the validation images are the test split. Classes are WordNet
ids in sorted order, as in torchvision and in models trained with it. The published checksums are of the archives; of
the unpacked files, numbers and classes are checked.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from robustbench_ext.data.base import Dataset, Split, Subset
from robustbench_ext.data.files import _complete, _ordered
from robustbench_ext.data.named.folders import check_count, class_folders, image_files
from robustbench_ext.data.named.imaging import FILTERS, ImageFiles, Preparation
from robustbench_ext.data.named.options import Options
from robustbench_ext.errors import ConfigError, DataError
from robustbench_ext.named_data import NAMED, Found, Named, find

SIZE, RESIZE, TINY_SIZE = 224, 256, 64
CALIBRATION = ("train", "val", "none")
EVERY = 5  # of the validation images, one in so many calibrates where there is no training part
CALIBRATION_SIZE = 10_000  # images cut out of the training part: every one of them is seen by what calibrates
_WNID = re.compile(r"n\d{8}")
_DEVKIT = "ILSVRC2012_devkit_t12"


def imagenet(rest: str = "") -> Dataset:
    """`imagenet`: 3x224x224 by default, cut out of the middle of images whose shorter side was brought to 256.

    Options: `size=224`, `resize=256` (pixels), `interpolation=bilinear` (or bicubic), `root=FOLDER`, and `calibration`:

    - `train`: test is the whole validation part; 10,000 of the training images, in proportion, calibrate.
    - `val`: no training images are needed. 10,000 of the validation images, ten a class, calibrate; test is the other
      40,000.
    - `none`: test is the whole validation part, there is no other split. For runs that fit nothing.

    The specification decides, not what lies on the disk: a run means the same on every machine. Ids are WNID/FILE, as
    those of the published corruptions.
    """
    named, options = NAMED["imagenet"], Options("imagenet", rest, ("size", "resize", "interpolation", "calibration"))
    size, resize = options.number("size", SIZE), options.number("resize", RESIZE)
    if resize < size:
        raise ConfigError(f"data '{options.spec}': resize={resize} is smaller than size={size}, which is cut out of it")
    prepare = Preparation(size, resize, interpolation=options.choice("interpolation", FILTERS))
    calibration = options.choice("calibration", CALIBRATION)
    found = find(named, options.root)
    val = found["val"]
    train = val.parent / "train"
    if calibration == "train" and not train.is_dir():
        raise DataError(
            f"data 'imagenet': {val} is there, but not {train}. To evaluate without training images, write "
            f"imagenet#calibration=val (10,000 of the 50,000 validation images calibrate, the others are the test split), or "
            f"imagenet#calibration=none (all are the test split; for runs that fit no detector and no estimator)."
        )
    test_files = _sorted_by_class(val) or _labelled(val, _imagenet_labels(found, val))
    test, classes = _split(test_files, named, "val", prepare, val)
    if calibration == "train":
        whole, others = _split(_sorted_by_class(train), named, "train", prepare, train)
        if others != classes:
            raise DataError(f"{train} and {val} have different folders of classes")
        cut = len(whole) - min(CALIBRATION_SIZE, len(whole) // 4)
        splits: dict[str, Split] = {
            "train": Subset(whole, np.arange(cut)),
            "calibration": Subset(whole, np.arange(cut, len(whole))),
            "test": test,
        }
        said = "test is the validation part"
    elif calibration == "val":
        # The end of an order of which every prefix is in proportion, so that the first n test samples are those of the whole.
        cut = len(test) - len(test) // EVERY
        splits = {
            "calibration": Subset(test, np.arange(cut, len(test))),
            "test": Subset(test, np.arange(cut)),
        }
        said = f"test is four fifths of the validation part ({len(splits['test']):,} images), the others calibrate"
    else:
        splits, said = {"test": test}, "test is the validation part"
    source = f"{named.title}, {said}; {prepare}; checked by numbers and classes"
    return Dataset(options.name, splits, classes, (3, size, size), source)


def tiny_imagenet(rest: str = "") -> Dataset:
    """`tiny-imagenet`: 200 classes, 100,000 training images, of which a quarter calibrates; test is the validation
    part of 10,000.

    3x64x64 as published; `size=224` resizes, `interpolation=bilinear` (or bicubic); `root=FOLDER`. Ids are WNID/FILE.
    """
    named, options = NAMED["tiny-imagenet"], Options("tiny-imagenet", rest, ("size", "interpolation"))
    size = options.number("size", TINY_SIZE)
    kind = options.choice("interpolation", FILTERS)
    prepare = Preparation(size, None if size == TINY_SIZE else "square", interpolation=kind)
    found = find(named, options.root)
    val = found["val"]
    files = _sorted_by_class(val) or _labelled(val / "images", _tiny_labels(val))
    test, classes = _split(files, named, "val", prepare, val)
    train, others = _split(_sorted_by_class(found["train"]), named, "train", prepare, found["train"])
    if others != classes:
        raise DataError(f"{found['train']} and {val} have different classes")
    splits = _complete({"train": train, "test": test}, options.spec)
    source = f"{named.title}, test is the validation part; {prepare}; checked by numbers and classes"
    return Dataset(options.name, splits, classes, (3, size, size), source)


def _split(
    files: Mapping[str, list[Path]], named: Named, part: str, prepare: Preparation, place: Path
) -> tuple[Split, tuple[str, ...]]:
    classes = tuple(sorted(files))
    if len(classes) != named.classes:
        raise DataError(
            f"{place}: folders or labels of {len(classes)} classes (WordNet ids such as n01440764), but {named.title} has "
            f"{named.classes}. Of a selection of classes, make data of your own: folder:PATH"
        )
    listed = [file for name in classes for file in files[name]]
    check_count(len(listed), named.images[part], f"{named.title}'s {part} part", place)
    labels = np.repeat(np.arange(len(classes)), [len(files[name]) for name in classes])
    ids = [f"{name}/{file.name}" for name in classes for file in files[name]]
    return _ordered(ImageFiles(listed, labels, ids, prepare)), classes


def _sorted_by_class(base: Path) -> dict[str, list[Path]]:
    """BASE/WNID/IMAGE or BASE/WNID/images/IMAGE, by class; nothing where no folder is named by a WordNet id."""
    return {folder.name: image_files(folder) for folder in class_folders(base) if _WNID.fullmatch(folder.name)}


def _labelled(base: Path, labels: Mapping[str, str]) -> dict[str, list[Path]]:
    """BASE/IMAGE, by the classes that a list gives them."""
    files: dict[str, list[Path]] = {}
    for file in image_files(base):
        if file.stem not in labels:
            raise DataError(f"{file}: the list of labels does not name it")
        files.setdefault(labels[file.stem], []).append(file)
    return files


def _tiny_labels(val: Path) -> dict[str, str]:
    """val_annotations.txt: FILE, WNID and a box, divided by tabs."""
    file = val / "val_annotations.txt"
    if not file.is_file():
        raise DataError(
            f"{val}: neither folders of classes (val/WNID) nor val_annotations.txt. Unpack the whole archive."
        )
    rows = (line.split("\t") for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
    return {Path(row[0]).stem: row[1].strip() for row in rows if len(row) > 1}


def _imagenet_labels(found: Found, val: Path) -> dict[str, str]:
    """The WordNet id of each validation image, by the stem of its file, from the first list that is there."""
    home = found.folder
    places = [folder for folder in (val.parent, *val.parent.parents) if home == folder or home in folder.parents]
    for folder in places:
        if (csv := folder / "LOC_val_solution.csv").is_file():
            return _kaggle(csv)
        if (folder / "meta.bin").is_file():
            return _numbered(_from_torchvision(folder / "meta.bin"))
        if (folder / _DEVKIT / "data").is_dir():
            return _numbered(_from_devkit(folder / _DEVKIT / "data"))
    raise DataError(
        f"{val}: the images are not sorted into folders of classes (val/WNID/*.JPEG), and there is no list of their "
        f"labels. Put LOC_val_solution.csv (Kaggle), {_DEVKIT}/ (the development kit, unpacked) or torchvision's meta.bin "
        f"in {found.folder}"
    )


def _kaggle(file: Path) -> dict[str, str]:
    """ImageId,PredictionString: the first word is the class, the rest are boxes."""
    import csv

    with file.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    try:
        return {row["ImageId"]: row["PredictionString"].split()[0] for row in rows}
    except (KeyError, IndexError, AttributeError) as error:
        raise DataError(f"{file}: expected the columns ImageId and PredictionString, as Kaggle has them") from error


def _numbered(wnids: list[str]) -> dict[str, str]:
    return {f"ILSVRC2012_val_{number:08d}": wnid for number, wnid in enumerate(wnids, start=1)}


def _from_torchvision(file: Path) -> list[str]:
    import pickle

    import torch

    try:
        content: Any = torch.load(file, weights_only=True)
        return [str(wnid) for wnid in content[1]]
    except (
        RuntimeError,
        OSError,
        EOFError,
        ValueError,
        TypeError,
        IndexError,
        KeyError,
        pickle.UnpicklingError,
    ) as error:
        raise DataError(f"{file}: not the list of labels that torchvision writes ({error})") from error


def _from_devkit(data: Path) -> list[str]:
    """The ground truth holds numbers of the development kit, whose meta.mat gives each its WordNet id."""
    from scipy.io import loadmat

    truth = data / "ILSVRC2012_validation_ground_truth.txt"
    try:
        synsets = loadmat(data / "meta.mat", squeeze_me=True)["synsets"]
        wnids = {int(entry["ILSVRC2012_ID"]): str(entry["WNID"]) for entry in np.atleast_1d(synsets)}
        return [wnids[int(number)] for number in truth.read_text(encoding="utf-8").split()]
    except (OSError, KeyError, ValueError, IndexError) as error:
        raise DataError(f"{data}: cannot be read as the development kit of ILSVRC 2012 ({error})") from error
