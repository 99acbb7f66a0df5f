"""Image files of a published dataset, read when they are asked for, in one size."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from robustbench_ext.data.base import Split, as_floats
from robustbench_ext.data.named.checking import mistaken, recall, remember
from robustbench_ext.errors import DataError
from robustbench_ext.fingerprint import hash_strings

if TYPE_CHECKING:
    from PIL import Image

FILTERS = ("bilinear", "bicubic")


@dataclass(frozen=True)
class Preparation:
    """How an image file becomes an array.

    Attributes:
        size: sides of the result.
        resize: None takes images as they are, which must have that size; "square" brings any shape to it; a number
            brings the shorter side to it and cuts the middle out, as torchvision's `Resize(resize)` and
            `CenterCrop(size)` do on images.
        mode: "RGB", or "L" for grey.
        interpolation: "bilinear" or "bicubic", with antialiasing either way (Pillow's).
    """

    size: int
    resize: int | str | None = None
    mode: str = "RGB"
    interpolation: str = "bilinear"

    def __str__(self) -> str:
        if self.resize is None:
            return f"{self.mode} {self.size}"
        how = "square" if self.resize == "square" else f"shorter side {self.resize}, centre"
        return f"{self.mode} {self.size} ({how}, {self.interpolation})"

    def __call__(self, image: Image.Image) -> np.ndarray:
        """uint8 (C, size, size).

        Raises:
            ValueError: a mode without a fixed range, or another size where none is to be made.
        """
        from PIL import Image

        if image.mode.startswith("I") or image.mode == "F":
            raise ValueError(f"mode {image.mode}: more than 8 bits a channel, which the published images do not have")
        image = image.convert(self.mode)
        kind = Image.Resampling.BICUBIC if self.interpolation == "bicubic" else Image.Resampling.BILINEAR
        if self.resize == "square":
            image = image.resize((self.size, self.size), kind)
        elif isinstance(self.resize, int):
            image = _crop(image, self.resize, self.size, kind)
        if image.size != (self.size, self.size):
            raise ValueError(f"{image.size[0]} x {image.size[1]} pixels, expected {self.size} x {self.size}")
        array = np.asarray(image)
        return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def _crop(image: Image.Image, shorter: int, size: int, kind: Image.Resampling) -> Image.Image:
    """torchvision's arithmetic: the longer side is cut down to whole pixels, the place of the crop rounded."""
    width, height = image.size
    if width <= height:
        width, height = shorter, int(shorter * height / width)
    else:
        width, height = int(shorter * width / height), shorter
    if image.size != (width, height):
        image = image.resize((width, height), kind)
    left, top = round((width - size) / 2.0), round((height - size) / 2.0)
    return image.crop((left, top, left + size, top + size))


class ImageFiles(Split):
    """Image files in the given order.

    Args:
        ids: one for each, the same for every layout of the dataset.
        prepare: part of the fingerprint, as the images depend on it.
    """

    def __init__(self, files: Sequence[Path], labels: np.ndarray, ids: Sequence[str], prepare: Preparation) -> None:
        self._files, self._prepare = files, prepare
        self.labels = np.asarray(labels, dtype=np.int64)
        self.ids = np.asarray(ids, dtype=np.str_)

    def images(self, index: np.ndarray | slice) -> Tensor:
        chosen = np.arange(len(self._files))[index]
        channels = 1 if self._prepare.mode == "L" else 3
        pixels = np.empty((len(chosen), channels, self._prepare.size, self._prepare.size), dtype=np.uint8)
        for row, number in enumerate(chosen.tolist()):
            pixels[row] = self._read(self._files[number])
        return torch.from_numpy(as_floats(pixels))

    def _read(self, file: Path) -> np.ndarray:
        from PIL import Image

        try:
            with Image.open(file) as image:
                return self._prepare(image)
        # Pillow reports what is wrong inside a file in all of these ways.
        except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
            kind = mistaken(file) if file.is_file() else None
            raise DataError(
                f"{file}: cannot be read ({f'it is {kind}' if kind else error}). Unpack the archive again, or replace the file."
            ) from error

    @cached_property
    def _fingerprint(self) -> str:
        listed = hashlib.sha256(str(self._prepare).encode())
        for file, name, label in zip(self._files, self.ids.tolist(), self.labels.tolist(), strict=True):
            status = file.stat()
            listed.update(f"{file.absolute()}|{status.st_size}|{status.st_mtime_ns}|{name}|{label}\n".encode())
        key = f"fingerprint|{listed.hexdigest()}"
        found = recall(key)
        if found is None:
            digests = (hashlib.sha256(file.read_bytes()).hexdigest() for file in self._files)
            found = hash_strings([*digests, *self.ids.tolist(), *map(str, self.labels.tolist()), str(self._prepare)])
            remember(key, found)
        return found

    def fingerprint(self) -> str:
        return self._fingerprint
