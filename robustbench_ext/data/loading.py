"""Datasets by name: a bundled name (`digits`) or a source and an argument (`npz:PATH`)."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path

from robustbench_ext.catalog import DATASETS
from robustbench_ext.data.base import Dataset
from robustbench_ext.data.longtail import split_spec
from robustbench_ext.errors import ConfigError

_SOURCES = ("npz", "folder", "torchvision")


def load_dataset(spec: str) -> Dataset:
    """Load `digits`, `mnist5k`, `npz:PATH`, `folder:PATH` or `torchvision:NAME`.

    Each may be followed by an imbalance, as in `mnist5k@exp:10`, `npz:PATH@step:100` (see `robustbench_ext.data.longtail`).

    Raises:
        ConfigError: the name or the imbalance is unknown, or the argument is missing.
        DataError: the data is not there or does not keep the contract.
    """
    base, imbalance = split_spec(spec)
    dataset = _load(base, _stamp(base))
    return dataset if imbalance is None else imbalance.of(dataset)


def _stamp(spec: str) -> tuple[object, ...]:
    """What tells an edited file from the one that was loaded before."""
    source, _, argument = spec.partition(":")
    path = Path(argument).expanduser()
    if source == "npz" and path.is_file():
        files = [path]
    elif source == "folder" and path.is_dir():
        files = sorted(f for f in path.rglob("*") if f.is_file())
    else:
        return (os.environ.get("RBX_DATA"),)
    return tuple((str(f), f.stat().st_mtime_ns, f.stat().st_size) for f in files)


@lru_cache(maxsize=4)
def _load(spec: str, stamp: tuple[object, ...]) -> Dataset:
    name, colon, argument = spec.partition(":")
    if name not in DATASETS and Path(spec).exists():
        kind = "folder" if Path(spec).is_dir() else "npz"
        raise ConfigError(f"data '{spec}': a path needs its kind in front, such as {kind}:{spec}")
    loader = DATASETS.load(name)
    if name in _SOURCES:
        if not argument:
            raise ConfigError(f"data '{spec}': expected {name}:{'NAME' if name == 'torchvision' else 'PATH'}")
        dataset: Dataset = loader(argument)
        return dataset
    if colon:
        raise ConfigError(f"data '{spec}': '{name}' takes no argument")
    bundled: Dataset = loader()
    return bundled
