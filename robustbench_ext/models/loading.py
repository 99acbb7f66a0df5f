"""Models by name. One function understands every spelling:

    small-cnn                       a reference network with fresh weights
    small-cnn + weights.safetensors an architecture and its weights (or a .pt file that holds nothing but tensors)
    runs/x/models/KEY               a checkpoint that this project trained (a folder)
    pkg.module:factory              an importable factory of your own
    path/file.py:factory            a factory in a file
    torchvision:resnet18            SOURCE:NAME of one of the sources in `robustbench_ext.catalog.SOURCES`
    timm:resnet18#resize=64         with options, as `kwargs` would give them

A factory is any callable that returns a `torch.nn.Module`, or a module object itself. Naming one runs its code. Two options are
understood for every source but those factories: `resize` and `channels` adapt inputs inside the model (`models.adapt`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from robustbench_ext.catalog import MODELS, SOURCES
from robustbench_ext.data.base import Dataset
from robustbench_ext.errors import ModelError, unknown_name
from robustbench_ext.models.adapt import adapt, adapted_shape, advice
from robustbench_ext.models.fingerprints import fingerprint_module
from robustbench_ext.models.imports import made_by
from robustbench_ext.models.sources.base import Found, Wanted, seeded
from robustbench_ext.models.weights import load_weights
from robustbench_ext.models.wrap import wrap
from robustbench_ext.named_code import split_named, split_source

__all__ = ["RECIPE_FILE", "WEIGHTS_FILE", "LoadedModel", "fingerprint_module", "load_model"]

WEIGHTS_FILE, RECIPE_FILE = "model.safetensors", "model.json"


@dataclass(frozen=True)
class LoadedModel:
    """A model that takes raw images in [0, 1] and returns logits, with what is known of its origin."""

    spec: str
    module: nn.Module
    fingerprint: str
    notes: tuple[str, ...] = ()


def load_model(
    spec: str,
    *,
    shape: tuple[int, int, int] = (1, 28, 28),
    num_classes: int = 10,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    weights: str | None = None,
    kwargs: Mapping[str, Any] | None = None,
    device: torch.device | str = "cpu",
    seed: int = 0,
    data: Dataset | None = None,
) -> LoadedModel:
    """Load a model by its specification.

    Args:
        spec: see the module's docstring.
        shape, num_classes: of the data; reference networks and fresh networks of other packages are built to them.
        mean, std: normalisation that the model expects, applied inside it; instead of what its source knows.
        weights: a safetensors file, a .pt file of tensors, or the name of published weights such as `DEFAULT`.
        kwargs: passed on to the factory, architecture or source.
        seed: of fresh weights and of fitting; factories seed themselves.
        data: what scikit-learn's classifiers are fitted to.

    Raises:
        ModelError: nothing of that name, a factory that fails, weights that do not fit.
        MissingExtraError: the source needs a package that is not installed.
    """
    wanted = _read(spec, num_classes, weights, dict(kwargs or {}), seed, data)
    said, given = dict(wanted.kwargs), shape
    if wanted.source:
        given = adapted_shape(wanted.kwargs.pop("resize", None), wanted.kwargs.pop("channels", None), shape)
    found = _found(replace(wanted, shape=given))
    notes = [*found.notes, *advice(found.size, given)]
    if found.weights is not None:
        notes += load_weights(found.module, Path(found.weights))
    if mean is None and std is None:
        mean, std = found.mean, found.std
    elif found.mean is not None:
        notes.append(f"mean={_listed(mean)} and std={_listed(std)} as given, instead of what was read")
    module, adapted = adapt(found.module, shape, given)
    module = wrap(module, mean, std).to(device)
    return LoadedModel(spec, module, fingerprint_module(module, said), (*notes, *adapted))


def _listed(values: Sequence[float] | None) -> list[float] | None:
    return None if values is None else list(values)


NAMES_OF_FILES = ("hf", "onnx", "pt2", "pickle", "torchscript", "predict_proba")  # sources whose names may hold a plus
_OPTION = re.compile(r"#([A-Za-z_]\w*)=([^#]*)$")


def _read(
    spec: str, num_classes: int, weights: str | None, kwargs: dict[str, Any], seed: int, data: Dataset | None
) -> Wanted:
    """What a specification asks for."""
    # The name of a file may hold a plus of its own.
    plus = " + " if " + " in spec or split_source(spec)[0] in NAMES_OF_FILES else "+"
    name, found, file = (part.strip() for part in spec.partition(plus))
    while ":" in name and (option := _OPTION.search(name)):
        try:
            kwargs[option[1]] = yaml.safe_load(option[2])
        except yaml.YAMLError as error:
            raise ModelError(f"model '{spec}': option {option[0]} cannot be read: {error}") from error
        name = name[: option.start()]
    source, rest = split_source(name)
    source = source if source in SOURCES else ""
    if source and "weights" in kwargs:
        weights = str(kwargs.pop("weights"))
    weights = file if found else weights
    return Wanted(spec, rest if source else name, (0, 0, 0), num_classes, source, weights, kwargs, seed, data)


def _found(wanted: Wanted) -> Found:
    name = wanted.name
    if wanted.source:
        found: Found = SOURCES.load(wanted.source)(wanted)
        return found
    if (Path(name) / RECIPE_FILE).is_file():
        return Found(_checkpoint(Path(name)), weights=wanted.weights)
    if name in MODELS:
        with seeded(wanted.seed):  # fresh weights are the same weights every time
            module = MODELS.load(name)(wanted.shape[0], wanted.num_classes, wanted.shape[1], **wanted.kwargs)
        return Found(module, weights=wanted.weights)
    if split_named(name)[1]:
        with seeded(0):  # a factory that does not seed itself must still give the same weights in every process
            module = made_by(name, wanted.kwargs, lambda thing: isinstance(thing, nn.Module), "a torch.nn.Module")
        return Found(module, weights=wanted.weights)
    if name.endswith(".py"):
        raise ModelError(f"model '{name}': name the factory in the file, such as {name}:build")
    known = unknown_name("model", name, MODELS.names())
    raise ModelError(
        f"{known} Or give pkg.module:factory, file.py:factory, a checkpoint folder, or SOURCE:NAME with one of the sources "
        f"{', '.join(SOURCES.names())} (`rbx list models`)."
    )


def _checkpoint(folder: Path) -> nn.Module:
    recipe = json.loads((folder / RECIPE_FILE).read_text(encoding="utf-8"))
    built = recipe["architecture"]
    shape = tuple(built["shape"])
    loaded = load_model(
        built["spec"],
        shape=(shape[0], shape[1], shape[2]),
        num_classes=built["num_classes"],
        mean=built.get("mean"),
        std=built.get("std"),
        kwargs=built.get("kwargs"),
    )
    load_weights(loaded.module, folder / WEIGHTS_FILE)
    return loaded.module
