"""Datasets by name: a bundled name (`digits`), a published one (`cifar10`), or a source and an argument (`npz:PATH`)."""

from __future__ import annotations

import os
import re
from functools import lru_cache
from pathlib import Path

from robustbench_ext.catalog import DATASETS
from robustbench_ext.data.base import REGRESSION, Dataset
from robustbench_ext.data.longtail import split_spec
from robustbench_ext.errors import ConfigError, DataError
from robustbench_ext.named_code import source_files, split_source
from robustbench_ext.named_data import NAMED, find, names_code

# Names that take an argument, and what it is; where it is in brackets it may be left out.
_SOURCES = {
    "npz": "PATH",
    "folder": "PATH",
    "torchvision": "NAME",
    "digits-dg": "DOMAIN",
    "domains": "PATH",
    "rotated-mnist": "ANGLE",
    "coloured-mnist": "P",
    "csv": "PATH",
    "statsmodels": "NAME",
    "toy-cubic": "[NOISE]",
    "outcomes": "[SCENARIO]",
    "bayes-linear": "[KIND]",
}


def load_dataset(spec: str) -> Dataset:
    """Load `digits`, `mnist5k`, `npz:PATH`, `folder:PATH` or `torchvision:NAME`; a published set from $RBX_DATA, `cifar10`,
    `imagenet#size=224`, `pacs:DOMAIN` (see `robustbench_ext.named_data`); domains: `digits-dg:DOMAIN`,
    `domains:PATH#without=DOMAIN`, `rotated-mnist:ANGLE`, `coloured-mnist:P`; or data for regression: `diabetes`, `autompg`,
    `friedman`, `toy-heteroscedastic`, `toy-cubic:NOISE`, `csv:PATH#target=COLUMN`, `statsmodels:NAME`.
    Or what code of your own makes, `file.py:make_data` (see `robustbench_ext.data.own`).

    Classes may be followed by an imbalance, as in `mnist5k@exp:10`, `npz:PATH@step:100` (see `robustbench_ext.data.longtail`).

    Raises:
        ConfigError: the name or the imbalance is unknown, the argument is missing, or an imbalance is asked of regression data.
        DataError: the data is not there or does not keep the contract.
    """
    # An @ in the path or the options of a CSV file is part of it: there are no classes to cut.
    base, imbalance = (spec, None) if spec.startswith("csv:") else split_spec(spec)
    dataset = _load(base, _stamp(base))
    if imbalance is None:
        return dataset
    if dataset.task == REGRESSION:
        raise ConfigError(f"data '{spec}': an imbalance cuts classes, and '{base}' is regression data. Leave out the @")
    return imbalance.of(dataset)


def _stamp(spec: str) -> tuple[object, ...]:
    """What tells an edited file from the one that was loaded before."""
    source, argument = split_source(spec)
    path = Path(argument).expanduser()
    if names_code(spec):
        files = source_files(spec.partition("#")[0])
    elif (named := _name(spec)) in NAMED:
        return (os.environ.get("RBX_DATA"), *_named_stamp(named, spec[len(named) :].removeprefix(":")))
    elif source == "npz" and path.is_file():
        files = [path]
    elif source == "npz" and path.is_dir():
        files = sorted(path.glob("*.npy"))
    elif source == "csv":
        from robustbench_ext.data.tabular import csv_options

        files = [file for file in (csv_options(argument)[0],) if file.is_file()]
    elif source == "domains" and argument:
        from robustbench_ext.data.domains import domain_options

        files = sorted(f for f in domain_options(argument)[0].rglob("*") if f.is_file())
    elif source == "folder" and path.is_dir():
        files = sorted(f for f in path.rglob("*") if f.is_file())
    else:
        return (os.environ.get("RBX_DATA"),)
    return tuple((str(f), f.stat().st_mtime_ns, f.stat().st_size) for f in files)


def _name(spec: str) -> str:
    """What lies before the first : or #."""
    return re.split("[:#]", spec, maxsplit=1)[0]


def _named_stamp(name: str, rest: str) -> tuple[object, ...]:
    """Files, and folders of images with the folders in them: their times change with the names in them. To ask each of a
    million images would take longer than the rest of a run.
    """
    from robustbench_ext.data.named.options import root_of

    try:
        found = find(NAMED[name], root_of(rest))
    except DataError:
        return ()
    paths = [found.folder, *found.paths.values()]
    paths += [child for path in found.paths.values() if path.is_dir() for child in path.iterdir() if child.is_dir()]
    return tuple((str(p), p.stat().st_mtime_ns, p.stat().st_size) for p in paths)


@lru_cache(maxsize=4)
def _load(spec: str, stamp: tuple[object, ...]) -> Dataset:
    if names_code(spec):
        from robustbench_ext.data.own import load_own_data

        return load_own_data(spec)
    name, colon, argument = spec.partition(":")
    if (named := _name(spec)) in NAMED:
        rest = spec[len(named) :].removeprefix(":")
        if colon and spec[len(named)] == ":" and not NAMED[named].argument:
            raise ConfigError(
                f"data '{spec}': '{named}' takes no argument; options follow a #, as in {named}#root=FOLDER"
            )
        found: Dataset = DATASETS.load(named)(rest)
        return found
    if name not in DATASETS and Path(spec).exists():
        suffix = Path(spec).suffix.lower()
        kind = "folder" if Path(spec).is_dir() else "csv" if suffix in (".csv", ".tsv") else "npz"
        raise ConfigError(f"data '{spec}': a path needs its kind in front, such as {kind}:{spec}")
    loader = DATASETS.load(name)
    expected = _SOURCES.get(name)
    if colon and expected is None:
        raise ConfigError(f"data '{spec}': '{name}' takes no argument")
    if expected is not None and not argument and (colon or not expected.startswith("[")):
        raise ConfigError(f"data '{spec}': expected {name}:{expected.strip('[]')}")
    dataset: Dataset = loader(argument) if argument else loader()
    return dataset
