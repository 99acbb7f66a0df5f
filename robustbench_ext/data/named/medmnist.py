"""MedMNIST: medical images of one size in `.npz` files.

Yang, Shi, Wei, Liu, Zhao, Ke, Pfister, Ni: *MedMNIST v2*, Scientific Data 2023, arXiv 2110.14795; larger sizes in
MedMNIST+. Checksums, names of classes and tasks are read from the package `medmnist` where it is installed.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

from robustbench_ext.data.base import Dataset, Split
from robustbench_ext.data.files import _Archive, _Arrays, _as_images, _as_labels, _dataset
from robustbench_ext.data.named.checking import refuse_mistaken, verify
from robustbench_ext.data.named.folders import check_count
from robustbench_ext.data.named.options import Options
from robustbench_ext.errors import ConfigError, DataError, unknown_name
from robustbench_ext.named_data import NAMED, medmnist_folders

SIDE = 28
SIDES = (28, 64, 128, 224)
_PARTS = {"train": "train", "calibration": "val", "test": "test"}


def medmnist(rest: str = "") -> Dataset:
    """`medmnist:NAME`, such as `medmnist:pathmnist`, with its published train, val (calibration) and test parts.

    Options: `size=28` (or 64, 128, 224: MedMNIST+), `root=FOLDER`. Sets with several labels an image and volumes are
    refused.
    """
    named, options = NAMED["medmnist"], Options("medmnist", rest, ("size",))
    name, side = options.argument.lower(), options.number("size", SIDE)
    info = _info()
    if not name or (info is not None and name not in info):
        known = (
            unknown_name("MedMNIST set", name, info) if info and name else "expected medmnist:NAME, such as pathmnist"
        )
        raise ConfigError(f"data '{options.spec}': {known}")
    if side not in SIDES:
        raise ConfigError(f"data '{options.spec}': size={side}, expected one of {', '.join(map(str, SIDES))}")
    about = info[name] if info is not None else None
    if about is not None:
        _refuse(options.spec, about["task"], str(about["python_class"]).endswith("3D"))
    suffix = "" if side == SIDE else f"_{side}"
    file = _file(f"{name}{suffix}.npz", options.root)
    if about is not None:
        verify(file, about[f"MD5{suffix}"], f"{named.title}, {name}")
        how = "MD5 as published"
    else:
        refuse_mistaken(file, f"{name} of MedMNIST")
        how = "not checked, as the package medmnist, which knows the checksums, is not installed"
    archive = _Archive(file, str(file))
    splits: dict[str, Split] = {}
    for split, part in _PARTS.items():
        if missing := {f"{part}_images", f"{part}_labels"} - archive.names:
            raise DataError(f"{file}: no array {', '.join(sorted(missing))}; expected {part}_images and {part}_labels")
        labels = archive.load(f"{part}_labels")
        if labels.ndim == 2 and labels.shape[1] > 1:
            _refuse(options.spec, "multi-label", False)
        images = archive.images(f"{part}_images")
        if images.ndim == 5 or (images.ndim == 4 and images.shape[3] not in (1, 3)):
            _refuse(options.spec, "", True)
        x = _as_images(images, f"{file}: {part}_images")
        if tuple(x.shape[2:]) != (side, side):
            raise DataError(f"{file}: images of {x.shape[3]} x {x.shape[2]} pixels, expected {side} x {side}")
        if about is not None:
            check_count(len(x), about["n_samples"][part], f"{name}'s {part} part", file)
        splits[split] = _Arrays(x, _as_labels(labels, str(file)), f"{name}:{part}:", 6)
    classes = [label for _, label in sorted(about["label"].items(), key=lambda i: int(i[0]))] if about else None
    return _dataset(options.name, splits, classes, f"{named.title}, {name}, {how}", tuple(archive.notes))


def _info() -> Any:
    """What the package says of its sets, by name; None where it is not installed."""
    if importlib.util.find_spec("medmnist") is None:
        return None
    try:
        return importlib.import_module("medmnist.info").INFO
    except ImportError:  # one of its own requirements is missing
        return None


def _refuse(spec: str, task: str, volume: bool) -> None:
    if volume:
        raise DataError(f"data '{spec}': its samples are volumes (3-D), not images; everything here works on images")
    if "multi-label" in task:
        raise DataError(
            f"data '{spec}': an image has several labels (multi-label), and accuracy, attacks and calibration here are of one "
            f"label each. Choose a label and store it as npz: or folder: data of your own."
        )


def _file(name: str, root: Path | None) -> Path:
    places = [root] if root is not None else medmnist_folders()
    for place in places:
        if (place / name).is_file():
            return place / name
    stem = name.removesuffix(".npz")
    raise DataError(
        f"data 'medmnist:{stem}': no {name} in {', '.join(str(p.absolute()) for p in dict.fromkeys(places))}. Get it from "
        f"{NAMED['medmnist'].page} and put it in the first of these, or set RBX_DATA; to fetch it with the package medmnist: "
        f"rbx fetch medmnist:{stem.partition('_')[0]}"
    )
