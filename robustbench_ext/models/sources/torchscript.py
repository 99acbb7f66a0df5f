"""`torchscript:FILE`: what `torch.jit.save` wrote."""

from __future__ import annotations

import warnings

import torch

from robustbench_ext.errors import ModelError
from robustbench_ext.models.sources.base import Found, Wanted, existing_file, options, refuse_unsafe


def load(wanted: Wanted) -> Found:
    """A TorchScript module, with gradients.

    Its code is no Python, and yet a program: PyTorch's interpreter runs it with all of PyTorch's operators, some of which read
    files. So it is for files that you trust, as `pickle:` and `pt2:` are.

    Raises:
        ModelError: not allowed, no such file, or no TorchScript.
    """
    options(wanted)
    file = existing_file(wanted)
    refuse_unsafe(
        wanted.spec,
        "a TorchScript file is a program, which PyTorch runs with all its operators",
        "Where you have the network's code, name that and its weights instead: file.py:factory + weights.safetensors. Without "
        "it, torch.onnx.export makes a file of a closed set of operators: onnx:FILE.",
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that torch.jit is deprecated: its files are there all the same
            module = torch.jit.load(str(file), map_location="cpu")
    except Exception as error:  # torch.jit raises RuntimeError for nearly everything
        raise ModelError(f"model '{wanted.spec}' cannot be loaded: {type(error).__name__}: {error}") from error
    return Found(module)
