"""Data and unknown inputs of a user's own code, named in suites: `data: file.py:make_data`, `{outliers: file.py:make_inputs}`.

    def make_data():
        return {"train": (x, y), "calibration": (x, y), "test": (x, y)}

    def make_inputs(n, shape):
        return torch.rand(n, *shape)

Both run in every process that needs them, so they have to give the same each time; torch's, numpy's and Python's own generators
are seeded for them. What they give is in every key, so an edited function that gives the same costs nothing, and one that gives
something else is measured anew.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import yaml

from robustbench_ext.data.base import ArraySplit, Dataset, Split
from robustbench_ext.data.given import given_dataset
from robustbench_ext.errors import ConfigError, DataError, RobustBenchExtError
from robustbench_ext.named_code import load_named, split_named

OPTION = "#"


def load_own_data(spec: str) -> Dataset:
    """The dataset that a function of the user's own gives.

    Args:
        spec: `file.py:make_data` or `pkg.module:make_data`, perhaps with keywords of the function, `file.py:make_data#n=500`.
            It gives a `Dataset` (tables and regression too), or what `given_dataset` reads: (x, y), which is test data, a
            mapping of splits to such pairs, a torch `Dataset`. A name that stands for one of these will do, too.

    Raises:
        ConfigError: there is no such function, or its keywords cannot be read.
        DataError: it raises, or gives something else.
    """
    named, *options = spec.split(OPTION)
    keywords = dict(_keyword(spec, option) for option in options)
    with _repeatable():  # a name may stand for what was drawn when its file was read
        found = load_named(named, "data")
    if callable(found) and not isinstance(found, Dataset):
        found = _called(f"data '{spec}'", found, **keywords)
    elif keywords:
        raise ConfigError(f"data '{spec}': it names a {type(found).__name__}, which takes no {', '.join(keywords)}")
    try:
        dataset = given_dataset(found, split_named(named)[1])
    except DataError as error:
        raise DataError(f"data '{spec}': {str(error).removeprefix('data').lstrip(':, ')}") from error
    return replace(dataset, name=spec, source=dataset.source if isinstance(found, Dataset) else f"made by {named}")


def _keyword(spec: str, option: str) -> tuple[str, Any]:
    key, equals, value = option.partition("=")
    if not equals or not key.isidentifier():
        raise ConfigError(f"data '{spec}': '{OPTION}{option}', expected {OPTION}key=value, such as {OPTION}n=500")
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"data '{spec}': option '{option}' cannot be read: {error}") from error


class OwnOutliers:
    """Unknown inputs from a user's own function `(n, shape) -> images`: see `robustbench_ext.data.outliers`.

    It gives at least two and at most n images of that shape (C, H, W), floats in [0, 1]. A larger n should begin with the
    images of a smaller one, as with those of ours; nothing depends on it.
    """

    def __init__(self, function: Any) -> None:
        self._own = function
        self.name, self.version, self.origin = str(function.name), str(function.version), str(function.origin)
        self.__doc__ = function.__doc__

    def __call__(self, n: int, shape: tuple[int, int, int]) -> Split:
        """At most n samples with the label -1.

        Raises:
            DataError: the function raises, or gives something else.
        """
        who = f"outliers '{self.origin}'"
        made = _called(who, self._own, n, tuple(shape))
        try:
            x = torch.as_tensor(made if isinstance(made, torch.Tensor) else np.asarray(made)).detach().cpu()
        except (TypeError, ValueError) as error:
            raise DataError(f"{who} gave a {type(made).__name__}, expected images as numbers ({error})") from None
        if x.shape[1:] != tuple(shape) or not 2 <= len(x) <= n:
            raise DataError(f"{who} gave shape {tuple(x.shape)}, expected (n, C, H, W) = {(n, *shape)} or fewer images")
        if not x.is_floating_point() or not bool(((x >= 0) & (x <= 1)).all()):
            told = f"from {float(x.min()):.3g} to {float(x.max()):.3g}" if x.numel() else ""
            raise DataError(f"{who} gave {str(x.dtype).removeprefix('torch.')} {told}, expected floats in [0, 1]")
        return ArraySplit(x.float(), np.full(len(x), -1), [f"{self.name}:{i:06d}" for i in range(len(x))])


def own_outliers(function: Any) -> OwnOutliers:
    """Outliers of a user's own function, see `OwnOutliers`."""
    return OwnOutliers(function)


def _called(who: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    try:
        with _repeatable():
            return function(*args, **kwargs)
    except RobustBenchExtError:
        raise
    except Exception as error:  # the user's own code
        raise DataError(f"{who} raised {type(error).__name__}: {error}") from error


@contextmanager
def _repeatable() -> Iterator[None]:
    """The global generators of torch, numpy and Python seeded inside the block, and as they were after it."""
    python, arrays = random.getstate(), np.random.get_state()  # noqa: NPY002 - users draw from it
    with torch.random.fork_rng([]):
        try:
            random.seed(0)
            np.random.seed(0)  # noqa: NPY002
            torch.manual_seed(0)
            yield
        finally:
            random.setstate(python)
            np.random.set_state(arrays)  # noqa: NPY002
