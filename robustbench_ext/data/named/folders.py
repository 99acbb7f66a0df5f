"""Folders of image files as splits: what is in them, in an order that does not depend on the machine, and how many
there must be.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from robustbench_ext.data.base import Dataset, Split
from robustbench_ext.data.files import _IMAGE_SUFFIXES, _complete, _dataset, _ordered
from robustbench_ext.data.named.imaging import ImageFiles, Preparation
from robustbench_ext.errors import DataError
from robustbench_ext.named_data import Found, Named


def class_folders(base: Path) -> list[Path]:
    """The folders in a folder, by name."""
    return sorted(Path(entry.path) for entry in _scan(base) if entry.is_dir() and not entry.name.startswith("."))


def image_files(folder: Path) -> list[Path]:
    """The image files in a folder and all folders below it, by path."""
    found: list[Path] = []
    for entry in _scan(folder):
        path = Path(entry.path)
        if entry.is_dir():
            found += image_files(path)
        elif path.suffix.lower() in _IMAGE_SUFFIXES and not entry.name.startswith("."):
            found.append(path)
    return sorted(found)


def _scan(folder: Path) -> list[os.DirEntry[str]]:
    """Listing with `scandir`: it knows files from folders without asking for each, which counts at a million files."""
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed ({error.strerror or error})") from error


def sorted_split(base: Path, part: str, classes: Sequence[str], prepare: Preparation) -> Split:
    """BASE/CLASS/IMAGE as a split, every prefix of it stratified; ids are PART/CLASS/IMAGE (CLASS/IMAGE where part is
    empty).

    Raises:
        DataError: a class has no folder or no images, or there is a folder of another class.
    """
    folders = {folder.name: folder for folder in class_folders(base)}
    if set(folders) != set(classes):
        missing, odd = sorted(set(classes) - set(folders)), sorted(set(folders) - set(classes))
        raise DataError(
            f"{base}: expected a folder for each of {len(classes)} classes ({', '.join(classes[:3])}, ...)"
            + (f"; {', '.join(missing[:5])} missing" if missing else "")
            + (f"; {', '.join(odd[:5])} not among them" if odd else "")
        )
    files: list[Path] = []
    labels: list[int] = []
    for number, name in enumerate(classes):
        found = image_files(folders[name])
        if not found:
            raise DataError(f"{folders[name]}: there are no images")
        files += found
        labels += [number] * len(found)
    ids = [f"{part}/{file.relative_to(base).as_posix()}".lstrip("/") for file in files]
    return _ordered(ImageFiles(files, np.array(labels), ids, prepare))


def check_count(found: int, expected: int, what: str, place: Path) -> None:
    """Raise where a part of a published dataset has another size than it should."""
    if found != expected:
        raise DataError(
            f"{place}: {found:,} images, but {what} has {expected:,}. Is the archive unpacked to its end, and nothing added? "
            f"Part of a dataset is data of your own: folder:PATH"
        )


def from_folders(
    named: Named, name: str, found: Found, prepare: Preparation, numbers: list[str], classes: list[str] | None = None
) -> Dataset:
    """train/CLASS/IMAGE and test/CLASS/IMAGE, checked by their counts.

    Args:
        numbers: folder names that stand for class numbers, where the folders are named so.
        classes: names of the classes; by default those of their folders.
    """
    folders = [folder.name for folder in class_folders(found["test"])]
    if len(folders) != named.classes:
        raise DataError(f"{found['test']}: {len(folders)} folders, but {named.title} has {named.classes} classes")
    splits = {part: sorted_split(found[part], part, folders, prepare) for part in ("train", "test")}
    for part, split in splits.items():
        check_count(len(split), named.images[part], f"{named.title}'s {part} part", found[part])
    shown = classes if classes is not None and folders == numbers else folders
    source = f"{named.title}, folders of images, checked by their number alone"
    return _dataset(name, _complete(splits, name), shown, source)
