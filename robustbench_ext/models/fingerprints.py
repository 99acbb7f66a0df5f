"""A key of a module: what it computes, as far as its own code decides it."""

from __future__ import annotations

import hashlib
import inspect
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from robustbench_ext.fingerprint import KEY_DIGITS, canonical_json
from robustbench_ext.named_code import followed


def fingerprint_module(module: nn.Module, extra: Any = None) -> str:
    """A key of a module: what it computes, as far as its own code decides it.

    Covers the bytes of parameters and buffers, the printed structure, plain attributes of every submodule, the whole
    source files of its classes and their bases (so also constants and helpers beside them), of classes in a file that was
    named (`file.py:factory`) also the modules beside it that its import statements lead to, the code of TorchScript modules,
    hooks and patched methods, and `extra`. Code in other files that a class calls is not followed.
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
    files |= {str(file) for cls in classes for file in followed(cls)}
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
