"""Downloading, by the libraries that publish a dataset, where the user asks for it."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from robustbench_ext.errors import ConfigError, DataError, MissingExtraError, unknown_name
from robustbench_ext.named_data import Named, data_folder


def fetch_dataset(named: Named, argument: str = "", size: int = 28) -> Path:
    """Download all parts of a dataset into $RBX_DATA; what is there already is left as it is.

    Args:
        argument, size: of MedMNIST, which set at which size.

    Returns:
        The folder into which it was told to download.

    Raises:
        ConfigError: no such set or size.
        DataError: the download failed; with what the library said.
        MissingExtraError: medmnist is not installed.
    """
    library, _, name = named.fetched_by.partition(":")
    if library == "torchvision":
        return _torchvision(named, name)
    return _medmnist(argument, size)


def _torchvision(named: Named, name: str) -> Path:
    from torchvision import datasets

    root = data_folder()
    factory: Any = getattr(datasets, name)
    parts: list[dict[str, Any]] = [{"train": True}, {"train": False}]
    if name in ("SVHN", "STL10"):
        parts = [{"split": "train"}, {"split": "test"}]
    _made(root)
    for part in parts:
        try:
            factory(root=str(root), download=True, **part)
        except Exception as error:  # a library's downloader: whatever it raises is told
            raise DataError(
                f"torchvision could not download {named.title} into {root.absolute()} ({error}). Get it from {named.page} "
                f"yourself, and put it there as\n" + "\n".join(f"  {layout.says}" for layout in named.layouts)
            ) from error
    return root


def _medmnist(argument: str, size: int) -> Path:
    try:
        medmnist, info = import_module("medmnist"), import_module("medmnist.info").INFO
    except ImportError as error:
        raise MissingExtraError(
            "MedMNIST is downloaded by its own package: pip install 'robustbench-ext[medmnist]'"
        ) from error
    if argument not in info:
        raise ConfigError(f"rbx fetch medmnist:{argument}: {unknown_name('MedMNIST set', argument, info)}")
    suffix = "" if size == 28 else f"_{size}"
    if f"MD5{suffix}" not in info[argument]:
        raise ConfigError(f"rbx fetch medmnist:{argument}: there is no size {size}")
    root = data_folder() / "medmnist"
    _made(root)
    try:
        getattr(medmnist, info[argument]["python_class"])(split="test", download=True, root=str(root), size=size)
    except Exception as error:  # as above
        raise DataError(f"medmnist could not download {argument} into {root.absolute()}: {error}") from error
    return root


def _made(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"{folder.absolute()} cannot be made ({error}); set RBX_DATA to a folder of your own"
        ) from error
