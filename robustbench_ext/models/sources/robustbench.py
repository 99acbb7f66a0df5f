"""`robustbench:NAME`: models of RobustBench's zoo (Croce et al., NeurIPS 2021), loaded by its own package.

The published package (1.1.1) cannot be imported on current systems as it is. `robustbench.loaders` imports `pkg_resources`,
which setuptools no longer has (as of 84), for the path of a file beside it; `robustbench.eval` imports AutoAttack from
`autoattack`, while the package that it requires, `pyautoattack`, is called otherwise. Neither is needed to load a model. So
while robustbench is imported, and only where they are missing, two stand-ins take their names: the first gives that path, the
second raises when it is used. They are gone afterwards, nothing is written into site-packages.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.resources import files
from types import ModuleType
from typing import Any

from torch import nn

from robustbench_ext.errors import MissingExtraError, ModelError, unknown_name
from robustbench_ext.models.sources.base import Found, Wanted, options, package, unsafe_allowed
from robustbench_ext.models.weights import refuse_old_torch

_NO_WEIGHTS_ONLY = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


def load(wanted: Wanted) -> Found:
    """A model of the zoo, which normalises inside itself and takes images in [0, 1].

    Options: `dataset` (cifar10, cifar100, imagenet), `threat_model` (Linf, L2, corruptions), `model_dir`: where checkpoints
    are, as MODEL_DIR/DATASET/THREAT_MODEL/NAME.pt (`models` by default, as RobustBench has it). Missing ones RobustBench
    downloads. Checkpoints are read with `weights_only=True`; old ones that hold more than tensors need unsafe loading.

    Raises:
        MissingExtraError: robustbench, or something that it imports, is not installed.
        ModelError: no such model, or a checkpoint that is not there or cannot be read.
    """
    chosen = options(wanted, dataset="cifar10", threat_model="Linf", model_dir="models")
    if wanted.weights is not None:
        raise ModelError(
            f"model '{wanted.spec}': RobustBench finds checkpoints by name; put {wanted.weights} at "
            f"{chosen['model_dir']}/{chosen['dataset']}/{chosen['threat_model']}/{wanted.name}.pt and leave out weights"
        )
    refuse_old_torch(f"model '{wanted.spec}'")
    theirs = _imported(wanted)
    _known(theirs, wanted, chosen)
    where = {name: chosen[name] for name in ("dataset", "threat_model", "model_dir")}
    try:
        with _torch_load_as_allowed():
            module: nn.Module = theirs.utils.load_model(model_name=wanted.name, **where)
    except Exception as error:  # requests, gdown, pickle, torch: each has its own
        raise ModelError(
            f"model '{wanted.spec}' cannot be loaded: {type(error).__name__}: {error}. Its checkpoint is expected at "
            f"{chosen['model_dir']}/{chosen['dataset']}/{chosen['threat_model']}/{wanted.name}.pt; RobustBench downloads it "
            f"where there is a network. One that holds more than tensors is read with --allow-unsafe-load, if you trust it."
        ) from error
    return Found(
        module, notes=[f"RobustBench {chosen['dataset']}, {chosen['threat_model']}; it normalises inside itself"]
    )


def _imported(wanted: Wanted) -> Any:
    """The package, with its modules `utils` and `model_zoo`."""
    if importlib.util.find_spec("robustbench") is None:
        return package("robustbench", "robustbench", wanted)  # which says how to install it
    with stand_ins():
        try:
            theirs = package("robustbench", "robustbench", wanted)
            importlib.import_module("robustbench.utils")
        except MissingExtraError:
            raise
        except Exception as error:  # its architectures reach into private parts of timm
            raise ModelError(
                f"model '{wanted.spec}': importing robustbench failed with {type(error).__name__}: {error}. It is written for "
                f"timm 1.0.9: pip install timm==1.0.9"
            ) from error
    return theirs


@contextmanager
def stand_ins() -> Iterator[None]:
    """Inside the block `pkg_resources` and `autoattack` can be imported even where they are not installed; see the module."""
    made: dict[str, ModuleType] = {}
    if importlib.util.find_spec("pkg_resources") is None:
        made["pkg_resources"] = _module("pkg_resources", {"resource_filename": _resource_filename})
    if importlib.util.find_spec("autoattack") is None:
        made["autoattack"] = _module("autoattack", {"AutoAttack": _Absent})
        made["autoattack.state"] = _module("autoattack.state", {"EvaluationState": _Absent})
    sys.modules.update(made)
    try:
        yield
    finally:
        for name, module in made.items():
            if sys.modules.get(name) is module:
                del sys.modules[name]


def _module(name: str, contents: Mapping[str, Any]) -> ModuleType:
    module = ModuleType(name, "Stand-in while robustbench is imported.")
    vars(module).update(contents)
    return module


def _resource_filename(package_or_module: str, path: str) -> str:
    """The path of a file beside a module."""
    return str(files(package_or_module.rpartition(".")[0] or package_or_module) / path)


class _Absent:
    """What is not installed and was only imported."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise MissingExtraError("this needs the package autoattack, which RobustBench imports and does not install")


def _known(theirs: Any, wanted: Wanted, chosen: dict[str, Any]) -> None:
    enums = importlib.import_module("robustbench.model_zoo.enums")
    try:
        dataset, threat = enums.BenchmarkDataset(chosen["dataset"]), enums.ThreatModel(chosen["threat_model"])
        names = theirs.model_zoo.model_dicts[dataset][threat]
    except (ValueError, KeyError) as error:
        raise ModelError(f"model '{wanted.spec}': RobustBench has no such zoo: {error}") from None
    if wanted.name not in names:
        raise ModelError(f"model '{wanted.spec}': {unknown_name('model of RobustBench', wanted.name, names)}")


@contextmanager
def _torch_load_as_allowed() -> Iterator[None]:
    """RobustBench leaves `weights_only` to PyTorch's default, which is True since 2.6; unsafe loading turns it off."""
    before = os.environ.get(_NO_WEIGHTS_ONLY)
    if unsafe_allowed():
        os.environ[_NO_WEIGHTS_ONLY] = "1"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(_NO_WEIGHTS_ONLY, None)
        else:
            os.environ[_NO_WEIGHTS_ONLY] = before
