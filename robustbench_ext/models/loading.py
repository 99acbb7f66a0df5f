"""Models by name. One function understands every spelling:

    small-cnn                       a reference network with fresh weights
    small-cnn + weights.safetensors an architecture and its weights
    runs/x/models/KEY               a checkpoint that this project trained (a folder)
    pkg.module:factory              an importable factory of your own
    path/file.py:factory            a factory in a file
    torchvision:resnet18            a torchvision model (fresh weights, or `weights: DEFAULT`)

A factory is any callable that returns a `torch.nn.Module`, or a module object itself. Naming one runs its code.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from robustbench_ext.catalog import MODELS
from robustbench_ext.errors import ModelError, unknown_name
from robustbench_ext.fingerprint import KEY_DIGITS, canonical_json
from robustbench_ext.models.wrap import wrap

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
) -> LoadedModel:
    """Load a model by its specification.

    Args:
        spec: see the module's docstring.
        shape, num_classes: of the data; reference networks are built to them.
        mean, std: normalisation that the model expects, applied inside it.
        weights: a safetensors file, or (torchvision only) the name of published weights such as `DEFAULT`.
        kwargs: passed on to the factory or architecture.
        seed: of the fresh weights of a reference network; factories seed themselves.

    Raises:
        ModelError: nothing of that name, a factory that fails, weights that do not fit.
    """
    name, plus, file = (part.strip() for part in spec.partition("+"))
    weights = file if plus else weights
    notes: list[str] = []
    options = dict(kwargs or {})
    if name.startswith("torchvision:"):
        module, found_mean, found_std = _torchvision(name.partition(":")[2], weights, num_classes, options)
        if found_mean is not None and mean is None and std is None:
            mean, std = found_mean, found_std
            notes.append(
                f"normalisation mean={list(found_mean)}, std={list(found_std or ())} read from torchvision's weights"
            )
        weights = None if weights and not weights.endswith(".safetensors") else weights
    elif (Path(name) / RECIPE_FILE).is_file():
        module = _checkpoint(Path(name))
    elif name in MODELS:
        torch.manual_seed(seed)  # fresh weights are the same weights every time
        module = MODELS.load(name)(shape[0], num_classes, shape[1], **options)
    elif ":" in name:
        torch.manual_seed(0)  # a factory that does not seed itself must still give the same weights in every process
        module = _factory(name, options)
    else:
        known = unknown_name("model", name, MODELS.names())
        raise ModelError(
            f"{known} Or give pkg.module:factory, file.py:factory, torchvision:NAME or a checkpoint folder."
        )
    if weights is not None:
        _load_safetensors(module, Path(weights))
    module = wrap(module, mean, std).to(device)
    return LoadedModel(spec, module, fingerprint_module(module, options), tuple(notes))


def _module_of(file: Path) -> str:
    """A module name for a file, new when the file changes, so that an edited factory is read again."""
    return f"_rbx_{hashlib.sha256(str(file).encode() + file.read_bytes()).hexdigest()[:12]}"


def _factory(spec: str, kwargs: Mapping[str, Any]) -> nn.Module:
    where, _, attribute = spec.rpartition(":")
    try:
        if where.endswith(".py"):
            file = Path(where).resolve()
            if not file.is_file():
                raise ModelError(f"model '{spec}': there is no file {file}")
            name = _module_of(file)
            module_spec = importlib.util.spec_from_file_location(name, file)
            if module_spec is None or module_spec.loader is None:
                raise ModelError(f"model '{spec}': {file} cannot be imported")
            python = importlib.util.module_from_spec(module_spec)
            sys.modules[name] = python
            module_spec.loader.exec_module(python)
        else:
            if os.getcwd() not in sys.path:  # noqa: PTH109 - the string is what sys.path holds
                sys.path.insert(0, os.getcwd())  # noqa: PTH109
            python = importlib.import_module(where)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"model '{spec}': importing {where} failed with {type(error).__name__}: {error}") from error
    if not hasattr(python, attribute):
        public = [n for n in vars(python) if not n.startswith("_")]
        raise ModelError(f"model '{spec}': " + unknown_name(f"name in {where}", attribute, public))
    thing = getattr(python, attribute)
    if not isinstance(thing, nn.Module):
        try:
            thing = thing(**kwargs)
        except Exception as error:
            raise ModelError(
                f"model '{spec}': calling {attribute}({', '.join(f'{k}={v!r}' for k, v in kwargs.items())}) failed with "
                f"{type(error).__name__}: {error}. Arguments can be given as `kwargs:` in a suite."
            ) from error
    if not isinstance(thing, nn.Module):
        raise ModelError(f"model '{spec}': {attribute} gave {type(thing).__name__}, expected a torch.nn.Module")
    return thing


def _torchvision(
    name: str, weights: str | None, num_classes: int, kwargs: dict[str, Any]
) -> tuple[nn.Module, Sequence[float] | None, Sequence[float] | None]:
    from torchvision import models

    if name not in models.list_models():
        raise ModelError(unknown_name("torchvision model", name, models.list_models()))
    if weights is None or weights.endswith(".safetensors"):
        torch.manual_seed(0)
        return models.get_model(name, weights=None, **{"num_classes": num_classes, **kwargs}), None, None
    try:
        entry = models.get_model_weights(name)[weights]
    except KeyError:
        names = [w.name for w in models.get_model_weights(name)]
        raise ModelError(f"torchvision:{name}: " + unknown_name("weights", weights, names)) from None
    preset = entry.transforms()
    return models.get_model(name, weights=entry, **kwargs), tuple(preset.mean), tuple(preset.std)


def _checkpoint(folder: Path) -> nn.Module:
    recipe = json.loads((folder / RECIPE_FILE).read_text())
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
    _load_safetensors(loaded.module, folder / WEIGHTS_FILE)
    return loaded.module


def _load_safetensors(module: nn.Module, file: Path) -> None:
    from safetensors.torch import load_file

    if not file.is_file():
        raise ModelError(f"weights {file}: there is no such file")
    if file.suffix != ".safetensors":
        raise ModelError(
            f"weights {file}: expected a .safetensors file; pickled weights can run code when they are loaded. Convert "
            f"once: safetensors.torch.save_file(torch.load(PATH, weights_only=True), 'weights.safetensors')"
        )
    try:
        missing, unexpected = module.load_state_dict(load_file(str(file)), strict=False)
    except Exception as error:  # safetensors and torch each have their own ways to say that a file does not fit
        raise ModelError(f"weights {file} cannot be loaded: {error}") from error
    if missing or unexpected:
        raise ModelError(
            f"weights {file} do not fit: {len(missing)} missing ({', '.join(missing[:3])}...), {len(unexpected)} "
            f"unexpected ({', '.join(unexpected[:3])}...). Give the architecture that they were saved from."
        )


def fingerprint_module(module: nn.Module, extra: Any = None) -> str:
    """A key of a module: what it computes, as far as its own code decides it.

    Covers the bytes of parameters and buffers, the printed structure, plain attributes of every submodule, the whole
    source files of its classes and their bases (so also constants and helpers beside them), the code of TorchScript
    modules, hooks and patched methods, and `extra`. Code in other files that a class calls is not followed.
    """
    digest = hashlib.sha256()
    state = module.state_dict()
    for name in sorted(state):
        value = state[name]
        if isinstance(value, torch.Tensor):
            raw = value.detach().cpu().contiguous()
            digest.update(f"{name}|{raw.dtype}|{tuple(raw.shape)}|".encode())
            digest.update(raw.reshape(-1).view(torch.uint8).numpy().tobytes() if raw.numel() else b"")
    digest.update(_ADDRESS.sub("", repr(module)).encode())
    for name, part in module.named_modules():
        digest.update(f"{name}|{type(part).__qualname__}|{_plain_attributes(part)}".encode())
        for function in _attached_code(part):
            digest.update(function)
    classes = {base for m in module.modules() for base in type(m).__mro__ if _is_foreign(base)}
    files = {inspect.getsourcefile(cls) for cls in classes if _has_file(cls)}
    for file in sorted(f for f in files if f is not None):
        digest.update(hashlib.sha256(Path(file).read_bytes()).digest())
    digest.update(canonical_json(extra).encode())
    return digest.hexdigest()[:KEY_DIGITS]


_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def _is_foreign(cls: type) -> bool:
    return cls is not object and not cls.__module__.startswith(("torch.", "torchvision.", "typing", "abc"))


def _has_file(cls: type) -> bool:
    try:
        file = inspect.getsourcefile(cls)
    except (TypeError, OSError):
        return False
    return file is not None and Path(file).is_file()


def _plain_attributes(module: nn.Module) -> str:
    """Numbers, strings and containers of them that a module keeps beside its tensors, such as a `roll` or a `scale`."""
    plain = (bool, int, float, str, type(None))

    def keep(value: Any) -> bool:
        if isinstance(value, (list, tuple, set, frozenset)):
            return all(keep(v) for v in value)
        return isinstance(value, plain) or (isinstance(value, dict) and all(keep(v) for v in value.values()))

    found = {k: v for k, v in vars(module).items() if k != "training" and not k.startswith("_") and keep(v)}
    return repr(sorted(found.items()))


def _attached_code(module: nn.Module) -> list[bytes]:
    """Code that belongs to this instance: TorchScript, a patched forward, hooks."""
    found = []
    if isinstance(module, torch.jit.ScriptModule):
        found.append(str(module.code).encode())
    functions = [v for v in vars(module).values() if callable(v) and not isinstance(v, nn.Module)]
    for registry in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks"):
        functions += list(getattr(module, registry, {}).values())
    for function in functions:
        code = getattr(function, "__code__", None)
        constants = repr(code.co_consts).encode() if code is not None else b""
        found.append(
            _ADDRESS.sub("", constants.decode()).encode() + (code.co_code if code is not None else b"callable")
        )
    return found
