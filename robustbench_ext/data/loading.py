"""Datasets by name: a bundled name (`digits`) or a source and an argument (`npz:PATH`)."""

from __future__ import annotations

from functools import lru_cache

from robustbench_ext.catalog import DATASETS
from robustbench_ext.data.base import Dataset
from robustbench_ext.errors import ConfigError

_SOURCES = ("npz", "folder", "torchvision")


@lru_cache(maxsize=4)
def load_dataset(spec: str) -> Dataset:
    """Load `digits`, `mnist5k`, `npz:PATH`, `folder:PATH` or `torchvision:NAME`.

    Raises:
        ConfigError: the name is unknown or the argument is missing.
        DataError: the data is not there or does not keep the contract.
    """
    name, colon, argument = spec.partition(":")
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
