"""Test images that a model may have seen: exact copies of them in the training and calibration splits."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from robustbench_ext.checks import Check
from robustbench_ext.data.base import CLASSIFICATION, Dataset, Split

QUICK = 200_000_000  # values that are looked at without being asked: both CIFARs fit
TOLERATED = 0.001  # share of the test split: what it moves an accuracy by is below a tenth of a point
_BLOCK = 256


def duplicates(dataset: Dataset) -> list[tuple[str, str]]:
    """Ids of test samples beside the id of a sample of another split with the very same values; each test sample once.

    Splits are read block by block, and 16 bytes of each test image are kept. Resized, recompressed or cropped copies
    are not found.
    """
    test: dict[bytes, list[str]] = {}
    for name, digest in _digests(dataset["test"]):
        test.setdefault(digest, []).append(name)
    found = []
    for part in dataset.splits:
        if part != "test":
            for name, digest in _digests(dataset[part]):
                found += [(mine, name) for mine in test.pop(digest, [])]
    return sorted(found)


def _digests(split: Split) -> Iterator[tuple[str, bytes]]:
    for start in range(0, len(split), _BLOCK):
        rows = slice(start, min(start + _BLOCK, len(split)))
        x = split.inputs(rows).numpy()
        for name, values in zip(split.ids[rows].tolist(), x, strict=True):
            yield name, hashlib.blake2b(values.tobytes(), digest_size=16).digest()


def check_duplicates(dataset: Dataset, always: bool = False) -> Check | None:
    """Whether test images are in other splits too, as a check: a doubt where more than one in a thousand is.

    None where there is nothing to compare, the data is no images, or (unless `always`) there is so much of it that it
    would take more than seconds.
    """
    if dataset.task != CLASSIFICATION or "test" not in dataset.splits or len(dataset.splits) == 1:
        return None
    values = sum(map(len, dataset.splits.values()))
    for side in dataset.shape:
        values *= side
    if values > QUICK and not always:
        return None
    found, n = duplicates(dataset), len(dataset["test"])
    if not found:
        return Check("duplicates", "pass", f"none of the {n:,} test images is in another split, value for value")
    said = f"{len(found):,} of {n:,} test images are in another split too, such as {found[0][0]} and {found[0][1]}"
    if len(found) <= TOLERATED * n:
        return Check("duplicates", "pass", said)
    return Check(
        "duplicates", "doubt", said, "Their accuracy is that of training images. Remove them from one of the splits."
    )
