"""`pickle:FILE`: a whole module that `torch.save(model)` wrote."""

from __future__ import annotations

import torch
from torch import nn

from robustbench_ext.errors import ModelError
from robustbench_ext.models.sources.base import Found, Wanted, existing_file, options, refuse_unsafe


def load(wanted: Wanted) -> Found:
    """A pickled module. The classes that it is made of must be importable where it is loaded.

    Raises:
        ModelError: not allowed, no such file, or something else than a module in it.
    """
    options(wanted)
    file = existing_file(wanted)
    refuse_unsafe(
        wanted.spec,
        "a pickled model runs code of the file's choice while it is read",
        "Where you trust the file, write its weights down once: safetensors.torch.save_file(torch.load(PATH, "
        "weights_only=False).state_dict(), 'weights.safetensors'), and name file.py:factory + weights.safetensors.",
    )
    try:
        module = torch.load(str(file), map_location="cpu", weights_only=False)
    except Exception as error:  # unpickling raises whatever the classes that it needs raise
        raise ModelError(
            f"model '{wanted.spec}' cannot be loaded: {type(error).__name__}: {error}. The modules that define its classes "
            f"must be importable here (run from their folder, or set PYTHONPATH)."
        ) from error
    if not isinstance(module, nn.Module):
        raise ModelError(
            f"model '{wanted.spec}' holds {type(module).__name__}, expected a torch.nn.Module. Weights alone need their "
            f"architecture: ARCHITECTURE + {file}"
        )
    return Found(module)
