"""Weights of a network from a file: safetensors, or PyTorch's own format as far as it holds tensors and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robustbench_ext.errors import ModelError
from robustbench_ext.models.sources.base import unsafe_allowed
from robustbench_ext.settings import UNSAFE

WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "network")  # keys that training scripts put weights under
PREFIXES = ("module.", "_orig_mod.")  # of DataParallel and of torch.compile
# torch.load(weights_only=True) of earlier releases could be made to run code (CVE-2025-32434).
SAFE_SINCE = (2, 6)


def load_weights(module: nn.Module, file: Path) -> list[str]:
    """Load a file's tensors into a module, strictly; returns notes on what had to be unwrapped.

    Args:
        file: .safetensors, or what `torch.save(state_dict)` wrote. The latter is read with `weights_only=True`, and must hold
            tensors only, perhaps under one of `WRAPPERS`; the prefixes that DataParallel and torch.compile add are taken off.

    Raises:
        ModelError: no such file, one that cannot be read or holds something else, or weights that do not fit.
    """
    if not file.is_file():
        raise ModelError(f"weights {file}: there is no such file")
    state, notes = _safetensors(file) if file.suffix == ".safetensors" else _pytorch(file)
    state, stripped = _without_prefixes(state, set(module.state_dict()))
    notes += stripped
    try:
        missing, unexpected = module.load_state_dict(state, strict=False)
    except Exception as error:  # torch says in its own words that shapes differ
        raise ModelError(f"weights {file} cannot be loaded: {error}") from error
    if missing or unexpected:
        raise ModelError(
            f"weights {file} do not fit: {len(missing)} missing ({', '.join(missing[:3])}...), {len(unexpected)} "
            f"unexpected ({', '.join(unexpected[:3])}...). Give the architecture that they were saved from."
        )
    return notes


def refuse_old_torch(what: str) -> None:
    """Raise where this PyTorch's reader of tensors can be made to run code, unless the user allows that.

    Raises:
        ModelError: PyTorch is older than 2.6.
    """
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < SAFE_SINCE and not unsafe_allowed():
        raise ModelError(
            f"{what}: PyTorch {torch.__version__} can be made to run code by such a file even with weights_only=True "
            f"(CVE-2025-32434). Install torch >= 2.6, convert the file to safetensors, or, if you trust it, set {UNSAFE}=1."
        )


def _safetensors(file: Path) -> tuple[dict[str, Tensor], list[str]]:
    from safetensors.torch import load_file

    try:
        return load_file(str(file)), []
    except Exception as error:  # safetensors' own class is not public in all versions
        raise ModelError(f"weights {file} cannot be loaded: {error}") from error


def _pytorch(file: Path) -> tuple[dict[str, Tensor], list[str]]:
    refuse_old_torch(f"weights {file}")
    try:
        content = torch.load(str(file), map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and torch each have their own ways to say no
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"weights {file} cannot be loaded as tensors ({reason}). Only tensors are read: pickled weights can run code when "
            f"they are loaded, and so can anything else in a pickle. A whole pickled "
            f"model is named pickle:{file}; or write the weights alone, once, where you trust the file: "
            f"safetensors.torch.save_file(model.state_dict(), 'weights.safetensors')"
        ) from error
    for wrapper in WRAPPERS:
        inner = content.get(wrapper) if isinstance(content, Mapping) else None
        if isinstance(inner, Mapping) and _is_state(inner):
            return dict(inner), [f"weights taken from '{wrapper}' in {file.name}"]
    if isinstance(content, Mapping) and _is_state(content):
        return dict(content), []
    held = (
        f"a mapping with {', '.join(map(str, list(content)[:5]))}"
        if isinstance(content, Mapping)
        else type(content).__name__
    )
    raise ModelError(
        f"weights {file} hold {held}, expected tensors by name, alone or under one of {', '.join(WRAPPERS)}. Save them alone: "
        f"torch.save(model.state_dict(), PATH)"
    )


def _is_state(content: Mapping[Any, Any]) -> bool:
    return bool(content) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items())


def _without_prefixes(state: dict[str, Tensor], wanted: set[str]) -> tuple[dict[str, Tensor], list[str]]:
    """Take off prefixes that all names have and the network's own names have not."""
    notes = []
    for _ in PREFIXES:  # one inside the other, in either order
        for prefix in PREFIXES:
            everywhere = bool(state) and all(name.startswith(prefix) for name in state)
            if everywhere and not any(name.startswith(prefix) for name in wanted):
                state = {name[len(prefix) :]: value for name, value in state.items()}
                notes.append(f"prefix '{prefix}' taken off the names of the weights")
    return state, notes
